"""PyTorch: the body of a loop in a step, captured by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from kbtrain.backends.torch import fusion

MakeRunner = Callable[[Callable[[Any], Any], Sequence[keras.Variable]], Callable[[Any], Any]]
"""Makes a function run captured, from it and all variables that it reads or assigns."""


class LoopBody:
    """``carry, output = body(carry, x)``, captured once for each shape.

    On a GPU the tensors of the carry, which are sums of gradients, are state of the body: it adds
    to them in place. As inputs and results they would be as large as the model, twice, and copied
    to the memory of a CUDA graph and back for each micro-batch. Each is assigned in turn, so a body
    must not return the tensors of its carry in other places.

    Args:
        fn: The body.
        variables: All variables that it reads or assigns.
        make_runner: Makes a function run captured.
    """

    def __init__(
        self,
        fn: Callable[[Any, Any], tuple[Any, Any]],
        variables: Sequence[keras.Variable],
        make_runner: MakeRunner,
    ) -> None:
        self._fn = fn
        self._variables = list(variables)
        self._make_runner = make_runner
        self._runner = make_runner(lambda both: fn(*both), variables)
        self._in_place: dict[Any, _InPlace] = {}
        self._is_on_gpu: bool | None = None

    def __call__(self, carry: Any, inputs: Any) -> tuple[Any, Any]:
        """Run the body."""
        if self._is_on_gpu is None:
            self._is_on_gpu = fusion.applies_to(keras.tree.flatten(carry))
        leaves = keras.tree.flatten(carry) if self._is_on_gpu else []
        places = [i for i, leaf in enumerate(leaves) if leaf.dim()]
        if not places:
            result: tuple[Any, Any] = self._runner((carry, inputs))
            return result
        key = tuple((tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves)
        if key not in self._in_place:
            self._in_place[key] = _InPlace(
                self._fn, self._variables, self._make_runner, carry, places
            )
        return self._in_place[key](carry, inputs)


class _InPlace:
    """A body whose carry is state in some places.

    Args:
        fn: The body.
        variables: All variables that it reads or assigns.
        make_runner: Makes a function run captured.
        carry: An example of the carry.
        places: Indices of its tensors that are state.
    """

    def __init__(
        self,
        fn: Callable[[Any, Any], tuple[Any, Any]],
        variables: Sequence[keras.Variable],
        make_runner: MakeRunner,
        carry: Any,
        places: Sequence[int],
    ) -> None:
        self._fn, self._places = fn, list(places)
        leaves = keras.tree.flatten(carry)
        self._structure = keras.tree.map_structure(lambda _: 0, carry)
        self._sums = [_variable_like(leaves[i]) for i in places]
        self._runner = make_runner(self._run, [*variables, *self._sums])

    def __call__(self, carry: Any, inputs: Any) -> tuple[Any, Any]:
        """Run the body."""
        leaves = keras.tree.flatten(carry)
        sums = [variable._value.detach() for variable in self._sums]
        given = [leaves[i] for i in self._places]
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(sums, given, strict=True)):
            torch._foreach_copy_(sums, given)
        rest, output = self._runner((self._without(leaves), inputs))
        return self._joined(rest, sums), output

    def _run(self, both: Any) -> tuple[list[Any], Any]:
        rest, inputs = both
        sums = [variable.value for variable in self._sums]
        carry, output = self._fn(self._joined(rest, sums), inputs)
        leaves = keras.tree.flatten(carry)
        for variable, i in zip(self._sums, self._places, strict=True):
            variable.assign(leaves[i])
        return self._without(leaves), output

    def _without(self, leaves: Sequence[Any]) -> list[Any]:
        return [leaf for i, leaf in enumerate(leaves) if i not in self._places]

    def _joined(self, rest: Sequence[Any], sums: Sequence[Any]) -> Any:
        others, own, inside = iter(rest), iter(sums), set(self._places)
        count = len(rest) + len(sums)
        leaves = [next(own) if i in inside else next(others) for i in range(count)]
        return keras.tree.pack_sequence_as(self._structure, leaves)


def _variable_like(tensor: torch.Tensor) -> keras.Variable:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    with keras.device(str(tensor.device).replace("cuda", "gpu")):
        variable = keras.Variable(
            torch.zeros_like(tensor), dtype=dtype, trainable=False, autocast=False, name="sum"
        )
    return variable
