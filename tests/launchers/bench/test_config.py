"""Settings of a benchmark that mean nothing are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from launchers.bench.config import BenchmarkConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"what": "everything"}, "accepted: train"),
        ({"what": "train", "precision": "int8"}, "accepted: fp32"),
        ({"what": "train", "attention": "sparse"}, "accepted: per_scale"),
        ({"what": "train", "batch": 0}, "batch is 0"),
        ({"what": "data", "repeats": 0}, "repeats is 0"),
        ({"what": "sample", "batches": (4, 0)}, r"batches is \[4, 0\]; each must be 1 or more"),
        ({"what": "train", "batches": (4,)}, "only sample takes"),
        ({"what": "train", "tokenizer_width": 33}, "tokenizer_width is 33; it must be a multiple of 32"),
        ({"what": "train", "tokenizer_width": 0}, "tokenizer_width is 0"),
        ({"what": "train", "patch_nums": ()}, "patch_nums is empty"),
        ({"what": "train", "patch_nums": (2, 1)}, "strictly increasing"),
        ({"what": "train", "contestants": "theirs"}, "accepted: all, ours"),
        ({"what": "train", "contestants": "ours", "against": "VAR"}, "without against"),
        ({"what": "sample", "contestants": "ours"}, "for train"),
        ({"what": "suite", "batch": 8}, "batch is 8, but suite chooses it"),
        ({"what": "suite", "depth": 16}, "it takes against, repeats, out"),
        ({"what": "suite", "precision": "bf16"}, "precision is bf16"),
        ({"what": "suite", "folder": "packed"}, "folder is packed"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BenchmarkConfig(**settings)


def test_the_suite_takes_what_all_its_benchmarks_share() -> None:
    config = BenchmarkConfig(what="suite", against="VAR", repeats=3, out="b.json")
    assert (config.against, config.repeats, config.out) == ("VAR", 3, "b.json")
