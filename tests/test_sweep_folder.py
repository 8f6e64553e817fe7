"""A sweep's folder: what is not the sweep's own stays, and its images are those with which it began."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small import small_spec

from orchestrator.data.task import load_task
from orchestrator.errors import UserError, WorkError
from orchestrator.models.load import load_student
from orchestrator.spec import SweepSpec
from orchestrator.sweep.final_score import read_test
from orchestrator.sweep.folder import begun_with, check_same, create, discard, keep_listing
from orchestrator.sweep.ledger import open_sweep
from orchestrator.sweep.run import _as_begun, prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial


def test_a_folder_that_holds_something_else_is_no_sweeps(colours: Path, tmp_path: Path) -> None:
    """A refused sweep's folder is taken away."""
    spec = small_spec(colours, tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "photo.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"^name: the folder '.*small' .* is there already and holds 'photo\.png'"):
        create(spec)
    (tmp_path / "small" / "photo.png").rename(tmp_path / "photo.png")
    discard(create(spec))
    assert not (tmp_path / "small").exists()
    assert (tmp_path / "photo.png").read_bytes() == b"mine"


@pytest.fixture
def images(colours: Path, tmp_path: Path) -> Path:
    """Images that a test may change."""
    return Path(shutil.copytree(colours, tmp_path / "images"))


def finetuned(spec: SweepSpec, folder: Path, number: int) -> dict:
    context = SweepContext(spec, str(folder), listing=begun_with(folder))
    return run_trial(context, TrialConfig(f"t{number:04}", number, Cell("finetune", None, 0), {"lr": 0.01}, number))


def test_images_that_come_later_change_no_split_of_a_sweep(images: Path, tmp_path: Path) -> None:
    spec = small_spec(images, tmp_path / "runs")
    folder = create(spec)
    before = _as_begun(prepare(spec), folder).task
    first = finetuned(spec, folder, 0)
    shutil.copytree(images / "red", images / "amber")
    for path in sorted((images / "amber").iterdir()):
        path.write_bytes(path.read_bytes() + b"\0")  # other images, of a class that sorts first
    assert load_task(spec.task, SweepContext(spec, "").store).classes[0] == "amber"
    after = _as_begun(prepare(spec), folder).task
    assert (after.classes, after.val.ids, after.labelled) == (before.classes, before.val.ids, before.labelled)
    second = finetuned(spec, folder, 1)
    for row in (first, second):
        assert row["status"] == "complete", row["reason"]
        assert load_student(folder / row["student_path"])[1]["classes"] == list(before.classes)
        found = read_test(folder, row["student_path"])
        assert (found["images"], found["val_images"]) == (len(before.test), len(before.val))


def test_a_student_is_not_scored_on_other_images_than_those_it_was_chosen_on(images: Path, tmp_path: Path) -> None:
    spec = small_spec(images, tmp_path / "runs")
    folder = create(spec)
    row = finetuned(spec, folder, 0)  # as sweeps did that kept no listing
    read_test(folder, row["student_path"])
    shutil.rmtree(images / "red")
    with pytest.raises(
        UserError, match=r"^task\.data: the images of 'folder:.*' are not those that t0000 was scored on"
    ):
        read_test(folder, row["student_path"])


def test_a_sweep_whose_images_were_replaced_is_not_continued_without_its_store(images: Path, tmp_path: Path) -> None:
    spec = small_spec(images, tmp_path / "runs")
    folder = create(spec)
    keep_listing(folder, "0" * 64)
    with pytest.raises(WorkError, match=r"^task\.data: the images of .* have changed since they were listed"):
        _as_begun(prepare(spec), folder)


def test_a_sweep_is_continued_by_the_file_that_it_began_with_wherever_that_lies(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path / "runs")
    known = open_sweep(create(spec))
    moved = spec.model_copy(update={"task": spec.task.model_copy(update={"data": "folder:/elsewhere/" + colours.name})})
    assert check_same(moved, known, ["task.data"]) == ""
    more = spec.model_copy(update={"search": spec.search.model_copy(update={"trials": 40})})
    told = "It goes on with the file that it began with: search.trials 5 (the file now: 40)."
    assert check_same(more, known, ["train.steps"]) == told
    for flag in ("search.trials", "search"):
        with pytest.raises(
            UserError, match=r"^--resume: search\.trials is 40 here, and '.*small' began with 5; contin"
        ):
            check_same(more, known, [flag])
