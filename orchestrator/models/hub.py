"""Networks of the Hugging Face hub by repository: `timm/hf-hub:ORG/NAME[@REVISION]`, and the same of `open_clip/`.

A repository is read as a folder: its description and its weights, of one commit, as they lie in the hub's cache. What
was fetched once is used as it is, without a connection: so all processes of a sweep read the same, however the
repository moves on. `hf download ORG/NAME` fetches a newer one, and @REVISION names one.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import timm

from orchestrator.errors import UserError, first_lines, listed, nearest
from orchestrator.spec import Model

MARK = "hf-hub:"
CONFIGS = {"timm": "config.json", "open_clip": "open_clip_config.json"}
WEIGHTS = {
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")
ELSE = "Without the hub, use `local:PATH`."


def is_hub(entry: Model) -> bool:
    """Whether an entry names a repository of the hub."""
    library, _, rest = entry.model.partition("/")
    return library in CONFIGS and rest.startswith(MARK)


def hub_folder(entry: Model, *, weights: bool) -> Path:
    """The folder in the hub's cache with a repository's description, and its weights where they are asked for.

    Raises:
        UserError: if they are not in the cache and cannot be fetched, with what would help.
    """
    library, repository, revision = _parts(entry)
    config = _fetched(repository, revision, CONFIGS[library])
    if config is None:
        raise UserError(
            f"The hub's repository {repository!r} ({entry.model}) has no {CONFIGS[library]}: {_not(library)}"
        )
    commit = config.parent.name
    if (
        weights
        and not _cached_weights(repository, commit, library)
        and all(_fetched(repository, commit, name) is None for name in WEIGHTS[library])
    ):
        raise _no_weights(entry)
    return config.parent


def hub_config(entry: Model) -> tuple[str, dict[str, Any]]:
    """(architecture, constructor arguments) that a repository for timm describes.

    Raises:
        UserError: as `hub_folder`, and if timm cannot build what it describes.
    """
    path = hub_folder(entry, weights=False) / CONFIGS["timm"]
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        architecture, arguments = str(described["architecture"]), dict(described.get("model_args") or {})
        size = _fixed_size(described.get("pretrained_cfg", described) or {}, arguments)
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"The {path.name} of {entry.model!r} names no `architecture`: {_not('timm')}") from None
    base = architecture.partition(".")[0]
    if not timm.is_model(base):
        raise UserError(
            f"The hub's {entry.model!r} is a {architecture!r}, which timm {timm.__version__} does not have."
            f"{nearest(base, timm.list_models())}"
        )
    return base, arguments if size is None else {"img_size": size, **arguments}


def _fixed_size(cfg: dict[str, Any], arguments: dict[str, Any]) -> int | None:
    """The `img_size` that timm takes from a repository's `pretrained_cfg` where its `model_args` have none."""
    free = arguments.get("dynamic_img_size") or arguments.get("use_naflex")
    if free or arguments.get("strict_img_size") is False or not cfg.get("fixed_input_size"):
        return None
    return int(cfg["input_size"][-1]) if cfg.get("input_size") else None


def hub_repository(entry: Model) -> str:
    """ORG/NAME of an entry's repository."""
    return _parts(entry)[1]


def hub_commit(entry: Model, repository: str) -> str | None:
    """The commit of which a tokenizer's repository is read: the entry's own, or another's in the cache, if it is there.

    Raises:
        UserError: as `hub_folder`.
    """
    import huggingface_hub

    if repository == hub_repository(entry):
        return hub_folder(entry, weights=False).name
    cached = (huggingface_hub.try_to_load_from_cache(repository, name) for name in TOKENIZERS)
    return next((Path(path).parent.name for path in cached if isinstance(path, str)), None)


def hub_weights(entry: Model) -> str | None:
    """What could not be found out about whether a repository's weights can be had; None if they can.

    Raises:
        UserError: if it has none.
    """
    import huggingface_hub

    library, repository, _ = _parts(entry)
    commit = hub_folder(entry, weights=False).name
    if _cached_weights(repository, commit, library):
        return None
    try:
        there = any(huggingface_hub.file_exists(repository, name, revision=commit) for name in WEIGHTS[library])
    except Exception as error:  # whatever the hub's client raises offline: the check goes on and says so
        return (
            f"{entry.model}: the hub could not be reached ({type(error).__name__}), "
            f"so whether its weights can be downloaded was not checked."
        )
    if not there:
        raise _no_weights(entry)
    return None


def _parts(entry: Model) -> tuple[str, str, str | None]:
    """Library, repository and revision (None for its main one)."""
    library, _, rest = entry.model.partition("/")
    repository, _, revision = rest.removeprefix(MARK).partition("@")
    return library, repository, revision or None


def _no_weights(entry: Model) -> UserError:
    library, repository, _ = _parts(entry)
    return UserError(
        f"The hub's repository {repository!r} ({entry.model}) has no weights; looked for: {listed(WEIGHTS[library])}. "
        "Set `pretrained: false` for the bare network."
    )


def _cached_weights(repository: str, commit: str, library: str) -> bool:
    import huggingface_hub

    cached = (huggingface_hub.try_to_load_from_cache(repository, name, revision=commit) for name in WEIGHTS[library])
    return any(isinstance(path, str) for path in cached)


@functools.lru_cache(maxsize=256)
def _fetched(repository: str, revision: str | None, name: str) -> Path | None:
    """One file of a repository in the cache, fetched if need be; None if it has no such file."""
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{repository}@{revision}" if revision else repository
    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        # Asked for a file that it has, the hub's client would first try to reach the hub, for half a minute.
        known = isinstance(cached, str)
        return Path(str(cached) if known else huggingface_hub.hf_hub_download(repository, name, revision=revision))
    except errors.GatedRepoError:
        said = "is gated: accept its terms on its page at the hub, and set HF_TOKEN to a token of that account."
    except errors.RepositoryNotFoundError:
        said = "is not at the hub, or is private: then set HF_TOKEN to a token that may read it."
    except errors.RevisionNotFoundError:
        said = f"has no revision {revision!r}."
    except errors.LocalEntryNotFoundError as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            said = f"is not in this machine's cache with its {name}, and HF_HUB_OFFLINE forbids to fetch it. {ELSE}"
        else:
            said = f"is not in this machine's cache with its {name}, and the hub could not be reached: "
            said += f"{first_lines(error)} {ELSE}"
    except errors.EntryNotFoundError:
        return None
    except errors.HFValidationError:
        said = "is no name of a repository; allowed: ORG/NAME or ORG/NAME@REVISION."
    except Exception as error:  # the hub's client, its HTTP library and the system share no base class
        said = f"could not be fetched: {first_lines(error)} {ELSE}"
    raise UserError(f"The hub's repository {at!r} {said}")


def _not(library: str) -> str:
    return f"it is not for {library}. Repositories that are say so on their page at the hub."
