"""What a model name means, and what can be said of it without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import timm
from timm.models import get_pretrained_cfg

from orchestrator.errors import UserError, listed, nearest
from orchestrator.models.clip import check_clip, is_clip
from orchestrator.spec import Model

Role = Literal["teacher", "student"]
PACKAGED = ("clip_icons", "efficientnet_lite0", "vit_clipart")
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


def wants_weights(entry: Model, role: Role) -> bool:
    """Whether pre-trained weights are loaded: always for `local:`, by `pretrained`, and by role where that is null."""
    if entry.model.startswith("local:"):
        return True
    if entry.pretrained is not None:
        return entry.pretrained
    return role == "teacher" or entry.model.startswith("packaged/")


def timm_name(entry: Model) -> str:
    """The timm architecture (with tag, where given) of an entry that timm can build.

    Raises:
        UserError: naming the nearest model, if timm has none of that name.
    """
    if entry.model == "packaged/efficientnet_lite0":
        return "tf_efficientnet_lite0"
    source = entry.model
    if source.startswith("local:"):
        if entry.architecture is None:
            raise UserError(f"The model {source!r} needs `architecture: timm/NAME`, the network that its weights fit.")
        source = entry.architecture
    name = source.removeprefix("timm/")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UserError(f"There is no timm model {base!r} ({entry.model}).{nearest(base, timm.list_models())}")
    if tag:
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*")]
        if tag not in tags:
            raise UserError(
                f"The timm model {base!r} has no weights tagged {tag!r} ({entry.model}); "
                f"it has {listed(tags)}.{nearest(tag, tags)}"
            )
    return name


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


def check_model(entry: Model, role: Role) -> list[str]:
    """Checks a name as far as it can be without loading weights.

    Returns:
        What could not be checked, one sentence each.

    Raises:
        UserError: if the model or its file does not exist.
    """
    if entry.model.startswith("packaged/"):
        name = entry.model.removeprefix("packaged/")
        if name not in PACKAGED:
            known = listed(f"packaged/{one}" for one in PACKAGED)
            raise UserError(f"There is no packaged model {entry.model!r}; there are {known}.{nearest(name, PACKAGED)}")
        return []
    if is_clip(entry):
        return check_clip(entry, wants_weights(entry, role))
    if entry.model.startswith("local:"):
        local_weights(entry)
        timm_name(entry)
        return []
    name = timm_name(entry)
    return _check_hub(entry, name) if wants_weights(entry, role) else []


def _check_hub(entry: Model, name: str) -> list[str]:
    from huggingface_hub import file_exists, try_to_load_from_cache

    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm has no pre-trained weights for {entry.model!r}; set `pretrained: false` or name a tag.")
    repository = cfg.hf_hub_id
    if not repository:
        return [f"{entry.model}: its weights are not on the hub, so whether they can be fetched was not checked."]
    if repository == "timm/":
        repository += name
    if any(isinstance(try_to_load_from_cache(repository, f), str) for f in ("model.safetensors", "pytorch_model.bin")):
        return []
    try:
        reachable = file_exists(repository, "model.safetensors") or file_exists(repository, "pytorch_model.bin")
    except Exception as error:  # whatever the hub's client raises offline: the check goes on and says so
        return [
            f"{entry.model}: the hub could not be reached ({type(error).__name__}), "
            f"so whether the weights {repository} can be downloaded was not checked."
        ]
    if not reachable:
        raise UserError(f"The hub has no weights {repository!r} for {entry.model!r}.")
    return []
