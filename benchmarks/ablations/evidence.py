"""Renders `benchmarks/results/ablation_*.json` as the tables of `docs/evidence.md`, between its markers.

python -m benchmarks.ablations.evidence
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"


def table(result: dict[str, Any]) -> str:
    """One result as Markdown."""
    steps = result["spec"]["train"]["steps"]
    lines = [
        f"{result['question']} {result['seeds']} seeds, {steps} steps at budget 1, batch "
        f"{result['spec']['train']['batch']}; {result['seconds'] / 60:.0f} minutes on {result['machine']}.",
        "",
        "| arm | val, mean ± sd | parameters | trained | steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {a['arm']} | {a['mean']:.3f} ± {a['sd']:.3f} | {a['params']:,} | {a['trained']:,} | {a['steps']} |"
        for a in result["arms"]
    ]
    if "teacher" in result:
        lines += ["", f"The teacher itself: {result['teacher']:.3f}."]
    return "\n".join(lines)


def main() -> None:
    """Rewrites what stands between `<!-- NAME -->` and `<!-- end -->` for each result."""
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("ablation_*.json")):
        block = f"<!-- {path.stem} -->\n{table(json.loads(path.read_text()))}\n<!-- end -->"
        text = re.sub(rf"<!-- {path.stem} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S)  # type: ignore[misc]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
