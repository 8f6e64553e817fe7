"""One line for each trial that ends, while a sweep runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback

from orchestrator.spec import SweepSpec
from orchestrator.sweep.ledger import FINAL, Ledger


class TrialLines(Callback):
    """Prints each final row once, with the number done and an estimate of the time to the end.

    Args:
        folder: the sweep's.
        spec: the sweep file.
        write: prints a line; None prints nothing.
    """

    def __init__(self, folder: Path, spec: SweepSpec, write: Callable[[str], None] | None) -> None:
        self.ledger, self.spec, self.write = Ledger(folder), spec, write
        self.started = time.time()
        self.seen = {row["trial_id"] for row in self.ledger.rows() if row["status"] in FINAL}
        self.before = len(self.seen)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore that we never do, and a console cannot be pickled.
        return self.__dict__ | {"write": None}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.write is None:
            return
        for row in self.ledger.rows():
            if row["status"] not in FINAL or row["trial_id"] in self.seen:
                continue
            self.seen.add(row["trial_id"])
            done, total = len(self.seen), self.spec.search.trials
            left = (time.time() - self.started) / (done - self.before) * (total - done)
            networks = " -> ".join(name for name in (row["teacher"], row["student"]) if name)
            end = f"val {row['val_metric']:.3f}" if row["status"] == "complete" else f"{row['status']}: {row['reason']}"
            self.write(
                f"{done:>3}/{total} {row['trial_id']} {row['method']:<13} {networks}: {end}, "
                f"{row['device_seconds']:.0f} device-s, about {max(0, left) / 60:.0f} min left"
            )
