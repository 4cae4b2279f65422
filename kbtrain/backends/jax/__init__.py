"""JAX: the step becomes a pure function of the variables' values, jitted with donated state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

# The rest of what a backend has, see kbtrain.backends.
from kbtrain.backends.jax.ahead_of_time import compile_step_for, has_compiler_for  # noqa: F401
from kbtrain.backends.jax.compile import (  # noqa: F401
    compile_eval_steps,
    compile_model_steps,
    compile_step,
    compile_steps,
)
from kbtrain.backends.jax.device import (  # noqa: F401
    compiler_options,
    cuda_graphs,
    device_info,
    device_scope,
    devices,
    free_memory,
    host_view,
    is_oom,
    memory_stats,
    numerics,
    place,
    prepare,
    ragged,
    rng_state,
    set_rng_state,
    start_to_host,
    synchronize,
    to_device,
    to_host,
)
from kbtrain.backends.jax.flops import count_flops, tf32_is_on  # noqa: F401
from kbtrain.backends.jax.mesh import (  # noqa: F401
    divided_gradient,
    initializing,
)
from kbtrain.backends.jax.model_steps import (  # noqa: F401
    check_signature,
    reversible,
    run_predict_step,
    run_test_step,
    run_train_step,
    try_train_step,
)
from kbtrain.backends.jax.processes import (  # noqa: F401
    all_gather,
    all_sum,
    copy_from_first,
    exchange,
    exchange_settings,
    gather_from_owners,
    joined_processes,
    local_rows,
    shards,
    start_processes,
    stop_processes,
    sum_to_owners,
)
from kbtrain.backends.jax.profiler import start_profile  # noqa: F401
from kbtrain.backends.jax.scope import Scope, context, held_value, run_stateless
from kbtrain.backends.jax.state_blocks import (  # noqa: F401
    assign_blocks,
    checksums,
    owned_blocks,
    spans_devices,
    whole_value,
)
from kbtrain.backends.jax.trace import on_cpu, trace
from kbtrain.backends.scopes import is_overwritten
from kbtrain.backends.state_blocks import check_model  # noqa: F401
from kbtrain.utils.packages.keras_private import read_values, stateless_scope

TAKES_STRINGS = False
"""Whether tensors can hold strings."""

HAS_MESHES = True
"""Whether one process can train on several devices."""

COMPILES_AHEAD = True
"""Whether steps can be compiled for devices that are not here."""

name = "jax"


def value_and_grad(
    fn: Callable[..., tuple[Any, Any]], variables: Sequence[keras.Variable], *args: Any
) -> tuple[Any, Any, list[Any], list[tuple[keras.Variable, Any]]]:
    """Differentiate ``fn(*args) -> (scalar, aux)`` with respect to ``variables``.

    Returns:
        ``(value, aux, gradients, updates)``: updates are the ``(variable, new value)`` pairs that
        the layers requested (moving statistics, seed states); nothing has been assigned yet.
    """
    positions = {id(v): i for i, v in enumerate(context.state)}
    indices = [positions[id(v)] for v in variables]
    outside = [v.value for v in context.state]
    changed_indices: list[int] = []

    def pure(values: list[Any]) -> tuple[Any, Any]:
        inside = list(outside)
        for index, value in zip(indices, values, strict=True):
            inside[index] = value
        (value, aux), changed = run_stateless(lambda: fn(*args), inside, of_loss=True)
        changed_indices[:] = changed
        return value, (aux, list(changed.values()))

    (value, (aux, new)), gradients = jax.value_and_grad(pure, has_aux=True)(
        [outside[i] for i in indices]
    )
    gradients = [divided_gradient(v, g) for v, g in zip(variables, gradients, strict=True)]
    updates = [(context.state[i], v) for i, v in zip(changed_indices, new, strict=True)]
    return value, aux, gradients, updates


def dropping() -> keras.StatelessScope:
    """A scope that discards assignments and collects the losses of layers."""
    return Scope([(v, v.value) for v in context.state], collect_losses=True)


def recompute(
    fn: Callable[[Sequence[Any]], list[Any]],
    tensors: Sequence[Any],
    variables: Sequence[keras.Variable],
) -> list[Any]:
    """Run ``fn(tensors) -> list of tensors``, recomputing it in the backward pass.

    Args:
        fn: May read and assign variables; both runs see the same values.
        tensors: All other inputs of ``fn``.
        variables: The variables that it reads or assigns (unused here).
    """
    if not context.state:  # no gradients outside a step
        return fn(tensors)
    scope = stateless_scope()
    held = [held_value(scope, v) for v in context.state]
    own = read_values(context.state)
    before = [v if x is None else x for v, x in zip(own, held, strict=True)]
    changed_indices: list[int] = []

    def pure(values: list[Any], tensors: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs, changed = run_stateless(lambda: fn(tensors), values, of_loss=True)
        changed_indices[:] = changed
        return outputs, list(changed.values())

    outputs, new = jax.checkpoint(pure)(before, list(tensors))
    for index, value in zip(changed_indices, new, strict=True):
        context.state[index].assign(value)
    result: list[Any] = outputs
    return result


def scan(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``carry, output = fn(carry, x)`` for each x along the leading axis of ``inputs``.

    ``fn`` may assign variables. Returns the last carry and the outputs along a new leading axis.
    """

    def body(loop: tuple[Any, list[Any]], x: Any) -> tuple[tuple[Any, list[Any]], Any]:
        carry, values = loop
        (carry, output), changed = run_stateless(lambda: fn(carry, x), values)
        return (carry, [changed.get(i, value) for i, value in enumerate(values)]), output

    before = [v.value for v in context.state]
    leaves = jax.tree.leaves((inputs, carry, before))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):  # an eager step
        outputs = []
        for i in range(leaves[0].shape[0]):
            carry, output = fn(carry, jax.tree.map(lambda x, i=i: x[i], inputs))
            outputs.append(output)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)

    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    run, _ = trace(body, (carry, before), row)
    (carry, after), outputs = jax.lax.scan(run, (carry, before), inputs)
    for variable, value in zip(context.state, after, strict=True):
        variable.assign(value)
    return carry, outputs


