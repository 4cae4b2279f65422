"""JAX: the first step of a run, compiled for devices that need not be there.

XLA compiles for a TPU where ``libtpu`` is installed, and for a GPU with the plugin of CUDA; neither
needs the device, or its driver. For a CPU it needs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies

from kbtrain.backends.jax import target
from kbtrain.backends.jax.flops import flops_of_jaxpr
from kbtrain.backends.jax.hlo import Program, UnknownGroupsError
from kbtrain.backends.step_program import CompilerTarget, StepProgram
from kbtrain.errors import ConfigurationError, OutOfMemoryError, first_lines

# How machine code is optimized changes neither memory nor operations, and takes half of the time.
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"xla_backend_optimization_level": 0},
    # Without a GPU no kernel can be tried out.
    "cuda": {"xla_backend_optimization_level": 0, "xla_gpu_autotune_level": 0},
}

LEAST_CAPABILITY = (8, 0)
"""Keras computes attention with cuDNN's kernel on GPUs from this one on, in half precision."""

GRIDS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}
"""The number of dimensions in which the chips of a kind of TPU are connected."""

PACKAGES = {
    "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"),
    "tpu": ("libtpu",),
}
"""What XLA's compiler for a platform is in, any of them."""


def compile_step_for(
    run: Callable[[], Any], kind: CompilerTarget | None, count: int
) -> StepProgram:
    """Compile the first step that ``run`` would compile; see the protocol of backends."""
    capability = None if kind is None else kind.compute_capability
    if capability is not None and capability >= LEAST_CAPABILITY:
        try:
            return _compile(run, kind, count, capability)
        except _NotWithCudnn as error:
            said = str(error)
        return dataclasses.replace(_compile(run, kind, count, None), attention=f"refused: {said}")
    return _compile(run, kind, count, None)


class _NotWithCudnn(Exception):
    """XLA cannot compile a step with cuDNN's attention here."""


def _compile(
    run: Callable[[], Any], kind: CompilerTarget | None, count: int, cudnn: tuple[int, int] | None
) -> StepProgram:
    """Compile the step, with cuDNN for a GPU of that compute capability, or without it."""
    with (
        target.compiling_for(devices_of(kind, count)),
        target.attention_on(cudnn) as attention,
    ):
        try:
            jax.eval_shape(run)
        except target.StepFound as found:
            step = found
        else:
            raise ConfigurationError("Nothing was compiled: the run ended before its first update.")
        platform = "cpu" if kind is None else kind.platform
        traced = step.jitted.trace(*step.arguments)
        try:
            compiled = traced.lower().compile(compiler_options=OPTIONS.get(platform))
        except jax.errors.JaxRuntimeError as error:
            said = _in_words(error, kind)
            if cudnn and attention.asked and not isinstance(said, OutOfMemoryError):
                raise _NotWithCudnn(first_lines(error, 1)) from error
            raise said from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = Program(text, count)
    sent, unknown = _sent(program)
    scores = "scores" if attention.asked else ""
    values, *inputs = step.arguments
    return StepProgram(
        platform=platform,
        state=[
            (variable, _bytes(value, layout))
            for (variable, layout), value in zip(step.state, values, strict=True)
        ],
        batch_bytes=sum(_bytes(x, x.sharding) for x in jax.tree.leaves(inputs)),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        flops=flops_of_jaxpr(traced.jaxpr) / count,
        bytes_accessed=program.bytes_accessed(),
        collectives=sent,
        unknown_collectives=unknown,
        sent_over=(lambda machine: (0.0, 0.0)) if unknown else program.sent_over,
        attention=(
            "unknown" if not attention.answered else "cudnn" if "__cudnn$fmha" in text else scores
        ),
        text=text,
    )


def _sent(program: Program) -> tuple[dict[str, tuple[int, int]], str]:
    """What devices send to each other, and what is not known of it."""
    try:
        return program.sent(), ""
    except UnknownGroupsError as error:
        return {}, str(error)


