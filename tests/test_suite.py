"""The suite: zero-shot, the probe, retrieval and shifts against plain re-implementations, and bad input."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from small import small_spec
from small_clip import clip_folder

from methods.contract import Deployed, Structure
from methods.parts.zero_shot import attach
from orchestrator.cli import main
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy, draw, render
from orchestrator.errors import UserError
from orchestrator.evaluate.suite import Subject, named_subject, read_suite, run_suite, stored_subject
from orchestrator.evaluate.suite.features import Reader, square
from orchestrator.evaluate.suite.measure import mean_score, measure, value_of
from orchestrator.evaluate.suite.probe import EPSILON, MOMENTUM, Labelled, _train, fit_probe
from orchestrator.evaluate.suite.retrieval import Captioned, read_captioned, recalls
from orchestrator.evaluate.suite.shifts import NAMES, SEVERITIES, Shift
from orchestrator.models.clip import text_tower
from orchestrator.models.load import build_network, describe, load_network, save_student
from orchestrator.select.subject import find_subject
from orchestrator.spec import Model, Task
from orchestrator.store import Store
from orchestrator.sweep.choice import recommend
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

TEMPLATES = ["a {}", "one {} thing"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(model=f"local:{clip_folder(tmp_path_factory.mktemp('clip') / 'tiny')}")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("suite") / "store")


@pytest.fixture(scope="module")
def subject(teacher: Model) -> Subject:
    return named_subject(teacher.model)


def suite_file(folder: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def evaluated(subject: Subject, store: Store, folder: Path, **keys: Any) -> dict[str, Any]:
    plain = {"synthetic": [], "probe": False, "device": "cpu"}
    return run_suite(subject, read_suite(suite_file(folder, **(plain | keys))), store)


def shift_set(colours: Path, root: Path, classes: tuple[str, ...] = ("blue", "red")) -> Path:
    """Images of some of the classes, inverted."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for path in sorted((colours / name).glob("*.png"))[:6]:
            Image.fromarray(255 - np.asarray(Image.open(path))).save(root / name / path.name)
    return root


def zero_shot_by_hand(teacher: Model, task: Any, images: list[torch.Tensor], names: list[str]) -> torch.Tensor:
    network = load_network(teacher, "teacher")
    tower = text_tower(teacher, weights=True)
    means = [
        F.normalize(F.normalize(tower.embed([t.format(n) for t in TEMPLATES]), dim=-1).mean(0), dim=0) for n in names
    ]
    with torch.no_grad():
        rows = [network.module(network.preprocessing.normalise(pixels[None]))[0] for pixels in images]
    return 100 * F.normalize(torch.stack(rows), dim=-1) @ torch.stack(means).T


def student_that_is(teacher: Model, folder: Path, colours: Path, **changes: Any) -> Path:
    """A stored student with the teacher's weights and an identity as its projection."""
    base = load_network(teacher, "teacher")
    network = attach(build_network(teacher, weights=True), 24, 3)
    with torch.no_grad():
        network.backbone.head.weight.copy_(torch.eye(24))
        network.backbone.head.bias.zero_()
    structure = Structure("methods.parts.zero_shot:attach", {"width": 24, "classes": 3})
    meta = {
        "model": teacher.model_dump(mode="json"),
        "changes": {},
        "num_classes": 3,
        "classes": ["blue", "green", "red"],
        "preprocessing": describe(base.preprocessing),
        "task": Task(data=f"folder:{colours}", shots=4).model_dump(mode="json"),
        "teacher_entry": teacher.model_dump(mode="json"),
    }
    save_student(folder, Deployed(network, "student", {}, structure), meta | changes)
    return folder


