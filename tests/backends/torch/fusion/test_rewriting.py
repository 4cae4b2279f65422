"""What a recorded step may be rewritten to, so that its results stay the same."""

import importlib
import itertools

import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on

FUSION = "kbtrain.backends.torch.fusion"


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture
def fused(torch, monkeypatch):
    """``fused(fn, x)``: the recorded function, with its scalars computed together."""
    record = importlib.import_module("kbtrain.backends.torch.capture.trace").record
    scalar_kernel = importlib.import_module(f"{FUSION}.scalar_kernel")
    fusion = importlib.import_module(FUSION)
    scalars = importlib.import_module(f"{FUSION}.scalars")
    monkeypatch.setattr(fusion, "KIND", "cpu")
    monkeypatch.setattr(
        scalar_kernel.Scalars, "_launch", lambda self, *inputs: self._run.plain(*inputs)
    )

    def run(fn, *examples):
        with torch.no_grad():
            recorded = record(fn, examples)
        nodes = list(recorded.graph.nodes)
        constants = {n: getattr(recorded, n.target) for n in nodes if n.op == "get_attr"}
        calls = [node for node in nodes if node.op == "call_function"]
        order = scalars.fuse_scalars(calls, constants)
        for node, later in itertools.pairwise([*constants, *order]):
            node.append(later)
        recorded.graph.lint()
        (kernel,) = (node for node in order if isinstance(node.target, scalar_kernel.Scalars))
        assert {*constants} <= {*kernel.args}  # their values are not in its text
        return lambda *inputs: torch.fx.Interpreter(recorded).run(*inputs)

    return run


def test_a_tensor_that_is_no_variable_is_read_in_each_step(torch, fused):
    k, count = torch.tensor(2.0), torch.tensor(0.0)

    def fn(x):
        count.add_(1.0)
        return [x * k + 1.0, count * 3.0 + x]

    run = fused(fn, torch.tensor(1.0))
    count.zero_()
    assert [float(y) for y in run(torch.tensor(2.0))] == [5.0, 5.0]
    k.fill_(10.0)
    assert [float(y) for y in run(torch.tensor(2.0))] == [21.0, 8.0]


def test_only_an_operation_between_the_copy_and_the_selection_gets_the_flag(torch):
    """What was done before the old state was kept is not undone."""
    importlib.import_module("optim.kernels.torch")
    graph, aten = torch.fx.Graph(), torch.ops.aten
    values = {"p": torch.ones(3), "g": torch.ones(3), "x": torch.ones(()), "c": torch.tensor(True)}
    nodes = {name: graph.placeholder(name) for name in values}
    for name, value in values.items():
        nodes[name].meta["val"] = value
    p, g, x, c = nodes.values()

    def optimizer():
        return graph.call_function(torch.ops.optim.run_rules.default, ([p], [g], [], x, x, 0))

    first = optimizer()
    old = graph.call_function(aten.clone.default, (p,))
    second = optimizer()
    chosen = graph.call_function(aten.where.self, (c, p, old))
    graph.call_function(aten.copy_.default, (p, chosen))
    third = optimizer()
    graph.output(())
    importlib.import_module(f"{FUSION}.optimizer_arguments").pass_flags(graph)
    assert ["found_inf" in node.kwargs for node in (first, second, third)] == [False, True, False]
