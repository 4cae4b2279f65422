"""How an update rule is executed on the running backend.

One module per backend, the same names in each:

- ``no_gradient()``: a context in which nothing is recorded for differentiation.
- ``colocated(variable)``: a context that creates variables where ``variable`` lives.
- ``outside_of_tracing()``: a context in which variables can be read on the host, if they exist.
- ``dense_gradient(gradient, variable, as_it_is)``: the gradient as a dense tensor, float32 or, for
  a variable in float64, float64; with ``as_it_is`` it may have its own dtype, if ``execute`` is the
  next to read it.
- ``next_step(iterations, dtype)``: the number of the update, 1 at the first, in a float dtype.
- ``execute(optimizer, gradients, variables, step, learning_rate)``: runs the optimizer's rule over
  all variables and assigns the results.
- ``refresh(due, compute, operand, current)``: ``compute(operand, current)`` where the boolean
  scalar ``due`` is true, else ``current``, and only one of the two is executed; ``compute`` is a
  function of a module, whose result has the shape of ``current``.
- ``take(table, indices)``: elements of a vector, at int32 indices that are all in its range.
- ``squared_norm(x)``: the sum of the squares of all elements of a float32 tensor.
- ``mean_product(x, y)``: the mean of the products of the elements of two float32 tensors.
- ``singular_vectors(matrix)``: those on the smaller side of a float32 matrix, as columns, in the
  order of decreasing singular values.
- ``matrix_dtype(x)``: what rules that bear it multiply matrices like ``x`` in: ``"bfloat16"`` on
  a GPU or TPU with units for it, else ``"float32"``.
- ``FUSED``: name of a rule -> an equivalent that updates lists of tensors in place. Given
  ``(optimizer, parameters, gradients, slots, step, learning_rate, weight_decay)``, all of them
  float32 and the slots a dict of lists.

This is the only file of the package that asks which backend is running, and it imports that one
alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import keras

_BACKENDS = ("torch", "tensorflow", "jax")


def _running_backend() -> Any:
    name = keras.backend.backend()
    if name not in _BACKENDS:
        raise ValueError(
            f"optim runs on the Keras backends {', '.join(_BACKENDS)}. Set KERAS_BACKEND to one of "
            f"them before Keras is imported. Received: keras.backend.backend()={name!r}"
        )
    return importlib.import_module(f"optim.kernels.{name}")


backend = _running_backend()
"""The kernel module of the running backend."""
