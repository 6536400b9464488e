"""Settings of a benchmark that mean nothing are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from launchers.benchmark_config import BenchmarkConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"what": "everything"}, "accepted: train"),
        ({"what": "train", "precision": "int8"}, "accepted: fp32"),
        ({"what": "train", "attention": "sparse"}, "accepted: per_scale"),
        ({"what": "train", "batch": 0}, "batch is 0"),
        ({"what": "data", "repeats": 0}, "repeats is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BenchmarkConfig(**settings)
