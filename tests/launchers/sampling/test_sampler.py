"""launchers/sampling/sampler.py: an image is the same whatever is drawn with it, and a failing rank says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VAR_CONFIG, make_tokenizer

from launchers.sampling import sampler as sampler_module
from launchers.sampling.pictures import to_uint8
from launchers.sampling.plan import SamplePlan
from launchers.sampling.sampler import DECODED_TOGETHER, Progress, Sampler, decode_in_parts, draw_all, speed_up
from models.generation import generate_scales
from models.sampling import Sampling
from models.var import VAR
from training.engine.distributed import World

LIVELY = replace(VAR_CONFIG, init_head=1.0, init_gamma=0.5)  # logits that depend on the class and on earlier scales
PLAN = SamplePlan(classes=(0, 1, 2), per_class=20, batch=50)


def make_sampler(plan: SamplePlan = PLAN, *, dtype: torch.dtype = torch.float32, **sampling: Any) -> Sampler:
    return Sampler(VAR(LIVELY).eval().to(dtype), make_tokenizer().eval(), Sampling(**sampling), plan)


def draw(sampler: Sampler) -> np.ndarray:
    return np.concatenate([sampler.draw(unit) for unit in range(sampler.plan.num_units)])


@pytest.mark.parametrize("batch", [1, 7])
def test_images_are_the_same_to_the_last_bit_in_batches_of_1_7_and_50(batch: int) -> None:
    images = draw(make_sampler())
    assert images.shape == (60, 8, 8, 3) and images.dtype == np.uint8
    assert np.array_equal(images, draw(make_sampler(replace(PLAN, batch=batch))))


def test_an_image_depends_on_its_class_and_number_alone() -> None:
    few = draw(make_sampler(SamplePlan(classes=(2, 1), per_class=3, batch=2)))
    assert np.array_equal(few, draw(make_sampler())[[40, 41, 42, 20, 21, 22]])


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_images_do_not_depend_on_the_threads_of_a_rank(request: pytest.FixtureRequest) -> None:
    """Two ranks share the cores that one rank has for itself."""
    images = draw(make_sampler())
    request.getfixturevalue("two_threads")
    assert np.array_equal(images, draw(make_sampler()))


@pytest.mark.parametrize("number", [1, 4, 9])
def test_every_part_is_decoded_in_one_size_and_by_one_thread(two_threads: None, number: int) -> None:
    """Convolutions of another batch, or split over threads, are rounded otherwise, and a pixel may tip over."""
    seen = set()

    def watch(images: torch.Tensor) -> torch.Tensor:
        seen.add((len(images), torch.get_num_threads()))
        return images

    levels = torch.arange(number)[:, None, None, None].expand(number, 3, 2, 2) / 127.5 - 1
    assert decode_in_parts(watch, levels)[:, 0, 0, 0].tolist() == list(range(number))
    assert seen == {(1, 1)} and torch.get_num_threads() == 2


def test_another_seed_gives_other_images_and_few_are_alike() -> None:
    images = draw(make_sampler())
    assert not np.array_equal(images, draw(make_sampler(replace(PLAN, seed=1))))
    assert len({image.tobytes() for image in images}) > 50


def test_a_batch_is_padded_to_the_size_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def watch(var: VAR, tokenizer: Any, labels: torch.Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(len(labels))
        return generate_scales(var, tokenizer, labels, *rest, **more)

    monkeypatch.setattr(sampler_module, "generate_scales", watch)
    assert len(draw(make_sampler(replace(PLAN, batch=7)))) == 60
    assert sizes == [7] * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_valid_images_that_do_not_depend_on_how_many_are_left(dtype: torch.dtype) -> None:
    """5 of 40 images come in a last batch of their own here, and in the middle of one there."""
    images = draw(make_sampler(replace(PLAN, batch=35), dtype=dtype))
    assert len({image.tobytes() for image in images}) > 50
    other_classes = SamplePlan(classes=(1, 2), per_class=20, batch=35)
    assert np.array_equal(images[20:], draw(make_sampler(other_classes, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_codes_of_the_codebook_mostly_those_of_float32(dtype: torch.dtype) -> None:
    labels, seeds = torch.arange(60) % 3, range(60)
    codes = {}
    for precision in (torch.float32, dtype):
        sampler = make_sampler(dtype=precision)
        drawn = generate_scales(sampler.var, sampler.tokenizer, labels, sampler.sampling, seeds=seeds)
        codes[precision] = drawn.codes
        assert drawn.f_hat.dtype == torch.float32 and bool(drawn.f_hat.isfinite().all())
    assert codes[dtype].dtype == torch.int64
    assert codes[dtype].min() >= 0 and codes[dtype].max() < LIVELY.vocab_size
    assert (codes[dtype] == codes[torch.float32]).float().mean() > 0.9  # chance: 1/16


def test_fast_models_draw_the_same_images_within_a_grey_level() -> None:
    plain, fast = make_sampler(), make_sampler()
    speed_up(fast.var, fast.tokenizer, "fp32", compiles=False)
    assert np.abs(draw(plain).astype(int) - draw(fast)).max() <= 1


@pytest.mark.parametrize(
    ("precision", "of_transformer", "of_decoder"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float32),
    ],
)
def test_precision_is_of_the_transformer_and_bf16_of_the_decoder_too(
    precision: str, of_transformer: torch.dtype, of_decoder: torch.dtype
) -> None:
    sampler = make_sampler()
    speed_up(sampler.var, sampler.tokenizer, precision, compiles=False)
    assert sampler.var.head.weight.dtype == of_transformer
    assert sampler.tokenizer.decoder.conv_out.weight.dtype == of_decoder
    assert sampler.tokenizer.quantizer.codebook.dtype == sampler.tokenizer.encoder.conv_in.weight.dtype == torch.float32
    assert len({image.tobytes() for image in draw(sampler)}) > 50


def test_smoothed_images_are_decoded_from_the_smoothed_feature_map() -> None:
    """Its codes are the likeliest tokens, which smoothing has mixed with others."""
    sampler = make_sampler(SamplePlan(classes=(0, 1, 2), per_class=4, batch=12), smooth=True)
    images = sampler.plan.unit(0)
    labels, seeds = torch.from_numpy(sampler.plan.labels(images)), torch.from_numpy(sampler.plan.seeds(images))
    drawn = generate_scales(sampler.var, sampler.tokenizer, labels, sampler.sampling, seeds=seeds)
    wanted = to_uint8(torch.cat([sampler.tokenizer.decode_features(f_hat[None]) for f_hat in drawn.f_hat]))
    assert np.array_equal(sampler.draw(0), wanted)
    assert not np.array_equal(wanted, to_uint8(sampler.tokenizer.decode(drawn.codes)))


@pytest.mark.parametrize("number", [1, DECODED_TOGETHER, DECODED_TOGETHER + 1])
def test_decoding_in_parts_is_decoding(number: int) -> None:
    tokenizer = make_tokenizer().eval()
    codes = torch.randint(16, (number, 5), generator=torch.Generator().manual_seed(0))
    images = decode_in_parts(tokenizer.decode, codes)
    # 1: convolutions of another batch size may differ in the last bit, and a pixel may lie between two levels
    assert np.abs(images.astype(int) - to_uint8(tokenizer.decode(codes))).max() <= 1


class InMemory:
    """Files of the units drawn, and a disk that is full when `fail_at` comes."""

    def __init__(self, fail_at: int = -1) -> None:
        self.units: dict[int, np.ndarray] = {}
        self.fail_at = fail_at

    def write(self, unit: int, images: np.ndarray) -> None:
        if unit == self.fail_at:
            raise OSError("disk full")
        self.units[unit] = images


def test_ranks_share_the_pending_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "agree_on_error", lambda error, world: None)
    drawn = []
    for rank in range(3):
        files = InMemory()
        draw_all(make_sampler(replace(PLAN, batch=7)), files, [0, 2, 3, 8], World(rank, 3), lambda text: None)
        drawn.append(sorted(files.units))
    assert drawn == [[0, 8], [2], [3]]


def test_a_disk_that_is_full_ends_the_drawing_and_keeps_what_was_written() -> None:
    files = InMemory(fail_at=2)
    with pytest.raises(OSError, match="disk full"):
        draw_all(make_sampler(replace(PLAN, batch=7)), files, range(9), World(), lambda text: None)
    assert sorted(files.units) == [0, 1]


def test_a_batch_too_large_for_the_gpu_is_an_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler_module, "generate_scales", fail)
    with pytest.raises(ValueError, match="batch is 50, too large for the GPU's memory; choose a smaller one"):
        draw_all(make_sampler(), InMemory(), [0], World(), lambda text: None)


def test_progress_says_how_many_there_are_how_fast_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(sampler_module.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    progress = Progress(50_000, 40_000, said.append)
    for seconds, images in ((1, 100), (7, 700), (1, 100), (1, 39_100)):
        clock[0] += seconds
        progress.add(images)
    to_go = timedelta(seconds=392)  # 39,200 images are left after 8 seconds, at 100 a second
    assert said[0] == f"images 10,800 of 50,000  100/s  {to_go} to go"
    assert len(said) == 2 and said[1].startswith("images 50,000 of 50,000") and said[1].endswith("0:00:00 to go")
