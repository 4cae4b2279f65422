"""Records PyTorch operations on fake tensors, without the general machinery of ``make_fx``.

``make_fx`` tracks unbacked symbols, keeps a copy of the metadata of every result and intercepts
every torch function, which takes three quarters of the recording time. A step whose Python never
reads a value needs none of this. Such a step is recorded here; for others an error is raised, and
``make_fx`` records them.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
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
    """An operation that cannot be recorded here, named in the message."""


class Record(torch.nn.Module):  # type: ignore[misc]
    """A recorded function: a graph of ATen operations and its constant tensors.

    Attributes:
        graph: The graph. Each node has a fake tensor like its result as ``meta["val"]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """PyTorch logs two tracebacks for an error that is raised as well, and explained elsewhere."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def record(fn: Callable[..., Sequence[Any]], examples: Sequence[torch.Tensor]) -> Record:
    """Record the operations of a function of tensors.

    Args:
        fn: Returns a list of tensors.
        examples: Tensors like its arguments; their values are not used.

    Returns:
        The recorded function.

    Raises:
        Unrecorded: An operation or an argument is not supported.
        Exception: Any error of ``fn``, or of PyTorch if the function reads a value.
    """
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        # An operation without a rule for fake tensors runs on zeros, which a GPU's memory may not
        # have room for.
        on_host = all(example.device.type == "cpu" for example in examples)
        fakes = FakeTensorMode(allow_fallback_kernels=on_host, allow_non_fake_inputs=True)
    given = [fakes.from_tensor(example) for example in examples]
    recorder = _Recorder(given)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(
        False
    )  # it would hold results of operations that are not recorded
    try:
        with fakes, recorder:
            results = fn(*given)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return recorder.finish(results)


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Records every operation that is dispatched.

    Args:
        inputs: Fake tensors that are the inputs of the graph.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._record = Record()
        self._nodes: dict[int, Node] = {}
        # An id is unique only while its tensor is alive.
        self._alive: list[torch.Tensor] = []
        for i, tensor in enumerate(inputs):
            self._know(tensor, self._record.graph.placeholder(f"input_{i}"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # queried more often than anything is computed
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func not in _KNOWN:
            _check_supported(func)
        graph_args = tuple([self._argument(x) for x in args])
        graph_kwargs = {key: self._argument(x) for key, x in kwargs.items()} if kwargs else {}
        result = func(*args, **kwargs)
        if func is aten.detach.default:  # the same memory; the graph has no gradients to stop
            self._nodes[id(result)] = graph_args[0]
            self._alive.append(result)
            return result
        # A tensor created by Python must stay unchanged: a copy of it is modified.
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
        """The recorded function with these results."""
        self._record.graph.output([self._argument(result) for result in results])
        return self._record

    def _know(self, tensor: torch.Tensor, node: Node) -> None:
        node.meta["val"] = tensor
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _number(self, result: Any, node: Node) -> None:
        """A number that torch knows without reading a tensor, so it is the same in every step."""
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
        """An existing tensor, as an attribute of the recorded function."""
        if isinstance(tensor, FakeTensor):
            raise Unrecorded("a fake tensor came from nowhere")
        name = f"constant_{len(self._nodes)}"
        setattr(self._record, name, tensor)
        node = self._record.graph.get_attr(name)
        self._know(tensor, node)
        return node


_KNOWN: set[Any] = set()


def _check_supported(func: Any) -> None:
    """Check that an operation is not decomposed and does not resize its arguments.

    Raises:
        Unrecorded: It is, or it does.
    """
    if not isinstance(func, OpOverload):
        raise Unrecorded(f"{func} is not an operation of torch's library")
    if torch.Tag.inplace_view in func.tags:
        raise Unrecorded(f"{func} changes the shape of an existing tensor")
    if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
        raise Unrecorded(f"{func} is decomposed into others")
    _KNOWN.add(func)
