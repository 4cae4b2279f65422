"""A model with its loss and metrics: built from a batch, compiled into evaluation steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import keras

from kbtrain import building, model_steps, rng
from kbtrain.data import LabelKeys, ModelInputs, unpack, with_none, without_none
from kbtrain.errors import ConfigurationError
from kbtrain.forward import ComputeLoss, ForwardPass, output_names
from kbtrain.keras_losses import is_summed, resolve_loss
from kbtrain.label_check import LabelCheck
from kbtrain.label_smoothing import smoothed
from kbtrain.live_step import Traces, Versions
from kbtrain.metrics import CompiledMetrics, ListedMetrics, MetricSet
from kbtrain.model_steps import ModelMetrics
from kbtrain.output_losses import adds_losses
from kbtrain.outputs import Outputs, mapped
from kbtrain.own_methods import OwnMethods
from kbtrain.pace import Pace
from kbtrain.step import make_eval_step
from kbtrain.traced_state import Decisions
from kbtrain.training_args import TrainingArguments


class BoundModel:
    """A model and what it is measured by.

    Args:
        model: A ``keras.Model``. What it was compiled with is used where nothing is given instead.
        args: ``bf16``, ``fp16``, ``label_smoothing_factor``, ``jit_compile``, ``devices``,
            ``label_names``.
        backend: A module of ``kbtrain.backends``.
        loss: A resolved loss, or None.
        loss_weights: The ``loss_weights`` argument of the Trainer, or None.
        metrics: The arguments ``metrics`` and ``weighted_metrics`` of the Trainer.
        has_loss_func: Whether the Trainer has a ``compute_loss_func``.
        compute_loss: ``Trainer.compute_loss``.
        preprocess: ``preprocess_logits_for_metrics``, or None.
        tracked: Where ``Trainer.track`` puts values while the loss is computed.
        traces: What the Python of a step needs while it is traced.
        own_compute_loss: ``compute_loss`` is overridden: what it does with the batch is not known.

    Attributes:
        label_names: Which keys of a batch that is a dict hold targets.
        loss: The loss in use.
        loss_weights: Weights of the losses of several outputs, from ``compile``.
        metrics: The metrics of the training, or None.
        evaluation_metrics: Those of evaluations: the same, unless the model has its own steps.
        own: Which methods of ``keras.Model`` the model overrides, and are used.
        has_given_metrics: Whether the Trainer was given metrics.
        forward: One pass of a batch; None until ``build``.
        label_check: Looks at labels on the host; None without labels, or if they are not checked.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        backend: ModuleType,
        *,
        loss: Any,
        loss_weights: Any,
        metrics: tuple[Any, Any],
        has_loss_func: bool,
        compute_loss: ComputeLoss,
        preprocess: Callable[[Any, Any], Any] | None,
        tracked: dict[str, Any],
        traces: Traces,
        own_compute_loss: bool,
    ) -> None:
        self.model: keras.Model = building.check_model(model)
        self._args, self._backend = args, backend
        self._compute_loss, self._preprocess = compute_loss, preprocess
        self._tracked, self._traces = tracked, traces
        self.label_names = LabelKeys(
            None if args.label_names is None else tuple(args.label_names),
            building.input_names(model) or frozenset(),
            backend.TAKES_STRINGS,
        )
        self.compiled = bool(getattr(model, "compiled", False))
        self._compiled_with = _compiled_with(model)
        if args.bf16 or args.fp16:
            building.use_mixed_precision(model, "mixed_bfloat16" if args.bf16 else "mixed_float16")
        given = {
            "Trainer.compute_loss": own_compute_loss,
            "compute_loss_func": has_loss_func,
            "loss": loss is not None,
        }
        self.own = OwnMethods.of(model, [name for name, there in given.items() if there])
        self.has_given_metrics = metrics != (None, None)
        self.loss, self.loss_weights = loss, loss_weights
        # The loss of compile may be of no use.
        replaced = has_loss_func or own_compute_loss or self.own.compute_loss
        if loss is None and not has_loss_func and self.compiled:
            self.loss = _compiled_loss(
                model, must_be_known=not replaced and not self.own.train_step
            )
        if loss_weights is None and not replaced and self.compiled:
            self.loss_weights = _compiled_loss_weights(model)
        if args.label_smoothing_factor:
            if self.own.compute_loss or self.own.train_step:
                name = "train_step" if self.own.train_step else "compute_loss"
                raise ConfigurationError(
                    f"label_smoothing_factor={args.label_smoothing_factor} cannot hold for a model "
                    f"with a {name} of its own ({type(model).__name__}.{name}), which computes the "
                    "loss: smooth the labels there, or override Trainer.compute_loss."
                )
            self.loss = smoothed(self.loss, args.label_smoothing_factor)
        metric_set: MetricSet | None = None
        if self.has_given_metrics:
            metric_set = ListedMetrics(model, *metrics)
        elif self.compiled or model.metrics or self.own.compute_metrics:
            metric_set = CompiledMetrics(model)
        self.metrics = ModelMetrics(model) if self.own.train_step else metric_set
        self.evaluation_metrics = ModelMetrics(model) if self.own.test_step else metric_set
        if self.own.test_step and self.has_given_metrics:
            raise ConfigurationError(
                "metrics=... was given to the Trainer, and the model evaluates by its own "
                f"{type(model).__name__}.test_step, which returns what is reported. Update these "
                "metrics there, or use compute_metrics=..., which gets the outputs."
            )
        self._metrics_built = False
        self._accepted: set[Hashable] = set()  # shapes of inputs that the model is known to take
        self._checks_shapes = True
        self._own_compute_loss = own_compute_loss
        # Only where integer labels go to ``loss`` as they are.
        self._checks_labels = not (has_loss_func or own_compute_loss or any(self.own))
        self._output_shapes: Any = None
        self.label_check: LabelCheck | None = None
        self.forward: ForwardPass | None = None
        self._eval_steps: dict[Hashable, CompiledEvalStep] = {}
        self._generation = 0

    @property
    def is_outdated(self) -> bool:
        """Whether the model has been compiled anew since its loss and metrics were taken over."""
        pairs = zip(self._compiled_with, _compiled_with(self.model), strict=True)
        return any(before is not now for before, now in pairs)

    @property
    def metric_variables(self) -> list[keras.Variable]:
        """State of the metrics."""
        sets = [m for m in (self.metrics, self.evaluation_metrics) if m is not None]
        return unique([variable for metrics in sets for variable in metrics.variables])

    @property
    def advancing_variables(self) -> list[keras.Variable]:
        """What changes from one batch of an evaluation to the next, beside the metrics."""
        return [*building.advancing_variables(self.model), rng.global_seed_variable()]

    def build(self, batch: Any) -> ForwardPass:
        """Create all variables from the shapes of a batch (NumPy), once; check that it fits.

        Raises:
            DataError: The model does not accept such inputs.
        """
        names = self.label_names
        shapes = building.input_shapes(batch, names)
        if self._checks_shapes and shapes not in self._accepted:
            self._output_shapes = building.build_model(
                self.model, batch, names, picks_columns=self._own_compute_loss or any(self.own)
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
                by_model=self.own.compute_loss and not self._own_compute_loss,
                without_labels=self.own.compute_metrics,
                batch_size=building.states_batch_size(self.model),
            )
            self._build_by_code(self.forward, batch)
        # Metrics need labels: a prediction may come first, and have none.
        labels = unpack(batch, names).y
        has_labels = labels is not None
        if self._checks_labels and has_labels and self._output_shapes is not None:
            self.label_check = LabelCheck(
                self.loss, labels, self._output_shapes, output_names(self.model), names
            )
        metrics = self.evaluation_metrics
        has_inputs = has_labels or self.own.compute_metrics
        if metrics is not None and has_inputs and not self._metrics_built:
            if not self.own.test_step:
                building.build_metrics(metrics, self.forward, batch)
            self._metrics_built = True
        return self.forward

    def _has_terms(self) -> bool:
        """Whether the loss may be of several terms, each with a count of its own."""
        if self.own.compute_loss and not self._own_compute_loss:
            return False
        losses = keras.tree.flatten(self.loss)
        return (
            len(losses) > 1
            or self._output_shapes is None  # not known
            or any(is_summed(loss) for loss in losses)
            or len(Outputs(self._output_shapes, None).tensors) > 1
            or any(map(adds_losses, building.walk_layers(self.model)))
        )

    def _build_by_code(self, forward: ForwardPass, batch: Any) -> None:
        """Create what a call of the model does not: by its own step, or by a loss of the user's."""
        if self.own.train_step or self.own.test_step:
            building.build_compiled(self.model, batch)
        elif not building.has_call(self.model):
            building.build_by_loss(self.model, forward, batch)
        if not building.has_call(self.model):
            self.model.built = True  # there is no more to build: it can be saved

    def inputs(self) -> ModelInputs:
        """What the data is to hold: nothing is known where code of the user's calls the model."""
        if self._own_compute_loss or self.own.train_step:
            return ModelInputs(label_keys=self.label_names)
        return building.model_inputs(self.model, self.label_names)

    def variables(self) -> list[keras.Variable]:
        """Everything a step reads or assigns, apart from the optimizer; each once."""
        listed = [
            *building.state_variables(self.model),
            *self.metric_variables,
            rng.global_seed_variable(),
        ]
        return unique(listed)

    def eval_step(
        self,
        with_loss: bool,
        gather: bool,
        policy: str | None = None,
        ignore_keys: Collection[str] = (),
    ) -> CompiledEvalStep:
        """The compiled evaluation step; one for each of the forms.

        Args:
            with_loss: The data has labels: compute the loss and update the metrics.
            gather: Return the outputs for the host.
            policy: The dtype policy it runs under, if another one than in training.
            ignore_keys: Outputs that stay on the device, of a model that returns a dict.
        """
        ignored = frozenset(ignore_keys)
        key = (with_loss, gather, policy, ignored)
        if key not in self._eval_steps:
            assert self.forward is not None
            self._check_can_evaluate(with_loss, gather)
            variables = self.variables()
            metrics = self.evaluation_metrics if with_loss else None
            select = functools.partial(self._select_outputs, ignored=ignored) if gather else None
            if self.own.test_step and with_loss or self.own.predict_step and gather:
                step = self._own_eval_step(with_loss, metrics, select)
            else:
                step = make_eval_step(
                    self._backend,
                    self.forward if with_loss else self.forward.predict,
                    self.advancing_variables,
                    metrics,
                    select,
                )
            self._backend.place(variables, self._args.chosen_device)

            def compile(decisions: Decisions) -> Callable[..., Any]:
                return self._backend.compile_eval_steps(
                    self._traces.step(step, decisions, rng.global_seed_variable()),
                    variables,
                    unique([*(metrics.variables if metrics else []), *self.advancing_variables]),
                    self._args.jit_compile,
                )

            self._eval_steps[key] = CompiledEvalStep(Versions(compile, "evaluation"), self._traces)
        return self._eval_steps[key]

    def renew(self, generation: int) -> None:
        """Forget the compiled evaluation steps if what they have captured is not what there is.

        Args:
            generation: See `kbtrain.staleness.Captured`.
        """
        if generation != self._generation:
            self._eval_steps.clear()
            self._generation = generation

    def _check_can_evaluate(self, with_loss: bool, gather: bool) -> None:
        """Make sure that a step of the model's own is there where the model cannot be called."""
        model, own = self.model, self.own
        for kind in ("test", "predict"):
            if (kind == "test") == with_loss:
                model_steps.check_function(model, kind)
            if getattr(own, f"{kind}_step"):
                self._backend.check_signature(model, f"{kind}_step")
        if building.has_call(model) or (with_loss and self._own_compute_loss):
            return
        missing = "test_step" if with_loss and not own.test_step else "predict_step"
        if missing == "test_step" or gather and not own.predict_step:
            raise ConfigurationError(
                f"{type(model).__name__} has no call and no {missing}, so there is nothing to "
                f"{'evaluate' if with_loss else 'predict'} with. Define one of the two."
            )

    def _own_eval_step(
        self,
        with_loss: bool,
        metrics: MetricSet | None,
        select: Callable[[Any, Any], Any] | None,
    ) -> Callable[[Any], dict[str, Any]]:
        """The evaluation step with the model's own ``test_step`` or ``predict_step``."""
        assert self.forward is not None
        return model_steps.make_eval_step(
            self._backend,
            self.model,
            self.own,
            self.forward if with_loss else None,
            self.forward.predict,
            self.advancing_variables,
            metrics,
            select,
        )

    def _select_outputs(self, outputs: Any, batch: Any, ignored: Collection[str]) -> Any:
        """What of a batch's outputs goes to the host."""
        if ignored and isinstance(outputs, Mapping):
            names = list(outputs)
            outputs = {name: outputs[name] for name in names if name not in ignored}
            if not outputs:
                raise ConfigurationError(
                    "ignore_keys leaves nothing of the model's outputs. "
                    f"Received: ignore_keys={sorted(ignored)}, outputs {names}."
                )
        if self._preprocess is not None:
            outputs = self._preprocess(outputs, unpack(with_none(batch), self.label_names).y)
        return _movable(outputs)


