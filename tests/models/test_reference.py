"""Interoperation with the public code: its recorded outputs, its names and shapes, its files there and back.

tests/data/*.npz hold what FoundationVision/VAR (commit 78b9539, CPU, float32) computes for tiny models whose weights
come from the recipe `recorded_weights`; released_checkpoints.json holds names, shapes and counts of the published
files.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.autoencoder import AutoencoderConfig
from models.generation import edit, generate, known_part
from models.quantizer import QuantizerConfig
from models.reference import (
    BUFFERS,
    tokenizer_from_state_dict,
    tokenizer_to_state_dict,
    var_from_state_dict,
    var_to_state_dict,
)
from models.sampling import filter_logits
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

DATA = Path(__file__).resolve().parents[1] / "data"
RECORDINGS = ("adaln", "shared_adaln")
RELEASED = json.loads((DATA / "released_checkpoints.json").read_text())
TOLERANCE = 1e-4  # of the largest value, the bar; what is seen is below 2e-5


def recorded_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """The weights behind the recordings: drawn from one generator in the order of the sorted names."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name in sorted(name for name in shapes if not name.endswith(BUFFERS)):
        value = torch.randn(shapes[name], generator=generator)
        if name.endswith("scale_mul_1H11"):
            weights[name] = math.log(4) + 0.1 * value
        elif name.endswith("ada_gss"):
            weights[name] = 0.3 * value
        elif name.endswith(("pos_start", "pos_1LC", "class_emb.weight", "lvl_embed.weight")) or "embedding" in name:
            weights[name] = 0.5 * value
        elif value.ndim >= 2:
            weights[name] = value / math.sqrt(math.prod(shapes[name][1:]))
        elif "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.1 * value
        else:
            weights[name] = 0.1 * value
    return weights


@dataclass(frozen=True)
class Recording:
    """The recorded arrays and the two models they are of."""

    arrays: dict[str, Tensor]
    shapes: dict[str, dict[str, list[int]]]
    config: dict[str, Any]

    @property
    def labels(self) -> Tensor:
        return self.arrays["labels"].long()

    def state_dict(self, what: str) -> dict[str, Tensor]:
        return recorded_weights(self.shapes[what], self.config["seed"] + (what == "var"))

    def tokenizer(self) -> VQVAE:
        return tokenizer_from_state_dict(self.state_dict("vae"), self.config["patch_nums"])

    def var(self) -> VAR:
        return var_from_state_dict(self.state_dict("var"), self.config["patch_nums"])


