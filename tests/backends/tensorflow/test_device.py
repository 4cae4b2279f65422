"""TensorFlow: what is different on a GPU: memory, copies to the host, XLA."""

import importlib
import logging
import threading
import types

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


def test_a_copy_does_not_wait_for_that_of_an_earlier_result(device, monkeypatch):
    """Started later, it would be behind the work that the host has started in the meantime."""
    first, second = threading.Event(), threading.Event()

    def to_host(tree):
        if tree == "first":
            assert first.wait(60)
        else:
            second.set()
        return tree

    monkeypatch.setattr(device, "to_host", to_host)
    monkeypatch.setattr(device, "_on_host", lambda leaf: False)
    waits = [device.start_to_host(name) for name in ("first", "second")]
    assert second.wait(60)
    first.set()
    assert [wait() for wait in waits] == ["first", "second"]


class Gpus:
    """Stands in for TensorFlow's settings of GPUs."""

    def __init__(self, growth, limits=None, in_use=False):
        self.growth, self.limits, self.in_use = growth, limits or {}, in_use
        self.experimental = types.SimpleNamespace(
            get_memory_growth=self.growth.get, set_memory_growth=self.set_memory_growth
        )

    def list_physical_devices(self, kind):
        assert kind == "GPU"
        return list(self.growth)

    def get_logical_device_configuration(self, gpu):
        return self.limits.get(gpu)

    def set_memory_growth(self, gpu, grows):
        if self.in_use:
            raise RuntimeError("Physical devices cannot be modified after being initialized")
        self.growth[gpu] = grows


@pytest.fixture
def memory(monkeypatch):
    module = importlib.import_module("kbtrain.backends.tensorflow.memory")
    monkeypatch.setattr(module, "_is_told", False)
    monkeypatch.delenv(module.VARIABLE, raising=False)
    return module


def growth_after(memory, monkeypatch, *args, **kwargs):
    gpus = Gpus(*args, **kwargs)
    monkeypatch.setattr(memory, "tf", types.SimpleNamespace(config=gpus))
    memory.prepare()
    memory.prepare()  # of a second Trainer
    return gpus.growth


def test_memory_of_gpus_grows_unless_the_user_has_chosen(memory, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "kbtrain")
    assert growth_after(memory, monkeypatch, {}) == {}
    unset = {"GPU:0": None, "GPU:1": None}
    assert growth_after(memory, monkeypatch, dict(unset)) == {"GPU:0": True, "GPU:1": True}
    assert growth_after(memory, monkeypatch, {"GPU:0": False}) == {"GPU:0": False}
    assert growth_after(memory, monkeypatch, {"GPU:0": None}, {"GPU:0": ["4 GB"]}) == {
        "GPU:0": None
    }
    monkeypatch.setenv(memory.VARIABLE, "false")
    assert growth_after(memory, monkeypatch, dict(unset)) == unset
    assert caplog.records == []


def test_that_memory_cannot_grow_any_more_is_said_once(memory, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "kbtrain")
    assert growth_after(memory, monkeypatch, {"GPU:0": None}, in_use=True) == {"GPU:0": None}
    (record,) = caplog.records
    assert "TF_FORCE_GPU_ALLOW_GROWTH=true" in record.getMessage()
    assert growth_after(memory, monkeypatch, {"GPU:0": True}, in_use=True) == {"GPU:0": True}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("updates", "said"),
    [
        (200, ["The step is compiled by XLA, which makes fewer kernels of it."]),
        (199, ["The step runs as a graph, without XLA: compiling takes longer than"]),
        (0, []),  # an evaluation
    ],
)
def test_on_a_gpu_one_line_says_whether_xla_is_used_and_why(updates, said, monkeypatch, caplog):
    compiling = importlib.import_module("kbtrain.backends.tensorflow.compile")
    monkeypatch.setattr(compiling, "_on_gpu", lambda: True)
    caplog.set_level(logging.INFO, "kbtrain")
    tf = importlib.import_module("tensorflow")
    step = compiling.compile_step(lambda x: x + 1, [], "auto", updates)
    for length in (1, 1, 2):
        np.testing.assert_array_equal(step(tf.zeros(length)), np.ones(length))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == len(said)
    assert all(text.startswith(start) for text, start in zip(texts, said, strict=True))
