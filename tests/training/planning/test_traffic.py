"""Bytes that must move are those of the weights that exist, of what caches hand out, and of what is kept."""

from __future__ import annotations

import pytest
import torch
from tiny import VAR_CONFIG, make_tokenizer
from torch import Tensor

from models.generation import generate_scales
from models.sampling import Sampling
from models.transformer import LayerCache
from models.var import VAR, VARConfig
from training.engine.engine import EngineConfig
from training.planning.activations import kept_by_block, logit_bytes, saved_by_ends
from training.planning.traffic import generation_bytes, training_bytes

IMAGES = 3


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_keys_and_values_are_those_that_the_caches_of_all_layers_store_and_hand_out(
    cfg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    update = LayerCache.update

    def counted(cache: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = update(cache, k, v)
        moved.extend(each.nbytes for each in (k, v, *found))
        return found

    monkeypatch.setattr(LayerCache, "update", counted)
    sampling = Sampling(cfg=cfg, top_k=1)
    generate_scales(VAR(VAR_CONFIG).eval(), make_tokenizer().eval(), torch.arange(IMAGES) % 2, sampling)
    guidance = sampling.schedule(VAR_CONFIG.scales.num_scales)
    with_images, without = (
        generation_bytes(VAR_CONFIG, guidance, batch=images, bytes_per_number=4) for images in (IMAGES, 0)
    )
    assert with_images - without == sum(moved)


@pytest.mark.parametrize("norm", ["adaln", "shared_adaln", "layer_norm"])
def test_matrices_that_act_on_tokens_are_read_at_every_scale_and_those_of_adaln_once(norm: str) -> None:
    config = VARConfig(depth=2, patch_nums=(1, 2, 3), vocab_size=8, norm=norm)
    sizes = {name: p.numel() for name, p in VAR(config).named_parameters() if p.ndim == 2}
    maps = sum(size for name, size in sizes.items() if "modulation" in name or "final_norm" in name)
    if norm == "shared_adaln":
        maps -= sum(size for name, size in sizes.items() if name.endswith("offset"))  # tables, not maps
    on_tokens = [name for name in sizes if name.startswith(("blocks", "head")) and "modulation" not in name]
    tokens = sum(sizes[name] for name in on_tokens)
    assert generation_bytes(config, (0, 0, 0), batch=0, bytes_per_number=2) == 2 * (3 * tokens + maps)


def test_a_step_moves_weights_and_optimizer_once_and_what_it_keeps_of_each_image_twice() -> None:
    one, two = (EngineConfig(zero_stage=0, precision="fp32", micro_batch=images) for images in (1, 2))
    kept = VAR_CONFIG.depth * kept_by_block(VAR_CONFIG, one) + saved_by_ends(VAR_CONFIG, one)
    an_image = training_bytes(VAR_CONFIG, two) - training_bytes(VAR_CONFIG, one)
    assert an_image == 2 * (kept + logit_bytes(VAR_CONFIG, one))
    a_parameter = (training_bytes(VAR_CONFIG, one) - an_image) / VAR_CONFIG.num_parameters
    assert a_parameter == 12 + 28 + 12  # three passes over weights and gradients; AdamW; clipping
