"""What a person sees of a sweep while it runs: one screen in a terminal, and lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from ray.tune import Callback
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.select.leaderboard import count, real, significant
from orchestrator.select.results import leaderboard, pareto, short_name, tally
from orchestrator.spec import Objective, SweepSpec
from orchestrator.sweep.ledger import FINAL, Clock, Ledger

BEST, ENDED, RUNNING = 6, 4, 8  # lines of each part of the screen
EVERY_S = 0.5
COLOURS = {"failed": "red", "pruned": "yellow", "infeasible": "yellow"}


class Estimate:
    """When a sweep will end, from the pace of this life of its driver.

    Args:
        folder: the sweep's.
        spec: the sweep file.
        before: trials that had ended earlier.
        total: trials in all; None: as the sweep file says, which a grid may not have.
    """

    def __init__(self, folder: Path, spec: SweepSpec, before: int, total: int | None = None) -> None:
        self.spec, self.before, self.total = spec, before, spec.search.trials if total is None else total
        self.started, self.spent = time.time(), Clock(folder).before

    @property
    def seconds(self) -> float:
        """That the sweep has run, in all its lives."""
        return self.spent + time.time() - self.started

    def left(self, done: int) -> float | None:
        """Seconds to the end if the next trials are like those of this life; None before one of it has ended."""
        if done <= self.before:
            return None
        left = (time.time() - self.started) / (done - self.before) * max(0, self.total - done)
        budget = self.spec.search.time_budget_s
        return left if budget is None else max(0.0, min(left, budget - self.seconds))


class TrialLines(Callback):
    """Prints each final row once, with the number done and an estimate of the time to the end.

    Args:
        folder: the sweep's.
        spec: the sweep file.
        write: prints a line; None prints nothing.
        total: as in `Estimate`.
    """

    def __init__(
        self, folder: Path, spec: SweepSpec, write: Callable[[str], None] | None, total: int | None = None
    ) -> None:
        self.ledger, self.spec, self.write = Ledger(folder), spec, write
        self.seen = {row["trial_id"] for row in self.ledger.rows() if row["status"] in FINAL}
        self.estimate = Estimate(folder, spec, len(self.seen), total)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore that we never do, and a console cannot be pickled.
        return self.__dict__ | {"write": None}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.write is None:
            return
        for row in self.ledger.rows():
            if row["status"] not in FINAL or row["trial_id"] in self.seen:
                continue
            self.seen.add(row["trial_id"])
            done, total = len(self.seen), self.estimate.total
            networks = " -> ".join(name for name in (row["teacher"], row["student"]) if name)
            end = f"val {row['val_metric']:.3f}" if row["status"] == "complete" else f"{row['status']}: {row['reason']}"
            self.write(
                f"{done:>3}/{total} {row['trial_id']} {row['method']:<13} {networks}: {end}, "
                f"{row['device_seconds']:.0f} device-s, about {(self.estimate.left(done) or 0) / 60:.0f} min left"
            )


class LiveScreen(Callback):
    """Keeps one screen of a terminal up to date; `close` takes it away.

    Args:
        folder: the sweep's.
        spec: the sweep file.
        console: a terminal.
        total: as in `Estimate`.
    """

    def __init__(self, folder: Path, spec: SweepSpec, console: Console, total: int | None = None) -> None:
        self.ledger, self.spec = Ledger(folder), spec
        self.estimate = Estimate(folder, spec, sum(row["status"] in FINAL for row in self.ledger.rows()), total)
        self.drawn = 0.0
        first = Text("The cluster starts ...")
        self.live: Live | None = Live(
            first, console=console, transient=True, auto_refresh=False, vertical_overflow="crop"
        )
        self.live.start(refresh=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"live": None}  # see `TrialLines`

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.live is None or time.monotonic() - self.drawn < EVERY_S:
            return
        progress = {}
        for trial in trials:
            result = trial.last_result or {}
            if "progress" in result and isinstance(trial.config, dict) and "trial" in trial.config:
                progress[trial.config["trial"]] = float(result["progress"]) / 100
        rows = self.ledger.rows()
        done = sum(row["status"] in FINAL for row in rows)
        shown = screen(self.spec, rows, progress, self.estimate.seconds, self.estimate.left(done), self.estimate.total)
        self.live.update(shown, refresh=True)
        self.drawn = time.monotonic()

    def close(self) -> None:
        """Takes the screen away."""
        if self.live is not None:
            self.live.stop()


def screen(
    spec: SweepSpec,
    rows: Sequence[Mapping[str, Any]],
    progress: Mapping[str, float],
    seconds: float,
    left: float | None,
    total: int | None = None,
) -> RenderableType:
    """Everything about a running sweep on one screen.

    Args:
        spec: the sweep file.
        rows: of its ledger.
        progress: by configuration (as JSON), the share of a running trial's budget that is done, where it is known.
        seconds: that the sweep has run.
        left: to its end; None: not known yet.
        total: as in `Estimate`.
    """
    done, total = sum(row["status"] in FINAL for row in rows), spec.search.trials if total is None else total
    end = "the end is not known yet" if left is None else f"about {_time(left)} left"
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=max(total, 1), completed=done, width=40), f"{done}/{total} trials")
    parts: list[RenderableType] = [Text.assemble((spec.name, "bold"), f"  {_time(seconds)}, {end}"), bar]
    if not rows:
        return Group(*parts, Text("No trial yet."))
    frame = pd.DataFrame(list(rows))
    sums = frame[["store_hits", "store_misses", "store_seconds_saved", "device_seconds"]].sum()
    asked = sums["store_hits"] + sums["store_misses"]
    share = f" ({sums['store_hits'] / asked:.0%})" if asked else ""
    store = f"store: {sums['store_hits']:.0f} hits{share}, {real(sums['store_seconds_saved'], 0)} s saved"
    parts.append(Text(f"{tally(frame)}. {real(sums['device_seconds'], 0)} device-seconds; {store}."))
    return Group(*parts, _best(frame, spec), _running(frame, progress), _ended(frame))


def _best(frame: pd.DataFrame, spec: SweepSpec) -> RenderableType:
    first = spec.objectives[0]
    board = leaderboard(frame, spec.objectives)
    board = board[board["status"] == "complete"].head(BEST)
    if board.empty:
        return Text("No trial is complete yet.", style="dim")
    plane = spec.objectives if len(spec.objectives) > 1 else [first, Objective(metric="params_total")]
    front = set(pareto(frame, plane))
    names = " and ".join(dict.fromkeys(o.metric for o in plane))
    table = _table(
        f"Best so far by {first.metric}; * on the front of {names} ({len(front)} trial{'' if len(front) == 1 else 's'})"
    )
    for name in ("", "trial", "method", "networks"):
        table.add_column(name, no_wrap=True)
    for name in ("val", "params", "MFLOPs", "latency ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in board.to_dict("records"):
        cells = ["*" if row["trial_id"] in front else "", row["trial_id"], row["method"], _networks(row)]
        cells += [real(row["val_metric"], 4), count(row["params_total"])]
        cells += [significant(row["flops"] / 1e6), significant(row["latency_ms"])]
        table.add_row(*map(Text, cells))
    return table


def _running(frame: pd.DataFrame, progress: Mapping[str, float]) -> RenderableType:
    rows = frame[frame["status"] == "running"].head(RUNNING).to_dict("records")
    table = _table("Running")
    table.show_header = False
    for _ in range(4):
        table.add_column(no_wrap=True)
    for row in rows:
        share = progress.get(row["config"])
        done = "" if share is None else f"{share:.0%}"
        table.add_row(*map(Text, (row["trial_id"], row["method"], _networks(row), done)))
    return table if rows else Text("")


def _ended(frame: pd.DataFrame) -> RenderableType:
    rows = frame[frame["status"].isin(FINAL)].sort_values("ended", kind="stable").tail(ENDED).to_dict("records")
    table = _table("Ended last")
    table.show_header = False
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True)
    for row in reversed(rows):
        end = f"val {row['val_metric']:.4f}" if row["status"] == "complete" else str(row["reason"])
        status = Text(row["status"], style=COLOURS.get(row["status"], ""))
        table.add_row(Text(row["trial_id"]), Text(row["method"]), status, Text(" ".join(end.split())))
    return table if rows else Text("")


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )


def _networks(row: Mapping[Any, Any]) -> str:
    return " → ".join(name for name in (short_name(row["teacher"]), short_name(row["student"])) if name)


def _time(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
