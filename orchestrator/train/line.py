"""The line between a worker group and its trial's process: an actor, which imports nothing heavy."""

from __future__ import annotations

import asyncio


class Line:
    """What is asked waits for its own answer.

    A rank that dies while it waits leaves an answer that nobody takes; the next question has its own.
    """

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[int, float, float]] = asyncio.Queue()
        self.answers: dict[int, asyncio.Future[bool]] = {}
        self.count = 0

    async def ask(self, share: float, metric: float) -> bool:
        """Called by rank 0: how far the trial is and what it scores; returns whether to go on."""
        self.count += 1
        number = self.count
        self.answers[number] = asyncio.get_running_loop().create_future()
        await self.asked.put((number, share, metric))
        return await self.answers[number]

    async def hear(self) -> tuple[int, float, float]:
        """Called by the trial's process: the next question, with its number."""
        return await self.asked.get()

    async def answer(self, number: int, go_on: bool) -> None:
        """Called by the trial's process."""
        self.answers.pop(number).set_result(go_on)
