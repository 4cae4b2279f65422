"""JAX: the devices of a run, and where its batches and its state lie on them.

A step is one program over whole batches: XLA divides it by the layouts of its inputs, so that the
numbers are those of one device. The mesh has the chosen devices of all processes. Between two calls
of a step a variable holds an array of this process alone, so that whatever a process computes
outside of a step, perhaps without the others, is a program of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_mesh: Mesh | None = None
"""The devices of the run, where it has several."""


def process_count() -> int:
    """The number of processes; asking does not start JAX's backend, after which none can join."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def local_devices(device: str | None) -> list[Any]:
    """The devices of this process with the names in ``device``; its default one for None."""
    return [jax.local_devices()[0]] if device is None else _all(device, jax.process_index())


def mesh_of(device: str | None) -> Mesh | None:
    """The mesh of the devices of these names in every process; None for a single device."""
    count = process_count()
    if device is None and count > 1:
        device = jax.devices()[0].platform
    found = [] if device is None else [x for rank in range(count) for x in _all(device, rank)]
    return Mesh(np.array(found), ("data",)) if len(found) > 1 else None


def local_mesh_of(device: str | None) -> Mesh | None:
    """The part of the mesh in this process; None for a single device."""
    found = local_devices(device)
    return Mesh(np.array(found), ("data",)) if len(found) > 1 else None


def _all(devices: str, rank: int) -> list[Any]:
    return [_find(name, rank) for name in devices.split(",")]


def _find(device: str, rank: int) -> Any:
    platform, _, index = device.partition(":")
    return jax.local_devices(rank, platform)[int(index or 0)]


@contextlib.contextmanager
def on_mesh_of(device: str | None) -> Iterator[None]:
    """Context in which batches and state are spread over the devices of these names."""
    global _mesh
    before = _mesh
    _mesh = mesh_of(device)
    try:
        yield
    finally:
        _mesh = before


def whole_on(mesh: Mesh) -> NamedSharding:
    """The layout of what each device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def replicated() -> NamedSharding | None:
    """The layout of state over several devices: whole on each of them. None with one device."""
    return None if _mesh is None else whole_on(_mesh)


# --- batches --------------------------------------------------------------------------------------


def put(tree: Any) -> Any:
    """Give each device its rows of the batches; all of them where the rows cannot be divided.

    Args:
        tree: The chunks of a block, or the batches of an evaluation, along a leading axis.
    """
    if _mesh is None:
        return jax.device_put(tree)
    mesh = _mesh

    def put(tree: Any, axis: int) -> Any:
        def one(x: np.ndarray) -> jax.Array:
            divides = x.ndim > axis and x.shape[axis] % mesh.size == 0
            names = [*[None] * axis, "data"] if divides else []
            layout = NamedSharding(mesh, PartitionSpec(*names))
            if _is_local(mesh):
                return jax.device_put(x, layout)
            return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])

        return jax.tree.map(one, tree)

    if isinstance(tree, list):  # the rows of stacked micro-batches are along the axis after them
        return [{kind: put(x, 1 + (kind == "stacked")) for kind, x in c.items()} for c in tree]
    return put(tree, 1)


def gathered(tree: Any) -> Any:
    """Batches as arrays of this process alone, for code that is not compiled.

    What it computes from them, each process computes for itself, and alike.
    """
    if _mesh is None or all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return tree
    return to_process(jax.jit(lambda tree: tree, out_shardings=whole_on(_mesh))(tree))


# --- state ----------------------------------------------------------------------------------------


def to_mesh(values: Sequence[Any]) -> list[Any]:
    """Arrays of the mesh from equal arrays of each process; the memory is the same."""
    if _mesh is None or _is_local(_mesh):
        return list(values)
    layout = whole_on(_mesh)
    own = [d for d in _mesh.devices.flat if d.process_index == jax.process_index()]
    make = jax.make_array_from_single_device_arrays

    def one(value: Any) -> jax.Array:
        if not value.is_fully_addressable:
            return value
        if len(own) > 1 or value.devices() != set(own):
            spread = jax.device_put(value, whole_on(Mesh(np.array(own), ("data",))))
            return make(value.shape, layout, [s.data for s in spread.addressable_shards])
        return make(value.shape, layout, [value])

    return [one(value) for value in values]


def to_process(tree: Any) -> Any:
    """The inverse of ``to_mesh``, for a structure of arrays."""
    if _mesh is None or _is_local(_mesh):
        return tree
    own = [d for d in _mesh.devices.flat if d.process_index == jax.process_index()]
    layout = whole_on(Mesh(np.array(own), ("data",))) if len(own) > 1 else None

    def one(value: jax.Array) -> jax.Array:
        if layout is None:
            return value.addressable_data(0)
        shards = [s.data for s in value.addressable_shards]
        return jax.make_array_from_single_device_arrays(value.shape, layout, shards)

    return jax.tree.map(one, tree)


def _is_local(mesh: Mesh) -> bool:
    return not mesh.is_multi_process
