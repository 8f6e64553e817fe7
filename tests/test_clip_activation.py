"""Networks of open_clip compute with the activation that their weights were trained with, also when rebuilt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import clip_folder
from torch import nn

from orchestrator.models.clip import build_clip, clip_config
from orchestrator.spec import Model


def activations(network: nn.Module) -> set[str]:
    return {type(m).__name__ for m in network.modules() if type(m).__name__ in ("GELU", "QuickGELU")}


@pytest.mark.parametrize(
    ("entry", "activation"),
    [
        (Model(model="open_clip/ViT-B-32:openai"), "QuickGELU"),
        (Model(model="open_clip/ViT-B-32"), "QuickGELU"),  # the first weights that open_clip lists are OpenAI's
        (Model(model="open_clip/ViT-B-32:metaclip_400m"), "QuickGELU"),
        (Model(model="open_clip/ViT-B-32:laion2b_s34b_b79k"), "GELU"),
        (Model(model="open_clip/ViT-B-32", pretrained=False), "GELU"),
        (Model(model="open_clip/ViT-B-32-quickgelu", pretrained=False), "QuickGELU"),
        (Model(model="local:mine.pt", architecture="open_clip/ViT-B-32"), "GELU"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.model} {value.pretrained}",
)
def test_the_activation_is_that_of_the_weights(entry: Model, activation: str) -> None:
    with torch.device("meta"):
        built = build_clip(entry, weights=False)
    assert activations(built.visual) == activations(built.transformer) == {activation}  # type: ignore[arg-type]
    assert bool(clip_config(entry).get("quick_gelu")) == (activation == "QuickGELU")


@pytest.mark.parametrize("options", [{}, {"force_quick_gelu": True}, {"force_patch_dropout": 0.5}], ids=str)
def test_what_describes_a_network_rebuilds_it(options: dict[str, Any], tmp_path: Path) -> None:
    """An export holds that description, and nothing of the sweep file."""
    import open_clip

    folder = clip_folder(tmp_path / "clip")
    entry = Model(model=f"local:{folder}", kwargs=options)
    about = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps(about | {"model_cfg": clip_config(entry)}))
    rebuilt = open_clip.create_model(f"local-dir:{folder}", load_weights=True).eval()
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(rebuilt.encode_image(images), build_clip(entry, weights=True).encode_image(images))
    assert type(getattr(rebuilt.visual, "patch_dropout", None)) is type(
        getattr(build_clip(entry, weights=False).visual, "patch_dropout", None)
    )
