"""Several labels an image, from a table of labels to an exported network."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pixel_data import INK, listed_folder
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from small import small_spec

from methods.contract import supervised_loss
from methods.heads import fit_linear_head, fit_linear_head_cv, rarest_class
from orchestrator.data.labels import open_labels
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy
from orchestrator.errors import UserError
from orchestrator.evaluate.metrics import auroc, mean_auroc, score
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.select.export import export_student
from orchestrator.spec import SweepSpec, Task, read_spec
from orchestrator.store import Store
from orchestrator.sweep.run import prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig
from orchestrator.trial.run import run_trial
from orchestrator.trial.score import _labels, _pixels

METHODS = ("finetune", "linear_probe", "kd", "wecolora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return listed_folder(tmp_path_factory.mktemp("tagged") / "images")


def task_of(folder: Path, **changes) -> Task:
    return Task(**{"data": f"folder:{folder}", "kind": "multilabel", "shots": 5, **changes})


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def table(folder: Path) -> dict[str, set[str]]:
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()[1:]]
    return {name: set(labels.split(";")) - {""} for name, labels in rows}


# Data


def test_labels_are_those_of_the_table_and_an_image_may_have_none(folder, store):
    task = load_task(task_of(folder), store)
    assert task.classes == tuple(sorted(INK))
    known = table(folder)
    none = 0
    for split in (task.train, task.val, task.test):
        for where, labels in zip(split.where, split.labels, strict=True):
            assert {task.classes[c] for c in labels} == known[where]
            none += not labels
    assert none == sum(not labels for labels in known.values()) > 3
    assert sum(map(len, (task.train, task.val, task.test))) == len(known) == 60


def test_every_split_gets_its_share_of_every_class_and_of_images_without_one(folder, store):
    task = load_task(task_of(folder), store)
    whole = [labels for split in (task.train, task.val, task.test) for labels in split.labels]
    for share, split in ((0.2, task.val), (0.2, task.test), (0.6, task.train)):
        for c in range(3):
            wanted = share * sum(c in labels for labels in whole)
            assert abs(sum(c in labels for labels in split.labels) - wanted) <= 1.5
        assert abs(sum(not labels for labels in split.labels) - share * sum(not labels for labels in whole)) <= 1.5
    assert not set(task.train.ids) & set(task.val.ids)
    assert not set(task.test.ids) & set(task.train.ids + task.val.ids)


def test_shots_serve_every_class_and_fewer_are_a_subset_of_more(folder, store):
    draws = []
    for shots in (1, 2, 3, 5):
        task = load_task(task_of(folder, shots=shots), store)
        chosen = [task.train.labels[i] for i in task.labelled]
        for c in range(3):
            assert sum(c in labels for labels in chosen) >= shots
        assert sum(not labels for labels in chosen) == shots
        assert len(chosen) <= 4 * shots  # an image with two classes counts for both
        draws.append({task.train.ids[i] for i in task.labelled})
    assert all(few < many for few, many in itertools.pairwise(draws))
    other = load_task(task_of(folder, shots=3, seed=1), store)
    assert {other.train.ids[i] for i in other.labelled} != draws[2]


def test_rows_without_labels_are_marked_and_the_others_are_zeros_and_ones(folder, store):
    task = load_task(task_of(folder), store)
    labels = open_labels(store, task, task.train, task.labelled, Policy(0.5, 0.0), 2, 32, 1.0)
    rows = np.arange(len(task.train))
    values = labels.batch(rows, rows % 2)
    assert values.dtype == torch.float32
    for row in rows:
        wanted = [float(c in task.train.labels[row]) for c in range(3)] if row in task.labelled else [-1.0] * 3
        assert values[row].tolist() == wanted


def test_parquet_gives_what_the_folder_gives(folder, store, tmp_path):
    known = table(folder)
    images = [(folder / name).read_bytes() for name in known]
    listed = [sorted(labels) for labels in known.values()]
    one = load_task(task_of(folder), store)
    for labels in (listed, [";".join(v) for v in listed]):
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "i.parquet")
        other = load_task(Task(data=f"parquet:{tmp_path / 'i.parquet'}", kind="multilabel", shots=5), store)
        assert (other.classes, other.labelled, other.val.ids) == (one.classes, one.labelled, one.val.ids)
        assert other.train.labels == one.train.labels
        assert other.labels_hash == one.labels_hash
    pq.write_table(pa.table({"image": images, "label": listed}), tmp_path / "i.parquet")
    with pytest.raises(UserError, match=r"are lists; set task\.kind to multilabel"):
        load_task(Task(data=f"parquet:{tmp_path / 'i.parquet'}", shots=5), store)


def test_what_the_table_does_not_name_is_counted_and_equal_images_with_other_labels_are_left_out(tmp_path, store):
    root = listed_folder(tmp_path / "images")
    (root / "extra.png").write_bytes(b"never listed")
    lines = (root / "labels.csv").read_text().splitlines()
    first, second = next((a, b) for a, b in itertools.combinations(lines[1:], 2) if a.split(",")[1] != b.split(",")[1])
    (root / second.split(",")[0]).write_bytes((root / first.split(",")[0]).read_bytes())
    task = load_task(task_of(root), store)
    assert task.skipped == {"not in labels.csv": 1, "exact duplicate": 1, "same image with other labels": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,labels\n00.png,red\n01.png,red,blue\n", r"line 3 of '.*labels\.csv' has 3 fields \('01.png,red,blue'\)"),
        (
            "file,labels\n00.png\n",
            r"has 1 field \('00.png'\) and the header has 2 \(file and labels\); several names are ",
        ),
        ("labels,file\nred\n", r"line 2 of .* has 1 field \('red'\).* separated by ';'"),
        ("file,labels,by\n00.png,red,me,x\n", r"has 4 fields .* the header has 3 \(file, labels and by\)"),
        (None, r"needs '.*labels.csv', a table with the columns file and labels"),
        ("file,label\n00.png,red\n", r"has no column 'labels'; it has file and label. Did you mean 'label'\?"),
        ("file,labels\n00.pngg,red\n", r"names '00.pngg', which is no image. Did you mean '00.png'\?"),
        ("file,labels\n00.png,red\n00.png,\n", r"names '00.png' twice"),
        ("file,labels\n00.png,\n01.png,\n", "no image of .* has a label"),
        ("file,labels\n" + "".join(f"{i:02}.png,red\n" for i in range(60)), "no class has both images with it and"),
    ],
)
def test_a_bad_table_is_refused_in_a_sentence(tmp_path, store, text, message):
    root = listed_folder(tmp_path / "images")
    (root / "labels.csv").unlink()
    if text is not None:
        (root / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_task(task_of(root), store)


def test_a_line_of_the_table_may_end_before_columns_that_are_not_asked_for(tmp_path, store):
    root = listed_folder(tmp_path / "images")
    known = table(root)
    lines = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text("\n".join([f"{lines[0]},by", "", f"{lines[1]},me", *lines[2:]]) + "\n")
    task = load_task(task_of(root), store)
    assert task.skipped == {}
    assert sum(map(len, (task.train, task.val, task.test))) == len(known)
    assert not all(known.values())  # some with an empty field of labels


def test_nulls_among_labels_are_no_class(folder, store, tmp_path):
    known = table(folder)
    images = [(folder / name).read_bytes() for name in known]
    names = [sorted(labels) for labels in known.values()]
    texts = [";".join(one) or None for one in names]
    lists = [[*one, None] if one else None for one in names]
    for labels in (texts, lists):
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "i.parquet")
        task = load_task(Task(data=f"parquet:{tmp_path / 'i.parquet'}", kind="multilabel", shots=5), store)
        assert task.classes == tuple(sorted(INK))
        assert task.skipped == {}
        assert sum(map(len, (task.train, task.val, task.test))) == len(known)


def test_ready_splits_are_kept_and_their_tables_read(tmp_path, store):
    root = listed_folder(tmp_path / "Training")
    listed = (root / "labels.csv").read_text().splitlines()
    (tmp_path / "Testing").mkdir()
    (tmp_path / "notes").mkdir()
    for line in listed[41:]:
        (root / line.split(",")[0]).rename(tmp_path / "Testing" / line.split(",")[0])
    (root / "labels.csv").write_text("\n".join(listed[:41]))
    (tmp_path / "Testing" / "labels.csv").write_text("\n".join([listed[0], *listed[41:]]))
    task = load_task(task_of(tmp_path, shots=2), store)
    assert (len(task.train) + len(task.val), len(task.test)) == (40, 20)
    assert {where.split("/")[0] for where in task.test.where} == {"Testing"}
    (tmp_path / "notes" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"the folder '.*/notes' holds images, beside folders of train and test"):
        load_task(task_of(tmp_path, shots=2), store)


def test_keys_of_another_kind_are_refused(folder):
    with pytest.raises(UserError, match=r"decoder: conv is for segmentation only, and kind is multilabel"):
        spec_of(folder, Path("runs"), decoder="conv")
    with pytest.raises(UserError, match=r"kind: multilabel does not fit 'packaged/clipart'"):
        spec_of(folder, Path("runs"), data="packaged/clipart")
    with pytest.raises(UserError, match=r"task.kind"):
        spec_of(folder, Path("runs"), kind="multi-label")


# Metric, loss and head


def test_auroc_is_scikit_learns_also_with_ties():
    rng = np.random.default_rng(0)
    for decimals in (6, 1, 0):
        scores = rng.normal(size=(200, 4)).round(decimals)
        labels = (rng.random((200, 4)) < [0.5, 0.1, 0.02, 0.9]).astype(float)
        for c in range(4):
            assert auroc(scores[:, c], labels[:, c] > 0.5) == pytest.approx(roc_auc_score(labels[:, c], scores[:, c]))
        assert mean_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores, average="macro"))


def test_a_class_with_one_value_only_is_left_out_of_the_mean():
    scores = np.array([[0.1, 3.0, 0.0], [0.4, 1.0, 0.0], [0.35, 2.0, 0.0], [0.8, 4.0, 0.0]])
    labels = np.array([[0, 1, 0], [0, 1, 0], [1, 1, 0], [1, 1, 0]], dtype=float)
    assert mean_auroc(scores, labels) == 0.75
    assert np.isnan(mean_auroc(scores[:, 1:2], labels[:, 1:2]))


def test_the_loss_is_binary_cross_entropy_on_rows_with_labels():
    logits = torch.tensor([[2.0, -1.0], [0.0, 0.0], [5.0, 5.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    by_hand = (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)) + 2 * np.log(2)) / 4
    assert float(supervised_loss(logits, labels, "multilabel")) == pytest.approx(by_hand, abs=1e-6)


def test_the_head_of_each_class_is_scikit_learns_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(80, 6, generator=generator) + 1
    labels = (features @ torch.randn(6, 3, generator=generator) + torch.randn(80, 3, generator=generator) > 2).float()
    weight, bias = fit_linear_head(features, labels, 3, l2=0.05)
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    for c in range(3):
        reference = LogisticRegression(C=1 / (80 * 0.05), tol=1e-10, max_iter=10000)
        reference.fit(standard.numpy(), labels[:, c].numpy())
        wanted = standard.double().numpy() @ reference.coef_[0] + reference.intercept_[0]
        torch.testing.assert_close(features @ weight[c] + bias[c], torch.tensor(wanted).float(), rtol=0, atol=2e-3)


def test_every_class_gets_the_penalty_that_suits_it():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 40, generator=generator)
    clear = features[:, 0] > 0
    chance = torch.rand(60, generator=generator) > 0.5
    weight, _ = fit_linear_head_cv(features, torch.stack([clear, chance], 1).float(), 2)
    assert weight[1].norm() < 0.2 * weight[0].norm()
    alone, _ = fit_linear_head_cv(features, clear[:, None].float(), 1)
    torch.testing.assert_close(weight[0], alone[0], rtol=0, atol=0.05 * float(alone.norm()))


def test_a_rows_stratum_is_its_rarest_class():
    labels = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    assert rarest_class(labels).tolist() == [1, 0, 2, 3]


# Whole trials


def spec_of(folder: Path, storage: Path, **task) -> SweepSpec:
    raw = {"data": f"folder:{folder}", "kind": "multilabel", "shots": 6, **task}
    return small_spec(folder, storage, task=raw, methods={name: {} for name in METHODS})


@pytest.fixture(scope="module")
def trials(folder, tmp_path_factory):
    storage = tmp_path_factory.mktemp("runs")
    spec = spec_of(folder, storage)
    context = SweepContext(spec, str(storage / "small"))
    rows = {}
    for cell in prepare(spec).cells:
        rows[cell.method] = run_trial(context, TrialConfig(cell.method, 0, cell, {}, 0))
    return context, rows


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_scores_what_its_stored_student_scores(trials, method):
    context, rows = trials
    row = rows[method]
    assert row["status"] == "complete", row["reason"]
    network, meta = load_student(Path(context.folder) / row["student_path"])
    task = load_task(context.spec.task, context.store)
    base = type("Base", (), {"preprocessing": Preprocessing.from_json(meta["preprocessing"])})
    labels = _labels(context, task, task.val, range(len(task.val)), base.preprocessing.size)
    pixels = _pixels(context, task, task.val, base)
    found = score(network, base.preprocessing, pixels, labels, len(task.val), "multilabel", 3, with_error=True)
    assert found.value == row["val_metric"]
    assert 0.4 < found.value <= 1
    assert 0 < found.error < 0.2


def test_its_search_space_suits_such_a_folder(folder, tmp_path):
    overrides = {
        "task.data": f"folder:{folder}",
        "task.shots": 4,
        "teachers": "[{model: timm/test_vit, pretrained: false}]",
        "students": "[timm/test_resnet]",
        "storage": tmp_path,
    }
    spec = read_spec("search_spaces/multilabel.yaml", [f"{k}={v}" for k, v in overrides.items()])
    prepared = prepare(spec)
    assert {cell.method for cell in prepared.cells} == {*METHODS, "rkd", "lora"}
    assert prepared.dropped == []


def test_the_exported_card_tells_of_probabilities_and_the_metric(trials, tmp_path):
    context, rows = trials
    network, meta = load_student(Path(context.folder) / rows["kd"]["student_path"])
    report = export_student(network, meta, tmp_path / "out", "safetensors")
    assert report["max_abs_difference"] == 0
    assert report["timm_loads"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| mean AUROC on val | {rows['kd']['val_metric']:.4f} |" in card
    assert "sigmoid" in card
    assert "logits.sigmoid()" in (tmp_path / "out" / "load.py").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == sorted(INK)
