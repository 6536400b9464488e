"""The scaling laws that the paper prints (eqs. 11 to 16), as data, and a check whether eight such laws fit together.

A study has four laws in parameters and four in compute, of the same runs. So at every size the two laws of a metric
name a compute, that at which the law in compute reaches what the law in parameters gives, and

1. all four metrics must name the same compute, as they were measured on the same models;
2. every exponent in compute must be nearer to 0 than its exponent in parameters, or the best model for a given compute
   would outgrow the compute, its number of images shrinking as the budget grows;
3. at the largest size that compute must be what its training has spent. (A smaller one may have trained past the
   frontier. The largest cannot: no larger model reaches its loss sooner.)

Where the labels "last" and "avg" are wrong, 1 and 2 fail and another labelling passes them; where compute counts
something else than training FLOPs, 3 fails and shows by how much. Nothing here knows the answer for the paper's laws;
it comes out of their numbers, and it is an inference: the data behind them are not published.

Units: parameters in billions (all of them), compute in PFLOP, losses in nats.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from models.var import VARConfig
from training.flops import DENSE_MASK, EXACT, FLOPS_PER_PFLOP, PAPER, SIX_NT, flops_per_image
from training.laws.study_data import METRICS
from training.laws.study_fit import Interval, PowerLaw

AGREEMENT = 2.0  # factor between two computes that still agree: two metrics have two frontiers, and fits have errors
BILLION = 10**9
KINDS = ("loss", "error")  # of metrics, each at the last scale and on average
NO_PLACES = {"loss": "the two laws of the loss in compute", "error": "the two laws of the error in compute"}
IMAGENET_IMAGES = 1_281_167  # of one epoch
COUNTS = {
    EXACT: "training FLOPs",
    DENSE_MASK: "training FLOPs with a dense mask",
    SIX_NT: "6 N T",
    PAPER: "multiply-accumulates of one forward pass",
}


@dataclass(frozen=True)
class Laws:
    """Eight laws by metric: against billions of parameters, and against PFLOP."""

    by_parameters: Mapping[str, PowerLaw]
    by_compute: Mapping[str, PowerLaw]
    digits: int = 15  # significant digits to which exponents and scales are known
    places: Mapping[str, str] = field(default_factory=lambda: dict(NO_PLACES))  # where the laws in compute are stated

    def __post_init__(self) -> None:
        for laws in (self.by_parameters, self.by_compute):
            if set(laws) != set(METRICS):
                raise ValueError(f"laws are given for {sorted(laws)}; they must be of {sorted(METRICS)}")
            for name, law in laws.items():
                if law.exponent >= 0 or law.scale <= 0:
                    raise ValueError(
                        f"the law of {name} has exponent {law.exponent} and scale {law.scale}; a law that falls has a "
                        "negative exponent and a positive scale"
                    )


@dataclass(frozen=True)
class TrainedModel:
    """A size of the study and how long it was trained."""

    config: VARConfig
    images: int  # seen in training, repeats counted

    @property
    def name(self) -> str:
        return f"d{self.config.depth}"


@dataclass(frozen=True)
class ImpliedCompute:
    """The compute that the laws name at one size, and what its training has spent."""

    name: str
    by_metric: Mapping[str, float]  # PFLOP
    bands: Mapping[str, Interval]  # PFLOP that other digits behind the printed ones would give
    spent: Mapping[str, float]  # PFLOP, by accounting

    @property
    def spread(self) -> float:
        """Largest over smallest of the four."""
        return max(self.by_metric.values()) / min(self.by_metric.values())

    @property
    def gap(self) -> float:
        """What is left of the spread if all rounding was unlucky; 1 where one compute suits all four."""
        return max(1.0, max(band.low for band in self.bands.values()) / min(band.high for band in self.bands.values()))

    @property
    def middle(self) -> float:
        """Geometric mean of the four, PFLOP."""
        return math.exp(sum(math.log(compute) for compute in self.by_metric.values()) / len(self.by_metric))


def power(scale: float, exponent: float) -> PowerLaw:
    """A law of eq. 9. The irreducible part is not printed: what the paper calls L is what is above it."""
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
# Sec. 5.2: d6 to d30, from 200 to 350 epochs, and 350 x 1.28M x 680 tokens are its "305 billion". The sizes between are
# those whose recipes are published with the released code.
PAPER_MODELS = tuple(
    TrainedModel(VARConfig(depth=depth), images=epochs * IMAGENET_IMAGES)
    for depth, epochs in ((6, 200), (16, 200), (20, 250), (24, 350), (30, 350))
)


def implied_compute(laws: Laws, models: Sequence[TrainedModel]) -> tuple[ImpliedCompute, ...]:
    """What the laws say of every size, smallest first. Raises ValueError where there is none."""
    if not models:
        raise ValueError("no sizes at which to compare the laws; give at least one trained model")
    return tuple(_implied(laws, model) for model in sorted(models, key=lambda model: model.config.num_parameters))


def growth(laws: Laws) -> dict[str, float]:
    """By metric the b of N ~ C^b along the frontier: the exponent in compute over that in parameters."""
    return {name: laws.by_compute[name].exponent / laws.by_parameters[name].exponent for name in METRICS}


def relabelled(laws: Laws) -> dict[tuple[str, ...], Laws]:
    """The four ways to label the laws in compute, by the KINDS whose "last" and "avg" are exchanged."""
    return {kinds: _exchanged(laws, kinds) for kinds in ((), *((kind,) for kind in KINDS), KINDS)}


def notes(laws: Laws, models: Sequence[TrainedModel]) -> tuple[str, ...]:
    """What does not fit together, in plain sentences; empty where all does. Raises ValueError where `models` is empty.

    Meant for laws that are stated to some digits. Between laws of one's own fits a disagreement may be noise: the
    exponents of the errors are so small that a little of it moves their compute by a large factor.
    """
    stated = implied_compute(laws, models)
    unreached = [f"{name} at {at.name}" for at in stated for name, c in at.by_metric.items() if math.isinf(c)]
    if unreached:
        return (f"No compute gives {', '.join(unreached)}: the irreducible parts of the two laws do not fit together.",)
    if _gap(stated) <= AGREEMENT:
        return (*_outgrown(laws), *_accounting_note(stated[-1]))
    labellings = {kinds: implied_compute(other, models) for kinds, other in relabelled(laws).items() if kinds}
    kinds = min(labellings, key=lambda kinds: (_gap(labellings[kinds]), _spread(labellings[kinds])))
    found = (_disagreement(stated, laws.digits), *_outgrown(laws))
    if _gap(labellings[kinds]) > AGREEMENT:
        return (*found, "Exchanging the labels does not make them agree, so their compute cannot be judged.")
    inferred = _inference(labellings[kinds], _exchanged(laws, kinds), kinds)
    return (*found, inferred, *_accounting_note(labellings[kinds][-1]))


def _implied(laws: Laws, model: TrainedModel) -> ImpliedCompute:
    billions = model.config.num_parameters / BILLION
    by_metric, bands = {}, {}
    for name in METRICS:
        first, second = laws.by_parameters[name], laws.by_compute[name]
        by_metric[name] = _crossing(first, second, billions)
        # monotonic in each of the four numbers, so that the extremes are at their corners
        pairs = itertools.product(_roundings(first, laws.digits), _roundings(second, laws.digits))
        corners = [_crossing(*pair, billions) for pair in pairs]
        bands[name] = Interval(min(corners), max(corners))
    spent = {name: model.images * flops / FLOPS_PER_PFLOP for name, flops in flops_per_image(model.config).items()}
    return ImpliedCompute(model.name, by_metric, bands, spent)


def _crossing(by_parameters: PowerLaw, by_compute: PowerLaw, billions: float) -> float:
    """PFLOP at which the second law gives what the first gives for so many parameters; infinite where it never does."""
    reducible = float(by_parameters(billions)) - by_compute.irreducible
    if reducible <= 0:
        return math.inf
    log_compute = math.log(reducible) / by_compute.exponent - math.log(by_compute.scale)
    return math.exp(log_compute) if log_compute < math.log(sys.float_info.max) else math.inf


def _roundings(law: PowerLaw, digits: int) -> list[PowerLaw]:
    """The laws at the corners of what is stated as this one."""
    exponents, scales = _rounding(law.exponent, digits), _rounding(law.scale, digits)
    return [replace(law, exponent=exponent, scale=scale) for exponent in exponents for scale in scales]


def _rounding(value: float, digits: int) -> tuple[float, float]:
    """The least and the greatest value that rounds to this one."""
    half_unit = 0.5 * 10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits)
    return value - half_unit, value + half_unit


def _exchanged(laws: Laws, kinds: Sequence[str]) -> Laws:
    by_compute = dict(laws.by_compute)
    for kind in kinds:
        last, average = f"{kind}_last", f"{kind}_avg"
        by_compute[last], by_compute[average] = laws.by_compute[average], laws.by_compute[last]
    return replace(laws, by_compute=by_compute)


def _gap(sizes: Sequence[ImpliedCompute]) -> float:
    return max(size.gap for size in sizes)


def _spread(sizes: Sequence[ImpliedCompute]) -> float:
    return max(size.spread for size in sizes)


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


def _inference(sizes: Sequence[ImpliedCompute], laws: Laws, kinds: Sequence[str]) -> str:
    exponents = growth(laws).values()
    return (
        f"The labels last and avg of {' and of '.join(laws.places[kind] for kind in kinds)} are swapped, as inferred "
        f"from the laws' own numbers: exchanged, the four agree at every size within a factor of {_spread(sizes):.2f}, "
        f"and the best model grows as C^{min(exponents):.2f} to C^{max(exponents):.2f}."
    )


def _accounting_note(largest: ImpliedCompute) -> list[str]:
    """Whether the laws' compute is what training the largest size has spent."""
    ratios = {name: largest.middle / spent for name, spent in largest.spent.items()}
    factors = {name: max(ratio, 1 / ratio) for name, ratio in ratios.items()}
    if factors[EXACT] <= AGREEMENT:
        return []
    nearest = min(factors, key=factors.__getitem__)
    reading = (
        f"It is nearest to {COUNTS[nearest]}, {largest.spent[nearest]:.3g}: the laws' is {ratios[nearest]:.2f} of that."
        if factors[nearest] <= AGREEMENT
        else "No accounting known here comes near it."
    )
    return [
        f"The laws' C is not training FLOPs: the end of training {largest.name}, the largest size, is at "
        f"{largest.middle:.3g} PFLOP by the laws, while its training took {largest.spent[EXACT]:.3g} "
        f"by exact count: the laws' is {ratios[EXACT]:.2f} of that. {reading}"
    ]
