"""What a forward pass keeps for the backward pass: the bytes of tensors of one image, as formulas of the architecture.

Counted are the storages that autograd keeps of models/transformer.py, each once, without parameters and without tensors
that have no token dimension. tests/training/planning/test_activations.py compares them with what autograd saves on the
CPU, for each norm, precision and kind of attention that has gradients there: within 1 %, compiled within 7 %.

Symbols: L tokens, D model width, H heads, V vocabulary, e bytes of a number in the engine's precision. A "stream" is
one (L, D) tensor.
"""

from __future__ import annotations

from models.attention import FLEX, PER_SCALE
from models.var import FULL_CHECKPOINTING, LAYER_NORM, NO_CHECKPOINTING, VARConfig
from training.cross_entropy import NUMBERS_AT_ONCE
from training.engine.engine import PRECISIONS, EngineConfig

FLOAT32 = 4


def number_bytes(engine: EngineConfig) -> int:
    """Return e, the bytes of one number of weights and activations."""
    return PRECISIONS[engine.precision].itemsize


def stream_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """Return the bytes of one (L, D) tensor."""
    return model.scales.num_tokens * model.width * number_bytes(engine)


def saved_by_block(model: VARConfig, engine: EngineConfig) -> int:
    """Return what one block keeps without checkpointing, its input included."""
    stream = stream_bytes(model, engine)
    hidden = model.scales.num_tokens * model.hidden_width * number_bytes(engine)
    saved = 3 * stream + 2 * hidden  # the block's input, those of qkv and fc1; before and after GELU
    if model.norm != LAYER_NORM:
        saved += 2 * stream  # both branches, before their gates
    if engine.compile:
        return saved + _saved_by_compiled_attention(model, engine)
    saved += stream  # between the branches
    if model.norm != LAYER_NORM:
        saved += 2 * stream  # both normalised inputs, before scale and shift
    return saved + _saved_by_attention(model, engine)


def _saved_by_attention(model: VARConfig, engine: EngineConfig) -> int:
    """Return what is kept from the output of qkv to the input of proj.

    Attention that makes one call a scale takes keys and values joined anew for each scale. The other kinds take views
    of qkv, which keep all of it, and return heads that already lie side by side.
    """
    stream, is_low = stream_bytes(model, engine), engine.precision != "fp32"
    per_head = model.scales.num_tokens * model.num_heads * FLOAT32
    per_scale = engine.attention == PER_SCALE
    saved = stream + per_head  # the heads and their log-sum-exp
    if model.qk_norm:
        saved += stream + 4 * per_head  # scaled queries; lengths of queries and keys
        if is_low:
            saved += 2 * model.scales.num_tokens * model.width * FLOAT32  # queries and keys in float32
        if not per_scale:
            saved += stream  # unit keys
    if per_scale:
        saved += stream + joined_bytes(model, engine)  # heads side by side
    if not (per_scale and model.qk_norm and is_low):
        saved += 3 * stream  # qkv: something kept is a view of it
    return saved


def _saved_by_compiled_attention(model: VARConfig, engine: EngineConfig) -> int:
    """Return the same where torch.compile chooses what to keep: as torch 2.13 does on the CPU."""
    stream = stream_bytes(model, engine)
    saved = 5 * stream + model.scales.num_tokens * model.num_heads * FLOAT32  # qkv; heads, twice; log-sum-exp
    if model.qk_norm:
        saved += stream  # scaled queries
    if engine.attention == PER_SCALE:
        return saved + stream + joined_bytes(model, engine)  # queries by scale
    return saved + (stream if model.qk_norm else 0)  # unit keys


def joined_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """Return the keys and values of one call a scale: for every scale those of all tokens up to it."""
    joined = sum(part.stop for part in model.scales.slices)
    return 2 * joined * model.width * number_bytes(engine)


def kept_by_block(model: VARConfig, engine: EngineConfig) -> int:
    """Return what one block holds from its forward to its backward pass under the engine's checkpointing."""
    stream = stream_bytes(model, engine)
    if engine.activation_checkpointing == NO_CHECKPOINTING:
        return saved_by_block(model, engine)
    if engine.activation_checkpointing == FULL_CHECKPOINTING:
        return stream
    if engine.compile:  # no single product can be chosen inside compiled code, so one tensor more than full
        return 2 * stream
    return stream + products_of_block(model, engine)


def products_of_block(model: VARConfig, engine: EngineConfig) -> int:
    """Return what selective checkpointing keeps beside the input: results of four linear layers and of attention.

    FlexAttention is compiled code, inside which nothing can be chosen: its result is computed again.
    """
    products = (3 * model.width + model.width + model.hidden_width + model.width) * number_bytes(engine)
    heads = 0 if engine.attention == FLEX else model.width * number_bytes(engine) + model.num_heads * FLOAT32
    return model.scales.num_tokens * (products + heads)


def recomputed_by_block(model: VARConfig, engine: EngineConfig) -> int:
    """Return the bytes that come back for the one block whose backward pass is under way."""
    return saved_by_block(model, engine) - kept_by_block(model, engine)


def backward_of_block(model: VARConfig, engine: EngineConfig) -> int:
    """Return the gradients that exist at once in the middle of the feed-forward, a block's worst moment.

    They are those of its hidden layer and of its output; with AdaLN the gate's product frees another stream before.
    """
    streams = 2 if model.norm == LAYER_NORM else 1
    return model.scales.num_tokens * (streams * model.width + model.hidden_width) * number_bytes(engine)


def saved_by_ends(model: VARConfig, engine: EngineConfig) -> int:
    """Return what is kept outside the blocks: the last stream, its norm, the head's input, the embedding's input."""
    streams = 2 if model.norm == LAYER_NORM else 3
    return model.scales.num_tokens * (streams * model.width + model.code_width) * number_bytes(engine)


def logit_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """Return the bytes of the (L, V) logits of one image, which the loss keeps for its backward pass."""
    return model.scales.num_tokens * model.vocab_size * number_bytes(engine)


def loss_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """Return what the loss of a micro-batch takes when its backward pass begins: the logits and their gradient.

    The loss works on NUMBERS_AT_ONCE logits at a time. Beside the whole there are, of one such part in float32, its
    softmax, in low precision its copy, and the softmax of the part before.
    """
    logits = engine.micro_batch * logit_bytes(model, engine)
    numbers = logits // number_bytes(engine)
    copies = (1 if engine.precision == "fp32" else 2) + (numbers > NUMBERS_AT_ONCE)
    return 2 * logits + copies * FLOAT32 * min(numbers, NUMBERS_AT_ONCE)
