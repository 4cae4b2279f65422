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
