"""The length of a run follows from its epochs, and settings that make no sense are refused by name."""

from __future__ import annotations

import pytest

from training.loop_config import LoopConfig


@pytest.mark.parametrize(
    "epochs, num_samples, steps",
    [(200, 1_281_167, 333_638), (1, 8, 1), (1, 9, 2), (0.5, 16, 1), (0.001, 8, 1)],
)
def test_a_run_has_enough_steps_for_its_epochs(epochs: float, num_samples: int, steps: int) -> None:
    global_batch = 768 if num_samples > 1000 else 8  # 200 epochs of ImageNet at 768 are 333,637.2 steps
    assert LoopConfig(global_batch=global_batch, epochs=epochs).total_steps(num_samples) == steps


@pytest.mark.parametrize("share", [0.0, -0.2, 1.01, float("nan")])
def test_a_share_to_keep_that_is_no_share_of_the_run_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"loop.keep_at has {share}"):
        LoopConfig(keep_at=(0.5, share))


@pytest.mark.parametrize("name", ["global_batch", "epochs", "log_every", "validate_every", "checkpoint_every"])
def test_a_rhythm_of_zero_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"loop.{name} is 0"):
        LoopConfig(**{name: 0})
