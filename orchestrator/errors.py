"""Errors that a person reads. `UserError` is the user's input being wrong (exit code 2)."""

from __future__ import annotations

import difflib
import errno
import itertools
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

MOST_WORDS = 10_000  # that are compared with one: a second's work


class UserError(Exception):
    """The user's input is wrong: one sentence that names the key or file, what was found, and what is allowed."""


class WorkError(Exception):
    """The input was right and the work failed (exit code 1): one sentence."""


class FullDiskError(WorkError):
    """The disk is full: no fault of the trial that met it, which is run again once there is room."""


class StudyLostError(WorkError):
    """The study's database cannot be reached any more."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known word, or an empty string; nor is there one among very many words."""
    words = [str(k) for k in itertools.islice(known, MOST_WORDS + 1)]
    if len(words) > MOST_WORDS:
        return ""
    matches = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def listed(words: Iterable[str]) -> str:
    """`a, b and c`, in the given order."""
    words = [str(w) for w in words]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def first_lines(error: BaseException, count: int = 1) -> str:
    """What an error of a library says, short enough for the end of a sentence: its first `count` lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:count])[:240] or type(error).__name__
    return text if text.endswith(".") else text + "."


def behind(error: BaseException | None, *, contexts: bool = True) -> Iterator[BaseException]:
    """An error and what it was raised from (or while, with `contexts`), each once: a chain can lead into itself."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if contexts else None)


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk (or a used-up quota) is behind an error; safetensors and torch tell it by text only."""
    return any(
        (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(one) for words in ("No space left on device", "os error 28", "file write failed"))
        for one in behind(error)
    )


def told_at(error: BaseException) -> str:
    """`FILE:LINE` where an error was raised first; kept with it when it goes to another process."""
    if not hasattr(error, "told_at"):
        last = traceback.extract_tb(error.__traceback__)[-1]
        error.told_at = f"{Path(last.filename).name}:{last.lineno}"  # type: ignore[attr-defined]
    return str(error.told_at)  # type: ignore[attr-defined]
