"""Which network an address names: a student's folder, a sweep with or without a trial, or a model."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import UserError, nearest
from orchestrator.evaluate.suite import Subject, named_subject, stored_subject
from orchestrator.select.results import choose, read_trials
from orchestrator.spec import read_spec

PREFIXES = ("timm/", "open_clip/", "local:", "packaged/")


def find_subject(address: str, store: Path | None = None) -> tuple[Subject, str | Path]:
    """The network that `address` names, and the store to work with.

    Args:
        address: a student's folder, `SWEEP_DIR[:TRIAL]` (the best trial by the sweep's first objective), or a model
            as a sweep file names it.
        store: a store; None: the sweep's own, or `runs/store`.

    Raises:
        UserError: if there is none.
    """
    default = store or Path("runs/store")
    if address.startswith(PREFIXES):
        return named_subject(address), default
    path = Path(address).expanduser()
    if (path / "student.json").is_file():
        own = path.absolute().parents[2] / "store"  # <storage>/<sweep>/students/<trial>
        return stored_subject(path), store or (own if own.is_dir() else default)
    folder, trial = _sweep(address)
    if not (folder / "sweep.yaml").is_file():
        raise UserError(
            f"MODEL: {address!r} is neither a student's folder (with a student.json), nor a sweep's (with a "
            f"sweep.yaml), nor a model; models begin with timm/, open_clip/, local: or packaged/."
            f"{nearest(address, _known(folder))}"
        )
    student = _student(folder, trial)
    remote = read_spec(folder / "sweep.yaml").store.remote
    return stored_subject(student), store or remote or folder.absolute().parent / "store"


def find_student(address: str, trial: str | None = None) -> Path:
    """The folder of the student that `address` names: its own, or `SWEEP_DIR[:TRIAL]` (the best if none is named).

    Args:
        address: which.
        trial: in place of `:TRIAL`.

    Raises:
        UserError: if there is none.
    """
    path = Path(address).expanduser()
    if (path / "student.json").is_file():
        if trial is not None:
            raise UserError(f"--trial: {address!r} is a student's folder already; --trial is for a sweep's folder.")
        return path
    folder, named = _sweep(address)
    if not (folder / "sweep.yaml").is_file():
        named_model = " (a model by name has no classes of yours)" if address.startswith(PREFIXES) else ""
        raise UserError(
            f"MODEL: {address!r} is neither an export's folder (with a config.json), nor a student's (with a "
            f"student.json), nor a sweep's (with a sweep.yaml){named_model}.{nearest(address, _around(folder))}"
        )
    return _student(folder, trial or named)


def _sweep(address: str) -> tuple[Path, str | None]:
    """Folder and trial of `SWEEP_DIR[:TRIAL]`."""
    path = Path(address).expanduser()
    sweep, colon, trial = address.rpartition(":")
    if (path / "sweep.yaml").is_file() or not colon:
        return path, None
    return Path(sweep).expanduser(), trial


def _around(folder: Path) -> list[str]:
    return [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []


def _known(folder: Path) -> list[str]:
    return [*_around(folder), "packaged/clip_icons"]


def _student(folder: Path, trial: str | None) -> Path:
    frame = read_trials(folder)
    if trial is None:
        spec = read_spec(folder / "sweep.yaml")
        row = choose(frame, spec.objectives[0].metric, spec.objectives[0].direction, spec.limits.given)
    else:
        found = frame[frame["trial_id"] == trial]
        if found.empty:
            raise UserError(
                f"MODEL: there is no trial {trial!r} in {str(folder)!r}.{nearest(trial, list(frame['trial_id']))}"
            )
        row = found.iloc[0]
        if not row["student_path"]:
            raise UserError(f"MODEL: the trial {trial} is {row['status']} and has no student ({row['reason']}).")
    return folder / str(row["student_path"])
