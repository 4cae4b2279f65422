"""What a checkpoint of a run holds, and how a run is put back to it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import platform
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kbtrain.backends.protocol import Backend
from kbtrain.checkpoint import (
    Checkpoint,
    capture,
    name_optimizer_variables,
    name_variables,
    plan_restore,
    restore,
    validated_json,
)
from kbtrain.checkpoint.keras_layout import KerasLayout, keras_layout
from kbtrain.checkpoint.storage.format import dump_json
from kbtrain.errors import CheckpointMismatchError
from kbtrain.model.trainable_flags import TrainableFlags
from kbtrain.model.variables import refresh_derived_values, state_variables
from kbtrain.optimization import changing_variables
from kbtrain.optimization.evaluation_weights import swapped_in
from kbtrain.utils import rng, tensorflow_import
from kbtrain.utils.host_buffers import HostBuffers
from kbtrain.utils.output_files import writing

logger = logging.getLogger("kbtrain")


@dataclass
class Progress:
    """Where a run is in its data, and what it has added up since it began.

    Attributes:
        epoch: Number of the current epoch.
        batch: Micro-batches of it that are done.
        loss_sum: Sum of the losses of all updates.
        window_sum: The same since the last log.
        window_steps: Updates since the last log.
        window_extras: Sums of the extra values since the last log.
        skipped: Updates left out because they were not finite.
        batch_size: Samples of a micro-batch when this was saved.
        num_examples: Samples of an epoch then; None if the data does not know.
        unfinished: An evaluation that was due and had to be left to the resumed run: ``after`` is
            "step" or "epoch", ``save`` whether a checkpoint was due behind it.
    """

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    window_sum: float = 0.0
    window_steps: int = 0
    window_extras: dict[str, float] | None = None
    skipped: int = 0
    batch_size: int | None = None
    num_examples: int | None = None
    unfinished: dict[str, Any] | None = None

    def move_to(self, batch_size: int | None) -> None:
        """Convert the position in the data to another batch size, by samples."""
        old = self.batch_size
        if old and batch_size and old != batch_size:
            self.batch = self.batch * old // batch_size
        self.batch_size = batch_size

    def check_length(self, num_examples: int | None, where: Path) -> None:
        """Compare the length of the training data with that of the saved run.

        Raises:
            CheckpointMismatchError: It is another one, and the position is within an epoch, whose
                samples would come in another order.
        """
        old, self.num_examples = self.num_examples, num_examples
        if old is None or num_examples is None or old == num_examples:
            return
        changed = f"The training data had {old} samples and has {num_examples} now."
        if self.batch:
            raise CheckpointMismatchError(
                f"{changed} {where} stands at batch {self.batch} of epoch {self.epoch}: the rest "
                "of it would be another one, with samples that were seen and without others. "
                "Resume with the data of that run, or set ignore_data_skip=True, which begins the "
                "epoch anew with the data there is."
            )
        logger.warning(
            "%s Epochs have another number of steps from here on, and schedules by epochs another "
            "length.",
            changed,
        )


@functools.cache
def environment(backend: str) -> dict[str, Any]:
    """Backend and versions, for a checkpoint's manifest and for bug reports; do not change it."""
    versions = {"python": platform.python_version()}
    for name in ("kbtrain", "keras", "numpy", "h5py", backend):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return {"backend": backend, "versions": versions}


def model_variables(model: keras.Model) -> list[keras.Variable]:
    """The model's own state: weights, statistics, seeds, states of RNNs; without metrics."""
    metrics = {id(v) for metric in model.metrics for v in metric.variables}
    optimizer = getattr(model, "optimizer", None)
    others = metrics | {id(v) for v in (optimizer.variables if optimizer else [])}
    return [v for v in state_variables(model) if id(v) not in others]


def gather_model(model: keras.Model, buffers: HostBuffers | None = None) -> dict[str, np.ndarray]:
    """Host copies of the model's variables, by path; in ``buffers`` if they are given."""
    return capture(name_variables(model_variables(model)), buffers, "model")


_layouts: weakref.WeakKeyDictionary[keras.Model, Any] = weakref.WeakKeyDictionary()


