"""Model cards: the README.md that goes with a folder of weights. What is not known is said, not guessed.

A card opens with YAML front matter, as model hubs read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.var import SHARED_ADALN, VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

PAPER = "https://arxiv.org/abs/2404.02905"
NOT_MEASURED = (
    "FID, Inception Score, precision and recall of generated images, and the tokenizer's rFID.",
    "Behaviour on images unlike the training images, and biases of the training data.",
)


def model_card(
    title: str, var: VAR | None, tokenizer: VQVAE | None, *, origin: Sequence[str], usage: Sequence[str]
) -> str:
    """Return the text of a card. origin: sentences on where the weights come from; usage: paragraphs of Markdown."""
    tags = ["image-generation", "visual-autoregressive", *(["class-conditional"] if is_conditional(var) else [])]
    rows = [f"| {name} | {size} |" for name, size in describe_sizes(var, tokenizer).items()]
    parts = [
        "\n".join(["---", "library_name: nextscale", f"tags: [{', '.join(tags)}]", "---"]),
        f"# {title}",
        f"{what_it_is(var, tokenizer)} It is described in [Visual Autoregressive Modeling]({PAPER}).",
        "\n".join(["| | |", "|---|---|", *rows]),
        "## Where the weights come from",
        "\n".join(f"- {sentence}" for sentence in origin),
        "## How to use them",
        *usage,
        "## What was not measured",
        "\n".join(f"- {sentence}" for sentence in NOT_MEASURED),
        "## Licence",
        "None is given here: whoever owns the weights, and may pass on what they learned from the data, chooses it.",
    ]
    return "\n\n".join(parts) + "\n"


def is_conditional(var: VAR | None) -> bool:
    """Return whether there is a transformer that takes classes."""
    return var is not None and var.config.is_conditional


def what_it_is(var: VAR | None, tokenizer: VQVAE | None) -> str:
    """Return what the models of a folder are, as one sentence."""
    parts = []
    if var:
        kind = "a class-conditional" if var.config.is_conditional else "an unconditional"
        parts.append(f"{kind} VAR transformer, which generates the codes of an image scale by scale")
    if tokenizer:
        side = tokenizer.config.image_size
        parts.append(f"a multi-scale VQVAE tokenizer, which turns images of {side} x {side} pixels into codes and back")
    return f"This is {', and '.join(parts)}."


def describe_sizes(var: VAR | None, tokenizer: VQVAE | None) -> dict[str, str]:
    """Return what a reader asks first of one model or both, by name: depth, parameters, V, C, classes, schedule."""
    sizes: dict[str, str] = {}
    if var:
        sizes |= {
            "transformer": f"d{var.config.depth}, {var.config.num_parameters:,} parameters",
            "classes": f"{var.config.num_classes:,}" if var.config.is_conditional else "none (unconditional)",
            "norm": f"{var.config.norm}{', unit-norm q and k' if var.config.qk_norm else ''}",
        }
    if tokenizer:
        number = sum(parameter.numel() for parameter in tokenizer.parameters())
        sizes |= {"tokenizer": f"{number:,} parameters, {tokenizer.config.image_size} px"}
    model = var or tokenizer
    assert model is not None, "a card is of at least one model"
    vocab_size, code_width = codes_of(model.config)
    sizes |= {"codebook": f"V = {vocab_size:,}, C = {code_width}"}
    return sizes | {"patch_nums": f"{model.config.patch_nums}, {model.scales.num_tokens:,} tokens"}


def codes_of(config: VARConfig | VQVAEConfig) -> tuple[int, int]:
    """Return the number V of codes and their width C."""
    sized = config if isinstance(config, VARConfig) else config.quantizer
    return sized.vocab_size, sized.code_width


def how_to_use_here(folder: Path, var: VAR | None, tokenizer: VQVAE | None) -> list[str]:
    """Return the commands of this project that take the folder, as it was named when the card was written."""
    name = str(folder)
    lines = []
    if var and tokenizer:
        lines += [f"python launchers/sample.py --run {name} --per-class 8"]
    if var:
        lines += [f"deepspeed launchers/train.py --config CONFIG.yaml --init-from {name}   # train on"]
    if tokenizer:
        lines += [f"python launchers/encode_codes.py --tokenizer {name} --images IMAGES --out CODES"]
    public = f"python launchers/export_weights.py --run {name} --out DIR --format reference"
    return ["With this project:", code_block("", lines), f"Files for the public VAR code: `{public}`."]


def how_to_use_in_public_code(var: VAR | None, tokenizer: VQVAE, files: dict[str, str]) -> list[str]:
    """Return lines that load exported files into the public code. files: "VAR" and "VQVAE" to their paths."""
    ours = [f"--{'var' if kind == 'VAR' else 'tokenizer'} {file}" for kind, file in files.items()]
    patch_nums = tokenizer.config.patch_nums
    sides = " ".join(map(str, patch_nums))
    back = f"python launchers/import_weights.py {' '.join(ours)} --out DIR --patch-nums {sides}"
    size = tokenizer.config.quantizer
    arguments = [f"patch_nums={patch_nums}", f"V={size.vocab_size}", f"Cvae={size.code_width}"]
    arguments += [f"ch={tokenizer.config.autoencoder.width}", f"share_quant_resi={size.num_phi}"]
    lines = ["import torch", "from models import build_vae_var", "", 'device = "cuda"']
    if var:
        arguments += [f"num_classes={var.config.num_classes}", f"depth={var.config.depth}"]
        arguments += [f"shared_aln={var.config.norm == SHARED_ADALN}", f"attn_l2_norm={var.config.qk_norm}"]
    lines += [f"vae, var = build_vae_var(device, {', '.join(arguments)})"]
    for kind, name in (("VQVAE", "vae"), ("VAR", "var")):
        if kind in files:
            lines += [f'{name}.load_state_dict(torch.load("{files[kind]}", map_location="cpu"), strict=True)']
    changes = written_into_public_code(var, tokenizer)
    notes = [f"That code has these sizes written into its classes, change them there: {', '.join(changes)}."]
    return [
        "In the public VAR code:",
        code_block("python", lines),
        *(notes if changes else []),
        "Back into this project:",
        code_block("", [back]),
    ]


def written_into_public_code(var: VAR | None, tokenizer: VQVAE) -> list[str]:
    """Return what this model has otherwise than the public code, which takes no argument for it."""
    usual, ours = AutoencoderConfig(), tokenizer.config.autoencoder
    changes = [f"ch_mult {ours.multipliers}"] if ours.multipliers != usual.multipliers else []
    changes += [f"num_res_blocks {ours.num_res_blocks}"] if ours.num_res_blocks != usual.num_res_blocks else []
    ratio = tokenizer.config.quantizer.phi_ratio
    changes += [f"quant_resi {ratio}"] if ratio != QuantizerConfig().phi_ratio else []
    usual_mlp = VARConfig(depth=1).mlp_ratio
    return changes + ([f"mlp_ratio {var.config.mlp_ratio}"] if var and var.config.mlp_ratio != usual_mlp else [])


def code_block(language: str, lines: Sequence[str]) -> str:
    """Return lines as a fenced block of Markdown."""
    return "\n".join([f"```{language}", *lines, "```"])
