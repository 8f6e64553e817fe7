"""The packaged vision-language teacher, read as open_clip reads any local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

CLIP_ICONS = Path(__file__).with_name("clip_icons")
CONFIG, WEIGHTS, MERGES = "open_clip_config.json", "open_clip_model.safetensors", "bpe.txt.gz"


@dataclass(frozen=True)
class Preprocessing:
    """What open_clip's transform does with a picture before `encode_image`.

    Attributes:
        size: side in pixels, after resizing (`resize_mode`) and a centre crop.
        mean, std: of each RGB channel, on [0, 1].
        interpolation: of the resize.
        resize_mode: open_clip's word: `shortest`, `longest` or `squash`.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str


def clip_icons(*, pretrained: bool = True) -> CLIP:
    """A dual encoder for icons: `encode_image` (N, 3, 64, 64) and `encode_text` (N, 32) -> (N, 256).

    A plain open_clip `CLIP` in evaluation mode; `model.visual.preprocess_cfg` has open_clip's view of the transform.

    Raises:
        RuntimeError: if this installation lacks the weights.
    """
    if pretrained and not (CLIP_ICONS / WEIGHTS).is_file():
        raise RuntimeError(
            f"The packaged weights {CLIP_ICONS.name}/{WEIGHTS} are missing from this installation: reinstall it, or"
            " rebuild them with orchestrator/packaged/clip_icons/train.py."
        )
    import open_clip

    model: Any = open_clip.create_model(f"local-dir:{CLIP_ICONS}", load_weights=pretrained)
    return model.eval()


def clip_icons_tokenizer() -> SimpleTokenizer:
    """Texts to ids (N, 32). open_clip's tokenizer with 3,582 merges of our own, so that no token is untrained."""
    import open_clip

    return open_clip.get_tokenizer(f"local-dir:{CLIP_ICONS}", bpe_path=str(CLIP_ICONS / MERGES))


def clip_icons_preprocessing(model: Any) -> Preprocessing:
    """Of any open_clip model.

    Args:
        model: as `open_clip.create_model` returns it.
    """
    facts = model.visual.preprocess_cfg
    size = facts["size"] if isinstance(facts["size"], int) else facts["size"][0]
    return Preprocessing(size, tuple(facts["mean"]), tuple(facts["std"]), facts["interpolation"], facts["resize_mode"])
