"""What `submit` sends to the cluster: a folder, as Ray would pack it, and how much that is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from orchestrator.errors import UserError, listed

MOST_FILES = 100_000  # a folder of more is no code


@dataclass
class Upload:
    """A folder's share that Ray would send.

    Attributes:
        folder: that is sent.
        size: bytes, before they are compressed.
        files: how many.
        biggest: the folders (or files) directly below with the most bytes, most first.
    """

    folder: Path
    size: int = 0
    files: int = 0
    biggest: list[tuple[str, int]] = field(default_factory=list)


def measure(folder: Path) -> Upload:
    """Counts what `.rayignore` and `.gitignore` files leave, by Ray's own reading of them.

    Raises:
        UserError: if the folder is none, or holds more files than code has.
    """
    if not folder.is_dir():
        raise UserError(f"--working-dir: {str(folder)!r} is not a folder.")
    below: Counter[str] = Counter()
    upload = Upload(folder)

    def count(path: Path) -> None:
        if path.is_symlink() or not path.is_file():
            return
        size = path.stat().st_size
        upload.size += size
        upload.files += 1
        below[path.relative_to(folder).parts[0]] += size
        if upload.files > MOST_FILES:
            raise UserError(
                f"{str(folder)!r} has more than {MOST_FILES:,} files to upload, most in {listed(_shown(below))}: "
                "submit from the folder of your code, or list in .rayignore what the cluster does not need."
            )

    _walk(folder, [], count)
    upload.biggest = below.most_common(3)
    return upload


def _walk(folder: Path, above: list[Callable[[Path], bool]], count: Callable[[Path], None]) -> None:
    # An ignore file holds for its folder and what is below, as in Ray's packing.
    excludes = [*above, *get_excludes_from_ignore_files(folder, _with_gitignore(), logger=_Silent())]  # type: ignore[arg-type]
    for path in sorted(folder.iterdir()):
        if any(exclude(path) for exclude in excludes):
            continue
        if path.is_dir() and not path.is_symlink():
            _walk(path, excludes, count)
        else:
            count(path)


def _with_gitignore() -> bool:
    return os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"


class _Silent:
    def info(self, *words: object) -> None:
        """Ray tells of each ignore file that it finds."""


def _shown(below: Counter[str]) -> list[str]:
    return [f"{name} ({size / 1e6:,.1f} MB)" for name, size in below.most_common(3)]


def check_size(upload: Upload, limit_mb: float) -> None:
    """Refuses an upload that is no code.

    Raises:
        UserError: naming the biggest folders.
    """
    if upload.size > limit_mb * 1e6:
        found = listed(_shown(Counter(dict(upload.biggest))))
        raise UserError(
            f"The upload of {str(upload.folder)!r} would be {upload.size / 1e6:,.1f} MB in {upload.files:,} files, and "
            f"--max-upload-mb is {limit_mb:g}; the biggest below it are {found}. List in .rayignore what the cluster "
            "does not need; data belongs into the storage that all nodes share."
        )
