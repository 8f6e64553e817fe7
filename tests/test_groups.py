"""Elastic workers: where their number would change the result they are refused, elsewhere they are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import small_spec

from orchestrator.errors import UserError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"workers": 2, "min_workers": 3}}, "min_workers: 3 is more than workers: 2"),
        ({"train": {"workers": 2, "min_workers": 1, "sync_batchnorm": False}}, "sync_batchnorm: false"),
        (
            {"train": {"workers": 2, "min_workers": 1}, "corpus": {"images": "packaged/icons/images"}},
            "corpus.images are both given",
        ),
    ],
)
def test_elastic_workers_are_refused_where_their_number_changes_the_result(
    colours: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        small_spec(colours, tmp_path, **changes)
