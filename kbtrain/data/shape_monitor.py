"""Monitors the shapes of batches, because each new one costs a compilation."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any

from kbtrain.data.batch import named_leaves

logger = logging.getLogger("kbtrain")

MANY_SHAPES = 8
"""Number of different shapes in a run or an evaluation that is accepted without a warning."""

_SHOWN = 6


class ShapeMonitor:
    """Warns once when batches have too many different shapes for a compiled step.

    Args:
        name: The name of the data in the message.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._outlines: set[Hashable] = set()
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def see(self, outline: Hashable, batches: Sequence[Any]) -> None:
        """Record the shapes of one call to the device.

        Args:
            outline: What the compiled code depends on; a known one returns at once.
            batches: The batches of the call, inspected only if the outline is new.
        """
        if outline in self._outlines:
            return
        self._outlines.add(outline)
        for batch in batches:
            for name, array in named_leaves(batch):
                shapes = self._shapes.setdefault(name, [])
                if tuple(array.shape) not in shapes:
                    shapes.append(tuple(array.shape))
        if len(self._outlines) == MANY_SHAPES + 1:
            logger.warning(
                "%s has had batches of %d different shapes so far, and the step is compiled again "
                "for each of them: %s. Pad to few lengths: use a collator with pad_to_multiple_of "
                "(or padding='max_length'), and train_sampling_strategy='group_by_length' to keep "
                "the padding short.",
                self._name,
                len(self._outlines),
                "; ".join(self._varying()),
            )

    def _varying(self) -> list[str]:
        """The arrays with varying shapes and some of these shapes, most varied first."""
        varying = [(name, shapes) for name, shapes in self._shapes.items() if len(shapes) > 1]
        varying.sort(key=lambda item: -len(item[1]))
        texts = []
        for name, shapes in varying:
            shown = ", ".join(str(shape) for shape in shapes[:_SHOWN])
            more = f" and {len(shapes) - _SHOWN} more" if len(shapes) > _SHOWN else ""
            texts.append(f"{name} {shown}{more}")
        return texts
