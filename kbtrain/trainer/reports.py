"""Artifacts of a run: the saved model, metric tables, result files, a model card."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.checkpoint import divided_state, run_state
from kbtrain.checkpoint import processing_class as processing
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data.plain_values import plain_values
from kbtrain.errors import ConfigurationError
from kbtrain.optimization.division import division_of
from kbtrain.optimization.evaluation_weights import swapped_in
from kbtrain.utils.local_path import check_local
from kbtrain.utils.output_files import explained, read_json, save_json, save_text, writing
from kbtrain.utils.processes import current

if TYPE_CHECKING:
    from kbtrain.callbacks.state import TrainerState
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


def metrics_format(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Format metrics for reading: bytes in MB, runtimes as h:mm:ss.cc, floats with 4 decimals.

    Example:
        >>> metrics_format({"train_runtime": 3725.126, "eval_mem_cpu_alloc_delta": 3 << 20})
        {'train_runtime': '1:02:05.13', 'eval_mem_cpu_alloc_delta': '3MB'}
        >>> metrics_format({"eval_loss": 0.123456, "epoch": 3.0})
        {'eval_loss': '0.1235', 'epoch': '3.0'}
    """
    return {n: _shown(n, value) for n, value in plain_values(metrics, "metrics_format got").items()}


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if "_mem_" in name:
        return f"{int(value) >> 20}MB"
    if name.endswith("_runtime"):
        hundredths = round(float(value) * 100)
        seconds, rest = divmod(hundredths, 100)
        return f"{datetime.timedelta(seconds=seconds)}.{rest:02d}"
    return str(round(value, 4)) if isinstance(value, float) else str(value)


def metrics_table(split: str, metrics: Mapping[str, Any]) -> str:
    """A table of metrics: a title and one aligned line per metric, sorted by name."""
    shown = metrics_format(metrics)
    names = max(map(len, shown), default=0)
    values = max(map(len, shown.values()), default=0)
    lines = [f"  {name:<{names}} = {shown[name]:>{values}}" for name in sorted(shown)]
    return "\n".join([f"***** {split} metrics *****", *lines])


def save_metrics(folder: Path, split: str, metrics: Mapping[str, Any], combined: bool) -> Path:
    """Write ``{split}_results.json``, and update ``all_results.json`` if ``combined``."""
    path = folder / f"{split}_results.json"
    metrics = plain_values(metrics, "save_metrics got")
    if current().rank:
        return path
    save_json(path, metrics)
    if combined:
        everything = folder / "all_results.json"
        save_json(everything, read_json(everything) | metrics)
    return path


def save_state(trainer: TrainerBase) -> Path:
    """Write ``trainer_state.json`` into the output directory."""
    path = Path(trainer.args.output_dir) / "trainer_state.json"
    if trainer.args.should_save:
        save_json(path, trainer.state.to_dict())
    return path


def save_model(trainer: TrainerBase, output_dir: str | Path | None) -> Path:
    """Save the model, its processing class and the arguments; see ``Trainer.save_model``."""
    if not isinstance(output_dir, str | os.PathLike | None):
        raise ConfigurationError(
            f"save_model takes the path of a folder or of a .keras file. Received: {output_dir!r}."
        )
    check_local("output_dir", output_dir)
    target = Path(trainer.args.output_dir if output_dir is None else output_dir).expanduser()
    writes, folder = trainer.args.should_save, target.suffix != ".keras"
    divided = divided_state.divided_variables(trainer.backend, trainer.model)
    if folder and writes:
        save_text(target / "training_args.json", trainer.args.to_json_string() + "\n")
        with explained(target):
            processing.save_processing_class(trainer.processing_class, target)
    target = target / "model.keras" if folder else target
    optimizer = trainer.optimizer if trainer.training_weights else None
    if not writes and not divided and division_of(optimizer) is None:
        return target
    with swapped_in(optimizer, trainer.model.variables):
        values = [(v, trainer.backend.whole_value(v)) for v in divided]
        if writes:
            run_state.save_keras_file(trainer.model, target, values)
    return target


