"""What the paper prints, checked: its scaling laws (eqs. 11 to 16) against each other, and the sums of Appendix B.

A study has four laws in parameters and four in compute, of the same runs. At every size the two laws of a metric name a
compute: the one at which the law in compute reaches what the law in parameters gives. Three things must hold.

1. All four metrics name the same compute, because they were measured on the same models.
2. Every exponent in compute is nearer to 0 than the exponent in parameters. Otherwise the best model for a given
   compute would outgrow the compute, and see fewer images the larger the budget.
3. At the largest size that compute is what its training has spent. A smaller size may have trained past the frontier;
   the largest cannot have, because no larger model reaches its loss sooner.

If the labels "last" and "avg" are wrong, 1 and 2 fail and another labelling passes them. If compute counts something
else than training FLOPs, 3 fails and shows by how much. Nothing here knows the answer for the paper's laws. It comes
out of their numbers and is an inference, because the data behind them are not published.

Units: parameters in billions (all of them), compute in PFLOP, losses in nats.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from training.accounting import BILLION, EXACT, FLOPS_PER_PFLOP, LABELS
from training.laws.study_data import METRICS
from training.laws.study_fit import Interval, PowerLaw

AGREEMENT = 2.0  # factor between two computes that still agree: two metrics have two frontiers, and fits have errors
KINDS = ("loss", "error")  # of metrics, each at the last scale and on average
NO_PLACES = {"loss": "the two laws of the loss in compute", "error": "the two laws of the error in compute"}
# Epochs by depth. Sec. 5.2 has d6 to d30 with 200 to 350 epochs, and 350 x 1.28M x 680 tokens are its "305 billion";
# the sizes between are those whose recipes are published with the released code.
PAPER_EPOCHS = {6: 200, 16: 200, 20: 250, 24: 350, 30: 350}


@dataclass(frozen=True)
class Laws:
    """The eight laws by metric: against billions of parameters, and against PFLOP."""

    by_parameters: Mapping[str, PowerLaw]
    by_compute: Mapping[str, PowerLaw]
    digits: int = 15  # significant digits to which exponents and scales are known
    places: Mapping[str, str] = field(default_factory=lambda: dict(NO_PLACES))  # where the laws in compute are stated


@dataclass(frozen=True)
class TrainedModel:
    """A size of the study and how long it was trained."""

    name: str
    num_parameters: int
    flops_per_image: Mapping[str, int]  # by accounting
    images: int  # seen in training, repeats counted


@dataclass(frozen=True)
class ImpliedCompute:
    """The compute that the laws name at one size, and what its training has spent."""

    name: str
    by_metric: Mapping[str, float]  # PFLOP
    bands: Mapping[str, Interval]  # PFLOP that other digits behind the printed ones would give
    spent: Mapping[str, float]  # PFLOP, by accounting

    @property
    def spread(self) -> float:
        """The largest compute over the smallest of the four."""
        return max(self.by_metric.values()) / min(self.by_metric.values())

    @property
    def gap(self) -> float:
        """The part of the spread that remains if all rounding was unlucky; 1 if one compute suits all four."""
        return max(1.0, max(band.low for band in self.bands.values()) / min(band.high for band in self.bands.values()))

    @property
    def middle(self) -> float:
        """The geometric mean of the four computes, PFLOP."""
        return math.exp(sum(math.log(compute) for compute in self.by_metric.values()) / len(self.by_metric))


def power(scale: float, exponent: float) -> PowerLaw:
    """Make a law of eq. 9. The paper calls L what is above the irreducible part, which it does not print."""
    return PowerLaw(exponent=exponent, scale=scale, irreducible=0.0)


PAPER_LAWS = Laws(
    by_parameters={
        "loss_last": power(2.0, -0.23),  # eq. 11
        "loss_avg": power(2.5, -0.20),
        "error_last": power(4.9e2, -0.016),  # eq. 12
        "error_avg": power(6.5e2, -0.010),
    },
    by_compute={
        "loss_last": power(2.2e-5, -0.13),  # eq. 13
        "loss_avg": power(1.5e-5, -0.16),  # eq. 14
        "error_last": power(8.1e-2, -0.0067),  # eq. 15
        "error_avg": power(4.4e-2, -0.011),  # eq. 16
    },
    digits=2,
    places={"loss": "eqs. 13 and 14", "error": "eqs. 15 and 16"},
)


def implied_compute(laws: Laws, models: Sequence[TrainedModel]) -> tuple[ImpliedCompute, ...]:
    """Return what the laws say of every size, smallest first."""
    return tuple(_implied(laws, model) for model in sorted(models, key=lambda model: model.num_parameters))


def growth(laws: Laws) -> dict[str, float]:
    """Return by metric the b of N ~ C^b along the frontier: the exponent in compute over that in parameters."""
    return {name: laws.by_compute[name].exponent / laws.by_parameters[name].exponent for name in METRICS}


def relabelled(laws: Laws) -> dict[tuple[str, ...], Laws]:
    """Return the four ways to label the laws in compute, by the KINDS whose "last" and "avg" are exchanged."""
    return {kinds: _exchanged(laws, kinds) for kinds in ((), *((kind,) for kind in KINDS), KINDS)}


def notes(laws: Laws, models: Sequence[TrainedModel]) -> tuple[str, ...]:
    """Say in plain sentences what does not fit together; nothing if all does.

    The check is meant for laws that are stated to some digits. Between laws of one's own fits a disagreement may be
    noise: the exponents of the errors are so small that a little of it moves their compute by a large factor.
    """
    stated = implied_compute(laws, models)
    unreached = [f"{name} at {at.name}" for at in stated for name, c in at.by_metric.items() if math.isinf(c)]
    if unreached:
        return (f"No compute gives {', '.join(unreached)}: the irreducible parts of the two laws do not fit together.",)
    if _gap(stated) <= AGREEMENT:
        return (*_outgrown(laws), *_accounting_note(stated[-1]))
    labellings = {kinds: implied_compute(other, models) for kinds, other in relabelled(laws).items() if kinds}
    spreads = {kinds: max(size.spread for size in sizes) for kinds, sizes in labellings.items()}
    kinds = min(labellings, key=lambda kinds: (_gap(labellings[kinds]), spreads[kinds]))
    found = (_disagreement(stated, laws.digits), *_outgrown(laws))
    if _gap(labellings[kinds]) > AGREEMENT:
        return (*found, "Exchanging the labels does not make them agree, so their compute cannot be judged.")
    inferred = _inference(spreads[kinds], _exchanged(laws, kinds), kinds)
    return (*found, inferred, *_accounting_note(labellings[kinds][-1]))


def _implied(laws: Laws, model: TrainedModel) -> ImpliedCompute:
    billions = model.num_parameters / BILLION
    by_metric, bands = {}, {}
    for name in METRICS:
        first, second = laws.by_parameters[name], laws.by_compute[name]
        by_metric[name] = _crossing(first, second, billions)
        # monotonic in each of the four numbers, so that the extremes are at their corners
        pairs = itertools.product(_roundings(first, laws.digits), _roundings(second, laws.digits))
        corners = [_crossing(*pair, billions) for pair in pairs]
        bands[name] = Interval(min(corners), max(corners))
    spent = {name: model.images * flops / FLOPS_PER_PFLOP for name, flops in model.flops_per_image.items()}
    return ImpliedCompute(model.name, by_metric, bands, spent)


def _crossing(by_parameters: PowerLaw, by_compute: PowerLaw, billions: float) -> float:
    """Return the PFLOP at which the second law gives what the first gives for so many parameters; infinite if never."""
    reducible = float(by_parameters(billions)) - by_compute.irreducible
    if reducible <= 0:
        return math.inf
    log_compute = math.log(reducible) / by_compute.exponent - math.log(by_compute.scale)
    return math.exp(log_compute) if log_compute < math.log(sys.float_info.max) else math.inf


def _roundings(law: PowerLaw, digits: int) -> list[PowerLaw]:
    """Return the extreme laws that would be printed as this one."""

    def extremes(value: float) -> tuple[float, float]:
        half_unit = 0.5 * 10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits)
        return value - half_unit, value + half_unit

    corners = itertools.product(extremes(law.exponent), extremes(law.scale))
    return [replace(law, exponent=exponent, scale=scale) for exponent, scale in corners]


def _exchanged(laws: Laws, kinds: Sequence[str]) -> Laws:
    by_compute = dict(laws.by_compute)
    for kind in kinds:
        last, average = f"{kind}_last", f"{kind}_avg"
        by_compute[last], by_compute[average] = laws.by_compute[average], laws.by_compute[last]
    return replace(laws, by_compute=by_compute)


def _gap(sizes: Sequence[ImpliedCompute]) -> float:
    return max(size.gap for size in sizes)


def _disagreement(stated: Sequence[ImpliedCompute], digits: int) -> str:
    worst = max(stated, key=lambda size: size.gap)
    computes = ", ".join(f"{name} {compute:.3g}" for name, compute in worst.by_metric.items())
    return (
        f"The laws contradict each other as labelled: what {worst.name} reaches takes, in PFLOP, {computes}: a factor "
        f"of {worst.spread:.3g} apart for one and the same training, of which rounding to {digits} digits leaves at "
        f"least {worst.gap:.3g}."
    )


def _outgrown(laws: Laws) -> list[str]:
    return [
        f"As labelled, {name} has its best model grow as C^{exponent:.2f}: it would outgrow its compute and see "
        "fewer images the larger the budget, which cannot be."
        for name, exponent in growth(laws).items()
        if exponent >= 1
    ]


def _inference(spread: float, laws: Laws, kinds: Sequence[str]) -> str:
    exponents = growth(laws).values()
    return (
        f"The labels last and avg of {' and of '.join(laws.places[kind] for kind in kinds)} are swapped, as inferred "
        f"from the laws' own numbers: exchanged, the four agree at every size within a factor of {spread:.2f}, "
        f"and the best model grows as C^{min(exponents):.2f} to C^{max(exponents):.2f}."
    )


def _accounting_note(largest: ImpliedCompute) -> list[str]:
    """Say by how much the laws' compute differs from what training the largest size has spent, if it does."""
    ratios = {name: largest.middle / spent for name, spent in largest.spent.items()}
    factors = {name: max(ratio, 1 / ratio) for name, ratio in ratios.items()}
    if factors[EXACT] <= AGREEMENT:
        return []
    nearest = min(factors, key=factors.__getitem__)
    reading = (
        f"It is nearest to {LABELS[nearest]}, {largest.spent[nearest]:.3g}: the laws' is {ratios[nearest]:.2f} of that."
        if factors[nearest] <= AGREEMENT
        else "No accounting known here comes near it."
    )
    return [
        f"The laws' C is not training FLOPs: the end of training {largest.name}, the largest size, is at "
        f"{largest.middle:.3g} PFLOP by the laws, while its training took {largest.spent[EXACT]:.3g} "
        f"by exact count: the laws' is {ratios[EXACT]:.2f} of that. {reading}"
    ]


