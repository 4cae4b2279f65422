"""Plots of a run with matplotlib, where it is installed."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kbtrain.callbacks.state import TrainerState
from kbtrain.errors import ConfigurationError
from kbtrain.report.curves import loss_names, metric_names, series, wants_log_scale
from kbtrain.report.record import on_curves
from kbtrain.report.sources import load_run
from kbtrain.utils.files.output_files import writing
from kbtrain.utils.packages.optional_imports import require

TRAINING, EVALUATION = "#7a8ca3", "#c8553d"
OTHERS = ("#2f8f6b", "#8a5fb5", "#b58a1f", "#4a8fa8")


def plot_history(
    run: Any, path: str | os.PathLike[str] | None = None, title: str | None = None
) -> Any:
    """Draw loss and metrics of a run over its epochs, side by side (needs matplotlib).

    The training values are means over the updates between two logs, during which the model changed
    and dropout was active, so those of the evaluation can be better.

    Args:
        run: A Trainer, its ``state``, a ``log_history``, or the folder of a run.
        path: A file to save the figure to, such as ``history.png``.
        title: A title above the figure.

    Returns:
        The ``matplotlib.figure.Figure``, which a notebook shows.

    Raises:
        ConfigurationError: matplotlib is not installed, or there is no run or log to plot.
        OutputError: The file cannot be written.

    Example:
        >>> plot_history(trainer, "history.png")  # doctest: +SKIP
    """
    logs, best_step = _logs_of(run)
    names = [n for n in loss_names(logs) if series(logs, n)]
    if not names:
        raise ConfigurationError("plot_history found no loss in the log: nothing was logged yet.")
    # A figure without pyplot has no window and needs no display.
    figure = _figure_class()(
        figsize=(4.5 * min(1 + len(metric_names(logs)), 3), 3.6), layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "examples", "plot_history").FigureCanvasAgg(figure)
    x_name = "epoch" if _epochs(logs) else "update"
    panels = [("loss", names), *((m, [m, f"eval_{m}"]) for m in metric_names(logs)[:2])]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (panel, curves) in zip(axes, panels, strict=True):
        _draw(axis, panel, curves, logs, best_step, x_name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=len(labels))
    figure.suptitle(title or " ", x=0.01, ha="left", fontsize=12)
    if path is not None:
        with writing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=150)
    return figure


@functools.cache
def _figure_class() -> type:
    """A figure that a notebook shows by itself, also without pyplot."""
    base: type = require("matplotlib.figure", "examples", "plot_history").Figure

    def picture(self: Any) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()

    return type("Figure", (base,), {"_repr_png_": picture})


def _logs_of(run: Any) -> tuple[list[Mapping[str, Any]], int | None]:
    """The logs of a run, and the step of its best evaluation."""
    state = getattr(run, "state", run)
    if isinstance(state, TrainerState):
        return [log for log in state.log_history if on_curves(log)], state.best_global_step
    if isinstance(run, str | os.PathLike):
        record = load_run(run)
        return list(record.logs), None if record.best is None else int(record.best["step"])
    if isinstance(run, Sequence) and all(isinstance(e, Mapping) and "step" in e for e in run):
        return [log for log in run if on_curves(log)], None
    raise ConfigurationError(
        "plot_history takes a Trainer, its state, a log_history, or the folder of a run. "
        f"Received: {run!r:.100}"
    )


def _epochs(logs: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Step -> epoch; empty if a log has none, or all are in the first one."""
    found = {float(log["step"]): float(log.get("epoch") or 0.0) for log in logs}
    return found if max(found.values(), default=0.0) > 1 else {}


def _draw(
    axis: Any,
    panel: str,
    names: Sequence[str],
    logs: Sequence[Mapping[str, Any]],
    best_step: int | None,
    x_name: str,
) -> None:
    epochs = _epochs(logs) if x_name == "epoch" else {}
    colours = {names[0]: TRAINING, f"eval_{panel}": EVALUATION}
    values: list[float] = []
    for i, name in enumerate(names):
        points = series(logs, name)
        if not points:
            continue
        label = {panel: "training", f"eval_{panel}": "validation"}.get(name)
        axis.plot(
            [epochs.get(step, step) for step, _ in points],
            [value for _, value in points],
            color=colours.get(name, OTHERS[i % len(OTHERS)]),
            label=label or name.removeprefix("eval_"),
            linewidth=2,
            marker="o" if len(points) <= 60 else None,
            markersize=3.5,
        )
        values += [value for _, value in points]
    if best_step is not None:
        axis.axvline(
            epochs.get(float(best_step), float(best_step)),
            color="#444444",
            linewidth=1,
            linestyle=":",
            label="best model",
            zorder=0,
        )
    axis.set_xlabel(x_name)
    axis.set_title(panel.capitalize(), loc="left", fontsize=11)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y", color="#e6e6e6")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel == "loss" and wants_log_scale(values):
        axis.set_yscale("log")
    if "accuracy" in panel and all(0 <= value <= 1 for value in values):
        axis.yaxis.set_major_formatter("{x:.0%}")
