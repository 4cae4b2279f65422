"""The contents of a checkpoint of a run, and how a run is restored from it."""

from __future__ import annotations

import dataclasses
import functools
import logging
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
    frozen_base,
    name_optimizer_variables,
    name_variables,
    plan_restore,
    restore,
    validated_json,
)
from kbtrain.checkpoint.divided_state import capture_divided, without_others
from kbtrain.checkpoint.keras_layout import KerasLayout, keras_layout
from kbtrain.checkpoint.storage.format import dump_json
from kbtrain.errors import CheckpointMismatchError
from kbtrain.model.lora import lora_of, note_trained
from kbtrain.model.trainable_flags import TrainableFlags
from kbtrain.model.variables import refresh_derived_values, state_variables
from kbtrain.optimization import changing_variables
from kbtrain.optimization.division import division_of
from kbtrain.optimization.evaluation_weights import swapped_in
from kbtrain.utils import rng
from kbtrain.utils.array_blocks import OwnedBlocks
from kbtrain.utils.machine.host_buffers import HostBuffers
from kbtrain.utils.packages import tensorflow_import
from kbtrain.utils.packages.versions import environment as environment

logger = logging.getLogger("kbtrain")


@dataclass
class Progress:
    """The position of a run in its data, and its accumulated sums.

    Attributes:
        epoch: Number of the current epoch.
        batch: Micro-batches of this epoch that are done.
        loss_sum: Sum of the losses of all updates.
        window_sum: Sum of the losses since the last log.
        window_steps: Updates since the last log.
        window_extras: Sums of the extra values since the last log.
        skipped: Updates skipped because they were not finite.
        batch_size: Samples of a micro-batch when this was saved.
        num_examples: Samples of an epoch when this was saved; None for data without a length.
        unfinished: A due evaluation that was left to the resumed run: ``after`` is "step" or
            "epoch", ``save`` whether a checkpoint was due after it.
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
        """Convert the position in the data to another batch size, keeping the number of samples."""
        old = self.batch_size
        if old and batch_size and old != batch_size:
            self.batch = self.batch * old // batch_size
        self.batch_size = batch_size

    def check_length(self, num_examples: int | None, where: Path) -> None:
        """Compare the length of the training data with that of the saved run.

        Raises:
            CheckpointMismatchError: The length has changed and the position is within an epoch,
                whose samples would come in a different order.
        """
        old, self.num_examples = self.num_examples, num_examples
        if old is None or num_examples is None or old == num_examples:
            return
        changed = f"The training data had {old} samples and has {num_examples} now."
        if self.batch:
            raise CheckpointMismatchError(
                f"{changed} {where} is at batch {self.batch} of epoch {self.epoch}: the rest of "
                "that epoch would repeat some samples and miss others. Resume with the data of "
                "that run, or set ignore_data_skip=True, which restarts the epoch with the current "
                "data."
            )
        logger.warning(
            "%s From here on, the number of steps per epoch and the length of schedules defined in "
            "epochs change.",
            changed,
        )


@functools.cache
def model_variables(model: keras.Model) -> list[keras.Variable]:
    """The model's own state: weights, statistics, seeds, RNN states; not the metrics."""
    metrics = {id(v) for metric in model.metrics for v in metric.variables}
    optimizer = getattr(model, "optimizer", None)
    others = metrics | {id(v) for v in (optimizer.variables if optimizer else [])}
    return [v for v in state_variables(model) if id(v) not in others]


def gather_model(
    model: keras.Model, buffers: HostBuffers | None = None, divided_only: bool = False
) -> dict[str, Any]:
    """Host copies of the model's variables, by path.

    Args:
        model: The model.
        buffers: Host memory to copy into; new memory by default.
        divided_only: Whether to leave out variables that are whole on every process.
    """
    return capture(_saved_variables(model), buffers, "model", divided_only)


