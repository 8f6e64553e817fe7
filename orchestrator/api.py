"""The same as the command line, for notebooks and programs. Importing this imports nothing slow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.spec import SweepSpec


class Sweep:
    """A sweep in its folder. `docs/api.md` shows it from the file to the exported student.

    Args:
        folder: `<storage>/<name>` of a sweep that was begun.

    Raises:
        UserError: if the folder holds no sweep.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from orchestrator.sweep.ledger import open_sweep

        self._folder = Path(folder)
        self._spec = open_sweep(self._folder)

    @classmethod
    def create(cls, spec: str | os.PathLike[str] | Mapping[str, Any], **changes: Any) -> Sweep:
        """A new sweep: checked, and its folder made. Nothing runs yet.

        Args:
            spec: a sweep file, or its content as a mapping.
            changes: keys of the file to replace, dots written as two underscores: `search__trials=5`.

        Raises:
            UserError: the first thing that is wrong with it; or if there is a sweep of that name.
        """
        from orchestrator.spec import parse_spec, read_mapping
        from orchestrator.sweep.folder import check_places, create, resolved
        from orchestrator.sweep.run import prepare

        raw = dict(spec) if isinstance(spec, Mapping) else read_mapping(Path(spec), "sweep file")
        for key, value in changes.items():
            raw = _replaced(raw, key.split("__"), value)
        where = "the mapping" if isinstance(spec, Mapping) else str(spec)
        parsed = resolved(parse_spec(raw, where))
        check_places(parsed)
        prepare(parsed)
        return cls(create(parsed))

    @property
    def folder(self) -> Path:
        """Where everything of it lies."""
        return self._folder

    @property
    def spec(self) -> SweepSpec:
        """Its sweep file, with every default."""
        return self._spec

    def __repr__(self) -> str:
        return f"Sweep({str(self._folder)!r})"

    def run(self, tell: Callable[[str], None] | None = print) -> Sweep:
        """Runs it to its end, or continues it: nothing that is finished is repeated.

        On this machine, or on the cluster that RAY_ADDRESS names. Ray stays up afterwards, for the next sweep.

        Args:
            tell: hears a line for each trial that ends; None for silence.

        Returns:
            The sweep itself.

        Raises:
            UserError: if it cannot run here, or another process runs it.
            WorkError: if the work fails as a whole, or Ctrl-C broke trials off; a failed trial is a row of the
                leaderboard.
        """
        from orchestrator.select.results import check_ended
        from orchestrator.sweep.event_files import write_event_files
        from orchestrator.sweep.live import TrialLines
        from orchestrator.sweep.run import prepare, run

        prepared = prepare(self._spec, self._folder)
        whole = run(prepared, self._folder, TrialLines(self._folder, self._spec, tell, prepared.trials))
        write_event_files(self._folder)
        check_ended(self._folder, self.trials(), whole)
        return self

    resume = run

    def trials(self) -> pd.DataFrame:
        """All rows recorded so far, in the order they were proposed."""
        from orchestrator.select.results import read_trials

        return read_trials(self._folder)

    def leaderboard(self) -> pd.DataFrame:
        """All rows, best first, with `rank` and `pareto`; rows that are not complete follow."""
        from orchestrator.select.results import leaderboard

        return leaderboard(self.trials(), self._spec.objectives)

    def best(self, metric: str | None = None, limits: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The recommended student: `trial_id`, its values, `runner_up` with the interval of the lead, and `sentences`.

        Its score on the test images is read once, and remembered.

        Args:
            metric: what to choose by; None: the sweep's first objective.
            limits: by metric, in place of the sweep's own: at most (val_metric: at least) that.

        Raises:
            UserError: if no trial fits, with what comes nearest.
        """
        from orchestrator.sweep.choice import recommend

        return recommend(self._folder, metric, limits)

    def promote(
        self, count: int = 3, seeds: int = 3, tell: Callable[[str], None] | None = print, **choice: Any
    ) -> Sweep:
        """Runs the best trials once more in a sweep `<name>-promoted`, without early stopping and with new seeds and
        draws of the labelled images; continues it where it was begun.

        Args:
            count: how many trials.
            seeds: runs of each.
            tell: as in `run`.
            choice: `metric` and `limits`, as in `best`.

        Returns:
            That sweep. `ranks` tells what changed.

        Raises:
            UserError: if no trial can be chosen, or others were promoted before.
            WorkError: as `run`.
        """
        from orchestrator.sweep.begun import keep_those_of
        from orchestrator.sweep.folder import create
        from orchestrator.sweep.promote import check_promoted, promoted_spec

        spec = promoted_spec(self._folder, count, seeds, **choice)
        folder = Path(spec.storage) / spec.name
        if not check_promoted(spec, folder):
            keep_those_of(self._folder, create(spec))
        return Sweep(folder).run(tell)

    def ranks(self, promoted: Sweep) -> list[dict[str, Any]]:
        """How the places of this sweep's best trials changed in the promoted one, by their new place.

        What a trial that did not complete again does not have is None.
        """
        from orchestrator.sweep.promote import ranks

        return ranks(self._folder, promoted.folder)

    def export(
        self,
        out_dir: str | os.PathLike[str],
        trial: str | None = None,
        format: str = "safetensors",
        *,
        with_preprocessing: bool = False,
        int8: bool = False,
        max_loss: float | None = None,
        licence: str | None = None,
        data_licence: str | None = None,
    ) -> dict[str, Any]:
        """Writes a student so that it loads without this package, with a model card.

        Args:
            out_dir: a folder that does not exist yet.
            trial: which one; None: the best.
            format: `safetensors` (plain timm or open_clip), `onnx`, or `pt2` (a program that torch alone runs).
            with_preprocessing: onnx: whole images go in, uint8 [B, H, W, 3].
            int8: onnx: 8-bit integers, if val loses no more than noise by it.
            max_loss: with int8: the loss of the val metric that is accepted.
            licence, data_licence: for the card; None: what is known.

        Returns:
            `files`, and how they were checked: `max_abs_difference`, `int8`, `preprocessing`, `sentences`.

        Raises:
            UserError: if there is no such trial, or an option does not fit the format.
            WorkError: if what was written does not do what the student does, or int8 loses more than is accepted.
        """
        from orchestrator.sweep.export import export_trial

        options: dict[str, Any] = {"with_preprocessing": with_preprocessing, "int8": int8, "max_loss": max_loss}
        options |= {"licence": licence, "data_licence": data_licence}
        return export_trial(self._folder, Path(out_dir), trial, format, **options)

    def predict(
        self, images: Sequence[str | os.PathLike[str]], trial: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Asks a student about images: classes with probabilities, or masks.

        Args:
            images: files, and folders of images.
            trial: which one; None: the best.
            options: of `select.predict.ask`: `top`, `masks`, `onnx`, `classes`, `prompts`, `texts`.

        Returns:
            `images`, each with its `classes`; `skipped`, those that cannot be used, with the reason.
        """
        from orchestrator.select.predict import ask

        return ask(str(self._folder), [Path(image) for image in images], trial, **options)

    def report(self, out: str | os.PathLike[str] | None = None, images: bool = True) -> dict[str, Any]:
        """Writes the sweep's report from what is recorded, at any time; returns where, and its sentences.

        Args:
            out: the file (.html, .md, .csv, .parquet); None: `report.html` in the sweep's folder.
            images: whether pictures of the data stand beside the worst errors.
        """
        from orchestrator.sweep.report import write_report

        return write_report(self._folder, Path(out) if out is not None else None, None, images)


def compare(
    sweeps: Sequence[Sweep | str | os.PathLike[str]], limits: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """Sweeps side by side, from what is recorded, as `orchestrator compare` has them.

    Args:
        sweeps: two or more, or their folders.
        limits: only trials that keep them are looked at, as in `{"latency_ms": 5.0}`: the most of each metric, or of
            one that is better when larger the least; in place of the sweeps' own.

    Returns:
        A row for each method (and `all methods`, see `among`) in each sweep: its best trial by the val metric, trials,
        device-seconds; and of its `group`, the sweeps that differ only in their seeds: `mean` and `sd` of their bests,
        with the `difference` from the first group, its 95 % interval (`low`, `high`) and whether it is more than noise
        (`certain`). `attrs` has `keys` (what differs in the files), `groups` and `sentences`.

    Raises:
        UserError: if they do not compare, naming the key that differs, or no trial keeps the limits.
    """
    from orchestrator.sweep.compare import compare_sweeps

    found = compare_sweeps([s.folder if isinstance(s, Sweep) else Path(s) for s in sweeps], limits)
    of_groups = ["mean", "sd", "difference", "low", "high", "certain"]
    joined = found.sweeps.merge(found.table[["among", "group", *of_groups]], on=["among", "group"], how="left")
    joined.attrs = {"keys": found.keys, "groups": found.groups, "sentences": found.sentences}
    return joined


def _replaced(raw: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**raw, head: value}
    inner = raw.get(head) or {}
    if not isinstance(inner, Mapping):
        raise UserError(f"{'__'.join(path)}: {head} is {inner!r}, which has no keys below it.")
    return {**raw, head: _replaced(dict(inner), rest, value)}
