"""Building networks, loading their weights, and what planning needs to know of them."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from methods import method_packages
from methods.anatomy import uniform_blocks
from methods.contract import Deployed, NetworkInfo, Structure
from methods.outputs import intermediate_channels
from orchestrator.errors import UserError, first_lines, listed, nearest
from orchestrator.models.clip import ImageTower, clip_config, image_tower, is_clip
from orchestrator.models.files import local_weights
from orchestrator.models.hub import hub_config, hub_folder, is_hub
from orchestrator.models.names import Role, timm_name, wants_weights
from orchestrator.models.precision import autocast, identified
from orchestrator.models.weights import hash_weights, read_weights
from orchestrator.spec import Model, as_student

PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects: a square of `size` pixels, resized with `interpolation`, then (x - mean) / std."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `describe`."""
        return cls(values["size"], tuple(values["mean"]), tuple(values["std"]), values["interpolation"])

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to normalised float32, channels last in memory: so convolutions are faster."""
        batch, channels, height, width = pixels.shape
        images = torch.empty(batch, height, width, channels, device=pixels.device)
        for channel in range(channels):  # a third of the time of a permuted copy, which goes byte by byte
            images[..., channel] = pixels[:, channel]
        # A line of pixels with all channels is long enough for vector instructions; three channels alone are not.
        lines = images.view(batch, height, width * channels)
        lines.sub_(_line(self.mean, width, pixels.device)).div_(_line(self.std, width, pixels.device))
        return images.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=64)
def _line(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """[width · channels] `values` of the channels, of pixels from 0 to 255.

    Kept: a list that is sent to a GPU waits for all that was asked of it before, and this is in every step.
    """
    with torch.inference_mode(False):  # whoever asks first may be in it, and others train
        return torch.tensor(values, device=device).repeat(width) * 255


@dataclass(frozen=True)
class Network:
    """A loaded network with its own preprocessing.

    Attributes:
        weights_hash: of its weights; or the address of the stage that made them.
        built: see `built_of`; None where that address tells it.
    """

    entry: Model
    role: Role
    module: nn.Module
    preprocessing: Preprocessing
    weights_hash: str
    built: Any = None

    @property
    def identity(self) -> str:
        """Of what it computes."""
        return identified(self.entry, self.weights_hash, self.built)

    def cast(self, device: str) -> torch.autocast:
        """In which its outputs are computed."""
        return autocast(device, self.entry.precision)


def build_network(
    entry: Model,
    *,
    num_classes: int | None = None,
    changes: Mapping[str, Any] | None = None,
    weights: bool = False,
) -> nn.Module:
    """Builds the network of an entry; on the CPU, in evaluation mode.

    Args:
        entry: its name and options.
        num_classes: size of its head; None keeps its own.
        changes: constructor arguments that differ, such as a smaller depth.
        weights: load its pre-trained weights (never together with `changes`).

    Raises:
        UserError: if the weights cannot be had, read, or do not fit; or the entry's options are none of the network's.
    """
    kwargs: dict[str, Any] = {**entry.kwargs, **(changes or {})}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if is_clip(entry):
        return image_tower(entry, weights=weights, num_classes=num_classes)
    if entry.model.startswith("packaged/"):
        return _build_packaged(entry, kwargs, weights)
    name = timm_name(entry)
    if entry.model.startswith("local:"):
        name = name.partition(".")[0]
        if weights:
            return _build_local(entry, name, kwargs)
    if is_hub(entry):
        name = f"local-dir:{hub_folder(entry, weights=weights)}"
    try:
        return _create(name, entry.image_size, {**kwargs, "pretrained": weights}).eval()
    except UserError:
        raise
    except Exception as error:  # a constructor raises anything for options that it does not expect
        if not weights or not isinstance(error, RuntimeError | OSError | ValueError | AssertionError):
            _refuse_options(entry, error)
            raise
        raise UserError(
            f"The pre-trained weights of {entry.model!r} could not be loaded: {first_lines(error, 2)} "
            "Without the hub, use `local:PATH` or `pretrained: false`."
        ) from error


def _build_packaged(entry: Model, kwargs: dict[str, Any], weights: bool) -> nn.Module:
    from orchestrator.packaged.models import VIT_DEPTH, VIT_SIDE, efficientnet_lite0, vit_clipart, vit_options

    vit = entry.model == "packaged/vit_clipart"
    if vit:
        if entry.image_size not in (None, VIT_SIDE):
            raise UserError(
                f"image_size: {entry.image_size} of {entry.model!r}; allowed: {VIT_SIDE}, the size of its position "
                "embedding, or null."
            )
        known = vit_options()
        odd = [name for name in entry.kwargs if name not in known]
        if odd:
            raise UserError(
                f"kwargs: {entry.model!r} has no option {odd[0]!r}; allowed: {listed(known)}.{nearest(odd[0], known)}"
            )
        if weights and kwargs.get("depth", VIT_DEPTH) != VIT_DEPTH:
            raise UserError(
                f"kwargs: depth {kwargs['depth']!r} of {entry.model!r}, whose weights are of {VIT_DEPTH} blocks; set "
                "`pretrained: false` for another depth."
            )
    try:
        if vit:
            return vit_clipart(pretrained=weights, **kwargs).eval()
        if weights:
            return efficientnet_lite0(**kwargs).eval()
        return _create(timm_name(entry), entry.image_size, {**kwargs, "pretrained": False}).eval()
    except UserError:
        raise
    except Exception as error:
        _refuse_options(entry, error)
        raise


def _refuse_options(entry: Model, error: Exception) -> None:
    """Raises a sentence in place of what a constructor says of an entry's options, if it has any."""
    # On the meta device an error may be the device's: then the network is built once more, with values.
    unknown = isinstance(error, RuntimeError) and torch.get_default_device().type == "meta"
    if entry.kwargs and not unknown and not isinstance(error, ImportError | MemoryError):
        telling = isinstance(error, RuntimeError | TypeError | ValueError | AssertionError)
        kind = "" if telling or not str(error) else f"{type(error).__name__}: "  # a KeyError's text is the key alone
        raise UserError(
            f"{entry.model!r} cannot be built with kwargs {entry.kwargs}: {kind}{first_lines(error, 2)}"
        ) from error


