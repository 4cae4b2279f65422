"""``state.global_step`` and ``state.epoch`` in traced code: values on the device.

A traced step runs its Python only once, so a Python number would stay frozen at its value during
the trace. Traced code therefore gets a ``DeviceNumber``: arithmetic with it becomes part of the
step, and control flow that depends on it (``if``, ``min``, ``int``) is recorded as a decision. The
step is valid as long as its decisions are; ``kbtrain.tracing.retrace`` retraces it otherwise.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import keras
from keras import ops

from kbtrain.backends.protocol import Backend
from kbtrain.errors import ConcreteValueNeeded, first_lines, place_of
from kbtrain.tracing.device_number import DeviceNumber
from kbtrain.tracing.moment import Moment


@dataclass
class Decisions:
    """The decisions that one version of a step has made based on numbers of the state.

    Attributes:
        made: Outcomes by condition, each with the function that evaluates it again.
    """

    made: dict[str, tuple[Callable[[Moment], Any], Any]] = field(default_factory=dict)

    def hold(self, moment: Moment) -> bool:
        """Whether the decisions would have the same outcomes now."""
        return all(ask(moment) == outcome for ask, outcome in self.made.values())

    def horizon(self, moment: Moment, limit: int) -> int:
        """The number of updates, at most ``limit``, for which the decisions hold."""
        if not self.made:
            return limit
        return next((i for i in range(limit) if not self.hold(moment.after(i))), limit)


class Position:
    """The position of the run, on the device and on the host.

    Attributes:
        moment: The position of the step that runs next.
        used: Whether a step has read the numbers, which then are inputs of it.
    """

    _active: ClassVar[Position | None] = None
    _accepted: ClassVar[bool] = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        if not Position._accepted:
            backend.accept_numbers(DeviceNumber)
            Position._accepted = True
        self._variable: keras.Variable | None = None
        self._decisions: Decisions | None = None
        self._state: Any = None
        self.moment = Moment()
        self.used = False

    def set(self, moment: Moment, traced: bool = False) -> None:
        """Update the numbers on the device, if a step reads them.

        Args:
            moment: The position of the step that runs next.
            traced: Whether the step has been traced: if it has not read the numbers, it never
                will.
        """
        self.moment = moment
        now = [moment.step, moment.epoch, moment.batch, moment.batches]
        if self._variable is None:
            self._variable = keras.Variable(now, dtype="int32", trainable=False, name="position")
        elif self.used or not traced:
            self._variable.assign(ops.convert_to_tensor(now, "int32"))

    @contextlib.contextmanager
    def readable(self, state: Any, decisions: Decisions) -> Iterator[None]:
        """Context in which ``state`` returns the numbers of the step that runs or is traced.

        Args:
            state: The ``TrainerState``.
            decisions: Records the decisions based on them.
        """
        before = Position._active, self._state, self._decisions
        Position._active, self._state, self._decisions = self, state, decisions
        try:
            yield
        finally:
            Position._active, self._state, self._decisions = before

    def advance(self, micro_batches: int) -> None:
        """End the step that runs or is traced: advance the numbers for the next one."""
        if self.used and self._variable is not None:
            more = ops.convert_to_tensor([1, 0, micro_batches, 0], "int32")
            self._variable.assign(self._variable + more)

    @classmethod
    def read(cls, state: Any, name: str) -> Any:
        """The value of ``state.global_step`` or ``epoch`` for code in a step; None elsewhere."""
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
        try:
            return DeviceNumber(
                self, lambda moment: moment.read(name), value, dtype, f"state.{name}"
            )
        except Exception as error:  # keras.Variable has changed incompatibly
            raise ConcreteValueNeeded(
                f"state.{name} cannot be a value on the device with this version of Keras: "
                f"{first_lines(error)}"
            ) from error

    def decide(self, ask: Callable[[Moment], Any], text: str) -> Any:
        """Evaluate a condition, and record that the step depends on it."""
        outcome = ask(self.moment)
        if self._decisions is not None:
            self._decisions.made[text] = ask, outcome
        return outcome

    def reveal(self, ask: Callable[[Moment], Any], text: str, how: str) -> Any:
        """Return the number itself, if it stays the same for more than one update.

        Raises:
            ConcreteValueNeeded: The number differs in the next update.
        """
        if self._decisions is not None and ask(self.moment.after(1)) != ask(self.moment):
            where = place_of(sys._getframe())
            raise ConcreteValueNeeded(
                f"{how}() of {text}{where} needs a Python number, but this one changes with "
                "every update. Use arithmetic, and keras.ops in place of math and NumPy functions."
            )
        return self.decide(ask, f"{how}({text})")
