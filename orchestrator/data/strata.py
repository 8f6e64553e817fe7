"""Drawing splits and labelled images so that every class gets its share, whatever an image's classes are.

An image with one class belongs to one stratum. Where images have several classes or none (multi-label, the classes in
a mask), classes are served from the rarest on (after Sechidis et al., On the Stratification of Multi-Label Data, 2011).
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import UserError
from orchestrator.spec import Task

Sets = Sequence[tuple[int, ...]]


def rank(*parts: Any) -> str:
    """A pseudo-random order that depends on nothing but its parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def assign(task: Task, rows: list[dict[str, Any]], sets: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Split of each image id. What the data leaves open is drawn for each class, whole groups at a time.

    Args:
        task: its shares and seed.
        rows: of the catalogue, each image once.
        sets: the classes of each image id.
    """
    ready = {row["split"] for row in rows} - {""}
    assigned = {row["id"]: row["split"] for row in rows if row["split"] in ("val", "test")}
    open_rows = [row for row in rows if row["id"] not in assigned]
    shares = {name: float(getattr(task.splits, name)) for name in ("test", "val") if name not in ready}
    if task.kind == "classification":
        return assigned | _by_class(task.seed, open_rows, sets, shares)
    groups: dict[str, list[str]] = {}
    for row in open_rows:
        groups.setdefault(row["group"] or row["id"], []).append(row["id"])
    return assigned | _by_sets(task.seed, groups, sets, shares)


def _by_class(
    seed: int, rows: list[dict[str, Any]], sets: Mapping[str, tuple[int, ...]], shares: Mapping[str, float]
) -> dict[str, str]:
    assigned: dict[str, str] = {}
    groups: dict[tuple[int, str], list[str]] = {}
    first_label: dict[str, int] = {}
    for row in rows:
        group = row["group"] or row["id"]
        label = first_label.setdefault(group, sets[row["id"]][0])
        groups.setdefault((label, group), []).append(row["id"])
    by_class: dict[int, list[tuple[str, list[str]]]] = {}
    for (label, group), ids in groups.items():
        by_class.setdefault(label, []).append((group, ids))
    for members in by_class.values():
        members.sort(key=lambda m: rank("split", seed, m[0]))
        total = sum(len(ids) for _, ids in members)
        queue = deque(members)
        for name, share in shares.items():
            wanted = round(total * share)
            taken = 0
            while queue and taken < wanted:
                _, ids = queue.popleft()
                taken += len(ids)
                assigned.update(dict.fromkeys(ids, name))
        for _, ids in queue:
            assigned.update(dict.fromkeys(ids, "train"))
    return assigned


def _by_sets(
    seed: int, groups: dict[str, list[str]], sets: Mapping[str, tuple[int, ...]], shares: Mapping[str, float]
) -> dict[str, str]:
    """Groups go, the rarest class first, to the split that still lacks the most images of that class."""
    order = sorted(groups, key=lambda g: rank("split", seed, g))
    # No class counts as one more class, so that images without any are shared out too.
    counts = {g: _tally([sets[i] or (-1,) for i in groups[g]]) for g in order}
    every = _tally([c for g in order for c in _repeated(counts[g])])
    names = [*shares, "train"]
    share = {**shares, "train": 1 - sum(shares.values())}
    lacking = {(name, c): share[name] * n for name in names for c, n in every.items()}
    room = {name: share[name] * sum(len(groups[g]) for g in order) for name in names}
    members: dict[int, list[str]] = {}
    for group in order:
        for c in counts[group]:
            members.setdefault(c, []).append(group)
    assigned: dict[str, str] = {}
    where: dict[str, str] = {}
    for c in sorted(every, key=lambda c: (every[c], c)):
        for group in members[c]:
            if group in where:
                continue
            name = max(names, key=lambda n: (lacking[n, c], room[n]))
            where[group] = name
            for other, n in counts[group].items():
                lacking[name, other] -= n
            room[name] -= len(groups[group])
            assigned.update(dict.fromkeys(groups[group], name))
    return assigned


def _tally(sets: Sequence[tuple[int, ...]]) -> dict[int, int]:
    result: dict[int, int] = {}
    for one in sets:
        for c in one:
            result[c] = result.get(c, 0) + 1
    return result


def _repeated(counts: Mapping[int, int]) -> list[tuple[int, ...]]:
    return [(c,) * n for c, n in counts.items()]


def draw_shots(task: Task, classes: tuple[str, ...], ids: Sequence[str], sets: Sets) -> list[int]:
    """Rows of train that are labelled; a smaller number of shots is a subset of a larger one.

    With one class an image, `task.shots` images of each. Else in rounds, the rarest class first: in round r a class
    that occurs in fewer than r of the images drawn so far gets one more image, while there are any; no class at all
    counts as one more class.

    Args:
        task: its shots and seed.
        classes: names.
        ids, sets: of each row of train, its content and its classes.

    Raises:
        UserError: if a class has fewer images than shots (with one class an image), or none where it must have some.
    """
    if task.shots is None:
        return list(range(len(ids)))
    members: dict[int, list[int]] = {c: [] for c in range(len(classes))} if task.kind == "classification" else {}
    for row, one in enumerate(sets):
        for c in one or (-1,):
            members.setdefault(c, []).append(row)
    for c, rows in members.items():
        draw = (task.draw,) if task.draw else ()
        rows.sort(key=lambda i: rank("shots", task.seed, *draw, ids[i]))
        if task.kind == "classification" and len(rows) < task.shots:
            raise UserError(
                f"task.shots: {task.shots} labelled images a class are asked for, and the class {classes[c]!r} has "
                f"only {len(rows)} in train; use at most {len(rows)}, or null for all."
            )
    if task.kind == "classification":
        return sorted(row for rows in members.values() for row in rows[: task.shots])
    order = sorted(members, key=lambda c: (len(members[c]), c))
    drawn: dict[int, int] = dict.fromkeys(order, 0)
    chosen: set[int] = set()
    for round_ in range(1, task.shots + 1):
        for c in order:
            if drawn[c] >= round_:
                continue
            new = next((row for row in members[c] if row not in chosen), None)
            if new is not None:
                chosen.add(new)
                for other in sets[new] or (-1,):
                    drawn[other] += 1
    return sorted(chosen)
