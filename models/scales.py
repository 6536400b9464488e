"""The scale schedule (p_1 .. p_K): how many tokens each scale has, where they lie, and which may see which.

This is the one home of scale arithmetic and holds no weights. Scales are counted from 0 in code, from 1 in prose.

Shapes: B batch, K scales, L tokens of all scales together, p_k side of token map k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # 256 px at 16x downsampling: K = 10, L = 680
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # 512 px: K = 10, L = 2240
PATCH_NUMS_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)  # 1024 px: K = 14, L = 9451


@dataclass(frozen=True)
class Scales:
    """A schedule of token maps of p_k x p_k tokens, coarse to fine."""

    patch_nums: tuple[int, ...]  # (p_1 .. p_K), strictly increasing

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))  # YAML has lists; a value must be hashable
        if not self.patch_nums:
            raise ValueError("patch_nums is empty, expected at least one scale")
        if any(type(side) is not int or side < 1 for side in self.patch_nums):
            raise ValueError(f"patch_nums {self.patch_nums} must hold positive integers")
        if any(coarse >= fine for coarse, fine in pairwise(self.patch_nums)):
            raise ValueError(f"patch_nums {self.patch_nums} must be strictly increasing")

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.patch_nums)

    @property
    def scale_sizes(self) -> tuple[int, ...]:
        """Number of tokens of each scale, p_k squared."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def num_tokens(self) -> int:
        """L, the tokens of all scales."""
        return sum(self.scale_sizes)

    @property
    def first_tokens(self) -> int:
        """Number of start tokens: the tokens of the first scale, p_1 squared."""
        return self.scale_sizes[0]

    @property
    def side(self) -> int:
        """Side of the last token map and of the feature map, p_K."""
        return self.patch_nums[-1]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The places of the scales in a joined sequence of L tokens."""
        ends = tuple(accumulate(self.scale_sizes))
        return tuple(slice(end - size, end) for end, size in zip(ends, self.scale_sizes))

    def split(self, codes: Tensor) -> list[Tensor]:
        """Cut a joined sequence (B, L[, ...]) into its scales, K views of (B, p_k^2[, ...])."""
        if codes.ndim < 2 or codes.shape[1] != self.num_tokens:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}, patch_nums {self.patch_nums} need "
                f"(batch, {self.num_tokens}, ...)"
            )
        return [codes[:, tokens] for tokens in self.slices]

    def join(self, token_maps: Sequence[Tensor]) -> Tensor:
        """Join K token maps, flat (B, p_k^2[, ...]), into one sequence (B, L[, ...])."""
        sizes = tuple(token_map.shape[1] for token_map in token_maps)
        if sizes != self.scale_sizes:
            raise ValueError(f"token maps have {sizes} tokens, patch_nums {self.patch_nums} need {self.scale_sizes}")
        return torch.cat(list(token_maps), dim=1)

    def scale_ids(self, device: torch.device | str | None = None) -> Tensor:
        """Return the scale that each token belongs to, counted from 0: (L,) int64."""
        sizes = enumerate(self.scale_sizes)
        return torch.cat([torch.full((size,), k, dtype=torch.int64, device=device) for k, size in sizes])

    def block_causal_mask(self, device: torch.device | str | None = None) -> Tensor:
        """Return which token (row) may attend to which (column): its own and earlier scales (Fig. 4). (L, L) bool."""
        ids = self.scale_ids(device)
        return ids[:, None] >= ids[None, :]
