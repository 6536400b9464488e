"""`benchmark.py sample`: images drawn from labels, ours and the public code's, by batch size.

Settings are the defaults of `Sampling`, those of the released models' FID. Rows whose transformer and decoder work in
different precisions have no MFU: on a GPU that includes fp32, since cuDNN computes in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import make_tokenizer, make_var, public_code
from launchers.bench.public_code import PublicCode
from launchers.bench.timing import Contestant, Row, common_precision, device_type, synchronize, time_in_turns
from launchers.sampling.plan import SamplePlan
from launchers.sampling.sampler import Sampler, compile_both, decoder_precision, speed_up
from models.generation import generate_scales
from models.sampling import Sampling
from models.var import VAR
from models.vqvae import VQVAE
from training.flops import decoding_flops, generation_flops

import torch
from torch import Tensor

SAMPLING = Sampling()


@dataclass(frozen=True)
class Drawing:
    """Two models that draw a batch of images."""

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

    def _draw(self) -> Tensor:
        labels = torch.arange(self.batch, device=self.var.position_embedding.device) % self.var.config.num_classes
        return generate_scales(self.var, self.tokenizer, labels, SAMPLING, seeds=range(self.batch)).f_hat


def benchmark_sample(config: BenchmarkConfig) -> list[Row]:
    """Time images a second at each batch size; the first row of each is the public code, where it is there."""
    var, tokenizer = make_var(config).eval().requires_grad_(False), make_tokenizer(config)
    with public_code(config, var, tokenizer) as public:
        tokenizer = tokenizer.to(device_type())
        unfolded = deepcopy(tokenizer)
        speed_up(var, tokenizer, config.precision, compiles=False)
        eager = Drawing(var, tokenizer, config.batch)
        fast = compiled(eager) if config.compile else eager
        rows = both_sides(config, public, fast) + switches(config, fast, eager, replace(fast, tokenizer=unfolded))
        found = time_in_turns(rows, config.repeats)
        for batch in config.batches:
            more = both_sides(replace(config, batch=batch), public, replace(fast, batch=batch))
            found += time_in_turns(more, config.repeats)
    return found


def compiled(drawing: Drawing) -> Drawing:
    """Compile a copy: the models are prepared already, and to fold the decoder again would round twice."""
    fast = replace(drawing, var=deepcopy(drawing.var), tokenizer=deepcopy(drawing.tokenizer))
    compile_both(fast.var, fast.tokenizer)
    return fast


def both_sides(config: BenchmarkConfig, public: PublicCode | None, fast: Drawing) -> list[Contestant]:
    """Return the public code, where it is there, and ours."""
    precision = common_precision(config.precision, decoder_precision(config.precision))
    ours = Contestant(f"ours, batch {config.batch}", fast.images, image_flops(fast), precision)
    if public is None:
        return [ours]
    settings = {"cfg": SAMPLING.cfg, "top_k": SAMPLING.top_k, "top_p": SAMPLING.top_p}
    call = public.timed("sample", batch=config.batch, **settings)
    flops = image_flops(fast, is_folded=False)
    precision = common_precision(config.precision, config.precision)  # its autocast spans both models
    return [Contestant(f"public, batch {config.batch}", call, flops, precision), ours]


def switches(config: BenchmarkConfig, fast: Drawing, eager: Drawing, unfolded: Drawing) -> list[Contestant]:
    """Return ours with one thing changed in each."""
    alone, whole = config.precision, common_precision(config.precision, decoder_precision(config.precision))
    guidance = SAMPLING.schedule(fast.var.scales.num_scales)
    plain = image_flops(fast, is_folded=False)
    found = [
        Contestant("plain decoder in fp32", unfolded.images, plain, common_precision(alone, "fp32")),
        Contestant("codes alone, no pixels", fast.codes, generation_flops(fast.var.config, guidance), alone),
        Contestant("as sample.py draws", as_the_launcher(fast), image_flops(fast), whole),
    ]
    if config.compile:
        found.append(Contestant("not compiled", eager.images, image_flops(fast), whole))
    return [replace(each, name=f"ours, {each.name}, batch {config.batch}") for each in found]


def as_the_launcher(drawing: Drawing) -> Callable[[], int]:
    """Return a call that draws a unit of images as uint8, each the same to the last bit whatever is drawn with it."""
    plan = SamplePlan(classes=tuple(range(drawing.batch)), per_class=1, batch=drawing.batch)
    sampler = Sampler(drawing.var, drawing.tokenizer, SAMPLING, plan)
    return lambda: len(sampler.draw(0))


def image_flops(drawing: Drawing, *, is_folded: bool = True) -> int:
    """Return the FLOPs of codes and pixels of one image, as ours computes it.

    The public code makes each modulation and one scale's logits again, which does not count as its work.
    """
    guidance = SAMPLING.schedule(drawing.var.scales.num_scales)
    decoding = decoding_flops(drawing.tokenizer.config, is_folded=is_folded)
    return generation_flops(drawing.var.config, guidance) + decoding
