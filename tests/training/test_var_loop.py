"""Stage 2's step and validation: chance is a function of the position, and the loss is the model's."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, Batch, PlainEngine, code_batch, image_batch, make_tokenizer
from torch import Tensor

from models.attention import MASKED
from models.var import CHECKPOINTINGS, VAR, VARConfig
from training.engine.engine import EngineConfig
from training.losses import token_scores
from training.stage import StepContext
from training.var_loop import VARStage, build_var, drop_labels, step_draws, stochastic_depth

GLOBAL_BATCH = 8
NULL_CLASS = VAR_CONFIG.null_class


def make_stage(
    *,
    accumulation: int = 1,
    label_drop: float = 0.1,
    validation: list[Batch] | None = None,
    config: VARConfig = VAR_CONFIG,
) -> VARStage:
    return VARStage(
        PlainEngine(VAR(config, seed=1), accumulation=accumulation, global_batch=GLOBAL_BATCH),
        make_tokenizer(),
        label_drop=label_drop,
        seed=5,
        validation=lambda: iter(validation or []),
    )


def context(samples_seen: int = 0) -> StepContext:
    return StepContext(samples_seen=samples_seen, progress=0.0, learning_rate=0.1, weight_decay=0.0)


def weights_of(stage: VARStage) -> list[Tensor]:
    return list(stage.engines["model"].model.parameters())


def test_draws_are_a_pure_function_of_seed_and_position() -> None:
    draws = step_draws(5, 64, GLOBAL_BATCH, 3)
    torch.manual_seed(99)
    assert torch.equal(step_draws(5, 64, GLOBAL_BATCH, 3), draws)
    assert not torch.equal(step_draws(5, 72, GLOBAL_BATCH, 3), draws)
    assert not torch.equal(step_draws(6, 64, GLOBAL_BATCH, 3), draws)


def test_draws_are_uniform_numbers_in_float32() -> None:
    draws = step_draws(5, 0, 1000, 10)
    assert draws.dtype == torch.float32 and draws.shape == (1000, 10)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 / math.sqrt(12 * 10_000)  # five standard errors


def test_labels_are_dropped_at_the_rate_asked_for_and_become_the_null_class() -> None:
    labels = torch.arange(10_000) % NULL_CLASS
    dropped = drop_labels(labels, step_draws(0, 0, 10_000, 1)[:, 0], 0.1, NULL_CLASS)
    changed = dropped != labels
    assert (dropped[changed] == NULL_CLASS).all()
    assert abs(changed.double().mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 10_000)  # five standard errors


def test_stochastic_depth_skips_a_branch_or_makes_up_for_the_skipped_ones() -> None:
    depth, rate = 4, 0.3
    factors = stochastic_depth(step_draws(0, 0, 20_000, 2 * depth), rate)
    assert factors.shape == (depth, 2, 20_000)
    for block in range(depth):
        keep = 1 - rate * block / (depth - 1)
        values = factors[block]
        torch.testing.assert_close(values[values > 0].unique(), torch.tensor([1 / keep]))
        standard_error = math.sqrt((1 / keep - 1) / values.numel())
        assert abs(values.mean() - 1) <= 5 * standard_error


def test_the_first_block_is_never_skipped() -> None:
    assert (stochastic_depth(torch.zeros(3, 8), 0.9)[0] == 1).all()
    assert (stochastic_depth(torch.zeros(3, 8), 0.9)[1:] == 0).all()


def test_both_branches_of_a_block_are_skipped_independently() -> None:
    factors = stochastic_depth(step_draws(0, 0, 1000, 4), 0.5)[1]
    assert {(bool(a), bool(b)) for a, b in factors.T} == {(True, True), (True, False), (False, True), (False, False)}


def test_an_untrained_model_costs_ln_v() -> None:
    metrics = make_stage().train_step(iter([code_batch(GLOBAL_BATCH)]), context())
    # the head starts at 0.02 of its usual size, so logits are within a few thousandths of each other
    assert metrics["loss_avg"].item() == pytest.approx(math.log(16), abs=0.01)
    assert metrics["loss_last"].item() == pytest.approx(math.log(16), abs=0.01)


def test_metrics_are_per_scale_and_their_summary() -> None:
    metrics = make_stage().train_step(iter([code_batch(GLOBAL_BATCH)]), context())
    assert metrics["loss"].shape == metrics["error"].shape == (2,)
    torch.testing.assert_close(metrics["loss_avg"], (metrics["loss"][0] + 4 * metrics["loss"][1]) / 5)
    torch.testing.assert_close(metrics["loss_last"], metrics["loss"][1])
    torch.testing.assert_close(metrics["error_last"], metrics["error"][1])
    assert metrics["gradient_norm"] > 0
    assert not any(value.requires_grad for value in metrics.values())


def test_splitting_the_batch_changes_no_draw_and_no_weight() -> None:
    whole, split = make_stage(label_drop=0.5), make_stage(label_drop=0.5, accumulation=4)
    batch = code_batch(GLOBAL_BATCH)
    one = whole.train_step(iter([batch]), context())
    other = split.train_step(iter([batch.rows(slice(start, start + 2)) for start in (0, 2, 4, 6)]), context())
    torch.testing.assert_close(one["loss"], other["loss"])
    torch.testing.assert_close(one["gradient_norm"], other["gradient_norm"])
    # the default tolerance: sums of float32 in another order
    torch.testing.assert_close(weights_of(whole), weights_of(split))


def test_draws_follow_an_image_whatever_its_row() -> None:
    one, other = make_stage(label_drop=0.5), make_stage(label_drop=0.5)
    batch = code_batch(GLOBAL_BATCH, first_position=64)
    order = torch.tensor([7, 0, 3, 1, 6, 2, 5, 4])
    turned = Batch(batch.data[order], batch.labels[order], batch.positions[order], batch.weights[order])
    one.train_step(iter([batch]), context(64))
    other.train_step(iter([turned]), context(64))
    torch.testing.assert_close(weights_of(one), weights_of(other))


def test_labels_are_dropped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = labels_seen(stage := make_stage(label_drop=0.5), monkeypatch)
    batch = code_batch(GLOBAL_BATCH, first_position=16)
    stage.train_step(iter([batch]), context(16))
    dropped = step_draws(5, 16, GLOBAL_BATCH, 1 + 2 * VAR_CONFIG.depth)[:, 0] < 0.5
    assert 0 < dropped.sum() < GLOBAL_BATCH
    assert torch.equal(seen[0], torch.where(dropped, NULL_CLASS, batch.labels))


def labels_seen(stage: VARStage, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels of every forward pass from now on."""
    seen: list[Tensor] = []
    model = stage.engines["model"].model
    forward = model.forward

    def spy(inputs: Tensor, labels: Tensor, **options: Any) -> Tensor:
        seen.append(labels)
        return forward(inputs, labels, **options)

    monkeypatch.setattr(model, "forward", spy)
    return seen