def _build_local(entry: Model, name: str, kwargs: dict[str, Any]) -> nn.Module:
    path = local_weights(entry)
    state = read_weights(path)
    wanted = kwargs.pop("num_classes", None)
    network: Any
    try:
        network = _create(name, entry.image_size, kwargs)
    except UserError:
        raise
    except Exception as error:
        _refuse_options(entry, error)
        raise
    try:
        classes = _load_state(network, state)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {str(path)!r} do not fit {entry.architecture}: {first_lines(error, 2)}"
        ) from error
    network.pretrained_cfg["num_classes"] = classes or 0  # of the file, whatever timm's own weights have
    if wanted is not None and wanted != classes:
        network.reset_classifier(wanted)
    return network.eval()


def _load_state(network: Any, state: dict[str, Tensor]) -> int | None:
    """Loads weights as they are, or else as timm makes those of the hub fit; returns as `_load_under_head`.

    Raises:
        RuntimeError: if they do not fit.
    """
    try:
        return _load_under_head(network, state)
    except RuntimeError:
        adapted = _adapted(network, state)
        if adapted is None:
            raise
    return _load_under_head(network, adapted)


def _load_under_head(network: Any, state: Mapping[str, Tensor]) -> int | None:
    """Loads weights with a head of their own size; its classes, or None where they have no head, or more than one."""
    head = network.pretrained_cfg.get("classifier")
    stored = state.get(f"{head}.weight") if isinstance(head, str) else None
    classes = None if stored is None else int(stored.shape[0])
    if isinstance(head, str):
        network.reset_classifier(classes or 0)
    network.load_state_dict(state, strict=True)
    return classes


