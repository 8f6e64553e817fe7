"""DIME-FM whose texts are the prompts of the class names, in place of sentences: the spec and knobs of `dime_fm`.

python -m benchmarks.ablations.dime_fm_prompts
"""

from benchmarks.ablations.dime_fm import SPEC, UNPAIRED
from benchmarks.ablations.harness import Arm, compare

NAME = "ablation_dime_fm_prompts"
ARMS = [Arm("L_vl + L_p-vl, prompts of the class names", "dime_fm", {**UNPAIRED, "texts": "prompts"}, 0, 0)]


if __name__ == "__main__":
    compare(NAME, "DIME-FM on icons: do the prompts of the class names teach as well as sentences?", SPEC, ARMS)
