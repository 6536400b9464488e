"""Model cards: front matter that YAML reads, the sizes of the model, and commands that fit it."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import VAR_CONFIG, VQVAE_CONFIG, make_tokenizer

from launchers.figures.model_cards import (
    describe_sizes,
    how_to_use_here,
    how_to_use_in_public_code,
    model_card,
    written_into_public_code,
)
from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.var import VAR
from models.vqvae import VQVAE, VQVAEConfig

FILES = {"VQVAE": "tokenizer/vae.pth", "VAR": "var_d1.pth"}


def card(var: VAR | None, tokenizer: VQVAE | None) -> str:
    return model_card("exports: d1", var, tokenizer, origin=["From there."], usage=["Like this."])


@pytest.mark.parametrize("has_var, has_tokenizer", [(True, True), (True, False), (False, True)])
def test_a_card_has_front_matter_sizes_origin_usage_and_what_is_not_known(has_var: bool, has_tokenizer: bool) -> None:
    text = card(VAR(VAR_CONFIG) if has_var else None, make_tokenizer() if has_tokenizer else None)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "nextscale"
    assert ("class-conditional" in yaml.safe_load(front)["tags"]) == has_var
    for part in ("# exports: d1", "(1, 2), 5 tokens", "V = 16, C = 4", "- From there.", "Like this.", "FID", "Licence"):
        assert part in body
    assert (f"{VAR_CONFIG.num_parameters:,} parameters" in body) == has_var
    assert ("8 x 8 pixels" in body) == has_tokenizer


def test_an_unconditional_model_is_called_one() -> None:
    var = VAR(replace(VAR_CONFIG, num_classes=0))
    assert "an unconditional VAR" in card(var, None) and "class-conditional" not in card(var, None)
    assert describe_sizes(var, None)["classes"] == "none (unconditional)"


def test_commands_are_given_for_what_is_there() -> None:
    both = "".join(how_to_use_here(Path("a/d1"), VAR(VAR_CONFIG), make_tokenizer()))
    assert "sample.py --run a/d1" in both and "--init-from a/d1" in both and "encode_codes.py --tokenizer a/d1" in both
    alone = "".join(how_to_use_here(Path("a/d1"), None, make_tokenizer()))
    assert "sample.py" not in alone and "--init-from" not in alone and "encode_codes.py" in alone


@pytest.mark.parametrize("change, shared", [({}, "False"), ({"norm": "shared_adaln"}, "True")])
def test_the_lines_for_the_public_code_are_python_with_all_sizes(change: dict[str, Any], shared: str) -> None:
    var = VAR(replace(VAR_CONFIG, **change))
    text = "\n\n".join(how_to_use_in_public_code(var, make_tokenizer(), FILES))
    ast.parse(text.split("```python\n")[1].split("```")[0])
    arguments = ("V=16", "Cvae=4", "ch=32", "share_quant_resi=0", "num_classes=3", "depth=1", f"shared_aln={shared}")
    assert all(argument in text for argument in arguments)
    assert "--tokenizer tokenizer/vae.pth --var var_d1.pth --out DIR --patch-nums 1 2" in text


def test_what_the_public_code_takes_no_argument_for_is_named() -> None:
    public = VQVAE(VQVAEConfig(autoencoder=AutoencoderConfig(width=32), patch_nums=(1, 2)))
    assert written_into_public_code(VAR(VAR_CONFIG), public) == []
    quantizer = QuantizerConfig(vocab_size=16, code_width=4, phi_ratio=0.25)
    ours = VQVAE(replace(VQVAE_CONFIG, quantizer=quantizer))
    changes = written_into_public_code(VAR(replace(VAR_CONFIG, mlp_ratio=2.0)), ours)
    assert changes == ["ch_mult (1, 1, 1)", "num_res_blocks 1", "quant_resi 0.25", "mlp_ratio 2.0"]
