"""Label smoothing for the cross-entropies of Keras, respecting ignored labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops
from keras.losses import CategoricalCrossentropy, SparseCategoricalCrossentropy

from kbtrain.errors import ConfigurationError
from kbtrain.model.losses.keras_losses import NamedLoss
from kbtrain.model.losses.pairing import mapped
from kbtrain.utils.packages.keras_private import get_keras_mask, set_keras_mask


def smoothed(loss: Any, factor: float) -> Any:
    """A loss with the targets ``(1 - factor) * one_hot + factor / classes``.

    Per element this is ``(1 - factor) * -log p[label] + factor * mean over classes of -log p``,
    see Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567), section 7.

    Args:
        loss: A resolved loss: a cross-entropy over classes, or a dict or list of these.
        factor: Weight of the uniform distribution, in (0, 1).

    Returns:
        A loss in the same structure.

    Raises:
        ConfigurationError: The loss is not a cross-entropy, or smooths labels itself.
    """
    if isinstance(loss, Mapping | list):
        return mapped(lambda item: smoothed(item, factor), loss)
    function = loss.fn if isinstance(loss, NamedLoss) else loss
    if function is keras.losses.sparse_categorical_crossentropy:
        loss = SparseCategoricalCrossentropy()
    if function is keras.losses.categorical_crossentropy:
        loss = CategoricalCrossentropy()
    if type(loss) is SparseCategoricalCrossentropy:
        return _SmoothedSparse(loss, factor)
    if type(loss) is CategoricalCrossentropy and not loss.get_config()["label_smoothing"]:
        config = loss.get_config() | {"label_smoothing": factor}
        return CategoricalCrossentropy(**config, dtype=loss.dtype)
    what = getattr(function, "__name__", None) or type(function).__name__
    own = " with label smoothing of its own" if type(loss) is CategoricalCrossentropy else ""
    raise ConfigurationError(
        f"label_smoothing_factor={factor} is for the losses SparseCategoricalCrossentropy and "
        f"CategoricalCrossentropy. Received: loss={'none' if loss is None else what}{own}. Set it "
        "to 0 and smooth in the loss itself, or pass one of these losses to the Trainer."
    )


class _SmoothedSparse(SparseCategoricalCrossentropy):  # type: ignore[misc]
    """``SparseCategoricalCrossentropy`` of smoothed labels."""

    def __init__(self, plain: Any, factor: float) -> None:
        # Not every version of Keras includes the axis in the configuration of this class.
        self._axis = getattr(plain, "_fn_kwargs", {}).get("axis", -1)
        super().__init__(**plain.get_config(), axis=self._axis, dtype=plain.dtype)
        self._from_logits = plain.get_config()["from_logits"]
        self._factor = factor

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Per-element losses in float32, with the shape of the labels."""
        chosen = super().call(y_true, y_pred)
        if self._from_logits:
            logs = ops.log_softmax(y_pred, axis=self._axis)
        else:
            total = ops.sum(y_pred, axis=self._axis, keepdims=True)
            logs = ops.log(ops.clip(y_pred / total, keras.config.epsilon(), 1.0))
        uniform = -ops.mean(logs, axis=self._axis)
        result = (1.0 - self._factor) * chosen + self._factor * uniform
        if (mask := get_keras_mask(chosen)) is not None:
            set_keras_mask(result, mask)
        return result
