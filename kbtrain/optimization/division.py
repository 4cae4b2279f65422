"""Gradients and optimizer state divided among processes, by whole variables.

Every process has all weights, and computes gradients of all of them from its rows. The sum of the
gradients of a variable is needed by one process only, its owner: that one has the optimizer's state
for it and updates it, and the others get its new value. So each process keeps a part of the state,
whatever the optimizer, and the numbers stay those of one process.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.distributed import host
from kbtrain.distributed.partition import owners_of
from kbtrain.errors import ConfigurationError
from kbtrain.utils.layers import innermost_optimizer
from kbtrain.utils.machine.processes import ProcessGroup


class Division:
    """Which process owns which variable of a model.

    Owners do not change when variables are frozen or trained later, as state would have to move.

    Args:
        backend: The backend in use.
        model: The built model. Its trained variables are divided evenly, and so are the others.
        group: The processes.

    Raises:
        ConfigurationError: Two variables have the same path, under which their state is saved.
    """

    def __init__(self, backend: Backend, model: keras.Model, group: ProcessGroup) -> None:
        self._backend = backend
        paths = Counter(v.path for v in model.weights)
        if twice := [path for path, count in paths.items() if count > 1]:
            raise ConfigurationError(
                f"The model has {paths[twice[0]]} variables with the path {twice[0]!r}. "
                "fsdp='shard_grad_op' tells variables apart by their paths: give the layers "
                "different names."
            )
        self.group = group
        self._owners: dict[int, int] = {}
        for trained in (True, False):
            variables = [v for v in model.variables if v.trainable is trained]
            sizes = [_elements(v) for v in variables]
            owners = owners_of(sizes, group.size)
            self._owners.update(zip(map(id, variables), owners, strict=True))

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self.group.rank

    def owners(self, variables: Sequence[keras.Variable]) -> list[int]:
        """The rank of the owner of each variable."""
        return [self._owners[id(v)] for v in variables]

    def own(self, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
        """The variables that this process owns.

        Raises:
            ConfigurationError: A process owns none of them.
        """
        owners = self.owners(variables)
        _check_all_own(owners, self.group.size)
        mine = zip(variables, owners, strict=True)
        return [v for v, owner in mine if owner == self.group.rank]

    def others(self, variables: Sequence[keras.Variable]) -> list[keras.Variable]:
        """The variables that other processes own."""
        owners = self.owners(variables)
        return [v for v, o in zip(variables, owners, strict=True) if o != self.group.rank]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank. All of them call it alike."""
        return host.gather(self._backend, value)

    def distribute(self, variables: Sequence[keras.Variable]) -> None:
        """Give each variable the value that its owner has. All processes call it alike."""
        owners = self.owners(variables)
        values = self._backend.gather_from_owners([v.value for v in variables], owners)
        for variable, value, owner in zip(variables, values, owners, strict=True):
            if owner != self.group.rank:
                variable.assign(value)


_divisions: weakref.WeakKeyDictionary[Any, Division] = weakref.WeakKeyDictionary()


def set_division(optimizer: keras.optimizers.Optimizer, division: Division) -> None:
    """Record how the state of an optimizer is divided.

    Args:
        optimizer: The outermost one, whose state has not been created yet.
        division: The owners.

    Raises:
        ConfigurationError: It cannot update a part of the variables only.
    """
    check_divisible(optimizer)
    _divisions[optimizer] = division


def check_divisible(optimizer: keras.optimizers.Optimizer) -> None:
    """Check that an optimizer can update a part of the variables only.

    Raises:
        ConfigurationError: It needs the gradients of all of them.
    """
    innermost = innermost_optimizer(optimizer)
    if clip := getattr(innermost, "global_clipnorm", None):
        raise ConfigurationError(
            f"{type(innermost).__name__}(global_clipnorm={clip}) needs all gradients, and with "
            "fsdp='shard_grad_op' an optimizer gets those of the variables that its process owns. "
            f"Set max_grad_norm={clip} in the arguments instead."
        )


def division_of(optimizer: keras.optimizers.Optimizer | None) -> Division | None:
    """How the state of an optimizer is divided among processes; None if each has all of it."""
    return None if optimizer is None else _divisions.get(optimizer)


def own_variables(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[keras.Variable]:
    """Those of the variables that the optimizer updates in this process.

    Raises:
        ConfigurationError: See ``Division.own``.
    """
    division = division_of(optimizer)
    return list(variables) if division is None else division.own(variables)


def largest_share(variables: Sequence[keras.Variable], processes: int) -> float:
    """The part of the elements of trained variables that the process with the most of them owns.

    Args:
        variables: The trained variables.
        processes: The number of processes.

    Raises:
        ConfigurationError: A process owns none of them.
    """
    sizes = [_elements(v) for v in variables]
    owners = owners_of(sizes, processes)
    _check_all_own(owners, processes)
    loads = Counter[int]()
    for owner, size in zip(owners, sizes, strict=True):
        loads[owner] += size
    return max(loads.values()) / sum(sizes)


def _check_all_own(owners: Sequence[int], processes: int) -> None:
    if idle := set(range(processes)) - set(owners):
        raise ConfigurationError(
            f"fsdp='shard_grad_op' divides the {len(owners)} trained variables among "
            f"{processes} processes, and leaves none for process {min(idle)}. Start "
            "fewer processes, train more variables, or leave fsdp out."
        )


def _elements(variable: keras.Variable) -> int:
    count = 1
    for length in variable.shape:
        count *= length
    return count
