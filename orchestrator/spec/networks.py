"""Teachers, students, and generators."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from orchestrator.spec.section import Section


class Model(Section):
    """A teacher or a student by name; a plain string stands for `{model: STRING}`."""

    model: str = Field(
        description="`timm/NAME[.TAG]`, `open_clip/NAME[:TAG]`, a repository of the Hugging Face hub as "
        "`timm/hf-hub:ORG/NAME[@REVISION]` or `open_clip/hf-hub:ORG/NAME[@REVISION]`, `packaged/NAME`, or `local:PATH` "
        "(safetensors, or .pth or .pth.tar read safely, averaged weights first; of open_clip also a folder with an "
        "open_clip_config.json)."
    )
    pretrained: bool | None = Field(
        default=None,
        description="Load pre-trained weights (timm: from the hub). Null: yes for a teacher, no for a timm student.",
    )
    architecture: str | None = Field(
        default=None, description="For a `local:` file: the `timm/NAME` or `open_clip/NAME` that its weights fit."
    )
    image_size: int | None = Field(
        default=None, ge=16, le=2048, description="Side of the input in pixels; null: its own."
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further constructor arguments, as timm names them."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Of a teacher: autocast precision in which its outputs are computed (training: train.precision).",
    )

    @field_validator("model")
    @classmethod
    def _known_prefix(cls, value: str) -> str:
        if value.startswith(("timm/", "open_clip/", "local:", "packaged/")) and len(value.split("/", 1)[-1]):
            return value
        raise ValueError(f"{value!r} is not a model; allowed: timm/NAME, open_clip/NAME, local:PATH, packaged/NAME")


def as_student(entry: Model) -> Model:
    """An entry as a student's: of open_clip without weights unless they are asked for, so with the plain activation."""
    if entry.pretrained is None and entry.model.startswith("open_clip/"):
        return entry.model_copy(update={"pretrained": False})
    return entry


def _as_model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


ModelEntry = Annotated[Model, BeforeValidator(_as_model)]


class Upstream(Section):
    """Generators that were trained on upstream images, by whoever had these."""

    vq: str | None = Field(
        default=None,
        description="VQ model and latent transformer: `packaged/vq_clipart`, or `local:FOLDER` of `store prime`.",
    )
    diffusion: str | None = Field(default=None, description="A diffusion model: `local:FOLDER` of `store prime`.")
    pipeline: str | dict[str, Any] | None = Field(
        default=None, description="A diffusers pipeline by hub id or folder, or `{model: ID, ...}` with its options."
    )

    @property
    def given(self) -> tuple[str, ...]:
        """Which of them there are."""
        return tuple(name for name in Upstream.model_fields if getattr(self, name) is not None)
