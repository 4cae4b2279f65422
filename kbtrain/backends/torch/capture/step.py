"""PyTorch: one captured step; see ``kbtrain.backends.torch.capture``."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from kbtrain.backends.collective_check import Operation, about_to_run, noting
from kbtrain.backends.torch import fusion
from kbtrain.backends.torch.capture.cuda_graph import Graphs, with_graph
from kbtrain.backends.torch.capture.guard import NotCapturable
from kbtrain.backends.torch.capture.keras_overrides import native_operations
from kbtrain.backends.torch.capture.large_gradients import KeptMemory
from kbtrain.backends.torch.capture.program import (
    StepProgram,
    make_program,
    no_collection,
    same_random_state,
)
from kbtrain.backends.torch.capture.trace import Unrecorded, quiet_fakes, record
from kbtrain.errors import causes, first_lines, user_line
from kbtrain.utils.fallback import report
from kbtrain.utils.packages.keras_private import held_values

logger = logging.getLogger("kbtrain")

# Without a fake kernel, recording a fused optimizer would run it on real tensors of zeros, four
# times the size of the model. These operations change their arguments and return nothing.
_RULES = torch.library.Library("aten", "IMPL")
for _operation in ("_fused_adamw_", "_fused_adam_", "_fused_sgd_", "_fused_adagrad_"):
    for _overload in getattr(torch.ops.aten, _operation).overloads():
        _name = _operation if _overload == "default" else f"{_operation}.{_overload}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
            _RULES.impl(_name, lambda *args, **kwargs: None, "Meta")

_LOOKS_AT_VALUES = (DataDependentOutputException, GuardOnDataDependentSymNode)


class CapturedStep:
    """A recorded step for inputs of one shape.

    Args:
        fn: The step, ``fn(inputs) -> outputs``, structures of tensors.
        variables: All variables that it reads or assigns.
        inputs: Example inputs; their values do not matter.
        inductor: Whether to compile the program with ``torch.compile``.
        kept: Memory shared with the programs for other shapes.
        graphs: The CUDA graphs of the step for all shapes.

    Attributes:
        outputs: The structure of its outputs.

    Raises:
        NotCapturable: The step cannot be recorded.
    """

    def __init__(
        self,
        fn: Callable[[Any], Any],
        variables: Sequence[keras.Variable],
        inputs: Any,
        inductor: bool,
        kept: KeptMemory,
        graphs: Graphs,
    ) -> None:
        self._variables = list(variables)
        examples = [*keras.tree.flatten(inputs), *self._state()]
        with no_collection(), torch.no_grad():
            program = self._made(fn, inputs, examples, inductor, kept)
        self._run = with_graph(program, examples, graphs)

    def _made(
        self,
        fn: Callable[[Any], Any],
        inputs: Any,
        examples: Sequence[torch.Tensor],
        inductor: bool,
        kept: KeptMemory,
    ) -> StepProgram:
        recorded, self.outputs, self._collectives = record_step(fn, self._variables, inputs)
        try:
            return make_program(recorded, examples, inductor, kept)
        except fusion.Failure as failure:
            fusion.give_up(failure)
        return self._made(fn, inputs, examples, inductor, kept)

    def _state(self) -> list[torch.Tensor]:
        return [variable._value for variable in self._variables]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the recorded operations on flattened inputs, and return flattened outputs.

        Raises:
            GuardFailed: The condition was false; nothing was changed.
        """
        about_to_run(self._collectives)
        return self._run(inputs, self._state())


def record_step(
    fn: Callable[[Any], Any], variables: list[keras.Variable], inputs: Any
) -> tuple[Any, Any, list[Operation]]:
    """Record the step as one graph of ATen operations.

    The values of the variables are inputs of the graph, after those of the step.

    Returns:
        The graph, the structure of the outputs, and the collective operations in their order.
    """
    outputs: list[Any] = []
    collectives: list[Operation] = []
    real = held_values(variables)
    count = len(keras.tree.flatten(inputs))
    inside = False

    def flat_step(*flat: torch.Tensor) -> list[torch.Tensor]:
        nonlocal inside
        for variable, value in zip(variables, flat[count:], strict=True):
            variable._value = value.requires_grad_(variable.trainable)
        inside = True
        with noting() as noted:
            result = fn(keras.tree.pack_sequence_as(inputs, list(flat[:count])))
        collectives[:] = noted
        inside = False
        outputs[:] = [keras.tree.map_structure(lambda _: 0, result)]
        found: list[torch.Tensor] = keras.tree.flatten(result)
        return found

    python, numpy = random.getstate(), np.random.get_state(legacy=True)
    examples = [*keras.tree.flatten(inputs), *(t.detach() for t in real)]
    try:
        with same_random_state(), native_operations():
            recorded = _recorded(flat_step, examples)
    except NotCapturable:
        raise
    except Exception as error:
        line = user_line(error)
        if _needs_values(error):
            raise NotCapturable(f"its Python reads values of tensors{line}") from error
        reason = NotCapturable(f"{type(error).__name__}: {first_lines(error, 1)}{line}")
        # If the error arose in user code, the reason is most likely there.
        reason.failure = None if inside and line else error
        raise reason from error
    finally:
        for variable, value in zip(variables, real, strict=True):
            variable._value = value
    if random.getstate() != python or not _equal(numpy, np.random.get_state(legacy=True)):
        random.setstate(python)
        np.random.set_state(numpy)
        raise NotCapturable("the model draws Python or NumPy random numbers")
    return recorded, outputs[0], collectives


@quiet_fakes()
def _recorded(step: Callable[..., Any], examples: list[torch.Tensor]) -> Any:
    """The graph of a step, recorded by ``make_fx`` if ``record`` does not support it."""
    try:
        return record(step, examples)
    except NotCapturable:
        raise
    except Exception as error:  # make_fx decides whether any error is real
        unknown = [e for e in causes(error) if isinstance(e, UnsupportedOperatorException)]
        if unknown and any(example.device.type != "cpu" for example in examples):
            raise NotCapturable(
                f"{unknown[0].func} has no rule for tensors without data"
            ) from error
        logger.debug("The step is recorded by make_fx: %s", first_lines(error, 1))
        failure = error
    recorded = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    if not (isinstance(failure, Unrecorded) or _needs_values(failure)):
        report(
            "Recording a step's operations",
            "torch",
            failure,
            "make_fx records them, which takes some seconds longer.",
        )
    return recorded


def _needs_values(error: BaseException) -> bool:
    return any(isinstance(cause, _LOOKS_AT_VALUES) for cause in causes(error))


def _equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
