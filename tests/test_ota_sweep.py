"""OTA through the orchestrator: pools in the store, what trials share, and what no training stage ever reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import small_spec

from methods.generators.vq import VQPackage
from orchestrator.data.task import load_task
from orchestrator.models.upstream import save_upstream
from orchestrator.spec import SweepSpec
from orchestrator.store import Store
from orchestrator.sweep.run import prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

OTA = Cell("ota", 0, 0)
CONFIG = {
    "size": 16,
    "f": 4,
    "codes": 32,
    "dim": 4,
    "channels": [8, 8, 8],
    "groups": 4,
    "prior_width": 16,
    "prior_layers": 1,
    "prior_heads": 2,
}
NOT_TRAINING = {"catalogue", "evaluate", "latency", "probe"}


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A package with random weights."""
    torch.manual_seed(0)
    package = VQPackage.build(CONFIG)
    with torch.no_grad():
        package.codebook.normal_()
    folder = tmp_path_factory.mktemp("upstream") / "vq"
    save_upstream(folder, package, CONFIG, {})
    return f"local:{folder}"


def spec_of(data: Path, storage: Path, vq: str | None, **changes: Any) -> SweepSpec:
    upstream = {"vq": vq} if vq else {}
    methods = {"ota": {"completions": [1, 2]}, "finetune": {}}
    return small_spec(data, storage, **{"upstream": upstream, "methods": methods, **changes})


def run(spec: SweepSpec, cell: Cell = OTA, **knobs: Any) -> dict[str, Any]:
    name = "-".join([cell.method, *(f"{k}={v}" for k, v in knobs.items())])
    row = run_trial(SweepContext(spec, f"{spec.storage}/{spec.name}"), TrialConfig(name, 0, cell, knobs, 0))
    assert row["status"] == "complete", row["reason"]
    return row


def contents(spec: SweepSpec) -> dict[str, dict[str, str]]:
    """Hashes of the files of every entry that training left or read, by address; timings are not part of it."""
    return {
        f"{entry.stage}/{entry.key}": {n: f["sha256"] for n, f in entry.meta["files"].items() if n != "history.json"}
        for entry in Store(Path(spec.storage) / "store").entries()
        if entry.stage not in NOT_TRAINING
    }


def stages(spec: SweepSpec) -> list[str]:
    return sorted(address.split("/")[0] for address in contents(spec))


def test_ota_8_without_the_test_images_on_disk_every_training_artefact_is_the_same(
    colours: Path, tmp_path: Path, vq: str
) -> None:
    data = tmp_path / "data"
    for number, path in enumerate(sorted(colours.glob("*/*.png"))):
        split = ("train", "train", "val", "test")[number % 4]
        copy = data / split / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    whole = spec_of(data, tmp_path / "whole", vq)
    run(whole, completions=1)
    shutil.rmtree(data / "test")
    # A task without any test image is refused, so one picture that nobody has seen stands in for all of them.
    (data / "test" / "red").mkdir(parents=True)
    Image.new("RGB", (40, 36), (1, 2, 3)).save(data / "test" / "red" / "other.png")
    bare = spec_of(data, tmp_path / "bare", vq)
    assert len(load_task(bare.task, Store(Path(bare.storage) / "store")).test) == 1
    run(bare, completions=1)
    assert contents(bare) == contents(whole)
    assert {"transfer", "deliver", "calibrate", "generate", "distil"} <= set(stages(whole))


def test_ota_9_weight_0_is_the_fine_tuned_student_bit_for_bit(colours: Path, tmp_path: Path, vq: str) -> None:
    spec = spec_of(colours, tmp_path / "runs", vq)
    run(spec, weight=0.0)
    run(spec, Cell("finetune", None, 0))
    students = Path(spec.storage) / spec.name / "students"
    one, other = (load_file(students / name / "model.safetensors") for name in ("ota-weight=0.0", "finetune"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert "generate" not in stages(spec)  # and neither paid for a generator or a teacher
    assert "calibrate" not in stages(spec)


def test_trials_share_what_comes_before_distillation_and_pools_only_grow(
    colours: Path, tmp_path: Path, vq: str
) -> None:
    spec = spec_of(colours, tmp_path / "runs", vq)
    first = run(spec, completions=1)
    before = contents(spec)
    assert first["teacher_forwards"] > 0
    again = run(spec, completions=1, temperature=2.0)
    added = {a: c for a, c in contents(spec).items() if a not in before}
    assert [address.split("/")[0] for address in added] == ["distil"]
    assert again["teacher_forwards"] == 0
    run(spec, completions=6)  # of 12 labelled images, 72: more than one shard of 64
    after = contents(spec)
    assert all(after[address] == before[address] for address in before)
    assert stages(spec).count("generate") == 2
    assert stages(spec).count("calibrate") == 1


def test_the_tuned_teacher_sees_the_pool_and_not_the_images_that_it_does_not_teach_on(
    colours: Path, tmp_path: Path, vq: str
) -> None:
    spec = spec_of(colours, tmp_path / "runs", vq)
    row = run(spec, completions=1)
    # One shard of 64 for the head (view 0), one for the distillation under each of two views.
    assert row["teacher_forwards"] == 64 + 2 * 64


def test_a_picture_shows_what_was_made(colours: Path, tmp_path: Path, vq: str) -> None:
    spec = spec_of(colours, tmp_path / "runs", vq)
    run(spec, completions=2)
    (path,) = (Path(spec.storage) / spec.name / "pictures").glob("generate-*.png")
    with Image.open(path) as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 20) or []) > 100


def test_what_a_sweep_without_upstream_generators_cannot_run_is_said_before_it_starts(
    colours: Path, tmp_path: Path, vq: str
) -> None:
    methods = {"ota": {}, "irf": {}, "finetune": {}}
    with_it = prepare(spec_of(colours, tmp_path / "with", vq, methods=methods))
    assert {cell.method for cell in with_it.cells} == {"ota", "irf", "finetune"}
    without = prepare(spec_of(colours, tmp_path / "without", None, methods=methods))
    assert {cell.method for cell in without.cells} == {"finetune"}
    said = " ".join(without.dropped)
    assert "upstream.vq" in said
    assert "add 'vq' to its `upstream` section" in said
