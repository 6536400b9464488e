"""What each ZeRO stage holds is the closed form of its row, and the sizes it is made of are those of the model."""

from __future__ import annotations

from typing import Any

import pytest

from models.var import NORMS, VAR, VARConfig
from training.engine.engine import EngineConfig
from training.planning import zero_memory as planning
from training.planning.zero_memory import (
    BACKWARD,
    LOSS,
    REDUCTION,
    RESTING,
    UPDATE,
    Sizes,
    block_elements,
    persistent_sizes,
    tensor_sizes,
    zero_memory,
)

MODEL = VARConfig(depth=4, patch_nums=(1, 2, 3), vocab_size=64)
BLOCK = 18 * 256**2 + 14 * 256 + 4  # width 256: AdaLN, attention with one scale a head, feed-forward
LARGEST = 6 * 256**2  # elements of a block's AdaLN map
N, BUCKET = MODEL.num_parameters, 1_000_000
HALF, DONE = (N + 1) // 2, 2_000_000
SMALL = 500_000  # elements of the gathered weights in the row that limits them
Bytes = tuple[float, float, float, float]  # weights, gradients, optimizer, buckets
STAGE_0, STAGE_1, STAGE_1_BF16, STAGE_2, STAGE_3 = (
    {"zero_stage": stage, "precision": precision}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"))
)

ROWS: list[tuple[dict[str, Any], int, bool, dict[str, Bytes]]] = [  # engine, ranks, moving average, bytes by moment
    (
        STAGE_0,
        2,
        False,
        {
            RESTING: (4 * N, 0, 8 * N, 0),
            BACKWARD: (4 * N, 4 * DONE, 8 * N, 0),
            REDUCTION: (4 * N, 4 * N, 8 * N, 4 * N),
            UPDATE: (4 * N, 4 * N, 8 * N, 0),
        },
    ),
    (STAGE_0, 1, True, {REDUCTION: (4 * N, 4 * N, 12 * N, 0)}),
    (
        STAGE_1,
        2,
        False,
        {
            LOSS: (4 * N, 0, 12 * HALF, 0),
            BACKWARD: (4 * N, 4 * DONE, 12 * HALF, 4 * BUCKET),
            REDUCTION: (4 * N, 4 * (N - BUCKET + HALF), 12 * HALF, 8 * BUCKET),
            UPDATE: (4 * N, 4 * HALF, 12 * HALF, 4 * HALF),
        },
    ),
    (
        STAGE_1_BF16,
        2,
        True,
        {
            RESTING: (2 * N, 4 * N, 16 * HALF, 0),
            BACKWARD: (2 * N, 4 * N + 2 * DONE, 16 * HALF, 0),
            REDUCTION: (2 * N, 6 * N, 16 * HALF, 6 * N),
            UPDATE: (2 * N, 6 * N, 16 * HALF, 0),
        },
    ),
    (STAGE_1_BF16, 1, False, {REDUCTION: (2 * N, 6 * N, 12 * N, 0)}),
    (STAGE_1 | {"precision": "fp16"}, 1, False, {REDUCTION: (2 * N, 4 * (2 * N - BUCKET), 12 * N, 10 * BUCKET)}),
    (
        STAGE_2,
        2,
        False,
        {
            LOSS: (2 * N, 0, 12 * HALF, 0),
            BACKWARD: (2 * N, 4 * HALF, 12 * HALF, 4 * BUCKET),
            REDUCTION: (2 * N, 4 * HALF, 12 * HALF, 4 * BUCKET),
            UPDATE: (2 * N, 4 * HALF, 12 * HALF, 8 * LARGEST),
        },
    ),
    (STAGE_2 | {"reduce_bucket_size": 10**7}, 2, False, {BACKWARD: (2 * N, 0, 12 * HALF, 2 * 10**7)}),
    (
        STAGE_3 | {"persistence_threshold": 0},
        2,
        False,
        {
            RESTING: (2 * HALF, 4 * HALF, 12 * HALF, 2 * BUCKET),
            LOSS: (2 * (HALF + N), 4 * HALF, 12 * HALF, 2 * BUCKET),
            BACKWARD: (2 * (HALF + N - DONE), 4 * HALF + 2 * BLOCK, 12 * HALF, 6 * BUCKET),
            REDUCTION: (2 * HALF, 4 * HALF, 12 * HALF, 6 * BUCKET),
            UPDATE: (2 * HALF, 8 * HALF, 12 * HALF, 2 * BUCKET),
        },
    ),
    (
        STAGE_3 | {"persistence_threshold": 0, "reduce_bucket_size": 2_500_000},  # the next block overfills it
        2,
        False,
        {BACKWARD: (2 * (HALF + N - DONE), 4 * HALF + 2 * BLOCK, 12 * HALF, 2 * (2_500_000 + DONE) + 2 * DONE)},
    ),
    (STAGE_3, 1, False, {LOSS: (2 * N, 4 * N, 12 * N, 2 * BUCKET)}),
]


@pytest.mark.parametrize("engine, ranks, averages, expected", ROWS)
def test_bytes_are_those_of_the_closed_form(
    engine: dict[str, Any], ranks: int, averages: bool, expected: dict[str, Bytes]
) -> None:
    config = EngineConfig(**{"reduce_bucket_size": BUCKET} | engine)
    for name, (weights, gradients, optimizer, buckets) in expected.items():
        held = zero_memory(Sizes(MODEL, config, ranks, averages), name, DONE if name == BACKWARD else 0)
        assert held.name == name
        assert (held.weights, held.gradients, held.optimizer, held.buckets) == (weights, gradients, optimizer, buckets)
        assert held.total == weights + gradients + optimizer + buckets


def test_a_large_model_reduces_its_gradients_in_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PLAIN_BUCKET", N - 1)
    assert zero_memory(Sizes(MODEL, EngineConfig(**STAGE_1_BF16), 2, False), REDUCTION).buckets == 2 * N


def test_stage_3_gathers_at_most_live_elements_and_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LIVE_ELEMENTS", SMALL)
    for done, whole in ((0, SMALL + BLOCK), (N - 1000, 1000)):
        held = zero_memory(Sizes(MODEL, EngineConfig(**STAGE_3), 2, False), BACKWARD, done)
        assert held.weights == 2 * (HALF + whole)


def test_small_tensors_stay_whole_under_stage_3() -> None:
    for threshold, elements in ((0, 0), (10**9, N)):
        engine = EngineConfig(zero_stage=3, persistence_threshold=threshold)
        assert sum(persistent_sizes(MODEL, engine)) == elements
        assert zero_memory(Sizes(MODEL, engine, 2, False), RESTING).weights == 2 * (HALF + elements)


@pytest.mark.parametrize("norm", NORMS)
def test_no_parameter_is_left_out(norm: str) -> None:
    config = VARConfig(depth=2, patch_nums=(1, 2, 3), vocab_size=32, code_width=6, num_classes=5, norm=norm)
    assert sum(tensor_sizes(config)) == config.num_parameters
    assert block_elements(config) == sum(parameter.numel() for parameter in VAR(config).blocks[1].parameters())
