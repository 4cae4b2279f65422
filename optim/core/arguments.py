"""The arguments that every optimizer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypedDict

from optim.core.checks import check_closed, check_count, check_flag, check_range


class CommonArguments(TypedDict, total=False):
    """The arguments every optimizer takes, with Keras' names and meanings; see `Optimizer`."""

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None
    name: str | None
    kernel: str | None
    parameter_groups: Sequence[Mapping[str, Any]] | None


def check_common(learning_rate: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check what Keras would accept silently.

    Args:
        learning_rate: As the user gave it; checked if it is a number.
        arguments: Name -> what the user gave, of the other arguments of Keras' base class.

    Returns:
        All of them, for the constructor of Keras' base class.

    Raises:
        ValueError: If one is out of its range.
    """
    checked = dict(arguments)
    if isinstance(learning_rate, Real):
        learning_rate = check_range("learning_rate", learning_rate, 0.0)
    for name in ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor"):
        if checked[name] is not None:
            checked[name] = check_range(name, checked[name], 0.0)
    if checked["loss_scale_factor"] == 0.0:
        raise ValueError("`loss_scale_factor` must be above 0. Received: loss_scale_factor=0.0")
    for name, least in (("ema_overwrite_frequency", 1), ("gradient_accumulation_steps", 2)):
        if checked[name] is not None:
            checked[name] = check_count(name, checked[name], least)
    check_flag("use_ema", checked["use_ema"])
    checked["ema_momentum"] = check_closed("ema_momentum", checked["ema_momentum"], 0.0, 1.0)
    return {"learning_rate": learning_rate, **checked}
