"""How much the tokens of a tokenizer depend on each other, and in which direction (VAR, appendix A and Fig. 9).

The paper shows attention maps of the tokenizer's encoder and calls the dependency strong and bidirectional; it gives
the picture alone. The numbers here are ours. They ask what a model that goes through the tokens in raster order must
ask: does a token depend on those before it only? `later_share` is the share of attention between different tokens
that goes to later ones; `bidirectionality` is 0 if all of it goes one way, forwards or backwards, and 1 if both ways
weigh the same. Both are sums over all pairs: they say nothing of single pairs, nor of how strong the dependency is.

Shapes: B images, n tokens in raster order.
"""

from __future__ import annotations

from torch import Tensor


def later_share(attention: Tensor) -> Tensor:
    """Share of the attention to other tokens that goes to later ones: (B, n, n), row i that of token i -> (B,).

    0 where no token looks at another, of which there is no share to speak.
    """
    later = attention.triu(1).sum(dim=(1, 2))
    earlier = attention.tril(-1).sum(dim=(1, 2))
    total = later + earlier
    return later / total.where(total > 0, 1)


def bidirectionality(attention: Tensor) -> Tensor:
    """1 - |2 share - 1| of `later_share`: (B, n, n) -> (B,). 0 for causal attention either way, 1 for balanced."""
    return 1 - (2 * later_share(attention) - 1).abs()
