"""The reduction keeps names and shapes, waiting is counted and nothing else, durations are short."""

from __future__ import annotations

import pytest
import torch

from training.engine.distributed import World
from training.step_metrics import TimedIterator, format_duration, mean_over_ranks, name_some


def test_the_timed_iterator_counts_only_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr("training.step_metrics.time.monotonic", lambda: next(clock))
    items = TimedIterator(iter("ab"))
    assert next(items) == "a" and next(items) == "b"
    assert items.take_waited() == 5
    with pytest.raises(StopIteration):
        next(items)
    assert items.take_waited() == 0.5 and items.take_waited() == 0


def test_scalars_and_vectors_come_through_the_reduction_in_place() -> None:
    steps = [{"a": torch.tensor(1.5), "b": torch.tensor([1.0, 2.0, 3.0])}, {"a": torch.tensor(2), "b": torch.zeros(3)}]
    assert mean_over_ranks(steps, World()) == [{"a": 1.5, "b": [1.0, 2.0, 3.0]}, {"a": 2.0, "b": [0.0, 0.0, 0.0]}]
    assert mean_over_ranks([{"a": torch.tensor([4.0])}], World()) == [{"a": [4.0]}]


def test_the_reduction_divides_the_sum_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.step_metrics.sum_over_ranks", lambda values, world: 3 * values)  # three equal ranks
    assert mean_over_ranks([{"a": torch.tensor(5.0)}], World(world_size=3)) == [{"a": 5.0}]


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (12.4, "12s"), (59.6, "1m00s"), (200, "3m20s"), (3599.6, "1h00m"), (3720, "1h02m"), (90_000, "25h00m")],
)
def test_durations_are_short_and_round_properly(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_timed_iterator_says_when_it_waits_and_closes_what_reads_ahead() -> None:
    said: list[str] = []

    class ReadsAhead:
        def __next__(self) -> str:
            said.append("read")
            return "a"

        def close(self) -> None:
            said.append("closed")

    items = TimedIterator(ReadsAhead(), said.append)
    next(items)
    items.close()
    assert said == ["waiting for data", "read", "computing", "closed"]
    TimedIterator(iter("a")).close()  # what cannot be closed need not be


def test_many_names_are_cut_short() -> None:
    assert name_some(["a", "b"]) == "samples a, b"
    assert name_some(list("abcdef"), most=2) == "samples a, b and 4 more"
