"""The sweep's rows: one JSON file a trial is the truth, `trials.parquet` the table made of them."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FINAL = ("complete", "pruned", "failed")


class Ledger:
    """Rows below `<sweep>/trials/`.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.rows_folder = self.folder / "trials"

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row at once; a final row is never replaced by an unfinished one."""
        known = self.read(row["trial_id"])
        if known is not None and known["status"] in FINAL and row["status"] not in FINAL:
            return
        self.rows_folder.mkdir(parents=True, exist_ok=True)
        temporary = self.rows_folder / f".{uuid.uuid4().hex}"
        temporary.write_text(json.dumps(row), encoding="utf-8")
        os.replace(temporary, self.rows_folder / f"{row['trial_id']}.json")

    def read(self, trial_id: str) -> dict[str, Any] | None:
        """One row, or None."""
        try:
            return json.loads((self.rows_folder / f"{trial_id}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def rows(self) -> list[dict[str, Any]]:
        """All rows, by trial."""
        return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(self.rows_folder.glob("t*.json"))]

    def publish(self) -> None:
        """Writes `trials.parquet` from the rows, at once."""
        rows = self.rows()
        if not rows:
            return
        temporary = self.folder / f".trials-{uuid.uuid4().hex}.parquet"
        schema = pa.Table.from_pylist(rows[:1]).schema
        # An all-None text column would be typed null; a name is always text.
        for name in ("teacher", "student"):
            schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
        os.replace(temporary, self.folder / "trials.parquet")
