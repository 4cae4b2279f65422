"""Losses as (sum, count) pairs, against NumPy float64."""

import keras
import numpy as np
import pytest
from keras import ops

from kbtrain.errors import ConfigurationError
from kbtrain.model.losses.keras_losses import keras_loss_pair, resolve_loss
from kbtrain.model.losses.pairs import (
    LossPair,
    as_pair,
    call_loss_func,
    count_items,
    mean,
    weighted_sum,
)

pytestmark = pytest.mark.core


def tensor(value, dtype="float32"):
    return ops.convert_to_tensor(np.asarray(value, dtype))


def number(x):
    return float(ops.convert_to_numpy(x))


def pair_of(result):
    return number(result.sum), number(result.count)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(labels, logits):
    """Negative log probability of each label (0 is looked up where the label is ignored)."""
    safe = np.where(labels == -100, 0, labels)
    return -np.take_along_axis(log_softmax(logits), safe[..., None], -1)[..., 0]


LOGITS = np.random.default_rng(3).normal(size=(4, 5, 7)).astype(np.float32)
LABELS = np.random.default_rng(4).integers(0, 7, size=(4, 5)).astype(np.int32)


# --- what a function may return -------------------------------------------------------------------


def test_a_scalar_counts_as_the_mean_of_the_batch():
    assert pair_of(as_pair(tensor(2.5), 4)) == (10.0, 4.0)
    assert pair_of(as_pair(1.5, 2)) == (3.0, 2.0)


def test_per_element_losses_are_summed_and_counted():
    assert pair_of(as_pair(tensor([1.0, 2.0, 4.0]), 3)) == (7.0, 3.0)
    assert pair_of(as_pair(tensor([[1.0, 2.0], [3.0, 4.0]]), 2)) == (10.0, 4.0)
    weighted = as_pair(tensor([1.0, 2.0, 4.0]), 3, tensor([1.0, 0.0, 0.5]))
    assert pair_of(weighted) == (3.0, 3.0)


def test_sum_and_count_pass_through():
    assert pair_of(as_pair((tensor(6.0), 4), 99)) == (6.0, 4.0)
    assert pair_of(as_pair(LossPair(tensor(6.0), tensor(4.0)), 99)) == (6.0, 4.0)


@pytest.mark.parametrize("value", [2.0, np.ones(3, np.float32), (4.0, 2.0)])
def test_extras_come_along(value):
    if isinstance(value, np.ndarray):
        value = tensor(value)
    pair = as_pair((value, {"accuracy": 0.5}), 3)
    assert pair_of(pair) == pair_of(as_pair(value, 3))
    assert number(pair.extras["accuracy"]) == 0.5


@pytest.mark.parametrize("value", ["loss", None, {"loss": 1.0}, [1.0, 2.0]])
def test_other_returns_are_refused(value):
    with pytest.raises(ConfigurationError, match="A loss must be"):
        as_pair(value, 3)


def test_sum_and_count_must_be_scalars():
    with pytest.raises(ConfigurationError, match=r"two scalars.*\(2,\)"):
        as_pair((tensor([1.0, 2.0]), 2), 2)


def test_sample_weights_cannot_be_applied_to_a_scalar():
    with pytest.raises(ConfigurationError, match="sample weights"):
        as_pair(tensor(1.0), 3, tensor([1.0, 2.0, 3.0]))


def test_mean_of_nothing_is_zero_but_nan_stays():
    assert number(mean(tensor(0.0), tensor(0.0))) == 0.0
    assert np.isnan(number(mean(tensor(np.nan), tensor(0.0))))
    assert number(mean(tensor(6.0), tensor(4.0))) == 1.5


# --- weights and masks ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 5)])
def test_sample_weights_of_every_fitting_shape(shape):
    weight = np.random.default_rng(0).random(shape).astype(np.float32)
    losses = cross_entropy(LABELS, LOGITS)
    total, count = weighted_sum(tensor(losses), tensor(weight))
    wide = weight if len(shape) == 2 else weight[:, None]
    np.testing.assert_allclose(number(total), (losses * wide).sum(), rtol=1e-6)
    assert number(count) == 20


def test_weights_of_three_axes_are_squeezed():
    total, _ = weighted_sum(tensor(np.ones((4, 5))), tensor(np.full((4, 5, 1), 0.5)))
    assert number(total) == 10.0


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match=r"\(3, 1\).*\(4, 5\)"):
        weighted_sum(tensor(np.ones((4, 5))), tensor(np.ones(3)))


def test_masked_elements_may_hold_anything():
    losses = np.array([[1.0, np.nan], [np.inf, 2.0]])
    total, count = weighted_sum(tensor(losses), mask=tensor([[1, 0], [0, 1]], "bool"))
    assert (number(total), number(count)) == (3.0, 2.0)


def test_a_mask_of_samples_leaves_out_whole_rows():
    total, count = weighted_sum(tensor(np.ones((4, 5))), mask=tensor([1, 1, 0, 1], "bool"))
    assert (number(total), number(count)) == (15.0, 15.0)


def test_the_weights_themselves_can_be_counted():
    total, count = weighted_sum(tensor([2.0, 4.0]), tensor([0.5, 0.25]), count_weights=True)
    assert (number(total), number(count)) == (2.0, 0.75)


# --- Keras losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_function", [False, True])
def test_sparse_cross_entropy_without_ignored_labels(as_function):
    if as_function:

        def loss(y, outputs):
            return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pair = keras_loss_pair(loss, tensor(LABELS, "int32"), tensor(LOGITS))
    np.testing.assert_allclose(pair_of(pair), (cross_entropy(LABELS, LOGITS).sum(), 20), rtol=1e-6)


