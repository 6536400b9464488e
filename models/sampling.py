"""From logits to tokens: classifier-free guidance, top-k, top-p, and noise that belongs to an image.

`cfg` is in VAR's units: 0 is no guidance. Tokens are drawn by adding Gumbel noise to the logits and taking the largest,
which is a draw from their softmax. The noise is a function of (seed, token, code) alone, computed where the logits are:
it does not depend on batch, rank or device. Adding noise instead of inverting the cumulative distribution keeps the
tokens so under rounding: a logit that differs in its last bit matters only to codes that tie.

Shapes: B batch, K scales, n tokens of a scale, L of all scales, V vocabulary, C code width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NUMBERS = 2**25  # logits looked at together; more images are taken in turns
MAX_NUMBERS_ON_CPU = 2**20  # what fits its caches
TIES = 64  # codes beyond the k likeliest that are looked at, for those that tie with the last one
UNIFORM_BITS = 23  # the most for which the midpoints of [0, 1) stay inside (0, 1) in float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are those of the released models' FID; the demo uses cfg 4, top_p 0.95."""

    cfg: float = 1.5  # guidance at the last scale, 0 = off; it grows from 0 at the first scale
    guidance: tuple[float, ...] = ()  # guidance of every scale, instead of that ramp
    top_k: int = 900  # how many codes may be drawn; 0 = all, 1 = always the likeliest
    top_p: float = 0.96  # the fewest codes whose probability reaches it; 0 or 1 = all
    smooth: bool = False  # add mixtures of codes to f_hat, see `smooth_weights`; for the eye, not for FID

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", tuple(self.guidance))
        if not 0 <= self.cfg < float("inf"):
            raise ValueError(f"cfg {self.cfg} must be 0 (no guidance) or more")
        if any(not 0 <= t < float("inf") for t in self.guidance):
            raise ValueError(f"guidance {self.guidance} must hold a strength of 0 or more for every scale")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 (all tokens) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside [0, 1]")

    @property
    def is_greedy(self) -> bool:
        """Tell whether nothing is left to chance."""
        return self.top_k == 1

    def schedule(self, num_scales: int) -> tuple[float, ...]:
        """Return the guidance t of each of K scales. Raises ValueError if `guidance` has another length."""
        if not self.guidance:
            return guidance_schedule(self.cfg, num_scales)
        if len(self.guidance) != num_scales:
            raise ValueError(
                f"guidance {self.guidance} has {len(self.guidance)} strengths, the model {num_scales} "
                "scales; give one per scale"
            )
        return self.guidance


def guidance_schedule(cfg: float, num_scales: int) -> tuple[float, ...]:
    """Return the guidance t_k = cfg k / (K - 1) of each scale, from 0 to `cfg` at the last scale (public code)."""
    return tuple(cfg * k / max(num_scales - 1, 1) for k in range(num_scales))


def num_doubled_scales(guidance: Sequence[float]) -> int:
    """Count the scales that need the unconditional half: each guided one, and all before it, which it attends to."""
    return max((k + 1 for k, t in enumerate(guidance) if t), default=0)


def guide(conditional: Tensor, unconditional: Tensor, t: float) -> Tensor:
    """Apply classifier-free guidance of strength t: (1 + t) conditional - t unconditional."""
    return (1 + t) * conditional - t * unconditional


