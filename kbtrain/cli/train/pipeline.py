"""A run of ``kbtrain train``: data and model, training, evaluation, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

import kbtrain
from kbtrain.cli.train import model as models
from kbtrain.cli.train.data import Data, read_data
from kbtrain.cli.train.settings import Settings
from kbtrain.errors import ConfigurationError
from kbtrain.trainer.trainer import Trainer
from kbtrain.utils import rng
from kbtrain.utils.output_files import save_text


def train(settings: Settings, dry_run: bool) -> None:
    """Train, evaluate, save the model and write the report.

    Args:
        settings: The settings.
        dry_run: Whether to stop before training, with nothing written.
    """
    models.check_model(settings)
    rng.set_seed(settings.args.seed)
    data = read_data(settings, models.image_preparation(settings))
    model = models.make_model(settings, data)
    trainer = _make_trainer(settings, data, model)
    if trainer.is_world_process_zero():
        print(_summary(settings, data, trainer), flush=True)
    if dry_run:
        return
    resume = None if settings.args.is_set("resume_from_checkpoint") else "auto"
    result = trainer.fit(resume_from_checkpoint=resume)
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
    saved, report = trainer.save_model(), trainer.report()
    if trainer.is_world_process_zero():
        folder = settings.args.output_dir  # it may be an address, whose files are uploaded
        print(f"model   {folder}/{saved.name}\nreport  {folder}/{report.name}")


def _make_trainer(settings: Settings, data: Data, model: keras.Model) -> Trainer:
    metrics: list[Any] = {"classification": ["accuracy"], "regression": ["mae"]}.get(data.task, [])
    given = {
        "loss": models.make_loss(settings, data, model),
        "metrics": models.make_list(settings, "metrics", (keras.metrics,), metrics),
        "callbacks": models.make_list(settings, "callbacks", (kbtrain, keras.callbacks), []),
    }
    sets = {"train_dataset": data.sets["train"], "eval_dataset": data.sets.get("eval")}
    try:
        return Trainer(model, settings.args, processing_class=data, **sets, **given)
    except ConfigurationError as problem:
        name = str(problem).partition("=")[0].partition(":")[0]
        if settings.get(name) is None:
            raise
        raise settings.error((name,), str(problem)) from None


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
    return (
        f"{settings.path}: {task}; {listed}; {trainer.model.count_params():,} parameters; "
        f"loss {loss}"
    )
