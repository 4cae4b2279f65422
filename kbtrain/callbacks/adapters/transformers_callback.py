"""A callback object of Transformers in a run of the Trainer."""

from __future__ import annotations

import functools
from typing import Any

from kbtrain.callbacks.base import EVENTS, TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.errors import ConfigurationError


class TransformersCallback(TrainerCallback):
    """Calls the events of a ``transformers.TrainerCallback``, whose names and arguments are ours.

    It gets the ``TrainingArguments``, ``TrainerState`` and ``TrainerControl`` of kbtrain. Its logs
    are a copy, because Transformers' own callbacks remove entries.

    Args:
        wrapped: The callback.
    """

    runs_user_code = True

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        for event in EVENTS:
            own = getattr(type(wrapped), event, None)
            base = next(
                (vars(c).get(event) for c in type(wrapped).__mro__ if is_base(c)),
                None,
            )
            if event in vars(wrapped) or own is not base:
                call: Any = functools.partial(self._call, event)
                call.__wrapped__ = getattr(wrapped, event)  # whose signature is checked
                setattr(self, event, call)

    def __repr__(self) -> str:
        return f"TransformersCallback({self.wrapped!r})"

    def _call(
        self,
        event: str,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> Any:
        if "logs" in kwargs:
            kwargs["logs"] = dict(kwargs["logs"])
        try:
            return getattr(self.wrapped, event)(args, state, control, **kwargs)
        except AttributeError as error:
            ours = {"args": args, "state": state, "control": control, **kwargs}
            name = next((n for n, x in ours.items() if x is not None and x is error.obj), None)
            if name is None:
                raise
            raise ConfigurationError(
                f"{type(self.wrapped).__name__}.{event}, a callback of Transformers, uses "
                f"{name}.{error.name}, which kbtrain does not have. Derive the callback from "
                "kbtrain.TrainerCallback and use what there is: the events and their arguments "
                "have the same names."
            ) from error

    def state(self) -> Any:
        """What the callback saves: its arguments and attributes."""
        state = getattr(self.wrapped, "state", None)
        return state() if callable(state) else None

    def load_state(self, state: Any) -> None:
        """Restore its attributes, as Transformers does; its arguments are those of this run."""
        if isinstance(state, dict):
            if callable(load := getattr(self.wrapped, "load_state", None)):
                load(state)
                return
            for name, value in state.get("attributes", {}).items():
                setattr(self.wrapped, name, value)


def is_base(cls: type) -> bool:
    """Whether a class is ``transformers.TrainerCallback``."""
    return cls.__name__ == "TrainerCallback" and cls.__module__.startswith("transformers.")
