"""JAX: which devices there are, and what is waited for, on machines unlike this one."""

import importlib
import types

import pytest

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


@pytest.fixture(scope="module")
def device():
    return importlib.import_module("kbtrain.backends.jax.device")


def test_a_platform_that_jax_was_told_to_leave_out_has_no_devices(device, monkeypatch):
    """With JAX_PLATFORMS=cuda there is no CPU either, and asking for it is an error of JAX's."""

    def count(platform):
        if platform == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return 2

    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(device.jax, "local_devices", lambda: [gpu, gpu])
    monkeypatch.setattr(device.jax, "local_device_count", count)
    assert device.devices() == ["gpu:0", "gpu:1"]


def test_a_run_on_another_device_than_the_default_one_is_waited_for(device, monkeypatch):
    waited = []

    class Device:
        def __init__(self, name):
            self.synchronize_all_activity = lambda: waited.append(name)

    gpu, cpu = Device("gpu"), Device("cpu")
    monkeypatch.setattr(device.jax, "local_devices", lambda: [gpu])
    for here, expected in ((cpu, ["gpu", "cpu"]), (gpu, ["gpu"])):
        placed = types.SimpleNamespace(devices=lambda here=here: {here})
        monkeypatch.setattr(device.jnp, "zeros", lambda shape, placed=placed: placed)
        waited.clear()
        device.synchronize()
        assert waited == expected
