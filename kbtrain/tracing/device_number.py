"""``DeviceNumber``: a number on the device that acts like a Python number."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import keras
from keras import ops

from kbtrain.tracing.moment import Moment

_NUMBERS = (int, float, bool)

_OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "add": (operator.add, ops.add, "+"),
    "sub": (operator.sub, ops.subtract, "-"),
    "mul": (operator.mul, ops.multiply, "*"),
    "truediv": (operator.truediv, ops.true_divide, "/"),
    "floordiv": (operator.floordiv, ops.floor_divide, "//"),
    "mod": (operator.mod, ops.mod, "%"),
    "pow": (operator.pow, ops.power, "**"),
    "lt": (operator.lt, ops.less, "<"),
    "le": (operator.le, ops.less_equal, "<="),
    "gt": (operator.gt, ops.greater, ">"),
    "ge": (operator.ge, ops.greater_equal, ">="),
    "eq": (operator.eq, ops.equal, "=="),
    "ne": (operator.ne, ops.not_equal, "!="),
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _binary(name: str, reflected: bool = False) -> Callable[[Any, Any], Any]:
    on_host, on_device, sign = _OPERATIONS[name]

    def method(self: DeviceNumber, other: Any) -> Any:
        known = isinstance(other, _NUMBERS) or (hasattr(other, "item") and _is_scalar(other))
        if not known and not isinstance(other, DeviceNumber):
            if other is None or isinstance(other, str):
                return NotImplemented
            mine = self.as_operand_of(other)
            return on_device(other, mine) if reflected else on_device(mine, other)
        other = other.item() if hasattr(other, "item") else other
        a, b = (other, self) if reflected else (self, other)

        def host(moment: Moment) -> Any:
            return on_host(_at(a, moment), _at(b, moment))

        def device() -> Any:
            return on_device(_tensor(a), _tensor(b))

        dtype = "float32"
        if name in _COMPARISONS:
            dtype = "bool"
        elif name not in ("truediv", "pow") and all(map(_is_integer, (a, b))):
            dtype = "int32"
        text = f"({_text(a)} {sign} {_text(b)})"
        return DeviceNumber(self.position, host, device, dtype, text)

    return method


def _unary(host: Callable[[Any], Any], device: Callable[[Any], Any], form: str, whole: bool) -> Any:
    def method(self: DeviceNumber, *_: Any) -> Any:
        def asked(moment: Moment) -> Any:
            return host(self.on_host(moment))

        def value() -> Any:
            result = device(self.value)
            return ops.cast(result, "int32") if whole else result

        dtype = "int32" if whole else self.dtype
        return DeviceNumber(self.position, asked, value, dtype, form.format(self.text))

    return method


class Observer(Protocol):
    """Records the decisions Python makes based on a number; see ``kbtrain.tracing.position``."""

    moment: Moment

    def decide(self, ask: Callable[[Moment], Any], text: str) -> Any:
        """Evaluate the condition of a Python branch, and record the outcome."""

    def reveal(self, ask: Callable[[Moment], Any], text: str, how: str) -> Any:
        """Return the number as a Python number, if that stays correct."""


class DeviceNumber(keras.Variable):  # type: ignore[misc]
    """A number of the trainer's state in a traced step, or a value computed from one.

    It is a ``keras.Variable`` so that ``keras.ops`` and the frameworks' functions accept it as a
    tensor; it has no storage.

    Args:
        position: The position that the number belongs to.
        on_host: Computes the Python number for a given moment.
        on_device: Creates the tensor in the step that is being traced.
        dtype: ``int32``, ``float32`` or ``bool``.
        text: The expression, for messages.
    """

    def __init__(
        self,
        position: Observer,
        on_host: Callable[[Moment], Any],
        on_device: Callable[[], Any],
        dtype: str,
        text: str,
    ) -> None:
        # Does not call the base class, which would allocate memory.
        self.position, self.on_host, self.text = position, on_host, text
        self._on_device = on_device
        self._dtype, self._shape, self._ndim = dtype, (), 0
        self._autocast, self._trainable, self._layout = False, False, None
        self._value = self._initializer = self._regularizer = self._constraint = None
        self._name = self._path = text

    @property
    def value(self) -> Any:
        """The tensor, in the step that is being traced."""
        return ops.convert_to_tensor(self._on_device(), self._dtype)

    def as_operand_of(self, tensor: Any) -> Any:
        """The tensor, in the dtype that a Python number would be promoted to."""
        dtype = keras.backend.standardize_dtype(getattr(tensor, "dtype", "float32"))
        is_float = dtype.startswith(("float", "bfloat"))
        return ops.cast(self.value, dtype) if is_float else self.value

    # Conversion protocols of the frameworks.

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> Any:
        return self.value if dtype is None else ops.cast(self.value, dtype.name)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        counterpart = getattr(ops, ufunc.__name__, None)
        if method != "__call__" or kwargs or counterpart is None:
            return NotImplemented
        if not all(isinstance(x, _NUMBERS + (DeviceNumber,)) or _is_scalar(x) for x in inputs):
            return counterpart(*map(_tensor, inputs))
        text = f"{ufunc.__name__}({', '.join(map(_text, inputs))})"
        return DeviceNumber(
            self.position,
            lambda moment: ufunc(*[_at(x, moment) for x in inputs]).item(),
            lambda: counterpart(*map(_tensor, inputs)),
            "bool" if ufunc.types[-1].endswith("?") else "float32",
            text,
        )

    # Conversions to Python values, which need the number now.

    def __bool__(self) -> bool:
        return bool(self.position.decide(lambda moment: bool(self.on_host(moment)), self.text))

    def __int__(self) -> int:
        return int(self.position.reveal(lambda m: int(self.on_host(m)), self.text, "int"))

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.position.reveal(lambda m: float(self.on_host(m)), self.text, "float"))

    def __hash__(self) -> int:
        return hash(self.position.reveal(self.on_host, self.text, "hash"))

    def __repr__(self) -> str:
        return str(self.on_host(self.position.moment))

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self.on_host(self.position.moment), spec)

    def item(self) -> Any:
        """Convert like ``float()`` or ``int()``."""
        return int(self) if self._dtype == "int32" else float(self)

    def clip(self, min: Any = None, max: Any = None, **_: Any) -> Any:
        """Support ``numpy.clip``."""
        low = self if min is None else _larger(self, min)
        return low if max is None else _smaller(low, max)

    __neg__ = _unary(operator.neg, ops.negative, "(-{})", False)
    __pos__ = _unary(operator.pos, lambda x: x, "(+{})", False)
    __abs__ = _unary(operator.abs, ops.abs, "abs({})", False)
    __floor__ = _unary(math.floor, ops.floor, "floor({})", True)
    __ceil__ = _unary(math.ceil, ops.ceil, "ceil({})", True)
    __trunc__ = _unary(math.trunc, ops.trunc, "trunc({})", True)

    def __round__(self, ndigits: int | None = None) -> Any:
        if ndigits is None:
            return _unary(round, ops.round, "round({})", True)(self)
        scale = 10.0**ndigits
        return _unary(round, ops.round, "round({})", False)(self * scale) / scale

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other


for _name in _OPERATIONS:
    setattr(DeviceNumber, f"__{_name}__", _binary(_name))
    if _name not in _COMPARISONS:
        setattr(DeviceNumber, f"__r{_name}__", _binary(_name, reflected=True))


def _larger(a: Any, b: Any) -> Any:
    return a if a >= b else b


def _smaller(a: Any, b: Any) -> Any:
    return a if a <= b else b


def _at(x: Any, moment: Moment) -> Any:
    return x.on_host(moment) if isinstance(x, DeviceNumber) else x


def _tensor(x: Any) -> Any:
    return x.value if isinstance(x, DeviceNumber) else x


def _text(x: Any) -> str:
    return x.text if isinstance(x, DeviceNumber) else repr(x)


def _is_integer(x: Any) -> bool:
    return x._dtype in ("int32", "bool") if isinstance(x, DeviceNumber) else isinstance(x, int)


def _is_scalar(x: Any) -> bool:
    """Whether ``value`` is a NumPy number."""
    return type(x).__module__ == "numpy" and getattr(x, "shape", None) == ()
