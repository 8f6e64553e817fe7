"""The sweep's rows: one JSON file a trial is the truth, `trials.parquet` the table made of them. And its clock."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import UserError
from orchestrator.files import at_once, once
from orchestrator.spec import SweepSpec, read_spec

FINAL = ("complete", "infeasible", "pruned", "failed")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return row


def open_sweep(folder: str | Path) -> SweepSpec:
    """The sweep file of an existing sweep.

    Raises:
        UserError: if the folder holds none.
    """
    folder = Path(folder)
    if not (folder / "sweep.yaml").is_file():
        raise UserError(f"{str(folder)!r} is not a sweep's folder: it has no sweep.yaml.")
    spec = read_spec(folder / "sweep.yaml")
    # The folder may have been moved, or be mounted elsewhere on this machine.
    return spec.model_copy(update={"storage": str(folder.absolute().parent)})


class Ledger:
    """Rows below `<sweep>/trials/`: `<trial>.json` once it is final, `running/<trial>.json` until then.

    A final row is written once, whoever comes second: a process on a node that was given up for dead may still be
    alive, and end the trial that was begun again elsewhere.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.rows_folder = self.folder / "trials"
        self.running_folder = self.rows_folder / "running"
        self._final: dict[str, dict[str, Any]] = {}  # final rows never change: read once
        self._next_publish = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row at once; a final row is never replaced."""
        trial_id, text = row["trial_id"], json.dumps(row)
        if row["status"] not in FINAL:
            if self.final(trial_id) is None:
                self.running_folder.mkdir(parents=True, exist_ok=True)
                at_once(self.running_folder / f"{trial_id}.json", lambda to: to.write_text(text, encoding="utf-8"))
            return
        self.rows_folder.mkdir(parents=True, exist_ok=True)
        once(self.rows_folder / f"{trial_id}.json", lambda to: to.write_text(text, encoding="utf-8"))
        for name in (f"{trial_id}.json", f"{trial_id}.lives"):
            (self.running_folder / name).unlink(missing_ok=True)
        if row.get("student_path"):  # the whole curve lies beside the student
            (self.rows_folder / f"{trial_id}.loss.jsonl").unlink(missing_ok=True)

    def final(self, trial_id: str) -> dict[str, Any] | None:
        """The row of a trial that has ended, or None."""
        if trial_id not in self._final:
            row = _read(self.rows_folder / f"{trial_id}.json")
            if row is None:
                return None
            self._final[trial_id] = row
        return dict(self._final[trial_id])

    def read(self, trial_id: str) -> dict[str, Any] | None:
        """One row, or None."""
        found = self.final(trial_id) or _read(self.running_folder / f"{trial_id}.json")
        return found or self.final(trial_id)  # it may have ended between the two looks

    def live(self, trial_id: str, node: str) -> list[str]:
        """Notes that a process on `node` begins this trial; returns the nodes of those that began it before."""
        self.running_folder.mkdir(parents=True, exist_ok=True)
        path = self.running_folder / f"{trial_id}.lives"
        before = path.read_text(encoding="utf-8").split() if path.is_file() else []
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{node}\n")
        return before

    def revive(self, trial_id: str) -> None:
        """Forgets how often the trial was begun: with a new driver, it counts anew."""
        (self.running_folder / f"{trial_id}.lives").unlink(missing_ok=True)

    def mark(self, trial_id: str, share: float, metric: float) -> None:
        """Notes the val metric at a share of a trial's budget; see `select.report.curves`."""
        self.rows_folder.mkdir(parents=True, exist_ok=True)
        with (self.rows_folder / f"{trial_id}.val.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"share": share, "val_metric": metric}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows, by trial."""
        names = {path.stem for path in (*self.rows_folder.glob("t*.json"), *self.running_folder.glob("t*.json"))}
        found = (self.read(name) for name in sorted(names))
        return [row for row in found if row is not None]

    def publish(self, *, now: bool = True) -> None:
        """Writes `trials.parquet` from the rows, at once.

        Args:
            now: False leaves it to a later call if the last one is short ago; the table of many trials takes long to
                write, and this keeps it below a twentieth of the driver's time.
        """
        began = time.monotonic()
        if not now and began < self._next_publish:
            return
        rows = self.rows()
        if not rows:
            return
        schema = pa.Table.from_pylist(rows[:1]).schema
        # An all-None text column would be typed null; a name is always text.
        for name in ("teacher", "student"):
            schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
        table = pa.Table.from_pylist(rows, schema=schema)
        at_once(self.folder / "trials.parquet", lambda temporary: pq.write_table(table, temporary))
        ended = time.monotonic()
        self._next_publish = ended + max(1.0, 20 * (ended - began))


class Clock:
    """The seconds that a sweep has run, over all lives of its driver: a resumed sweep has no new time budget.

    Args:
        folder: the sweep's folder; `clock.json` there is the memory of earlier lives.
        every_s: seconds between two saves, which is what a killed driver may forget.
    """

    def __init__(self, folder: str | Path, every_s: float = 1.0) -> None:
        self.path, self.every_s = Path(folder) / "clock.json", every_s
        try:
            self.before = float(json.loads(self.path.read_text(encoding="utf-8"))["seconds"])
        except FileNotFoundError:
            self.before = 0.0
        self.started = self.saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def save(self, force: bool = False) -> None:
        """Writes the seconds, if the last save is long enough ago."""
        if not force and time.monotonic() - self.saved < self.every_s:
            return
        text = json.dumps({"seconds": self.seconds})
        at_once(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.saved = time.monotonic()
