"""JAX: the devices of a run, and where its batches and its state lie on them.

A step is one program over whole batches: XLA divides it by the layouts of its inputs, so that the
numbers are those of one device. The mesh has the chosen devices of all processes. Between two calls
of a step a variable that is not divided holds an array of this process alone, so that whatever a
process computes outside of a step, perhaps without the others, is a program of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kbtrain.backends.jax import target
from kbtrain.backends.protocol import StateLayout
from kbtrain.errors import ConfigurationError
from kbtrain.utils.packages.keras_private import get_layout, set_layout


@dataclass(frozen=True)
class RunMesh:
    """The devices of a run, where it has several.

    Attributes:
        mesh: The devices.
        batch_axes: The axes along which batches are divided.
        layout: How state is divided; None: each device has all of it.
        from_keras: Whether state is divided as the layouts say that variables have already.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...] = ("data",)
    layout: StateLayout | None = None
    from_keras: bool = False

    @property
    def whole(self) -> NamedSharding:
        """The layout of what each device has all of."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def divides_state(self) -> bool:
        """Whether variables may be divided."""
        return self.from_keras or self.layout is not None

    @property
    def parts(self) -> int:
        """The number of parts of a batch."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.batch_axes]))

    @property
    def is_local(self) -> bool:
        """Whether all devices are of this process, or of none."""
        return target.devices() is not None or not self.mesh.is_multi_process

    @property
    def own(self) -> list[Any]:
        """The devices of this process."""
        rank = jax.process_index()
        return [device for device in self.mesh.devices.flat if device.process_index == rank]


_run: RunMesh | None = None


def current() -> RunMesh | None:
    """The devices of the run; None for a single one."""
    return _run


