"""Recording PyTorch operations on fake tensors, without all that ``make_fx`` can besides.

``make_fx`` looks for numbers that are not known yet, keeps a copy of every result's description and
follows every torch function: three quarters of the time of a recording. None of it is needed for a
step whose Python never looks at a value. This records such a step; about any other it says so, and
``make_fx`` has to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_DEVICE = torch.ops.prim.device.default
_LITERALS = (
    *(bool, int, float, str, complex, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Unrecorded(Exception):
    """Something that this cannot record; the message says what."""


class Record(torch.nn.Module):  # type: ignore[misc]
    """A recorded function: a graph of ATen operations and the tensors that are constants in it.

    Attributes:
        graph: Each node has a fake tensor like its result as ``meta["val"]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()


def record(fn: Callable[..., Sequence[Any]], examples: Sequence[torch.Tensor]) -> Record:
    """Record the operations of a function of tensors.

    Args:
        fn: Returns a list of tensors.
        examples: Tensors like its arguments; their values are not looked at.

    Returns:
        The record.

    Raises:
        Unrecorded: There is an operation or an argument that this does not know.
        Exception: Whatever ``fn`` raises, and PyTorch if it looks at a value.
    """
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        fakes = FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True)
    given = [fakes.from_tensor(example) for example in examples]
    recorder = _Recorder(given)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # which would hold what no operation here has made
    try:
        with fakes, recorder:
            results = fn(*given)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return recorder.finish(results)


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Writes down every operation that is dispatched.

    Args:
        inputs: Fake tensors that are the inputs of the graph.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._record = Record()
        self._nodes: dict[int, Node] = {}
        # An id belongs to one tensor for as long as that lives.
        self._alive: list[torch.Tensor] = []
        for i, tensor in enumerate(inputs):
            self._know(tensor, self._record.graph.placeholder(f"input_{i}"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # asked for more often than anything is computed
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func not in _KNOWN:
            _examine(func)
        graph_args = tuple([self._argument(x) for x in args])
        graph_kwargs = {key: self._argument(x) for key, x in kwargs.items()} if kwargs else {}
        result = func(*args, **kwargs)
        if func is aten.detach.default:  # the same memory; a record has no gradients to stop
            self._nodes[id(result)] = graph_args[0]
            self._alive.append(result)
            return result
        # A tensor that Python has made stays as it is; what is changed is a copy of it.
        target = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        node = self._record.graph.call_function(target, graph_args, graph_kwargs)
        if isinstance(result, torch.Tensor):
            self._know(result, node)
        elif isinstance(result, list | tuple):
            node.meta["val"] = result
            for i, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._know(item, self._record.graph.call_function(operator.getitem, (node, i)))
                elif not isinstance(item, bool | int | float | None):
                    raise Unrecorded(f"{func} returns a {type(item).__name__}")
        elif result is not None:
            self._number(result, node)
        return result

    def finish(self, results: Sequence[Any]) -> Record:
        """The record of a function with these results."""
        self._record.graph.output([self._argument(result) for result in results])
        return self._record

    def _know(self, tensor: torch.Tensor, node: Node) -> None:
        node.meta["val"] = tensor
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _number(self, result: Any, node: Node) -> None:
        """A number is one that torch knows without looking: it is the same in every step."""
        if not isinstance(result, bool | int | float):
            raise Unrecorded(f"{node.target} returns a {type(result).__name__}")
        self._record.graph.erase_node(node)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = self._nodes.get(id(value))
            return self._constant(value) if node is None else node
        if isinstance(value, _LITERALS):
            return value
        if isinstance(value, list | tuple):
            return [self._argument(item) for item in value]
        raise Unrecorded(f"an argument is a {type(value).__name__}")

    def _constant(self, tensor: torch.Tensor) -> Node:
        """A tensor that was there before: an attribute of the record."""
        if isinstance(tensor, FakeTensor):
            raise Unrecorded("a fake tensor came from nowhere")
        name = f"constant_{len(self._nodes)}"
        setattr(self._record, name, tensor)
        node = self._record.graph.get_attr(name)
        self._know(tensor, node)
        return node


_KNOWN: set[Any] = set()


def _examine(func: Any) -> None:
    """Let an operation pass that means itself and leaves its arguments their shape.

    Raises:
        Unrecorded: It does not.
    """
    if not isinstance(func, OpOverload):
        raise Unrecorded(f"{func} is no operation of torch's library")
    if torch.Tag.inplace_view in func.tags:
        raise Unrecorded(f"{func} changes the shape of a tensor that is there")
    if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
        raise Unrecorded(f"{func} stands for others")
    _KNOWN.add(func)
