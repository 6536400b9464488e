"""A scaling study as a reader meets it: the saved view of a real MLflow server, opened in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow_pages import CARD, browsing, serving
from shown_studies import DEPTHS, POINTS, write_study
from tiny import command

from launchers.study.page import launch_sync, opened
from training.tracking.curves import compute_step
from training.tracking.record import RunRecord
from training.tracking.saved_view import address_of

if TYPE_CHECKING:
    from playwright.sync_api import Page

CURVES = ("loss_avg", "loss_last", "error_avg", "error_last")
ARE_DRAWN = "([card, number]) => card.querySelectorAll('.scatterlayer .point').length >= number"
READ_CHART = """card => {
    const chart = card.querySelector(".js-plotly-plot");
    const curves = chart.data.map(curve => ({name: curve.name, x: Array.from(curve.x), y: Array.from(curve.y)}));
    return {x: chart._fullLayout.xaxis.type, y: chart._fullLayout.yaxis.type, curves: curves};
}"""


def read_chart(page: Page, title: str, *, num_points: int) -> dict[str, Any]:
    """The types of a chart's axes, and the points of its curves with their names, once so many are drawn."""
    card = page.get_by_test_id(CARD).filter(has=page.get_by_text(title, exact=True))
    card.scroll_into_view_if_needed()
    page.wait_for_function(ARE_DRAWN, arg=[card.element_handle(), num_points])
    return card.evaluate(READ_CHART)


@pytest.mark.slow
def test_the_saved_view_shows_all_sizes_against_compute_on_logarithmic_axes(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/mlflow.db"
    config = write_study(tmp_path / "imagenet256", database)
    launch_sync(command(config))
    with opened(config) as study:
        address = address_of(study)
    with serving(database, tmp_path) as server, browsing() as page:
        page.goto(f"{server.url}/{address}")
        for depth in DEPTHS:
            page.get_by_role("link", name=f"d{depth}-seed0", exact=True).wait_for()
        for metric in CURVES:
            chart = read_chart(page, f"curve/{metric}", num_points=len(DEPTHS) * POINTS)
            assert_drawn(chart, Path(config.folder), metric)
        scatter = read_chart(page, "final/n_billion vs. final/loss_last", num_points=len(DEPTHS))
        [sizes] = scatter["curves"]
        assert len(set(sizes["x"])) == len(DEPTHS)
        tidy(page)
        page.screenshot(path=tmp_path / "study.png")


def assert_drawn(chart: dict[str, Any], folder: Path, metric: str) -> None:
    """Every size's validation losses are in the chart, each at its compute."""
    assert (chart["x"], chart["y"]) == ("log", "log")
    drawn = {curve["name"]: list(zip(curve["x"], curve["y"], strict=True)) for curve in chart["curves"] if curve["x"]}
    for depth in DEPTHS:
        records = [each for each in RunRecord(folder / f"d{depth}-seed0").read() if each["kind"] == "validation"]
        [name] = [name for name in drawn if re.search(rf"d{depth}-seed0", name)]
        expected = [(compute_step(each["pflop"], "TFLOP"), each[metric]) for each in records]
        assert sorted(drawn[name]) == expected and len(expected) == POINTS


def tidy(page: Page) -> None:
    """Close what covers the charts, and go back to the first of them."""
    for name in ("Close", "Hide banner"):
        for button in page.get_by_role("button", name=name, exact=True).all():
            button.click()
    page.get_by_text("curve/loss_avg", exact=True).scroll_into_view_if_needed()
    page.mouse.move(0, 0)
    page.wait_for_timeout(3000)  # ms, for the charts to take the room
