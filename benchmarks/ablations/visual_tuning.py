"""The families of Visual Tuning on about 1,000 labelled images: the order that VTAB-1k shows for a large ViT.

    python -m benchmarks.ablations.visual_tuning

There: linear probe << BitFit, VPT-shallow < full < VPT-deep < adapter, LoRA, AdaptFormer < SSF.
"""

from benchmarks.ablations.harness import Arm, compare

SPEC = {
    "task": {"data": "packaged/clipart", "shots": None},
    "teachers": ["packaged/vit_clipart"],
    "train": {"steps": 120, "batch": 32, "views": 2},
}
ARMS = [
    Arm("linear probe", "teacher_probe"),
    Arm("full (LP-FT)", "full_tuning"),
    Arm("partial, 1 block", "partial_tuning"),
    Arm("VPT-shallow", "vpt", {"depth": "shallow"}),
    Arm("VPT-deep", "vpt", {"depth": "deep"}),
    Arm("adapter", "adapter"),
    Arm("AdaptFormer", "adaptformer"),
    Arm("BitFit", "bitfit"),
    Arm("LoRA", "lora"),
    Arm("SSF", "ssf"),
]

if __name__ == "__main__":
    question = "Visual Tuning: each family's members at their defaults on all labelled training images"
    compare("ablation_visual_tuning", question, SPEC, ARMS)
