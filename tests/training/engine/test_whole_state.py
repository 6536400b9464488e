"""An optimiser's state comes out whole and goes back in. Under DeepSpeed, at all stages and ranks: test_distributed."""

from __future__ import annotations

import torch
from torch import nn

from training.engine.distributed import World
from training.engine.whole_state import WholeState
from training.optim import OptimizerConfig, build_optimizer


def make(seed: int, *, ema_decay: float = 0.0, device: str = "cpu") -> tuple[nn.Module, WholeState]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(device)
    optimizer = build_optimizer(model, OptimizerConfig(base_lr=0.1, ema_decay=ema_decay))
    return model, WholeState(model, optimizer, World())


def learn(model: nn.Module, state: WholeState, steps: int = 3) -> list[float]:
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        loss = model(torch.randn(8, 3, generator=generator)).square().sum()
        state.base.zero_grad()
        loss.backward()
        state.base.step()
        losses.append(loss.item())
    return losses


def test_another_model_goes_on_exactly_from_the_state() -> None:
    model, state = make(0, ema_decay=0.9)
    learn(model, state)
    kept, scalars = {name: tensor.clone() for name, tensor in state.tensors()}, state.scalars()
    other, other_state = make(1, ema_decay=0.9)
    other_state.load(kept.__getitem__)
    other_state.load_scalars(scalars)
    assert learn(other, other_state) == learn(model, state)
    for (name, ours), (_, theirs) in zip(other_state.tensors(), state.tensors(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_names_are_kinds_and_parameters_and_persistent_buffers() -> None:
    _, state = make(0)
    names = [name for name, _ in state.tensors()]
    assert len(names) == len(set(names))
    assert {"weight/0.weight", "exp_avg/2.bias", "exp_avg_sq/1.weight", "weight/1.running_mean"} < set(names)
    assert not any(name.startswith("ema/") for name in names)


def test_a_state_that_never_stepped_has_moments_of_zero_and_an_average_equal_to_the_weights() -> None:
    model, state = make(0, ema_decay=0.5)
    tensors = {name: tensor.clone() for name, tensor in state.tensors()}
    assert state.scalars() == {"step": 0.0}
    assert not tensors["exp_avg/0.weight"].any() and not tensors["exp_avg_sq/0.weight"].any()
    assert torch.equal(tensors["ema/0.weight"], model[0].weight)


def test_all_of_a_state_lies_with_its_parameters() -> None:
    """A fused step takes nothing from another device, its own number included."""
    model, state = make(0, ema_decay=0.5, device="meta")
    list(state.tensors())
    made = [tensor for of_one in state.base.state.values() for tensor in of_one.values()]
    assert len(made) == 4 * len(list(model.parameters())) and all(tensor.is_meta for tensor in made)


def test_asking_for_the_state_does_not_change_what_is_learned() -> None:
    (model, state), (asked, asked_state) = make(0, ema_decay=0.5), make(0, ema_decay=0.5)
    list(asked_state.tensors())
    assert learn(asked, asked_state) == learn(model, state)


def test_one_weight_can_be_read_and_set() -> None:
    model, state = make(0)
    state.set_weight(model[0].bias, torch.arange(4.0))
    assert state.get_weight(model[0].bias).tolist() == model[0].bias.tolist() == [0, 1, 2, 3]
