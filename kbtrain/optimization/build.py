"""An optimizer's groups, averages and variables."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kbtrain.config.converters import thaw
from kbtrain.errors import ConfigurationError
from kbtrain.optimization import registry

logger = logging.getLogger("kbtrain")


def check_optimizer(optimizer: Any, source: str) -> None:
    """Make sure that what a package or an overridden method offers as an optimizer is one.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigurationError(
            f"{source} must make a keras.optimizers.Optimizer. "
            f"Received: {type(optimizer).__name__}."
        )


def set_parameter_groups(
    optimizer: keras.optimizers.Optimizer, model: keras.Model, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Give the optimizer its parameter groups, if there are any.

    Args:
        optimizer: An optimizer without state; one inside of others is found.
        model: The built model: groups may name types of its layers.
        groups: ``args.parameter_groups``.

    Raises:
        ConfigurationError: The optimizer knows no groups, or a group is wrong.
    """
    if not groups:
        return
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    if not hasattr(optimizer, "set_parameter_groups"):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise ConfigurationError(
            "parameter_groups needs an optimizer with a method set_parameter_groups, such as those "
            f"of optim. Received: {kind}."
        )
    try:
        optimizer.set_parameter_groups(thaw(groups), model)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(str(error)) from None


def with_average(
    optimizer: keras.optimizers.Optimizer, options: Mapping[str, Any] | None
) -> keras.optimizers.Optimizer:
    """The optimizer inside one that averages the weights, or itself without ``args.ema``.

    Raises:
        ConfigurationError: No package offers averages, or one refuses the options.
    """
    if options is None:
        return optimizer
    factory = registry.find(registry.WRAPPERS, "ema", "ema")
    return registry.call_with_known(factory, {"inner_optimizer": optimizer}, dict(options), "ema")


def build_optimizer_state(
    optimizer: keras.optimizers.Optimizer, model: keras.Model, has_groups: bool
) -> None:
    """Create the optimizer's variables.

    Raises:
        ConfigurationError: The variables do not fit the parameter groups or another argument, or
            the optimizer has a state for other ones.
    """
    if optimizer.built:
        _check_state_fits(optimizer, model)
        return
    try:
        optimizer.build(model.trainable_variables)
    except ValueError as error:
        if has_groups:
            raise ConfigurationError(str(error)) from None
        raise ConfigurationError(f"{type(optimizer).__name__}: {error}") from error
    if has_groups and hasattr(optimizer, "parameter_groups_table"):
        logger.info("Parameter groups:\n%s", optimizer.parameter_groups_table())


def _check_state_fits(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> None:
    """A given optimizer keeps its state from fit to fit; that is of no use for another model.

    Variables of this one may have been frozen or unfrozen since.
    """
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    trained = getattr(optimizer, "_trainable_variables", None) or model.trainable_variables
    own = {id(v) for v in model.variables}
    if trained and not any(id(v) in own for v in trained):
        unknown = [v.path for v in model.trainable_variables]
        raise ConfigurationError(
            f"The optimizer ({type(optimizer).__name__}) was used for other variables already: it "
            f"has no state for {unknown[0]!r}. Make a new one for this model (Keras optimizers "
            "belong to one set of variables)."
        )
