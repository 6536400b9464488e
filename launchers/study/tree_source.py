"""Synthetic codes whose entropy is known exactly: the yardstick of a scaling study that no real data gives.

An image has a class and a tree of tokens. The parent of a token is the token of the scale before in whose cell it lies.
A token of scale k is drawn from a fixed table, given the class, its parent and its grandparent. A row of a table mixes
three laws: one of the parent, one of parent and class, one of all three. Each is Zipf's law over the vocabulary in an
order of its own. So a few contexts are frequent and most are rare, and what is left to learn grows harder the more has
been learned.

Given the class and all earlier scales a token depends on its own ancestors alone. Its entropy is therefore the least
cross-entropy that a model of the next scale can reach. It follows from the marginals of (class, grandparent, parent),
which are propagated from scale to scale without sampling.

Legend: B images, L codes of one image, K scales, Y classes, V vocabulary, G and P the values of grandparent and parent
(V, or 1 if there is none).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NUM_LAWS = 3  # of the parent; of parent and class; of parent, class and grandparent
MAX_TABLE = 2**24  # numbers in one table: 128 MiB
MAX_ZIPF = 20  # no probability may round to 0


@dataclass(frozen=True)
class TreeSourceConfig:
    """The settings of a source; equal settings give equal sources."""

    patch_nums: tuple[int, ...] = (1, 2, 4)
    vocab_size: int = 32
    num_classes: int = 16
    zipf: float = 1.5  # the token of rank r has a weight of r ** -zipf
    mixture: tuple[float, ...] = (0.4, 0.3, 0.3)  # shares of the three laws
    seed: int = 0  # of the tables

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        object.__setattr__(self, "mixture", tuple(self.mixture))
        sides = self.patch_nums
        if not sides or sides[0] < 1 or any(b <= a for a, b in pairwise(sides)):
            raise ValueError(f"patch_nums is {sides}; it holds the sides of the token maps, growing, from 1 or more")
        for name, least in (("vocab_size", 2), ("num_classes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.num_classes * self.vocab_size**3 > MAX_TABLE:
            raise ValueError(
                f"num_classes {self.num_classes} and vocab_size {self.vocab_size} make tables of"
                f" {self.num_classes * self.vocab_size**3} numbers, at most {MAX_TABLE} are accepted; take fewer"
            )
        if not 0 <= self.zipf <= MAX_ZIPF:
            raise ValueError(f"zipf is {self.zipf}; accepted: 0 (all tokens alike) to {MAX_ZIPF}")
        if len(self.mixture) != NUM_LAWS or min(self.mixture) < 0 or not math.isclose(sum(self.mixture), 1):
            raise ValueError(f"mixture is {self.mixture}; it holds {NUM_LAWS} shares, 0 or more, that add up to 1")

    @property
    def num_tokens(self) -> int:
        """The number L of codes of one image."""
        return sum(side * side for side in self.patch_nums)


class TreeSource:
    """Draws codes, and knows the loss of a perfect model on them."""

    def __init__(self, config: TreeSourceConfig) -> None:
        self.config = config
        self.tables = tuple(_tables(config))  # of scale k: (Y, G, P, V) float64, rows that add up to 1
        self._limits = tuple(_limits(table) for table in self.tables)
        sizes = [side * side for side in config.patch_nums]
        self._token_shares = np.array(sizes) / config.num_tokens  # (K,)
        self._ends = np.cumsum(sizes)[:-1]

    def entropy(self) -> np.ndarray:
        """Return the exact entropy of a token of each scale, given the class and all earlier scales: (K,) nats."""
        config = self.config
        contexts = np.full((config.num_classes, 1, 1), 1 / config.num_classes)  # (Y, G, P)
        entropies = []
        for table in self.tables:
            joint = contexts[..., None] * table  # (Y, G, P, V)
            entropies.append(-np.sum(joint * np.log(table)))
            contexts = joint.sum(axis=1)  # today's parent is tomorrow's grandparent
        return np.array(entropies)

    def average(self, per_scale: np.ndarray) -> float:
        """Average means per scale (K,) over all tokens, as training averages losses."""
        return float(self._token_shares @ per_scale)

    def draw(self, num_images: int, *, seed: int, stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Draw codes (B, L) and labels (B,), int64. Equal arguments give equal images; another stream gives others."""
        random = np.random.Generator(np.random.Philox(key=[seed, stream]))
        labels = random.integers(self.config.num_classes, size=num_images)
        parts: list[np.ndarray] = []
        for k, table in enumerate(self.tables):
            rows = np.ravel_multi_index(self._rows(k, parts, labels), table.shape[:-1])  # (B, p_k^2)
            found = np.searchsorted(self._limits[k], rows + random.random(rows.shape), side="right")
            parts.append(np.minimum(found - rows * table.shape[-1], table.shape[-1] - 1))  # a row may end below 1
        return np.concatenate(parts, axis=1), labels

    def loss(self, codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the source's own cross-entropy on given images, the loss of a perfect model: (K,) nats.

        codes: (B, L), labels: (B,).
        """
        parts = np.split(codes, self._ends, axis=1)
        drawn = (table[(*self._rows(k, parts, labels), parts[k])] for k, table in enumerate(self.tables))
        return np.array([-np.log(probabilities).mean() for probabilities in drawn])

    def _rows(self, k: int, parts: list[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the indices of the cells in the table of scale k: class, grandparent, parent, (B, p_k^2) each."""
        sides = self.config.patch_nums
        cells = np.arange(sides[k] ** 2)
        ancestors = [np.zeros((len(labels), len(cells)), dtype=np.int64)] * 2
        for generation, level in enumerate(range(k - 1, max(-1, k - 3), -1)):
            cells = _cells_around(cells, sides[level + 1], sides[level])
            ancestors[generation] = parts[level][:, cells]
        parent, grandparent = ancestors
        return np.broadcast_to(labels[:, None], parent.shape), grandparent, parent


def _cells_around(cells: np.ndarray, side: int, coarser_side: int) -> np.ndarray:
    """Return the cells of a coarser map that hold the upper left corners of cells of a finer one, both row by row."""
    y, x = np.divmod(cells, side)
    return (y * coarser_side // side) * coarser_side + x * coarser_side // side


def _limits(table: np.ndarray) -> np.ndarray:
    """Return the cumulative rows of a table one after another, row r raised by r: one search finds row and token."""
    rows = table.reshape(-1, table.shape[-1])
    return (rows.cumsum(axis=1) + np.arange(len(rows))[:, None]).ravel()


def _tables(config: TreeSourceConfig) -> Iterator[np.ndarray]:
    """Make the table of each scale, (Y, G, P, V)."""
    random = np.random.Generator(np.random.Philox(key=[config.seed, 2**32]))
    weights = np.arange(1, config.vocab_size + 1) ** -float(config.zipf)
    law = weights / weights.sum()
    for k in range(len(config.patch_nums)):
        parents, grandparents = (config.vocab_size if k >= back else 1 for back in (1, 2))
        contexts = [(1, 1, parents), (config.num_classes, 1, parents), (config.num_classes, grandparents, parents)]
        orders = [random.random((*shape, config.vocab_size)).argsort(axis=-1) for shape in contexts]
        yield sum(share * law[order] for share, order in zip(config.mixture, orders))