def _compiled_loss(model: keras.Model, must_be_known: bool) -> Any:
    """The loss a model was compiled with; None for one that nobody knows and nobody needs."""
    try:
        return resolve_loss(mapped(_as_object, model.loss))
    except ConfigurationError:
        if must_be_known:
            raise
        return None


def _as_object(loss: Any) -> Any:
    """``compile`` takes a class of losses, too, and makes an object of it."""
    is_class = isinstance(loss, type) and issubclass(loss, keras.losses.Loss)
    return loss() if is_class else loss


def _compiled_loss_weights(model: keras.Model) -> Any:
    """The weights a model was compiled with, as they were given."""
    compiled: Any = getattr(model, "_compile_loss", None)
    if hasattr(compiled, "_user_loss_weights"):
        return compiled._user_loss_weights
    # The public way serializes everything else that `compile` was given.
    return (model.get_compile_config() or {}).get("loss_weights")


def _movable(outputs: Any) -> Any:
    """Outputs in what can leave the device: numbers as tensors, None as ``without_none`` has it.

    Raises:
        ConfigurationError: There is something else among them.
    """

    def move(path: tuple[Any, ...], leaf: Any) -> Any:
        if leaf is None or keras.ops.is_tensor(leaf):
            return leaf
        try:
            if isinstance(leaf, str | bytes):
                raise TypeError
            return keras.ops.convert_to_tensor(leaf)
        except (TypeError, ValueError):
            name = path[0] if path else "output"
            raise ConfigurationError(
                f"The model returns something that is no tensor, under {name!r}, and the outputs "
                f"are asked for. Received: {type(leaf).__name__}. Leave it out of what the model "
                f"returns, or pass ignore_keys=[{name!r}]."
            ) from None

    leaves = [move(path, leaf) for path, leaf in keras.tree.flatten_with_path(outputs)]
    return without_none(keras.tree.pack_sequence_as(outputs, leaves))


def _compiled_with(model: Any) -> list[Any]:
    """What ``compile`` makes anew, each time."""
    names = ("optimizer", "_compile_loss", "_compile_metrics")
    return [getattr(model, name, None) for name in names]


@dataclass
class CompiledEvalStep:
    """A compiled evaluation step, with what was learned about how long it takes.

    Attributes:
        versions: Its compiled versions.
        traces: What its Python needs while it is traced.
        pace: How many batches one call may have.
    """

    versions: Versions
    traces: Traces
    pace: Pace = field(default_factory=Pace)

    def run(self, block: Any, start: int, count: int) -> tuple[dict[str, Any], int]:
        """Run batches of a block, see ``compile_eval_steps`` of a backend."""
        version = self.versions.at(self.traces.position.moment)
        results: tuple[dict[str, Any], int] = version.run(block, start, count)
        return results


def unique(variables: list[keras.Variable]) -> list[keras.Variable]:
    """Each variable once, in order."""
    return list({id(v): v for v in variables}.values())
