"""The model card: what a model is, its data and results, which weights it holds, how to use it."""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from kbtrain.callbacks.state import TrainerState
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError
from kbtrain.report.ending import held_step
from kbtrain.report.page import is_result
from kbtrain.report.plots import plot_history
from kbtrain.report.record import on_curves
from kbtrain.utils.files.output_files import save_text
from kbtrain.utils.packages.versions import environment

logger = logging.getLogger("kbtrain")

MODEL_FILE = "model.keras"
"""The file that ``Trainer.save_model`` writes into a folder."""

_ONE = ("license", "model_name", "finetuned_from")


@dataclass(frozen=True)
class CardFacts:
    """Fields of a model card that the user provides; see ``Trainer.create_model_card``.

    Raises:
        ConfigurationError: A field is not text, or not a list of texts.
    """

    language: str | Sequence[str] | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | Sequence[str] | None = None
    dataset_tags: str | Sequence[str] | None = None
    dataset: str | Sequence[str] | None = None
    dataset_args: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            several = isinstance(value, list | tuple) and name not in _ONE
            if isinstance(value, str | None) or (
                several and all(isinstance(each, str) for each in value)
            ):
                continue
            wanted = "text" if name in _ONE else "text or a list of texts"
            raise ConfigurationError(
                f"create_model_card: {name} must be {wanted}. Received: {name}={value!r:.80}."
            )

    def header(self) -> dict[str, Any]:
        """The fields of the card's header, in the format of model hubs."""
        tasks = listed(self.tasks)
        fields = {
            "library_name": "keras",
            "license": self.license,
            "language": self.language,
            "base_model": self.finetuned_from,
            "pipeline_tag": tasks[0] if len(tasks) == 1 else None,
            "datasets": listed(self.dataset_tags),
            "tags": ["kbtrain", *listed(self.tags), *(tasks if len(tasks) > 1 else [])],
        }
        return {name: value for name, value in fields.items() if value}

    def origin(self) -> str:
        """A sentence on the base model and the data."""
        data, options = ", ".join(listed(self.dataset)), ", ".join(listed(self.dataset_args))
        data += f" ({options})" if data and options else ""
        parts = [
            f"It was fine-tuned from {self.finetuned_from}." if self.finetuned_from else "",
            f"It was trained on {data}." if data else "",
        ]
        return " ".join(part for part in parts if part) + "\n" if any(parts) else ""