@dataclass(frozen=True)
class Candidates:
    """Codes that may be drawn for each token; others among them have a logit of -inf."""

    logits: Tensor  # (..., m), -inf for those that may not be drawn
    codes: Tensor  # (..., m) int64, each once

    def spread(self, vocab_size: int) -> Tensor:
        """Return logits of all codes (..., V), which are -inf for those that are no candidates."""
        empty = self.logits.new_full((*self.logits.shape[:-1], vocab_size), -torch.inf)
        return empty.scatter_(-1, self.codes, self.logits)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the most likely codes of logits (..., V) and set the others to -inf: first top-k, then top-p.

    top_k: how many codes to keep, 0 = all; codes that tie with the last one stay. top_p: keep the smallest set of most
    likely codes whose probabilities sum to at least this, 0 or 1 = all; of codes that tie, the last ones stay.
    """
    return find_candidates(logits, top_k, top_p).spread(logits.shape[-1])


def find_candidates(logits: Tensor, top_k: int, top_p: float) -> Candidates:
    """Find the codes that `filter_logits` keeps of (..., V), with k + TIES sorted for top-k unless more of them tie."""
    vocab_size = logits.shape[-1]
    is_cut_by_p = 0 < top_p < 1
    if 0 < top_k < vocab_size:
        found = _likeliest(logits, top_k)
    elif is_cut_by_p:
        found = Candidates(*logits.sort(dim=-1, descending=True))
    else:
        return Candidates(logits, torch.arange(vocab_size, device=logits.device).expand(logits.shape))
    return _without_empty_columns(_cut_by_probability(logits, found, top_p) if is_cut_by_p else found)


def _likeliest(logits: Tensor, top_k: int) -> Candidates:
    """Find the k most likely codes of (..., V) and those that tie with the last of them, in descending order."""
    vocab_size = logits.shape[-1]
    width = min(top_k + TIES, vocab_size)
    values, codes = logits.topk(width, dim=-1)
    smallest = values[..., top_k - 1 : top_k]
    if width < vocab_size and bool((values[..., -1:] == smallest).any()):  # here a GPU is waited for
        values, codes = logits.topk(int((logits >= smallest).sum(dim=-1).max()), dim=-1)
    return Candidates(values.masked_fill(values < smallest, -torch.inf), codes)


def _cut_by_probability(logits: Tensor, found: Candidates, top_p: float) -> Candidates:
    """Keep the smallest set of most likely candidates whose probabilities sum to at least top_p.

    found: candidates of logits (..., V) in descending order. Codes that are cut get a logit of -inf.
    """
    # In ascending order and over all codes, so that sums are rounded as the public code's are.
    vocab_size, width = logits.shape[-1], found.logits.shape[-1]
    ascending = logits.new_full(logits.shape, -torch.inf)
    ascending[..., vocab_size - width :] = found.logits.flip(-1)
    is_cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    num_kept = 1 + (~is_cut[..., vocab_size - width : -1]).sum(dim=-1, keepdim=True)  # the most likely in any case
    last = found.logits.gather(-1, num_kept - 1)  # the smallest logit that stays
    num_last = num_kept - (found.logits > last).sum(dim=-1, keepdim=True)  # codes with it that stay
    is_last = logits == last  # (..., V)
    place_from_behind = is_last.flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)  # of each among those
    stays = (logits > last) | (is_last & (place_from_behind <= num_last))
    return Candidates(found.logits.masked_fill(~stays.gather(-1, found.codes), -torch.inf), found.codes)


def _without_empty_columns(found: Candidates) -> Candidates:
    """Drop the last columns, from which no row may draw; not on a GPU, for whose answer the host would wait."""
    if found.logits.device.type != "cpu":
        return found
    is_needed = (found.logits != -torch.inf).reshape(-1, found.logits.shape[-1]).any(dim=0)  # (m,)
    width = max(1, int((is_needed * torch.arange(1, len(is_needed) + 1)).max()))
    return Candidates(found.logits[..., :width], found.codes[..., :width])


def choose_tokens(logits: Tensor, seeds: Tensor | None, tokens: slice, *, top_k: int = 0, top_p: float = 0) -> Tensor:
    """Draw a code for each token from those that `filter_logits` keeps: logits (B, n, V) -> (B, n) int64.

    seeds: (B,) int64, one per image; None takes the most likely codes. tokens: where these n tokens lie among the L of
    an image, since each has noise of its own.
    """
    if seeds is None:
        return logits.argmax(dim=-1)
    vocab_size, drawn = logits.shape[-1], []
    for part_logits, part_seeds in _in_turns(logits, seeds):
        found = find_candidates(part_logits, top_k, top_p)
        noisy = found.logits + gumbel_noise(part_seeds, tokens, vocab_size, codes=found.codes)  # (B, n, m)
        is_largest = noisy == noisy.amax(dim=-1, keepdim=True)
        drawn.append(found.codes.where(is_largest, vocab_size - 1).amin(dim=-1))  # of equals the first, as argmax
    return torch.cat(drawn)


def smooth_code_vectors(
    logits: Tensor, seeds: Tensor | None, tokens: slice, codebook: Tensor, *, progress: float
) -> Tensor:
    """Mix code vectors for each token instead of choosing one: logits (B, n, V), codebook (V, C) -> (B, n, C).

    The weights are a Gumbel-softmax with the noise of `choose_tokens`. progress: k / (K - 1); the logits are sharpened
    by 1 + progress, and the temperature is 0.27 (1 - 0.95 progress), at least 0.005 (public code, "more_smooth").
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    if seeds is None:
        return codebook[logits.argmax(dim=-1)]
    mixed = [
        (part_logits * (1 + progress) + gumbel_noise(part_seeds, tokens, logits.shape[-1]))
        .div(temperature)
        .softmax(dim=-1)
        .to(codebook.dtype)
        @ codebook
        for part_logits, part_seeds in _in_turns(logits, seeds)
    ]
    return torch.cat(mixed)


