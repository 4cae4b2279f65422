"""TensorFlow: when results are copied to the host, where they lie on a GPU."""

import importlib
import threading

import numpy as np
import pytest

from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.cross  # needs TensorFlow, whatever Keras runs on


@pytest.fixture(scope="module")
def device():
    return importlib.import_module("kbtrain.backends.tensorflow.device")


def test_results_of_a_gpu_are_fetched_before_later_work_is_started(device, monkeypatch):
    """A copy waits for all that was started before it, also for what came after the results."""
    tf = importlib.import_module("tensorflow")
    started, fetch = threading.Event(), device.to_host

    def to_host(tree):
        started.set()
        return fetch(tree)

    monkeypatch.setattr(device, "to_host", to_host)
    monkeypatch.setattr(device, "_on_host", lambda leaf: False)
    waits = [device.start_to_host({"loss": tf.constant(float(i))}) for i in range(3)]
    assert started.wait(60)  # nobody has asked for a result
    assert [wait() for wait in waits] == [{"loss": np.float32(i)} for i in range(3)]


def test_results_in_the_memory_of_the_host_are_read_when_they_are_asked_for(device, monkeypatch):
    tf = importlib.import_module("tensorflow")
    with tf.device("CPU:0"):
        result = {"loss": tf.constant(1.0)}
    calls = []
    monkeypatch.setattr(device, "to_host", calls.append)
    wait = device.start_to_host(result)
    assert not calls
    wait()
    assert len(calls) == 1


def test_with_deterministic_operations_there_may_be_no_global_generator(device, monkeypatch):
    """TensorFlow refuses to make one then, and a checkpoint asks for its state."""
    tf = importlib.import_module("tensorflow")
    module = importlib.import_module("tensorflow.python.ops.stateful_random_ops")
    monkeypatch.setattr(module, "global_generator", None)
    with device.numerics(None, True):
        assert device.rng_state() == {}
        expected = tf.random.Generator.from_seed(3)
        device.set_rng_state({"generator": expected.state.numpy()})
        np.testing.assert_array_equal(device.rng_state()["generator"], expected.state.numpy())
        drawn = tf.random.get_global_generator().normal((4,))
        np.testing.assert_array_equal(drawn, expected.normal((4,)))


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_operation_that_cannot_be_deterministic_is_named(deterministic, device):
    tf = importlib.import_module("tensorflow")
    words = "Deterministic GPU implementation of unsorted segment reduction op not available."
    expected = ConfigurationError if deterministic else tf.errors.UnimplementedError
    with (
        pytest.raises(expected, match="unsorted segment") as caught,
        device.numerics(None, deterministic),
    ):
        raise tf.errors.UnimplementedError(None, None, words)
    assert ("full_determinism=False" in str(caught.value)) is deterministic


def test_what_else_is_not_implemented_stays_what_it_is(device):
    tf = importlib.import_module("tensorflow")
    with pytest.raises(tf.errors.UnimplementedError), device.numerics(None, True):
        raise tf.errors.UnimplementedError(None, None, "no such convolution")