def listed(value: str | Sequence[str] | None) -> list[str]:
    """One text or several as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def create_model_card(trainer: Any, facts: CardFacts) -> Path:
    """Write ``README.md`` and, if matplotlib is installed, ``loss.png`` into the output directory.

    Returns:
        The path of the card.
    """
    folder: Path = trainer.args.output_folder
    path = folder / "README.md"
    if not trainer.args.should_save:
        return path
    folder_name = PurePath(trainer.store.place).name
    name = facts.model_name or trainer.args.run_name or folder_name or "model"
    plot = _plot(trainer, folder / "loss.png")
    versions = environment(trainer.backend.name)["versions"]
    step = held_step(trainer)
    evaluated = _evaluation_at(trainer.state, step)
    tests = {k: v for k, v in trainer.record.tests.items() if is_result(k)}
    history, best = trainer.state.log_history, trainer.state.best_global_step
    parts = [
        _front_matter(facts.header() | _model_index(name, facts, evaluated, tests)),
        f"# {name}\n",
        _summary(trainer, step),
        facts.origin(),
        _results("evaluation", evaluated, step),
        _results("test", tests, None),
        "## Usage\n\n" + _usage(trainer.model, folder, trainer.pusher) + "\n",
        _data(trainer.record.facts),
        "## Training results\n\n" + results_table(history, best) + "\n",
        f"![Loss]({plot.name})\n" if plot else "",
        "## Settings\n\nThose that differ from the defaults.\n\n" + _settings(trainer.args) + "\n",
        "## Versions\n\n" + "\n".join(f"- {n} {v}" for n, v in versions.items()) + "\n",
    ]
    text = "\n".join(part for part in parts if part)
    _check_with_hub(text)
    save_text(path, text)
    return path


def _summary(trainer: Any, step: int | None) -> str:
    """A description of the model, the length of its training, and the weights it holds."""
    model, state = trainer.model, trainer.state
    if not model.built:
        return f"{type(model).__name__} `{model.name}`, without variables yet.\n"
    text = (
        f"{type(model).__name__} `{model.name}` with {model.count_params():,} parameters, of which "
        f"{trainer.get_num_trainable_parameters():,} were trained for {state.global_step:,} "
        f"updates ({state.epoch:.2f} epochs)."
    )
    metric = trainer.args.metric_for_best_model
    if trainer.weights_note is not None:
        text += f" It holds {trainer.weights_note}."
        if step is None:
            text += " These were not evaluated during the training."
    elif step is not None and step != state.global_step:
        value = "" if state.best_metric is None else f" ({shown(str(metric), state.best_metric)})"
        text += f" It holds the weights of update {step:,}, the best by {metric}{value}."
    elif state.global_step:
        text += " It holds the weights of the last update."
    if state.best_global_step not in (None, step):
        text += f" The best by {metric} were those of update {state.best_global_step:,}."
    return text + "\n"


def _evaluation_at(state: TrainerState, step: int | None) -> dict[str, Any]:
    """The newest results of the evaluation set at a step."""
    found: dict[str, Any] = {}
    if step is None:
        return found
    for entry in state.log_history:
        if entry.get("step") == step:
            found |= {k: v for k, v in entry.items() if k.startswith("eval_") and is_result(k)}
    return found


def _results(split: str, values: Mapping[str, Any], step: int | None) -> str:
    if not values:
        return ""
    rows = "\n".join(f"- {name.partition('_')[2]}: {shown(name, v)}" for name, v in values.items())
    where = "" if step is None else f", at update {step:,}"
    return f"These weights on the {split} set{where}:\n\n{rows}\n"


def _usage(model: Any, folder: Path, pusher: Any) -> str:
    """A program that loads the model and calls it.

    Args:
        model: The model.
        folder: ``output_dir``.
        pusher: What pushes the model to the Hub; None if nothing does.
    """
    if pusher is not None and pusher.preset is not None:
        load = f'keras_hub.models.{type(model).__name__}.from_preset("{pusher.preset}")'
        return f"```python\nimport keras_hub\n\nmodel = {load}\n```"
    repository = "" if pusher is None or "/" not in pusher.name else pusher.name
    inputs = getattr(model, "inputs", None) or []
    shapes = [
        f"{one.dtype} ({', '.join('n' if d is None else str(d) for d in one.shape)})"
        for one in inputs
    ]
    comment = f"  # x: {'; '.join(shapes)}" if shapes else ""
    written = (folder / MODEL_FILE).exists()
    note = "" if written else f"`trainer.save_model()` writes `{MODEL_FILE}`.\n\n"
    imported, path = "", f'"{MODEL_FILE}"'
    if repository:
        imported = "from huggingface_hub import hf_hub_download\n"
        path = f'hf_hub_download("{repository}", "{MODEL_FILE}")'
    return (
        f"{note}```python\nimport keras\n{imported}\n"
        f"model = keras.models.load_model({path})\n"
        f"predictions = model.predict(x){comment}\n```"
    )


def _data(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = [f"- training: {_counted(facts.get('examples'))}"]
    for name, count in (facts.get("eval_examples") or {}).items():
        title = "evaluation" if name == "eval" else f"evaluation, {name}"
        rows.append(f"- {title}: {_counted(count)}")
    if facts.get("batch_size"):
        rows.append(f"- an update: {facts['batch_size']:,} examples")
    return "## Data\n\n" + "\n".join(rows) + "\n"


def _counted(count: int | None) -> str:
    return "a stream of unknown length" if count is None else f"{count:,} examples"


def _front_matter(values: Mapping[str, Any]) -> str:
    """The header of a card as YAML, which accepts JSON."""
    lines = ["---"]
    for name, value in values.items():
        if isinstance(value, list | tuple):
            lines += [f"{name}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return "\n".join([*lines, "---\n"])


def _model_index(
    name: str, facts: CardFacts, evaluated: Mapping[str, Any], tests: Mapping[str, Any]
) -> dict[str, Any]:
    """The results in the format of model hubs, which need a task and a data set for them."""
    tasks, tags, data = listed(facts.tasks), listed(facts.dataset_tags), listed(facts.dataset)
    results = tests or evaluated  # those of data that the choice of the weights has not seen
    if not (tasks and (tags or data) and results):
        return {}
    dataset = {"name": (data or tags)[0], "type": (tags or data)[0]}
    metrics = [
        {"type": metric.partition("_")[2], "value": value}
        for metric, value in results.items()
        if isinstance(value, int | float)
    ]
    entry = {"task": {"type": tasks[0]}, "dataset": dataset, "metrics": metrics}
    return {"model-index": [{"name": name, "results": [entry]}]}


def _check_with_hub(text: str) -> None:
    """Let ``huggingface_hub``, if installed, read the header, and warn if it refuses it."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return
    try:
        from huggingface_hub import ModelCard

        ModelCard(text)
    except Exception as error:  # it raises errors of its own and of its YAML parser
        logger.warning(
            "The header of the model card is not what huggingface_hub expects: %s", error
        )