def _adapted(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What timm makes of weights of this architecture that it fetches; None where it has nothing for them.

    It resamples position embeddings to the network's size, and changes names of a first publication into its own.
    """
    own, given = (tensors.get(PATCHES) for tensors in (network.state_dict(), state))
    if own is not None and given is not None and given.ndim == 4 and given.shape != own.shape:
        return None  # timm would resample these as well; but patches of another size are another architecture
    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return None if adapt is None else dict(adapt(dict(state), network))
    except Exception:  # it meets whatever it does not expect in another network's weights
        return None


def _create(name: str, image_size: int | None, kwargs: dict[str, Any]) -> nn.Module:
    if image_size is not None:
        try:
            return timm.create_model(name, **{**kwargs, "img_size": image_size})
        except TypeError:
            pass  # most convolutional networks take no img_size: they work at any size
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise UserError(f"timm cannot build {name!r} with {kwargs}: {first_lines(error, 2)}") from error


def preprocessing_of(entry: Model, network: nn.Module) -> Preprocessing:
    """Normalisation and size belong to the checkpoint; `image_size` of the entry overrides the size."""
    if isinstance(network, ImageTower):
        facts = network.facts
        return Preprocessing(entry.image_size or facts["size"], facts["mean"], facts["std"], facts["interpolation"])
    config = timm.data.resolve_model_data_config(network)
    return Preprocessing(
        size=entry.image_size or int(config["input_size"][-1]),
        mean=tuple(float(v) for v in config["mean"]),
        std=tuple(float(v) for v in config["std"]),
        interpolation=str(config["interpolation"]),
    )


def built_of(entry: Model) -> Any:
    """Of what architecture an entry's network is: a name, or a description where the entry's name stands for one."""
    if is_clip(entry):
        return clip_config(entry)
    if is_hub(entry):
        architecture, arguments = hub_config(entry)
        return {"architecture": architecture, "arguments": arguments}
    return entry.model if entry.model == "packaged/vit_clipart" else timm_name(entry).partition(".")[0]


@functools.lru_cache(maxsize=8)
def _load(key: str, role: Role) -> Network:
    entry = Model.model_validate_json(key)
    if wants_weights(entry, role):
        module = build_network(entry, weights=True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = build_network(entry)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Network(entry, role, module, preprocessing_of(entry, module), hash_weights(module), built_of(entry))


def load_network(entry: Model, role: Role) -> Network:
    """The network with its weights, loaded once a process. Do not change it: copy `module` first."""
    return _load(entry.model_dump_json(), role)


def _head_classes(entry: Model, role: Role, planned: nn.Module) -> int:
    """Of the head that an entry's weights come with, 0 without one in use; a file is read to know."""
    if role == "student" or is_clip(entry) or entry.model == "packaged/vit_clipart":
        return 0
    network: Any = load_network(entry, role).module if entry.model.startswith("local:") else planned
    classes = int(network.num_classes)
    return classes if classes == network.pretrained_cfg.get("num_classes") else 0


@functools.lru_cache(maxsize=64)
def _plan(key: str, role: Role) -> tuple[NetworkInfo, Preprocessing]:
    entry = Model.model_validate_json(key)
    network: Any
    try:
        with torch.device("meta"):
            network = build_network(entry)
    except (NotImplementedError, RuntimeError):
        network = build_network(entry)  # a few constructors compute with their tensors
    blocks = uniform_blocks(network)
    preprocessing = preprocessing_of(entry, network)
    clip = isinstance(network, ImageTower)
    info = NetworkInfo(
        name=entry.model,
        kind="clip" if clip else "vit" if blocks else "cnn" if intermediate_channels(network) else "other",
        width=int(getattr(network, "head_hidden_size", None) or network.num_features),
        blocks=blocks,
        channels=intermediate_channels(network),
        image_size=preprocessing.size,
        pretrained=wants_weights(entry, role),
        embedding=int(network.num_features) if clip else 0,
        vocabulary=network.facts["vocabulary"] if clip else 0,
        context=network.facts["context"] if clip else 0,
        classes=_head_classes(entry, role, network) if wants_weights(entry, role) else 0,
        skeleton=network,
    )
    return info, preprocessing


def tuned_network(folder: Path, address: str, base: Network) -> Network:
    """The network that a training stage made of the teacher `base`, to be read like a teacher.

    Args:
        folder: where the stage's result lies.
        address: of that result; identifies the weights.
    """
    module, _ = load_student(folder)
    return Network(base.entry, "teacher", module.requires_grad_(False), base.preprocessing, address)


def plan_network(entry: Model, role: Role) -> tuple[NetworkInfo, Preprocessing]:
    """What planning needs, without loading weights; but a `local:` teacher's are, for the classes of its head."""
    return _plan(entry.model_dump_json(), role)


def deploy_network(
    entry: Model,
    num_classes: int,
    changes: Mapping[str, Any],
    state: Mapping[str, Tensor],
    structure: Structure | None = None,
) -> nn.Module:
    """The plain network of a stored student, in evaluation mode."""
    network = build_network(entry, num_classes=num_classes, changes=changes)
    if structure is not None:
        network = structure.apply(network)
    network.load_state_dict(dict(state), strict=True)
    return network.eval()


def save_student(folder: Path, deployed: Deployed, meta: Mapping[str, Any]) -> None:
    """Writes `model.safetensors` and `student.json`; `meta` must hold model, role, changes, num_classes."""
    folder.mkdir(parents=True, exist_ok=True)
    structure = asdict(deployed.structure) if deployed.structure is not None else None
    meta = {**meta, "model": _settled(meta["model"]), "structure": structure}
    state = {k: v.detach().cpu().contiguous().clone() for k, v in deployed.network.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "student.json").write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")


def _settled(model: Any) -> Any:
    """An entry's JSON; of a timm repository at the hub by its architecture, so that the student needs no hub.

    Repositories of open_clip stay as they are: their students need what the hub's cache has of them.
    """
    entry = Model.model_validate(model)
    if not is_hub(entry) or is_clip(entry):
        return model
    architecture, arguments = hub_config(entry)
    if entry.image_size is not None:
        arguments.pop("img_size", None)
    built = {"model": f"timm/{architecture}", "kwargs": {**arguments, **entry.kwargs}, "pretrained": False}
    return entry.model_copy(update=built).model_dump(mode="json")


def load_student(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A stored student, in evaluation mode, and its `student.json`.

    Raises:
        UserError: if the folder holds no student.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"There is no readable student in {str(folder)!r}: {first_lines(error, 2)}") from error
    entry = entry_of(meta)
    return deploy_network(entry, meta["num_classes"], meta["changes"], state, structure_of(meta)), meta


def entry_of(meta: Mapping[str, Any]) -> Model:
    """The network that a `student.json` names, as it was built."""
    entry = Model.model_validate(meta["model"])
    return as_student(entry) if meta.get("role") == "student" else entry


def structure_of(meta: Mapping[str, Any]) -> Structure | None:
    """The structure that a `student.json`, or an export's `config.json`, names.

    Raises:
        UserError: if it is no function of a package that brings methods: the file may come from anywhere.
    """
    named = meta.get("structure")
    if not named:
        return None
    module, _, function = str(named["build"]).partition(":")
    try:
        if module.partition(".")[0] not in method_packages() or function.startswith("_"):
            raise ImportError
        if getattr(importlib.import_module(module), function).__module__ != module:
            raise ImportError
    except (ImportError, AttributeError):
        raise UserError(
            f"structure.build {named['build']!r} is no function of an installed method's package "
            f"({listed(sorted(method_packages()))}); nothing else is run."
        ) from None
    return Structure(str(named["build"]), dict(named["arguments"]))


def describe(preprocessing: Preprocessing) -> dict[str, Any]:
    """As plain JSON."""
    return json.loads(json.dumps(asdict(preprocessing)))
