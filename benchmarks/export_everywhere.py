"""One student of every method of a sweep, exported, and loaded in a new virtual environment without this package.

    python -m benchmarks.export_everywhere SWEEP_DIR...     # rewrites the table in docs/export.md

The environment gets timm, open_clip and onnxruntime in the versions that are installed here, and nothing else. Compared
are logits of val images; the exit code is 1 where one differs by more than the tolerance of its format.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, ROOT, machine, markdown, publish, versions
from orchestrator.data.task import load_task
from orchestrator.errors import UserError, WorkError
from orchestrator.models.clip import is_clip
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.select.export import FORMATS, Evidence
from orchestrator.select.export.config import STRUCTURE_FILE
from orchestrator.select.export.folder import TOLERANCE
from orchestrator.select.results import read_trials
from orchestrator.spec import Model, Task
from orchestrator.store import store_at
from orchestrator.sweep.export import export_trial
from orchestrator.sweep.ledger import open_sweep

MARK = "export_everywhere"
IMAGES = 8
PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "safetensors", "onnxruntime", "numpy", "pillow")
PAGE = ROOT / "docs" / "export.md"
OUTSIDE = Path(__file__).parent / "peers" / "exported.py"


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment with `PACKAGES`."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version(name).split('+')[0]}" for name in PACKAGES]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def exported(sweep: Path, under: Path) -> list[dict[str, Any]]:
    """Exports the best trial of each method in every format, with the student's own logits beside them."""
    spec, frame = open_sweep(sweep), read_trials(sweep)
    store = store_at(spec.store_address)
    objective = spec.objectives[0]
    frame = frame[frame["student_path"].astype(bool)]
    frame = frame.sort_values(objective.metric, ascending=objective.direction == "minimize").drop_duplicates("method")
    cases = []
    for row in frame.sort_values("method").to_dict("records"):
        case = under / f"{sweep.name}-{row['method']}"
        case.mkdir()
        network, meta = load_student(sweep / row["student_path"])
        task = load_task(Task.model_validate(meta["task"]), store)
        images = Evidence(task, store, Preprocessing.from_json(meta["preprocessing"])).val(IMAGES)
        with torch.inference_mode():
            logits = network.float().eval()(images)
        np.save(case / "images.npy", images.numpy())
        np.save(case / "logits.npy", logits.numpy())
        refused = {}
        for form in FORMATS:
            try:
                export_trial(sweep, case / form, str(row["trial_id"]), form)
            except (UserError, WorkError) as error:
                refused[form] = str(error)
        builder = "open_clip" if is_clip(Model.model_validate(meta["model"])) else "timm"
        loads = f"{builder} and `structure.py`" if (case / FORMATS[0] / STRUCTURE_FILE).exists() else builder
        print(case.name, *(f"{form}: {why}" for form, why in refused.items()), flush=True)
        cases.append({"case": case.name, "sweep": sweep.name, "method": row["method"], "loads": loads} | refused)
    return cases


def main() -> None:
    """Writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--python", type=Path, help="of an environment with the packages, without ours; else a new one")
    parser.add_argument("--keep", action="store_true", help="leave the rows of other sweeps in the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        python = options.python or environment(Path(scratch) / "venv")
        under = Path(scratch) / "exports"
        under.mkdir()
        cases = [case for sweep in options.sweeps for case in exported(sweep, under)]
        command = [python, "-I", OUTSIDE, *(under / case["case"] for case in cases)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", cwd=scratch)
    for line in map(json.loads, done.stdout.splitlines()):
        case = next(case for case in cases if case["case"] == line["case"])
        case[line["format"]] = line.get("difference", line.get("error"))
    shown = [*(_kept({sweep.name for sweep in options.sweeps}) if options.keep else []), *cases]
    cells = [[case["sweep"], case["method"], case["loads"], *(_cell(case[form]) for form in FORMATS)] for case in shown]
    head = ("sweep", "method", "loaded with", *(f"{form}, at most {TOLERANCE[form]:g}" for form in FORMATS))
    text = (
        f"`python -m benchmarks.export_everywhere`: largest difference of a logit over {IMAGES} val images; "
        f"{machine(1)}; {versions(*PACKAGES)}.\n\n{markdown(head, cells)}"
    )
    publish(MARK, {"cases": shown}, text, PAGE)
    wrong = [case for case in cases if not all(_fits(form, case[form]) for form in FORMATS)]
    print(text)
    sys.exit(f"{len(wrong)} of {len(cases)} students are not the same outside." if wrong else 0)


def _kept(but: set[str]) -> list[dict[str, Any]]:
    cases = json.loads((RESULTS / f"{MARK}.json").read_text(encoding="utf-8"))["cases"]
    return [case for case in cases if case["sweep"] not in but]


def _fits(form: str, found: float | str) -> bool:
    return isinstance(found, float) and found <= TOLERANCE[form]


def _cell(found: float | str) -> str:
    return f"{found:.1e}" if isinstance(found, float) else found


if __name__ == "__main__":
    main()
