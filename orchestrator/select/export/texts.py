"""Writing a small text tower beside an exported image tower, so that new class names need no teacher."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import methods.parts.text_tower as parts
from orchestrator.errors import UserError, WorkError, first_lines
from orchestrator.models.clip import clip_config, clip_name, folder_of
from orchestrator.models.texts import StudentTexts
from orchestrator.packaged.clip import CONFIG, MERGES, tokenizer_of
from orchestrator.spec import Model

FOLDER, WEIGHTS = "text", "model.safetensors"
TOLERANCE = 1e-5
PROBES = ("a photo of a cat", "a rather longer text, with a number (42) and some punctuation!", "")

SCRIPT = '''\
"""Embeds texts into the space of the image tower beside it: python load.py TEXT ..., a JSON list for each.

For classes of your own: normalise the embeddings of their names and of an image (`network().embed(images)` of the
image tower's load.py), and take the largest product. Needs open_clip_torch (which brings torch) and safetensors.
"""

import importlib.util
import json
import sys
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "text.json").read_text(encoding="utf-8"))


def tokenizer():
    """Texts to numbers, [n, L]."""
    merges = HERE / "bpe.txt.gz"
    options = {"bpe_path": str(merges)} if merges.is_file() else {}
    return open_clip.get_tokenizer(CONFIG["tokenizer"] or f"local-dir:{HERE}", **options)


def tower():
    """The text tower with its weights, in evaluation mode: numbers [n, L] to embeddings [n, d]."""
    spec = importlib.util.spec_from_file_location("exported_text_tower", HERE / "text_tower.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    network = module.TextTower(**CONFIG["tower"])
    network.load_state_dict(load_file(HERE / "model.safetensors"))
    return network.eval()


@torch.inference_mode()
def embed(texts):
    """[n, d], not normalised."""
    return tower()(tokenizer()(list(texts)).long())


if __name__ == "__main__":
    for row in embed(sys.argv[1:]):
        print(json.dumps(row.tolist()))
'''


def write_texts(out: Path, tower: StudentTexts, teacher: Model) -> dict[str, Any]:
    """Writes `out/text`, reads it back and compares.

    Args:
        out: the folder of an export that is being written.
        tower: the text tower.
        teacher: the entry whose tokenizer it was trained for.

    Returns:
        `text_parameters`, and `text_difference`, the largest of an embedding's numbers.

    Raises:
        WorkError: if what was written does not give the tower's embeddings.
    """
    folder = out / FOLDER
    folder.mkdir()
    state = {k: v.contiguous().clone() for k, v in tower.module.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    source = folder_of(teacher)
    name = None if source is not None else clip_name(teacher)[0]
    if source is not None:
        (folder / CONFIG).write_text(json.dumps({"model_cfg": clip_config(teacher)}, indent=2), encoding="utf-8")
        if (source / MERGES).is_file():
            shutil.copy(source / MERGES, folder / MERGES)
    about = json.dumps({"tower": tower.arguments, "tokenizer": name}, indent=2)
    (folder / "text.json").write_text(about + "\n", encoding="utf-8")
    assert parts.__file__ is not None
    shutil.copy(parts.__file__, folder / "text_tower.py")
    (folder / "load.py").write_text(SCRIPT, encoding="utf-8")
    try:
        got = runpy.run_path(str(folder / "load.py"))["embed"](PROBES)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise WorkError(f"The text tower cannot be rebuilt from what was exported: {error}") from error
    difference = float((got - tower.embed(PROBES)).abs().max())
    if not torch.isfinite(got).all() or not difference <= TOLERANCE:
        raise WorkError(
            f"The exported text tower's embeddings differ from the student's by {difference:.2g}, more than "
            f"{TOLERANCE:g}; nothing was written."
        )
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return {"text_parameters": tower.parameters, "text_difference": difference}


class ExportedTexts:
    """Reads `text/` of an export again; none of its code is run.

    Args:
        folder: that `write_texts` wrote.

    Raises:
        UserError: if it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            about = json.loads((folder / "text.json").read_text(encoding="utf-8"))
            self._tower = parts.TextTower(**about["tower"])
            self._tower.load_state_dict(load_file(folder / WEIGHTS))
            name = about["tokenizer"]
            self._tokenize = open_clip.get_tokenizer(name) if name else tokenizer_of(folder)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"There is no readable text tower in {str(folder)!r}: {first_lines(error)}") from error
        self._tower.eval().requires_grad_(False)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[n, d] float32, not normalised."""
        return self._tower(self._tokenize(list(texts)).long()).clone()
