"""A recorded PyTorch step as one Python function."""

import importlib
import weakref

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def modules(torch):
    package = "kbtrain.backends.torch.capture"
    names = "codegen", "program", "trace"
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


@pytest.fixture
def compiled(torch, modules):
    """``compiled(fn, *examples)``: a function of tensors, recorded and compiled."""

    def compile_function(fn, *examples, inductor=False):
        with torch.no_grad():
            recorded = modules["trace"].record(fn, examples)
            return modules["program"].make_program(recorded, examples, inductor, {})

    return compile_function


@pytest.fixture
def called(torch, modules):
    """``called(fn, *examples)``: what is called for the operations of a function of tensors."""

    def functions(fn, *examples):
        with torch.no_grad():
            graph = modules["trace"].record(fn, examples).graph
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        return [modules["codegen"].public_call(node)[0] for node in nodes]

    return functions


def test_a_public_function_is_called_where_it_leads_to_the_same_operation(torch, called):
    x = torch.ones(3, 4)
    assert called(lambda x: [torch.mm(x, x.t())], x) == [torch.t, torch.mm]
    assert called(lambda x: [x.sum(0, keepdim=True), x.sum()], x) == [torch.sum, torch.sum]
    assert called(lambda x: [x + 2.5, x.view(4, 3)], x) == [torch.add, torch.Tensor.view]
    assert called(lambda x: [torch.linalg.vector_norm(x)], x) == [torch.linalg.vector_norm]
    assert called(lambda x: [torch.nn.functional.gelu(x)], x) == [torch.nn.functional.gelu]


def test_a_conversion_is_called_by_its_short_name_if_it_makes_a_copy(torch, called):
    aten, x = torch.ops.aten, torch.ones(3)
    assert called(lambda x: [x.to(torch.float64)], x) == [torch.Tensor.double]
    assert called(lambda x: [x.to(torch.float32, copy=True)], x) == [aten._to_copy.default]


def test_other_operations_are_called_themselves(torch, called):
    aten, x = torch.ops.aten, torch.ones(3)
    assert called(lambda x: [aten.threshold_backward(x, x, 0)], x) == [
        aten.threshold_backward.default
    ]
    # It would look at the default device, which may have become another one.
    assert called(lambda x: [x * torch.full((3,), 2.0)], x)[0] is aten.full.default


@pytest.mark.parametrize("inductor", [False, True])
def test_the_function_gives_the_numbers_of_the_eager_one(
    inductor, torch, compiled, monkeypatch, caplog
):
    def fn(x, y):
        values, places = torch.max(x, dim=1)
        first, _, third = torch.split(y, 2)
        scaled = torch.clamp(first, max=float("inf")) / 3
        return [
            values * scaled.sum(),
            places,
            third.to(torch.float64),
            torch.cat([x, x], 1)[:, ::2],
        ]

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    generator = np.random.default_rng(0)
    x, y = (torch.tensor(generator.normal(size=s).astype("float32")) for s in ((3, 4), (6, 2)))
    found = compiled(fn, x, y, inductor=inductor).run(x, y)
    assert all(map(torch.equal, found, fn(x, y)))
    assert [t.dtype for t in found] == [t.dtype for t in fn(x, y)]
    assert ("torch.compile failed" in caplog.text) == inductor


def test_a_variable_is_changed_last(torch, compiled):
    def fn(x, variable):
        before = variable + 0.0
        variable.copy_(variable + x)
        return [before, variable * 2]

    x, variable = torch.ones(2), torch.zeros(2)
    program = compiled(fn, x, variable)
    assert program.changes == [1]
    for i in range(2):
        before, after = program.run(x, variable)
        assert before.tolist() == [i, i]
        assert after.tolist() == [2 * i + 2] * 2
    assert variable.tolist() == [2, 2]


def test_a_failed_check_leaves_the_variable_as_it_is(torch, compiled):
    guard = importlib.import_module("kbtrain.backends.torch.capture.guard")

    def fn(x, variable):
        guard.guard(torch.isfinite(x).all())
        variable.copy_(x)
        return [x * 2]

    variable = torch.zeros(2)
    program = compiled(fn, torch.ones(2), variable)
    with pytest.raises(guard.GuardFailed):
        program.run(torch.tensor([1.0, np.inf]), variable)
    assert variable.tolist() == [0, 0]
    program.run(torch.ones(2), variable)
    assert variable.tolist() == [1, 1]


def test_a_result_is_freed_after_its_last_use(torch, compiled, monkeypatch):
    alive = []

    def count(tensor):
        """The results of `sin` that are still there."""
        alive.append(weakref.ref(tensor))
        return sum(reference() is not None for reference in alive)

    counts = []
    sin = torch.sin

    def counted(x):
        result = sin(x)
        counts.append(count(result))
        return result

    def fn(x):
        for _ in range(5):
            x = torch.sin(x)
            x = x + 1
        return [x]

    program = compiled(fn, torch.ones(3))
    scope = program.run.__globals__
    for name in [name for name, value in scope.items() if value is sin]:
        scope[name] = counted
    program.run(torch.ones(3))
    assert counts == [1] * 5
