"""A run of ``kbtrain train``: data and model, training, evaluation, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

import kbtrain
from kbtrain.checkpoint import run_state
from kbtrain.cli.train import metrics as measures
from kbtrain.cli.train import model as models
from kbtrain.cli.train.data import Data, read_data
from kbtrain.cli.train.settings import Place, Settings
from kbtrain.errors import CheckpointMismatchError, ConfigurationError
from kbtrain.trainer.trainer import Trainer
from kbtrain.training.resuming import resolve_together
from kbtrain.utils import rng
from kbtrain.utils.files.output_files import save_text


def train(settings: Settings, dry_run: bool) -> None:
    """Train, evaluate, save the model and write the report.

    Args:
        settings: The settings.
        dry_run: Whether to stop before training, with the output folder checked and unchanged.
    """
    models.check_model(settings)
    rng.set_seed(settings.args.seed)
    data = read_data(settings, models.image_preparation(settings))
    model = models.make_model(settings, data)
    trainer = _make_trainer(settings, data, model)
    if trainer.is_world_process_zero():
        print(_summary(settings, data, trainer), flush=True)
    resume = None if settings.args.is_set("resume_from_checkpoint") else "auto"
    try:
        if dry_run:
            _check_folder(trainer, data, resume or settings.args.resume_from_checkpoint)
            return
        result = trainer.fit(resume_from_checkpoint=resume)
    except CheckpointMismatchError as problem:
        if "args.output_dir" in str(problem):
            raise
        raise CheckpointMismatchError(
            f"{problem} For a new run use another args.output_dir."
        ) from None
    if trainer.is_world_process_zero():
        save_text(Path(settings.args.output_folder) / "config.yaml", settings.shown())
    trainer.save_metrics("train", result.metrics)
    if "eval" in data.sets:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if "test" in data.sets:
        metrics = trainer.predict(data.sets["test"]).metrics
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)
    if data.preset is not None and trainer.is_world_process_zero():
        # With the weights of the model, whose layers are its own.
        data.preset.save_to_preset(str(Path(settings.args.output_folder) / "preset"))
    saved, report = trainer.save_model(), trainer.report()
    if trainer.is_world_process_zero():
        folder = settings.args.output_dir  # it may be an address, whose files are uploaded
        print(f"model   {folder}/{saved.name}\nreport  {folder}/{report.name}")
        if data.preset is not None:
            print(f"preset  {folder}/preset")


def _check_folder(trainer: Trainer, data: Data, resume: Any) -> None:
    """What a run checks of ``output_dir`` before its first update, with nothing left behind.

    The checkpoints at an address are not downloaded: only the access is checked.

    Raises:
        CheckpointError: The folder is in use or cannot be written to, or it has a checkpoint that
            this run cannot continue from.
    """
    trainer.saver.check_folder()
    if trainer.store.is_remote:
        return
    checkpoint = resolve_together(trainer, resume)
    if checkpoint is None:
        return
    data.check_resumed(checkpoint.path)
    run_state.restore_model(trainer.model, checkpoint)
    if trainer.is_world_process_zero():
        print(f"It would continue from {checkpoint.path}.", flush=True)


def _make_trainer(settings: Settings, data: Data, model: keras.Model) -> Trainer:
    _check_evaluation(settings, data)
    loss = models.make_loss(settings, data, model)
    metrics = measures.default_metrics(data, loss)

    def adapt(place: Place, one: Any) -> Any:
        return measures.for_logits(settings, place, one, loss)

    given = {
        "loss": loss,
        "metrics": models.make_list(settings, "metrics", (keras.metrics,), metrics, adapt),
        "callbacks": models.make_list(settings, "callbacks", (kbtrain, keras.callbacks), []),
    }
    sets = {"train_dataset": data.sets["train"], "eval_dataset": data.sets.get("eval")}
    try:
        trainer = Trainer(model, settings.args, processing_class=data, **sets, **given)
    except ConfigurationError as problem:
        name = str(problem).partition("=")[0].partition(":")[0]
        if settings.get(name) is None:
            raise
        raise settings.error((name,), str(problem)) from None
    _check_best(settings, model, given["metrics"])
    return trainer


def _check_evaluation(settings: Settings, data: Data) -> None:
    """Refuse evaluations without data."""
    args = settings.args
    if "eval" in data.sets:
        return
    for name, off in (("eval_strategy", "no"), ("eval_minutes", None), ("eval_on_start", False)):
        if (value := getattr(args, name)) != off:
            raise settings.error(
                ("args", name),
                f"{value} needs data to evaluate with: data.eval, or data.eval_fraction, a part of "
                "the training set.",
            )


def _check_best(settings: Settings, model: keras.Model, metrics: list[Any]) -> None:
    """Refuse a ``metric_for_best_model`` that no evaluation will have."""
    wanted = settings.args.metric_for_best_model
    if wanted is None or any(":" in str(one) for one in settings.get("callbacks") or []):
        return  # a callback of the user's own may add results
    names = ["loss", *(getattr(one, "name", str(one)) for one in metrics)]
    others = [metric.name for metric in model.metrics]
    by_name = [one for one in metrics if isinstance(one, str) and one in dir(keras.metrics)]
    others += [keras.metrics.get(one).name for one in by_name]
    short = wanted.removeprefix("eval_")
    known = [*names, *others]
    several = any(short.startswith(f"{name}_") for name in known)  # one for each class
    if short not in known and not several and not short.endswith(("_per_second", "runtime")):
        raise settings.error(
            ("args", "metric_for_best_model"),
            f"{wanted!r} is none of the results of an evaluation: {', '.join(names)}. Name one of "
            "them, or add the metric to metrics.",
        )


def _summary(settings: Settings, data: Data, trainer: Trainer) -> str:
    sizes = {
        name: len(part[1]) if isinstance(part, tuple) else len(part)
        for name, part in data.sets.items()
    }
    listed = ", ".join(f"{size:,} samples ({name})" for name, size in sizes.items())
    task = data.task.replace("_", " ")
    if data.classes is not None:
        names = ", ".join(map(str, data.classes[:10]))
        task += f" into {len(data.classes)} classes ({names}{', ...' if data.outputs > 10 else ''})"
    loss = getattr(trainer.given_loss, "name", trainer.given_loss)
    if hasattr(trainer.given_loss, "from_logits"):
        loss += f" (from_logits={trainer.given_loss.from_logits})"
    return (
        f"{settings.path}: {task}; {listed}; {trainer.model.count_params():,} parameters; "
        f"loss {loss}"
    )
