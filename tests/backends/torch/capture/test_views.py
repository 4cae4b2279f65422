"""Copies that are left out of a recorded PyTorch step."""

import importlib

import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture
def copied(torch):
    """``copied(make)``: what is left of copies of views, as arguments of the operation made."""
    views = importlib.import_module("kbtrain.backends.torch.capture.views")

    def run(make):
        graph = torch.fx.Graph()
        contiguous = {"memory_format": torch.contiguous_format}
        copies = []
        for i in range(5):
            source = graph.placeholder(f"x{i}")
            source.meta["val"] = torch.empty(2, 4, 3, 8, device="meta").transpose(1, 2)
            copy = graph.call_function(torch.ops.aten.clone.default, (source,), contiguous)
            copy.meta["val"] = torch.empty(2, 3, 4, 8, device="meta")
            copies.append(copy)
        made = make(graph, torch.ops.aten, copies)
        graph.output(made)
        views.copy_where_needed(graph)
        graph.lint()
        return "".join("-" if node.op == "placeholder" else "c" for node in made.all_input_nodes)

    return run


def call(name, *places):
    """An operation with copies as its arguments; a keyword for the last one, if it is 'mask'."""

    def make(graph, aten, copies):
        kwargs = {"attn_mask": copies[4]} if "mask" in places else {}
        args = tuple(copies[i] for i in places if i != "mask")
        return graph.call_function(getattr(aten, name).default, args, kwargs)

    return make


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_attention_on_a_gpu_reads_query_key_and_value_where_they_lie(kernel, copied):
    name = f"_scaled_dot_product_{kernel}_attention"
    assert copied(call(name, 0, 1, 2)) == "---"
    assert copied(call(name, 0, 1, 2, 3)) == "---c"  # a bias has to be aligned
    assert copied(call(f"{name}_backward", 0, 1, 2, 3)) == "----"
    assert copied(call(f"{name}_backward", 0, 1, 2, 3, 4)) == "----c"


def test_attention_on_a_cpu_takes_a_mask_as_a_view_too(copied):
    name = "_scaled_dot_product_flash_attention_for_cpu"
    assert copied(call(name, 0, 1, 2, "mask")) == "----"


def test_other_operations_get_their_copies(copied):
    assert copied(call("cat", 0, 1, 2)) == "ccc"


# --- layouts that kernels choose ------------------------------------------------------------------


def other_layout(tensor, shift):
    """The same values with other strides, as a library of a GPU may return them."""
    axes = [(i + shift) % tensor.dim() for i in range(tensor.dim())]
    back = [axes.index(i) for i in range(tensor.dim())]
    return tensor.permute(axes).contiguous().permute(back)


@pytest.fixture
def values_of(torch):
    """``values_of(fn, *examples, shift)``: its results by a record, with convolutions re-laid."""
    capture = {
        name: importlib.import_module(f"kbtrain.backends.torch.capture.{name}")
        for name in ("trace", "program", "views", "codegen")
    }

    def run(fn, *examples, shift):
        with torch.no_grad():
            module = capture["trace"].record(fn, examples)
            original = capture["codegen"].public_call

            def call(node):
                function, args, kwargs = original(node)
                if node.target is torch.ops.aten.convolution.default:
                    return (lambda *x, **y: other_layout(function(*x, **y), shift)), args, kwargs
                return function, args, kwargs

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(capture["codegen"], "public_call", call)
                program = capture["program"].make_program(module, examples, False, {})
            return program.run(*examples)

    return run


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_numbers_do_not_depend_on_how_kernels_lay_out_their_results(torch, values_of, shift):
    aten = torch.ops.aten
    torch.manual_seed(0)
    x, kernel, weight = torch.randn(4, 3, 8, 8), torch.randn(6, 3, 3, 3), torch.randn(216, 2)
    parameter, gradient = torch.randn(6, 3, 3, 3), torch.randn(4, 6, 3, 3)

    def fn(x, kernel, weight, parameter, gradient, step):
        y = aten.convolution.default(x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        flat = y.view(4, 216) @ weight
        windows = y.as_strided((4, 5, 2), (216, 36, 1))
        turned = y.view(4, 6, 18, 2).view(torch.float64)
        # A gradient, which an optimizer takes as one block of memory.
        g = aten.convolution.default(
            parameter, gradient[:3, :3], None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        )
        torch._fused_sgd_(
            [parameter], [g], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        return [flat, windows.clone(), turned.clone()]

    def examples():
        return [t.clone() for t in (x, kernel, weight, parameter, gradient, torch.ones(()))]

    wanted, found = examples(), examples()
    with torch.no_grad():
        expected = fn(*wanted)
    results = values_of(fn, *found, shift=shift)
    for result, other in zip([*results, found[3]], [*expected, wanted[3]], strict=True):
        torch.testing.assert_close(result, other, rtol=1e-6, atol=1e-6)


def test_arguments_visited_for_an_update_grow_linearly_with_its_tensors(torch, monkeypatch):
    """A fused update takes lists of all tensors; they are not rebuilt for each gradient."""
    views = importlib.import_module("kbtrain.backends.torch.capture.views")
    aten, visits = torch.ops.aten, []
    map_arg, replace = torch.fx.map_arg, torch.fx.Node.replace_input_with

    def counted_map(args, function):
        return map_arg(args, lambda node: (visits.append(node), function(node))[1])

    def counted_replace(node, old, new):
        visits.extend(node.all_input_nodes)
        replace(node, old, new)

    monkeypatch.setattr(torch.fx, "map_arg", counted_map)
    monkeypatch.setattr(torch.fx.Node, "replace_input_with", counted_replace)

    def visited(tensors):
        graph, lists = torch.fx.Graph(), []
        for _ in range(5):
            lists.append([graph.placeholder("x") for _ in range(tensors)])
        lists[1] = [graph.call_function(aten.neg.default, (x,)) for x in lists[1]]
        for node in graph.nodes:
            node.meta["val"] = torch.empty(3, device="meta")
        weights, gradients, first, second, steps = lists
        update = graph.call_function(
            aten._fused_adamw_.default, (weights, gradients, first, second, [], steps)
        )
        graph.output(())
        visits.clear()
        views.allow_other_strides(graph)
        graph.lint()
        assert [g.target for g in update.args[1]] == [aten.contiguous.default] * tensors
        assert [g.args[0] for g in update.args[1]] == gradients
        assert [update.args[i] for i in (0, 2, 3, 5)] == [weights, first, second, steps]
        return len(visits)

    assert visited(60) <= 20 * visited(3)
