"""Dual encoders of open_clip: an image tower that is read like any network, with the text tower beside it."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import UserError, first_lines, listed, nearest
from orchestrator.models.files import local_weights
from orchestrator.models.hub import ELSE, hub_commit, hub_folder, hub_weights, is_hub
from orchestrator.models.precision import autocast, identified
from orchestrator.models.weights import hash_weights
from orchestrator.packaged.clip import CLIP_ICONS, CONFIG, tokenizer_of
from orchestrator.spec import Model

PREFIX = "open_clip/"
PACKAGED = {"packaged/clip_icons": CLIP_ICONS}
TEXT_BATCH = 256
FORCED = {  # options of open_clip.create_model by where they go in a model's description
    "force_quick_gelu": ("", "quick_gelu"),
    "force_custom_text": ("", "custom_text"),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_context_length": ("text_cfg", "context_length"),
}


def is_clip(entry: Model) -> bool:
    """Whether an entry names a dual encoder: `open_clip/NAME[:TAG]`, such a local file or folder, or a packaged one."""
    if entry.model.startswith("local:"):
        return (entry.architecture or "").startswith(PREFIX) or (folder_of(entry) or Path()).joinpath(CONFIG).is_file()
    return entry.model.startswith(PREFIX) or entry.model in PACKAGED


def folder_of(entry: Model) -> Path | None:
    """The folder with configuration, weights and maybe a tokenizer's merges, if the entry is one.

    Of a repository of the hub it is where that lies in the cache; its weights come when `build_clip` asks for them.

    Raises:
        UserError: if a repository of the hub is neither in the cache nor can be fetched.
    """
    if entry.model in PACKAGED:
        return PACKAGED[entry.model]
    if is_hub(entry):
        return hub_folder(entry, weights=False)
    path = Path(entry.model.removeprefix("local:")).expanduser()
    return path if entry.model.startswith("local:") and path.is_dir() else None


def clip_name(entry: Model) -> tuple[str, str | None]:
    """(architecture, tag or None) of an entry that open_clip knows by name.

    Raises:
        UserError: naming the nearest one, if it has none of that name or tag.
    """
    import open_clip

    source = entry.architecture if entry.model.startswith("local:") else entry.model
    name, _, tag = (source or "").removeprefix(PREFIX).partition(":")
    known = open_clip.list_models()
    if name not in known:
        raise UserError(f"There is no open_clip model {name!r} ({entry.model}).{nearest(name, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise UserError(
            f"The open_clip model {name!r} has no weights tagged {tag!r} ({entry.model}); "
            f"it has {listed(tags)}.{nearest(tag, tags)}"
        )
    return name, tag or None


def clip_config(entry: Model) -> dict[str, Any]:
    """open_clip's description of the network that `build_clip` makes: `embed_dim`, `vision_cfg`, `text_cfg`, ...

    With the entry's `force_*` options, and with the activation that its weights were trained with.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    import open_clip

    folder = folder_of(entry)
    if folder is None:
        name, _ = clip_name(entry)
        described = dict(open_clip.get_model_config(name) or {})
        if wants_quick_gelu(entry):
            described["quick_gelu"] = True
    else:
        try:
            described = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"The file {str(folder / CONFIG)!r} does not describe an open_clip model: {error}."
            ) from None
    for option, (section, key) in FORCED.items():
        if entry.kwargs.get(option):
            if section:
                described[section] = {**described[section], key: entry.kwargs[option]}
            else:
                described[key] = entry.kwargs[option]
    return described


def wants_quick_gelu(entry: Model) -> bool:
    """Whether the weights that a name stands for were trained with QuickGELU, which open_clip knows and does not apply.

    Also of a network that is built without weights: a tuned teacher is, before its own are loaded.
    """
    from open_clip.pretrained import get_pretrained_cfg

    if entry.model.startswith("local:") or is_hub(entry) or entry.pretrained is False:
        return False
    return bool(get_pretrained_cfg(clip_name(entry)[0], weights_tag(entry) or "").get("quick_gelu"))