def test_zero_shot_is_all_templates_normalised_averaged_and_normalised(
    teacher: Model, subject: Subject, store: Store, colours: Path, tmp_path: Path
) -> None:
    entry = {"name": "c", "data": f"folder:{colours}", "templates": TEMPLATES, "names": {"red": "crimson"}}
    found = evaluated(subject, store, tmp_path, tasks=[entry])["tasks"][0]
    task = load_task(Task(data=f"folder:{colours}", shots=None), store)
    test = task.test
    images = [
        render(task.image(test, i), draw(Policy(1, 0), "", s, 0), 32, "bicubic") for i, s in enumerate(test.sizes)
    ]
    scores = zero_shot_by_hand(teacher, task, images, ["blue", "green", "crimson"])
    value = float((scores.argmax(1) == torch.tensor(test.labels)).double().mean())
    assert found["zero_shot"]["value"] == pytest.approx(value, abs=1e-9)
    assert found["zero_shot"]["error"] == pytest.approx(math.sqrt(value * (1 - value) / len(test)))
    assert (found["images"]["test"], found["probe"], found["robustness"]) == (len(test), None, None)


def test_a_student_that_is_the_teacher_scores_as_the_teacher_everywhere(
    teacher: Model, subject: Subject, store: Store, colours: Path, tmp_path: Path
) -> None:
    student = stored_subject(student_that_is(teacher, tmp_path / "student", colours))
    shifted = shift_set(colours, tmp_path / "inverted")
    keys = {
        "tasks": [{"name": "c", "data": f"folder:{colours}", "shifts": {"inverted": f"folder:{shifted}"}}],
        "synthetic": ["blur", "noise"],
        "severities": [2],
    }
    mine, theirs = (evaluated(s, store, tmp_path, **keys)["tasks"][0] for s in (student, subject))
    assert mine["zero_shot"] == theirs["zero_shot"]
    assert mine["robustness"] == theirs["robustness"]
    assert set(mine["robustness"]["synthetic"]) == {"blur@2", "noise@2"}


def test_a_shift_with_some_of_the_classes_is_scored_among_these(
    teacher: Model, subject: Subject, store: Store, colours: Path, tmp_path: Path
) -> None:
    shifted = shift_set(colours, tmp_path / "inverted")
    entry = {
        "name": "c",
        "data": f"folder:{colours}",
        "templates": TEMPLATES,
        "shifts": {"inverted": "folder:inverted", "again": "folder:inverted"},
    }
    found = evaluated(subject, store, tmp_path, tasks=[entry])["tasks"][0]["robustness"]
    data = load_task(Task(data=f"folder:{shifted}", shots=None), store)
    rights = []
    for split in (data.train, data.val, data.test):
        images = [
            render(data.image(split, i), draw(Policy(1, 0), "", s, 0), 32, "bicubic") for i, s in enumerate(split.sizes)
        ]
        scores = zero_shot_by_hand(teacher, data, images, ["blue", "red"])
        rights += (scores.argmax(1) == torch.tensor(split.labels)).tolist()
    assert found["shifts"]["inverted"]["value"] == pytest.approx(np.mean(rights))
    assert (found["shifts"]["inverted"]["images"], found["shifts"]["inverted"]["classes"]) == (12, 2)
    assert found["shifts"]["inverted"]["base"]["images"] < found["base"]["images"]
    assert found["mean_shift"]["value"] == pytest.approx(found["shifts"]["inverted"]["value"])


def test_per_class_accuracy_weighs_classes_alike_and_errors_are_binomial() -> None:
    scores = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 0]), 3).float()
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert value_of(scores, labels, "accuracy") == pytest.approx(4 / 6)
    found = measure(scores, labels, "mean_per_class")
    assert found.value == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found.error == pytest.approx(math.sqrt(0.75 * 0.25 / 4 + 0.5 * 0.5 / 2) / 2)
    assert mean_score([found] * 4).error == pytest.approx(found.error / 2)
    assert mean_score([found] * 4, same_images=True).error == pytest.approx(found.error)


@pytest.mark.parametrize("cells", [1, 37, 10**6])
def test_recall_is_that_of_a_loop_over_all_pairs_whatever_the_block(cells: int) -> None:
    torch.manual_seed(0)
    queries, answers = torch.randn(23, 5), torch.randn(31, 5)
    answers[7] = 3 * answers[4]  # a tie
    pairs = torch.tensor([(i, j) for i in range(23) for j in {i, (i * 7) % 31}])[torch.randperm(45)]
    right = {(int(i), int(j)) for i, j in pairs}
    for k, score in recalls(queries, answers, pairs, (1, 2, 5, 10), cells).items():
        hits = 0
        for i in range(23):
            near = [float(F.cosine_similarity(queries[i], answers[j], dim=0)) for j in range(31)]
            best = max(near[j] for j in range(31) if (i, j) in right)
            hits += sum(near[j] >= best - 1e-6 for j in range(31) if (i, j) not in right) < k
        assert score.value == pytest.approx(hits / 23)


