"""The line between a worker group and its trial's process: an actor, which imports nothing heavy."""

from __future__ import annotations

import asyncio
from typing import Any


class Line:
    """Jobs go to the ranks, one after another; questions, ends and complaints come back.

    A line is of one group: what is left in it when a rank dies is gone with it.
    """

    def __init__(self) -> None:
        self.job: bytes | None = None
        self.number = -1  # of the last job, or of the end
        self.given = asyncio.Condition()
        self.said: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.answers: dict[int, asyncio.Future[bool]] = {}
        self.count = 0
        self.outcomes: dict[int, Any] = {}

    async def give(self, job: bytes | None) -> None:
        """Called by the trial's process: the next job; None ends the group."""
        async with self.given:
            self.job = job
            self.number += 1
            self.given.notify_all()

    async def take(self, number: int) -> bytes | None:
        """Called by each rank: job `number`, once it is there."""
        async with self.given:
            await self.given.wait_for(lambda: self.number >= number)
            return self.job

    async def done(self, rank: int, world: int, outcome: Any) -> None:
        """Called by each rank. Rank 0's outcome is told once all have come to the end."""
        self.outcomes[rank] = outcome
        if len(self.outcomes) == world:
            await self.said.put(("done", self.outcomes[0]))
            self.outcomes = {}

    async def complain(self, about: str, text: str) -> None:
        """Called by a rank that cannot go on, while the others wait for it."""
        await self.said.put((about, text))

    async def ask(self, share: float, metric: float) -> bool:
        """Called by rank 0: how far the trial is and what it scores; returns whether to go on."""
        self.count += 1
        number = self.count
        self.answers[number] = asyncio.get_running_loop().create_future()
        await self.said.put(("ask", (number, share, metric)))
        return await self.answers[number]

    async def hear(self) -> tuple[str, Any]:
        """Called by the trial's process: what is said next, of which kind."""
        return await self.said.get()

    async def answer(self, number: int, go_on: bool) -> None:
        """Called by the trial's process."""
        self.answers.pop(number).set_result(go_on)
