"""The user's data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.spec.section import Section

Kind = Literal["classification", "multilabel", "segmentation"]


METRIC_NAMES: dict[Kind, str] = {
    "classification": "accuracy",
    "multilabel": "mean AUROC",
    "segmentation": "mIoU",
}


class Splits(Section):
    """How images without a ready-made split are divided."""

    val: float = Field(
        default=0.2, gt=0, lt=1, description="Share of the images kept for choosing (the search sees it)."
    )
    test: float = Field(default=0.2, gt=0, lt=1, description="Share of the images read once, for the chosen student.")

    @model_validator(mode="after")
    def _leaves_something(self) -> Splits:
        if self.val + self.test >= 0.95:
            raise ValueError(f"val + test = {self.val + self.test:g} leaves no images for training; at most 0.95")
        return self


class Task(Section):
    """The user's data."""

    data: str = Field(
        description="`packaged/clipart`, `packaged/icons`, `folder:PATH` or `parquet:PATH`, with or without "
        "train/val/test. A folder has one subfolder a class; multilabel: a labels.csv (file,labels; labels separated "
        "by ;); segmentation: images/ and masks/ (the same name, PNG of class indices). Parquet has the columns image "
        "and label, or mask."
    )
    kind: Kind = Field(
        default="classification",
        description="One class an image (val_metric is the accuracy), several or none (multilabel: mean area under the "
        "ROC curve), or one a pixel (segmentation: mean intersection over union, mIoU).",
    )
    decoder: Literal["linear", "conv"] = Field(
        default="linear",
        description="Segmentation: what turns the network's tokens or map into classes: batch norm and a linear map, "
        "or four stages of convolutions.",
    )
    ignore_index: int = Field(
        default=255, ge=0, le=255, description="Segmentation: the value of a mask's pixels that do not count."
    )
    shots: int | None = Field(
        default=20,
        ge=1,
        description="Labelled images a class; null labels all of them. Multilabel and segmentation: images in which "
        "the class occurs, as many as there are; images without any class count as one more.",
    )
    unlabelled: bool = Field(default=True, description="Whether the other training images are used without labels.")
    splits: Splits = Field(default_factory=Splits, description="Shares, where the data brings no split of its own.")
    seed: int = Field(
        default=0, ge=0, description="Draws the split and the labelled images; another seed, another draw."
    )
    names: dict[str, str] = Field(
        default_factory=dict,
        description="Words for classes whose labels are none, as in {n01440764: tench}; for prompts.",
    )
    templates: list[str] = Field(
        default=["{}", "a picture of a {}", "an image of the {}", "a drawing of a {}", "an icon of a {}"],
        min_length=1,
        description="Sentences with {} for a class's words; a class is the mean of its sentences' embeddings.",
    )
    draw: int = Field(
        default=0,
        ge=0,
        description="Which draw of the labelled images, in the same split; `search.repeats` counts it up.",
    )

    @field_validator("data")
    @classmethod
    def _known_source(cls, value: str) -> str:
        kind, _, rest = value.partition(":")
        if value.startswith("packaged/") or (kind in ("folder", "parquet") and rest):
            return value
        raise ValueError(f"{value!r} is not a data source; allowed: packaged/clipart, folder:PATH, parquet:PATH")

    @field_validator("templates")
    @classmethod
    def _with_a_gap(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
                raise ValueError(f"{template!r} is no template: it needs {{}} once, where a class's words go")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Task:
        for key in ("decoder", "ignore_index"):
            if self.kind != "segmentation" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {getattr(self, key)} is for segmentation only, and kind is {self.kind}")
        if self.data.startswith("packaged/") and self.kind != "classification":
            raise ValueError(f"kind: {self.kind} does not fit {self.data!r}, which has one class an image")
        return self