def process_count() -> int:
    """The number of processes; asking does not start JAX's backend, after which none can join."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def local_devices(device: str | None) -> list[Any]:
    """The devices of this process with the names in ``device``; its default one for None."""
    if device is None or target.devices() is not None:
        return [jax.local_devices()[0]]
    return _all(device, jax.process_index())


def _all(devices: str, rank: int) -> list[Any]:
    return [_find(name, rank) for name in devices.split(",")]


def _find(device: str, rank: int) -> Any:
    platform, _, index = device.partition(":")
    if (there := target.devices()) is not None:
        return there[int(index or 0)]
    return jax.local_devices(rank, platform)[int(index or 0)]


def local_mesh_of(device: str | None) -> Mesh | None:
    """The part of the mesh in this process; None for a single device."""
    found = local_devices(device)
    return Mesh(np.array(found), ("data",)) if len(found) > 1 else None


@contextlib.contextmanager
def on_mesh_of(device: str | None, layout: StateLayout | None) -> Iterator[None]:
    """Context in which batches and state are spread over the devices of these names.

    Args:
        device: Names of devices of each process.
        layout: How ``divide`` divides state; None: not at all.
    """
    global _run
    before = _run
    _run = _make(device, layout)
    try:
        yield
    finally:
        _run = before


def _make(device: str | None, layout: StateLayout | None) -> RunMesh | None:
    if (given := keras.distribution.distribution()) is not None:
        if device is not None or layout is not None:
            raise ConfigurationError(
                "A keras.distribution is in force, which has devices and layouts of its own. "
                "Remove devices, fsdp and parallelism_config from the arguments, or the "
                "distribution."
            )
        axis = given.batch_dim_name or given.device_mesh.axis_names[0]
        return RunMesh(given.device_mesh.backend_mesh, (axis,), from_keras=True)
    count = process_count()
    if device is None and count > 1:
        device = jax.devices()[0].platform
    found = [] if device is None else [x for rank in range(count) for x in _all(device, rank)]
    if len(found) < 2:
        return None
    if layout is None:
        return RunMesh(Mesh(np.array(found), ("data",)))
    shape = tuple(layout.sizes.values())
    mesh = Mesh(np.array(found).reshape(shape), tuple(layout.sizes))
    return RunMesh(mesh, ("data", "fsdp"), layout)


# --- batches --------------------------------------------------------------------------------------


def put(tree: Any) -> Any:
    """Give each device its rows of the batches; all of them where the rows cannot be divided.

    Args:
        tree: The chunks of a block, or the batches of an evaluation, along a leading axis.
    """
    if _run is None:
        if target.devices() is not None:
            return jax.tree.map(target.shape_of, tree)
        return jax.device_put(tree)
    run = _run

    def put(tree: Any, axis: int) -> Any:
        def one(x: np.ndarray) -> jax.Array:
            divides = x.ndim > axis and x.shape[axis] % run.parts == 0
            names = [*[None] * axis, run.batch_axes] if divides else []
            layout = NamedSharding(run.mesh, PartitionSpec(*names))
            if target.devices() is not None:
                return target.shape_of(x, layout)
            if run.is_local:
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
    if _run is None or all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return tree
    return to_process(jax.jit(lambda tree: tree, out_shardings=_run.whole)(tree))


def check_can_run_eagerly(variables: Sequence[keras.Variable]) -> None:
    """Check that a step can run without being compiled.

    Raises:
        ConfigurationError: Its state is divided among processes.
    """
    if any(not variable.value.is_fully_addressable for variable in variables):
        raise ConfigurationError(
            "A step whose state is divided among processes must be compiled. Remove "
            "jit_compile=False and what reads values of tensors in Python, or fsdp and "
            "parallelism_config."
        )


# --- state ----------------------------------------------------------------------------------------


def layouts_of(variables: Sequence[keras.Variable]) -> Any:
    """The layouts of state in a step: one for all, or a list; None with one device."""
    if _run is None:
        return None
    if not _run.divides_state:
        return _run.whole
    return [layout_of(variable) or _run.whole for variable in variables]


def layout_of(variable: keras.Variable) -> NamedSharding | None:
    """The layout of a variable that is divided in this run; None for any other."""
    layout = None if _run is None or not _run.divides_state else get_layout(variable)
    return None if layout is None or layout.is_fully_replicated else layout


def gathered_weight(variable: keras.Variable, value: Any) -> Any:
    """A weight as a layer uses it: whole along the axis that batches are divided along.

    Left to itself XLA may move activations instead, which are larger. The gradient is divided as
    soon as it is there: each device adds up its own part, in the dtype that the layer computes in.
    """
    layout = layout_of(variable)
    if layout is None or _run is None or _run.layout is None or "fsdp" not in layout.spec:
        return value
    return _gather(value, layout)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(value: jax.Array, layout: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, _without_fsdp(layout))


def _without_fsdp(layout: NamedSharding) -> NamedSharding:
    axes = [None if axis == "fsdp" else axis for axis in layout.spec]
    return NamedSharding(layout.mesh, PartitionSpec(*axes))


def _gather_forward(value: jax.Array, layout: NamedSharding) -> tuple[jax.Array, None]:
    return _gather(value, layout), None


def _gather_backward(layout: NamedSharding, residuals: None, gradient: Any) -> tuple[Any]:
    if layout.mesh.devices.flat[0].platform == "tpu":
        # Asked for its part of a sum alone, XLA gathers the activations of all devices there.
        gradient = jax.lax.with_sharding_constraint(gradient, _without_fsdp(layout))
    return (jax.lax.with_sharding_constraint(gradient, layout),)


_gather.defvjp(_gather_forward, _gather_backward)


def divided_gradient(variable: keras.Variable, gradient: Any) -> Any:
    """A gradient that is divided as its variable is."""
    layout = layout_of(variable)
    return gradient if layout is None else jax.lax.with_sharding_constraint(gradient, layout)


def divide(variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    """Divide variables among the devices of the run; return those that are not divided."""
    run = _run
    if run is None or not run.divides_state:
        for variable in variables:
            if (former := get_layout(variable)) is not None and not former.is_fully_replicated:
                set_layout(variable, None)  # of a former run
                if target.devices() is None:
                    variable.assign(np.array(variable.value))
        return list(variables)
    if run.layout is not None:
        for variable, axes in zip(variables, run.layout.axes_of(variables), strict=True):
            divided = any(axis is not None for axis in axes)
            layout = NamedSharding(run.mesh, PartitionSpec(*axes)) if divided else None
            set_layout(variable, layout if divided else None)
    rest = []
    for variable in variables:
        if (layout := layout_of(variable)) is None:
            rest.append(variable)
        elif target.devices() is None and variable.value.sharding != layout:
            variable.assign(_divided(variable.value, layout, run))
    return rest


def _divided(value: Any, layout: NamedSharding, run: RunMesh) -> Any:
    if run.is_local or not value.is_fully_addressable:
        return jax.device_put(value, layout)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, layout, lambda index: host[index])


@contextlib.contextmanager
def initializing() -> Iterator[None]:
    """Context in which new variables are divided from the start: never whole on one device."""
    if _run is None or _run.layout is None:
        yield
        return
    mesh = keras.distribution.DeviceMesh(
        tuple(_run.mesh.shape.values()), list(_run.mesh.axis_names), _run.mesh.devices
    )
    with _ByRule(mesh, _run.layout).scope():
        yield


class _ByRule(keras.distribution.ModelParallel):  # type: ignore[misc]
    """Layouts from the rules of a ``StateLayout``."""

    def __init__(self, mesh: keras.distribution.DeviceMesh, layout: StateLayout) -> None:
        super().__init__(layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="data")
        self._rules = layout

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        """The layout of a new variable; None for one that is whole on each device."""
        axes = self._rules.axes_of([variable])[0]
        if all(axis is None for axis in axes):
            return None
        return keras.distribution.TensorLayout(axes, self.device_mesh)


def to_mesh(values: Sequence[Any]) -> list[Any]:
    """Arrays of the mesh from equal arrays of each process; the memory is the same."""
    if target.devices() is not None:
        return [target.shape_of(value) for value in values]
    if _run is None or _run.is_local:
        return list(values)
    whole, own = _run.whole, _run.own
    make = jax.make_array_from_single_device_arrays

    def one(value: Any) -> jax.Array:
        if not value.is_fully_addressable:
            return value
        if len(own) > 1 or value.devices() != set(own):
            spread = jax.device_put(value, NamedSharding(Mesh(np.array(own), "x"), PartitionSpec()))
            return make(value.shape, whole, [s.data for s in spread.addressable_shards])
        return make(value.shape, whole, [value])

    return [one(value) for value in values]


def to_process(tree: Any) -> Any:
    """The inverse of ``to_mesh``, for a structure of arrays. Divided ones stay as they are."""
    if _run is None or _run.is_local:
        return tree
    own = _run.own
    layout = NamedSharding(Mesh(np.array(own), "x"), PartitionSpec()) if len(own) > 1 else None

    def one(value: jax.Array) -> jax.Array:
        if not value.is_fully_replicated:
            return value
        if layout is None:
            return value.addressable_data(0)
        shards = [s.data for s in value.addressable_shards]
        return jax.make_array_from_single_device_arrays(value.shape, layout, shards)

    return jax.tree.map(one, tree)
