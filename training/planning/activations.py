"""What a forward pass leaves behind for the backward pass: bytes of tensors of one image, read off the architecture.

Counted are the storages that autograd keeps of models/transformer.py as it stands, each once, without parameters and
without what has no token dimension. tests/training/planning/test_activations.py compares the sum of a block with what autograd saves on
the CPU, for each norm, precision and way of attention that has gradients there: within 1 %, compiled within 7 %.

Symbols: L tokens, D model width, H heads, V vocabulary, e bytes of a number in the engine's precision.
"""

from __future__ import annotations

from models.attention import FLEX, PER_SCALE
from models.var import FULL_CHECKPOINTING, LAYER_NORM, NO_CHECKPOINTING, VARConfig
from training.cross_entropy import NUMBERS_AT_ONCE
from training.engine.engine import PRECISIONS, EngineConfig

FLOAT32 = 4


def number_bytes(engine: EngineConfig) -> int:
    """e: bytes of one number of weights and activations."""
    return PRECISIONS[engine.precision].itemsize


def saved_by_block(model: VARConfig, engine: EngineConfig) -> dict[str, int]:
    """What one block keeps of one image, its input included, without checkpointing."""
    stream = stream_bytes(model, engine)
    hidden = model.scales.num_tokens * model.hidden_width * number_bytes(engine)
    saved = {"input": stream, "inputs of qkv and fc1": 2 * stream, "before and after GELU": 2 * hidden}
    if model.norm != LAYER_NORM:  # the products with the gates keep their other factor
        saved |= {"branches, before their gates": 2 * stream}
    if engine.compile:
        return saved | saved_by_compiled_attention(model, engine)
    saved |= {"stream between the branches": stream}
    if model.norm != LAYER_NORM:  # and so do those with the scales
        saved |= {"normalised, before scale and shift": 2 * stream}
    return saved | saved_by_attention(model, engine)


def saved_by_attention(model: VARConfig, engine: EngineConfig) -> dict[str, int]:
    """From the output of qkv to the input of proj: vectors and lengths in float32, joined keys and values, results.

    One call a scale takes keys and values that are joined anew for it: sum over scales of the tokens so far. The other
    ways take keys as they are and values as a view, which keeps all of qkv, and give heads that lie side by side.
    """
    stream = stream_bytes(model, engine)
    single = model.scales.num_tokens * model.width * FLOAT32
    per_head = model.scales.num_tokens * model.num_heads * FLOAT32
    saved = {"heads": stream, "log-sum-exp": per_head}
    low = engine.precision != "fp32"
    if model.qk_norm:
        saved |= {"scaled queries": stream, "lengths of queries and keys": 4 * per_head}
        saved |= {"queries and keys in float32": 2 * single} if low else {}
    if engine.attention == PER_SCALE:
        saved |= {"joined keys and values": joined_bytes(model, engine), "heads side by side": stream}
    elif model.qk_norm:
        saved |= {"unit keys": stream}
    keeps_qkv = engine.attention != PER_SCALE or not model.qk_norm or not low  # something saved is a view of it
    return saved | ({"qkv": 3 * stream} if keeps_qkv else {})


def saved_by_compiled_attention(model: VARConfig, engine: EngineConfig) -> dict[str, int]:
    """The same where torch.compile chooses what to keep and what to compute again: as torch 2.13 does on the CPU."""
    stream = stream_bytes(model, engine)
    per_head = model.scales.num_tokens * model.num_heads * FLOAT32
    saved = {"qkv": 3 * stream, "heads": stream, "heads side by side": stream, "log-sum-exp": per_head}
    saved |= {"scaled queries": stream} if model.qk_norm else {}
    if engine.attention == PER_SCALE:
        return saved | {"queries by scale": stream, "joined keys and values": joined_bytes(model, engine)}
    return saved | ({"unit keys": stream} if model.qk_norm else {})


def stream_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """One (L, D) tensor of one image."""
    return model.scales.num_tokens * model.width * number_bytes(engine)


def joined_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """Keys and values as one call a scale takes them: of every scale those of all scales up to it."""
    joined = sum(part.stop for part in model.scales.slices)
    return 2 * joined * model.width * number_bytes(engine)


def kept_by_block(model: VARConfig, engine: EngineConfig) -> int:
    """Bytes that one block holds from its forward to its backward pass under the engine's checkpointing."""
    saved = saved_by_block(model, engine)
    if engine.activation_checkpointing == NO_CHECKPOINTING:
        return sum(saved.values())
    if engine.activation_checkpointing == FULL_CHECKPOINTING:
        return saved["input"]
    if engine.compile:  # no single product can be chosen inside compiled code: full checkpointing but for one tensor
        return 2 * saved["input"]
    return saved["input"] + products_of_block(model, engine)


def products_of_block(model: VARConfig, engine: EngineConfig) -> int:
    """What selective checkpointing keeps beside the input: results of the four linear layers and of attention.

    FlexAttention is compiled code of its own, inside which nothing can be chosen: its result is computed again.
    """
    tokens = model.scales.num_tokens
    products = (3 * model.width + model.width + model.hidden_width + model.width) * number_bytes(engine)
    heads = 0 if engine.attention == FLEX else model.width * number_bytes(engine) + model.num_heads * FLOAT32
    return tokens * (products + heads)


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


def logit_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """The logits of one image, which the loss keeps for its backward pass."""
    return model.scales.num_tokens * model.vocab_size * number_bytes(engine)


def loss_bytes(model: VARConfig, engine: EngineConfig) -> int:
    """The loss of a micro-batch at its worst moment, the first of the backward pass: logits and their gradient.

    Beside them the part that is worked on, in float32: its softmax, the copy that it comes from where the logits are
    not float32 themselves, and the softmax of the part before.
    """
    logits = engine.micro_batch * logit_bytes(model, engine)
    numbers = logits // number_bytes(engine)
    copies = (1 if engine.precision == "fp32" else 2) + (numbers > NUMBERS_AT_ONCE)
    return 2 * logits + copies * FLOAT32 * min(numbers, NUMBERS_AT_ONCE)
