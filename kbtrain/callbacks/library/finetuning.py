"""Freezing layers, and unfreezing them during a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.schedule import check_count, check_unit, epochs_done
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.errors import ConfigurationError
from kbtrain.utils.layers import walk_layers

logger = logging.getLogger("kbtrain")


class FinetuningCallback(TrainerCallback):
    """Freezes layers at the start and unfreezes them step by step.

    Patterns are regular expressions that are searched in the paths of layers ("model/encoder/
    block_3/attention"). A frozen ``BatchNormalization`` uses its moving statistics, as always in
    Keras. Frozen weights have no gradients and no optimizer state; layers that are unfrozen join
    with fresh state, and the step is compiled again. A resumed run has the same layers frozen.

    Args:
        freeze: Patterns of the layers to freeze before the first update.
        unfreeze: Number of updates or epochs done -> patterns of layers that are trained from there
            on.
        unit: What ``unfreeze`` counts: "epochs" or "steps".

    Raises:
        ConfigurationError: An argument is invalid; when training begins, a pattern matches no
            layer.

    Example:
        >>> FinetuningCallback("backbone", {1: "backbone/block_12", 3: "backbone"}).unit
        'epochs'
    """

    decides_alike = True
    every_step = False
    runs_user_code = True  # so that the Trainer looks for changed flags after its events

    def __init__(
        self,
        freeze: str | Sequence[str],
        unfreeze: Mapping[int, str | Sequence[str]] | None = None,
        unit: str = "epochs",
    ) -> None:
        self.unit = check_unit(unit, "FinetuningCallback")
        self.freeze = _patterns(freeze)
        self.unfreeze = {
            check_count(at, "the moment in unfreeze", "FinetuningCallback", 1): _patterns(patterns)
            for at, patterns in sorted((unfreeze or {}).items())
        }

    def on_init_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze before the optimizer is built, so that it has no state of frozen weights."""
        model = kwargs["model"]
        if model is not None and model.built:
            self._apply(model, 0)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze and unfreeze what is due at the beginning, or where the run resumes."""
        done = state.global_step if self.unit == "steps" else epochs_done(kwargs["trainer"])
        self._apply(kwargs["model"], done)

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze what is due after this number of epochs."""
        if self.unit == "epochs":
            self._unfreeze(kwargs["model"], epochs_done(kwargs["trainer"]))

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze what is due after this number of updates."""
        if self.unit == "steps":
            self._unfreeze(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the layers that were to be trained after the end of the run."""
        done = state.global_step if self.unit == "steps" else state.epoch
        missed = [at for at in self.unfreeze if at >= done]
        if missed and state.is_world_process_zero:
            logger.warning(
                "FinetuningCallback: the run ended after %g %s, so these layers were not trained "
                "as unfreeze says: %s.",
                done,
                self.unit,
                "; ".join(f"{', '.join(self.unfreeze[at])} (from {at} on)" for at in missed),
            )

    def next_step(self, state: TrainerState) -> int | None:
        """The next update after which layers are unfrozen."""
        later = [at for at in self.unfreeze if at > state.global_step]
        return min(later, default=None) if self.unit == "steps" else None

    def _apply(self, model: Any, done: int) -> None:
        _set_trainable(model, self.freeze, False)
        for at, patterns in self.unfreeze.items():
            _matching(model, patterns)  # a misspelt pattern is noticed now, not in ten hours
            if at <= done:
                _set_trainable(model, patterns, True)

    def _unfreeze(self, model: Any, done: int) -> None:
        if done in self.unfreeze and _set_trainable(model, self.unfreeze[done], True):
            logger.info(
                "%s after %d %s: %d variables are trained.",
                f"Unfrozen: {', '.join(self.unfreeze[done])}",
                done,
                self.unit,
                len(model.trainable_variables),
            )


def _patterns(value: Any) -> list[str]:
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigurationError(
                f"FinetuningCallback: {pattern!r} is not a regular expression ({error})."
            ) from None
    return patterns


def _matching(model: Any, patterns: Sequence[str]) -> list[Any]:
    """The layers whose paths match, with all layers below them.

    Raises:
        ConfigurationError: A pattern matches none.
    """
    layers = [layer for layer in walk_layers(model) if layer is not model]
    found: dict[int, Any] = {}
    for pattern in patterns:
        matched = [layer for layer in layers if re.search(pattern, layer.path or "")]
        if not matched:
            named = [layer for layer in layers if layer.path]
            paths = ", ".join(str(layer.path) for layer in named[:8])
            raise ConfigurationError(
                f"FinetuningCallback: {pattern!r} matches no layer of the model. Its layers are "
                f"{paths}{', ...' if len(named) > 8 else ''}."
            )
        for layer in matched:
            found |= {id(each): each for each in walk_layers(layer)}
    return list(found.values())


def _set_trainable(model: Any, patterns: Sequence[str], flag: bool) -> bool:
    """Freeze or unfreeze layers without changing others; return whether anything changed.

    The flag of a layer counts for all below it, so containers of an unfrozen layer must be
    trainable, while their other layers stay as they are.
    """
    chosen = {id(layer) for layer in _matching(model, patterns)}
    layers = list(walk_layers(model))
    inner = {id(layer): [x for x in walk_layers(layer) if x is not layer] for layer in layers}
    leaves = [layer for layer in layers if not inner[id(layer)]]
    wanted = {id(x): flag if id(x) in chosen else bool(x.trainable) for x in leaves}
    own: list[tuple[Any, bool]] = []  # variables of containers
    for layer in layers:
        if inner[id(layer)]:
            below = {id(v) for x in inner[id(layer)] for v in x.variables}
            for variable in layer._trainable_variables:
                if id(variable) not in below:
                    now = flag if id(layer) in chosen else bool(variable.trainable)
                    own.append((variable, now))
    changed = False
    for layer in layers:
        needed = any(wanted.get(id(x), False) for x in inner[id(layer)])
        if inner[id(layer)] and not layer.trainable and needed:
            layer.trainable = True
    for layer in leaves:
        if layer.trainable != wanted[id(layer)]:
            layer.trainable = wanted[id(layer)]
            changed = True
    for variable, now in own:
        if variable.trainable != now:
            variable.trainable = now
            changed = True
    return changed
