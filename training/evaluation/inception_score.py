"""The Inception Score: exp of the mean divergence of each image's class probabilities from their average.

The score is the mean over splits of the set (Salimans et al. 2016), so it depends on the order of images. Of a set
sorted by class each split sees few classes, and the score falls: the same 50,000 images have scored 62 and 298.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

ADM_SPLIT = 5000
SORTED_BELOW = 0.9  # of the shuffled score; random orders of one set differ by a few percent


def inception_score(probabilities: Array, *, splits: int = 10, seed: int | None = 2020) -> float:
    """Return the score of class probabilities (N, K), in float64, over `splits` near-equal parts.

    seed: shuffles the images first, as torch-fidelity does; None keeps the order in which they are stored.

    Raises:
        ValueError: rows that are no probabilities, or fewer images than splits.
    """
    _check_probabilities(probabilities)
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"splits is {splits}; 1 to {len(probabilities)}, the number of images, are possible")
    exact = probabilities.astype(np.float64)
    if seed is not None:
        exact = exact[np.random.RandomState(seed).permutation(len(exact))]
    edges = [i * len(exact) // splits for i in range(splits + 1)]
    return float(np.mean([_score(exact[start:end]) for start, end in pairwise(edges)]))


def adm_inception_score(probabilities: Array) -> float:
    """Return the score of OpenAI's evaluator: in float32, in stored order, over splits of 5,000, the last shorter."""
    _check_probabilities(probabilities)
    single = probabilities.astype(np.float32, copy=False)
    return float(np.mean([_score(single[i : i + ADM_SPLIT]) for i in range(0, len(single), ADM_SPLIT)]))


def sorting_warning(stored: float, shuffled: float) -> str:
    """Return what to tell a person whose images are sorted by class, judged by their two scores; or nothing."""
    if stored >= SORTED_BELOW * shuffled:
        return ""
    return (
        f"the images are sorted: their Inception Score is {stored:.2f} as stored and {shuffled:.2f} shuffled; "
        "shuffle the file before another evaluator reads it"
    )


def _score(probabilities: Array) -> float:
    """Return exp of the mean KL divergence of the rows from their mean. A probability of 0 contributes 0."""
    average = probabilities.mean(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = probabilities * (np.log(probabilities) - np.log(average))
    terms[probabilities == 0] = 0  # where OpenAI's evaluator would have NaN
    return float(np.exp(terms.sum(1).mean()))


def _check_probabilities(probabilities: Array) -> None:
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"class probabilities have shape {probabilities.shape}; (N, K) with N >= 1 is needed")
    sums = probabilities.sum(1, dtype=np.float64)
    if not (probabilities >= 0).all() or not (np.abs(sums - 1) < 1e-3).all():
        row = int(np.argmax(~(np.abs(sums - 1) < 1e-3) | (probabilities < 0).any(1)))
        raise ValueError(f"the class probabilities of image {row} sum to {sums[row]:.6g}; give softmax outputs")
