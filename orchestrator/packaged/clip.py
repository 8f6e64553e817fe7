"""The packaged vision-language teacher, read as open_clip reads any local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_clip.model import CLIP

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

    A plain open_clip `CLIP` in evaluation mode, in single precision.

    Raises:
        RuntimeError: if this installation lacks the weights.
    """
    return clip_of(CLIP_ICONS, pretrained=pretrained)


def clip_icons_tokenizer() -> Any:
    """Texts to ids (N, 32): open_clip's tokenizer with merges of our own, so that no token is untrained."""
    return tokenizer_of(CLIP_ICONS)


def clip_of(folder: Path, *, pretrained: bool = True) -> Any:
    """The open_clip model in a folder of `open_clip_config.json` and weights.

    Raises:
        RuntimeError: if weights are wanted and missing.
    """
    if pretrained and not (folder / WEIGHTS).is_file():
        raise RuntimeError(
            f"The weights {folder.name}/{WEIGHTS} are missing from this installation: reinstall it, or rebuild them"
            " with orchestrator/packaged/clip_icons/train.py."
        )
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}", load_weights=pretrained).eval()


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer; byte-pair merges of its own in `bpe.txt.gz` replace open_clip's."""
    import open_clip

    merges = folder / MERGES
    own = {"bpe_path": str(merges)} if merges.is_file() else {}
    return open_clip.get_tokenizer(f"local-dir:{folder}", **own)


def preprocessing_of(model: Any) -> Preprocessing:
    """Of any model that `open_clip.create_model` returned."""
    facts = model.visual.preprocess_cfg
    size = facts["size"] if isinstance(facts["size"], int) else facts["size"][0]
    return Preprocessing(size, tuple(facts["mean"]), tuple(facts["std"]), facts["interpolation"], facts["resize_mode"])
