"""How the state of a run is divided among devices: a mesh, and rules for variables.

The mesh has three axes. Batches are divided along ``data`` and ``fsdp``. State is divided along
``fsdp`` by a rule that holds for every variable: the first dimension that divides. Along ``tensor``
it is divided where a pattern of paths says so.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import keras

from kbtrain.config.sharding import AXES
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")

SMALLEST = 1024
"""Elements below which a variable is not worth dividing, unless ``min_num_params`` says so."""

Axes = tuple[str | None, ...]
"""The axis of the mesh along which each dimension of a variable is divided; None: whole."""


@dataclass(frozen=True)
class StateLayout:
    """A mesh of devices, and which variables are divided along which of its axes.

    Attributes:
        sizes: Axis -> number of devices along it.
        patterns: Regular expression that is searched for in paths -> axes of the dimensions.
        smallest: Elements from which a variable is divided along ``fsdp``.
        weights: Whether the weights are divided along ``fsdp``, too, or only what belongs to the
            optimizer.
    """

    sizes: Mapping[str, int]
    patterns: Mapping[str, Axes] = field(default_factory=dict)
    smallest: int = SMALLEST
    weights: bool = True

    def axes_of(self, variables: Sequence[keras.Variable]) -> list[Axes]:
        """The axes of each variable. A slot of an optimizer follows its variable.

        Raises:
            ConfigurationError: A pattern does not fit the shape of a variable.
        """
        followed: dict[str, tuple[keras.Variable, Axes]] = {}
        found = []
        for variable in variables:
            axes = self._by_pattern(variable)
            if axes is not None and variable.trainable:
                followed[variable.path.replace("/", "_")] = variable, axes
            found.append(axes)
        for i, variable in enumerate(variables):
            if found[i] is None:
                found[i] = _of_owner(variable, followed)
        return [self._by_rule(v, axes) for v, axes in zip(variables, found, strict=True)]

    def check(self, variables: Sequence[keras.Variable]) -> None:
        """Check that every pattern is found in the path of a variable.

        Raises:
            ConfigurationError: One is not.
        """
        for pattern in self.patterns:
            if not any(re.search(pattern, variable.path) for variable in variables):
                paths = ", ".join(variable.path for variable in variables[:8])
                raise ConfigurationError(
                    f"No variable has a path with {pattern!r}, a pattern of fsdp_config['layouts']."
                    f" The paths begin with: {paths}."
                )

    def _by_pattern(self, variable: keras.Variable) -> Axes | None:
        for pattern, axes in self.patterns.items():
            if re.search(pattern, variable.path) is None:
                continue
            shape = tuple(variable.shape)
            sizes = [1 if axis is None else self.sizes.get(axis, 1) for axis in axes]
            if len(axes) != len(shape) or any(n % s for n, s in zip(shape, sizes, strict=True)):
                raise ConfigurationError(
                    f"The layout {list(axes)} of the pattern {pattern!r} does not fit "
                    f"{variable.path}, whose shape is {shape}: it needs one entry for each "
                    "dimension, and dimensions that the sizes of the axes divide. "
                    f"Sizes: {dict(self.sizes)}."
                )
            return axes
        return None

    def _by_rule(self, variable: keras.Variable, axes: Axes | None) -> Axes:
        shape, parts = tuple(variable.shape), self.sizes.get("fsdp", 1)
        axes = (None,) * len(shape) if axes is None else axes
        small = math.prod(shape) < max(self.smallest, 1)
        if parts == 1 or small or "fsdp" in axes or (variable.trainable and not self.weights):
            return axes
        for i, size in enumerate(shape):
            if axes[i] is None and size % parts == 0:
                return (*axes[:i], "fsdp", *axes[i + 1 :])
        return axes


def _of_owner(
    variable: keras.Variable, followed: Mapping[str, tuple[keras.Variable, Axes]]
) -> Axes | None:
    for name, (owner, axes) in followed.items():
        if name in variable.path and tuple(owner.shape) == tuple(variable.shape):
            return axes
    return None


def state_layout(args: TrainingArguments) -> StateLayout | None:
    """The layout that the arguments ask for; None if every device holds the whole state.

    Raises:
        ConfigurationError: The mesh has another number of devices than there are.
    """
    if args.fsdp is None and args.parallelism_config is None:
        if args.fsdp_config is not None:
            raise ConfigurationError(
                "fsdp_config says how state is divided, and nothing divides it: set fsdp=True, or "
                f"parallelism_config. Received: fsdp_config={dict(args.fsdp_config)!r}."
            )
        return None
    devices = args.device_count * current().size
    if devices == 1:
        logger.warning(
            "There is one device, so nothing is divided: fsdp and parallelism_config have no "
            "effect. Name several in devices, or start several processes."
        )
    sizes = dict(args.parallelism_config or {})
    rest = "fsdp" if args.fsdp is not None else "data"
    if rest not in sizes:
        sizes[rest] = max(1, devices // math.prod(sizes.values()))
    if math.prod(sizes.values()) != devices:
        raise ConfigurationError(
            f"parallelism_config is a mesh of {math.prod(sizes.values())} devices "
            f"({sizes}), and there are {devices}: name those of this process in devices "
            "('gpu:0,gpu:1'), or start as many processes."
        )
    if args.fsdp is not None and devices > 1 and sizes["fsdp"] == 1:
        raise ConfigurationError(
            f"fsdp={args.fsdp!r} divides state along the axis 'fsdp' of the mesh, which has one "
            f"device: parallelism_config={dict(args.parallelism_config or {})!r}. Give the axis "
            "'fsdp' more, or leave out fsdp."
        )
    config = args.fsdp_config or {}
    layouts = config.get("layouts", {})
    if sizes.get("tensor", 1) > 1 and not any("tensor" in axes for axes in layouts.values()):
        raise ConfigurationError(
            "parallelism_config has an axis 'tensor', and no variable is divided along it. Say "
            "which in fsdp_config={'layouts': {'mlp/kernel': [None, 'tensor']}}."
        )
    return StateLayout(
        {name: sizes.get(name, 1) for name in AXES},
        {pattern: tuple(axes) for pattern, axes in layouts.items()},
        config.get("min_num_params", SMALLEST),
        args.fsdp != "shard_grad_op",
    )
