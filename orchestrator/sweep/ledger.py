"""The sweep's rows: one JSON file a trial is the truth, `trials.parquet` the table made of them. And its clock."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FINAL = ("complete", "infeasible", "pruned", "failed")


def at_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces a file whole: a reader sees the old one or the new one, and a failed write leaves nothing behind."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Ledger:
    """Rows below `<sweep>/trials/`.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.rows_folder = self.folder / "trials"
        self._final: dict[str, dict[str, Any]] = {}  # final rows never change: read once
        self._next_publish = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row at once; a final row is never replaced by an unfinished one."""
        known = self.read(row["trial_id"])
        if known is not None and known["status"] in FINAL and row["status"] not in FINAL:
            return
        self.rows_folder.mkdir(parents=True, exist_ok=True)
        path = self.rows_folder / f"{row['trial_id']}.json"
        at_once(path, lambda temporary: temporary.write_text(json.dumps(row), encoding="utf-8"))
        self._final.pop(row["trial_id"], None)

    def read(self, trial_id: str) -> dict[str, Any] | None:
        """One row, or None."""
        if trial_id in self._final:
            return dict(self._final[trial_id])
        try:
            row = json.loads((self.rows_folder / f"{trial_id}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if row["status"] in FINAL:
            self._final[trial_id] = row
        return dict(row)

    def mark(self, trial_id: str, share: float, metric: float) -> None:
        """Notes the val metric at a share of a trial's budget; see `select.report.curves`."""
        self.rows_folder.mkdir(parents=True, exist_ok=True)
        with (self.rows_folder / f"{trial_id}.val.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"share": share, "val_metric": metric}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows, by trial."""
        found = (self.read(path.stem) for path in sorted(self.rows_folder.glob("t*.json")))
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
