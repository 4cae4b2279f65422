"""The table at the end of a run, with the targets for one H200 beside the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from on_gpu.rows import Settings


@dataclass(frozen=True)
class Target:
    """What a figure should be on one H200.

    Attributes:
        figure: The name of the figure.
        least: What it should be at least.
        most: What it should be at most.
    """

    figure: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        words = [f"at least {self.least:g}"] if self.least is not None else []
        words += [f"at most {self.most:g}"] if self.most is not None else []
        return f"{self.figure}: {', '.join(words)}"

    def is_met(self, value: float) -> bool:
        """Whether a figure is what it should be."""
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most)


TARGETS: dict[str, list[Target]] = {
    "gpt124m torch": [
        Target("kbtrain / torch loop", most=0.95),
        Target("tokens/s", least=460_000),
        Target("MFU", least=0.34),
    ],
    "gpt124m compiled": [Target("kbtrain / torch.compile", most=1.0)],
    "mlp torch": [Target("kbtrain / torch loop", most=0.45)],
    "resnet50 torch": [Target("kbtrain / torch loop", most=1.05)],
    "jax": [Target("kbtrain / jax loop, optax", most=1.02)],
    "update adamw": [Target("TB/s", least=3.6), Target("of torch fused", least=1.0)],
    "update": [Target("TB/s", least=0.7 * 4.3)],
}
"""By the key in a row; from an analysis of kernels and bytes, not from measurements. The floor of
gpt124m (8 x 1024 tokens in bfloat16) is 17 ms an update, 490,000 tokens/s, 36 % MFU."""

PEAK_TFLOPS = 989.0
"""What an H100 or H200 can do in bfloat16, in 10^12 operations per second."""

_HIDDEN = ("seconds", "messages")


def table(
    rows: Sequence[dict[str, Any]], outcomes: Mapping[str, dict[str, Any]], settings: Settings
) -> Iterator[str]:
    """The lines of the table."""
    failed = sum(row["passed"] is False for row in rows)
    checked = sum(row["passed"] is not None for row in rows)
    for part, outcome in outcomes.items():
        yield ""
        yield f"{part} ({outcome['how']}, {outcome['seconds']:.0f} s)"
        said = outcome["said"].strip() if outcome["how"] != "done" else ""
        for line in said.splitlines()[-4:]:
            yield f"    | {line[:110]}"
        own = [row for row in rows if row["part"] in outcome["parts"]]
        for i, row in enumerate(own):
            if len(outcome["parts"]) > 1 and (i == 0 or row["part"] != own[i - 1]["part"]):
                yield f" {row['part']}"
            yield from _lines(row, settings)
    yield ""
    yield f"{checked - failed} of {checked} checks passed."
    if settings.device == "cpu" or settings.tiny:
        yield "A rehearsal: its times say nothing about a GPU, and no target is judged."


def _lines(row: dict[str, Any], settings: Settings) -> Iterator[str]:
    mark = {True: "ok  ", False: "FAIL", None: "    "}[row["passed"]]
    figures = row.get("figures", {})
    shown = ", ".join(f"{k} {number(v)}" for k, v in figures.items() if k not in _HIDDEN)
    yield f"  {mark} {row['case'] + ':':34} {row.get('error', shown)}"
    for message in figures.get("messages", []):
        yield f"       | {message[:150]}"
    for target in TARGETS.get(row.get("target") or "", []):
        value = figures.get(target.figure)
        if settings.device == "cpu" or settings.tiny or not isinstance(value, int | float):
            verdict = "not judged"
        else:
            verdict = "met" if target.is_met(value) else "MISSED"
        yield f"       target: {target} ({verdict})"


def number(value: Any) -> str:
    """A figure with three or four digits."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