def weights_tag(entry: Model) -> str | None:
    """Which pre-trained weights a name stands for: its tag, or the first that open_clip lists."""
    import open_clip

    name, tag = clip_name(entry)
    return tag or next(iter(open_clip.list_pretrained_tags_by_model(name)), None)


def check_clip(entry: Model, weights: bool) -> list[str]:
    """Checks a dual encoder's name and files as far as it can be without loading weights.

    Returns:
        What could not be checked, one sentence each.

    Raises:
        UserError: if there is no such model or file.
    """
    folder = folder_of(entry)
    if folder is not None:
        clip_config(entry)
        unknown = hub_weights(entry) if weights and is_hub(entry) else None
        return [unknown] if unknown else []
    clip_name(entry)
    if entry.model.startswith("local:"):
        local_weights(entry)
        return []
    if not weights:
        return []
    if weights_tag(entry) is None:
        raise UserError(f"open_clip has no pre-trained weights for {entry.model!r}; set `pretrained: false`.")
    return [f"{entry.model}: whether its weights are on this machine or can be downloaded was not checked."]


def build_clip(entry: Model, *, weights: bool) -> nn.Module:
    """The whole open_clip model of an entry, on the CPU, in evaluation mode.

    Raises:
        UserError: if the weights cannot be had, read, or do not fit.
    """
    import open_clip

    # open_clip moves what it built to a device of its own choice, which a plan's skeleton on "meta" cannot follow.
    options: dict[str, Any] = {"force_image_size": entry.image_size, "device": torch.get_default_device()}
    folder = folder_of(entry)
    if folder is None and wants_quick_gelu(entry):
        options["force_quick_gelu"] = True
    options |= entry.kwargs
    before = logging.root.manager.disable
    if not weights:
        logging.disable(logging.WARNING)  # open_clip warns that there are none, as was asked
    try:
        if folder is not None:
            if is_hub(entry):
                folder = hub_folder(entry, weights=weights)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=weights, **options)
        else:
            name, _ = clip_name(entry)
            source = None
            if weights:
                source = str(local_weights(entry)) if entry.model.startswith("local:") else weights_tag(entry)
            model = open_clip.create_model(name, pretrained=source, **options)
    except UserError:
        raise
    except Exception as error:  # open_clip, the hub and safetensors share no base class
        if entry.kwargs and isinstance(error, TypeError):
            raise UserError(
                f"open_clip cannot build {entry.model!r} with kwargs {entry.kwargs}: {first_lines(error)}"
            ) from error
        if not weights:
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"The weights of {entry.model!r} could not be loaded: {first[:240]}") from error
    finally:
        logging.disable(before)
    return model.eval()  # type: ignore[no-any-return]


