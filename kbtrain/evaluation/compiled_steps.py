"""The compiled evaluation steps of a model, one for each variant of an evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import unpack, with_none, without_none
from kbtrain.data.block_length import BlockLength
from kbtrain.errors import ConfigurationError
from kbtrain.evaluation.custom_eval_step import make_custom_eval_step
from kbtrain.evaluation.eval_step import make_eval_step
from kbtrain.model import build as building
from kbtrain.model import custom_steps
from kbtrain.model.bound_model import BoundModel
from kbtrain.model.metrics import MetricSet
from kbtrain.model.variables import unique
from kbtrain.tracing.position import Decisions
from kbtrain.tracing.retrace import Traces, Versions
from kbtrain.utils import rng


@dataclass
class CompiledEvalStep:
    """A compiled evaluation step, with measurements of its duration.

    Attributes:
        versions: Its compiled versions.
        traces: Prepares the step for tracing.
        block_length: Determines how many batches one call runs.
    """

    versions: Versions
    traces: Traces
    block_length: BlockLength = field(default_factory=BlockLength)

    def run(self, block: Any, start: int, count: int) -> tuple[dict[str, Any], int]:
        """Run batches of a block, see ``compile_eval_steps`` of a backend."""
        version = self.versions.at(self.traces.position.moment)
        results: tuple[dict[str, Any], int] = version.run(block, start, count)
        return results


class EvalSteps:
    """The compiled evaluation steps of a bound model.

    Args:
        bound: The model with its loss and metrics.
        args: ``jit_compile``, ``devices``.
        backend: The backend in use.
        preprocess: ``preprocess_logits_for_metrics``, or None.
        traces: Prepares a step for tracing.
    """

    def __init__(
        self,
        bound: BoundModel,
        args: TrainingArguments,
        backend: Backend,
        preprocess: Callable[[Any, Any], Any] | None,
        traces: Traces,
    ) -> None:
        self._bound, self._args, self._backend = bound, args, backend
        self._preprocess, self._traces = preprocess, traces
        self._steps: dict[Hashable, CompiledEvalStep] = {}
        self._generation = 0

    def get(
        self,
        with_loss: bool,
        gather: bool,
        policy: str | None = None,
        ignore_keys: Collection[str] = (),
    ) -> CompiledEvalStep:
        """The compiled evaluation step for one combination of options.

        Args:
            with_loss: Whether the data has labels: compute the loss and update the metrics.
            gather: Whether to return the outputs to the host.
            policy: The dtype policy it runs under, if it differs from training.
            ignore_keys: Outputs to leave on the device, for a model that returns a dict.
        """
        bound, overridden = self._bound, self._bound.overridden
        ignored = frozenset(ignore_keys)
        key = (with_loss, gather, policy, ignored)
        if key not in self._steps:
            assert bound.forward is not None
            self._check_can_evaluate(with_loss, gather)
            variables = bound.variables()
            metrics = bound.evaluation_metrics if with_loss else None
            select = functools.partial(self._select_outputs, ignored=ignored) if gather else None
            if overridden.test_step and with_loss or overridden.predict_step and gather:
                step = self._own_step(with_loss, metrics, select)
            else:
                step = make_eval_step(
                    self._backend,
                    bound.forward if with_loss else bound.forward.predict,
                    bound.advancing_variables,
                    metrics,
                    select,
                )
            self._backend.place(variables, self._args.chosen_device)

            def compile(decisions: Decisions) -> Callable[..., Any]:
                return self._backend.compile_eval_steps(
                    self._traces.step(step, decisions, rng.global_seed_variable()),
                    variables,
                    unique([*(metrics.variables if metrics else []), *bound.advancing_variables]),
                    self._args.jit_compile,
                )

            self._steps[key] = CompiledEvalStep(Versions(compile, "evaluation"), self._traces)
        return self._steps[key]

    def renew(self, generation: int) -> None:
        """Discard the compiled evaluation steps if captured values have changed.

        Args:
            generation: See ``kbtrain.tracing.captured.CapturedValues``.
        """
        if generation != self._generation:
            self._steps.clear()
            self._generation = generation

    def _check_can_evaluate(self, with_loss: bool, gather: bool) -> None:
        """Check that a model without ``call`` has the custom step that is needed."""
        model, overridden = self._bound.model, self._bound.overridden
        for kind in ("test", "predict"):
            if (kind == "test") == with_loss:
                custom_steps.check_function(model, kind)
            if getattr(overridden, f"{kind}_step"):
                self._backend.check_signature(model, f"{kind}_step")
        if building.has_call(model) or (with_loss and self._bound.custom_compute_loss):
            return
        missing = "test_step" if with_loss and not overridden.test_step else "predict_step"
        if missing == "test_step" or gather and not overridden.predict_step:
            raise ConfigurationError(
                f"{type(model).__name__} has no call and no {missing}, so there is nothing to "
                f"{'evaluate' if with_loss else 'predict'} with. Define one of the two."
            )

    def _own_step(
        self,
        with_loss: bool,
        metrics: MetricSet | None,
        select: Callable[[Any, Any], Any] | None,
    ) -> Callable[[Any], dict[str, Any]]:
        """The evaluation step with the model's custom ``test_step`` or ``predict_step``."""
        bound = self._bound
        assert bound.forward is not None
        return make_custom_eval_step(
            self._backend,
            bound.model,
            bound.overridden,
            bound.forward if with_loss else None,
            bound.forward.predict,
            bound.advancing_variables,
            metrics,
            select,
        )

    def _select_outputs(self, outputs: Any, batch: Any, ignored: Collection[str]) -> Any:
        """Select the outputs of a batch that are copied to the host."""
        if ignored and isinstance(outputs, Mapping):
            names = list(outputs)
            outputs = {name: outputs[name] for name in names if name not in ignored}
            if not outputs:
                raise ConfigurationError(
                    "ignore_keys leaves nothing of the model's outputs. "
                    f"Received: ignore_keys={sorted(ignored)}, outputs {names}."
                )
        if self._preprocess is not None:
            outputs = self._preprocess(outputs, unpack(with_none(batch), self._bound.label_names).y)
            if not any(leaf is not None for leaf in keras.tree.flatten(outputs)):
                raise ConfigurationError(
                    "preprocess_logits_for_metrics must return the outputs that compute_metrics "
                    f"and predict get. Received: {outputs!r}. To keep no outputs, set "
                    "prediction_loss_only=True."
                )
        return _movable(outputs)


def _movable(outputs: Any) -> Any:
    """Convert outputs for transfer to the host: numbers to tensors, None as in ``without_none``.

    Raises:
        ConfigurationError: An output has another type.
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
                f"The output {name!r} of the model is not a tensor, so it cannot be copied to the "
                f"host. Received: {type(leaf).__name__}. Remove it from the model's outputs, or "
                f"pass ignore_keys=[{name!r}]."
            ) from None

    leaves = [move(path, leaf) for path, leaf in keras.tree.flatten_with_path(outputs)]
    return without_none(keras.tree.pack_sequence_as(outputs, leaves))
