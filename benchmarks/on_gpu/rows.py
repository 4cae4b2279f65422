"""What a part finds: one JSON object per line, appended as soon as it is known."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from on_gpu.parts import Part

TRACE = 1500
"""Characters kept of a traceback."""


@dataclass(frozen=True)
class Settings:
    """What every part is told.

    Attributes:
        device: "gpu" or "cpu".
        tiny: Whether models are small and updates few.
    """

    device: str = "gpu"
    tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device == "gpu"

    def as_arguments(self) -> list[str]:
        """The same for the command line."""
        return ["--device", self.device, *(["--tiny"] if self.tiny else [])]


@dataclass(frozen=True)
class Reporter:
    """Takes down what a part finds.

    Attributes:
        settings: What every part is told.
        part: The part.
        path: The file.
    """

    settings: Settings
    part: Part
    path: Path

    def row(
        self,
        case: str,
        figures: dict[str, Any],
        passed: bool | None = None,
        target: str | None = None,
    ) -> None:
        """Take down a finding.

        Args:
            case: What was tried.
            figures: What was found.
            passed: Whether a check has succeeded; None if there is nothing to check.
            target: The key of a target in ``on_gpu/table.py``.
        """
        self._write({"case": case, "passed": passed, "figures": figures, "target": target})

    def attempt(self, case: str, run: Callable[[], dict[str, Any]]) -> None:
        """Take down what ``run`` returns, or the error that it raises.

        Args:
            case: What is tried.
            run: Returns figures; ``passed`` and ``target`` among them mean what they mean in
                ``row``.
        """
        start = time.perf_counter()
        try:
            figures = run()
        except Exception as error:
            self.failed(error, case)
            return
        passed, target = figures.pop("passed", None), figures.pop("target", None)
        figures["seconds"] = round(time.perf_counter() - start, 2)
        self.row(case, figures, passed, target)

    def failed(self, error: Exception, case: str = "the rest of the part") -> None:
        """Take down an error, which is being handled."""
        text, trace = f"{type(error).__name__}: {error}"[:TRACE], traceback.format_exc()[-TRACE:]
        self._write({"case": case, "passed": False, "error": text, "trace": trace})

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": self.part.name} | row, default=str) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a part; a last one that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