def _saved_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Those that a checkpoint holds, by name."""
    named = name_variables(model_variables(model))
    names = frozen_base.left_out(model, named)
    return {name: variable for name, variable in named.items() if name not in names}


_layouts: weakref.WeakKeyDictionary[keras.Model, Any] = weakref.WeakKeyDictionary()


def cached_keras_layout(model: keras.Model) -> KerasLayout:
    """Where ``model.load_weights`` looks for the variables that ``gather_model`` returns.

    Keras takes milliseconds to traverse a model, so the result is cached, unless layers store more
    than variables, which may change each time.
    """
    if lora_of(model) is not None:
        return KerasLayout()  # Keras reads whole kernels, which are not in the checkpoint
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
    """The configuration to rebuild the model from, as JSON; None if it cannot be serialized."""
    if model not in _configs:
        try:
            with tensorflow_import.not_imported():
                config = keras.saving.serialize_keras_object(model)
            config.pop("compile_config", None)
            dump_json("model_config", config)
        except Exception:  # a user's get_config may raise anything
            config = None
        _configs[model] = config
    result: dict[str, Any] | None = _configs[model]
    return result


def gather_evaluation(
    model: keras.Model,
    optimizer: Any,
    trained: dict[str, Any],
    buffers: HostBuffers | None = None,
    divided_only: bool = False,
) -> dict[str, Any]:
    """Host copies of the evaluation weights that differ from the trained ones, by path."""
    named = _saved_variables(model)
    return differing(optimizer, named, trained, buffers, divided_only)


def saved_names(model: keras.Model, checkpoint: Checkpoint) -> Mapping[str, str]:
    """Names of the model's variables in this process -> in the checkpoint."""
    named = name_variables(model_variables(model))
    return plan_restore(named, _model_arrays(model, checkpoint), what="model").names


