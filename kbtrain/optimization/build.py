"""Parameter groups, weight averaging and state of an optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kbtrain.config.converters import thaw
from kbtrain.errors import ConfigurationError
from kbtrain.optimization import registry
from kbtrain.optimization.division import division_of, own_variables
from kbtrain.utils.layers import innermost_optimizer

logger = logging.getLogger("kbtrain")


def check_optimizer(optimizer: Any, source: str) -> None:
    """Check that a package or an overridden method returned an optimizer.

    Raises:
        ConfigurationError: It did not.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigurationError(
            f"{source} must create a keras.optimizers.Optimizer. "
            f"Received: {type(optimizer).__name__}."
        )


def set_parameter_groups(
    optimizer: keras.optimizers.Optimizer, model: keras.Model, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Set the parameter groups of an optimizer, if there are any.

    Args:
        optimizer: An optimizer without state; wrappers are unwrapped.
        model: The built model: groups may name types of its layers.
        groups: ``args.parameter_groups``.

    Raises:
        ConfigurationError: The optimizer does not support groups, or a group is invalid.
    """
    if not groups:
        return
    optimizer = innermost_optimizer(optimizer)
    if not hasattr(optimizer, "set_parameter_groups"):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise ConfigurationError(
            "parameter_groups requires an optimizer with a method set_parameter_groups, such as "
            f"those of optim. Received: {kind}."
        )
    try:
        optimizer.set_parameter_groups(thaw(groups), model)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(str(error)) from None


def with_average(
    optimizer: keras.optimizers.Optimizer, options: Mapping[str, Any] | None
) -> keras.optimizers.Optimizer:
    """Wrap the optimizer in one that averages the weights, if ``args.ema`` is set.

    Raises:
        ConfigurationError: No package provides averages, or it rejects the options.
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
            the optimizer already has state for other variables.
    """
    if optimizer.built:
        _check_state_fits(optimizer, model)
        return
    trained = model.trainable_variables
    try:
        if division_of(optimizer) is not None:
            _check_names(optimizer, trained)
        optimizer.build(own_variables(optimizer, trained))
    except ValueError as error:
        if has_groups:
            raise ConfigurationError(str(error)) from None
        raise ConfigurationError(f"{type(optimizer).__name__}: {error}") from error
    if has_groups and hasattr(optimizer, "parameter_groups_table"):
        logger.info("Parameter groups:\n%s", optimizer.parameter_groups_table())


def _check_names(optimizer: Any, variables: Sequence[keras.Variable]) -> None:
    """Let optimizers look for the variables that they name among all, not only in a part."""
    while optimizer is not None:
        if hasattr(optimizer, "check_variables"):
            optimizer.check_variables(variables)
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _check_state_fits(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> None:
    """Check that a built optimizer belongs to this model: it keeps its state from fit to fit.

    Variables of the model may have been frozen or unfrozen since.
    """
    optimizer = innermost_optimizer(optimizer)
    trained = getattr(optimizer, "_trainable_variables", None) or model.trainable_variables
    own = {id(v) for v in model.variables}
    if trained and not any(id(v) in own for v in trained):
        unknown = [v.path for v in model.trainable_variables]
        raise ConfigurationError(
            f"The optimizer ({type(optimizer).__name__}) was already used for other variables: it "
            f"has no state for {unknown[0]!r}. Create a new one for this model (a Keras optimizer "
            "belongs to one set of variables)."
        )
