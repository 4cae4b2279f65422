"""The evaluations of a run as rows of a table that grows, as long as it fits on the screen."""

from __future__ import annotations

from typing import NamedTuple

from kbtrain.display import format as text
from kbtrain.display.view import Evaluation

LEAST_WIDTH = 8
NOTES = len("  best  saving")
REPEAT = 30
"""Rows after which the names of the columns are repeated."""


class Row(NamedTuple):
    """A row: the names of the columns if they have to be shown, the values, and the notes."""

    header: str
    values: str
    notes: str


class EvaluationTable:
    """Formats one evaluation after the other, each as a row or, if that is too wide, a sentence."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows = 0
        self._with_loss = False

    def row(self, result: Evaluation, columns: int) -> Row:
        """The row of an evaluation.

        Args:
            result: The evaluation.
            columns: Width of the screen.
        """
        self._with_loss |= "loss" in result.training
        names = [*(["loss"] if self._with_loss else []), *result.metrics]
        heads = ["update", "epoch", *names]
        widths = [max(len("update"), len(str(result.updates))), len("epoch")]
        widths += [max(len(name), LEAST_WIDTH) for name in names]
        if sum(widths) + 2 * len(widths) + NOTES > columns:
            where, values, notes = text.evaluation_parts(result)
            return Row("", f"{where}: {', '.join(values)}", f"({notes})" if notes else "")
        known = {**result.metrics}
        if self._with_loss:
            known["loss"] = result.training.get("loss", "")
        cells = [f"{result.step}", text.epochs(result.epoch)]
        cells += [text.number(known[name]) for name in names]
        header = ""
        if names != self._names or self._rows >= REPEAT:
            self._names, self._rows = names, 0
            header = _line(heads, widths)
        self._rows += 1
        # The row has the update, so the checkpoint need not be named.
        marks = (["best"] if result.best else []) + (["saving"] if result.saved else [])
        return Row(header, _line(cells, widths), "  ".join(marks))


def _line(cells: list[str], widths: list[int]) -> str:
    return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