def _bytes(x: Any, layout: Any) -> int:
    """The bytes of an array on one device."""
    shape = x.shape if layout is None else layout.shard_shape(x.shape)
    return int(math.prod(shape) * x.dtype.itemsize)


def _in_words(error: Exception, kind: CompilerTarget | None) -> Exception:
    """What the compiler says, as an error of ours."""
    name = "this processor" if kind is None else kind.name
    said = first_lines(error)
    if "RESOURCE_EXHAUSTED" in said or "Ran out of memory" in said:
        return OutOfMemoryError(
            f"XLA compiled the step for {name} and found that it does not fit: {said}"
        )
    return ConfigurationError(f"XLA cannot compile the step for {name}: {said}")


# --- devices --------------------------------------------------------------------------------------


def has_compiler_for(platform: str) -> bool:
    """Whether programs for "cuda" or "tpu" can be compiled here."""
    return any(importlib.util.find_spec(name) is not None for name in PACKAGES[platform])


@functools.lru_cache(maxsize=16)
def devices_of(kind: CompilerTarget | None, count: int) -> list[Any]:
    """Devices to compile for, which need not be there.

    Args:
        kind: Their kind; None for CPUs.
        count: Their number.

    Raises:
        ConfigurationError: There is no compiler for them, or no machine of so many.
    """
    if kind is None:
        return _processors(count)
    if not has_compiler_for(kind.platform):
        extra = "plan-gpu" if kind.platform == "cuda" else "plan-tpu"
        raise ConfigurationError(
            f"There is no compiler for {kind.name} here. Install it: pip install "
            f"'kbtrain[{extra}]'. It needs neither the device nor its driver."
        )
    if kind.platform == "cuda":
        hosts = max(1, math.ceil(count / kind.per_host))
        if count % hosts:
            raise ConfigurationError(
                f"Machines of {kind.name} have {kind.per_host} devices each. Received: "
                f"count={count}."
            )
        options = {"target_config": kind.config, "topology": f"{hosts}x1x{count // hosts}"}
        return _topology("cuda", f"{kind.name}:{count}", kind, **options)
    family = kind.topology
    grid = grid_of(family, count)
    name = f"{family}:{'x'.join(map(str, grid))}"
    # A host has four chips at least, unless told otherwise.
    one = {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1} if count == 1 else {}
    # There is no machine to ask for its place, and no device to share.
    with _environment(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"):
        return _topology("tpu", name, kind, **one)


@contextlib.contextmanager
def _environment(**defaults: str) -> Iterator[None]:
    """Context with environment variables that are set if the user has not set them."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _topology(platform: str, name: str, kind: CompilerTarget, **options: Any) -> list[Any]:
    try:
        return list(
            topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
        )
    except Exception as error:
        raise ConfigurationError(
            f"XLA knows no machine {name} of {kind.name}: {first_lines(error)}"
        ) from error


def grid_of(family: str, count: int) -> tuple[int, ...]:
    """The grid of a number of TPU chips, as near to a square or a cube as can be.

    Raises:
        ConfigurationError: There are no grids of so many.
    """
    dimensions = GRIDS.get(family, 2)
    if count < 1 or count & (count - 1):
        raise ConfigurationError(
            f"Grids of {family} have a power of two chips. Received: count={count}."
        )
    power = count.bit_length() - 1
    sizes = [1 << (power // dimensions + (i < power % dimensions)) for i in range(dimensions)]
    return tuple(sorted(sizes))


def _processors(count: int) -> list[Any]:
    there = jax.local_devices(backend="cpu")
    return there[:count] if count <= len(there) else _pretended(count)


def _pretended(count: int) -> list[Any]:
    """So many devices of this one processor, that programs can be compiled for."""
    try:
        client: Any = importlib.import_module("jaxlib.xla_client")
        return list(client.make_cpu_client(num_devices=count).local_devices())
    except Exception as error:  # not a public function of JAX
        raise ConfigurationError(
            f"A program for {count} devices cannot be compiled here ({first_lines(error, 1)}). "
            "Start Python with the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        ) from error
