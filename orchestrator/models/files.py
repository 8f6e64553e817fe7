"""Models that are files: the packaged ones and those of `local:`. What is told without torch."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec import Model

PACKAGED = ("clip_icons", "efficientnet_lite0", "vit_clipart")
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")  # .tar: torch's own, of old called *.pth.tar


def check_files(entry: Model) -> None:
    """Refuses a packaged model, or a file of weights, that there is not; what lies in a folder is left to others.

    Raises:
        UserError: naming the nearest one.
    """
    if entry.model.startswith("local:") and not Path(entry.model.removeprefix("local:")).expanduser().is_dir():
        local_weights(entry)
    prefix, _, name = entry.model.partition("/")
    if prefix == "packaged" and name not in PACKAGED:
        known = listed(f"packaged/{one}" for one in PACKAGED)
        raise UserError(f"There is no packaged model {entry.model!r}; there are {known}.{nearest(name, PACKAGED)}")


def local_weights(entry: Model) -> Path:
    """The file of a `local:` entry.

    Raises:
        UserError: if it is missing or not a kind that is read safely.
    """
    path = Path(entry.model.removeprefix("local:")).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"There is no weight file {str(path)!r} ({entry.model}).{nearest(path.name, near)}")
    if path.suffix not in WEIGHT_FILES:
        raise UserError(f"The weight file {str(path)!r} ends in {path.suffix!r}; allowed: {listed(WEIGHT_FILES)}.")
    return path
