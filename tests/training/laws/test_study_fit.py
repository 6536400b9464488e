"""The laws as values: what they say of x, and that a fit survives being written down."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from study_examples import planted_fit, planted_runs

from training.laws.study_fit import ParametricFit, PowerLaw


def test_a_law_is_a_straight_line_in_log_log_axes_above_its_irreducible_part() -> None:  # eq. 10
    law = PowerLaw(exponent=-0.23, scale=2.0, irreducible=4.5)
    x = np.geomspace(1e-3, 10, 7)
    slopes = np.diff(np.log(law(x) - 4.5)) / np.diff(np.log(x))
    assert slopes == pytest.approx(np.full(6, -0.23))
    assert np.log(law.reducible(x)) == pytest.approx(-0.23 * np.log(x) - 0.23 * np.log(2.0))


def test_a_parametric_law_falls_to_its_irreducible_part_in_both_directions() -> None:
    fit = ParametricFit(
        "loss_avg", 1.7, 0.4, 0.34, 0.5, 0.28, compute_exponent=0.1535, draws=(), num_points=9, r_squared=1.0
    )
    assert float(fit(1.0, 1.0)) == pytest.approx(1.7 + 0.4 + 0.5)
    assert float(fit(1e30, 1.0)) == pytest.approx(1.7 + 0.5)
    assert float(fit(1.0, 1e40)) == pytest.approx(1.7 + 0.4)
    assert fit(np.ones(3), np.ones(3)).shape == (3,)


def test_a_fit_is_plain_data() -> None:
    fit = planted_fit(planted_runs((6, 8, 10, 12)))
    assert json.loads(json.dumps(asdict(fit)))["schema"] == fit.schema
