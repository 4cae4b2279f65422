"""JAX: the devices that a step is compiled for and not run on, which need not be there.

While there is a target, arrays for its devices are shapes, nothing is moved, and the first step
that would be compiled ends the attempt: ``StepFound`` has it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import SingleDeviceSharding

from kbtrain.errors import ConfigurationError

_devices: list[Any] | None = None


class StepFound(Exception):
    """A step that would be compiled now.

    Attributes:
        jitted: The jitted function, of its state and its inputs.
        state: The variables of the state, and the layout of each; None: as its only device has it.
        arguments: Its arguments, as shapes on the devices of the target.
    """

    def __init__(
        self, jitted: Any, state: Sequence[tuple[keras.Variable, Any]], arguments: Sequence[Any]
    ) -> None:
        super().__init__("a step would be compiled")
        self.jitted, self.state, self.arguments = jitted, state, arguments


def devices() -> list[Any] | None:
    """The devices of the target; None if steps are for running."""
    return _devices


@contextlib.contextmanager
def compiling_for(devices: list[Any]) -> Iterator[None]:
    """Context in which steps are compiled for these devices, all of one kind."""
    global _devices
    before, _devices = _devices, devices
    try:
        # What differs between processors asks for the default device while it is traced.
        with jax.default_device(devices[0]):
            yield
    finally:
        _devices = before


CUDNN = 91000
"""The version of cuDNN that GPUs are taken to have; the description for XLA says the same."""


@dataclass
class Attention:
    """What Keras asks about the device where a model has attention.

    Attributes:
        asked: Whether it asked for cuDNN: there is attention that could be its kernel.
        answered: Whether the answer was that of the target. If not, JAX has moved the question,
            and the answer was that of this machine.
    """

    asked: bool = False
    answered: bool = True


@contextlib.contextmanager
def attention_on(capability: tuple[int, int] | None) -> Iterator[Attention]:
    """Context in which Keras and JAX are told of the target's cuDNN, not of this machine's.

    Args:
        capability: The compute capability of the GPU; None: there is no cuDNN.
    """
    found = Attention()

    def version() -> int:
        found.asked = True
        if capability is None:
            raise RuntimeError("cuDNN is not there.")
        return CUDNN

    def number(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    answers = {
        "check_cudnn_version": version,
        "check_compute_capability": lambda least: (capability or (0, 0)) >= number(least),
        "is_cuda_compute_capability_equal": lambda one: capability == number(one),
    }
    try:
        module: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        before = {name: getattr(module, name) for name in answers}
    except (ImportError, AttributeError):  # no public part of JAX
        module, before, found.answered = object(), {}, False
    try:
        for name in before:
            setattr(module, name, answers[name])
        yield found
    finally:
        for name, answer in before.items():
            setattr(module, name, answer)


def shape_of(x: Any, layout: Any = None) -> Any:
    """The shape of an array for the target's devices.

    Args:
        x: An array, a number, or a shape, which keeps its layout.
        layout: Its layout; None: that of the only device, or as the step says.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if layout is None and _devices is not None and len(_devices) == 1:
        layout = SingleDeviceSharding(_devices[0])
    dtype = jax.dtypes.canonicalize_dtype(x.dtype if hasattr(x, "dtype") else np.result_type(x))
    return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=layout)


def found(
    jitted: Any, variables: Sequence[keras.Variable], layouts: Any, arguments: Sequence[Any]
) -> None:
    """Tell of a step that would be compiled; do nothing if steps are for running.

    Args:
        jitted: The jitted function.
        variables: Its state.
        layouts: One layout for all variables, or a list; None with one device.
        arguments: Its arguments, of the state first.

    Raises:
        StepFound: There is a target.
    """
    if _devices is None:
        return
    each = layouts if isinstance(layouts, list) else [layouts] * len(variables)
    raise StepFound(
        jitted,
        list(zip(variables, each, strict=True)),
        [jax.tree.map(shape_of, argument) for argument in arguments],
    )


def check_runs() -> None:
    """Check that a step which is not compiled may run.

    Raises:
        ConfigurationError: There is a target: nothing can run on its devices.
    """
    if _devices is not None:
        raise ConfigurationError(
            "This step runs in Python, without being compiled, so that nothing is known of it in "
            "advance: jit_compile=False, run_eagerly=True, or code that takes a tensor for a "
            "number (a warning names the line). Remove the setting, or use keras.ops.where and "
            "keras.ops.cond."
        )
