"""Collective operations in a recorded PyTorch step start as soon as they can."""

import importlib

import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def modules():
    package = "kbtrain.backends.torch.capture"
    names = "aliasing", "overlap", "trace"
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


@pytest.fixture
def scheduled(torch, modules):
    """``scheduled(fn, *examples)``: names of the operations in their recorded and new order."""

    def schedule(fn, *examples):
        with torch.no_grad():
            graph = modules["trace"].record(fn, examples).graph
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        order = modules["overlap"].start_early(nodes, modules["aliasing"].AliasAnalysis(graph))
        assert sorted(node.name for node in order) == sorted(node.name for node in nodes)
        position = {node: i for i, node in enumerate(order)}
        assert all(
            position[s] < position[n] for n in order for s in n.all_input_nodes if s in position
        )
        return [node.name for node in nodes], [node.name for node in order]

    return schedule


@pytest.fixture
def reduce_(torch):
    """Start the sum over processes of tensors in one piece of memory; the result waits for it."""
    c10d = torch.ops._c10d_functional

    def start(*tensors):
        flat = torch.cat([t.reshape(-1) for t in tensors])
        started = c10d.all_reduce_(flat, "sum", "0")
        return lambda: c10d.wait_tensor(started)

    return start


def index_of(order, name, nth=0):
    return [i for i, found in enumerate(order) if found.startswith(name)][nth]


def test_a_reduction_starts_behind_the_last_gradient_it_sends(torch, scheduled, reduce_):
    def backward(x, w):
        last = torch.mm(x, w)
        first = torch.mm(last, w)
        rest = torch.mm(first, w)
        waits = [reduce_(last, first * 2), reduce_(rest)]
        return [wait() for wait in waits]

    recorded, order = scheduled(backward, torch.ones(3, 3), torch.ones(3, 3))
    assert index_of(recorded, "all_reduce_") > index_of(recorded, "mm", 2)
    assert index_of(order, "mm", 1) < index_of(order, "all_reduce_") < index_of(order, "mm", 2)
    assert index_of(order, "mm", 2) < index_of(order, "all_reduce_", 1)
    assert index_of(order, "all_reduce_", 1) < index_of(order, "wait_tensor")


def test_collectives_keep_their_order(torch, scheduled, reduce_):
    def backward(x, w):
        early = torch.mm(x, w)
        late = torch.mm(early, w)
        waits = [reduce_(late), reduce_(early)]  # the second could start first
        return [wait() for wait in waits]

    recorded, order = scheduled(backward, torch.ones(3, 3), torch.ones(3, 3))
    assert [n for n in recorded if n.startswith("all_")] == [
        n for n in order if n.startswith("all_")
    ]
    assert index_of(order, "mm", 1) < index_of(order, "all_reduce_")


def test_nothing_moves_across_a_write_to_memory_that_it_reads(torch, scheduled, reduce_):
    def backward(x, w):
        gradient = torch.mm(x, w)
        other = torch.mm(w, w)
        gradient.mul_(2)
        unrelated = torch.mm(other, w)
        wait = reduce_(gradient)
        return [wait(), unrelated]

    _, order = scheduled(backward, torch.ones(3, 3), torch.ones(3, 3))
    assert index_of(order, "mul_") < index_of(order, "cat") < index_of(order, "all_reduce_")
    assert index_of(order, "all_reduce_") < index_of(order, "mm", 2)


def test_a_sum_of_memory_that_others_read_stays_behind_them(torch, scheduled):
    c10d = torch.ops._c10d_functional

    def backward(x, w):
        gradient = torch.mm(x, w)
        kept = torch.mm(gradient, w)
        return [c10d.wait_tensor(c10d.all_reduce_(gradient, "sum", "0")), kept]

    recorded, order = scheduled(backward, torch.ones(3, 3), torch.ones(3, 3))
    assert order == recorded