def test_images_are_encoded_on_the_way_to_the_same_step_as_their_codes() -> None:
    images = image_batch(GLOBAL_BATCH)
    codes = Batch(make_tokenizer().encode(images.data), images.labels, images.positions, images.weights)
    one, other = make_stage(), make_stage()
    one.train_step(iter([images]), context())
    other.train_step(iter([codes]), context())
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(other), strict=True))


def test_an_unconditional_model_sees_the_null_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(VAR_CONFIG, num_classes=0)
    seen = labels_seen(stage := make_stage(config=config, validation=[code_batch(3)]), monkeypatch)
    stage.train_step(iter([code_batch(GLOBAL_BATCH)]), context())
    stage.validate()
    assert [len(labels) for labels in seen] == [GLOBAL_BATCH, 3]
    assert all((labels == config.null_class).all() for labels in seen)


def test_validation_uses_true_labels_whatever_the_drop_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = code_batch(4)
    seen = labels_seen(stage := make_stage(label_drop=0.99, validation=[batch]), monkeypatch)
    stage.validate()
    assert torch.equal(seen[0], batch.labels)


def test_validation_is_the_mean_over_images_however_they_are_batched() -> None:
    whole = code_batch(5)
    padded = whole.rows(slice(3, 5)).with_weights(1, 0)  # as a loader ends: a row of weight 0 fills the batch
    stage = make_stage(validation=[whole.rows(slice(0, 3)), padded])
    model = stage.engines["model"].model
    with torch.no_grad():
        four = whole.rows(slice(0, 4))
        logits = model(stage.tokenizer.teacher_forcing_inputs(four.data), four.labels)
        expected = token_scores(logits, four.data, VAR_CONFIG.scales)
    found = stage.validate()
    assert found["loss"] == pytest.approx(expected.loss.mean(0).tolist())
    assert found["error"] == pytest.approx(expected.error.mean(0).tolist())
    assert found["loss_avg"] == pytest.approx((found["loss"][0] + 4 * found["loss"][1]) / 5)


def test_validation_is_in_float32_whatever_trains() -> None:
    """A bf16 engine's master weights, and not the rounded ones, are measured, as a float32 run would measure them."""
    batches = [code_batch(5)]
    exact = make_stage(validation=batches)
    expected = exact.validate()
    rounded = make_stage(validation=batches)
    engine = rounded.engines["model"]
    engine.state = exact.engines["model"].state
    engine.model.to(torch.bfloat16)
    engine.config = EngineConfig(zero_stage=1, precision="bf16")
    found = rounded.validate()
    assert all(found[name] == pytest.approx(expected[name], rel=1e-6) for name in expected)
    logits = engine(*(rounded.tokenizer.teacher_forcing_inputs(batches[0].data).bfloat16(), batches[0].labels))
    loss = token_scores(logits, batches[0].data, VAR_CONFIG.scales).loss.mean(0).tolist()
    assert loss != pytest.approx(expected["loss"], rel=1e-6)


def test_validation_leaves_no_gradients_and_changes_no_weight() -> None:
    stage = make_stage(validation=[code_batch(3)])
    before = [parameter.clone() for parameter in weights_of(stage)]
    stage.validate()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(stage), before, strict=True))
    assert all(parameter.grad is None for parameter in weights_of(stage))


def test_the_tokenizer_stays_as_it_is() -> None:
    stage = make_stage()
    before = {name: value.clone() for name, value in stage.tokenizer.state_dict().items()}
    stage.train_step((code_batch(GLOBAL_BATCH) for _ in count()), context())
    assert all(torch.equal(value, before[name]) for name, value in stage.tokenizer.state_dict().items())


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS)
def test_what_the_engine_says_reaches_the_model(checkpointing: str) -> None:
    engine = EngineConfig(activation_checkpointing=checkpointing, attention=MASKED)
    model = build_var(VAR_CONFIG, engine, seed=0)
    assert model.checkpointing == checkpointing and model.attention == MASKED
