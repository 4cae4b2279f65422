"""Joining the processes of a run on JAX, where it fails."""

import importlib
import socket

import pytest

from kbtrain.errors import ConfigurationError, DistributedError
from kbtrain.utils.machine.ports import free_ports
from kbtrain.utils.machine.processes import ProcessGroup

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


@pytest.fixture
def joining():
    return importlib.import_module("kbtrain.backends.jax.processes")


@pytest.fixture
def port():
    return free_ports()


def test_a_port_that_another_program_has_is_named(joining, monkeypatch):
    monkeypatch.setattr(joining, "meet", lambda *_: ())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        group = ProcessGroup(0, 2, port=taken, launcher="torchrun")
        with pytest.raises(DistributedError, match=f"port {taken} of .*Give torchrun another"):
            joining.start_processes(group, 5.0)


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_a_process_that_cannot_reach_the_first_one_says_so(joining, port, address):
    group = ProcessGroup(1, 2, address=address, port=port)
    with pytest.raises(
        DistributedError, match=f"Process 1 of 2 cannot reach process 0 at {address}"
    ):
        joining.start_processes(group, 0.2)


def test_processes_must_be_joined_before_the_first_tensor(joining, port, monkeypatch):
    monkeypatch.setattr(joining, "meet", lambda *_: ())
    importlib.import_module("jax").numpy.zeros(1)
    with pytest.raises(ConfigurationError, match="Import kbtrain .* before the first tensor"):
        joining.start_processes(ProcessGroup(0, 2, port=port), 5.0)


@pytest.mark.parametrize(
    ("visible", "local_size", "expected"),
    [(None, 4, 2), ("0,1,2,3", 4, 2), ("3", 4, None), (None, 1, None)],
)
def test_each_process_of_a_machine_has_its_own_gpu(
    joining, monkeypatch, visible, local_size, expected
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    group = ProcessGroup(2, 4, local_rank=2 % local_size, local_size=local_size)
    assert joining._own_device(group) == expected
