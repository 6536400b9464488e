"""What ZeRO holds of the weights."""

from __future__ import annotations

from models.var import VARConfig
from training.engine.engine import LIVE_ELEMENTS, EngineConfig
from training.planning.zero_memory import persistent_elements, zero_memory

SIZES = {"depth": 2, "patch_nums": (1, 2, 3), "vocab_size": 32, "code_width": 6, "num_classes": 5}


def test_small_tensors_stay_whole_under_zero_3() -> None:
    config = VARConfig(**SIZES)
    all_of_it, nothing = (
        persistent_elements(config, EngineConfig(zero_stage=3, persistence_threshold=threshold))
        for threshold in (10**9, 0)
    )
    assert (all_of_it, nothing) == (config.num_parameters, 0)


def test_the_weights_of_a_large_model_are_not_whole_at_once() -> None:
    engine = EngineConfig(zero_stage=3, reduce_bucket_size=1)
    for depth, is_whole in ((4, True), (36, False)):
        model = VARConfig(depth=depth)
        held = zero_memory(model, engine, 64, averages=False)
        gathered = (held.loss().weights - held.resting().weights) / 2  # two bytes a number
        assert gathered <= min(model.num_parameters, 1.2 * LIVE_ELEMENTS)
        assert (gathered > 0.9 * model.num_parameters) == is_whole
