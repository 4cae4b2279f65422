"""Evaluation with generated outputs: ``model.generate`` in place of a call of the model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from kbtrain.backends.protocol import Backend
from kbtrain.backends.rows import span
from kbtrain.checkpoint import run_state
from kbtrain.config.converters import thaw
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import map_structure
from kbtrain.distributed import host
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.evaluation.gather import PADDING, Rows
from kbtrain.utils.machine.processes import current


def check_generates(model: keras.Model, args: TrainingArguments) -> None:
    """Check that ``model`` can generate with the options of ``args``.

    Raises:
        ConfigurationError: It has no ``generate``, or the method does not take an option.
    """
    kind = type(model).__name__
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise ConfigurationError(
            "predict_with_generate=True needs a model with a method generate(inputs, "
            f"max_length=...), such as KerasHub's causal language models. Received: {kind}, which "
            "has none."
        )
    try:
        parameters = inspect.signature(generate).parameters
    except (TypeError, ValueError):  # no signature, as for compiled code: the call will raise
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := [name for name in options(args) if name not in parameters]:
        raise ConfigurationError(
            f"{kind}.generate does not take {', '.join(unknown)}. It has: {', '.join(parameters)}. "
            "Change generation_kwargs or generation_max_length, or leave them out. "
            f"Received: {options(args)}."
        )


def options(args: TrainingArguments) -> dict[str, Any]:
    """The keyword arguments of ``generate``."""
    found: dict[str, Any] = thaw(args.generation_kwargs)
    if args.generation_max_length is not None:
        found["max_length"] = args.generation_max_length
    return found


def make_generator(
    model: keras.Model, backend: Backend, args: TrainingArguments
) -> Callable[[Any], Any]:
    """``generate(x) -> outputs`` for the inputs of a batch, both structures of NumPy arrays.

    Sequences of different lengths in one batch are padded with ``PADDING``. Several processes share
    the rows of a batch, so sampled (not greedy) outputs depend on their number. The state of the
    model's seed generators is restored afterwards, so that evaluations do not affect training.

    Raises:
        DataError: (when called) The model did not return one row per sample.
    """
    given = options(args)
    seeds = [v for v in model.non_trainable_variables if v.name == "seed_generator_state"]

    def generate_rows(x: Any) -> Any:
        with backend.inference(), _put_back(seeds):
            generated = model.generate(x, **given)
            rows = _rows(generated, backend)
        expected = len(keras.tree.flatten(x)[0])
        for array in keras.tree.flatten(rows):
            if array.shape[:1] != (expected,):
                raise DataError(
                    f"{type(model).__name__}.generate must return one row for each of the "
                    f"{expected} samples of a batch. Received: an array of shape {array.shape}."
                )
        return rows

    return generate_rows if current().size == 1 else _shared(generate_rows, backend)


def _shared(generate: Callable[[Any], Any], backend: Backend) -> Callable[[Any], Any]:
    """Each process generates for its rows of a batch, and gets the others' from them."""
    group = current()

    def of_all(x: Any) -> Any:
        total = len(keras.tree.flatten(x)[0])
        start, stop = span(total, group.rank, group.size)
        mine = generate(map_structure(lambda a: a[start : max(stop, start + 1)], x))
        leaves = []
        for array in keras.tree.flatten(mine):
            rows = Rows(total)
            for part in host.gather_arrays(backend, array[: stop - start]):
                if len(part):
                    rows.add(part)
            leaves.append(rows.result())
        return keras.tree.pack_sequence_as(mine, leaves)

    return of_all


@contextlib.contextmanager
def _put_back(variables: list[keras.Variable]) -> Iterator[None]:
    before = run_state.host_copies(variables)
    try:
        yield
    finally:
        run_state.restore_values(variables, before)


def _rows(generated: Any, backend: Backend) -> Any:
    """The result of ``generate`` as NumPy arrays."""
    if isinstance(generated, dict):
        return {name: _rows(value, backend) for name, value in generated.items()}
    if isinstance(generated, tuple):
        return tuple(_rows(value, backend) for value in generated)
    if isinstance(generated, list):
        return _filled(generated, backend)
    return _array(generated, backend)


def _filled(rows: list[Any], backend: Backend) -> np.ndarray:
    """Convert a list with one row per sample (list of numbers, tensor or string) to an array."""
    arrays = [_array(row, backend) for row in rows]
    if len({array.shape for array in arrays}) <= 1:
        return np.array(arrays)
    if any(array.ndim != 1 or array.dtype.kind not in "if" for array in arrays):
        shapes = [array.shape for array in arrays]
        raise DataError(f"generate returned sequences that cannot be concatenated: {shapes}.")
    filled = np.full((len(arrays), max(map(len, arrays))), PADDING, np.result_type(*arrays))
    for row, array in zip(filled, arrays, strict=True):
        row[: len(array)] = array
    return filled


def _array(value: Any, backend: Backend) -> np.ndarray:
    if keras.ops.is_tensor(value):
        value = backend.to_host(value)
    return np.asarray(value)
