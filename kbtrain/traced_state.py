"""``state.global_step`` and ``state.epoch`` in code that is traced: values on the device.

A traced step runs its Python once and then many times without it. A Python number would be what
it was at the trace for ever, so such code gets a ``DeviceNumber``: arithmetic with it is part of
the step, and what Python decides by it (``if``, ``min``, ``int``) is noted as a ``Decision``. The
step is right as long as its decisions are; ``kbtrain.live_step`` traces it anew where one is not.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, ClassVar

import keras
from keras import ops

from kbtrain.errors import LooksAtNumber, place_of


@dataclass(frozen=True)
class Moment:
    """Where a run stands before an update.

    Attributes:
        step: Updates done.
        epoch: Number of the epoch.
        batch: Micro-batches of it that are done.
        batches: Micro-batches that make one epoch.
        micro_batches: Micro-batches of the next update; 0 where time stands still (evaluations).
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches: int = 1
    micro_batches: int = 0

    def after(self, updates: int) -> Moment:
        """The same, some updates later in the epoch."""
        if not self.micro_batches:
            return self
        done = self.batch + updates * self.micro_batches
        return replace(self, step=self.step + updates, batch=done)

    @classmethod
    def of(cls, step: int, epoch: float) -> Moment:
        """A moment in which nothing is trained."""
        whole, parts = int(epoch), 1 << 20
        return cls(step, whole, round((epoch - whole) * parts), parts)

    def read(self, name: str) -> float:
        """The value of ``TrainerState.global_step`` or ``epoch``."""
        return self.step if name == "global_step" else self.epoch + self.batch / self.batches


@dataclass
class Decisions:
    """What the Python of one version of a step has decided by numbers of the state.

    Attributes:
        made: Outcomes by what was asked; each with the question, to ask it again.
    """

    made: dict[str, tuple[Callable[[Moment], Any], Any]] = field(default_factory=dict)

    def hold(self, moment: Moment) -> bool:
        """Whether Python would decide the same now."""
        return all(ask(moment) == outcome for ask, outcome in self.made.values())

    def room(self, moment: Moment, limit: int) -> int:
        """For how many updates, of ``limit``, they hold; 0 if not even for the first."""
        if not self.made:
            return limit
        return next((i for i in range(limit) if not self.hold(moment.after(i))), limit)


class Position:
    """Where the run stands, on the device and on the host.

    Attributes:
        moment: The moment of the step that runs next.
        used: Whether a step has read the numbers: only then they are part of it.
    """

    _active: ClassVar[Position | None] = None

    def __init__(self, backend: ModuleType) -> None:
        self._backend = backend
        self._variable: keras.Variable | None = None
        self._decisions: Decisions | None = None
        self._state: Any = None
        self.moment = Moment()
        self.used = False

    def set(self, moment: Moment, traced: bool = False) -> None:
        """Tell the device, if a step reads it.

        Args:
            moment: The moment of the step that runs next.
            traced: It has been traced: if it did not read the numbers, it will not.
        """
        self.moment = moment
        now = [moment.step, moment.epoch, moment.batch, moment.batches]
        if self._variable is None:
            self._variable = keras.Variable(now, dtype="int32", trainable=False, name="position")
        elif self.used or not traced:
            self._variable.assign(ops.convert_to_tensor(now, "int32"))

    @contextlib.contextmanager
    def readable(self, state: Any, decisions: Decisions) -> Iterator[None]:
        """Inside, ``state`` gives out the numbers of the step that runs or is traced.

        Args:
            state: The ``TrainerState``.
            decisions: Where to note what Python decides by them.
        """
        before = Position._active, self._state, self._decisions
        Position._active, self._state, self._decisions = self, state, decisions
        try:
            yield
        finally:
            Position._active, self._state, self._decisions = before

    def advance(self, micro_batches: int) -> None:
        """The step that runs or is traced ends: the next one finds the next numbers."""
        if self.used and self._variable is not None:
            more = ops.convert_to_tensor([1, 0, micro_batches, 0], "int32")
            self._variable.assign(self._variable + more)

    @classmethod
    def read(cls, state: Any, name: str) -> Any:
        """What code in a step gets for ``state.global_step`` or ``epoch``; None elsewhere."""
        active = cls._active
        if active is None or active._state is not state or active._variable is None:
            return None
        return active._number(name)

    def _number(self, name: str) -> Any:
        assert self._variable is not None
        variable = self._variable
        self.used = True
        if not self._backend.is_symbolic(variable):
            step, epoch, batch, batches = ops.convert_to_numpy(variable.value).tolist()
            return Moment(step, epoch, batch, batches).read(name)

        def value() -> Any:
            if name == "global_step":
                return variable[0]
            epoch, batch, batches = (ops.cast(variable[i], "float32") for i in (1, 2, 3))
            return epoch + batch / batches

        integer = name == "global_step"
        dtype = "int32" if integer else "float32"
        return DeviceNumber(self, lambda moment: moment.read(name), value, dtype, f"state.{name}")

    def decide(self, ask: Callable[[Moment], Any], text: str) -> Any:
        """Answer a question of Python's, and note that the step depends on it."""
        outcome = ask(self.moment)
        if self._decisions is not None:
            self._decisions.made[text] = ask, outcome
        return outcome

    def reveal(self, ask: Callable[[Moment], Any], text: str, how: str) -> Any:
        """Give Python the number itself, where that holds for more than one update.

        Raises:
            LooksAtNumber: The number is another one in the next update.
        """
        if self._decisions is not None and ask(self.moment.after(1)) != ask(self.moment):
            where = place_of(sys._getframe())
            raise LooksAtNumber(
                f"{how}() of {text}{where} takes a number that changes with every update. "
                "Use keras.ops in place of math and NumPy functions, and arithmetic as it is."
            )
        return self.decide(ask, f"{how}({text})")


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


class DeviceNumber(keras.Variable):
    """A number of the state in a traced step, or what was computed from it.

    It is a ``keras.Variable`` so that ``keras.ops`` and the frameworks' own functions take it for
    a tensor; it stores nothing.

    Args:
        position: Whose number it is.
        on_host: The number at a moment, as Python would compute it.
        on_device: Makes the tensor, in the step that is being traced.
        dtype: ``int32``, ``float32`` or ``bool``.
        text: What it is, to name it.
    """

    def __init__(
        self,
        position: Position,
        on_host: Callable[[Moment], Any],
        on_device: Callable[[], Any],
        dtype: str,
        text: str,
    ) -> None:
        # Not the base's: nothing is allocated.
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
        """The tensor, of the dtype that a Python number would take next to another one."""
        dtype = keras.backend.standardize_dtype(getattr(tensor, "dtype", "float32"))
        is_float = dtype.startswith(("float", "bfloat"))
        return ops.cast(self.value, dtype) if is_float else self.value

    # What the frameworks ask a value for that is not theirs.

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

    # What Python wants to know now.

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
        """As ``float()`` or ``int()``."""
        return int(self) if self._dtype == "int32" else float(self)

    def clip(self, min: Any = None, max: Any = None, **_: Any) -> Any:
        """What ``numpy.clip`` asks for."""
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
    """Whether it is a number of NumPy's."""
    return type(x).__module__ == "numpy" and getattr(x, "shape", None) == ()
