"""Operations on scalars as the text of a Triton kernel.

One program of one warp loads all scalars, computes, and stores the results. Arithmetic, divisions
and square roots round as PyTorch's kernels do: there is no fused multiply-add. Sums are added in
another order, and a sine, a cosine or a power may differ in the last digit. The first result of a
kernel is compared with that of the operations.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import linecache
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from kbtrain.backends.torch.capture.codegen import FunctionSource
from kbtrain.backends.torch.device import is_oom
from kbtrain.utils.fallback import PrivateApi

aten = torch.ops.aten

LONGEST = 1024
"""Numbers of a vector that is summed in the kernel."""

_DTYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.bool: "tl.int1",
}
_FLOATS = (torch.float32, torch.float64)
_NAN = "propagate_nan=tl.PropagateNan.ALL"


@functools.cache
def is_available() -> bool:
    """Whether Triton is installed, which PyTorch for CUDA brings."""
    return importlib.util.find_spec("triton") is not None


# --- what can be in a kernel ----------------------------------------------------------------------

_ARITHMETIC = {
    aten.add.Tensor: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.mul.Tensor: "{0} * {1}",
    aten.rsub.Scalar: "{1} - {0}",
    aten.maximum.default: f"tl.maximum({{0}}, {{1}}, {_NAN})",
    aten.minimum.default: f"tl.minimum({{0}}, {{1}}, {_NAN})",
    aten.clamp_min.default: f"tl.maximum({{0}}, {{1}}, {_NAN})",
    aten.clamp_max.default: f"tl.minimum({{0}}, {{1}}, {_NAN})",
    aten.neg.default: "-{0}",
    aten.abs.default: "tl.abs({0})",
}
_CLAMPS = (aten.clamp.default, aten.clamp.Tensor)
_POWERS = (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
_REMAINDERS = (aten.remainder.Tensor, aten.remainder.Scalar)
_OF_FLOATS = {
    aten.exp.default: "tl.exp({0}.to(tl.float64)).to({0}.dtype)",
    aten.log.default: "tl.log({0}.to(tl.float64)).to({0}.dtype)",
    aten.sqrt.default: "root({0})",
    aten.cos.default: "tl.cos({0})",
    aten.sin.default: "tl.sin({0})",
    aten.floor.default: "tl.floor({0})",
    aten.ceil.default: "tl.ceil({0})",
}
_COMPARISONS = {
    getattr(getattr(aten, name), overload): f"{{0}} {sign} {{1}}"
    for name, sign in zip(
        ("eq", "ne", "lt", "le", "gt", "ge"), ("==", "!=", "<", "<=", ">", ">="), strict=True
    )  # fmt: skip
    for overload in ("Tensor", "Scalar")
}
_LOGIC = {
    aten.logical_not.default: "~{0}",
    aten.logical_and.default: "{0} & {1}",
    aten.logical_or.default: "{0} | {1}",
}
_COPIES = (aten._to_copy.default, aten.clone.default)
_ASSIGNMENTS = (aten.copy_.default, aten.copy.default)
_DIVISIONS = (aten.div.Tensor, aten.reciprocal.default)
_SUMS = (aten.sum.default, aten.linalg_vector_norm.default)
_KEYWORDS = {aten._to_copy.default: {"dtype"}, aten.clone.default: {"memory_format"}}

_HEAD = """\
import triton
import triton.language as tl


