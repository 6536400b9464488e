"""What a forward pass leaves behind for the backward pass: bytes of tensors of one image, read off the architecture.

Counted are the storages that autograd keeps of models/transformer.py as it stands, each once, without parameters and
without what has no token dimension. Eager execution is meant; a compiled block keeps less, since it fuses what is
element by element. tests/test_activations.py compares every count with what autograd really saves.

Symbols: L tokens, D model width, H heads, V vocabulary, e bytes of a number in the engine's precision.
"""

from __future__ import annotations

from models.attention import PER_SCALE
from models.var import LAYER_NORM, VARConfig
from training.engine import PRECISIONS, EngineConfig

NONE, FULL, SELECTIVE = "none", "full", "selective"
FLOAT32 = 4
LOSS_COPIES = 3  # log-probabilities, their gradient, and the logits' gradient, all (L, V) float32 at the same time


def number_bytes(engine: EngineConfig) -> int:
    """e: bytes of one number of weights and activations."""
    return PRECISIONS[engine.precision].itemsize


def checkpointing(engine: EngineConfig) -> str:
    """Which of none, full and selective the engine's activation checkpointing is."""
    mode = engine.activation_checkpointing
    return mode if isinstance(mode, str) else FULL if mode else NONE


def saved_by_block(model: VARConfig, engine: EngineConfig) -> dict[str, int]:
    """What one block keeps of one image, its input included, without checkpointing."""
    tokens = model.scales.num_tokens
    stream = tokens * model.width * number_bytes(engine)  # one (L, D) tensor
    saved = {"input": stream, "stream between the branches": stream, "inputs of qkv and fc1": 2 * stream}
    if model.norm != LAYER_NORM:  # the products with scale and gate keep their other factor
        saved |= {"normalised, before scale and shift": 2 * stream, "branches, before their gates": 2 * stream}
    hidden = tokens * model.hidden_width * number_bytes(engine)
    saved |= {"before and after GELU": 2 * hidden}
    return saved | saved_by_attention(model, engine)


def saved_by_attention(model: VARConfig, engine: EngineConfig) -> dict[str, int]:
    """From the output of qkv to the input of proj: unit vectors in float32, joined keys and values, results.

    One call a scale takes keys and values that are joined anew for it: sum over scales of the tokens so far. The other
    ways take keys as they are and values as a view, which keeps all of qkv.
    """
    tokens, width = model.scales.num_tokens, model.width
    stream, single = tokens * width * number_bytes(engine), tokens * width * FLOAT32
    per_head = tokens * model.num_heads * FLOAT32
    saved = {"heads": stream, "heads side by side": stream, "log-sum-exp": per_head}
    keeps_qkv = engine.attention != PER_SCALE
    if model.qk_norm:
        saved |= {"unit queries": single, "scaled queries": stream, "lengths of queries and keys": 4 * per_head}
        if engine.precision == "fp32":
            keeps_qkv = True  # the float32 queries and keys are views of it
        else:
            saved |= {"queries and keys in float32": 2 * single}
    else:
        keeps_qkv = True
    if engine.attention == PER_SCALE:
        joined = sum(part.stop for part in model.scales.slices)
        saved |= {"joined keys and values": 2 * joined * width * number_bytes(engine)}
    elif model.qk_norm:
        saved |= {"unit keys": stream}
    return saved | ({"qkv": 3 * stream} if keeps_qkv else {})


def kept_by_block(model: VARConfig, engine: EngineConfig) -> int:
    """Bytes that one block holds from its forward to its backward pass under the engine's checkpointing."""
    saved = saved_by_block(model, engine)
    mode = checkpointing(engine)
    if mode == NONE:
        return sum(saved.values())
    if mode == FULL:
        return saved["input"]
    return saved["input"] + products_of_block(model, engine)


def products_of_block(model: VARConfig, engine: EngineConfig) -> int:
    """What selective checkpointing keeps beside the input: results of the four linear layers and of attention."""
    tokens = model.scales.num_tokens
    numbers = 3 * model.width + model.width + model.width + model.hidden_width + model.width
    return tokens * (numbers * number_bytes(engine) + model.num_heads * FLOAT32)


def recomputed_by_block(model: VARConfig, engine: EngineConfig) -> int:
    """Bytes that come back for the one block whose backward pass is under way."""
    return sum(saved_by_block(model, engine).values()) - kept_by_block(model, engine)


def backward_of_block(model: VARConfig, engine: EngineConfig) -> int:
    """Gradients that exist at once at a block's worst moment, the feed-forward's: of its output and hidden layer."""
    streams = 2 if model.norm == LAYER_NORM else 1  # a gate's product gives up its factor before that moment
    return model.scales.num_tokens * (streams * model.width + model.hidden_width) * number_bytes(engine)


def saved_by_ends(model: VARConfig, engine: EngineConfig) -> int:
    """Last stream, its norm, the head's input, and the inputs of the embedding."""
    streams = 2 if model.norm == LAYER_NORM else 3
    return model.scales.num_tokens * (streams * model.width + model.code_width) * number_bytes(engine)


def loss_bytes(model: VARConfig) -> int:
    """The loss at its worst moment, the first of the backward pass."""
    return LOSS_COPIES * model.scales.num_tokens * model.vocab_size * FLOAT32

