"""Metrics of ``kbtrain train`` that read the model's outputs as its loss does."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import keras

from kbtrain.cli.train.data import Data
from kbtrain.cli.train.settings import Place, Settings

_ACCURACY = ("accuracy", "acc")


def default_metrics(data: Data, loss: Any) -> list[Any]:
    """The metrics of the task."""
    if data.task == "regression":
        return ["mae"]
    if data.task != "classification":
        return []
    if _is_binary(loss) and loss.from_logits:
        # Of a logit, the middle is 0: `accuracy` compares with 0.5.
        return [keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)]
    return ["accuracy"]


def for_logits(settings: Settings, place: Place, given: Any, loss: Any) -> Any:
    """A metric that is set, with the arguments that it needs if the model's outputs are logits.

    Keras' metrics expect probabilities: a binary one compares with 0.5, which is 0 for logits.

    Args:
        settings: The settings.
        place: Where the metric was set.
        given: Its name, or a name with arguments.
        loss: The loss, which knows whether it takes logits.

    Returns:
        The same, or with arguments added; what is set is kept.

    Raises:
        ConfigurationError: The metric cannot take logits.
    """
    if not getattr(loss, "from_logits", False):
        return given
    name, arguments = given, None
    if isinstance(given, dict) and len(given) == 1:
        ((name, arguments),) = given.items()
    if not isinstance(name, str) or ":" in name or not isinstance(arguments, dict | None):
        return given
    own = dict(arguments or {})
    if not isinstance(given, dict):
        own["name"] = name  # as it is named in the results where it stays a name
    if _is_binary(loss) and name.lower() in _ACCURACY:
        return {"BinaryAccuracy": {"threshold": 0.0} | own}
    kind: Any = None
    with contextlib.suppress(ValueError):  # it is told where the metric is made
        kind = keras.metrics.get(name)
    kind = kind if inspect.isclass(kind) else type(kind)
    takes = inspect.signature(kind).parameters if issubclass(kind, keras.metrics.Metric) else {}
    needed: dict[str, Any] = {}
    if "from_logits" in takes and (_is_binary(loss) or kind.__name__.endswith("Crossentropy")):
        needed = {"from_logits": True}
    elif _is_binary(loss) and kind is keras.metrics.BinaryAccuracy:
        needed = {"threshold": 0.0}
    elif _is_binary(loss) and "thresholds" in takes:
        needed = {"thresholds": 0.0}
    elif _is_binary(loss) and {"threshold", "num_thresholds"} & {*takes}:
        raise settings.error(
            place,
            f"{name} compares probabilities with thresholds, and the loss takes the model's "
            "outputs for logits. End the model in a sigmoid: Dense: {units: 1, activation: "
            "sigmoid}.",
        )
    return {kind.__name__: needed | own} if needed else given


def _is_binary(loss: Any) -> bool:
    return type(loss).__name__ in ("BinaryCrossentropy", "BinaryFocalCrossentropy")
