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
    sweep, colon, trial = address.rpartition(":")
    folder = path if (path / "sweep.yaml").is_file() or not colon else Path(sweep).expanduser()
    if not (folder / "sweep.yaml").is_file():
        raise UserError(
            f"MODEL: {address!r} is neither a student's folder (with a student.json), nor a sweep's (with a "
            f"sweep.yaml), nor a model; models begin with timm/, open_clip/, local: or packaged/."
            f"{nearest(address, _known(folder))}"
        )
    student = _student(folder, trial if folder != path else None)
    remote = read_spec(folder / "sweep.yaml").store.remote
    return stored_subject(student), store or remote or folder.absolute().parent / "store"


def _known(folder: Path) -> list[str]:
    around = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    return [*around, "packaged/clip_icons"]


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
