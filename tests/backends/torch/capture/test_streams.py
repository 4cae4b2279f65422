"""Streams of a GPU, on a CPU: what has to wait for what, and whether the stand-in notices."""

import contextlib
import gc
import importlib

import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def streams(torch):
    return importlib.import_module("fake_streams")


class Machine:
    """Two streams, one of them the current one, and a check of the order of what runs."""

    def __init__(self, streams):
        self.main, self.side = streams.Stream(), streams.Stream()
        self.current = self.main
        self.order = streams.Order(lambda: self.current, lambda: False)

    @contextlib.contextmanager
    def on_side(self):
        self.current = self.side
        yield
        self.current = self.main


@pytest.fixture
def machine(streams):
    found = Machine(streams)
    with found.order:
        yield found


def test_what_waits_is_in_order(machine, torch):
    x = torch.ones(4)
    for _ in range(3):
        machine.side.wait_stream(machine.main)
        with machine.on_side():
            result = x.mul_(2) + 1
        machine.main.wait_stream(machine.side)
        kept = result.clone()
        del result
        gc.collect()
    assert kept.tolist() == [9.0] * 4
    assert machine.order.checked > 6


def test_a_value_that_another_stream_may_still_compute_is_not_read(machine, streams, torch):
    x = torch.ones(4)
    with machine.on_side(), pytest.raises(streams.OutOfOrder, match="does not wait"):
        x + 1


def test_a_value_that_another_stream_may_still_read_is_not_overwritten(machine, streams, torch):
    x = torch.ones(4)
    machine.side.wait_stream(machine.main)
    with machine.on_side():
        x + 1
    with pytest.raises(streams.OutOfOrder, match="zero_.* does not wait"):
        x.zero_()


def test_memory_that_another_stream_may_still_read_is_not_given_out_again(machine, streams, torch):
    with machine.on_side():
        result = torch.ones(4)
    machine.main.wait_stream(machine.side)
    result.clone()
    del result
    gc.collect()
    with machine.on_side(), pytest.raises(streams.OutOfOrder, match="may get memory"):
        torch.ones(4)


class Leaf:
    """A result on a GPU, whose copy to the host is made on the current stream."""

    is_cuda = True

    def __init__(self, torch, value):
        self.device, self._value = torch.device("cuda", 0), value

    def detach(self):
        return self

    def to(self, device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        return self._value.clone()


@pytest.fixture
def device(machine, streams, torch, monkeypatch):
    """kbtrain's functions for devices, with the streams of the machine and its host."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: streams.Event(machine.order.host))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.current)
    found = importlib.import_module("kbtrain.backends.torch.device")
    monkeypatch.setattr(found, "to_host", lambda tree: [machine.order.on_host(x) for x in tree])
    return found


def test_results_are_read_when_they_have_arrived_and_wait_for_nothing_later(
    machine, torch, device, monkeypatch
):
    value = torch.ones(4)
    wait = device.start_to_host([Leaf(torch, value)])
    value.mul_(2)  # the next update
    later = machine.main.seen[machine.main]
    (found,) = wait()
    assert found.tolist() == [1.0] * 4
    assert machine.order.host.seen[machine.main] < later


def test_an_event_of_another_stream_says_nothing_about_the_copies(
    machine, streams, torch, device, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.side)
    wait = device.start_to_host([Leaf(torch, torch.ones(4))])
    with pytest.raises(streams.OutOfOrder, match="host"):
        wait()
