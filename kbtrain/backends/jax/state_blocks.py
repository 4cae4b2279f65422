"""JAX: variables whose values are divided among the devices of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.experimental import multihost_utils

from kbtrain.utils.array_blocks import Block, OwnedBlocks, ReadBlock


def owned_blocks(variable: keras.Variable) -> OwnedBlocks | None:
    """The blocks of a variable that this process saves; None if its value is whole here."""
    value = variable.value
    if value.is_fully_addressable or value.is_fully_replicated:
        return None
    # Of the devices that hold a copy of a block, in whatever process, one has the replica 0.
    blocks = [
        Block(tuple(part.start or 0 for part in shard.index), shard.data)
        for shard in value.addressable_shards
        if shard.replica_id == 0
    ]
    return OwnedBlocks(tuple(value.shape), np.dtype(value.dtype), blocks)


def whole_value(variable: keras.Variable) -> np.ndarray:
    """The value of a variable on the host, whole even if no process has all of it."""
    value = variable.value
    if not (value.is_fully_addressable or value.is_fully_replicated):
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def spans_devices(variable: keras.Variable) -> bool:
    """Whether a variable's value is laid out over several devices, here or elsewhere."""
    return len(variable.value.sharding.device_set) > 1


def assign_blocks(variable: keras.Variable, read: ReadBlock) -> None:
    """Assign a variable and keep its layout; each process reads what its devices hold."""
    value = variable.value

    def block(index: tuple[slice, ...]) -> Any:
        parts = [part.indices(size) for part, size in zip(index, value.shape, strict=True)]
        return read(
            tuple(start for start, _, _ in parts), tuple(stop - start for start, stop, _ in parts)
        )

    variable.assign(jax.make_array_from_callback(value.shape, value.sharding, block))


def checksums(variables: Sequence[keras.Variable]) -> list[int | None]:
    """A number for each variable, the sum of its bits as integers; None for a divided one."""
    whole = [i for i, v in enumerate(variables) if v.value.is_fully_addressable]
    found: list[int | None] = [None] * len(variables)
    if whole:
        sums = _sums_of_bits([variables[i].value for i in whole])
        for i, value in zip(whole, np.asarray(sums).tolist(), strict=True):
            found[i] = value
    return found


@jax.jit  # type: ignore[untyped-decorator]
def _sums_of_bits(values: list[Any]) -> Any:
    def one(value: Any) -> Any:
        bits = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(value, bits).astype(jnp.uint32))

    return jnp.stack([one(value) for value in values])
