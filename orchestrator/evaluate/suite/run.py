"""Runs a suite: every task, its probes and its shifts, and retrieval; plain JSON comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.parts.zero_shot import SCALE
from orchestrator.data.embed import class_vectors, embedded_prompts, prompts_of
from orchestrator.data.strata import draw_shots
from orchestrator.data.task import Split, TaskData, load_task
from orchestrator.errors import UserError, WorkError, listed, nearest
from orchestrator.evaluate.metrics import Score
from orchestrator.evaluate.suite.features import Reader, square
from orchestrator.evaluate.suite.measure import TITLES, Metric, mean_score, measure
from orchestrator.evaluate.suite.probe import Labelled, LinearProbe, fit_probe
from orchestrator.evaluate.suite.retrieval import KS, Captioned, caption_files, read_captioned, recalls
from orchestrator.evaluate.suite.shifts import Shift
from orchestrator.evaluate.suite.spec import Suite, SuiteTask
from orchestrator.evaluate.suite.subject import Subject
from orchestrator.spec import Task
from orchestrator.store import Records, Store

Scorer = Callable[[Tensor], Tensor]
TEST_NOTE = "The test images were read for this, on purpose: what is chosen by these numbers needs other test images."


@dataclass(frozen=True)
class Shifted:
    """A shift set that a user brings.

    Attributes:
        data: where its images come from.
        split: those that count.
        columns: index of each of its classes among the base task's.
    """

    data: TaskData
    split: Split
    columns: list[int]


@dataclass(frozen=True)
class Opened:
    """A task of the suite, checked."""

    spec: SuiteTask
    data: TaskData
    shifts: dict[str, Shifted]

    @property
    def metric(self) -> Metric:
        return self.spec.measured_by


def open_tasks(suite: Suite, store: Store) -> list[Opened]:
    """Reads and checks the data of every task that has classes.

    Raises:
        UserError: if one is missing, has no test images, or a shift has classes that its task has not.
    """
    opened = []
    for spec in suite.tasks:
        if spec.kind == "retrieval":
            caption_files(spec.data)
            continue
        data = _loaded(f"The task {spec.title!r}", spec.task, store, ("test",))
        for name in spec.names:
            if name not in data.classes:
                raise UserError(
                    f"The task {spec.title!r}: names: there is no class {name!r}.{nearest(name, data.classes)}"
                )
        shifts = {name: _shifted(spec, name, source, data, store) for name, source in spec.shifts.items()}
        opened.append(Opened(spec, data, shifts))
    return opened


def _loaded(who: str, task: Task, store: Store, needed: tuple[str, ...]) -> TaskData:
    try:
        return load_task(task, store, needed)
    except UserError as error:
        raise UserError(f"{who}: {error}") from error


def _shifted(spec: SuiteTask, name: str, source: str, base: TaskData, store: Store) -> Shifted:
    who = f"The shift {name!r} of the task {spec.title!r}"
    data = _loaded(who, spec.task.model_copy(update={"data": source}), store, ())
    for found in data.classes:
        if found not in base.classes:
            raise UserError(
                f"{who} has the class {found!r}, which the task has not: it has {listed(base.classes[:20])}"
                f"{' and more' if len(base.classes) > 20 else ''}.{nearest(found, base.classes)}"
            )
    ready = any(item.split == "test" for item in data.source.items())
    split = data.test if ready else _joined([data.train, data.val, data.test])
    if not len(split):
        raise UserError(f"{who} has no images.")
    if spec.kind == "multilabel":
        share = labels_of(split, len(data.classes), "multilabel").mean(0)
        if not bool(((share > 0) & (share < 1)).any()):
            raise UserError(f"{who} has no class with both images with it and images without it.")
    return Shifted(data, split, [base.classes.index(c) for c in data.classes])


def _joined(splits: Sequence[Split]) -> Split:
    parts = [(s.ids, s.where, s.labels, s.sizes) for s in splits]
    ids, where, labels, sizes = (tuple(v for part in parts for v in part[i]) for i in range(4))
    return Split(ids, where, labels, sizes)  # type: ignore[arg-type]


def labels_of(split: Split, classes: int, kind: str) -> Tensor:
    """[n] int64 of one class an image, or [n, C] float32 of 0 and 1."""
    if kind == "classification":
        return torch.tensor(split.labels, dtype=torch.int64)
    result = torch.zeros(len(split), classes)
    for row, own in enumerate(split.labels):
        result[row, list(own)] = 1.0
    return result


def run_suite(
    subject: Subject, suite: Suite, store: Store, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Evaluates a network; features and class embeddings are kept in the store.

    Args:
        subject: the network.
        suite: the tasks.
        store: where the scans of the data, and features, lie.
        tell: is told of each task.

    Returns:
        Plain JSON: `model`, `embeds`, `tasks`, `retrieval`, `mean`, `notes`. A score is `{value, error, images}`, in
        [0, 1], with its standard error.

    Raises:
        UserError: if a task or shift is wrong, before anything is computed; or there is no GPU and one is asked for.
    """
    cuda = torch.cuda.is_available()
    if suite.device == "cuda" and not cuda:
        raise UserError("device: cuda is asked for, and there is no GPU here; use auto or cpu.")
    device = "cuda" if cuda and suite.device != "cpu" else "cpu"
    opened = open_tasks(suite, store)
    captioned = [task for task in suite.tasks if task.kind == "retrieval"]
    if captioned and not subject.embeds and not opened:
        raise UserError(f"{subject.name} does not embed images, and retrieval needs that; the suite has nothing else.")
    subject.module.to(device)
    reader = Reader(subject, store, device)
    notes = [TEST_NOTE]
    if not subject.embeds:
        notes.append(f"{subject.name} does not embed images beside texts: it has no zero-shot score, only a probe.")
    results = []
    for number, task in enumerate(opened):
        tell(f"{number + 1}/{len(suite.tasks)} {task.spec.title}: {len(task.data.test)} test images")
        results.append(_Evaluation(reader, suite, task).result())
    retrieved = []
    for number, spec in enumerate(captioned):
        tell(f"{len(opened) + number + 1}/{len(suite.tasks)} {spec.title}: retrieval")
        if subject.embeds:
            retrieved.append(_retrieval(reader, spec))
        else:
            notes.append(f"{spec.title}: left out, retrieval needs a network that embeds images.")
    return {
        "model": subject.name,
        "embeds": subject.embeds,
        "device": device,
        "tasks": results,
        "retrieval": retrieved,
        "mean": _means(results),
        "notes": notes,
    }


