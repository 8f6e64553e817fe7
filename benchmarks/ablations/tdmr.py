"""TDMR's idea: at few shots a proxy space and progressive distillation from it beat logits alone, across architectures.

    python -m benchmarks.ablations.tdmr

A transformer teaches a CNN, and a CNN teaches a transformer; same students, same steps, same images.
"""

from benchmarks.ablations.harness import Arm, compare

SPEC = {
    "task": {"data": "packaged/clipart", "shots": 10},
    "teachers": ["packaged/vit_clipart", {"model": "packaged/efficientnet_lite0", "image_size": 96}],
    "students": [{"model": "timm/test_resnet", "image_size": 48}, {"model": "timm/test_vit", "image_size": 48}],
    "train": {"steps": 600, "batch": 64, "views": 3},
}


def pair(name: str, teacher: int, student: int) -> list[Arm]:
    """The arms for one teacher and one student."""
    return [
        Arm(f"{name}: labels alone", "finetune", {}, None, student),
        Arm(f"{name}: kd", "kd", {}, teacher, student),
        Arm(f"{name}: tdmr, one-shot", "tdmr", {"mode": "none"}, teacher, student),
        Arm(f"{name}: tdmr, depth", "tdmr", {}, teacher, student),
    ]


ARMS = [*pair("ViT to CNN", 0, 0), *pair("CNN to ViT", 1, 1)]

if __name__ == "__main__":
    question = "TDMR at 10 labels a class: does the proxy space beat logit distillation and training on labels alone?"
    compare("ablation_tdmr", question, SPEC, ARMS)