def cached_keras_layout(model: keras.Model) -> KerasLayout:
    """Where ``model.load_weights`` looks for the variables that ``gather_model`` returns.

    Keras' walk through a model takes milliseconds, so it is made once, unless layers store more
    than variables, which may be something else each time.
    """
    variables = model_variables(model)
    identities = [id(variable) for variable in variables]
    known, layout = _layouts.get(model, ([], KerasLayout()))
    if known != identities:
        layout = keras_layout(model, name_variables(variables))
        if not layout.values:
            _layouts[model] = identities, layout
    result: KerasLayout = layout
    return result


_configs: weakref.WeakKeyDictionary[keras.Model, Any] = weakref.WeakKeyDictionary()


def model_config(model: keras.Model) -> dict[str, Any] | None:
    """How to build the model anew, as JSON; None if the model cannot say."""
    if model not in _configs:
        try:
            with tensorflow_import.not_imported():
                config = keras.saving.serialize_keras_object(model)
            config.pop("compile_config", None)
            dump_json("model_config", config)
        except Exception:  # a class of the user's own, whose get_config may do anything
            config = None
        _configs[model] = config
    result: dict[str, Any] | None = _configs[model]
    return result


def gather_evaluation(
    model: keras.Model,
    optimizer: Any,
    trained: dict[str, np.ndarray],
    buffers: HostBuffers | None = None,
) -> dict[str, np.ndarray]:
    """Host copies of what is evaluated in place of some of the trained weights, by path."""
    named = name_variables(model_variables(model))
    return differing(optimizer, named, trained, buffers)


def restore_model(model: keras.Model, checkpoint: Checkpoint) -> None:
    """Put the model's variables back, to the values that are meant for evaluation.

    Raises:
        CheckpointMismatchError: The checkpoint is of another architecture; nothing was changed.
    """
    arrays = {**_group(checkpoint, "model"), **checkpoint.arrays.get("evaluation", {})}
    restore(name_variables(model_variables(model)), arrays, what="model")
    refresh_derived_values(model)


