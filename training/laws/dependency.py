"""How much the tokens of a tokenizer depend on each other, and in which direction (VAR, appendix A and Fig. 9).

The paper shows attention maps of the tokenizer's encoder and calls the dependency strong and bidirectional; it gives
the picture alone. The numbers here are ours. They ask the question of a model that predicts tokens in raster order:
does a token depend on earlier tokens only? Both numbers are sums over all pairs. They say nothing of single pairs, nor
of how strong the dependency is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def later_share(attention: Tensor) -> Tensor:
    """Return the share of attention between different tokens that goes to later ones in raster order.

    attention: (B, n, n), row i is that of token i. Returns (B,), 0 for an image in which no token looks at another.
    """
    later = attention.triu(1).sum(dim=(1, 2))
    earlier = attention.tril(-1).sum(dim=(1, 2))
    total = later + earlier
    return later / total.where(total > 0, 1)


def bidirectionality(attention: Tensor) -> Tensor:
    """Return 1 - |2 share - 1| of `later_share`, (B, n, n) -> (B,).

    It is 0 if all attention goes one way, forwards or backwards, and 1 if both ways weigh the same.
    """
    return 1 - (2 * later_share(attention) - 1).abs()
