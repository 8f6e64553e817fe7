"""A sweep's folder: what is not the sweep's own stays, and its images are those with which it began."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from small import small_spec

from orchestrator.data.task import _load_task, load_task
from orchestrator.errors import UserError
from orchestrator.models.load import load_student
from orchestrator.spec import SweepSpec
from orchestrator.store import store_at
from orchestrator.sweep.begun import begun_task, keep_images, keep_those_of
from orchestrator.sweep.final_score import read_test
from orchestrator.sweep.folder import check_same, create, discard
from orchestrator.sweep.ledger import open_sweep
from orchestrator.sweep.run import prepare
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
    listing = begun_task(spec.task, folder, store_at(spec.store_address)).listing
    context = SweepContext(spec, str(folder), listing=listing)
    return run_trial(context, TrialConfig(f"t{number:04}", number, Cell("finetune", None, 0), {"lr": 0.01}, number))


def test_images_that_come_later_change_no_split_of_a_sweep(images: Path, tmp_path: Path) -> None:
    spec = small_spec(images, tmp_path / "runs")
    folder = create(spec)
    before = prepare(spec).task
    keep_images(folder, before)
    first = finetuned(spec, folder, 0)
    shutil.copytree(images / "red", images / "amber")
    for path in sorted((images / "amber").iterdir()):
        path.write_bytes(path.read_bytes() + b"\0")  # other images, of a class that sorts first
    assert load_task(spec.task, SweepContext(spec, "").store).classes[0] == "amber"
    after = prepare(spec).task
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


def test_a_sweep_without_its_store_is_continued_on_the_same_images_whatever_their_times(
    images: Path, tmp_path: Path
) -> None:
    spec = small_spec(images, tmp_path / "runs")
    folder = create(spec)
    keep_images(folder, prepare(spec).task)
    shutil.rmtree(tmp_path / "runs" / "store")
    _load_task.cache_clear()  # as in another process
    for path in images.rglob("*.png"):
        os.utime(path, (1, 1))  # as a copy may have them
    assert len(prepare(spec).task.val) > 0
    shutil.rmtree(tmp_path / "runs" / "store")
    _load_task.cache_clear()  # as in another process
    shutil.rmtree(images / "red")
    with pytest.raises(
        UserError, match=r"^task\.data: the images of .* are not those with which '.*small' began, and the"
    ):
        prepare(spec)


def test_promoted_trials_see_the_images_that_they_were_chosen_on(images: Path, tmp_path: Path) -> None:
    spec = small_spec(images, tmp_path / "runs")
    first = create(spec)
    before = prepare(spec).task
    keep_images(first, before)
    again = spec.model_copy(update={"name": "again"})
    keep_those_of(first, create(again))
    shutil.rmtree(images / "red")
    assert prepare(again).task.val.ids == before.val.ids


def test_a_sweep_is_continued_by_the_file_that_it_began_with_wherever_that_lies(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path / "runs")
    known = open_sweep(create(spec))
    moved = spec.model_copy(update={"task": spec.task.model_copy(update={"data": "folder:/elsewhere/" + colours.name})})
    assert check_same(moved, known, ["train.steps"]) == ""
    with pytest.raises(UserError, match=r"^--resume: task\.data is "):
        check_same(moved, known, ["task.data"])
    half = [spec.teachers[0].model_copy(update={"precision": "bf16"})]
    with pytest.raises(UserError, match=r"^--resume: teachers is "):
        check_same(spec.model_copy(update={"teachers": half}), known, ["teachers.0.precision"])
    more = spec.model_copy(update={"search": spec.search.model_copy(update={"trials": 40})})
    told = "It goes on with the file that it began with: search.trials 5 (the file now: 40)."
    assert check_same(more, known, ["train.steps"]) == told
    for flag in ("search.trials", "search"):
        with pytest.raises(
            UserError, match=r"^--resume: search\.trials is 40 here, and '.*small' began with 5; contin"
        ):
            check_same(more, known, [flag])
