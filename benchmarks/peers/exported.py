"""Loads exports as their users do, in a Python that has no package of ours; run by benchmarks/export_everywhere.py.

    python -I exported.py FOLDER...     # each: images.npy, logits.npy, and a folder for each format

Prints one line of JSON for each export: the largest difference of a logit, or why there is none.
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

OURS = ("orchestrator", "methods")


def logits_of(folder: Path, images: np.ndarray) -> np.ndarray:
    """What the export makes of [B, 3, S, S] normalised images, through its own `load.py` or onnxruntime alone."""
    if (folder / "model.onnx").exists():
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return session.run(["logits"], {"images": images})[0]
    with torch.inference_mode():
        return runpy.run_path(str(folder / "load.py"))["network"]()(torch.from_numpy(images)).numpy()


def main() -> None:
    found = [name for name in OURS if importlib.util.find_spec(name)]
    if found:
        sys.exit(f"This Python has {' and '.join(found)}; it must not.")
    torch.set_num_threads(1)
    for case in map(Path, sys.argv[1:]):
        images, want = np.load(case / "images.npy"), np.load(case / "logits.npy")
        for folder in sorted(path for path in case.iterdir() if path.is_dir()):
            line: dict[str, object] = {"case": case.name, "format": folder.name}
            try:
                line["difference"] = float(np.abs(logits_of(folder, images) - want).max())
            except Exception as error:  # one export that does not load must not hide the others
                line["error"] = f"{type(error).__name__}: {error}"[:500]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
