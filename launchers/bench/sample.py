"""`benchmark.py sample`: images drawn from labels, tokens and pictures, ours and the public code's, by batch size.

Settings are the defaults of `Sampling`, which are those of the released models' FID. Rows whose transformer and decoder
work in different precisions have no MFU: on a GPU that is fp32 as a whole too, since cuDNN computes in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from launchers.bench.config import BenchmarkConfig
from launchers.bench.machine_limits import common_precision, device_type, synchronize
from launchers.bench.models import make_tokenizer, make_var, public_code
from launchers.bench.public_code import PublicCode
from launchers.bench.timing import Contestant, Row, time_in_turns
from launchers.sampling.plan import SamplePlan
from launchers.sampling.sampler import Sampler, compile_both, decoder_precision, speed_up
from models.generation import generate_scales
from models.sampling import Sampling
from models.var import VAR
from models.vqvae import VQVAE
from training.engine.engine import PRECISIONS
from training.flops import decoding_flops, generation_flops
from training.planning.traffic import generation_bytes

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
    var, tokenizer = make_var(config).eval().requires_grad_(False), make_tokenizer(config)
    with public_code(config, var, tokenizer) as public:
        tokenizer = tokenizer.to(device_type())
        unfolded = deepcopy(tokenizer)
        speed_up(var, tokenizer, config.precision, compiles=False)
        eager = Drawing(var, tokenizer, config.batch)
        fast = compiled(eager) if config.compile else eager
        rows = contestants(config, public, fast) + switches(config, fast, eager, replace(fast, tokenizer=unfolded))
        found = time_in_turns(rows, config.repeats)
        for batch in config.batches:
            more = contestants(replace(config, batch=batch), public, replace(fast, batch=batch))
            found += time_in_turns(more, config.repeats)
    return found


def compiled(drawing: Drawing) -> Drawing:
    """A copy, compiled: the models are prepared already, and to fold again would round twice."""
    fast = replace(drawing, var=deepcopy(drawing.var), tokenizer=deepcopy(drawing.tokenizer))
    compile_both(fast.var, fast.tokenizer)
    return fast


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
        elsewhere=call,
    )
    return [theirs, ours]


def switches(config: BenchmarkConfig, fast: Drawing, eager: Drawing, unfolded: Drawing) -> list[Contestant]:
    """Ours with one thing changed."""
    folded, plain = (flops_per_image(fast, is_folded=is_folded) for is_folded in (True, False))
    alone, whole = config.precision, common_precision(config.precision, decoder_precision(config.precision))
    found = [
        Contestant("plain decoder in fp32", unfolded.images, plain, precision=common_precision(alone, "fp32")),
        codes_alone(config, fast),
        Contestant("as sample.py draws", as_the_launcher(fast), folded, precision=whole, has_threads=True),
    ]
    if config.compile:
        found.append(Contestant("not compiled", eager.images, folded, precision=whole))
    return [replace(each, name=f"ours, {each.name}, batch {config.batch}") for each in found]


def codes_alone(config: BenchmarkConfig, fast: Drawing) -> Contestant:
    """The transformer's part: with few images at once, reading its weights at every scale is most of it."""
    model, guidance = fast.var.config, SAMPLING.schedule(fast.var.scales.num_scales)
    size = PRECISIONS[config.precision].itemsize
    moved = generation_bytes(model, guidance, batch=config.batch, bytes_per_number=size)
    return Contestant(
        "codes alone, no pixels",
        fast.codes,
        flops_per_image=generation_flops(model, guidance),
        bytes_per_image=moved / config.batch,
        precision=config.precision,
    )


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