@pytest.mark.parametrize("extra_axis", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_of_minus_100_never_count(extra_axis, weighted):
    labels = LABELS.copy()
    labels[0, 1:] = labels[2, 3:] = labels[3] = -100
    logits = LOGITS.copy()
    logits[3] = np.inf  # of no consequence where nothing counts
    weight = np.array([1.0, 2.0, 0.5, 3.0]) if weighted else None
    keep = labels != -100
    with np.errstate(invalid="ignore"):
        each = np.where(keep, cross_entropy(labels, logits), 0.0)
    total = (each * (np.ones(4) if weight is None else weight)[:, None]).sum()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    y = tensor(labels[..., None] if extra_axis else labels, "int32")
    pair = keras_loss_pair(loss, y, tensor(logits), None if weight is None else tensor(weight))
    np.testing.assert_allclose(pair_of(pair), (total, keep.sum()), rtol=1e-6)


def test_a_batch_of_ignored_labels_has_count_zero():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pair = keras_loss_pair(loss, tensor(np.full((4, 5), -100), "int32"), tensor(LOGITS))
    assert pair_of(pair) == (0.0, 0.0)


def test_minus_100_is_an_ordinary_target_of_other_losses():
    y = np.array([[-100.0], [1.0]])
    pair = keras_loss_pair(resolve_loss("mse"), tensor(y), tensor(np.zeros((2, 1))))
    assert pair_of(pair) == (10001.0, 2.0)


@pytest.mark.parametrize("loss", ["mse", "mae", keras.losses.Huber(), keras.losses.LogCosh()])
def test_other_keras_losses_agree_with_keras_own_reduction(loss):
    generator = np.random.default_rng(5)
    y, outputs = generator.normal(size=(2, 6, 3)).astype(np.float32)
    loss = resolve_loss(loss)
    pair = keras_loss_pair(loss, tensor(y), tensor(outputs))
    reference = number(ops.mean(loss(tensor(y), tensor(outputs))))
    np.testing.assert_allclose(number(mean(pair.sum, pair.count)), reference, rtol=1e-6)
    assert number(pair.count) == 6


def test_mse_against_numpy():
    y, outputs = np.random.default_rng(6).normal(size=(2, 6, 3))
    pair = keras_loss_pair(resolve_loss("mse"), tensor(y), tensor(outputs))
    np.testing.assert_allclose(number(pair.sum), ((y - outputs) ** 2).mean(-1).sum(), rtol=1e-6)


def test_mean_with_sample_weight_divides_by_the_weights():
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    pair = keras_loss_pair(loss, tensor([[1.0], [3.0]]), tensor(np.zeros((2, 1))), tensor([2, 0.5]))
    assert pair_of(pair) == (6.5, 2.5)


# --- names ----------------------------------------------------------------------------------------


def test_unknown_names_are_explained():
    with pytest.raises(ConfigurationError, match=r"'sparse_categorical_crossentrpy'.*Did you mean"):
        resolve_loss("sparse_categorical_crossentrpy")


@pytest.mark.parametrize("loss", [3, 2.5, object()])
def test_what_is_no_loss_is_refused(loss):
    with pytest.raises(ConfigurationError, match="loss must be"):
        resolve_loss(loss)


def test_none_and_structures_are_kept():
    assert resolve_loss(None) is None
    resolved = resolve_loss({"a": "mse", "b": None})
    assert callable(resolved["a"])
    assert resolved["b"] is None
    assert [callable(item) for item in resolve_loss(["mse", "mae"])] == [True, True]


# --- compute_loss_func ----------------------------------------------------------------------------


def test_items_are_labels_that_are_not_ignored():
    assert number(count_items(tensor([[1, -100], [3, 4]], "int32"), 2)) == 3
    assert number(count_items(tensor([[1.0, -100.0]]), 5)) == 5
    assert number(count_items({"a": tensor([1.0])}, 5)) == 5


def test_a_function_that_divides_by_the_total_is_undone():
    y = tensor([[1, -100], [3, 4]], "int32")

    def function(outputs, labels, num_items_in_batch):
        return 12.0 / num_items_in_batch

    pair = call_loss_func(function, None, y, None, tensor(10.0), 2)
    np.testing.assert_allclose(pair_of(pair), (12.0, 3.0), rtol=1e-6)


def test_in_an_evaluation_the_total_is_that_of_the_batch():
    y = tensor([[1, -100], [3, 4]], "int32")
    seen = []

    def function(outputs, labels, num_items_in_batch=None):
        seen.append(number(num_items_in_batch))
        return 12.0 / num_items_in_batch

    pair = call_loss_func(function, None, y, None, None, 2)
    assert seen == [3.0]
    np.testing.assert_allclose(pair_of(pair), (12.0, 3.0), rtol=1e-6)


def test_a_function_that_takes_the_total_must_return_a_scalar():
    def function(outputs, labels, num_items_in_batch):
        return tensor([1.0, 2.0])

    with pytest.raises(ConfigurationError, match="one scalar"):
        call_loss_func(function, None, tensor([[1.0], [2.0]]), None, tensor(2.0), 2)


def test_a_function_that_takes_sample_weights_gets_them():
    def function(outputs, labels, sample_weight):
        return ops.sum(outputs * sample_weight), 4

    pair = call_loss_func(function, tensor([1.0, 2.0]), tensor([0, 0]), tensor([3.0, 5.0]), None, 2)
    assert pair_of(pair) == (13.0, 4.0)


def test_sample_weights_are_applied_to_per_element_losses():
    def function(outputs, labels):
        return outputs - labels

    pair = call_loss_func(
        function, tensor([3.0, 5.0]), tensor([1.0, 1.0]), tensor([2.0, 0.5]), None, 2
    )
    assert pair_of(pair) == (6.0, 2.0)