@cache
def read_recording(name: str) -> Recording:
    with np.load(DATA / f"{name}.npz") as file:
        shapes, config = json.loads(str(file["state_dict_shapes"])), json.loads(str(file["config"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key not in ("state_dict_shapes", "config")}
    return Recording(arrays, shapes, config)


@pytest.fixture(params=RECORDINGS)
def recording(request: pytest.FixtureRequest) -> Recording:
    return read_recording(request.param)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_the_tokenizer_computes_what_the_public_one_does(recording: Recording) -> None:
    tokenizer, arrays = recording.tokenizer(), recording.arrays
    codes = tokenizer.encode(arrays["images"])
    assert torch.equal(codes, arrays["tokens"])
    with torch.no_grad():
        assert_close(tokenizer.features(arrays["images"]), arrays["features"])
        assert_close(tokenizer.quantizer.decode(codes), arrays["f_hat"])
    assert_close(tokenizer.decode(codes), arrays["reconstruction"])
    assert_close(tokenizer.teacher_forcing_inputs(codes), arrays["teacher_forcing_input"])


@torch.no_grad()
def test_the_transformer_computes_what_the_public_one_does(recording: Recording) -> None:
    var, arrays, labels = recording.var(), recording.arrays, recording.labels
    inputs = arrays["teacher_forcing_input"]
    assert_close(var(inputs, labels), arrays["logits"])
    assert_close(var(inputs, torch.full_like(labels, var.config.null_class)), arrays["logits_unconditional"])
    assert torch.equal(filter_logits(arrays["logits"], top_k=10, top_p=0.8), arrays["logits_topk10_topp08"])


def test_greedy_sampling_under_guidance_is_that_of_the_public_code(recording: Recording) -> None:
    tokenizer = recording.tokenizer()
    codes = generate(recording.var(), tokenizer, recording.labels, cfg=3.0, top_k=1)
    assert torch.equal(codes, recording.arrays["greedy_tokens_cfg3"])
    assert_close(tokenizer.decode(codes) * 0.5 + 0.5, recording.arrays["greedy_images_cfg3"])


def test_in_painting_is_that_of_the_public_notebook(recording: Recording) -> None:
    tokenizer, arrays = recording.tokenizer(), recording.arrays
    images, mask = arrays["images"], arrays["edit_keep_mask"]
    codes = edit(recording.var(), tokenizer, images, mask, recording.labels, cfg=3.0, top_k=1)
    known = known_part(tokenizer, images, mask, keep_coarsest=True)
    assert torch.equal(codes, torch.where(known.mask, arrays["tokens"], arrays["edit_tokens_cfg3"]))
    assert_close(tokenizer.decode(codes) * 0.5 + 0.5, arrays["edit_images_cfg3"])


def test_recorded_models_go_there_and_back_bit_for_bit(recording: Recording) -> None:
    for what, exported in (
        ("vae", tokenizer_to_state_dict(recording.tokenizer())),
        ("var", var_to_state_dict(recording.var())),
    ):
        assert {name: list(value.shape) for name, value in exported.items()} == recording.shapes[what]
        for name, value in recording.state_dict(what).items():
            assert torch.equal(exported[name], value), name


def patch_nums_of(name: str) -> tuple[int, ...]:
    return PATCH_NUMS_512 if name in ("var_d36", "vae_512") else PATCH_NUMS_256


@pytest.mark.parametrize("name", RELEASED["state_dict_shapes"])
def test_every_name_and_shape_of_the_released_files_comes_in_and_goes_out(name: str) -> None:
    shapes = RELEASED["state_dict_shapes"][name]
    entries = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if name.startswith("vae"):
        model: VQVAE | VAR = tokenizer_from_state_dict(entries, patch_nums_of(name))
        exported = tokenizer_to_state_dict(model)
    else:
        model = var_from_state_dict(entries, patch_nums_of(name))
        exported = var_to_state_dict(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == RELEASED["parameter_counts"][name]
    assert {key: list(value.shape) for key, value in exported.items()} == shapes


def test_sizes_of_the_released_files_are_the_defaults() -> None:
    shapes = RELEASED["state_dict_shapes"]
    entries = {name: {key: torch.empty(shape, device="meta") for key, shape in shapes[name].items()} for name in shapes}
    assert tokenizer_from_state_dict(entries["vae_256"], PATCH_NUMS_256).config == VQVAEConfig()
    assert var_from_state_dict(entries["var_d30"], PATCH_NUMS_256).config == VARConfig(depth=30)
    large = VARConfig(depth=36, patch_nums=PATCH_NUMS_512, norm="shared_adaln")
    assert var_from_state_dict(entries["var_d36"], PATCH_NUMS_512).config == large


@pytest.mark.parametrize(
    "config",
    [
        VARConfig(depth=1, patch_nums=(1, 2), vocab_size=16, code_width=4, num_classes=3),
        VARConfig(depth=3, patch_nums=(2, 3, 5), vocab_size=9, code_width=5, num_classes=1, qk_norm=False),
        VARConfig(
            depth=2, patch_nums=(1,), vocab_size=16, code_width=4, num_classes=7, norm="shared_adaln", mlp_ratio=2.5
        ),
    ],
    ids=str,
)
def test_transformers_of_any_size_and_switch_go_there_and_back(config: VARConfig) -> None:
    var = VAR(config, seed=1)
    back = var_from_state_dict(var_to_state_dict(var), config.patch_nums)
    assert back.config == config
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in var.state_dict().items())


@pytest.mark.parametrize(
    "num_phi, multipliers, num_res_blocks",
    [(0, (1,), 2), (1, (1, 2), 1), (2, (2, 1, 3), 3), (5, (1,), 1)],
)
def test_tokenizers_of_any_size_go_there_and_back(
    num_phi: int, multipliers: tuple[int, ...], num_res_blocks: int
) -> None:
    config = VQVAEConfig(
        (1, 2, 3, 4),
        AutoencoderConfig(32, multipliers, num_res_blocks, code_width=6),
        QuantizerConfig(vocab_size=11, code_width=6, num_phi=num_phi),
    )
    tokenizer = VQVAE(config)
    back = tokenizer_from_state_dict(tokenizer_to_state_dict(tokenizer), config.patch_nums)
    assert back.config == config
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in tokenizer.state_dict().items())


def test_how_the_phi_are_shared_shows_in_their_names() -> None:
    def names(num_phi: int) -> set[str]:
        config = VQVAEConfig((1, 2, 3), AutoencoderConfig(32, (1,), 1, code_width=4), QuantizerConfig(8, 4, num_phi))
        return {name for name in tokenizer_to_state_dict(VQVAE(config)) if name.endswith("weight") and "resi" in name}

    assert names(0) == {f"quantize.quant_resi.{k}.weight" for k in range(3)}
    assert names(1) == {"quantize.quant_resi.qresi.weight"}
    assert names(2) == {f"quantize.quant_resi.qresi_ls.{k}.weight" for k in range(2)}


def test_buffers_are_written_as_the_public_code_makes_them() -> None:
    config = VARConfig(depth=1, patch_nums=(1, 2), vocab_size=16, code_width=4, num_classes=3)
    exported = var_to_state_dict(VAR(config))
    assert exported["lvl_1L"].tolist() == [[0, 1, 1, 1, 1]]
    assert exported["attn_bias_for_masking"][0, 0, 0].tolist() == [0.0] + [-math.inf] * 4
    assert (exported["attn_bias_for_masking"][0, 0, 1:] == 0).all()
    assert not exported["blocks.0.attn.zero_k_bias"].any()


def test_half_precision_files_are_read_as_float32() -> None:
    weights = {name: value.half() for name, value in read_recording("adaln").state_dict("var").items()}
    assert var_from_state_dict(weights, (1, 2, 3, 4)).head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm": "layer_norm"}, "'layer_norm' has no counterpart"),
        ({"num_classes": 0}, "divides by the number of classes"),
    ],
)
def test_models_that_the_public_code_cannot_build_are_not_written_for_it(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        var_to_state_dict(VAR(VARConfig(**({"depth": 1, "patch_nums": (1, 2), "num_classes": 3} | change))))


def test_a_tokenizer_whose_phi_the_files_cannot_state_is_not_written() -> None:
    config = VQVAEConfig((1, 2), AutoencoderConfig(32, (1,), 1, code_width=4), QuantizerConfig(8, 4, phi_ratio=0.2))
    with pytest.raises(ValueError, match="phi_ratio 0.2 is not stated in public files, where it is 0.5"):
        tokenizer_to_state_dict(VQVAE(config))


def damages(name: str, value: Tensor) -> dict[str, dict[str, Tensor]]:
    """What may have happened to an entry: gone, one row too many, one dimension too many."""
    longer = value.new_zeros(value.shape[0] + 1, *value.shape[1:])
    return {"missing": {}, "one row more": {name: longer}, "one dimension more": {name: value[None]}}


SOURCES_OF_SIZES = "encoder.conv_in|encoder.down[.]0[.]block[.]0|[.]0[.]ffn|quant|pos|emb|head"
FREE_ROWS = ("class_emb.weight", "quantize.embedding.weight")  # nothing else tells how many classes or codes there are


@pytest.mark.parametrize("what, read", [("vae", tokenizer_from_state_dict), ("var", var_from_state_dict)])
def test_every_entry_that_is_missing_or_misshapen_is_named(what: str, read: Any) -> None:
    shapes = read_recording("adaln").shapes[what]
    weights = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    names = [name for name in weights if not name.endswith(BUFFERS)]
    sources_of_sizes = [name for name in names if re.search(SOURCES_OF_SIZES, name)]
    for name in {*sources_of_sizes, *names[::20]}:
        for damage, entry in damages(name, weights[name]).items():
            if damage == "one row more" and name in FREE_ROWS:
                continue
            damaged = {key: value for key, value in weights.items() if key != name} | entry
            with pytest.raises(ValueError) as error:
                read(damaged, (1, 2, 3, 4))
            assert name in str(error.value), (damage, name, str(error.value))


@pytest.mark.parametrize("what, read", [("vae", tokenizer_from_state_dict), ("var", var_from_state_dict)])
@pytest.mark.parametrize("stranger", ["blocks.0.attn.mat_qkv.bias", "encoder.down.0.block.0.norm3.weight", "x"])
def test_an_unexpected_entry_is_named(what: str, read: Any, stranger: str) -> None:
    weights = read_recording("adaln").state_dict(what)
    with pytest.raises(ValueError, match=f"unexpected {stranger}"):
        read(weights | {stranger: torch.zeros(1)}, (1, 2, 3, 4))


def test_what_is_no_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match="'epoch' is not a tensor with a name"):
        var_from_state_dict({"epoch": 3}, (1, 2))
    with pytest.raises(ValueError, match="missing or misshapen"):
        var_from_state_dict({}, (1, 2))
    with pytest.raises(ValueError, match="missing or misshapen"):
        tokenizer_from_state_dict({"a": torch.zeros(2)}, (1, 2))


def test_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pos_1LC has 30 positions, patch_nums \(1, 2, 4\) need 21"):
        var_from_state_dict(read_recording("adaln").state_dict("var"), (1, 2, 4))
