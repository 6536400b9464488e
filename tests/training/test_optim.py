"""The schedules of the public recipe, and which parameters decay.

The recipe is that of the released code (utils/lr_control.py, README): warm-up over 1/50 of the run from 0.005 of the
peak, constant for 5 % of the rest, then linear to `final_lr_ratio`.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy

import pytest
import torch
from tiny import VAR_CONFIG, make_tokenizer
from torch import nn

from models.discriminator import PatchDiscriminator
from models.var import VAR
from models.vqvae import VQVAE
from training.engine.engine import set_schedule
from training.optim import OptimizerConfig, build_optimizer, learning_rate_factor, weight_decay_at

CONFIG = OptimizerConfig()
DECAY_STARTS = 0.02 + 0.05 * 0.98  # 0.069 of the run


@pytest.mark.parametrize(
    "progress, expected",
    [
        (0.0, 0.005),
        (0.01, 0.005 + 0.995 / 2),
        (0.02, 1.0),
        (0.05, 1.0),
        (DECAY_STARTS, 1.0),
        ((DECAY_STARTS + 1) / 2, 0.55),  # half way from 1 to 0.1
        (1.0, 0.1),
        (1.2, 0.1),  # a run that is past its end stays at the end
    ],
)
def test_learning_rate_is_that_of_the_public_recipe(progress: float, expected: float) -> None:
    assert learning_rate_factor(progress, CONFIG) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("joint", [0.02, DECAY_STARTS])
def test_learning_rate_does_not_jump_at_its_joints(joint: float) -> None:
    before, after = (learning_rate_factor(joint + offset, CONFIG) for offset in (-1e-9, 1e-9))
    assert abs(before - after) < 1e-6  # the steepest slope is 50, over 2e-9 of the run


@pytest.mark.parametrize("changes", [{"warmup_share": 0.0}, {"warmup_share": 1.0}, {"constant_share": 1.0}])
def test_a_phase_may_be_absent_or_all_there_is(changes: dict[str, float]) -> None:
    factors = [learning_rate_factor(i / 10, OptimizerConfig(**changes)) for i in range(11)]
    assert all(0 < factor <= 1 for factor in factors)


def test_weight_decay_follows_half_a_cosine() -> None:
    config = OptimizerConfig(weight_decay=0.05, final_weight_decay=0.08)  # d30
    assert weight_decay_at(0.0, config) == pytest.approx(0.05)
    assert weight_decay_at(0.5, config) == pytest.approx(0.065)
    assert weight_decay_at(0.25, config) == pytest.approx(0.065 - 0.015 * 2**-0.5)
    assert weight_decay_at(1.0, config) == weight_decay_at(2.0, config) == pytest.approx(0.08)


@pytest.mark.parametrize(
    "name, global_batch, base_lr, peak",
    [("d16", 768, 1e-4, 3.0e-4), ("d20", 768, 1e-4, 3.0e-4), ("d24", 768, 8e-5, 2.4e-4), ("d30", 1024, 8e-5, 3.2e-4)],
)
def test_peak_learning_rates_are_those_of_the_released_models(
    name: str, global_batch: int, base_lr: float, peak: float
) -> None:
    assert OptimizerConfig(base_lr=base_lr).peak_lr(global_batch) == pytest.approx(peak), name


def decayed(model: nn.Module, undecayed: Collection[str] = ()) -> set[str]:
    """The names of the parameters that decay."""
    optimizer = build_optimizer(model, CONFIG, undecayed=undecayed)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay_scale"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in decaying}


def test_the_matrices_of_a_transformer_decay_its_vectors_and_positions_do_not() -> None:
    block = ("attention.qkv", "attention.proj", "feed_forward.fc1", "feed_forward.fc2", "modulation.linear")
    matrices = {f"blocks.0.{name}.weight" for name in block}
    matrices |= {f"{name}.weight" for name in ("input_embedding", "class_embedding", "final_norm.linear", "head")}
    model = VAR(VAR_CONFIG)
    assert decayed(model, model.names_without_weight_decay()) == matrices  # the public code decays its class_emb, too


@pytest.mark.parametrize("network", [make_tokenizer(), PatchDiscriminator(8, 1)], ids=["tokenizer", "discriminator"])
def test_biases_and_norms_of_the_convolutional_networks_do_not_decay(network: nn.Module) -> None:
    convolutions = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    codebook = {"quantizer.codebook"} if isinstance(network, VQVAE) else set()
    assert decayed(network) == convolutions | codebook


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = VAR(VAR_CONFIG)
    optimizer = build_optimizer(model, CONFIG, undecayed=model.names_without_weight_decay())
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = build_optimizer(model, CONFIG).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(model.weight)]


def test_the_schedule_reaches_every_group_and_decays_only_its_own() -> None:
    model = VAR(VAR_CONFIG)
    optimizer = build_optimizer(model, CONFIG, undecayed=model.names_without_weight_decay())
    set_schedule(optimizer, 3e-4, 0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_optimizer_is_adamw_with_the_betas_and_the_epsilon_of_the_config(ema_decay: float) -> None:
    config = OptimizerConfig(beta1=0.8, epsilon=1e-3, ema_decay=ema_decay)
    group = build_optimizer(nn.Linear(2, 2), config).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-3)


@pytest.mark.parametrize(
    "name, value", [("base_lr", 0.0), ("warmup_share", -0.1), ("final_lr_ratio", 2.0), ("ema_decay", 1.0)]
)
def test_impossible_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{name} is {value}"):
        OptimizerConfig(**{name: value})


def test_the_average_follows_the_weights_with_its_decay() -> None:
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(model, OptimizerConfig(base_lr=0.1, ema_decay=0.75))
    expected = model.weight.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    assert torch.allclose(optimizer.state[model.weight]["ema"], expected)


def test_averaging_does_not_change_the_weights() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(2, 1)
    averaged = deepcopy(plain)
    for model, decay in ((plain, 0.0), (averaged, 0.9)):
        optimizer = build_optimizer(model, OptimizerConfig(base_lr=0.1, ema_decay=decay))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
    assert torch.equal(plain.weight, averaged.weight)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_twenty_fused_steps_are_those_of_the_plain_optimizer(ema_decay: float) -> None:
    fused_model, plain_model = VAR(VAR_CONFIG, seed=1), VAR(VAR_CONFIG, seed=1)
    config = OptimizerConfig(ema_decay=ema_decay)
    fused, plain = (build_optimizer(model, config) for model in (fused_model, plain_model))
    for group in plain.param_groups:
        group["fused"] = False
    for step in range(20):
        for one, other in zip(fused_model.parameters(), plain_model.parameters()):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        for optimizer in (fused, plain):
            set_schedule(optimizer, 1e-3, 0.05)
            optimizer.step()
    for one, other in zip(fused_model.parameters(), plain_model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
