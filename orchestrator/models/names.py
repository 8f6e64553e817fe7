"""What a model name means, and what can be said of it without loading weights."""

from __future__ import annotations

from typing import Literal

import timm

from orchestrator.errors import UserError, listed, nearest
from orchestrator.models.hub import MARK, hub_config, is_hub
from orchestrator.spec import Model

Role = Literal["teacher", "student"]


def wants_weights(entry: Model, role: Role) -> bool:
    """Whether pre-trained weights are loaded: always for `local:`, by `pretrained`, and by role where that is null."""
    if entry.model.startswith("local:"):
        return True
    if entry.pretrained is not None:
        return entry.pretrained
    return role == "teacher" or entry.model.startswith("packaged/")


def timm_name(entry: Model) -> str:
    """The timm architecture (with tag, where given) of an entry that timm can build; `hf-hub:...` where it says so.

    Raises:
        UserError: naming the nearest model, if timm has none of that name.
    """
    if is_hub(entry):
        hub_config(entry)
        return entry.model.removeprefix("timm/")
    if entry.model == "packaged/efficientnet_lite0":
        return "tf_efficientnet_lite0"
    source = entry.model
    if source.startswith("local:"):
        if entry.architecture is None:
            raise UserError(f"The model {source!r} needs `architecture: timm/NAME`, the network that its weights fit.")
        source = entry.architecture
    name = source.removeprefix("timm/")
    if name.startswith(MARK):
        raise UserError(f"The model {entry.model!r} needs `architecture: timm/NAME`, and {source!r} is a repository.")
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