class ImageTower(nn.Module):
    """The image side of a dual encoder: images [B, 3, S, S] to embeddings [B, d], or to what a new head makes of them.

    Its pooled feature is the embedding, so whatever reads pooled features reads it too. `facts` say how its images are
    prepared, and what its tokenizer makes of texts.
    """

    def __init__(self, visual: nn.Module, width: int, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.visual, self.head, self.facts = visual, nn.Identity(), dict(facts)
        self.num_features = self.head_hidden_size = width

    def forward_features(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]


def image_tower(entry: Model, *, weights: bool, num_classes: int | None = None) -> ImageTower:
    """The image tower of an entry; a head of `num_classes` where that is not None or 0."""
    return tower_of(build_clip(entry, weights=weights), num_classes)


def tower_of(model: nn.Module, num_classes: int | None = None) -> ImageTower:
    """The image tower of a whole open_clip model, which it shares."""
    output = getattr(model.visual, "output_dim", None) or _projected(model)
    beside = {"vocabulary": getattr(model, "vocab_size", None), "context": getattr(model, "context_length", None)}
    facts = preprocess_facts(model) | {name: int(value or 0) for name, value in beside.items()}  # type: ignore[call-overload]
    tower = ImageTower(model.visual, int(output), facts)  # type: ignore[arg-type]
    if num_classes:
        tower.reset_classifier(num_classes)
    return tower.eval()


def _projected(model: nn.Module) -> int:
    with torch.inference_mode():
        size = preprocess_facts(model)["size"]
        return int(model.visual(torch.zeros(1, 3, size, size)).shape[-1])  # type: ignore[operator]


def preprocess_facts(model: nn.Module) -> dict[str, Any]:
    """`size`, `mean`, `std`, `interpolation` of a whole model, as its checkpoint has them."""
    import open_clip

    facts: Mapping[str, Any] = open_clip.get_model_preprocess_cfg(model)
    size = facts["size"]
    return {
        "size": int(size if isinstance(size, int) else size[0]),
        "mean": tuple(float(v) for v in facts["mean"]),
        "std": tuple(float(v) for v in facts["std"]),
        "interpolation": str(facts.get("interpolation", "bicubic")),
    }


class TextTower:
    """The text side of a dual encoder with its tokenizer; frozen.

    Attributes:
        weights_hash: of its weights and tokenizer.
        tokenizer_hash: of the tokenizer alone.
    """

    def __init__(self, entry: Model, *, weights: bool) -> None:
        import open_clip

        model = build_clip(entry, weights=weights)
        del model.visual
        self._model: Any = model.requires_grad_(False)
        folder = folder_of(entry)
        if is_hub(entry) and clip_config(entry)["text_cfg"].get("hf_tokenizer_name"):
            self._tokenize = _hub_tokenizer(entry)
        else:
            known = tokenizer_of(folder) if folder is not None else open_clip.get_tokenizer(clip_name(entry)[0])
            self._tokenize = known
        probe = self._tokenize(["A tokenizer is told by what it makes of this: naïve 12,345 (ΑΩ)!"])
        self.tokenizer_hash = ".".join(str(int(i)) for i in probe[0] if i)
        self.weights_hash = f"{hash_weights(model)}-{self.tokenizer_hash}"
        self.entry, self.device = entry, "cpu"

    def to(self, device: str) -> TextTower:
        """Moves it; returns it."""
        self._model.to(device)
        self.device = device
        return self

    @property
    def identity(self) -> str:
        """Of what it computes."""
        return identified(self.entry, self.weights_hash, clip_config(self.entry))

    @property
    def parameters(self) -> int:
        """Of the text tower and its projection."""
        return sum(p.numel() for p in self._model.parameters())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """[n, L] int64."""
        return self._tokenize(list(texts)).long()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[n, d] float32 embeddings, not normalised; on the CPU."""
        parts = []
        for start in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokenize(texts[start : start + TEXT_BATCH]).to(self.device)
            with autocast(self.device, self.entry.precision):
                parts.append(self._model.encode_text(tokens).float().cpu())
        return torch.cat(parts).clone()


def _hub_tokenizer(entry: Model) -> Any:
    """Of a repository whose tokenizer is one as well, its own or another; a folder would have to hold its files.

    Not by open_clip's `get_tokenizer`, which knows no revision.

    Raises:
        UserError: if it cannot be had.
    """
    import huggingface_hub
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    described = clip_config(entry)["text_cfg"]
    name = str(described["hf_tokenizer_name"])
    try:
        commit = hub_commit(entry, name)
        return HFTokenizer(
            name,
            context_length=described.get("context_length", DEFAULT_CONTEXT_LENGTH),
            cache_dir=huggingface_hub.constants.HF_HUB_CACHE,  # where its description lies
            tokenizer_mode=described.get("tokenizer_mode"),
            **{**({"revision": commit} if commit else {}), **described.get("tokenizer_kwargs", {})},
        )
    except UserError:
        raise
    except Exception as error:  # transformers, the hub's client and tokenizers share no base class
        raise UserError(
            f"The tokenizer {name!r} of {entry.model!r} could not be loaded: {first_lines(error)} {ELSE}"
        ) from error


@functools.lru_cache(maxsize=4)
def _text_tower(key: str, weights: bool) -> TextTower:
    return TextTower(Model.model_validate_json(key), weights=weights)


def text_tower(entry: Model, *, weights: bool) -> TextTower:
    """The text tower of an entry, loaded once a process."""
    return _text_tower(entry.model_dump_json(), weights)