def restore_model(model: keras.Model, checkpoint: Checkpoint) -> None:
    """Restore the model's variables, with the weights used for evaluation.

    Raises:
        CheckpointMismatchError: The checkpoint has a different architecture; nothing was changed.
    """
    arrays = {**_model_arrays(model, checkpoint), **checkpoint.arrays.get("evaluation", {})}
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
    divided_only: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Everything besides the model that an exact resume needs: ``(arrays, documents)``.

    Args:
        backend: The backend in use.
        model: The model.
        optimizer: The optimizer that trains it.
        metric_variables: State of the metrics.
        progress: The position of the run.
        others: Further optimizers that the model's own train step uses, by name.
        buffers: Host memory to copy into; new memory by default.
        divided_only: Whether to leave out optimizer state that is whole on every process.
    """
    rng_arrays, rng_document = rng.capture_random_state(backend)
    variables = model_variables(model)
    arrays = {
        **{
            group: _capture_optimizer(each, variables, buffers, group, divided_only)
            for group, each in _optimizer_groups(optimizer, others).items()
        },
        "metrics": {str(i): value for i, value in enumerate(host_copies(metric_variables))},
        "rng": rng_arrays,
    }
    # A copy, because it is written while training continues.
    return arrays, {"progress": dataclasses.asdict(progress), "rng": rng_document}


def _capture_optimizer(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    buffers: HostBuffers | None,
    group: str,
    divided_only: bool,
) -> dict[str, Any]:
    named = name_optimizer_variables(optimizer.variables, variables)
    named |= changing_variables.set_aside(optimizer)
    if (division := division_of(optimizer)) is None:
        return capture(named, buffers, group, divided_only)
    model = name_variables(variables)
    return capture_divided(division, named, model, buffers, group, divided_only)


def restore_run(
    backend: Backend,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    metric_variables: Sequence[keras.Variable],
    checkpoint: Checkpoint,
    others: Mapping[str, keras.optimizers.Optimizer] | None = None,
) -> Progress:
    """Restore model, optimizers, metrics and random state from a checkpoint.

    Args:
        backend: The backend in use.
        model: The model.
        optimizer: The optimizer that trains it.
        metric_variables: State of the metrics.
        checkpoint: The checkpoint.
        others: Further optimizers that the model's own train step uses, by name.

    Raises:
        CheckpointMismatchError: The checkpoint belongs to a different model or optimizer, or holds
            the model only. Nothing has been changed.
    """
    if "optimizer" not in checkpoint.arrays:
        raise CheckpointMismatchError(
            f"{checkpoint.path} holds the model only (it was saved with save_only_model=True): "
            "the run cannot be continued from it. Resume from a full checkpoint, or load the "
            "weights and start a new run."
        )
    variables = model_variables(model)
    aside = [] if (known := trained_in(checkpoint)) is None else known[1]
    named = name_variables(variables)
    model_plan = plan_restore(named, _model_arrays(model, checkpoint), what="model")
    kept = {
        group: without_others(
            division_of(each), _arrays_of(checkpoint, group), named, model_plan.names
        )
        for group, each in _optimizer_groups(optimizer, others).items()
    }
    optimizer_plans = [
        plan_restore(
            name_optimizer_variables(each.variables, variables),
            {k: v for k, v in kept[group].items() if group != "optimizer" or k not in aside},
            what=group,
            model_names=model_plan.names,
        )
        for group, each in _optimizer_groups(optimizer, others).items()
    ]
    progress = progress_of(checkpoint)
    rng_arrays = {key: np.asarray(value) for key, value in _arrays_of(checkpoint, "rng").items()}
    random_state = rng_arrays, validated_json.mapping(checkpoint, "rng")
    validated_json.attempt(
        checkpoint, "rng", lambda: rng.restore_random_state(backend, *random_state)
    )
    model_plan.apply()
    if model_plan.frozen:  # what the checkpoint holds of the base had been changed or trained
        note_trained(model, [variable for variable, _ in model_plan.values])
    for plan in optimizer_plans:
        plan.apply()
    own = kept["optimizer"]
    arrays = {key: np.asarray(own[key]) for key in aside if key in own}
    changing_variables.restore_aside(optimizer, arrays, model_plan.names)
    refresh_derived_values(model)
    saved = checkpoint.arrays.get("metrics", {})
    values = [np.asarray(saved[str(i)]) for i in range(len(saved)) if str(i) in saved]
    if [v.shape for v in values] == [tuple(v.shape) for v in metric_variables]:
        restore_values(metric_variables, values)
    else:
        logger.warning(
            "The metrics have changed since the checkpoint; their first value after the "
            "resume covers only the steps since then."
        )
    return progress


def _optimizer_groups(
    optimizer: keras.optimizers.Optimizer,
    others: Mapping[str, keras.optimizers.Optimizer] | None,
) -> dict[str, keras.optimizers.Optimizer]:
    """The optimizers of a run, by the names of their array groups in a checkpoint."""
    return {"optimizer": optimizer} | {f"optimizer.{n}": o for n, o in (others or {}).items()}


def trained_document(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, at_start: TrainableFlags
) -> dict[str, Any] | None:
    """Which variables are trained, if that has changed since the run began; else None.

    Args:
        model: The model.
        optimizer: Its optimizer.
        at_start: The trainable flags when the run began.
    """
    flags, aside = TrainableFlags.of(model), list(changing_variables.set_aside(optimizer))
    if (division := division_of(optimizer)) is not None:
        aside = [key for part in division.gather(aside) for key in part]
    if flags == at_start and not aside:
        return None
    return {**flags.to_document(), "aside": sorted(aside)}


def trained_in(checkpoint: Checkpoint) -> tuple[TrainableFlags, list[str]] | None:
    """Which variables were trained, and optimizer state set aside for others; None if unchanged.

    Raises:
        CheckpointDamagedError: The document is inconsistent.
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
        CheckpointDamagedError: The document is inconsistent.
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
    """Assign the values that ``host_copies`` returned."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _arrays_of(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    try:
        return checkpoint.arrays[name]
    except KeyError:
        raise CheckpointMismatchError(
            f"{checkpoint.path} has no {name} arrays: it is not a checkpoint of a training run. "
            f"It holds: {sorted(checkpoint.arrays)}."
        ) from None


def _model_arrays(model: keras.Model, checkpoint: Checkpoint) -> dict[str, Any]:
    saved = _arrays_of(checkpoint, "model")
    return frozen_base.completed_from(saved, checkpoint, model)


def differing(
    optimizer: Any,
    named: dict[str, keras.Variable],
    trained: dict[str, Any],
    buffers: HostBuffers | None = None,
    divided_only: bool = False,
) -> dict[str, Any]:
    """Host copies of the evaluation weights that differ from the trained ones.

    Those that are divided among processes are kept in any case: they may differ on one only.

    Args:
        optimizer: The optimizer that trains the model.
        named: The model's variables by the names they are saved under.
        trained: Host copies of all trained values.
        buffers: Host memory to copy into; new memory by default.
        divided_only: Whether to leave out variables that are whole on every process.
    """
    with swapped_in(optimizer, list(named.values())) as there:
        values = capture(named, buffers, "evaluation", divided_only) if there else {}
    return {
        k: v
        for k, v in values.items()
        if isinstance(v, OwnedBlocks) or not np.array_equal(v, trained[k])
    }