def shown(name: str, value: Any) -> str:
    """A metric as people read it: bytes in MB, runtimes as h:mm:ss.cc, floats with 4 decimals."""
    if isinstance(value, str):
        return value
    if "_mem_" in name:
        return f"{int(value) >> 20}MB"
    if name.endswith("_runtime"):
        hundredths = round(float(value) * 100)
        seconds, rest = divmod(hundredths, 100)
        return f"{datetime.timedelta(seconds=seconds)}.{rest:02d}"
    return str(round(value, 4)) if isinstance(value, float) else str(value)


def results_table(history: Sequence[Mapping[str, Any]], best_step: int | None = None) -> str:
    """A Markdown table with one row per evaluation and the latest training loss beside it.

    Without evaluations there is one row per training log.

    Args:
        history: The log history.
        best_step: The step whose row is set off.
    """
    rows: list[dict[str, Any]] = []
    loss: Any = "no log"
    evaluated = any("eval_loss" in entry for entry in history)
    for entry in filter(on_curves, history):
        loss = entry.get("loss", loss)
        if "eval_loss" in entry or (not evaluated and "loss" in entry):
            row = {"Training loss": loss, "Epoch": entry["epoch"], "Step": entry["step"]}
            names = [n for n in entry if n.startswith("eval_") and is_result(n)]
            titles = {n: "Validation loss" if n == "eval_loss" else n[5:] for n in names}
            rows.append(row | {titles[n]: entry[n] for n in names})
    if not rows:
        return "Nothing was logged."
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    for row in rows:
        cells = [shown(c, row.get(c, "")) for c in columns]
        if row["Step"] == best_step:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    marked = any(row["Step"] == best_step for row in rows)
    return "\n".join(lines) + ("\n\nThe best row is in bold." if marked else "")


def _settings(args: TrainingArguments) -> str:
    changed = {k: v for k, v in args.changed().items() if k not in ("output_dir", "hub_token")}
    return "\n".join(f"- {name}: {value!r}" for name, value in changed.items()) or "- none"


def _plot(trainer: Any, path: Path) -> Path | None:
    """Plot the losses and metrics; None without matplotlib or without a loss."""
    try:
        plot_history(trainer, path)
    except ConfigurationError as error:
        logger.info("No loss plot in the model card: %s", error)
        return None
    return path
