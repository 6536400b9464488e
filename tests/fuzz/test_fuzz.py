"""The fuzz targets hold on their corpora and on mutations of them; `make fuzz` looks further, guided by coverage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fuzz_targets import TARGETS
from shard_mutations import MUTATIONS, mutate

CORPUS = Path(__file__).resolve().parent / "corpus"
MUTATIONS_EACH = 20


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_holds_on_its_corpus_and_near_it(target: str) -> None:
    files = sorted((CORPUS / target).iterdir())
    assert files, "a target without a corpus starts from nothing"
    generator = np.random.default_rng(0)
    for path in files:
        content = path.read_bytes()
        TARGETS[target](content)
        for number in range(MUTATIONS_EACH):
            TARGETS[target](mutate(content, MUTATIONS[number % len(MUTATIONS)], generator))


def test_corpora_are_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 2**20
