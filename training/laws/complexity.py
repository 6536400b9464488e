"""Attention pairs of generating an image, exactly: appendix B for any schedule, without and with a cache.

A pair is one (query, key) of one layer and head. Without a cache every step computes all tokens so far anew, so that it
costs the square of their number (eqs. 17 and 19); with one, only the new tokens ask. The paper compares O(n^6) and
O(n^4), which are the costs without a cache. With a cache raster order is O(n^4) too, and has fewer pairs than VAR: what
VAR then gains is the number of steps that must follow one another, K instead of n^2.

Legend: n side of the last token map, K scales, a ratio of one side to the next, c_k tokens up to scale k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from models.scales import Scales
from training.flops import attention_pairs


@dataclass(frozen=True)
class GenerationCost:
    """One way to generate an image of n x n codes."""

    name: str
    pairs: int  # over all steps, for one layer and head
    tokens: int  # generated
    steps: int  # that must follow one another


def ar_pairs(side: int) -> int:
    """Raster order without a cache: the sum of i^2 over i = 1 .. n^2, in the closed form of eq. 17."""
    tokens = side * side
    return tokens * (tokens + 1) * (2 * tokens + 1) // 6


def ar_pairs_cached(side: int) -> int:
    """Raster order with a cache: token i sees i tokens, itself among them."""
    tokens = side * side
    return tokens * (tokens + 1) // 2


def var_pairs(scales: Scales) -> int:
    """Next-scale prediction without a cache: the sum of c_k^2 (eqs. 19 and 20), for any schedule."""
    return sum(part.stop**2 for part in scales.slices)


def var_pairs_cached(scales: Scales) -> int:
    """Next-scale prediction with a cache: the sum of p_k^2 c_k, which are also the pairs of one training image."""
    return attention_pairs(scales)


def eq21(side: float, ratio: float) -> float:
    """Eq. 21 as printed: the sum of eq. 20 for a schedule of sides 1, a, a^2 .. n. It is right; a > 1."""
    _check_ratio(ratio)
    n, a = side, ratio
    numerator = (a**4 - 1) * math.log(n) + (
        a**8 * n**4 - 2 * a**6 * n**2 - 2 * a**4 * (n**2 - 1) + 2 * a**2 - 1
    ) * math.log(a)
    return numerator / ((a**2 - 1) ** 3 * (a**2 + 1) * math.log(a))


def geometric_var_pairs(num_scales: int, ratio: Fraction | int) -> Fraction:
    """Eq. 20 summed, without logarithms and exactly: for sides a^0 .. a^(K - 1), which need not be whole numbers.

    With b = a^2 and b^K = (a n)^2 it is (b^2 (b^2K - 1) - 2 b (b + 1) (b^K - 1) + (b^2 - 1) K) / ((b - 1)^3 (b + 1)),
    which grows as a^8 n^4 / ((a^2 - 1)^3 (a^2 + 1)).
    """
    if num_scales < 1:
        raise ValueError(f"num_scales {num_scales} must be 1 or more")
    _check_ratio(ratio)
    b = Fraction(ratio) ** 2
    ends = b**2 * (b ** (2 * num_scales) - 1) - 2 * b * (b + 1) * (b**num_scales - 1) + (b**2 - 1) * num_scales
    return ends / ((b - 1) ** 3 * (b + 1))


def generation_costs(scales: Scales) -> tuple[GenerationCost, ...]:
    """Raster order over the last token map, and next-scale prediction over all, each without and with a cache."""
    side, num_raster = scales.side, scales.side**2
    return (
        GenerationCost("raster, no cache", ar_pairs(side), num_raster, num_raster),
        GenerationCost("raster, cache", ar_pairs_cached(side), num_raster, num_raster),
        GenerationCost("next scale, no cache", var_pairs(scales), scales.num_tokens, scales.num_scales),
        GenerationCost("next scale, cache", var_pairs_cached(scales), scales.num_tokens, scales.num_scales),
    )


def _check_ratio(ratio: Fraction | float) -> None:
    if ratio <= 1:
        raise ValueError(f"ratio {ratio} must be above 1: each scale is larger than the one before it (lemma B.2)")
