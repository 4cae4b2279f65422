"""JAX: a function traced once, for use in a loop, with convolutions that are fast there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from kbtrain.backends.jax.device import is_oom
from kbtrain.utils.fallback import PrivateApi


def trace(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
    """Run ``fn(*args)`` on shapes, once.

    Args:
        fn: Function of structures of arrays.
        *args: Arguments, or ``jax.ShapeDtypeStruct`` in place of arrays.

    Returns:
        A function that does the same for all arguments of these shapes without running ``fn``
        again, and the shapes of its result.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)
    flat: Any = None

    def as_traced(*args: Any) -> Any:
        from kbtrain.backends.jax import conv_layout

        nonlocal flat
        if flat is None:
            flat = conv_layout.as_function(closed, on_cpu())
        return jax.tree.unflatten(structure, flat(*jax.tree.leaves(args)))

    run = PrivateApi(
        "Taking a traced function apart (for fast convolutions in loops)",
        "jax",
        as_traced,
        fn,
        "Steps with convolutions take longer on a CPU.",
        passes=is_oom,
    )
    return run, shapes


def on_cpu() -> bool:
    """Whether the current trace will run on a CPU."""
    return _platform() == "cpu"


def on_gpu() -> bool:
    """Whether the current trace will run on a GPU."""
    return _platform() in ("gpu", "cuda", "rocm")


def _platform() -> str:
    chosen = jax.config.jax_default_device
    platform = jax.default_backend() if chosen is None else getattr(chosen, "platform", chosen)
    return str(platform).partition(":")[0]