# --- the model card -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CardFacts:
    """Fields of a model card that the user provides; see ``Trainer.create_model_card``."""

    language: str | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | Sequence[str] | None = None
    dataset_tags: str | Sequence[str] | None = None
    dataset: str | Sequence[str] | None = None
    dataset_args: str | Sequence[str] | None = None

    def header(self) -> dict[str, Any]:
        """The fields of the card's header, in the format of model hubs."""
        tasks = _listed(self.tasks)
        fields = {
            "library_name": "keras",
            "license": self.license,
            "language": self.language,
            "base_model": self.finetuned_from,
            "pipeline_tag": tasks[0] if len(tasks) == 1 else None,
            "datasets": _listed(self.dataset_tags),
            "tags": ["kbtrain", *_listed(self.tags), *(tasks if len(tasks) > 1 else [])],
        }
        return {name: value for name, value in fields.items() if value}

    def origin(self) -> str:
        """A sentence on the base model and the data."""
        data, options = ", ".join(_listed(self.dataset)), ", ".join(_listed(self.dataset_args))
        data += f" ({options})" if data and options else ""
        parts = [
            f"It was fine-tuned from {self.finetuned_from}." if self.finetuned_from else "",
            f"It was trained on {data}." if data else "",
        ]
        return " ".join(part for part in parts if part) + "\n" if any(parts) else ""


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def create_model_card(trainer: TrainerBase, facts: CardFacts) -> Path:
    """Write ``README.md`` and, if matplotlib is installed, ``loss.png`` into the output directory.

    Returns:
        The path of the card.
    """
    folder = Path(trainer.args.output_dir)
    if not trainer.args.should_save:
        return folder / "README.md"
    name = facts.model_name or trainer.args.run_name or folder.name or "model"
    plot = _plot(trainer.state, folder / "loss.png")
    versions = run_state.environment(trainer.backend.name)["versions"]
    parts = [
        _front_matter(facts.header()),
        f"# {name}\n",
        _summary(trainer),
        facts.origin(),
        _last_evaluation(trainer.state),
        "## Training results\n\n" + results_table(trainer.state.log_history) + "\n",
        f"![Loss]({plot.name})\n" if plot else "",
        "## Settings\n\nThose that differ from the defaults.\n\n" + _settings(trainer.args) + "\n",
        "## Versions\n\n" + "\n".join(f"- {n} {v}" for n, v in versions.items()) + "\n",
    ]
    path = folder / "README.md"
    save_text(path, "\n".join(part for part in parts if part))
    return path


def _summary(trainer: TrainerBase) -> str:
    """A description of the model and the length of its training."""
    model, state = trainer.model, trainer.state
    if not model.built:
        return f"{type(model).__name__} `{model.name}`, without variables yet.\n"
    return (
        f"{type(model).__name__} `{model.name}` with {model.count_params():,} parameters, of which "
        f"{trainer.get_num_trainable_parameters():,} were trained for {state.global_step:,} "
        f"updates ({state.epoch:.2f} epochs).\n"
    )


def _front_matter(values: Mapping[str, Any]) -> str:
    """The header of a card as YAML, which accepts JSON strings."""
    lines = ["---"]
    for name, value in values.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return "\n".join([*lines, "---\n"])


def _last_evaluation(state: TrainerState) -> str:
    evaluations = [e for e in state.log_history if any(k.startswith("eval_") for k in e)]
    if not evaluations:
        return ""
    speed = ("_runtime", "_per_second")
    values = {
        name: value
        for name, value in evaluations[-1].items()
        if name.startswith("eval_") and not name.endswith(speed)
    }
    listed = "\n".join(f"- {name[5:]}: {_shown(name, v)}" for name, v in values.items())
    return f"On the evaluation set, at step {evaluations[-1]['step']}:\n\n{listed}\n"


def results_table(history: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with one row per evaluation and the latest training loss beside it.

    Without evaluations there is one row per training log.
    """
    speed = ("_runtime", "_per_second")
    rows: list[dict[str, Any]] = []
    loss: Any = "no log"
    evaluated = any("eval_loss" in entry for entry in history)
    for entry in history:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry or (not evaluated and "loss" in entry):
            row = {"Training loss": loss, "Epoch": entry["epoch"], "Step": entry["step"]}
            names = [n for n in entry if n.startswith("eval_") and not n.endswith(speed)]
            titles = {n: "Validation loss" if n == "eval_loss" else n[5:] for n in names}
            rows.append(row | {titles[n]: entry[n] for n in names})
    if not rows:
        return "Nothing was logged."
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_shown(c, row.get(c, "")) for c in columns) + " |")
    return "\n".join(lines)


def _settings(args: TrainingArguments) -> str:
    values, defaults = args.to_dict(), type(args)().to_dict()
    changed = {k: v for k, v in values.items() if v != defaults[k] and k != "output_dir"}
    return "\n".join(f"- {name}: {value!r}" for name, value in changed.items()) or "- none"


def _plot(state: TrainerState, path: Path) -> Path | None:
    """Plot the losses over the updates; None without matplotlib or without a loss."""
    curves = {}
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(e["step"], e[name]) for e in state.log_history if name in e]
        if points:
            curves[label] = points
    if not curves:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("No loss plot in the model card: matplotlib is not installed.")
        return None
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)  # no window, regardless of the user's settings
    axes = figure.add_subplot()
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set_xlabel("updates")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    with writing(path) as temporary:
        figure.savefig(temporary)
    return path
