"""What trials hold of the cluster: seconds in which their devices are theirs, whatever comes of it.

A trial holds its devices while Tune runs it: while it trains, waits for a stage that another computes, computes stages
that the store keeps for others, fails, and is run again. `device_seconds` of its row is what
its last process took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.files import at_once
from orchestrator.spec import SweepSpec
from orchestrator.sweep.capacity import room, shape_of
from orchestrator.sweep.ledger import Ledger

EVERY_S = 1.0  # between two saves, which is what a killed driver may forget


class Held:
    """Counts, in `held.json` of the sweep's folder, over all lives of its driver.

    Args:
        folder: the sweep's folder.
        spec: the sweep.
        device: `cpu` or `cuda`: what is counted.
        clock: seconds; another one in tests.
    """

    def __init__(
        self, folder: str | Path, spec: SweepSpec, device: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.spec, self.device, self.clock = Path(folder) / "held.json", spec, device, clock
        self.ledger = Ledger(folder)
        self.shape, self.workers = shape_of(spec, device)
        self.devices = self.shape["GPU" if device == "cuda" else "CPU"] * self.workers
        try:
            self.trials: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))["trials"]
        except FileNotFoundError:
            self.trials = {}
        self.last = self.saved = clock()

    def tick(self, running: Iterable[str]) -> None:
        """Adds the time since the last tick to the trials that ran in it, and saves now and then."""
        now = self.clock()
        passed, self.last = now - self.last, now
        for trial in running:
            self.trials.setdefault(trial, {"seconds": 0.0, "node_type": ""})["seconds"] += passed
        self.save()

    def save(self, force: bool = False) -> None:
        """Writes the seconds, if the last save is long enough ago."""
        now = self.clock()
        if not force and now - self.saved < EVERY_S:
            return
        for trial, known in self.trials.items():
            if not known["node_type"]:  # its process writes it into its row
                known["node_type"] = (self.ledger.read(trial) or {}).get("node_type", "")
        text = json.dumps({"device": self.device, "trials": self.trials})
        at_once(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.saved = now

    def device_seconds(self, trial: str) -> float:
        """What a trial has held so far, in devices (GPUs, or CPUs where there are none) times seconds."""
        return float(self.trials.get(trial, {"seconds": 0.0})["seconds"]) * self.devices

    def money(self, trial: str) -> float:
        """What that cost: the share of its nodes that it held, at their prices. The head and idle nodes are extra."""
        known = self.trials.get(trial)
        if known is None:
            return 0.0
        return float(known["seconds"]) / 3600 * self.workers * self._price(known["node_type"])

    def _price(self, node_type: str) -> float:
        """Of one process for an hour; on the dearest nodes that hold it, where it is not known on which it was."""
        cluster = self.spec.cluster
        fitting = [name for name, kind in cluster.nodes.items() if room(self.shape, kind.resources) > 0]
        chosen = [node_type] if node_type in fitting and self.workers == 1 else fitting
        prices = [cluster.prices.get(name, 0.0) * self._share(cluster.nodes[name].resources) for name in chosen]
        return max(prices, default=0.0)

    def _share(self, resources: dict[str, float]) -> float:
        return max(amount / resources[name] for name, amount in self.shape.items() if amount > 0)

    def exhausted(self, done: Collection[str], going: Collection[str]) -> bool:
        """Whether one more trial would go over the budget of device-hours or of money.

        Trials that run are expected to hold, in all, what the finished ones held in the mean, and so is the next one.

        Args:
            done: trials that are complete.
            going: trials that run.
        """
        search = self.spec.search
        limits = [(search.device_hours, lambda t: self.device_seconds(t) / 3600), (search.budget, self.money)]
        return any(limit is not None and self._over(limit, cost, done, going) for limit, cost in limits)

    def _over(self, limit: float, cost: Callable[[str], float], done: Collection[str], going: Collection[str]) -> bool:
        mean = sum(cost(trial) for trial in done) / len(done) if done else 0.0
        spent = sum(cost(trial) for trial in self.trials)
        coming = sum(max(0.0, mean - cost(trial)) for trial in going)
        return spent >= limit or spent + coming + mean > limit


def bill(folder: str | Path) -> dict[str, Any]:
    """What a sweep has held, by trial and in all.

    Returns:
        `trials`: a row for each, with status, seconds, device_seconds held and own, node type and money; `total`,
        and of it what failed trials held. What is held beyond a trial's own is the start of processes, and those that
        died.

    Raises:
        UserError: if the sweep has held nothing yet.
    """
    from orchestrator.sweep.ledger import open_sweep

    spec, path = open_sweep(folder), Path(folder) / "held.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no held.json: no trial of it has run since that is counted.")
    device = json.loads(path.read_text(encoding="utf-8"))["device"]
    rows = {row["trial_id"]: row for row in Ledger(folder).rows()}
    held = Held(folder, spec, device)
    trials = []
    for trial in sorted(held.trials):
        row = rows.get(trial, {})
        trials.append(
            {
                "trial": trial,
                "method": row.get("method", ""),
                "status": row.get("status", "running"),
                "seconds": held.trials[trial]["seconds"],
                "device_seconds": held.device_seconds(trial),
                "own_device_seconds": float(row.get("device_seconds") or 0.0),
                "node_type": held.trials[trial]["node_type"],
                "money": held.money(trial),
            }
        )
    names = ("seconds", "device_seconds", "own_device_seconds", "money")

    def total(chosen: list[dict[str, Any]]) -> dict[str, float]:
        return {name: sum(float(row[name]) for row in chosen) for name in names}

    return {
        "trials": trials,
        "total": total(trials),
        "failed": total([row for row in trials if row["status"] == "failed"]),
        "device": "GPU" if device == "cuda" else "CPU",
        "budget": spec.search.budget,
        "device_hours": spec.search.device_hours,
    }
