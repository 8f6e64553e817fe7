"""How long the report of a big sweep takes to open: a made-up sweep in a headless Chromium.

python -m benchmarks.report --trials 1000
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from orchestrator.spec import parse_spec
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.report import write_report
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.row import blank_row

CELLS = (Cell("finetune", None, 0), Cell("kd", 0, 0), Cell("wecolora", 0, None))
READY = "document.documentElement.dataset.ready === 'yes'"


def made_up(storage: Path, trials: int) -> Path:
    """A sweep's folder with rows and learning curves of as many trials, none of which ran."""
    raw = {
        "name": "big",
        "task": {"data": "packaged/clipart"},
        "teachers": ["packaged/vit_clipart"],
        "students": ["timm/test_resnet"],
        "methods": {cell.method: {} for cell in CELLS},
        "search": {"trials": trials},
        "storage": str(storage),
    }
    spec = parse_spec(raw)
    folder = create(spec)
    ledger = Ledger(folder)
    for number in range(trials):
        name = f"t{number:04d}"
        knobs = {"lr": 10 ** (-4 + number % 97 / 48), "temperature": 1 + number % 7}
        row = blank_row(spec, TrialConfig(name, number, CELLS[number % 3], knobs, 0))
        quality = 0.7 + math.sin(number) / 5
        row |= {"status": "complete", "val_metric": quality, "params_total": 10**5 + 997 * (number % 211)}
        row |= {"flops": 10**7 + number, "latency_ms": 1 + number % 37 / 10, "device_seconds": 3 + number / 1000}
        ledger.write(row | {"student_path": f"students/{name}"})
        points = [
            {"step": float(s), "loss": 2 / (1 + s / 50) + number / 1e4, "ce": 1 / (1 + s)} for s in range(0, 500, 10)
        ]
        (folder / "students" / name).mkdir(parents=True)
        (folder / "students" / name / "history.json").write_text(json.dumps({"history": points}), encoding="utf-8")
    ledger.publish()
    return folder


def main() -> None:
    """Prints the size of the page, the seconds to make it, and those until it is drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage, sync_playwright() as driver:
        folder = made_up(Path(storage), options.trials)
        began = time.perf_counter()
        answer = write_report(folder, None, None, images=False)
        made = time.perf_counter() - began
        browser = driver.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        opened = []
        for _ in range(3):
            page = browser.new_page()
            began = time.perf_counter()
            page.goto((folder / "report.html").as_uri())
            page.wait_for_function(READY)
            opened.append(time.perf_counter() - began)
            page.close()
        browser.close()
    shown = ", ".join(f"{s:.2f}" for s in opened)
    print(f"{options.trials} trials: {answer['bytes'] / 1e6:.2f} MB, made in {made:.1f} s, open after {shown} s")


if __name__ == "__main__":
    main()
