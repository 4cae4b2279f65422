"""Several runs side by side: the first update at which they differ, and in which settings."""

import math

import pytest
from helpers_report import Page, run_record

from kbtrain.report.comparison import (
    compared_updates,
    describe_difference,
    differing_settings,
    first_difference,
    render_comparison,
)
from kbtrain.report.record import RunRecord

pytestmark = pytest.mark.neutral


def record_of(*losses, name="loss"):
    return RunRecord(logs=[{"step": i, name: v} for i, v in enumerate(losses, 1)])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), None),
        ((1.0, 2.0, 3.0), (1.0, 2.0 + 1.9e-5, 3.0), None),
        ((1.0, 2.0, 3.0), (1.0, 2.0 + 2.1e-5, 3.1), 2),
        ((1e-9, 1.0), (1.1e-9, 1.0), 1),
        ((1.0, math.nan), (1.0, math.nan), None),
        ((1.0, math.nan), (1.0, 5.0), 2),
        ((1.0, math.inf), (1.0, math.inf), None),
        ((1.0, 2.0), (1.0, 2.0, 9.0), None),
        ((1.0,), (), None),
    ],
)
def test_rounding_is_no_difference(first, second, expected):
    found = first_difference(record_of(*first), record_of(*second))
    assert (None if found is None else found[0]) == expected


def test_only_equal_updates_are_compared():
    second = RunRecord(logs=[{"step": 2, "loss": 2.0}, {"step": 4, "loss": 9.0}])
    assert first_difference(record_of(1.0, 2.0, 3.0), second) is None
    assert compared_updates(record_of(1.0, 2.0, 3.0), second) == [2]


def test_an_evaluation_that_differs_earlier_counts():
    first, second = record_of(1.0, 2.0), record_of(1.0, 2.5)
    first.logs.append({"step": 1, "eval_loss": 1.0})
    second.logs.append({"step": 1, "eval_loss": 1.1})
    assert first_difference(first, second) == (1, "eval_loss", 1.0, 1.1)


def test_settings_that_differ_have_the_default_where_they_are_not_recorded():
    first, second = run_record("a"), run_record("b", backend="torch")
    second.arguments = {"learning_rate": 1e-3, "weight_decay": 0.1}
    assert differing_settings([first, second]) == {
        "seed": ["7", "42"],
        "weight_decay": ["0.0", "0.1"],
        "backend": ["jax", "torch"],
    }


def test_the_page_says_where_and_in_what_runs_differ():
    first, second, third = run_record("a"), run_record("b", decay=0.2), run_record("c")
    second.arguments["seed"] = 8
    page = Page(render_comparison([first, second, third]))
    where = "b differs from a at update 1, the first that both have logged (loss 1.637462 instead "
    assert f"{where}of 1.809675). The runs differ in seed." in page.text
    assert "c equals a in the 25 updates that both have logged." in page.text
    assert "The runs differ in no setting that is recorded." in page.text
    assert "a relative difference of 1e-05" in page.text
    assert page.addresses == []
    labels = ["a: training", "b: training", "c: training", "a: evaluation"]
    assert all(label in page.text for label in labels)


def test_the_last_equal_update_is_named():
    text = describe_difference(record_of(1.0, 2.0, 3.0), record_of(1.0, 2.0, 3.5), ["seed"])
    assert "equals run up to update 2 and differs at update 3 (loss 3.5 instead of 3)" in text


def test_runs_without_common_updates_are_not_called_equal():
    first, second = RunRecord(logs=[{"step": 1, "loss": 1.0}]), RunRecord()
    assert "cannot be compared" in describe_difference(first, second, [])