@triton.jit
def quotient(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def power(x, y):
    base = x.to(tl.float64)
    exponent = y.to(tl.float64)
    size = tl.exp2(exponent * tl.log2(tl.abs(base)))
    size = tl.where((tl.abs(base) == 1) | (exponent == 0), 1.0, size)
    is_whole = exponent == tl.floor(exponent)
    is_even = exponent * 0.5 == tl.floor(exponent * 0.5)
    signed = tl.where(is_even, size, tl.where(is_whole, -size, float("nan")))
    return tl.where(base < 0, signed, size).to(x.dtype)


@triton.jit
def remainder(x, y):
    rest = x % y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
"""


_TABLES: tuple[Any, ...] = (
    *(_ARITHMETIC, _OF_FLOATS, _COMPARISONS, _LOGIC, _COPIES, _ASSIGNMENTS, _DIVISIONS, _SUMS),
    *(_CLAMPS, _POWERS, _REMAINDERS, (aten.where.self,)),
)


def is_supported(
    node: Node, device: torch.device | None = None, numbers: Container[Node] = ()
) -> bool:
    """Whether an operation can be a part of a kernel.

    Args:
        node: The operation.
        device: Where the kernel runs; None for the device of the result.
        numbers: Nodes whose values are written into the kernel, wherever they are.
    """
    target = node.target
    if not any(target in table for table in _TABLES):
        return False
    if set(node.kwargs) - _KEYWORDS.get(target, set()):
        return False
    values = [source.meta.get("val") for source in node.all_input_nodes]
    result = values[0] if target is aten.copy_.default else node.meta.get("val")
    tensors = [value for value in (result, *values) if isinstance(value, torch.Tensor)]
    if len(tensors) < len(values) + 1 or any(tensor.dtype not in _DTYPES for tensor in tensors):
        return False
    device = device or result.device
    read = [n.meta["val"] for n in node.all_input_nodes if n not in numbers]
    if result.dim() or any(tensor.device != device for tensor in (result, *read)):
        return False
    if target in _SUMS:
        (value,) = values
        plain = len(node.args) == 1 and value.dtype is result.dtype and value.dtype in _FLOATS
        return plain and value.dim() == 1 and value.is_contiguous() and 0 < len(value) <= LONGEST
    if (target in _OF_FLOATS or target in _POWERS) and result.dtype not in _FLOATS:
        return False
    if target in _ARITHMETIC and result.dtype is torch.bool:
        return False
    if target in _REMAINDERS and result.dtype in (*_FLOATS, torch.bool):
        return False
    most = 3 if target in (aten.where.self, *_CLAMPS) else 2
    if len(node.args) > most or None in node.args or (most == 3 and len(node.args) < 3):
        return False
    return all(value.dim() == 0 for value in values)


# --- the text -------------------------------------------------------------------------------------


class _Text:
    """The text of a kernel.

    Args:
        inputs: Names of the nodes that are loaded.
        constants: Values of the nodes that are known.
    """

    def __init__(self, inputs: Sequence[Node], constants: Mapping[Node, torch.Tensor]) -> None:
        self.lines: list[str] = []
        self._names: dict[Node, str] = {node: f"a{i}" for i, node in enumerate(inputs)}
        self._dtypes = {node: node.meta["val"].dtype for node in inputs}
        self._constants = constants
        for node, name in self._names.items():
            value = node.meta["val"]
            if value.dim():
                width = 1 << (len(value) - 1).bit_length()
                places = f"tl.arange(0, {width})"
                self.lines += [f"{name} = tl.load(p_{name} + {places}, {places} < {len(value)}, 0)"]
            else:
                self.lines.append(f"{name} = tl.load(p_{name})")

    def name(self, node: Node) -> str:
        """The name of a value."""
        return self._names[node]

    def value(self, operand: Any, dtype: torch.dtype) -> str:
        """An operand in a dtype."""
        if isinstance(operand, Node) and operand in self._names:
            same = self._dtypes[operand] is dtype
            return self._names[operand] if same else self._cast(self._names[operand], dtype)
        if isinstance(operand, Node):
            operand = self._constants[operand].to(dtype).item()
        number = repr(operand) if math.isfinite(operand) else f'float("{operand}")'
        return f"tl.full((), {number}, {_DTYPES[dtype]})"

    @staticmethod
    def _cast(name: str, dtype: torch.dtype) -> str:
        return f"({name} != 0)" if dtype is torch.bool else f"{name}.to({_DTYPES[dtype]})"

    def operation(self, node: Node) -> None:
        """Add one operation."""
        target, args = node.target, node.args
        if target in _ASSIGNMENTS:
            dtype = args[0].meta["val"].dtype
            name = f"v{len(self.lines)}"
            self.lines.append(f"{name} = {self.value(args[1], dtype)}")
            for known in (node, args[0]) if target is aten.copy_.default else (node,):
                self._names[known], self._dtypes[known] = name, dtype
            return
        dtype = node.meta["val"].dtype
        expression = self._expression(target, args, dtype)
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self._names[node], self._dtypes[node] = name, dtype

    def _expression(self, target: Any, args: Sequence[Any], dtype: torch.dtype) -> str:
        if target in _COMPARISONS:
            common = torch.result_type(*(_example(operand) for operand in args))
            common = torch.int32 if common is torch.bool else common
            return _COMPARISONS[target].format(*(self.value(operand, common) for operand in args))
        if target in _LOGIC:
            return _LOGIC[target].format(*(self.value(operand, torch.bool) for operand in args))
        if target is aten.where.self:
            condition, *sides = args
            chosen = ", ".join(self.value(side, dtype) for side in sides)
            return f"tl.where({self.value(condition, torch.bool)}, {chosen})"
        operands = [self.value(operand, dtype) for operand in args]
        if target in _COPIES:
            return operands[0]
        if target in _DIVISIONS:
            top, bottom = operands if len(operands) == 2 else (self.value(1.0, dtype), *operands)
            return f"quotient({top}, {bottom})"
        if target is aten.sum.default:
            return f"tl.sum({operands[0]})"
        if target is aten.linalg_vector_norm.default:
            return f"root(tl.sum({operands[0]} * {operands[0]}))"
        if target in _POWERS:
            return f"power({', '.join(operands)})"
        if target in _REMAINDERS:
            return f"remainder({', '.join(operands)})"
        if target in _CLAMPS:
            raised = f"tl.maximum({operands[0]}, {operands[1]}, {_NAN})"
            return f"tl.minimum({raised}, {operands[2]}, {_NAN})"
        return (_ARITHMETIC | _OF_FLOATS)[target].format(*operands)


def _example(operand: Any) -> Any:
    return operand.meta["val"] if isinstance(operand, Node) else operand


_NUMBERS = itertools.count()


def compiled(text: str) -> Any:
    """The function ``kernel`` of a text, as Triton takes it: with its text where Python looks."""
    name = f"<kbtrain kernel {next(_NUMBERS)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": "kbtrain_kernel"}
    # As this module is compiled, types of arguments would be text of text, and not read.
    exec(compile(text, name, "exec", dont_inherit=True), scope)
    return scope["kernel"]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may be read from the device."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())


def are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a kernel's results are those of PyTorch's operations, up to a few roundings."""
    if found.dtype is not expected.dtype or found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return bool(torch.equal(found, expected))
    both = found.double(), expected.double()
    return bool(torch.allclose(*both, rtol=1e-4, atol=1e-7, equal_nan=True))


# --- a kernel -------------------------------------------------------------------------------------


class Scalars:
    """A group of operations on scalars as one function, whose name is that of an operation.

    Args:
        nodes: The operations, in order.
        inputs: What they read, and the variables that they assign.
        results: The nodes whose values are needed elsewhere.
        written: The inputs that they assign.
        constants: Nodes that are constant tensors, with these tensors.
    """

    __name__ = "scalars"

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[Node],
        results: Sequence[Node],
        written: Sequence[Node],
        constants: Mapping[Node, torch.Tensor],
    ) -> None:
        text = _Text(inputs, constants)
        for node in nodes:
            text.operation(node)
        names = [f"p_a{i}" for i in range(len(inputs))]
        body = list(text.lines)
        for i, node in enumerate(results):
            names.append(f"r{i}")
            body.append(f"tl.store(r{i}, {text.name(node)})")
        body += [f"tl.store(p_a{inputs.index(node)}, {text.name(node)})" for node in written]
        lines = [f"def kernel({', '.join(names)}):", *(f"    {line}" for line in body), ""]
        self.text = _HEAD + "\n".join(lines)
        self._dtypes = [node.meta["val"].dtype for node in results]
        source = FunctionSource(inputs, dict(constants), {})
        for node in nodes:
            source.operation(node)
        self._run = PrivateApi(
            "Computing the scalars of a step in one kernel",
            "triton",
            self._launch,
            source.compile(results),
            "They are computed one by one.",
            passes=is_oom,
        )
        self._kernel: Any = None
        self._is_checked = False

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The results for these inputs, some of which are assigned."""
        found: list[torch.Tensor] = self._run(*inputs)
        return found

    def _launch(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        if self._kernel is None:
            self._kernel = compiled(self.text)
        if not self._is_checked and not is_capturing(inputs[0].device):
            self._check(inputs)
            self._is_checked = True
        return self._compute(inputs)

    def _check(self, inputs: Sequence[torch.Tensor]) -> None:
        """Compare the kernel with the operations one by one, before anything is assigned."""
        copies, others = ([tensor.clone() for tensor in inputs] for _ in range(2))
        found, expected = self._compute(copies), self._run.plain(*others)
        for x, y in zip([*found, *copies], [*expected, *others], strict=True):
            if not are_close(x, y):
                raise RuntimeError("its results are not those of the operations")

    def _compute(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = inputs[0].device
        results = [torch.empty((), dtype=dtype, device=device) for dtype in self._dtypes]
        # Triton launches on the current device.
        place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with place:
            self._kernel[(1,)](*inputs, *results, num_warps=1, enable_fp_fusion=False)
        return results