def gather_training(
    backend: Backend,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    metric_variables: Sequence[keras.Variable],
    progress: Progress,
    others: Mapping[str, keras.optimizers.Optimizer] | None = None,
    buffers: HostBuffers | None = None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Everything besides the model that an exact resume needs: ``(arrays, documents)``.

    Args:
        backend: The backend in use.
        model: The model.
        optimizer: What trains it.
        metric_variables: State of the metrics.
        progress: The position.
        others: Further optimizers that the model trains with by itself, by name.
        buffers: Where to copy to; the default is new memory.
    """
    rng_arrays, rng_document = rng.capture_random_state(backend)
    variables = model_variables(model)
    arrays = {
        **{
            group: capture(
                name_optimizer_variables(each.variables, variables)
                | changing_variables.set_aside(each),
                buffers,
                group,
            )
            for group, each in _optimizer_groups(optimizer, others).items()
        },
        "metrics": {str(i): value for i, value in enumerate(host_copies(metric_variables))},
        "rng": rng_arrays,
    }
    # A copy: it is written while training goes on.
    return arrays, {"progress": dataclasses.asdict(progress), "rng": rng_document}


def restore_run(
    backend: Backend,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    metric_variables: Sequence[keras.Variable],
    checkpoint: Checkpoint,
    others: Mapping[str, keras.optimizers.Optimizer] | None = None,
) -> Progress:
    """Put model, optimizers, metrics and random state back to where the checkpoint was taken.

    Args:
        backend: The backend in use.
        model: The model.
        optimizer: What trains it.
        metric_variables: State of the metrics.
        checkpoint: The checkpoint.
        others: Further optimizers that the model trains with by itself, by name.

    Raises:
        CheckpointMismatchError: The checkpoint is of another model or optimizer, or holds the
            model only. Nothing has been changed then.
    """
    if "optimizer" not in checkpoint.arrays:
        raise CheckpointMismatchError(
            f"{checkpoint.path} holds the model only (it was saved with save_only_model=True): "
            "the run cannot be continued from it. Resume from a full checkpoint, or load the "
            "weights and start a new run."
        )
    variables = model_variables(model)
    aside = [] if (known := trained_in(checkpoint)) is None else known[1]
    model_plan = plan_restore(name_variables(variables), _group(checkpoint, "model"), what="model")
    optimizer_plans = [
        plan_restore(
            name_optimizer_variables(each.variables, variables),
            {
                k: v
                for k, v in _group(checkpoint, group).items()
                if group != "optimizer" or k not in aside
            },
            what=group,
            model_names=model_plan.names,
        )
        for group, each in _optimizer_groups(optimizer, others).items()
    ]
    progress = progress_of(checkpoint)
    random_state = dict(_group(checkpoint, "rng")), validated_json.mapping(checkpoint, "rng")
    validated_json.attempt(
        checkpoint, "rng", lambda: rng.restore_random_state(backend, *random_state)
    )
    model_plan.apply()
    for plan in optimizer_plans:
        plan.apply()
    arrays = {key: checkpoint.arrays["optimizer"][key] for key in aside}
    changing_variables.restore_aside(optimizer, arrays, model_plan.names)
    refresh_derived_values(model)
    saved = checkpoint.arrays.get("metrics", {})
    values = [saved[str(i)] for i in range(len(saved)) if str(i) in saved]
    if [v.shape for v in values] == [tuple(v.shape) for v in metric_variables]:
        restore_values(metric_variables, values)
    else:
        logger.warning(
            "The metrics have changed since the checkpoint; their first value after the "
            "resume covers the steps from there on only."
        )
    return progress


def _optimizer_groups(
    optimizer: keras.optimizers.Optimizer,
    others: Mapping[str, keras.optimizers.Optimizer] | None,
) -> dict[str, keras.optimizers.Optimizer]:
    """The optimizers of a run by the names of their groups of arrays in a checkpoint."""
    return {"optimizer": optimizer} | {f"optimizer.{n}": o for n, o in (others or {}).items()}


def trained_document(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, at_start: TrainableFlags
) -> dict[str, Any] | None:
    """What is trained, if that has been changed since the run began; else None.

    Args:
        model: The model.
        optimizer: Its optimizer.
        at_start: The flags when the run began.
    """
    flags, aside = TrainableFlags.of(model), changing_variables.set_aside(optimizer)
    if flags == at_start and not aside:
        return None
    return {**flags.to_document(), "aside": sorted(aside)}


def trained_in(checkpoint: Checkpoint) -> tuple[TrainableFlags, list[str]] | None:
    """What was trained, and which optimizer state was of other variables; None if not changed.

    Raises:
        CheckpointDamagedError: It says what cannot be.
    """
    if "trainable" not in checkpoint.documents:
        return None
    document = validated_json.mapping(checkpoint, "trainable")

    def read() -> tuple[TrainableFlags, list[str]]:
        known = checkpoint.arrays.get("optimizer", {})
        aside = [str(key) for key in document["aside"]]
        if missing := [key for key in aside if key not in known]:
            raise ValueError(f"there is no array {missing[0]!r}")
        return TrainableFlags.from_document(document), aside

    return validated_json.attempt(checkpoint, "trainable", read)


def progress_of(checkpoint: Checkpoint) -> Progress:
    """The position of a run, from a checkpoint.

    Raises:
        CheckpointDamagedError: It says what cannot be.
    """
    progress = Progress(**validated_json.fields_of(checkpoint, "progress", Progress))
    unfinished = progress.unfinished
    if unfinished is not None and (
        unfinished.get("after") not in ("step", "epoch")
        or not isinstance(unfinished.get("save"), bool)
    ):
        validated_json.damaged(checkpoint, "progress", f"'unfinished' is {unfinished!r}")
    return progress


def host_copies(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """Host copies of the values of ``variables``."""
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in variables]


def restore_values(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
    """Assign what ``host_copies`` returned."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _group(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    try:
        return checkpoint.arrays[name]
    except KeyError:
        raise CheckpointMismatchError(
            f"{checkpoint.path} has no {name} arrays: it is not a checkpoint of a training run. "
            f"It holds: {sorted(checkpoint.arrays)}."
        ) from None


def save_keras_file(model: keras.Model, path: Path) -> None:
    """Write ``model`` as a ``.keras`` file, complete or not at all."""
    with writing(path) as temporary, tensorflow_import.not_imported():
        model.save(temporary)


def differing(
    optimizer: Any,
    named: dict[str, keras.Variable],
    trained: dict[str, np.ndarray],
    buffers: HostBuffers | None = None,
) -> dict[str, np.ndarray]:
    """Host copies of the values to evaluate that are not the trained ones.

    Args:
        optimizer: The one that trains the model.
        named: The model's variables by the names they are saved under.
        trained: Host copies of all of them.
        buffers: Where to copy to; the default is new memory.
    """
    with swapped_in(optimizer, list(named.values())) as there:
        values = capture(named, buffers, "evaluation") if there else {}
    return {k: v for k, v in values.items() if not np.array_equal(v, trained[k])}
