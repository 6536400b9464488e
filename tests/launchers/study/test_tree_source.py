"""launchers/study/tree_source.py: the entropy it states is that of what it draws."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from launchers.study.tree_source import TreeSource, TreeSourceConfig

SMALL = TreeSourceConfig(vocab_size=8, num_classes=4)


def probabilities(source: TreeSource, label: int, codes: np.ndarray, num_scales: int) -> np.ndarray:
    """P(codes | class) of codes (B, L) up to a scale, cell by cell from the definition: (B,)."""
    sides = source.config.patch_nums[:num_scales]
    ends = np.cumsum([side * side for side in sides])[:-1]
    maps = [part.reshape(len(codes), side, side) for part, side in zip(np.split(codes, ends, axis=1), sides)]
    result = np.ones(len(codes))
    for k, side in enumerate(sides):
        for y, x in product(range(side), repeat=2):
            parent, grandparent, cell = 0, 0, (y, x)  # of the first scale, which has neither
            if k >= 1:
                cell = tuple(i * sides[k - 1] // side for i in cell)
                parent = maps[k - 1][:, *cell]
            if k >= 2:
                cell = tuple(i * sides[k - 2] // sides[k - 1] for i in cell)
                grandparent = maps[k - 2][:, *cell]
            result *= source.tables[k][label, grandparent, parent, maps[k][:, y, x]]
    return result


def test_the_entropy_of_every_scale_is_that_of_all_codes_enumerated() -> None:
    """By definition: what a scale adds to the entropy of all codes so far, given the class, over its tokens."""
    sides = (1, 2, 3)  # three generations, and cells of a map that lie across those of the coarser one
    source = TreeSource(TreeSourceConfig(patch_nums=sides, vocab_size=2, num_classes=2, zipf=1.3))
    before, added = 0.0, []
    for num_scales, side in enumerate(sides, start=1):
        num_tokens = sum(side * side for side in sides[:num_scales])
        all_codes = np.arange(2**num_tokens)[:, None] >> np.arange(num_tokens) & 1  # (2^L, L)
        chances = [probabilities(source, label, all_codes, num_scales) for label in range(2)]
        assert np.sum(chances, axis=1) == pytest.approx(1, rel=1e-12)
        total = -np.sum(chances * np.log(chances)) / 2
        added.append((total - before) / side**2)
        before = total
    np.testing.assert_allclose(source.entropy(), added, rtol=1e-12)


def test_the_loss_of_the_source_on_what_it_draws_comes_to_its_entropy() -> None:
    source = TreeSource(SMALL)
    sets = np.array([source.loss(*source.draw(500, seed=seed)) for seed in range(40)])  # (40, K)
    deviation = sets.std(axis=0, ddof=1) / np.sqrt(len(sets))
    assert (deviation < 0.005).all()  # else the next line says little
    assert (abs(sets.mean(axis=0) - source.entropy()) < 4.5 * deviation).all()  # by chance once in 10,000 sources


def test_every_token_is_drawn_as_often_as_its_table_says() -> None:
    """Counts of the second scale given class and parent, against a normal approximation of the binomial law."""
    source = TreeSource(TreeSourceConfig(vocab_size=4, num_classes=2))
    codes, labels = source.draw(20_000, seed=3)
    for label, parent in product(range(2), range(4)):
        cells = codes[(labels == label) & (codes[:, 0] == parent), 1:5]
        shares = np.bincount(cells.ravel(), minlength=4) / cells.size
        expected = source.tables[1][label, 0, parent]
        assert (abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / cells.size)).all()
    assert labels.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("zipf", [0.0, 2.0])
def test_with_one_law_alone_every_scale_has_the_entropy_of_that_law(zipf: float) -> None:
    weights = np.arange(1, 9) ** -zipf
    law = weights / weights.sum()
    for mixture in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)):
        source = TreeSource(TreeSourceConfig(vocab_size=8, num_classes=4, zipf=zipf, mixture=mixture))
        np.testing.assert_allclose(source.entropy(), -(law * np.log(law)).sum(), rtol=1e-12)


def test_equal_configs_and_seeds_draw_equal_images_and_other_streams_draw_others() -> None:
    first, again = TreeSource(SMALL).draw(50, seed=1), TreeSource(SMALL).draw(50, seed=1)
    assert all((a == b).all() for a, b in zip(first, again))
    for other in ({"seed": 2}, {"seed": 1, "stream": 1}):
        assert (TreeSource(SMALL).draw(50, **other)[0] != first[0]).any(axis=1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_nums": (2, 1)}, "patch_nums is"),
        ({"patch_nums": ()}, "patch_nums is"),
        ({"vocab_size": 1}, "vocab_size is 1; it must be 2 or more"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"vocab_size": 4096}, "at most 16777216 are accepted; take fewer"),
        ({"zipf": -1.0}, "zipf is -1.0"),
        ({"zipf": 400.0}, "zipf is 400.0; accepted: 0"),
        ({"mixture": (0.5, 0.5)}, "mixture is"),
        ({"mixture": (0.5, 0.5, 0.5)}, "that add up to 1"),
    ],
)
def test_a_source_that_cannot_be_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeSourceConfig(**settings)
