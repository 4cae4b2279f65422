"""Compiled steps that are retraced when Python values change between calls.

Python control flow is fixed when a step is traced. So there is one version of the step for each
outcome of its decisions on ``state.global_step`` and ``state.epoch``
(``kbtrain.tracing.position``), and all versions are discarded when a value they have captured
changes (``kbtrain.tracing.captured``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.data import Block
from kbtrain.tracing.captured import CapturedValues
from kbtrain.tracing.moment import Moment
from kbtrain.tracing.position import Decisions, Position

logger = logging.getLogger("kbtrain")

Step = Callable[[Any], Any]
"""An uncompiled step, ``step(inputs) -> outputs``."""

MAX_VERSIONS = 16
"""Maximum number of versions; the oldest is dropped."""


class Traces:
    """Prepares a step for tracing: numbers of the state on the device, reads recorded.

    Args:
        backend: The backend in use.
        position: The position of the run.
        captured: Records the values that the step reads.
        state: Returns the ``TrainerState``.
    """

    def __init__(
        self,
        backend: Backend,
        position: Position,
        captured: CapturedValues,
        state: Callable[[], Any],
    ) -> None:
        self.backend, self.position, self.captured = backend, position, captured
        self._state = state

    def step(self, step: Step, decisions: Decisions, variable: keras.Variable) -> Step:
        """Wrap a step so that it can be traced.

        Args:
            step: The step.
            decisions: Records the decisions of its Python code.
            variable: A variable of the step's state that is not trained.
        """

        def traced(inputs: Any) -> Any:
            with (
                self.position.readable(self._state(), decisions),
                self.captured.recording(self.backend.is_symbolic(variable)),
            ):
                return step(inputs)

        return traced

    def forward(self, forward: Callable[..., Any], variable: keras.Variable) -> Callable[..., Any]:
        """Wrap a forward pass that may be traced separately, in a step that runs eagerly."""

        def recorded(batch: Any, num_items: Any, training: bool) -> Any:
            with self.captured.recording(self.backend.is_symbolic(variable)):
                return forward(batch, num_items, training=training)

        return recorded


@dataclass
class Version:
    """One compiled version of a step.

    Attributes:
        run: The compiled step.
        decisions: The decisions made when it was traced.
        traced: The input structures it has been traced for.
    """

    run: Callable[..., Any]
    decisions: Decisions
    traced: set[Hashable] = field(default_factory=set)


class Versions:
    """The compiled versions of a step.

    Args:
        compile: ``compile(decisions) -> compiled step``. The step is traced on its first call and
            then records its decisions.
        what: The name of the step for the log.
    """

    def __init__(self, compile: Callable[[Decisions], Callable[..., Any]], what: str) -> None:
        self._compile, self._what = compile, what
        self._versions: list[Version] = []
        self._made = 0

    def at(self, moment: Moment) -> Version:
        """The version valid now; a new one if there is none."""
        for version in self._versions:
            if version.decisions.hold(moment):
                return version
        decisions = Decisions()
        version = Version(self._compile(decisions), decisions)
        if self._versions:
            self._made += 1
            self._tell(moment)
        self._versions = [version, *self._versions][:MAX_VERSIONS]
        return version

    def have_traced(self, moment: Moment, outline: Hashable) -> bool:
        """Whether the version valid at a moment exists and has been traced for these inputs."""
        version = next((v for v in self._versions if v.decisions.hold(moment)), None)
        return version is not None and outline in version.traced

    def horizon(self, moment: Moment, limit: int) -> int:
        """The number of updates, at most ``limit``, that one version covers; 1 before its trace."""
        version = next((v for v in self._versions if v.decisions.hold(moment)), None)
        if version is None or not version.traced:
            return 1
        return max(1, version.decisions.horizon(moment, limit))

    def _tell(self, moment: Moment) -> None:
        asked = next(
            (
                text
                for version in self._versions
                for text, (ask, outcome) in version.decisions.made.items()
                if ask(moment) != outcome
            ),
            "",
        )
        logger.info("The %s step is recompiled: the outcome of %s has changed.", self._what, asked)
        if self._made == MAX_VERSIONS:
            logger.warning(
                "The %s step was compiled %d times because its control flow depends on %s. "
                "keras.ops.where, keras.ops.minimum and the like need no recompilation.",
                self._what,
                MAX_VERSIONS + 1,
                asked,
            )


class LiveStep:
    """The compiled train steps of a run, retraced as needed before each call.

    Args:
        build: Builds the step from the current state: ``build(decisions) -> compiled steps``.
        position: The position of the run.
        captured: The Python values that the step has captured.
        moment: Returns the position, given the number of micro-batches of an update.
    """

    def __init__(
        self,
        build: Callable[[Decisions], Callable[[Any, int], dict[str, Any]]],
        position: Position,
        captured: CapturedValues,
        moment: Callable[[int], Moment],
    ) -> None:
        self._build, self._position, self._captured = build, position, captured
        self._moment = moment
        self._renew()

    def _renew(self) -> None:
        self._versions = Versions(self._build, "train")
        self._generation = self._captured.generation

    def horizon(self, accumulation: int) -> int:
        """The maximum number of updates in the next block, as far as known."""
        if not self._position.used and self._versions.horizon(self._moment(accumulation), 2) > 1:
            return 1 << 30
        return self._versions.horizon(self._moment(accumulation), 1 << 10)

    def has_traced(self, block: Block) -> bool:
        """Whether the updates of a block run without being traced and compiled first."""
        if self._captured.check() != self._generation:
            return False
        return self._versions.have_traced(self._moment(block.micro_batches), block.outline)

    def __call__(self, tensors: Any, block: Block) -> dict[str, Any]:
        """Run the updates of a block.

        Args:
            tensors: The chunks of the block, on the device.
            block: The block.
        """
        if self._captured.check() != self._generation:
            self._renew()
        moment = self._moment(block.micro_batches)
        version = self._versions.at(moment)
        traced = block.outline in version.traced
        self._position.set(moment, traced)
        result = version.run(tensors, block.updates)
        if not traced:
            version.traced.add(block.outline)
            self._captured.settle()
        found: dict[str, Any] = result
        return found