@dataclass(frozen=True)
class GenerationCost:
    """The cost of one way to generate an image: attention pairs (query, key) of one layer and head, over all steps."""

    name: str
    pairs: int
    tokens: int  # generated
    steps: int  # that must follow one another


def generation_costs(patch_nums: Sequence[int]) -> tuple[GenerationCost, ...]:
    """Count the attention pairs of Appendix B exactly, for any schedule, each way without and with a cache.

    Without a cache every step computes all tokens so far anew, which costs the square of their number (eqs. 17 and 19).
    With a cache only the new tokens ask. The paper compares O(n^6) with O(n^4), the costs without a cache. With a cache
    raster order is O(n^4) too and has fewer pairs than next-scale prediction; what the latter then gains is the number
    of steps that must follow one another, K instead of n^2.
    """
    raster = patch_nums[-1] ** 2  # n^2 tokens, of the last token map alone
    ends = list(itertools.accumulate(side**2 for side in patch_nums))  # c_k, tokens up to scale k
    cached = sum(side**2 * end for side, end in zip(patch_nums, ends, strict=True))
    return (
        # eq. 17, the sum of i^2 over i = 1 .. n^2, in closed form
        GenerationCost("raster, no cache", raster * (raster + 1) * (2 * raster + 1) // 6, raster, raster),
        GenerationCost("raster, cache", raster * (raster + 1) // 2, raster, raster),
        GenerationCost("next scale, no cache", sum(end**2 for end in ends), ends[-1], len(ends)),  # eqs. 19 and 20
        GenerationCost("next scale, cache", cached, ends[-1], len(ends)),
    )


def eq21(side: float, ratio: float) -> float:
    """Return eq. 21 as printed: the sum of eq. 20 for a schedule of sides 1, a, a^2 .. n, with a > 1. It is right."""
    n, a = side, ratio
    numerator = (a**4 - 1) * math.log(n) + (
        a**8 * n**4 - 2 * a**6 * n**2 - 2 * a**4 * (n**2 - 1) + 2 * a**2 - 1
    ) * math.log(a)
    return numerator / ((a**2 - 1) ** 3 * (a**2 + 1) * math.log(a))


def eq20(num_scales: int, ratio: Fraction | int) -> Fraction:
    """Return the sum of eq. 20 for sides a^0 .. a^(K - 1), which need not be whole numbers, exactly and for a > 1.

    With b = a^2 it is (b^2 (b^2K - 1) - 2 b (b + 1) (b^K - 1) + (b^2 - 1) K) / ((b - 1)^3 (b + 1)). It grows as
    a^8 n^4 / ((a^2 - 1)^3 (a^2 + 1)).
    """
    b = Fraction(ratio) ** 2
    ends = b**2 * (b ** (2 * num_scales) - 1) - 2 * b * (b + 1) * (b**num_scales - 1) + (b**2 - 1) * num_scales
    return ends / ((b - 1) ** 3 * (b + 1))
