"""Runs a torch step: captured once per shape if possible, eagerly otherwise."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import torch

from kbtrain.backends.torch.capture.guard import GuardFailed, NotCapturable
from kbtrain.backends.torch.device import is_oom
from kbtrain.backends.torch.loop_body import LoopBody
from kbtrain.data import signature
from kbtrain.errors import KbtrainError
from kbtrain.utils.fallback import report
from kbtrain.utils.packages.keras_private import read_values

logger = logging.getLogger("kbtrain")


@dataclass
class StepContext:
    """The context of the step that runs, for the functions that it calls.

    Attributes:
        capturing: Whether a step is being recorded: conditions become guards, and no value can be
            read.
        variables: The variables of the step, to find out which of them layers assign.
        compile_body: Compiles the body of a loop in the step; None if it runs eagerly.
        committed: The variables passed to ``commit_if`` in the step being recorded.
        journal: Values that ``commit_if`` has overwritten; None if no rollback can follow.
        cuda_graphs: The argument of that name.
    """

    capturing: bool = False
    variables: list[keras.Variable] = field(default_factory=list)
    compile_body: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    committed: list[keras.Variable] = field(default_factory=list)
    journal: dict[int, tuple[keras.Variable, torch.Tensor]] | None = None
    cuda_graphs: bool | str = "auto"

    @contextlib.contextmanager
    def running(
        self,
        variables: Sequence[keras.Variable],
        compile_body: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
    ) -> Iterator[None]:
        """Set the variables of the step that runs inside."""
        before = self.variables, self.compile_body
        self.variables, self.compile_body = list(variables), compile_body
        try:
            yield
        finally:
            self.variables, self.compile_body = before

    def register(self, variable: keras.Variable) -> None:
        """Add an undeclared variable that is being assigned to the state.

        Raises:
            UndeclaredVariable: While recording; the step is recorded again with this variable.
        """
        if any(variable is known for known in self.variables):
            return
        if self.capturing:
            raise UndeclaredVariable(variable)
        self.variables.append(variable)

    def journal_value(self, variable: keras.Variable) -> None:
        """Record the current value of a variable, if a rollback may follow."""
        if self.journal is not None and id(variable) not in self.journal:
            self.journal[id(variable)] = (variable, variable.value.detach().clone())


context = StepContext()


@contextlib.contextmanager
def cuda_graphs(wanted: bool | str) -> Iterator[None]:
    """Context in which captured steps become CUDA graphs where that is sound, or never (False)."""
    again = context.cuda_graphs is True  # an evaluation in a run
    if wanted is True and not again and not torch.cuda.is_available():
        logger.warning("cuda_graphs=True has no effect: PyTorch finds no GPU of NVIDIA's.")
    before, context.cuda_graphs = context.cuda_graphs, wanted
    try:
        yield
    finally:
        context.cuda_graphs = before


class Runner:
    """Runs a function of tensors: captured once per shape if possible, eagerly otherwise.

    Args:
        fn: Function of one structure of tensors.
        variables: All variables that it reads or assigns.
        jit_compile: ``False`` captures nothing, ``True`` adds ``torch.compile``.
    """

    def __init__(
        self,
        fn: Callable[[Any], Any],
        variables: Sequence[keras.Variable],
        jit_compile: bool | str,
    ) -> None:
        self._fn = fn
        self._variables = list(variables)
        self._jit_compile = jit_compile
        self._captured: dict[Any, Any] = {}
        self._failures: dict[Any, Exception] = {}
        self._commits: dict[Any, list[keras.Variable]] = {}
        self._bodies: dict[Any, Callable[..., Any]] = {}
        self._kept: Any = {}
        self._graphs: Any = None

    def __call__(self, inputs: Any) -> Any:
        """Run the function."""
        run = self.for_shape(inputs)
        with torch.no_grad():
            results = run(keras.tree.flatten(inputs))
        return keras.tree.pack_sequence_as(run.outputs, results)

    def for_shape(self, inputs: Any) -> _FlatStep:
        """The function for inputs of these shapes, from a list of tensors to a list of tensors."""
        key = signature(inputs)
        if key not in self._captured and self._jit_compile is not False:
            self._captured[key] = self._capture(key, inputs)
            self._commits[key] = list(context.committed)
        return _FlatStep(
            self._captured.get(key),
            self._commits.get(key, []),
            self._eager_beside_graphs,
            self._failures.pop(key, None),
            structure=inputs,
        )

    def eager(self, inputs: Any) -> Any:
        """Run the function eagerly, with the bodies of its loops captured."""
        body = None if self._jit_compile is False else self._body
        with torch.no_grad(), context.running(self._variables, body):
            return self._fn(inputs)

    def _eager_beside_graphs(self, inputs: Any) -> Any:
        if self._graphs is None or not self._variables:
            return self.eager(inputs)
        from kbtrain.backends.torch.capture.cuda_graph import beside_graphs

        state = read_values(self._variables)
        return beside_graphs(lambda: self.eager(inputs), state, state[0].device)

    def _capture(self, key: Any, inputs: Any) -> Any:
        """The captured step, or None."""
        context.capturing = True
        try:
            # Imported late, as it depends on private parts of PyTorch.
            from kbtrain.backends.torch.capture.cuda_graph import Graphs
            from kbtrain.backends.torch.capture.step import CapturedStep

            self._graphs = self._graphs or Graphs(context.cuda_graphs)
            while True:
                context.committed.clear()
                try:
                    return CapturedStep(
                        self.eager,
                        self._variables,
                        inputs,
                        self._jit_compile is True,
                        self._kept,
                        self._graphs,
                    )
                except UndeclaredVariable as undeclared:
                    self._variables.append(undeclared.variable)
        except CapturePerMicroBatch:
            logger.debug("The step is captured in parts, one for each micro-batch.")
            return None
        except NotCapturable as reason:
            logger.log(
                logging.WARNING if context.cuda_graphs is True else logging.INFO,
                "The step runs eagerly, it cannot be captured: %s",
                _own_words(reason),
            )
            if reason.failure is not None:
                self._failures[key] = reason.failure
            return None
        except KbtrainError:
            raise
        except Exception as error:
            if is_oom(error):
                raise
            self._failures[key] = error
            return None
        finally:
            context.capturing = False

    def _body(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        # The function is a new closure each time; its code object identifies it.
        key = fn.__code__
        if key not in self._bodies:
            self._bodies[key] = LoopBody(
                fn, self._variables, lambda f, variables: Runner(f, variables, self._jit_compile)
            )
        return self._bodies[key]


class _FlatStep:
    """A step for inputs of one shape that takes flattened inputs, to save time.

    Attributes:
        outputs: The structure of the outputs, known after the first run.
    """

    def __init__(
        self,
        captured: Any,
        commits: Sequence[keras.Variable],
        eager: Callable[[Any], Any],
        failure: Exception | None,
        structure: Any,
    ) -> None:
        self._captured = captured
        self._commits = commits
        self._eager = eager
        self._failure = failure
        self._structure = structure
        self.outputs: Any = None if captured is None else captured.outputs

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the step on flattened inputs, under ``torch.no_grad``."""
        if self._captured is not None:
            for variable in self._commits:
                context.journal_value(variable)
            try:
                result: list[torch.Tensor] = self._captured(inputs)
                return result
            except GuardFailed:
                pass
        self.outputs = self._eager(keras.tree.pack_sequence_as(self._structure, list(inputs)))
        if self._failure is not None:  # the step itself runs, so the failure is one of capturing
            report("Capturing a step", "torch", self._failure, "It runs eagerly, which is slower.")
            self._failure = None
        outputs: list[torch.Tensor] = keras.tree.flatten(self.outputs)
        return outputs


def _own_words(reason: NotCapturable) -> str:
    """The reason without Keras' additions, which set a layer's message in bold."""
    bold = re.search(r"\x1b\[1m(.*?)\x1b\[0m", str(reason), re.DOTALL)
    return bold[1] if bold else str(reason)


class CapturePerMicroBatch(NotCapturable):
    """The step has a loop, whose body is captured separately, per micro-batch."""


class UndeclaredVariable(NotCapturable):
    """The step assigns a variable that was not declared.

    Attributes:
        variable: The variable.
    """

    _keras_call_info_injected = True  # Keras would otherwise recreate it from its message alone

    def __init__(self, variable: keras.Variable) -> None:
        super().__init__(f"it assigns {variable.path}, which is no variable of the model")
        self.variable = variable
