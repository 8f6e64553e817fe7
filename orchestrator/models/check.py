"""What can be said of a model's name before its weights are loaded, and what cannot."""

from __future__ import annotations

from timm.models import get_pretrained_cfg

from orchestrator.errors import UserError
from orchestrator.models.clip import check_clip, is_clip
from orchestrator.models.files import check_files, local_weights
from orchestrator.models.hub import hub_weights, is_hub
from orchestrator.models.load import load_network
from orchestrator.models.names import Role, timm_name, wants_weights
from orchestrator.spec import Model


def check_model(entry: Model, role: Role) -> list[str]:
    """Checks a name as far as it can be without loading weights; packaged ones are loaded where there are options.

    Returns:
        What could not be checked, one sentence each.

    Raises:
        UserError: if the model or its file does not exist, or does not take its options.
    """
    if role == "student" and entry.precision != "fp32":
        raise UserError(
            f"students: precision: {entry.precision} of {entry.model!r} is for teachers; allowed here: fp32. In what "
            "precision students are trained says train.precision."
        )
    if entry.model.startswith("packaged/"):
        check_files(entry)
        if entry.kwargs or entry.image_size is not None:
            load_network(entry, role)  # its weights are here: whether options fit them is known now
        return []
    if is_clip(entry):
        return check_clip(entry, wants_weights(entry, role))
    if entry.model.startswith("local:"):
        local_weights(entry)
        timm_name(entry)
        return []
    name = timm_name(entry)
    if not wants_weights(entry, role):
        return []
    if is_hub(entry):
        unknown = hub_weights(entry)
        return [unknown] if unknown else []
    return _check_hub(entry, name)


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
