"""Line charts as SVG: scales, gaps, thinning, descriptions."""

import math
import re

import pytest
from helpers_report import Page

from kbtrain.report import curves
from kbtrain.report.curves import Chart, Curve, charts_of, describe, draw, thinned

pytestmark = pytest.mark.neutral


def drawn(points, **options):
    return draw(Chart("Loss", [Curve("training", points)], **options))


def lines(svg):
    """The polylines of a picture as lists of (x, y)."""
    return [
        [tuple(map(float, pair.split(","))) for pair in places.split()]
        for places in re.findall(r'points="([^"]+)"', svg)
    ]


def test_a_line_goes_through_its_points_in_proportion():
    ((first, middle, last),) = lines(drawn([(0, 1.0), (50, 2.0), (100, 4.0)]))
    assert first[0] < middle[0] < last[0]
    assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.2)
    # Twice the difference, twice the distance; larger values are higher up.
    assert (middle[1] - last[1]) == pytest.approx(2 * (first[1] - middle[1]), abs=0.2)
    assert last[1] < first[1]


def test_on_a_log_scale_equal_ratios_are_equal_distances():
    ((a, b, c),) = lines(drawn([(0, 100.0), (1, 10.0), (2, 1.0)], log=True))
    assert (b[1] - a[1]) == pytest.approx(c[1] - b[1], abs=0.2)


@pytest.mark.parametrize("values", [(1.0, 2.0), (0.0, 100.0), (-1.0, 1000.0)])
def test_no_log_scale_for_small_spans_zero_or_negative_values(values):
    points = list(enumerate(values))
    assert drawn(points, log=True) == drawn(points)


def test_not_finite_values_leave_gaps_that_are_counted():
    svg = drawn([(0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 3.0), (5, 4.0)])
    assert [len(line) for line in lines(svg)] == [2, 2]
    assert "2 not finite, left out" in svg
    assert "nan" not in svg.lower()


def test_a_point_between_gaps_is_a_dot():
    svg = drawn([(0, math.nan), (1, 2.0), (2, math.nan)])
    assert lines(svg) == []
    assert svg.count("<circle") == 1


@pytest.mark.parametrize("points", [[(7, 0.0)], [(7, 1e30)], [(0, 5.0), (1, 5.0)]])
def test_a_single_point_or_a_constant_is_drawn_inside_the_picture(points):
    svg = drawn(points)
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(places) == len(points)
    assert all(0 < float(x) <= curves.WIDTH and 0 < float(y) < curves.HEIGHT for x, y in places)


def test_without_points_it_says_so():
    assert "Nothing was logged." in drawn([])
    assert "All values are NaN or infinite." in drawn([(1, math.nan)])


def test_thousands_of_points_are_thinned_and_keep_their_extremes_and_gaps():
    points = [(float(i), math.sin(i / 500)) for i in range(20_000)]
    points[7777] = (7777.0, 50.0)
    points[9999] = (9999.0, math.nan)
    kept = thinned(points)
    assert len(kept) <= curves.MAX_POINTS + 2
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (7777.0, 50.0) in kept
    assert any(math.isnan(value) for _, value in kept)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert len(drawn(points)) < 20_000


def test_screen_readers_get_a_title_and_a_description():
    chart = Chart("Loss", [Curve("training", [(1, 3.0), (9, 0.5)])], marks=[(5.0, "best", "best")])
    page = Page(draw(chart))
    assert page.all("svg")[0]["role"] == "img"
    expected = "training: 3 at step 1, 0.5 at step 9, between 0.5 and 3. best: step 5."
    assert describe(chart) == expected
    assert expected in page.text


def test_text_is_escaped():
    svg = draw(Chart("<i>", [Curve('"&', [(1, 2.0)])], marks=[(1.0, "<b>", "best")]))
    assert "<i>" not in svg.replace('<i class="key', "")
    assert "<b>" not in svg
    assert "&lt;i&gt;" in svg
    Page(svg)


def test_charts_of_a_log():
    logs = [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "accuracy": 0.1},
        {"step": 1, "eval_loss": 2.5, "eval_accuracy": 0.2, "eval_runtime": 3.0},
        {"step": 2, "eval_test_loss": 2.4, "eval_test_f1": 0.3, "train_runtime": 9.0},
        {"step": 2, "num_input_tokens_seen": 100, "eval_samples_per_second": 10.0},
    ]
    charts = {c.title: [curve.label for curve in c.curves] for c in charts_of([("a", logs)])}
    assert charts == {
        "Loss": ["training", "evaluation", "test"],
        "accuracy": ["training", "evaluation"],
        "test_f1": ["evaluation"],
        "Learning rate": ["Learning rate"],
        "Gradient norm": ["Gradient norm"],
    }
    both = charts_of([("a", logs), ("b", logs[:1])])
    assert [curve.label for curve in both[0].curves] == [
        *("a: training", "a: evaluation", "a: test"),
        "b: training",
    ]
    assert [curve.label for curve in both[-1].curves] == ["a", "b"]


def test_ticks_are_round_and_inside():
    assert curves.ticks(0.13, 0.94) == [0.2, 0.4, 0.6, 0.8]
    assert curves.ticks(-3, 7) == [-2.0, 0.0, 2.0, 4.0, 6.0]
    assert curves.ticks(1.0, 1.0) == [1.0]
