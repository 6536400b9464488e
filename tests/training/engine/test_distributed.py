"""Two ranks equal one, every ZeRO stage equals plain training, and a run in parts equals an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_world import ForkServer
from safetensors.torch import load_file

STAGES = ("stage0", "stage1", "stage2", "stage3")
# what depends on the clock, or on how many steps lie between two fetches of metrics
INCIDENTAL = (
    *("images_per_second", "tokens_per_second", "data_wait_share", "goodput", "time"),
    *("codebook_use", "codebook_use_all"),
)


def run_world(server: ForkServer, world_size: int, out: Path) -> Path:
    out.mkdir()
    world = server.run("distributed_worker:main", {"out": str(out)}, world_size=world_size, timeout=400)
    assert set(world.exit_codes) == {0}, world.explain()[-8000:]
    return out


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("worlds")
    return {world_size: run_world(fork_server, world_size, root / f"world{world_size}") for world_size in (1, 2)}


@pytest.fixture(scope="module")
def results(worlds: dict[int, Path]) -> dict[int, dict[str, Any]]:
    return {world_size: json.loads((out / "rank0.json").read_text()) for world_size, out in worlds.items()}


def curve(records: list[dict[str, Any]], name: str) -> list[Any]:
    return [record[name] for record in records if name in record]


def lasting(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in INCIDENTAL} for record in records]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_give_the_loss_curve_of_one(results: dict[int, dict[str, Any]], stage: str) -> None:
    one, two = results[1][stage], results[2][stage]
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for name in ("loss_avg", "loss_last", "error_avg", "gradient_norm"):
        # fp32 sums in another order; the bar is 1e-4
        assert curve(two, name) == pytest.approx(curve(one, name), abs=1e-4)


def test_two_ranks_play_the_adversarial_game_of_one(results: dict[int, dict[str, Any]]) -> None:
    """They cut the batch otherwise than one does; the adaptive weight is that of the whole."""
    one, two = results[1]["adversarial"], results[2]["adversarial"]
    assert any(curve(one, "discriminator_loss"))
    for name in ("loss", "adversarial_loss", "discriminator_loss", "gradient_norm"):
        assert curve(two, name) == pytest.approx(curve(one, name), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("stage", STAGES[1:])
def test_zero_changes_nothing_but_memory(results: dict[int, dict[str, Any]], stage: str) -> None:
    plain, sharded = results[2]["stage0"], results[2][stage]
    for name in ("loss_avg", "gradient_norm"):
        assert curve(sharded, name) == pytest.approx(curve(plain, name), abs=1e-4)


def test_training_learns_something(results: dict[int, dict[str, Any]]) -> None:
    train = [record for record in results[2]["stage3"] if record["kind"] == "train"]
    assert train[-1]["loss_avg"] < train[0]["loss_avg"] - 0.01


@pytest.mark.parametrize("run", [*STAGES, "adversarial", "bf16_stage1", "bf16_stage3"])
def test_a_run_in_parts_equals_an_uninterrupted_one_bit_for_bit(
    results: dict[int, dict[str, Any]], worlds: dict[int, Path], run: str
) -> None:
    """Losses per scale, errors, gradient norms and validation of every step; weights, their average, and moments."""
    assert lasting(results[2][f"{run}_parts"]) == lasting(results[2][run])
    whole, parts = (worlds[2] / name / "checkpoints" / "step-00000006" for name in (run, f"{run}_parts"))
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.safetensors"))
    assert {"weights/model.safetensors", "ema/model.safetensors"} < set(names) and len(names) == 4
    for name in names:
        ours, wanted = load_file(parts / name), load_file(whole / name)
        assert ours.keys() == wanted.keys()
        # random states differ: the worker did other things
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted if not key.startswith("random/")), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_under_another_zero_stage_and_with_another_number_of_ranks(
    results: dict[int, dict[str, Any]], stage: str
) -> None:
    assert_same_curve(results[2][f"{stage}_other_stage"], results[2][stage])
    assert_same_curve(results[2][f"{stage}_other_world"], results[1][stage])


def assert_same_curve(resumed: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    assert [(record["kind"], record["step"]) for record in resumed] == [(r["kind"], r["step"]) for r in whole]
    for name in ("loss_avg", "loss_last"):
        # sums in another order; the bar is 1e-5
        assert curve(resumed, name) == pytest.approx(curve(whole, name), abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_the_same_whole_weights(worlds: dict[int, Path], stage: str) -> None:
    files = [next((worlds[n] / stage).glob("checkpoints/*6/ema/model.safetensors")) for n in (1, 2)]
    one, two = (load_file(file) for file in files)
    assert one.keys() == two.keys()
    for name in one:
        # six AdamW steps divide small gradients by their own size, so rounding grows to about the learning rate
        assert (one[name] - two[name]).abs().max() < 1e-4, name


def test_the_tokenizer_trains_alike_on_two_ranks_restarted_codes_included(results: dict[int, dict[str, Any]]) -> None:
    for name in ("loss", "pixel_loss", "quantization_loss", "psnr"):
        # codes near a boundary may flip under rounding; 1e-3 is far below what a wrong restart would do
        assert curve(results[2]["tokenizer"], name) == pytest.approx(curve(results[1]["tokenizer"], name), rel=1e-3)


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_bf16_learns_as_float32_does_from_exactly_the_same_weights(
    results: dict[int, dict[str, Any]], stage: str
) -> None:
    low, full = curve(results[2][f"bf16_{stage}"], "loss_avg"), curve(results[2][stage], "loss_avg")
    # over these six steps the loss falls by 0.04; bf16 keeps 8 bits of numbers that average out
    assert low == pytest.approx(full, abs=2e-3)
    assert results[2][f"bf16_{stage}_initial_error"] == 0


def test_the_discriminator_joins_after_its_start(results: dict[int, dict[str, Any]]) -> None:
    losses = curve(results[2]["adversarial"], "discriminator_loss")
    assert losses[:2] == [0, 0]  # 30 % of six steps
    assert losses[2] == pytest.approx(1.0, abs=0.2)  # the hinge loss of logits near 0
    assert len(set(losses[2:])) == 4  # from then on it moves with every step


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("engine", ["0_fp32", "1_bf16", "2_bf16", "3_bf16"])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    results: dict[int, dict[str, Any]], engine: str, world_size: int
) -> None:
    bad, sound = results[world_size][f"bad_step_{engine}"]
    assert bad == 0 and 0 < sound < 0.1


def test_zero_3_gathers_each_block_as_a_whole(results: dict[int, dict[str, Any]]) -> None:
    assert results[2]["leaves"] == ["blocks.0", "blocks.1"]


def test_a_validation_is_that_of_the_pictures_of_all_ranks(results: dict[int, dict[str, Any]]) -> None:
    alone, shared = results[1]["validation"], results[2]["validation"]
    for name, value in alone["both"].items():
        assert shared["both"][name] == pytest.approx(value), name
    for name in ("squared_error", "psnr"):  # which one picture would not have given
        assert alone["both"][name] != pytest.approx(alone["first"][name], rel=1e-3), name


def test_an_error_on_one_rank_becomes_the_same_line_on_all(worlds: dict[int, Path]) -> None:
    said = [json.loads((worlds[2] / f"rank{rank}.json").read_text())["error"] for rank in (0, 1)]
    assert said == ["rank 1: disk full"] * 2
