"""The public checkpoints' state dicts: read into our models, and written from them, without loss.

Names and shapes are those of FoundationVision/VAR (models/var.py, vqvae.py, quant.py), whose files are flat state
dicts: `vae_ch160v4096z32.pth`, `var_d16.pth` ... `var_d36.pth`. All sizes are read off names and shapes; the scale
schedule is not in the files, nor is the share of phi's convolution, which is 0.5 in all of them. The tokenizer's names
are ours but for the quantiser; a transformer's are translated by two tables.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.scales import Scales
from models.var import ADALN, HEAD_DIM, LAYER_NORM, SHARED_ADALN, VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

Model = TypeVar("Model", bound=nn.Module)
# Entries that are not weights: reading ignores them, writing computes them, since the public code loads strictly.
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
MAX_NAMES_IN_ERROR = 8

VAR_NAMES = {  # ours: theirs; a name that ends in a dot stands for all that it begins
    "start_position": "pos_start",
    "position_embedding": "pos_1LC",
    "input_embedding.": "word_embed.",
    "class_embedding.": "class_emb.",
    "scale_embedding.": "lvl_embed.",
    "shared_modulation.": "shared_ada_lin.1.",
    "final_norm.linear.": "head_nm.ada_lin.1.",
    "head.": "head.",
}
BLOCK_NAMES = {  # after "blocks.i."
    "modulation.linear.": "ada_lin.1.",
    "modulation.offset": "ada_gss",
    "attention.qk_norm.log_scale": "attn.scale_mul_1H11",
    "attention.qkv.": "attn.mat_qkv.",
    "attention.": "attn.",
    "feed_forward.": "ffn.",
}


def tokenizer_from_state_dict(state_dict: Mapping[str, Tensor], patch_nums: Iterable[int]) -> VQVAE:
    """Build the tokenizer of a public state dict, in float32, sharing its storage and on its device.

    Raises ValueError naming each entry that is missing, unexpected or of another shape.
    """
    weights = _weights(state_dict, "tokenizer")
    config = _tokenizer_config(weights, tuple(int(side) for side in patch_nums))
    with torch.device("meta"):
        model = VQVAE(config)
    return _fill(model, weights, _tokenizer_names(model, _phi_prefix(weights)), "tokenizer")


def var_from_state_dict(state_dict: Mapping[str, Tensor], patch_nums: Iterable[int]) -> VAR:
    """Build the transformer of a public state dict, in float32, sharing its storage and on its device.

    Raises ValueError naming each entry that is missing, unexpected or of another shape.
    """
    weights = _weights(state_dict, "transformer")
    config = _var_config(weights, tuple(int(side) for side in patch_nums))
    with torch.device("meta"):
        model = VAR(config)
    return _fill(model, weights, _var_names(model), "transformer")


def tokenizer_to_state_dict(tokenizer: VQVAE) -> dict[str, Tensor]:
    """Return the public state dict of a tokenizer, sharing its storage. Its statistic of used codes is all zeros.

    Raises ValueError if phi_ratio is not 0.5: the files do not state it, and another tokenizer would be read back.
    """
    num_phi, phi_ratio = tokenizer.config.quantizer.num_phi, tokenizer.config.quantizer.phi_ratio
    if phi_ratio != QuantizerConfig().phi_ratio:
        raise ValueError(
            f"phi_ratio {phi_ratio} is not stated in public files, where it is "
            f"{QuantizerConfig().phi_ratio}; use --format safetensors"
        )
    prefix = {0: "quantize.quant_resi.", 1: "quantize.quant_resi.qresi."}.get(num_phi, "quantize.quant_resi.qresi_ls.")
    entries = _export(tokenizer, _tokenizer_names(tokenizer, prefix))
    usage = tokenizer.quantizer.codebook.new_zeros(tokenizer.scales.num_scales, tokenizer.config.quantizer.vocab_size)
    return entries | {"quantize.ema_vocab_hit_SV": usage}


def var_to_state_dict(var: VAR) -> dict[str, Tensor]:
    """Return the public state dict of a transformer, sharing its storage, with its constant buffers.

    Raises ValueError as `check_public` does.
    """
    check_public(var.config)
    entries = _export(var, _var_names(var))
    device, num_tokens = var.position_embedding.device, var.scales.num_tokens
    bias = torch.zeros(num_tokens, num_tokens, device=device)
    entries["lvl_1L"] = var.scales.scale_ids(device)[None]  # (1, L)
    entries["attn_bias_for_masking"] = bias.masked_fill(~var.scales.block_causal_mask(device), -torch.inf)[None, None]
    for layer in range(var.config.depth):
        entries[f"blocks.{layer}.attn.zero_k_bias"] = torch.zeros(var.config.width, device=device)
    return entries


def check_public(config: VARConfig) -> None:
    """Raise ValueError for a transformer that the public code cannot build."""
    if config.norm == LAYER_NORM:
        raise ValueError(f"norm '{LAYER_NORM}' has no counterpart in the public code; use --format safetensors")
    if not config.is_conditional:
        raise ValueError("num_classes 0: the public code divides by the number of classes; use --format safetensors")


def _weights(state_dict: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the entries that are weights, in float32."""
    strangers = [name for name, value in state_dict.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if strangers:
        raise ValueError(
            f"{what} state dict: {strangers[0]!r} is not a tensor with a name; give the flat state dict of one model"
        )
    return {name: value.float() for name, value in state_dict.items() if not name.endswith(BUFFERS)}


def _size(weights: Mapping[str, Tensor], what: str, *sources: tuple[str, int]) -> int:
    """Read a size that several entries (name, dimension) state, by majority, so that a wrong entry stands out."""
    said = {
        name: weights[name].shape[dimension]
        for name, dimension in sources
        if name in weights and weights[name].ndim > dimension
    }
    ranking = Counter(said.values()).most_common(2)
    if not said:
        raise ValueError(
            f"{what} state dict: missing or misshapen {', '.join(name for name, _ in sources)}, from "
            "which its sizes are read"
        )
    if len(ranking) == 2 and ranking[0][1] == ranking[1][1]:
        shapes = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in said)
        raise ValueError(f"{what} state dict: shapes contradict each other: {shapes}")
    return ranking[0][0]


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """Count what `pattern` numbers: one more than the largest number found, at most as many as there are entries."""
    found = (re.match(pattern, name) for name in weights)
    return min(max((int(match[1]) + 1 for match in found if match), default=0), len(weights))


