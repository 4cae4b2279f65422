"""Which label, loss, weight and name belong to which output: the rules of compile and fit."""

import keras
import numpy as np
import pytest

from kbtrain.errors import ConfigurationError
from kbtrain.model.losses.pairing import Outputs, check_loss_weights, pair_up

pytestmark = pytest.mark.core

MSE, MAE = keras.losses.mean_squared_error, keras.losses.mean_absolute_error


def rows(losses, y, outputs, *, names=("a", "b"), **more):
    """``name -> (loss, weight, label, sample weight)``; strings stand for arrays."""
    paired = pair_up(losses, more.pop("loss_weights", None), y, Outputs(outputs, names), **more)
    return {row.name: (row.loss, row.weight, row.label, row.sample_weight) for row in paired}


@pytest.mark.parametrize("losses", [[MSE, MAE], {"a": MSE, "b": MAE}])
@pytest.mark.parametrize("outputs", [["A", "B"], ("A", "B"), {"a": "A", "b": "B"}])
@pytest.mark.parametrize("y", [["ya", "yb"], ("ya", "yb"), {"b": "yb", "a": "ya"}])
def test_dicts_go_by_name_and_lists_by_order(losses, outputs, y):
    expected = {"a": (MSE, None, "ya", None), "b": (MAE, None, "yb", None)}
    assert rows(losses, y, outputs) == expected


def test_one_loss_is_for_all_outputs():
    both = {"a": (MSE, 1.0, "ya", "w"), "b": (MSE, 0.5, "yb", "w")}
    found = rows(MSE, ["ya", "yb"], ["A", "B"], loss_weights=[1.0, 0.5], sample_weight="w")
    assert found == both


@pytest.mark.parametrize("y", ["ya", ["ya"], ("ya", None), {"a": "ya"}])
def test_an_output_without_a_loss_needs_no_label(y):
    outputs = ["A", "B"]
    assert rows([MSE, None], y, outputs) == {"a": (MSE, None, "ya", None)}
    assert rows({"a": MSE}, y, outputs) == {"a": (MSE, None, "ya", None)}


def test_the_second_of_two_outputs_may_be_the_one_with_a_loss():
    assert rows([None, MSE], "yb", ["A", "B"]) == {"b": (MSE, None, "yb", None)}
    assert rows({"b": MSE}, {"b": "yb"}, {"a": "A", "b": "B"}) == {"b": (MSE, None, "yb", None)}


@pytest.mark.parametrize("outputs", [{"logits": "A"}, ["A"], "A"])
@pytest.mark.parametrize("losses", [MSE, [MSE], {"logits": MSE}])
@pytest.mark.parametrize("y", ["ya", ["ya"], {"logits": "ya"}])
def test_one_output_in_any_form(outputs, losses, y):
    assert rows(losses, y, outputs, names=["logits"]) == {"logits": (MSE, None, "ya", None)}


def test_label_names_order_labels_of_other_names():
    y = {"end": "yb", "begin": "ya"}
    found = rows([MSE, MAE], y, ["A", "B"], label_names=["begin", "end"])
    assert [row[2] for row in found.values()] == ["ya", "yb"]
    assert [row[0] for row in found.values()] == [MSE, MAE]


def test_nested_outputs_are_named_by_their_path():
    outputs = {"head": {"x": "A", "y": "B"}, "tail": ["C", "D"]}
    losses = {"head": {"x": MSE, "y": MAE}, "tail": [MSE, None]}
    y = {"head": {"x": "ya", "y": "yb"}, "tail": ["yc", None]}
    found = rows(losses, y, outputs, names=None)
    assert {name: row[2] for name, row in found.items()} == {
        "head/x": "ya", "head/y": "yb", "tail/mean_squared_error": "yc"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["lstm", "lstm"], ["lstm", "lstm_1"]),
        (None, ["output_0", "output_1"]),
        (["only"], ["output_0", "output_1"]),
    ],
)
def test_names_of_a_list_of_outputs(names, expected):
    assert Outputs(["A", "B"], names).names == expected


def test_weights_of_samples_go_with_their_output():
    weights = {"a": "wa", "b": None}
    found = rows([MSE, MAE], ["ya", "yb"], ["A", "B"], sample_weight=weights)
    assert [row[3] for row in found.values()] == ["wa", None]


@pytest.mark.parametrize(
    ("losses", "y", "more", "match"),
    [
        ({"a": MSE, "c": MSE}, ["ya", "yb"], {}, "'c', which is not an output"),
        ([MSE, MSE, MSE], ["ya", "yb"], {}, "there are 2 outputs"),
        ([None, None], ["ya", "yb"], {}, "None for every output"),
        ([MSE, MSE], "ya", {}, r"Pass a dict or a list with one label"),
        ([MSE, MSE], ["ya", None], {}, "'b' has no label"),
        ([MSE, MSE], ["ya", "yb", "yc"], {}, "Pass one per output"),
        ([MSE, MSE], {"a": "ya", "c": "yc"}, {}, "'b' has no label"),
        ([MSE, MSE], ["ya", "yb"], {"loss_weights": 2.0}, "one number for several outputs"),
        ([MSE, MSE], ["ya", "yb"], {"loss_weights": {"a": 2.0}}, "'b' has no loss weight"),
        (
            [MSE, MSE],
            ["ya", "yb"],
            {"loss_weights": {"a": 1, "x": 1}},
            "'x', which is not an output",
        ),
        ([MSE, MSE], ["ya", "yb"], {"sample_weight": {"a": "wa"}}, "'b' has no sample weight"),
    ],
)
def test_what_does_not_fit_together_is_named(losses, y, more, match):
    with pytest.raises(ConfigurationError, match=match):
        rows(losses, y, ["A", "B"], **more)


@pytest.mark.parametrize(
    ("weights", "loss", "match"),
    [
        ("half", MSE, "must be a number"),
        ({"a": "half"}, {"a": MSE}, "must be a number"),
        ({"a": 1.0, "c": 1.0}, {"a": MSE, "b": MSE}, "'c', which has no loss"),
    ],
)
def test_loss_weights_are_looked_at_before_there_is_a_model(weights, loss, match):
    with pytest.raises(ConfigurationError, match=match):
        check_loss_weights(weights, loss, None)


def test_loss_weights_are_of_no_use_for_a_whole_loss():
    with pytest.raises(ConfigurationError, match="compute_loss_func returns the whole loss"):
        check_loss_weights([1.0], None, lambda outputs, labels: outputs)
    check_loss_weights(None, None, lambda outputs, labels: outputs)
    check_loss_weights([np.float32(2), 1], "mse", None)
