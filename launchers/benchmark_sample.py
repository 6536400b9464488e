"""`benchmark.py sample`: images drawn from labels, tokens and pictures, ours and the public code's, by batch size.

Settings are the defaults of `Sampling`, which are those of the released models' FID. Weights are initial ones: what is
computed does not depend on them. Rows whose transformer and decoder work in different precisions have no MFU: on a GPU
that is fp32 as a whole too, whose convolutions cuDNN computes in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from launchers.benchmark_config import BenchmarkConfig
from launchers.benchmark_models import make_tokenizer, public_code, var_config
from launchers.benchmark_timing import MIXED, Contestant, Row, time_in_turns
from launchers.machine_limits import convolution_precision, device_type, synchronize
from launchers.public_code import PublicCode
from launchers.sample_plan import SamplePlan
from launchers.sampler import Sampler, compile_both, decoder_precision, speed_up
from models.generation import generate_scales
from models.sampling import Sampling
from models.var import VAR
from models.vqvae import VQVAE
from training.flops import decoding_flops, generation_flops

SAMPLING = Sampling()


@dataclass(frozen=True)
class Drawing:
    """Two models that draw a batch; the tokenizer's decoder is prepared, or plain."""

    var: VAR
    tokenizer: VQVAE
    batch: int

    def codes(self) -> int:
        """Draw codes and feature maps."""
        self._draw()
        synchronize()
        return self.batch

    def images(self) -> int:
        """Draw, and decode."""
        self.tokenizer.decode_features(self._draw())
        synchronize()
        return self.batch

    def _draw(self) -> torch.Tensor:
        labels = torch.arange(self.batch, device=self.var.position_embedding.device) % self.var.config.num_classes
        return generate_scales(self.var, self.tokenizer, labels, SAMPLING, seeds=range(self.batch)).f_hat


def benchmark_sample(config: BenchmarkConfig) -> list[Row]:
    """For each batch size images a second; its first row is the public code, where it is there."""
    var, tokenizer = VAR(var_config(config)).eval().requires_grad_(False), make_tokenizer(config)
    with public_code(config, var, tokenizer) as public:
        var, tokenizer = var.to(device_type()), tokenizer.to(device_type())
        plain = Drawing(var, deepcopy(tokenizer), config.batch)
        speed_up(var, tokenizer, config.precision, compiles=False)
        fast = Drawing(var, tokenizer, config.batch)
        rows = time_in_turns(contestants(config, public, fast) + switches(config, plain, fast), config.repeats)
        for batch in config.batches:
            more = contestants(replace(config, batch=batch), public, replace(fast, batch=batch))
            rows += time_in_turns(more, config.repeats)
    return rows


def contestants(config: BenchmarkConfig, public: PublicCode | None, fast: Drawing) -> list[Contestant]:
    """The public code, where it is there, and ours."""
    flops = flops_per_image(fast, is_folded=True)
    precision = common_precision(config.precision, decoder_precision(config.precision))
    ours = Contestant(f"ours, batch {config.batch}", fast.images, flops, precision=precision)
    if public is None:
        return [ours]
    settings = {"cfg": SAMPLING.cfg, "top_k": SAMPLING.top_k, "top_p": SAMPLING.top_p}
    call = public.timed("sample", batch=config.batch, **settings)
    theirs = Contestant(
        f"public, batch {config.batch}",
        call,
        flops_per_image(fast, is_folded=False),
        precision=common_precision(config.precision, config.precision),  # its autocast spans both
        memory=call.memory,
    )
    return [theirs, ours]


def common_precision(transformer: str, decoder: str) -> str:
    """The precision in which both compute, or MIXED."""
    return transformer if convolution_precision(decoder) == transformer else MIXED


def switches(config: BenchmarkConfig, plain: Drawing, fast: Drawing) -> list[Contestant]:
    """Ours with one thing changed."""
    guidance = SAMPLING.schedule(fast.var.scales.num_scales)
    compiled = replace(fast, var=deepcopy(fast.var), tokenizer=deepcopy(fast.tokenizer))
    folded, unfolded = (flops_per_image(fast, is_folded=is_folded) for is_folded in (True, False))
    alone, whole = config.precision, common_precision(config.precision, decoder_precision(config.precision))
    calls: list[tuple[str, Callable[[], int], int, str]] = [
        ("plain decoder in fp32", plain.images, unfolded, common_precision(alone, "fp32")),
        ("codes alone, no pixels", fast.codes, generation_flops(fast.var.config, guidance), alone),
        ("as sample.py draws", as_the_launcher(fast), folded, whole),
    ]
    if config.compile:
        compile_both(compiled.var, compiled.tokenizer)  # they are prepared: folding again would round twice
        calls.append(("compiled", compiled.images, folded, whole))
    return [
        Contestant(f"ours, {name}, batch {config.batch}", call, flops, precision=precision)
        for name, call, flops, precision in calls
    ]


def as_the_launcher(drawing: Drawing) -> Callable[[], int]:
    """A unit of images, each the same to the last bit whatever is drawn with it, as uint8."""
    plan = SamplePlan(classes=tuple(range(drawing.batch)), per_class=1, batch=drawing.batch)
    sampler = Sampler(drawing.var, drawing.tokenizer, SAMPLING, plan)
    return lambda: len(sampler.draw(0))


def flops_per_image(drawing: Drawing, *, is_folded: bool) -> int:
    """Of codes and pixels, as ours does it; the public code makes each modulation and one scale's logits again."""
    guidance = SAMPLING.schedule(drawing.var.scales.num_scales)
    decoding = decoding_flops(drawing.tokenizer.config, is_folded=is_folded)
    return generation_flops(drawing.var.config, guidance) + decoding