def test_what_embeds_everything_alike_retrieves_nothing() -> None:
    pairs = torch.arange(20).repeat(2, 1).T
    found = recalls(torch.ones(20, 4), torch.ones(20, 4), pairs)
    assert [found[k].value for k in (1, 5, 10)] == [0, 0, 0]
    perfect = recalls(torch.eye(20), torch.eye(20), pairs)
    assert [perfect[k].value for k in (1, 5, 10)] == [1, 1, 1]


def test_equal_images_and_equal_captions_are_one_and_count_as_right(
    subject: Subject, store: Store, colours: Path, tmp_path: Path
) -> None:
    files = [p.read_bytes() for p in sorted((colours / "red").glob("*.png"))[:4]]
    rows = [
        (files[0], "one"),
        (files[0], "two"),
        (files[1], " two "),
        (files[2], "three"),
        (b"nothing", "four"),
        (files[3], ""),
    ]
    path = tmp_path / "captions.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": i}, "caption": c} for i, c in rows]), path)
    known = Captioned()
    count = sum(len(batch) for batch in read_captioned([path], known, batch=2))
    assert (count, known.captions) == (3, ["one", "two", "three"])
    assert known.pairs == [(0, 0), (0, 1), (1, 1), (2, 2)]
    assert known.skipped == {"cannot be decoded": 1, "without a caption": 1}
    result = evaluated(subject, store, tmp_path, tasks=[f"parquet:{path}"])
    (row,) = result["retrieval"]
    assert (row["images"], row["captions"]) == (3, 3)
    assert row["image_to_text"]["5"]["value"] == row["text_to_image"]["5"]["value"] == 1.0
    listed = tmp_path / "lists.parquet"
    grouped = [{"image": files[0], "caption": ["one", "two"]}, {"image": files[1], "caption": ["two"]}]
    pq.write_table(pa.Table.from_pylist(grouped), listed)
    other = Captioned()
    assert sum(len(batch) for batch in read_captioned([listed], other)) == 2
    assert other.pairs == [(0, 0), (0, 1), (1, 1)]


def clusters(count: int, classes: int = 4, width: int = 12, spread: float = 1.0, seed: int = 0) -> Labelled:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return Labelled(centres[labels] + spread * torch.randn(count, width, generator=generator), labels)