def _tokenizer_config(weights: Mapping[str, Tensor], patch_nums: tuple[int, ...]) -> VQVAEConfig:
    what, down = "tokenizer", "encoder.down"
    width = _size(
        weights, what, ("encoder.conv_in.weight", 0), ("encoder.conv_in.bias", 0), (f"{down}.0.block.0.norm1.weight", 0)
    )
    levels = [
        _size(
            weights,
            what,
            (f"{down}.{i}.block.0.conv1.weight", 0),
            (f"{down}.{i}.block.0.conv1.bias", 0),
            (f"{down}.{i}.block.0.norm2.weight", 0),
        )
        for i in range(_count(weights, r"encoder\.down\.(\d+)\."))
    ]
    if any(level % width for level in levels):
        raise ValueError(
            f"{what} state dict: encoder.conv_in.weight has {width} channels, of which those of the "
            f"levels, {levels}, must be multiples (encoder.down.*.block.0.conv1.weight)"
        )
    num_blocks = _count(weights, r"encoder\.down\.\d+\.block\.(\d+)\.")
    codebook = "quantize.embedding.weight"
    code_width = _size(weights, what, ("quant_conv.weight", 0), ("quant_conv.bias", 0), (codebook, 1))
    vocab_size = _size(weights, what, (codebook, 0))
    if weights[codebook].ndim != 2:
        raise ValueError(f"{what} state dict: {codebook} has shape {tuple(weights[codebook].shape)}, expected (V, C)")
    num_phi = {"quantize.quant_resi.": 0, "quantize.quant_resi.qresi.": 1}.get(
        _phi_prefix(weights), _count(weights, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    )
    autoencoder = AutoencoderConfig(width, tuple(level // width for level in levels), num_blocks, code_width)
    return VQVAEConfig(patch_nums, autoencoder, QuantizerConfig(vocab_size, code_width, num_phi))


def _phi_prefix(weights: Mapping[str, Tensor]) -> str:
    """Find how the names of the phi begin, which tells whether there is one per scale, one for all, or a few shared."""
    for prefix in ("quantize.quant_resi.qresi_ls.", "quantize.quant_resi.qresi."):
        if any(name.startswith(prefix) for name in weights):
            return prefix
    return "quantize.quant_resi."


def _var_config(weights: Mapping[str, Tensor], patch_nums: tuple[int, ...]) -> VARConfig:
    what, scales, first_block = "transformer", Scales(patch_nums), "blocks.0.ffn"
    width = _size(
        weights,
        what,
        ("pos_start", 2),
        ("pos_1LC", 2),
        ("class_emb.weight", 1),
        ("lvl_embed.weight", 1),
        ("head.weight", 1),
    )
    num_blocks = _count(weights, r"blocks\.(\d+)\.")
    if width % HEAD_DIM or num_blocks > width // HEAD_DIM:
        raise ValueError(
            f"{what} state dict: pos_1LC has width {width} and there are {num_blocks} blocks; a model of "
            f"depth d has width {HEAD_DIM} d (eq. 7)"
        )
    num_tokens = _size(weights, what, ("pos_1LC", 1))
    if num_tokens != scales.num_tokens:
        raise ValueError(
            f"{what} state dict: pos_1LC has {num_tokens} positions, patch_nums {scales.patch_nums} need "
            f"{scales.num_tokens}; give the schedule it was trained with"
        )
    hidden_width = _size(
        weights,
        what,
        (f"{first_block}.fc1.weight", 0),
        (f"{first_block}.fc1.bias", 0),
        (f"{first_block}.fc2.weight", 1),
    )
    is_shared = any(name.startswith("shared_ada_lin.") or name.endswith(".ada_gss") for name in weights)
    return VARConfig(
        depth=width // HEAD_DIM,
        patch_nums=scales.patch_nums,
        vocab_size=_size(weights, what, ("head.weight", 0), ("head.bias", 0)),
        code_width=_size(weights, what, ("word_embed.weight", 1)),
        num_classes=_size(weights, what, ("class_emb.weight", 0)) - 1,  # the last row is the null class
        norm=SHARED_ADALN if is_shared else ADALN,
        qk_norm=any(name.endswith(".scale_mul_1H11") for name in weights),
        mlp_ratio=hidden_width / width,
    )


def _var_names(var: VAR) -> dict[str, str]:
    """Map each of our parameters' names to theirs."""
    return {name: _var_name(name) for name, _ in var.named_parameters()}


def _var_name(ours: str) -> str:
    block = re.match(r"blocks\.\d+\.", ours)
    prefix = block[0] if block else ""
    for our_part, their_part in (BLOCK_NAMES if block else VAR_NAMES).items():
        if ours.removeprefix(prefix).startswith(our_part):
            return prefix + their_part + ours.removeprefix(prefix + our_part)
    raise KeyError(f"{ours} has no public name; add it to the tables")


def _tokenizer_names(tokenizer: VQVAE, phi_prefix: str) -> dict[str, str]:
    """Map each of our parameters' names to theirs; `phi_prefix` says how the phi are shared."""
    one_for_all = phi_prefix.endswith("qresi.")
    names = {name: name for name, _ in tokenizer.named_parameters()}
    names["quantizer.codebook"] = "quantize.embedding.weight"
    for i in range(len(tokenizer.quantizer.phi)):
        for part in ("weight", "bias"):
            names[f"quantizer.phi.{i}.conv.{part}"] = phi_prefix + (part if one_for_all else f"{i}.{part}")
    return names


def _their_shape(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    """Return the public shape of a parameter of our `shape`: some have leading or trailing dimensions of 1."""
    if name in ("pos_start", "pos_1LC"):
        return (1, *shape)
    if name.endswith("ada_gss"):
        return (1, 1, *shape)
    return (1, *shape, 1, 1) if name.endswith("scale_mul_1H11") else tuple(shape)


def _fill(model: Model, weights: Mapping[str, Tensor], names: Mapping[str, str], what: str) -> Model:
    """Put entries in the place of our parameters, after checking every name and shape."""
    wanted = {names[ours]: _their_shape(names[ours], value.shape) for ours, value in model.named_parameters()}
    faults = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in weights]
    faults += [f"unexpected {name} {tuple(weights[name].shape)}" for name in weights if name not in wanted]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if faults:
        more = len(faults) - MAX_NAMES_IN_ERROR
        raise ValueError(
            f"{what} state dict: {'; '.join(faults[:MAX_NAMES_IN_ERROR])}" + (f"; and {more} more" if more > 0 else "")
        )
    ours = {name: weights[names[name]].reshape(value.shape) for name, value in model.named_parameters()}
    model.load_state_dict(ours, assign=True)
    return model


def _export(model: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        names[ours]: value.detach().reshape(_their_shape(names[ours], value.shape))
        for ours, value in model.named_parameters()
    }
