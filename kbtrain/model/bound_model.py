"""A model with its loss and metrics, built from the shapes of a batch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import LabelKeys, ModelInputs, unpack
from kbtrain.errors import ConfigurationError
from kbtrain.model import build as building
from kbtrain.model import precision
from kbtrain.model.custom_steps import ModelMetrics
from kbtrain.model.forward import ComputeLoss, ForwardPass, output_names
from kbtrain.model.id_check import IdCheck
from kbtrain.model.losses.keras_losses import is_summed, resolve_loss
from kbtrain.model.losses.label_check import BatchCheck, LabelCheck
from kbtrain.model.losses.label_smoothing import smoothed
from kbtrain.model.losses.output_losses import adds_losses
from kbtrain.model.losses.pairing import Outputs, mapped
from kbtrain.model.method_overrides import MethodOverrides
from kbtrain.model.metrics import CompiledMetrics, ListedMetrics, MetricSet
from kbtrain.model.variables import advancing_variables, state_variables, states_batch_size, unique
from kbtrain.utils import rng
from kbtrain.utils.layers import walk_layers


class BoundModel:
    """A model with its loss and metrics.

    Args:
        model: A ``keras.Model``. Its compiled loss and metrics are the defaults.
        args: ``bf16``, ``fp16``, ``label_smoothing_factor``, ``jit_compile``, ``devices``,
            ``label_names``.
        backend: The backend in use.
        loss: A resolved loss, or None.
        loss_weights: The ``loss_weights`` argument of the Trainer, or None.
        metrics: The arguments ``metrics`` and ``weighted_metrics`` of the Trainer.
        has_loss_func: Whether the Trainer has a ``compute_loss_func``.
        compute_loss: ``Trainer.compute_loss``.
        tracked: Dict that ``Trainer.track`` fills while the loss is computed.
        custom_compute_loss: Whether ``compute_loss`` is overridden, so that its use of the batch is
            unknown.

    Attributes:
        label_names: Which keys of a batch that is a dict hold targets.
        loss: The loss in use.
        loss_weights: Weights of the losses of several outputs, from ``compile``.
        metrics: The metrics of the training, or None.
        evaluation_metrics: Those of evaluations: the same, unless the model has its own steps.
        overridden: Which overridden methods of ``keras.Model`` are in use.
        custom_compute_loss: See the argument.
        has_given_metrics: Whether metrics were passed to the Trainer.
        forward: The forward pass; None until ``build``.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        backend: Backend,
        *,
        loss: Any,
        loss_weights: Any,
        metrics: tuple[Any, Any],
        has_loss_func: bool,
        compute_loss: ComputeLoss,
        tracked: dict[str, Any],
        custom_compute_loss: bool,
    ) -> None:
        self.model: keras.Model = building.check_model(model)
        self._args, self._backend = args, backend
        self._compute_loss, self._tracked = compute_loss, tracked
        self.label_names = LabelKeys(
            None if args.label_names is None else tuple(args.label_names),
            building.input_names(model) or frozenset(),
            backend.TAKES_STRINGS,
        )
        self.compiled = bool(getattr(model, "compiled", False))
        self._compiled_with = _compiled_with(model)
        if args.bf16 or args.fp16:
            precision.use_mixed_precision(model, "mixed_bfloat16" if args.bf16 else "mixed_float16")
        given = {
            "Trainer.compute_loss": custom_compute_loss,
            "compute_loss_func": has_loss_func,
            "loss": loss is not None,
        }
        self.overridden = MethodOverrides.of(
            model, [name for name, there in given.items() if there]
        )
        self.has_given_metrics = metrics != (None, None)
        self.loss, self.loss_weights = loss, loss_weights
        # An unknown compiled loss is an error only if it would be used.
        replaced = has_loss_func or custom_compute_loss or self.overridden.compute_loss
        if loss is None and not has_loss_func and self.compiled:
            self.loss = _compiled_loss(
                model, must_be_known=not replaced and not self.overridden.train_step
            )
        if loss_weights is None and not replaced and self.compiled:
            self.loss_weights = _compiled_loss_weights(model)
        if args.label_smoothing_factor:
            if self.overridden.compute_loss or self.overridden.train_step:
                name = "train_step" if self.overridden.train_step else "compute_loss"
                raise ConfigurationError(
                    f"label_smoothing_factor={args.label_smoothing_factor} has no effect on a "
                    f"model with a custom {name} ({type(model).__name__}.{name}), which computes "
                    "the loss: smooth the labels there, or override Trainer.compute_loss."
                )
            self.loss = smoothed(self.loss, args.label_smoothing_factor)
        metric_set: MetricSet | None = None
        if self.has_given_metrics:
            metric_set = ListedMetrics(model, *metrics)
        elif self.compiled or model.metrics or self.overridden.compute_metrics:
            metric_set = CompiledMetrics(model)
        self.metrics = ModelMetrics(model) if self.overridden.train_step else metric_set
        self.evaluation_metrics = ModelMetrics(model) if self.overridden.test_step else metric_set
        if self.overridden.test_step and self.has_given_metrics:
            raise ConfigurationError(
                "metrics=... was passed to the Trainer, but the model has a custom "
                f"{type(model).__name__}.test_step, which returns what is reported. Update these "
                "metrics there, or use compute_metrics=..., which receives the outputs."
            )
        self._metrics_built = False
        self._accepted: set[Hashable] = set()  # input shapes that the model has accepted
        self._checks_shapes = True
        self.custom_compute_loss = custom_compute_loss
        # Only where integer labels reach ``loss`` unchanged.
        self._checks_labels = not (has_loss_func or custom_compute_loss or any(self.overridden))
        self._output_shapes: Any = None
        self._checks_ids = not (custom_compute_loss or any(self.overridden))
        self._id_check: IdCheck | None = None
        self._label_check: LabelCheck | None = None
        self.forward: ForwardPass | None = None

    @property
    def is_outdated(self) -> bool:
        """Whether the model was recompiled after its loss and metrics were read."""
        pairs = zip(self._compiled_with, _compiled_with(self.model), strict=True)
        return any(before is not now for before, now in pairs)

    @property
    def metric_variables(self) -> list[keras.Variable]:
        """State of the metrics."""
        sets = [m for m in (self.metrics, self.evaluation_metrics) if m is not None]
        return unique([variable for metrics in sets for variable in metrics.variables])

    @property
    def advancing_variables(self) -> list[keras.Variable]:
        """Variables besides the metrics that change between the batches of an evaluation."""
        return [*advancing_variables(self.model), rng.global_seed_variable()]

    def build(self, batch: Any) -> ForwardPass:
        """Create all variables from the shapes of a NumPy batch, once, and check that it fits.

        Raises:
            DataError: The model does not accept these inputs.
        """
        names = self.label_names
        shapes = building.input_shapes(batch, names)
        if self._checks_shapes and shapes not in self._accepted:
            self._output_shapes = building.build_model(
                self.model,
                batch,
                names,
                picks_columns=self.custom_compute_loss or any(self.overridden),
            )
            self._checks_shapes = self._output_shapes is not None
            self._accepted.add(shapes)
        if self.forward is None:
            self.forward = ForwardPass(
                self.model,
                self._compute_loss,
                self.loss,
                self._tracked,
                names,
                with_metrics=self.evaluation_metrics is not None,
                has_terms=self._has_terms(),
                by_model=self.overridden.compute_loss and not self.custom_compute_loss,
                without_labels=self.overridden.compute_metrics,
                batch_size=states_batch_size(self.model),
            )
            self._build_by_code(self.forward, batch)
        if self._checks_ids and self._id_check is None and self._output_shapes is not None:
            self._id_check = IdCheck(self.model, names)
        # Metrics need labels, which the first batch lacks if it belongs to a prediction.
        labels = unpack(batch, names).y
        has_labels = labels is not None
        if self._checks_labels and has_labels and self._output_shapes is not None:
            self._label_check = LabelCheck(
                self.loss, labels, self._output_shapes, output_names(self.model), names
            )
        metrics = self.evaluation_metrics
        has_inputs = has_labels or self.overridden.compute_metrics
        if metrics is not None and has_inputs and not self._metrics_built:
            if not self.overridden.test_step:
                building.build_metrics(metrics, self.forward, batch)
            self._metrics_built = True
        return self.forward

    def checks(self, with_labels: bool = True) -> list[BatchCheck]:
        """The checks of the data on the host, as far as the model is built."""
        found = [self._id_check, self._label_check if with_labels else None]
        return [check for check in found if check is not None]

    def _has_terms(self) -> bool:
        """Whether the loss may have several terms, each with its own count."""
        if self.overridden.compute_loss and not self.custom_compute_loss:
            return False
        losses = keras.tree.flatten(self.loss)
        return (
            len(losses) > 1
            or self._output_shapes is None  # not known
            or any(is_summed(loss) for loss in losses)
            or len(Outputs(self._output_shapes, None).tensors) > 1
            or any(map(adds_losses, walk_layers(self.model)))
        )

    def _build_by_code(self, forward: ForwardPass, batch: Any) -> None:
        """Create the variables that only a custom step or the user's loss creates."""
        if self.overridden.train_step or self.overridden.test_step:
            building.build_compiled(self.model, batch)
        elif not building.has_call(self.model):
            building.build_by_loss(self.model, forward, batch)
        if not building.has_call(self.model):
            self.model.built = True  # nothing else to build; Keras refuses to save otherwise

    def inputs(self) -> ModelInputs:
        """The expected inputs; without shapes where user code calls the model."""
        if self.custom_compute_loss or self.overridden.train_step:
            return ModelInputs(label_keys=self.label_names)
        return building.model_inputs(self.model, self.label_names)

    def variables(self) -> list[keras.Variable]:
        """All variables that a step reads or assigns, except the optimizer's; no duplicates."""
        listed = [
            *state_variables(self.model),
            *self.metric_variables,
            rng.global_seed_variable(),
        ]
        return unique(listed)


def _compiled_loss(model: keras.Model, must_be_known: bool) -> Any:
    """The loss a model was compiled with; None for an unknown one that is not needed."""
    try:
        return resolve_loss(mapped(_as_object, model.loss))
    except ConfigurationError:
        if must_be_known:
            raise
        return None


def _as_object(loss: Any) -> Any:
    """Instantiate a loss class, as ``compile`` does."""
    is_class = isinstance(loss, type) and issubclass(loss, keras.losses.Loss)
    return loss() if is_class else loss


def _compiled_loss_weights(model: keras.Model) -> Any:
    """The ``loss_weights`` passed to ``compile``."""
    compiled: Any = getattr(model, "_compile_loss", None)
    if hasattr(compiled, "_user_loss_weights"):
        return compiled._user_loss_weights
    # The public API also serializes every other argument of ``compile``.
    return (model.get_compile_config() or {}).get("loss_weights")


def _compiled_with(model: Any) -> list[Any]:
    """The objects that each ``compile`` creates afresh."""
    names = ("optimizer", "_compile_loss", "_compile_metrics")
    return [getattr(model, name, None) for name in names]
