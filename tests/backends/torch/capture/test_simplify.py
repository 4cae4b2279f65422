"""What is left out of a recorded PyTorch step, because nothing changes without it."""

import importlib

import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture
def simplified(torch):
    """``simplified(fn, *examples)``: the names of the operations left of a function of tensors."""
    record = importlib.import_module("kbtrain.backends.torch.capture.trace").record
    simplify = importlib.import_module("kbtrain.backends.torch.capture.simplify").simplify

    def run(fn, *examples):
        with torch.no_grad():
            recorded = record(fn, examples)
            simplify(recorded)
        recorded.graph.lint()
        nodes = [node for node in recorded.graph.nodes if node.op == "call_function"]
        return [node.target._schema.name.partition("::")[2] for node in nodes]

    return run


def test_a_product_with_one_and_constants_of_known_shape_cost_nothing(torch, simplified):
    assert simplified(lambda x: [x * 1.0 + torch.zeros_like(x).exp()], torch.ones(3)) == ["add"]


def test_the_second_of_two_equal_operations_is_left_out(torch, simplified):
    def fn(x):
        return [(x.exp() + torch.ones(())) * (x.exp() + torch.ones(()))]

    assert simplified(fn, torch.ones(3)) == ["exp", "add", "mul"]


def test_operations_are_not_equal_if_an_argument_differs_in_type_or_sign(torch, simplified):
    x = torch.ones(3, dtype=torch.int32)
    assert simplified(lambda x: [(x + 1) * (x + 1.0)], x).count("add") == 2
    assert simplified(lambda x: [torch.cat([x / 0.0, x / -0.0])], x).count("div") == 2

    def fn(x):
        zero = torch.zeros(())
        return [torch.cat([x / zero, x / -zero])]

    assert simplified(fn, x).count("div") == 2


def test_an_operation_on_a_tensor_that_was_changed_is_done_again(torch, simplified):
    def fn(x, variable):
        before = variable.exp() * 2.0
        variable.copy_(x)
        return [before + variable.exp()]

    assert simplified(fn, torch.ones(3), torch.ones(3)).count("exp") == 2


def test_random_numbers_are_drawn_as_often_as_the_step_says(torch, simplified):
    assert simplified(lambda x: [torch.rand_like(x) - torch.rand_like(x)], torch.ones(3)) == [
        "rand_like",
        "rand_like",
        "sub",
    ]


def test_two_results_of_a_step_are_two_tensors(torch, simplified):
    assert simplified(lambda x: [x.exp(), x.exp()], torch.ones(3)) == ["exp", "exp"]


def test_a_large_result_is_computed_again_rather_than_kept(torch, simplified):
    assert simplified(lambda x: [x.exp() - x.exp()], torch.ones(100, 100)).count("exp") == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_finite_is_what_pytorch_says(dtype, torch):
    native = importlib.import_module(
        "kbtrain.backends.torch.capture.keras_overrides"
    ).native_operations
    info = torch.finfo(getattr(torch, dtype))
    values = [0.0, -0.0, info.max, info.min, info.tiny, float("inf"), -float("inf"), float("nan")]
    x = torch.tensor(values, dtype=getattr(torch, dtype))
    with native():
        found = torch.isfinite(x)
    assert found.dtype is torch.bool
    assert found.tolist() == [True] * 5 + [False] * 3
    with native():
        assert torch.isfinite(torch.tensor([1, 2])).tolist() == [True, True]


def test_an_input_that_is_assigned_twice_is_assigned_once_at_the_end(torch):
    package = "kbtrain.backends.torch.capture"
    trace, program = (importlib.import_module(f"{package}.{n}") for n in ("trace", "program"))

    def fn(x, state):
        before = state.clone()
        state.copy_(torch.zeros(3))
        state.copy_(state + x)
        gained = state.clone()
        state.copy_(before)
        torch.ops.aten._assert_async.default(gained.sum() > 0)  # after two changes, so far
        state.copy_(before + gained)
        return [gained * 1.5]

    x, state = torch.ones(3), torch.full((3,), 5.0)
    with torch.no_grad():
        made = program.make_program(trace.record(fn, (x, state)), (x, state), False, {})
    assert made.run(x, state)[0].tolist() == [1.5] * 3
    assert made.changes == [1]
    assert state.tolist() == [6.0] * 3
    with pytest.raises(importlib.import_module(f"{package}.guard").GuardFailed):
        made.run(-x, state)
    assert state.tolist() == [6.0] * 3


def test_a_tensor_that_the_step_changes_is_no_constant(torch, simplified):
    count = torch.zeros(())

    def fn(x):
        count.add_(1.0)
        return [x * (count * 3.0)]

    assert simplified(fn, torch.ones(3)) == ["add_", "mul", "mul"]
