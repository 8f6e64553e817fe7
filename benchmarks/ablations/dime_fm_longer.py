"""DIME-FM and its two baselines for twice as many steps, on val and once on test: the spec and knobs of `dime_fm`.

    python -m benchmarks.ablations.dime_fm_longer

The settings were chosen on val of seed 0 with 300 steps. The test images are read here, for these students and their
teacher, and nowhere else.
"""

import statistics
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.ablations.dime_fm import RATE, SPEC, UNPAIRED
from benchmarks.ablations.harness import Arm, compare

NAME = "ablation_dime_fm_longer"
LONGER = {**SPEC, "train": {**SPEC["train"], "steps": 600}}
ARMS = [
    Arm("paired contrastive, from scratch", "paired_contrastive", RATE, 0, 0),
    Arm("cosine regression", "embedding_regression", RATE, 0, 0),
    Arm("L_vl + L_p-vl, prompts of the class names", "dime_fm", {**UNPAIRED, "texts": "prompts"}, 0, 0),
]


def on_test(folder: Path) -> dict[str, list[float]]:
    """Accuracy on test of every student below a sweep's folder, by the name of its arm, and of the teacher."""
    from orchestrator.data.labels import open_labels
    from orchestrator.data.pixels import RenderedPixels
    from orchestrator.data.task import load_task
    from orchestrator.data.views import Policy
    from orchestrator.evaluate.metrics import score
    from orchestrator.models.load import Preprocessing, load_network, load_student
    from orchestrator.spec import parse_spec
    from orchestrator.sweep.folder import resolved
    from orchestrator.trial.context import SweepContext
    from orchestrator.trial.plan import Cell, TrialConfig
    from orchestrator.trial.score import zero_shot

    raw = {**LONGER, "name": NAME, "storage": str(folder.parent), "methods": {"dime_fm": {}}}
    spec = resolved(parse_spec(raw))
    context = SweepContext(spec, str(folder))
    task, teacher = load_task(spec.task, context.store), load_network(spec.teachers[0], "teacher")
    plain, count = Policy(1.0, 0.0), len(task.test)

    def value(network: nn.Module, preprocessing: Preprocessing) -> float:
        pixels = RenderedPixels(task, task.test, plain, preprocessing)
        labels = open_labels(context.store, task, task.test, range(count), plain, 1, preprocessing.size, limit_gb=0)
        return score(network, preprocessing, pixels, labels, count, task.spec.kind, len(task.classes)).value

    config = TrialConfig("teacher", 0, Cell("dime_fm", 0, 0), {}, 0)
    found = {"teacher": [value(zero_shot(context, config, task, teacher.module), teacher.preprocessing)]}
    for path in sorted((folder / "students").iterdir()):
        network, meta = load_student(path)
        arm, _, _ = path.name.rpartition("-")
        found.setdefault(arm, []).append(value(network, Preprocessing.from_json(meta["preprocessing"])))
    return found


def told(storage: str) -> dict[str, Any]:
    """Prints and returns what `on_test` finds."""
    found = on_test(Path(storage).absolute() / NAME)
    for arm, values in found.items():
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"test  {arm}: {statistics.mean(values):.4f}{spread}")
    return {"test": found}


if __name__ == "__main__":
    compare(NAME, "DIME-FM on icons, twice as long: does it beat the baselines?", LONGER, ARMS, more=told)
