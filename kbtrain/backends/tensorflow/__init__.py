"""TensorFlow: the step is one ``tf.function`` that assigns the variables in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from kbtrain.backends.scopes import LossScope, NoticingScope
from kbtrain.backends.state_blocks import (  # noqa: F401
    assign_blocks,
    check_model,
    owned_blocks,
    spans_devices,
)
from kbtrain.backends.stateful_model_steps import (  # noqa: F401
    check_signature,
    run_predict_step,
    run_test_step,
)
from kbtrain.backends.step_program import compile_step_for, has_compiler_for  # noqa: F401
from kbtrain.backends.tensorflow.autograph import inlined

# The rest of what a backend has, see kbtrain.backends.protocol.
from kbtrain.backends.tensorflow.compile import (  # noqa: F401
    compile_eval_steps,
    compile_model_steps,
    compile_step,
    compile_steps,
)
from kbtrain.backends.tensorflow.device import (  # noqa: F401
    cuda_graphs,
    device_info,
    device_scope,
    devices,
    free_memory,
    host_view,
    initializing,
    is_oom,
    memory_stats,
    numerics,
    place,
    ragged,
    rng_state,
    set_rng_state,
    start_to_host,
    synchronize,
    to_device,
    to_host,
)
from kbtrain.backends.tensorflow.flops import count_flops, tf32_is_on  # noqa: F401
from kbtrain.backends.tensorflow.loop import scan  # noqa: F401
from kbtrain.backends.tensorflow.memory import prepare  # noqa: F401
from kbtrain.backends.tensorflow.model_steps import (  # noqa: F401
    reversible,
    run_train_step,
    try_train_step,
)
from kbtrain.backends.tensorflow.optimizer import apply_optimizer, global_norm  # noqa: F401
from kbtrain.backends.tensorflow.processes import (  # noqa: F401
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
from kbtrain.backends.tensorflow.profiler import start_profile  # noqa: F401
from kbtrain.backends.tensorflow.scope import context
from kbtrain.backends.tensorflow.state_blocks import checksums, whole_value  # noqa: F401
from kbtrain.utils.packages.keras_private import read_values, stateless_scope

TAKES_STRINGS = True
"""Whether tensors can hold strings and be ragged."""

HAS_MESHES = False
"""Whether one process can train on several devices."""

COMPILES_AHEAD = False
"""Whether steps can be compiled for devices that are not here."""

name = "tensorflow"


def value_and_grad(
    fn: Callable[..., tuple[Any, Any]], variables: Sequence[keras.Variable], *args: Any
) -> tuple[Any, Any, list[Any], list[tuple[keras.Variable, Any]]]:
    """Differentiate ``fn(*args) -> (scalar, aux)`` with respect to ``variables``.

    Returns:
        ``(value, aux, gradients, updates)``: updates are the ``(variable, new value)`` pairs that
        the layers requested (moving statistics, seed states); nothing has been assigned yet. A
        variable that the loss does not depend on has a zero gradient, as on JAX.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        # The variables, not their values: an existing graph (a SavedModel) reads the variables.
        sources = [v.value for v in variables]
        tape.watch(sources)
        values = [tf.convert_to_tensor(source) for source in sources]
        with NoticingScope(variables, values, context.register) as scope, inlined():
            value, aux = fn(*args)
    gradients = [
        tf.zeros_like(v) if g is None else _dense(g, v)
        for g, v in zip(tape.gradient(value, sources), values, strict=True)
    ]
    return value, aux, gradients, scope.changes(context.variables)


