"""The report as a table: the leaderboard with every column, and a column for each knob."""

from __future__ import annotations

import json

import pandas as pd

from orchestrator.select.report.gather import Gathered, knobs_of


def table(found: Gathered) -> pd.DataFrame:
    """One row a trial in the leaderboard's order: `rank`, `pareto`, all columns, and `METHOD.KNOB` for each knob.

    A knob whose values are not all numbers, or not all of another plain kind, is text.
    """
    board = found.board
    first = ["rank", "pareto"]
    knobs = [{f"{row['method']}.{k}": v for k, v in knobs_of(row).items()} for row in board.to_dict("records")]
    names = sorted({name for row in knobs for name in row})
    columns = {}
    for name in names:
        values = [row.get(name) for row in knobs]
        plain = [v for v in values if v is not None]
        kinds = {bool} if all(isinstance(v, bool) for v in plain) else {int, float, str}
        same = all(isinstance(v, int | float) and not isinstance(v, bool) for v in plain) or kinds == {bool}
        texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        columns[name] = pd.Series(values if same else texts, index=board.index)
    return pd.concat([board[first], board.drop(columns=first), pd.DataFrame(columns, index=board.index)], axis=1)
