"""WeCoLoRA: copying blocks does most of it, and six low-rank pairs a block do better than two or than all weights.

    python -m benchmarks.ablations.wecolora

The paper's order (methods' table at 1 % of ImageNet): random blocks < weight copy < + LoRA (q, v) < + six pairs.
"""

from typing import Any

from benchmarks.ablations.harness import Arm, compare

SPEC: dict[str, Any] = {
    "task": {"data": "packaged/clipart", "shots": 20},
    "teachers": ["packaged/vit_clipart"],
    "train": {"steps": 150, "batch": 64, "views": 3},
}
BASE: dict[str, Any] = {"factor": 3, "lr": 4e-3}
ARMS = [
    Arm("random blocks, all of their weights", "wecolora", {**BASE, "init": "random", "train": "all", "lr": 1e-3}),
    Arm("copy, hardly trained", "wecolora", {**BASE, "rank": 1, "targets": "qv", "budget": 0.01}),
    Arm(
        "copy, all weights of the blocks (WeCo+KD)",
        "wecolora",
        {**BASE, "train": "all", "target": "postnorm", "lr": 3e-4},
    ),
    Arm(
        "copy, all weights of the blocks, rate of the pairs", "wecolora", {**BASE, "train": "all", "target": "postnorm"}
    ),
    Arm("copy + LoRA on q, v", "wecolora", {**BASE, "rank": 16, "targets": "qv"}),
    Arm("copy + six pairs (WeCoLoRA)", "wecolora", {**BASE, "rank": 16, "targets": "all"}),
]

if __name__ == "__main__":
    question = "WeCoLoRA, every third of twelve blocks kept: what do weight copy and the low-rank pairs each bring?"
    compare("ablation_wecolora", f"{question} On all training images.", SPEC, ARMS)
    few = {**SPEC, "task": {**SPEC["task"], "unlabelled": False}}
    compare("ablation_wecolora_few", f"{question} On 180 images.", few, ARMS)