def _dense(gradient: Any, value: Any) -> Any:
    """Convert the sliced gradient of an embedding, whose norm is wrong if an index repeats."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, value.shape[0])
    return gradient


@contextlib.contextmanager
def dropping() -> Iterator[keras.StatelessScope]:
    """A scope that discards assignments and collects the losses of layers."""
    # With the values: a regularizer reads its weight from the scope.
    scope = keras.StatelessScope([(v, v.value) for v in context.variables], collect_losses=True)
    with scope, inlined():
        yield scope


def recompute(
    fn: Callable[[Sequence[Any]], list[Any]],
    tensors: Sequence[Any],
    variables: Sequence[keras.Variable],
) -> list[Any]:
    """Run ``fn(tensors) -> list of tensors``, recomputing it in the backward pass.

    Args:
        fn: May read and assign variables; both runs see the same values.
        tensors: All other inputs of ``fn``.
        variables: The variables that it reads or assigns.
    """
    if not context.variables:  # no gradients outside a step
        return fn(tensors)
    scope = stateless_scope()
    variables = list({id(v): v for v in variables}.values())
    held = [None if scope is None else scope.get_current_value(v) for v in variables]
    before = [
        tf.convert_to_tensor(v if x is None else x)
        for v, x in zip(read_values(variables), held, strict=True)
    ]
    count = len(tensors)
    changed: list[keras.Variable] = []

    # Pass the values of variables as arguments: gradients of captured tensors would be lost.
    def run(*flat: Any) -> list[Any]:
        mapping = list(zip(variables, flat[count:], strict=True))
        with LossScope(mapping, collect_losses=True) as scope, inlined():
            given = [scope.get_current_value(v) for v in variables]
            outputs = fn(flat[:count])
        after = [scope.get_current_value(v) for v in variables]
        pairs = list(zip(variables, given, after, strict=True))
        changed[:] = [v for v, old, new in pairs if new is not old]
        return [*outputs, *(new for _, old, new in pairs if new is not old)]

    results = list(tf.recompute_grad(run)(*tensors, *before))
    new = results[len(results) - len(changed) :]
    for variable, value in zip(list(changed), new, strict=True):
        variable.assign(value)
    return results[: len(results) - len(changed)]


def accept_numbers(cls: type) -> None:
    """Make TensorFlow's functions accept objects of a class as their ``value``."""
    # Nothing to do: keras.Variable defines __tf_tensor__.


def is_symbolic(variable: keras.Variable) -> bool:
    """Whether a step is being traced; every variable that it reads is part of its state."""
    return not tf.executing_eagerly()


def commit_if(condition: Any, updates: Sequence[tuple[keras.Variable, Any]]) -> None:
    """Assign each new value where ``condition`` (a boolean scalar on the device) holds."""
    for variable, value in updates:
        if context.journal is not None:
            context.journal.setdefault(id(variable), (variable, tf.identity(variable.value)))
        variable.assign(tf.where(condition, tf.cast(value, variable.dtype), variable.value))


def run_if(condition: Any, fn: Callable[[], None], variables: Sequence[keras.Variable]) -> None:
    """Run ``fn``, which assigns ``variables``, only where ``condition`` holds."""

    def yes() -> Any:
        fn()
        return tf.constant(True)

    tf.cond(condition, yes, lambda: tf.constant(False))


def with_rollback(fn: Callable[[], Any]) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``, which assigns variables through ``commit_if``.

    Returns:
        Its result, and ``undo_if(condition)``, which reverts the assignments.
    """
    journal: dict[int, tuple[keras.Variable, Any]] = {}
    context.journal = journal
    try:
        if tf.executing_eagerly():
            result, before = fn(), list(journal.values())
        else:
            # Old values must be read before the first assignment: trace to find out which.
            tf.function(fn, autograph=False).get_concrete_function()
            before = [(v, tf.identity(v.value)) for v, _ in journal.values()]
            context.journal = None
            result = fn()
    finally:
        context.journal = None

    def undo_if(condition: Any) -> None:
        for variable, old in before:
            variable.assign(tf.where(condition, old, variable.value))

    return result, undo_if


def inference() -> contextlib.AbstractContextManager[Any]:
    """Run user code without recording gradients, which TensorFlow only does inside a tape."""
    return contextlib.nullcontext()
