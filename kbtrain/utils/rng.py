"""Saves and restores every source of randomness of a run, as arrays and JSON."""

from __future__ import annotations

import contextlib
import numbers
import random
from collections.abc import Iterator
from typing import Any, Protocol

import keras
import numpy as np

from kbtrain.errors import ConfigurationError
from kbtrain.utils.packages import tensorflow_import
from kbtrain.utils.packages.keras_private import global_seed_generator

MAX_SEED = 2**32 - 1  # the limit of the seeding functions of NumPy and Keras


class RandomStates(Protocol):
    """The part of a backend used here; see ``kbtrain.backends.protocol``."""

    name: str

    def rng_state(self) -> dict[str, np.ndarray]:
        """The framework's own random state."""

    def set_rng_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore it."""


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy, the backend, Keras' global generator, and TensorFlow if it is imported.

    A program that has not imported TensorFlow draws nothing from it. The Trainer calls this with
    ``args.seed`` when it is created; call it before you create the model, so that the initial
    weights depend on the seed too.

    Args:
        seed: From 0 to 2**32 - 1.
        deterministic: Not supported here: see ``full_determinism`` of ``TrainingArguments``.

    Raises:
        ConfigurationError: The seed is not a valid one, or ``deterministic`` is True.

    Example:
        >>> set_seed(42)
    """
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= seed <= MAX_SEED:
        raise ConfigurationError(
            f"seed must be a whole number of at least 0 and at most {MAX_SEED}. Received: {seed!r}"
        )
    seed = int(seed)
    if deterministic:
        raise ConfigurationError(
            "set_seed only sets seeds. Received: deterministic=True. For deterministic kernels "
            "write TrainingArguments(full_determinism=True)."
        )
    with tensorflow_import.not_imported():
        keras.utils.set_random_seed(seed)


def global_generator() -> Any:
    """The generator that Keras draws from where a layer or operation has no seed.

    On JAX it is not available while a function is traced; there its state is handled like that of
    any other variable.
    """
    return global_seed_generator()


def global_seed_variable() -> keras.Variable:
    """State of the generator that Keras draws from where a layer or operation has no seed."""
    return global_seed_generator().state


def capture_random_state(backend: RandomStates) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Random state outside the model: ``(arrays, JSON document)``."""
    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    arrays = {f"backend/{name}": value for name, value in backend.rng_state().items()}
    arrays["numpy"] = np.asarray(keys)
    arrays["python"] = np.asarray(internal, dtype=np.uint64)
    arrays["keras"] = keras.ops.convert_to_numpy(global_seed_variable().value)
    document = {
        "backend": backend.name,
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "algorithm": algorithm,
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    return arrays, document


def restore_random_state(
    backend: RandomStates, arrays: dict[str, np.ndarray], document: dict[str, Any]
) -> None:
    """Inverse of ``capture_random_state``; another backend's generators are left unchanged."""
    # First, because Keras creates its generator on demand and seeds it from Python's generator.
    variable = global_seed_variable()
    internal = tuple(int(x) for x in arrays["python"])
    gauss = document["python"]["gauss"]  # setstate would not validate it
    gauss = None if gauss is None else float(gauss)
    random.setstate((document["python"]["version"], internal, gauss))
    state = document["numpy"]
    np.random.set_state(
        (
            state["algorithm"],
            arrays["numpy"],
            state["position"],
            state["has_gauss"],
            state["cached"],
        )
    )
    variable.assign(arrays["keras"].astype(variable.dtype))
    if document["backend"] == backend.name:
        prefix = "backend/"
        backend.set_rng_state(
            {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        )


@contextlib.contextmanager
def random_state_kept(backend: RandomStates) -> Iterator[None]:
    """Context after which every source of randomness is as before it."""
    state = capture_random_state(backend)
    try:
        yield
    finally:
        restore_random_state(backend, *state)
