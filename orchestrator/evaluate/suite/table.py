"""The result of a suite as Markdown, and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.evaluate.suite.retrieval import KS

NAMES = {"zero_shot": "zero-shot", "head": "own head", "probe": "probe"}
SUFFIXES = (".md", ".json")


def markdown(result: dict[str, Any]) -> str:
    """Tables in percent with standard errors: a row a task, each shift, retrieval; then the notes."""
    parts = [f"# {result['model']}"]
    if result["tasks"]:
        parts += ["## Tasks", _tasks(result)]
        shifted = [task for task in result["tasks"] if task["robustness"]]
        if shifted:
            parts += ["## Robustness", _robustness(shifted)]
    if result["retrieval"]:
        parts += ["## Retrieval", _retrieval(result["retrieval"])]
    notes = [*result["notes"]]
    notes += [f"{row['name']}: {note}." for row in (*result["tasks"], *result["retrieval"]) for note in row["notes"]]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _tasks(result: dict[str, Any]) -> str:
    tasks, mean = result["tasks"], result["mean"]
    columns: list[tuple[str, list[str]]] = [
        ("task", [*(t["name"] for t in tasks), "mean"]),
        ("metric", [*(t["metric"] for t in tasks), ""]),
    ]
    for name, title in NAMES.items():
        if name in mean:
            columns.append((title, [*(_cell(t[name]) for t in tasks), _mean_cell(mean[name], tasks)]))
    for shots in dict.fromkeys(k for t in tasks for k in t["shots"]):
        name = f"shots_{shots}"
        cells = [_cell(t["shots"].get(shots)) for t in tasks]
        columns.append((f"{shots} shots", [*cells, _mean_cell(mean.get(name), tasks)]))
    for name, title in (("mean_shift", "shifts"), ("mean_synthetic", "synthetic shifts")):
        if name in mean:
            cells = [_cell((t["robustness"] or {}).get(name)) for t in tasks]
            columns.append((title, [*cells, _mean_cell(mean[name], tasks)]))
    counts = [t["images"]["test"] for t in tasks]
    columns.append(("test images", [*(str(n) for n in counts), str(sum(counts))]))
    return _grid([title for title, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)))


def _robustness(tasks: Sequence[dict[str, Any]]) -> str:
    rows = []
    for task in tasks:
        found = task["robustness"]
        by = NAMES[found["by"]]
        rows.append((task["name"], by, "(none)", _cell(found["base"]), "", str(found["base"]["images"])))
        for kind, mean in (("shifts", "mean_shift"), ("synthetic", "mean_synthetic")):
            for name, score in found[kind].items():
                base = score.get("base", found["base"])
                loss = f"{100 * (score['value'] - base['value']):+.1f}" if base else ""
                rows.append((task["name"], by, name, _cell(score), loss, str(score["images"])))
            if found[mean]:
                title = "mean of the shifts" if kind == "shifts" else "mean of the synthetic shifts"
                rows.append((task["name"], by, title, _cell(found[mean]), "", ""))
    return _grid(["task", "scored by", "shift", "score", "change", "images"], rows)


def _retrieval(rows: Sequence[dict[str, Any]]) -> str:
    directions = (("image_to_text", "image to text"), ("text_to_image", "text to image"))
    titles = [f"{title} R@{k}" for _, title in directions for k in KS]
    cells = [
        (row["name"], *(_cell(row[name][str(k)]) for name, _ in directions for k in KS), row["images"], row["captions"])
        for row in rows
    ]
    return _grid(["task", *titles, "images", "captions"], cells)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    draws = f" (sd {100 * score['sd']:.1f})" if score.get("sd") is not None else ""
    return f"{100 * score['value']:.1f} ± {100 * score['error']:.1f}{draws}"


def _mean_cell(score: dict[str, Any] | None, tasks: Sequence[dict[str, Any]]) -> str:
    if score is None:
        return ""
    return _cell(score) + (f" ({score['tasks']} of {len(tasks)})" if score["tasks"] < len(tasks) else "")


def _grid(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    table = [[str(cell).replace("|", "\\|") for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def check_out(path: Path) -> None:
    """Refuses a file that `write_result` could not write.

    Raises:
        UserError: if its name or folder is wrong.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out: {str(path)!r} ends in {path.suffix!r}; allowed: .md and .json.")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK) or path.is_dir():
        raise UserError(
            f"--out: {str(path)!r} cannot be written: its folder does not exist, or is closed, or it is one."
        )


def write_result(result: dict[str, Any], path: Path) -> None:
    """Writes Markdown or JSON, by the file's suffix, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(result, indent=1) if path.suffix == ".json" else markdown(result), "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
