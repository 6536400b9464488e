"""Shapes of the transformer's parameters without building it: what memory and messages are counted from."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from models.transformer import NUM_MODULATIONS
from models.var import ADALN, LAYER_NORM, SHARED_ADALN, VARConfig

Shape = tuple[int, ...]
ROOT, CLASSES, SCALES, INPUTS, SHARED = "", "class_embedding", "scale_embedding", "input_embedding", "shared_modulation"
FINAL_NORM, FINAL_LINEAR, HEAD = "final_norm", "final_norm.linear", "head"


def block_shapes(model: VARConfig) -> list[Shape]:
    """Of the parameters of one block, in their order in the model."""
    w, hidden = model.width, model.hidden_width
    norm: list[Shape] = [(w,), (w,)] if model.norm == LAYER_NORM else []
    maps: dict[str, list[Shape]] = {
        ADALN: [(NUM_MODULATIONS * w, w), (NUM_MODULATIONS * w,)],
        SHARED_ADALN: [(NUM_MODULATIONS, w)],
        LAYER_NORM: [],
    }
    scale: list[Shape] = [(model.num_heads,)] if model.qk_norm else []
    attention = [(w,), (w,), (3 * w, w), *scale, (w, w), (w,)]
    return maps[model.norm] + norm + attention + norm + [(hidden, w), (hidden,), (w, hidden), (w,)]


def end_shapes(model: VARConfig) -> dict[str, list[Shape]]:
    """Of the parameters outside the blocks, by the module that holds them, in their order in the model."""
    w, scales = model.width, model.scales
    shared: dict[str, list[Shape]] = {SHARED: [(NUM_MODULATIONS * w, w), (NUM_MODULATIONS * w,)]}
    final: dict[str, list[Shape]] = {FINAL_LINEAR: [(2 * w, w), (2 * w,)]}
    return {
        ROOT: [(scales.first_tokens, w), (scales.num_tokens, w)],
        CLASSES: [(model.num_classes + 1, w)],
        SCALES: [(scales.num_scales, w)],
        INPUTS: [(w, model.code_width), (w,)],
        **(shared if model.norm == SHARED_ADALN else {}),
        **({FINAL_NORM: [(w,), (w,)]} if model.norm == LAYER_NORM else final),
        HEAD: [(model.vocab_size, w), (model.vocab_size,)],
    }


@lru_cache(maxsize=32)
def tensor_elements(model: VARConfig) -> tuple[int, ...]:
    """Sizes of all parameters, those of the blocks first."""
    ends = [shape for shapes in end_shapes(model).values() for shape in shapes]
    return tuple(prod(shape) for shape in model.depth * block_shapes(model) + ends)


def block_elements(model: VARConfig) -> int:
    """Parameters of one block."""
    return sum(prod(shape) for shape in block_shapes(model))


def end_elements(model: VARConfig) -> int:
    """Parameters outside the blocks; all but the embeddings come after them."""
    return model.num_parameters - model.depth * block_elements(model)
