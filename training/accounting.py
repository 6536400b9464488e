"""The units of compute: how the operations of training are counted, and what the counts are divided by.

This file imports nothing, so that the config of a scaling study can name an accounting without loading torch.
"""

from __future__ import annotations

from types import MappingProxyType

FLOPS_PER_PFLOP = 10**15
BILLION = 10**9
IMAGENET_IMAGES = 1_281_167  # in one epoch of ImageNet's training set
EXACT, DENSE_MASK, SIX_NT, PAPER = "exact", "dense_mask", "six_nt", "paper"
ACCOUNTINGS = (EXACT, DENSE_MASK, SIX_NT, PAPER)
# each accounting as tables, axes and sentences name it
LABELS = MappingProxyType(
    {
        EXACT: "training FLOPs",
        DENSE_MASK: "training FLOPs with a dense mask",
        SIX_NT: "6 N T",
        PAPER: "multiply-accumulates of one forward pass",
    }
)
