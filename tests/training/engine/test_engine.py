"""The config handed to DeepSpeed: explicit, exact, and accepted by it. Engines that run are in test_distributed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from models.var import VARConfig
from training.engine.cpu_communication import load_cpu_communication
from training.engine.engine import (
    LEAF_CLASSES,
    EngineConfig,
    accumulation_steps,
    compile_deepspeed_config,
)

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")
KINDS = [(stage, precision) for stage in STAGES for precision in PRECISIONS if stage > 0 or precision == "fp32"]


def compiled(**engine: Any) -> dict[str, Any]:
    return compile_deepspeed_config(EngineConfig(micro_batch=2, **engine), global_batch=24, world_size=3)


def test_the_config_holds_the_numbers_of_the_public_recipe() -> None:
    assert [compiled()["gradient_clipping"], compiled(gradient_clipping=0.5)["gradient_clipping"]] == [2.0, 0.5]
    assert compiled(precision="fp16")["fp16"]["initial_scale_power"] == 11  # GradScaler(init_scale=2**11)
    accumulated = [compiled(precision=precision)["data_types"] for precision in ("bf16", "fp16")]
    assert accumulated == [{"grad_accum_dtype": "fp32"}] * 2


def test_prefetch_holds_the_largest_block_twice() -> None:
    width = VARConfig(depth=30).width
    assert EngineConfig().prefetch_bucket_size >= 2 * 18 * width**2  # eq. 8: 66.4 M a block at d30


def test_the_leaf_classes_exist() -> None:
    for path in LEAF_CLASSES:
        module, _, name = path.rpartition(".")
        assert issubclass(getattr(__import__(module, fromlist=[name]), name), torch.nn.Module)


@pytest.mark.parametrize("stage, precision", KINDS)
def test_deepspeed_accepts_the_config_and_reads_it_as_meant(stage: int, precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = compile_deepspeed_config(
        EngineConfig(zero_stage=stage, precision=precision, micro_batch=2), global_batch=8, world_size=1
    )
    assert '"auto"' not in json.dumps(config)  # nothing is left to DeepSpeed to guess
    read = DeepSpeedConfig(config)
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (8, 4)
    assert read.gradient_clipping == (2.0 if stage else 0.0)  # without ZeRO the engine clips
    assert read.zero_config.stage == stage
    assert read.zero_config.overlap_comm == (stage == 3)
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (precision == "bf16", precision == "fp16")


@pytest.mark.parametrize(
    "global_batch, micro_batch, world_size, steps", [(768, 24, 32, 1), (768, 12, 8, 8), (1024, 16, 64, 1), (7, 7, 1, 1)]
)
def test_accumulation_reaches_the_global_batch_exactly(
    global_batch: int, micro_batch: int, world_size: int, steps: int
) -> None:
    assert accumulation_steps(global_batch, micro_batch, world_size) == steps
    assert steps * micro_batch * world_size == global_batch


def test_a_world_or_micro_batch_that_does_not_fit_is_answered_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="global_batch 12 .* world size 5; world sizes that fit: 1, 2, 3, 4, 6, 12"):
        accumulation_steps(12, 1, 5)
    fit = "12 images a rank, .*micro_batch 5; micro-batches that fit: 1, 2, 3, 4, 6, 12"
    with pytest.raises(ValueError, match=fit):
        accumulation_steps(24, 5, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zero_stage": 4}, "engine.zero_stage is 4; accepted: 0, 1, 2, 3"),
        ({"zero_stage": 0, "precision": "bf16"}, "engine.precision bf16 needs engine.zero_stage 1, 2 or 3"),
        ({"attention": "fast"}, "engine.attention is 'fast'; accepted: per_scale, flex, masked"),
        ({"precision": "tf32"}, "engine.precision is 'tf32'; accepted: fp32, bf16, fp16"),
        ({"micro_batch": 0}, "engine.micro_batch is 0"),
        ({"gradient_clipping": -1.0}, "engine.gradient_clipping is -1.0"),
    ],
)
def test_unknown_settings_are_refused_naming_what_is_accepted(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**change)


def test_a_build_that_was_killed_does_not_hold_up_later_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for the file `lock` without end."""
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (0, 0))
    loads: list[bool] = []

    class Builder:
        name = "shm"

        def is_compatible(self, verbose: bool) -> bool:
            return True

        def load(self, verbose: bool) -> None:
            loads.append((tmp_path / "lock").exists())

    accelerator = type("Accelerator", (), {"create_op_builder": lambda self, name: Builder()})()
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.setattr("torch.utils.cpp_extension._get_build_directory", lambda name, verbose: str(tmp_path))
    load_cpu_communication()
    assert loads == [False]