def _in_turns(logits: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair logits (B, n, V) and seeds (B,) in parts of so few images that what is made of them fits into memory."""
    most = MAX_NUMBERS_ON_CPU if logits.device.type == "cpu" else MAX_NUMBERS
    images = max(1, most // (logits.shape[1] * logits.shape[2]))
    return zip(logits.split(images), seeds.split(images), strict=True)


def gumbel_noise(seeds: Tensor, tokens: slice, vocab_size: int, *, codes: Tensor | None = None) -> Tensor:
    """Make standard Gumbel noise, a function of (seed, token, code): seeds (B,) int64 -> (B, n, V) float32.

    codes: (B, n, m) int64 asks for the noise of these codes alone: -> (B, n, m), the same numbers.
    """
    positions = torch.arange(tokens.start, tokens.stop, device=seeds.device)  # (n,)
    codes = torch.arange(vocab_size, device=seeds.device) if codes is None else codes
    counters = positions[:, None] * vocab_size + codes  # (n, V) or (B, n, m)
    bits = splitmix64(splitmix64(seeds)[:, None, None] + counters.mul_(SPLITMIX_GAMMA))  # (B, n, V or m)
    top_bits = _shift_right(bits, 64 - UNIFORM_BITS)
    uniforms = top_bits.float().add_(0.5).mul_(2.0**-UNIFORM_BITS)  # in (0, 1)
    return uniforms.log_().neg_().log_().neg_()


def image_seeds(seeds: Sequence[int] | Tensor | None, num_images: int, device: torch.device) -> Tensor:
    """Put one seed per image into a tensor (B,) int64. Raises ValueError unless there is one each, in [0, 2^63)."""
    values = [] if seeds is None else [int(seed) for seed in seeds]
    if len(values) != num_images:
        raise ValueError(f"got {len(values)} seeds for {num_images} images, expected one each (none if top_k is 1)")
    for seed in values:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is outside [0, 2^63)")
    return torch.tensor(values, dtype=torch.int64, device=device)


def _signed(value: int) -> int:
    """Return the int64 that has the bits of an unsigned 64-bit number."""
    return value - 2**64 if value >= 2**63 else value


SPLITMIX_GAMMA = _signed(0x9E3779B97F4A7C15)  # the step of SplitMix64's counter, odd and near 2^64 / golden ratio


def splitmix64(x: Tensor) -> Tensor:
    """Apply the output function of SplitMix64 (Steele, Lea and Flood, 2014) to int64 bit patterns."""
    x = x + SPLITMIX_GAMMA
    x = x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift bits right without copying the sign, which the shift of int64 would do."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
