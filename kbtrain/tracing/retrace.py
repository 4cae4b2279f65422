"""A compiled step that follows what is changed in Python between its calls.

What Python decides while a step is traced stays decided. So there is a version of the step for
each way its decisions by ``state.global_step`` and ``state.epoch`` went
(`kbtrain.tracing.position`), and all are thrown away when something that they have captured is
changed (`kbtrain.tracing.captured`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.data import Block
from kbtrain.tracing.captured import Captured
from kbtrain.tracing.moment import Moment
from kbtrain.tracing.position import Decisions, Position

logger = logging.getLogger("kbtrain")

Step = Callable[[Any], Any]
"""One step in Python, ``step(inputs) -> outputs``."""

MAX_VERSIONS = 16
"""Versions that are kept; the oldest one goes."""


class Traces:
    """What the Python of a step needs while it is traced: numbers of the state, and who notes.

    Args:
        backend: The backend in use.
        position: Where the run stands.
        captured: Notes what the step reads.
        state: Returns the ``TrainerState``.
    """

    def __init__(
        self,
        backend: Backend,
        position: Position,
        captured: Captured,
        state: Callable[[], Any],
    ) -> None:
        self.backend, self.position, self.captured = backend, position, captured
        self._state = state

    def step(self, step: Step, decisions: Decisions, variable: keras.Variable) -> Step:
        """The step with all that.

        Args:
            step: One step.
            decisions: Where to note what Python decides.
            variable: One of the step's state, not a trained one.
        """

        def traced(inputs: Any) -> Any:
            with (
                self.position.readable(self._state(), decisions),
                self.captured.recording(self.backend.is_symbolic(variable)),
            ):
                return step(inputs)

        return traced

    def forward(self, forward: Callable[..., Any], variable: keras.Variable) -> Callable[..., Any]:
        """A forward pass that may be traced by itself, in a step that runs eagerly."""

        def recorded(batch: Any, num_items: Any, training: bool) -> Any:
            with self.captured.recording(self.backend.is_symbolic(variable)):
                return forward(batch, num_items, training=training)

        return recorded


@dataclass
class Version:
    """One compiled version of a step.

    Attributes:
        run: The compiled step.
        decisions: What Python decided when it was traced.
        traced: The structures of inputs it has been traced for.
    """

    run: Callable[..., Any]
    decisions: Decisions
    traced: set[Hashable] = field(default_factory=set)


class Versions:
    """The compiled versions of a step.

    Args:
        compile: ``compile(decisions) -> compiled step``; it is traced when it is called first, and
            notes what Python decides then.
        what: Which step it is, for the log.
    """

    def __init__(self, compile: Callable[[Decisions], Callable[..., Any]], what: str) -> None:
        self._compile, self._what = compile, what
        self._versions: list[Version] = []
        self._made = 0

    def at(self, moment: Moment) -> Version:
        """The version that is right now; a new one if there is none."""
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

    def room(self, moment: Moment, limit: int) -> int:
        """For how many updates, of ``limit``, one version is right: one if it is not traced yet."""
        version = next((v for v in self._versions if v.decisions.hold(moment)), None)
        if version is None or not version.traced:
            return 1
        return max(1, version.decisions.room(moment, limit))

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
        logger.info("The %s step is compiled anew: %s has another answer now.", self._what, asked)
        if self._made == MAX_VERSIONS:
            logger.warning(
                "The %s step was compiled %d times, because its Python decides by %s. "
                "keras.ops.where, keras.ops.minimum and the like need no new step.",
                self._what,
                MAX_VERSIONS + 1,
                asked,
            )


class LiveStep:
    """The compiled train steps of a run, up to date in every call.

    Args:
        build: Builds the step from what there is now: ``build(decisions) -> compiled steps``.
        position: Where the run stands.
        captured: Knows what the step has captured.
        moment: Returns where the run stands, given the micro-batches of an update.
    """

    def __init__(
        self,
        build: Callable[[Decisions], Callable[[Any, int], dict[str, Any]]],
        position: Position,
        captured: Captured,
        moment: Callable[[int], Moment],
    ) -> None:
        self._build, self._position, self._captured = build, position, captured
        self._moment = moment
        self._renew()

    def _renew(self) -> None:
        self._versions = Versions(self._build, "train")
        self._generation = self._captured.generation

    def room(self, accumulation: int) -> int:
        """How many updates the next block may have for all that is known."""
        if not self._position.used and self._versions.room(self._moment(accumulation), 2) > 1:
            return 1 << 30
        return self._versions.room(self._moment(accumulation), 1 << 10)

    def __call__(self, tensors: Any, block: Block) -> dict[str, Any]:
        """Run the updates of a block.

        Args:
            tensors: Its chunks, on the device.
            block: The block.
        """
        if self._captured.look() != self._generation:
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