def accept_numbers(cls: type) -> None:
    """Make JAX's functions accept objects of a class as their ``value``."""
    jax.tree_util.register_pytree_node(
        cls, lambda number: ((number.value,), None), lambda _, children: children[0]
    )


def is_symbolic(variable: keras.Variable) -> bool:
    """Whether a step is being traced that has ``variable`` in its state."""
    return isinstance(variable.value, jax.core.Tracer)


def commit_if(condition: Any, updates: Sequence[tuple[keras.Variable, Any]]) -> None:
    """Assign each new value where ``condition`` (a boolean scalar on the device) holds."""
    for variable, value in updates:
        variable.assign(jnp.where(condition, value, variable.value))


CONDITIONAL_BYTES = 1 << 20
"""Size of the variables above which a CPU branches instead of selecting."""


def run_if(condition: Any, fn: Callable[[], None], variables: Sequence[keras.Variable]) -> None:
    """Run ``fn``, keeping what it assigns to ``variables`` only where ``condition`` holds.

    Small state uses a select, as does all state on a GPU, where reading the flag would stall the
    queue. On a CPU selecting large state costs more than the update: old and new values must
    coexist, so XLA copies every slot that the rule reads twice (docs/lab/large-tables.md).
    """
    before = [v.value for v in variables]
    size = sum(value.nbytes for value in before)
    traced = any(isinstance(value, jax.core.Tracer) for value in before)
    if traced and size >= CONDITIONAL_BYTES and on_cpu():
        _branch(condition, fn)
        return
    fn()
    for variable, old in zip(variables, before, strict=True):
        if variable.value is not old:
            variable.assign(jnp.where(condition, variable.value, old))


def _branch(condition: Any, fn: Callable[[], None]) -> None:
    """``lax.cond`` between the assignments of ``fn`` and the unchanged values."""
    before = [v.value for v in context.state]
    indices: list[int] = []

    def run(values: list[Any]) -> list[Any]:
        _, changed = run_stateless(fn, values)
        indices[:] = changed
        return list(changed.values())

    # Traced here and not by `cond`: both branches need to know which values are unchanged.
    update, _ = trace(run, before)
    after = jax.lax.cond(condition, update, lambda values: [values[i] for i in indices], before)
    for index, value in zip(indices, after, strict=True):
        context.state[index].assign(value)


def with_rollback(fn: Callable[[], Any]) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``, which assigns variables through ``commit_if``.

    Returns:
        Its result, and ``undo_if(condition)``, which reverts the assignments.
    """
    before = [v.value for v in context.state]
    result = fn()

    def undo_if(condition: Any) -> None:
        for variable, old in zip(context.state, before, strict=True):
            if variable.value is not old:
                variable.assign(jnp.where(condition, old, variable.value))

    return result, undo_if


def apply_optimizer(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    factor: Any,
    variables: Sequence[keras.Variable],
) -> None:
    """Apply the gradients, multiplied by the scalar ``factor``, to ``variables``.

    Gradients that overwrite their variable are not multiplied. The stateless API is used because
    some optimizers branch on the device.
    """
    state = optimizer.variables
    values, slots = optimizer.stateless_apply(
        [v.value for v in state], _scale(gradients, factor, variables), [v.value for v in variables]
    )
    for variable, value in zip([*variables, *state], [*values, *slots], strict=True):
        variable.assign(value)


def global_norm(gradients: Sequence[Any]) -> Any:
    """The Euclidean norm over all gradients, in float32, or in float64 if any of them is."""
    dtype = "float64" if any(g.dtype == jnp.float64 for g in gradients) else "float32"
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(dtype))) for g in gradients))


def _scale(gradients: Sequence[Any], factor: Any, variables: Sequence[keras.Variable]) -> list[Any]:
    """Multiply every gradient by one scalar, keeping dtypes."""
    return [
        g if is_overwritten(v) else g * factor.astype(g.dtype)
        for g, v in zip(gradients, variables, strict=True)
    ]


def inference() -> contextlib.AbstractContextManager[Any]:
    """Run user code without recording gradients, which JAX never does implicitly."""
    return contextlib.nullcontext()
