"""DIME-FM against cosine regression and paired contrastive training, and what each of its losses brings.

    python -m benchmarks.ablations.dime_fm

The packaged dual encoder teaches a student with at most half its parameters on icons of other designers than those of
the test. All arms see the same streamed images in the same order; the number is the zero-shot accuracy on val.
"""

from benchmarks.ablations.harness import Arm, compare

SPEC = {
    "task": {"data": "packaged/icons", "shots": None},
    "teachers": ["packaged/clip_icons"],
    "students": [{"model": "timm/test_resnet", "image_size": 64}],
    "corpus": {"images": "packaged/icons/images", "sentences": "packaged/icons/sentences"},
    "train": {"steps": 600, "batch": 128},
}
UNPAIRED = {"texts": "sentences", "text_rule": "all"}
ARMS = [
    Arm("paired contrastive, from scratch", "paired_contrastive", {}, 0, 0),
    Arm("cosine regression", "embedding_regression", {}, 0, 0),
    Arm("L_vl", "dime_fm", {**UNPAIRED, "pvl_weight": 0.0}, 0, 0),
    Arm("L_vl + L_p-vl", "dime_fm", {**UNPAIRED}, 0, 0),
    Arm("L_vl + L_p-vl + L_udist", "dime_fm", {**UNPAIRED, "udist_weight": 0.1}, 0, 0),
    Arm(
        "L_vl + L_p-vl, texts by coverage", "dime_fm", {**UNPAIRED, "text_rule": "coverage", "text_budget": 4000}, 0, 0
    ),
    Arm("L_vl + L_p-vl, prompts as texts", "dime_fm", {"texts": "prompts"}, 0, 0),
]

if __name__ == "__main__":
    compare(
        "ablation_dime_fm", "DIME-FM on icons, zero-shot: does unpaired distillation beat the baselines?", SPEC, ARMS
    )
