"""What a corpus is made from and how, and what can be wrong with that."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.corpus.clean import ImageRules
from orchestrator.data.corpus.sources import Kind
from orchestrator.errors import UserError

ROWS_PER_SHARD: dict[Kind, int] = {"images": 4096, "sentences": 100_000}
ROW_GROUP: dict[Kind, int] = {"images": 256, "sentences": 10_000}


@dataclass(frozen=True)
class Settings:
    """What a corpus is made from and how; together with the source's files it decides every byte.

    Attributes:
        source: its address.
        kind: `images` or `sentences`.
        rows_per_shard, row_group: rows of a file, and of what is read of it at a time.
        rules: for images.
        longest: characters of a sentence or caption.
    """

    source: str
    kind: Kind
    rows_per_shard: int
    row_group: int
    rules: ImageRules
    longest: int

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        facts = asdict(self)
        rules = facts.pop("rules")
        return {**facts, **(rules if self.kind == "images" else {})}


def check_settings(settings: Settings, max_bad: float, out: Path) -> None:
    """Refuses what no corpus can be built with.

    Args:
        settings: of the build.
        max_bad: share of skipped items beyond which it stops.
        out: the folder to be made.

    Raises:
        UserError: naming the option.
    """
    rules = settings.rules
    least = {
        "--rows-per-shard": settings.rows_per_shard,
        "--min-side": rules.min_side,
        "--max-side": rules.max_side or 1,
        "--longest": settings.longest,
    }
    for name, value in least.items():
        if value < 1:
            raise UserError(f"{name}: {value} is less than 1.")
    if rules.max_side is not None and rules.max_side < rules.min_side:
        raise UserError(f"--max-side: {rules.max_side} is less than --min-side, which is {rules.min_side}.")
    if not 1 <= rules.quality <= 100:
        raise UserError(f"--quality: {rules.quality} is not between 1 and 100.")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad: {max_bad} is no share between 0 and 1.")
    if ":/" in str(out):
        raise UserError(f"OUT: {str(out)!r} is no local folder; build here, then copy the folder as it is.")
    if out.exists():
        raise UserError(f"OUT: {str(out)!r} exists already; name a folder that does not.")
