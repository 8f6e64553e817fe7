"""`precision: bf16` of a teacher: outputs are computed so, keys know it, and fp32 leaves no trace in a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_spec

from methods.outputs import Output
from orchestrator.data.outputs import ensure_outputs, open_outputs
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy
from orchestrator.errors import UserError
from orchestrator.models.clip import is_clip, text_tower
from orchestrator.models.load import load_network
from orchestrator.spec import Model, Task
from orchestrator.store import Store
from orchestrator.sweep.run import prepare
from orchestrator.sweep.stock import verify
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig, source_reads
from orchestrator.trial.run import run_trial

SINGLE = Model(model="timm/test_vit", image_size=32, pretrained=False)
HALF = SINGLE.model_copy(update={"precision": "bf16"})
LOGITS = Output("logits")


def test_outputs_in_bfloat16_are_those_in_single_precision_to_eight_bits(colours: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    task = load_task(Task(data=f"folder:{colours}", shots=4), store)
    values = {}
    for entry in (SINGLE, HALF):
        found = ensure_outputs(
            store, task, task.train, load_network(entry, "teacher"), Policy(0.35, 0.4), [0], [LOGITS]
        )
        values[entry.precision] = open_outputs(found[LOGITS.key])[0].all().float()
    apart = (values["bf16"] - values["fp32"]).abs().max() / values["fp32"].abs().max()
    assert 5e-4 < apart < 4e-2  # computed in fewer bits than are stored, and nothing worse
    found = verify(str(tmp_path))
    assert (found["compared"], found["damaged"]) == (2, [])


def test_only_another_precision_is_in_a_key() -> None:
    single, half = load_network(SINGLE, "teacher"), load_network(HALF, "teacher")
    assert single.identity.startswith(single.weights_hash)
    assert half.identity == f"{single.identity}@bf16"
    reads = source_reads(SINGLE, "teacher")
    assert "precision" not in reads["entry"]
    assert source_reads(HALF, "teacher") == reads | {"entry": reads["entry"] | {"precision": "bf16"}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Model(model="timm/resnet10t", pretrained=False), {"kwargs": {"global_pool": "max"}}),
        (Model(model="packaged/clip_icons"), {"kwargs": {"force_quick_gelu": True}}),
        (Model(model="timm/efficientnet_b0", pretrained=False), {"model": "timm/tf_efficientnet_b0"}),
    ],
    ids=["another pooling", "another activation", "another padding"],
)
def test_networks_of_equal_weights_that_compute_different_things_have_keys_of_their_own(
    one: Model, other: dict[str, Any]
) -> None:
    """Else what one of them said would be taken for what the other says."""
    pair = [load_network(entry, "teacher") for entry in (one, one.model_copy(update=other))]
    assert pair[0].weights_hash == pair[1].weights_hash
    assert pair[0].identity != pair[1].identity
    if is_clip(one):
        towers = [text_tower(network.entry, weights=True) for network in pair]
        assert towers[0].weights_hash == towers[1].weights_hash
        assert towers[0].identity != towers[1].identity


def test_a_trial_learns_from_a_teacher_in_bfloat16_stored_or_live(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast: list[bool] = []
    whole = load_network(HALF, "teacher").module.forward_features

    def forward(images: torch.Tensor, **words: Any) -> torch.Tensor:
        cast.append(torch.is_autocast_enabled("cpu"))
        return whole(images, **words)

    monkeypatch.setattr(load_network(HALF, "teacher").module, "forward_features", forward)
    for fresh in (False, True):
        cast.clear()
        train = {"steps": 6, "batch": 12, "fresh": fresh} | ({} if fresh else {"views": 2})
        spec = small_spec(colours, tmp_path / str(fresh), teachers=[HALF.model_dump()], train=train)
        row = run_trial(SweepContext(spec, str(tmp_path / "sweep")), TrialConfig("t0", 0, Cell("kd", 0, 0), {}, 0))
        assert row["status"] == "complete", row["reason"]
        assert row["teacher"] == "timm/test_vit@bf16"
        assert cast
        assert all(cast)


def test_a_student_with_a_precision_is_refused_and_told_where_it_belongs(colours: Path, tmp_path: Path) -> None:
    student = {"model": "timm/test_convnext", "image_size": 32, "precision": "bf16"}
    with pytest.raises(UserError, match=r"is for teachers; allowed here: fp32\. .* says train\.precision"):
        prepare(small_spec(colours, tmp_path, students=[student]))