class _Evaluation:
    """One task."""

    def __init__(self, reader: Reader, suite: Suite, task: Opened) -> None:
        self.reader, self.suite, self.task = reader, suite, task
        self.subject, self.data = reader.subject, task.data
        self.classes = len(task.data.classes)
        self.notes = [f"{n} images left out: {reason}" for reason, n in sorted(task.data.skipped.items())]

    def labels(self, split: Split) -> Tensor:
        return labels_of(split, self.classes, self.data.spec.kind)

    def features(self, split: Split, data: TaskData, shift: Shift | None = None) -> tuple[Tensor, Tensor]:
        """[n, D] what a probe reads, and [n, C] the scores of the network's own head (no columns without one)."""
        found = self.reader.split(data, split, shift)
        width = found.shape[1] - len(self.subject.classes)
        own = found[:, :width]
        return (F.normalize(own, dim=-1) if self.subject.embeds else own), found[:, width:]

    def result(self) -> dict[str, Any]:
        test, metric = self.data.test, self.task.metric
        features, logits = self.features(test, self.data)
        truth = self.labels(test)
        vectors = self._vectors()
        pool = {name: self._labelled(self.data.split(name)) for name in ("train", "val")}
        probe = self._full_probe(pool, vectors)
        shots = {str(k): self._few_shot(pool["train"], k, vectors, features, truth) for k in self.suite.shots}
        has_head = bool(self.subject.classes) and self.subject.classes == self.data.classes
        scores: dict[str, Tensor] = {}
        if vectors is not None:
            scores["zero_shot"] = SCALE * features @ vectors.T
        if has_head:
            scores["head"] = logits
        if probe is not None:
            scores["probe"] = probe(features)
        by = next(iter(scores), None)
        found: dict[str, Any] = {name: _plain(measure(s, truth, metric)) for name, s in scores.items()}
        if probe is not None:
            found["probe"] |= {"lr": probe.lr, "weight_decay": probe.weight_decay, "val": probe.val}
        self._warn_of_known(test, "test images")
        robustness = None
        if by is not None and (self.suite.synthetic or self.task.shifts):
            robustness = self._robustness(by, scores[by], truth, vectors, probe)
        return {
            "name": self.task.spec.title,
            "kind": self.data.spec.kind,
            "metric": TITLES[metric],
            "classes": self.classes,
            "images": {name: len(self.data.split(name)) for name in ("train", "val", "test")},
            "zero_shot": found.get("zero_shot"),
            "head": found.get("head"),
            "probe": found.get("probe"),
            "shots": shots,
            "robustness": robustness,
            "notes": list(dict.fromkeys(self.notes)),
        }

    def _vectors(self) -> Tensor | None:
        if self.subject.texts is None:
            return None
        if self.subject.own_texts is not None:
            return class_vectors(self.subject.embed(prompts_of(self.data), self.reader.device), self.classes)
        entry = embedded_prompts(self.reader.store, self.data, self.subject.texts, self.reader.device)
        return class_vectors(Records(entry.path / "records.arrow").all(), self.classes)

    def _labelled(self, split: Split) -> Labelled | None:
        wanted = (self.suite.probe or self.suite.shots) and len(split)
        return Labelled(self.features(split, self.data)[0], self.labels(split)) if wanted else None

    def _full_probe(self, pool: dict[str, Labelled | None], vectors: Tensor | None) -> LinearProbe | None:
        train, val = pool["train"], pool["val"]
        if not self.suite.probe:
            return None
        if train is None or val is None:
            lacking = listed(name for name, part in pool.items() if part is None)
            self.notes.append(f"no probe: the data has no images for {lacking}")
            return None
        return fit_probe(train, val, self.classes, self.task.metric, vectors)

    def _few_shot(
        self, train: Labelled | None, shots: int, vectors: Tensor | None, features: Tensor, truth: Tensor
    ) -> dict[str, Any] | None:
        """The mean over draws of so many training images a class, a fifth of which chooses the settings."""
        if train is None:
            self.notes.append(f"no {shots}-shot probe: the data has no training images")
            return None
        scores = []
        for seed in self.suite.seeds:
            try:
                rows, fitted = (self._drawn(k, seed) for k in (shots, shots - max(1, shots // 5)))
            except UserError as error:
                self.notes.append(f"no {shots}-shot probe: {error}")
                return None
            held = sorted(set(rows) - set(fitted))
            if not held:
                self.notes.append(f"no {shots}-shot probe: too few images to hold some out")
                return None
            probe = fit_probe(train.take(fitted), train.take(held), self.classes, self.task.metric, vectors, seed)
            scores.append(measure(probe(features), truth, self.task.metric))
        mean = mean_score(scores, same_images=True)
        spread = [s.value for s in scores]
        sd = math.sqrt(sum((v - mean.value) ** 2 for v in spread) / (len(spread) - 1)) if len(spread) > 1 else None
        return _plain(mean) | {"sd": sd, "draws": spread}

    def _drawn(self, shots: int, seed: int) -> list[int]:
        train = self.data.train
        task = self.data.spec.model_copy(update={"shots": shots, "draw": seed})
        one = self.data.spec.kind == "classification"
        return draw_shots(task, self.data.classes, train.ids, [(c,) if one else c for c in train.labels])

    def _robustness(
        self, by: str, plain: Tensor, truth: Tensor, vectors: Tensor | None, probe: LinearProbe | None
    ) -> dict[str, Any]:
        def scored(split: Split, data: TaskData, shift: Shift | None = None) -> Tensor:
            features, logits = self.features(split, data, shift)
            if by == "zero_shot":
                assert vectors is not None
                return SCALE * features @ vectors.T
            if by == "head":
                return logits
            assert probe is not None
            return probe(features)

        metric, test = self.task.metric, self.data.test
        found: dict[str, Any] = {"by": by, "base": _plain(measure(plain, truth, metric)), "shifts": {}, "synthetic": {}}
        own, made = [], []
        for name, shifted in self.task.shifts.items():
            scores = scored(shifted.split, shifted.data)[:, shifted.columns]
            labels = labels_of(shifted.split, len(shifted.columns), self.data.spec.kind)
            own.append(measure(scores, labels, metric))
            base = self._base_of(shifted, plain, truth)
            found["shifts"][name] = _plain(own[-1]) | {"classes": len(shifted.columns), "base": base}
            self._warn_of_known(shifted.split, f"images of the shift {name}")
        for name in self.suite.synthetic:
            for severity in self.suite.severities:
                made.append(measure(scored(test, self.data, Shift(name, severity)), truth, metric))
                found["synthetic"][f"{name}@{severity}"] = _plain(made[-1])
        found["mean_shift"] = _plain(mean_score(own)) if own else None
        found["mean_synthetic"] = _plain(mean_score(made, same_images=True)) if made else None
        return found

    def _base_of(self, shifted: Shifted, plain: Tensor, truth: Tensor) -> dict[str, Any] | None:
        """The unshifted score on the shift's classes alone; None where the test images have none of them."""
        columns = torch.tensor(shifted.columns)
        if truth.dim() == 2:
            return _plain(measure(plain[:, columns], truth[:, columns], self.task.metric))
        position = torch.full((self.classes,), -1)
        position[columns] = torch.arange(len(columns))
        kept = position[truth] >= 0
        if not bool(kept.any()):
            return None
        return _plain(measure(plain[kept][:, columns], position[truth[kept]], self.task.metric))

    def _warn_of_known(self, split: Split, what: str) -> None:
        """Notes images that the probe, or the student, has seen."""
        own = {*self.data.train.ids, *self.data.val.ids}
        known = len(own & set(split.ids))
        if known:
            self.notes.append(f"{known} of the {len(split)} {what} are also training or val images of this task")
        if self.subject.task is None:
            return
        try:
            trained = load_task(self.subject.task, self.reader.store)
        except (UserError, WorkError):
            self.notes.append("whether the student was trained on them could not be checked: its data is not here")
            return
        seen = len({*trained.train.ids, *trained.val.ids} & set(split.ids))
        if seen:
            self.notes.append(f"{seen} of the {len(split)} {what} are among those that the student was trained on")


def _retrieval(reader: Reader, spec: SuiteTask) -> dict[str, Any]:
    known = Captioned()
    assert reader.subject.texts is not None

    def parts() -> Iterator[Tensor]:
        preprocessing = reader.subject.preprocessing
        for batch in read_captioned(caption_files(spec.data), known):
            yield reader.pixels(torch.stack([square(pixels, name, preprocessing) for name, pixels in batch]))

    embedded = list(parts())
    if not embedded:
        reasons = listed(f"{n} {why}" for why, n in sorted(known.skipped.items()))
        raise UserError(f"The task {spec.title!r}: none of its images has a caption and can be read ({reasons}).")
    images = torch.cat(embedded)
    texts = reader.subject.embed(known.captions, reader.device)
    pairs = torch.tensor(known.pairs, dtype=torch.int64)
    result: dict[str, Any] = {
        "name": spec.title,
        "images": len(images),
        "captions": len(texts),
        "notes": [f"{n} rows left out: {reason}" for reason, n in sorted(known.skipped.items())],
    }
    for name, found in (
        ("image_to_text", recalls(images, texts, pairs)),
        ("text_to_image", recalls(texts, images, pairs.flip(1))),
    ):
        result[name] = {str(k): _plain(found[k]) for k in KS}
    return result


def _plain(score: Score) -> dict[str, Any]:
    return {"value": score.value, "error": score.error, "images": score.images}


def _means(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each column over the tasks that have it, with how many these are."""
    columns: dict[str, list[dict[str, Any] | None]] = {
        name: [r[name] for r in results] for name in ("zero_shot", "head", "probe")
    }
    for shots in dict.fromkeys(k for r in results for k in r["shots"]):
        columns[f"shots_{shots}"] = [r["shots"].get(shots) for r in results]
    for name in ("mean_shift", "mean_synthetic"):
        columns[name] = [(r["robustness"] or {}).get(name) for r in results]
    return {name: mean for name, cells in columns.items() if (mean := _mean(cells)) is not None}


def _mean(cells: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    scores = [Score(c["value"], c["error"], c["images"]) for c in cells if c is not None]
    return _plain(mean_score(scores)) | {"tasks": len(scores)} if scores else None