@pytest.mark.parametrize("several", [False, True])
def test_runs_side_by_side_are_those_of_torchs_own_sgd(several: bool) -> None:
    data = clusters(100)
    if several:
        data = Labelled(data.features, (torch.rand(100, 4, generator=torch.Generator().manual_seed(1)) < 0.4).float())
    vectors = F.normalize(torch.randn(4, 12, generator=torch.Generator().manual_seed(3)), dim=-1)
    settings = [(1e-3, 0.1), (0.05, 1e-3)]
    for (lr, decay), (weight, bias) in zip(settings, _train(data, 4, settings, 3, vectors, 5), strict=True):
        norm = torch.nn.BatchNorm1d(12, affine=False, eps=EPSILON).eval()
        norm.running_mean = data.features.mean(0)
        norm.running_var = data.features.var(0, correction=0)
        head = torch.nn.Linear(12, 4)
        with torch.no_grad():
            deviation = (norm.running_var + EPSILON).sqrt()
            head.weight.copy_(100 * vectors * deviation)
            head.bias.copy_(100 * vectors @ norm.running_mean)
        groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            for rows in torch.randperm(100, generator=generator).split(64):
                logits = head(norm(data.features[rows]))
                loss = F.binary_cross_entropy_with_logits if several else F.cross_entropy
                optimizer.zero_grad()
                loss(logits, data.labels[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            expected = head(norm(data.features))
        assert torch.allclose(F.linear(data.features, weight, bias), expected, atol=1e-3 * float(expected.abs().max()))


def test_the_head_starts_as_the_zero_shot_one() -> None:
    data = clusters(50)
    vectors = F.normalize(torch.randn(4, 12), dim=-1)
    ((weight, bias),) = _train(data, 4, [(0.0, 0.0)], 1, vectors, 0)
    expected = 100 * data.features @ vectors.T
    assert torch.allclose(F.linear(data.features, weight, bias), expected, atol=1e-3)


def test_the_probe_learns_and_is_the_same_again() -> None:
    train, val, test = clusters(200, seed=1), clusters(60, seed=2), clusters(400, seed=3)
    probe = fit_probe(train, val, 4, "accuracy")
    assert value_of(probe(test.features), test.labels, "accuracy") > 0.85
    again = fit_probe(train, val, 4, "accuracy")
    assert torch.equal(probe.weight, again.weight)
    # The last epochs see val too, and scaling a feature changes nothing.
    scaled = [Labelled(part.features * 7 + 3, part.labels) for part in (train, val)]
    other = fit_probe(*scaled, 4, "accuracy")  # type: ignore[arg-type]
    assert value_of(other(test.features * 7 + 3), test.labels, "accuracy") == pytest.approx(
        value_of(probe(test.features), test.labels, "accuracy"), abs=0.01
    )


def test_a_probe_on_features_of_the_store_is_that_on_fresh_ones(
    subject: Subject, colours: Path, tmp_path: Path
) -> None:
    keys = {"tasks": [{"name": "c", "data": f"folder:{colours}"}], "probe": True, "shots": [5], "seeds": [0, 1]}
    store = Store(tmp_path / "a")
    first = evaluated(subject, store, tmp_path, **keys)
    entries = [e for e in store.entries() if e.stage == "suite_features"]
    assert len(entries) == 3
    assert evaluated(subject, store, tmp_path, **keys) == first
    assert [e for e in store.entries() if e.stage == "suite_features"] == entries
    assert evaluated(subject, Store(tmp_path / "b"), tmp_path, **keys) == first
    task = first["tasks"][0]
    assert task["probe"]["value"] > 0.6  # three colours, a random network
    assert len(task["shots"]["5"]["draws"]) == 2
    assert task["shots"]["5"]["value"] == pytest.approx(np.mean(task["shots"]["5"]["draws"]))
    assert first["mean"]["probe"]["value"] == task["probe"]["value"]


def picture(seed: int = 0, side: int = 224) -> torch.Tensor:
    coarse = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    return torch.from_numpy(np.asarray(Image.fromarray(coarse).resize((side, side), 2)).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_is_the_same_each_time_and_stronger_with_severity(name: str) -> None:
    plain = picture()
    away = []
    for severity in SEVERITIES:
        shifted = Shift(name, severity)(plain, "a")
        assert (shifted.dtype, shifted.shape) == (torch.uint8, plain.shape)
        assert torch.equal(shifted, Shift(name, severity)(plain.clone(), "a"))
        away.append(float((shifted.float() - plain.float()).square().mean().sqrt()))
    assert away == sorted(away)
    assert len(set(away)) == 5
    assert away[0] > 0.5


def test_greyscale_has_no_colour_and_a_rotation_adds_none() -> None:
    grey = Shift("greyscale", 5)(picture(), "a").float()
    assert float((grey.amax(0) - grey.amin(0)).max()) <= 1
    turned = Shift("rotation", 5)(torch.full((3, 224, 224), 90, dtype=torch.uint8), "a")
    assert bool((turned == 90).all())
    assert not torch.equal(Shift("noise", 3)(picture(), "a"), Shift("noise", 3)(picture(), "b"))


def test_networks_of_any_size_see_the_same_shifted_picture(subject: Subject) -> None:
    preprocessing = subject.preprocessing
    image = picture(side=300)
    small = square(image, "a", replace(preprocessing, size=56), Shift("jpeg", 5)).float()
    large = square(image, "a", replace(preprocessing, size=112), Shift("jpeg", 5)).float()
    halved = F.avg_pool2d(large[None], 2)[0]
    assert float((small - halved).abs().mean()) < 4


def test_a_student_without_embedding_has_its_head_and_a_probe(store: Store, colours: Path, tmp_path: Path) -> None:
    entry = Model(model="timm/test_convnext", image_size=32)
    torch.manual_seed(0)
    network = build_network(entry, num_classes=3)
    meta = {
        "model": entry.model_dump(mode="json"),
        "changes": {},
        "num_classes": 3,
        "classes": ["blue", "green", "red"],
        "preprocessing": describe(load_network(entry, "student").preprocessing),
        "task": Task(data=f"folder:{colours}", shots=4).model_dump(mode="json"),
        "teacher_entry": None,
    }
    save_student(tmp_path / "student", Deployed(network, "student", {}, None), meta)
    student = stored_subject(tmp_path / "student")
    keys = {"synthetic": ["greyscale"], "severities": [5], "probe": True}
    result = evaluated(student, store, tmp_path, tasks=[{"name": "c", "data": f"folder:{colours}"}], **keys)
    task = result["tasks"][0]
    assert "has no zero-shot score, only a probe" in result["notes"][1]
    assert (task["zero_shot"], task["robustness"]["by"]) == (None, "head")
    data = load_task(Task(data=f"folder:{colours}", shots=None), store)
    pixels = torch.stack([square(data.image(data.test, i), "", student.preprocessing) for i in range(len(data.test))])
    with torch.no_grad():
        expected = network(student.preprocessing.normalise(pixels)).argmax(1)
    right = float((expected == torch.tensor(data.test.labels)).double().mean())
    assert task["head"]["value"] == pytest.approx(right)
    assert task["probe"]["value"] > 0.6
    pq.write_table(pa.table({"image": [b""], "caption": ["x"]}), tmp_path / "q.parquet")
    with pytest.raises(UserError, match="does not embed images, and retrieval needs that"):
        evaluated(student, store, tmp_path, tasks=["parquet:q.parquet"])
    # The same file and seed: the student's own training images are no test images here. Another split is told.
    assert not any("trained on" in note for note in task["notes"])
    other = evaluated(student, store, tmp_path, tasks=[{"name": "c", "data": f"folder:{colours}", "seed": 1}])
    assert any("among those that the student was trained on" in note for note in other["tasks"][0]["notes"])


def test_a_folder_of_tasks_is_a_suite(subject: Subject, store: Store, colours: Path, tmp_path: Path) -> None:
    root = tmp_path / "suite"
    only_test = root / "only_test"
    for name in ("blue", "red"):
        (only_test / "test" / name).mkdir(parents=True)
        for path in sorted((colours / name).glob("*.png"))[:5]:
            (only_test / "test" / name / path.name).write_bytes(path.read_bytes())
    shift_set(colours, root / "_shifts" / "inverted")
    (root / "colours").mkdir()
    keys = {"data": f"folder:{colours}", "metric": "mean_per_class", "shifts": {"inv": "folder:../_shifts/inverted"}}
    (root / "colours" / "task.yaml").write_text(yaml.safe_dump(keys))
    (root / "suite.yaml").write_text("synthetic: []\nshots: [5, 50]\nseeds: [0]\n")
    result = run_suite(subject, read_suite(root), store)
    first, second = result["tasks"]
    assert (first["name"], first["metric"], second["name"]) == ("colours", "mean per-class accuracy", "only_test")
    assert "inv" in first["robustness"]["shifts"]
    assert first["shots"]["5"] is not None
    assert first["shots"]["50"] is None
    assert any("50 labelled images a class are asked for" in note for note in first["notes"])
    assert (second["images"], second["probe"]) == ({"train": 0, "val": 0, "test": 10}, None)
    assert any("no probe" in note for note in second["notes"])
    assert result["mean"]["zero_shot"]["tasks"] == 2
    assert result["mean"]["probe"]["tasks"] == 1


def test_several_labels_an_image_are_scored_by_auroc(
    subject: Subject, store: Store, colours: Path, tmp_path: Path
) -> None:
    rows = []
    for name in ("blue", "green", "red"):
        for i, path in enumerate(sorted((colours / name).glob("*.png"))):
            rows.append({"image": path.read_bytes(), "label": [name] + (["odd"] if i % 2 else [])})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "several.parquet")
    entry: dict[str, Any] = {"name": "m", "data": "parquet:several.parquet", "kind": "multilabel"}
    task = evaluated(subject, store, tmp_path, tasks=[entry], probe=True)["tasks"][0]
    assert (task["metric"], task["classes"]) == ("mean AUROC", 4)
    assert 0.3 < task["zero_shot"]["value"] < 0.8
    assert task["probe"]["value"] > task["zero_shot"]["value"]
    assert task["probe"]["error"] > 0
    pq.write_table(pa.Table.from_pylist([{**row, "label": ["odd"]} for row in rows]), tmp_path / "one.parquet")
    entry["shifts"] = {"one": "parquet:one.parquet"}
    with pytest.raises(UserError, match="The shift 'one' of the task 'm' has no class with both"):
        evaluated(subject, store, tmp_path, tasks=[entry])


BAD = [
    ({"tasks": [{"data": "folder:nowhere"}]}, r"The task 'nowhere': task.data: there is no folder"),
    ({"tasks": []}, "tasks: list should have at least 1 item"),
    ({"task": []}, r"Unknown key 'task'.*Did you mean 'tasks'\?"),
    ({"tasks": [{"data": "COLOURS", "metirc": "accuracy"}]}, r"metirc'.*Did you mean 'metric'\?"),
    ({"tasks": [{"data": "COLOURS", "metric": "auroc"}]}, "auroc does not fit kind classification; allowed: accuracy"),
    ({"tasks": [{"data": "COLOURS", "names": {"rde": "x"}}]}, r"names: there is no class 'rde'. Did you mean 'red'\?"),
    ({"tasks": [{"data": "COLOURS", "templates": ["no gap"]}]}, "'no gap' is no template"),
    ({"tasks": [{"data": "COLOURS", "shifts": {"s": "here"}}]}, "tasks.0.shifts.s .*'here' is not a data source"),
    ({"tasks": [{"data": "COLOURS", "shifts": {"blur": "COLOURS"}}]}, "'blur' cannot name a shift"),
    ({"tasks": [{"data": "COLOURS", "name": "a"}, {"data": "COLOURS", "name": "a"}]}, "2 are called 'a'"),
    ({"tasks": ["COLOURS"], "synthetic": ["blurr"]}, r"no synthetic shift 'blurr'.*Did you mean 'blur'\?"),
    ({"tasks": ["COLOURS"], "severities": [6]}, "6 is above 5"),
    ({"tasks": ["COLOURS"], "shots": [1]}, "1 is below 2"),
    ({"tasks": [{"data": "COLOURS", "kind": "retrieval"}]}, "captions are read from `parquet:PATH`"),
    ({"tasks": [{"data": "COLOURS", "kind": "retrieval", "metric": "accuracy"}]}, "metric is for tasks with classes"),
]


@pytest.mark.parametrize(("keys", "sentence"), BAD, ids=[s[:30] for _, s in BAD])
def test_a_wrong_suite_is_refused_in_a_sentence(
    keys: dict[str, Any], sentence: str, subject: Subject, colours: Path, tmp_path: Path
) -> None:
    text = json.dumps(keys).replace("COLOURS", f"folder:{colours}")
    path = suite_file(tmp_path, **json.loads(text))
    with pytest.raises(UserError, match=sentence):
        run_suite(subject, read_suite(path), Store(tmp_path / "store"))


def test_wrong_data_of_a_task_or_a_shift_is_told(subject: Subject, colours: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    shift_set(colours, tmp_path / "s" / "other", ("blue",))
    (tmp_path / "s" / "other" / "blue").rename(tmp_path / "s" / "other" / "bleu")
    (tmp_path / "s" / "other" / "red").mkdir()
    for path in (colours / "red").glob("0*.png"):
        (tmp_path / "s" / "other" / "red" / path.name).write_bytes(path.read_bytes())
    entry = {"name": "c", "data": f"folder:{colours}", "shifts": {"other": "folder:s/other"}}
    with pytest.raises(UserError, match=r"shift 'other' of the task 'c' has the class 'bleu'.*Did you mean 'blue'\?"):
        evaluated(subject, store, tmp_path, tasks=[entry])
    for split in ("train", "val"):
        for name in ("blue", "red"):
            (tmp_path / "t" / split / name).mkdir(parents=True)
            number = 0 if split == "train" else 1
            source = sorted((colours / name).glob("*.png"))[number]
            (tmp_path / "t" / split / name / source.name).write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"The task 't': task.splits: no image is left for test"):
        evaluated(subject, store, tmp_path, tasks=["folder:t"])
    pq.write_table(pa.table({"image": [b""], "captoin": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"no column 'caption'.*Did you mean 'captoin'\?"):
        evaluated(subject, store, tmp_path, tasks=[{"data": "parquet:p.parquet", "kind": "retrieval"}])
    pq.write_table(pa.table({"image": [b""], "caption": ["x"]}), tmp_path / "q.parquet")
    with pytest.raises(UserError, match=r"none of its images has a caption and can be read \(1 empty file\)"):
        evaluated(subject, store, tmp_path, tasks=["parquet:q.parquet"])
    with pytest.raises(UserError, match="has no sub-folders"):
        read_suite(tmp_path / "s" / "other" / "bleu")


def test_an_address_that_names_no_network_is_told(teacher: Model, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a student's folder .* nor a sweep's .* nor a model"):
        find_subject(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no packaged model.*Did you mean"):
        find_subject("packaged/clip_icon")
    with pytest.raises(UserError, match=r"There is no open_clip model 'ViT-B-33'"):
        find_subject("open_clip/ViT-B-33")
    student = student_that_is(teacher, tmp_path / "a", colours, teacher_entry=None)
    with pytest.raises(UserError, match="does not tell which teacher"):
        find_subject(str(student))


def test_a_student_of_a_sweep_is_found_and_scores_what_best_says(teacher: Model, colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, teachers=[teacher.model], methods={"embedding_regression": {}})
    folder = create(spec)
    row = run_trial(SweepContext(spec, str(folder)), TrialConfig("t0000", 0, Cell("embedding_regression", 0, 0), {}, 0))
    assert row["status"] == "complete", row["reason"]
    ledger = Ledger(folder)
    ledger.write(row)
    ledger.publish()
    told = recommend(folder)["test"]
    for address in (str(folder), f"{folder}:t0000", str(folder / "students" / "t0000")):
        student, place = find_subject(address)
        assert place == tmp_path / "store"
        task = evaluated(student, Store(place), tmp_path, tasks=[{"name": "c", "data": f"folder:{colours}"}])["tasks"][
            0
        ]
        assert task["zero_shot"]["value"] == pytest.approx(told["value"])
        assert task["zero_shot"]["images"] == told["images"]
        assert task["notes"] == []
    assert student.texts == spec.teachers[0]
    with pytest.raises(UserError, match=r"no trial 't000' in .* Did you mean 't0000'\?"):
        find_subject(f"{folder}:t000")


def test_the_command_prints_markdown_writes_json_and_refuses_in_one_sentence(
    teacher: Model, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite_file(tmp_path, tasks=[{"name": "c", "data": f"folder:{colours}"}], synthetic=["blur"], probe=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["orchestrator", "suite", *arguments, "--store", str(tmp_path / "store")])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    code, out, _ = call(teacher.model, str(path), "--out", str(tmp_path / "r.json"))
    assert code == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert f"{100 * result['tasks'][0]['zero_shot']['value']:.1f} ± " in out
    assert "test images were read for this, on purpose" in out
    assert "blur@3" in out
    code, out, _ = call(teacher.model, str(path), "--json")
    assert json.loads(out) == result
    code, out, error = call(teacher.model, str(path), "--out", str(tmp_path / "r.txt"))
    assert (code, out) == (2, "")
    assert error.strip() == f"Error: --out: '{tmp_path / 'r.txt'}' ends in '.txt'; allowed: .md and .json."


def test_features_are_those_of_the_network_on_each_plain_image(subject: Subject, colours: Path, store: Store) -> None:
    data = load_task(Task(data=f"folder:{colours}", shots=None), store)
    found = Reader(subject, store, "cpu").split(data, data.test)
    pixels = square(data.image(data.test, 3), data.test.ids[3], subject.preprocessing)
    with torch.no_grad():
        expected = subject.module(subject.preprocessing.normalise(pixels[None]))[0]
    assert torch.allclose(found[3], expected, atol=1e-5)
