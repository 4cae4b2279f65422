"""JAX: the step becomes a pure function of the variables' values, jitted with donated state."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

# Keras has no public door to the scope that a step runs in.
from keras.src.backend.common.stateless_scope import get_stateless_scope

# The rest of what a backend has, see kbtrain.backends.
from kbtrain.backends.jax_device import (  # noqa: F401
    compiler_options,
    device_info,
    device_scope,
    devices,
    free_memory,
    host_copy,
    is_oom,
    memory_stats,
    numerics,
    place,
    rng_state,
    set_rng_state,
    start_to_host,
    synchronize,
    to_device,
    to_host,
)
from kbtrain.backends.jax_trace import on_cpu, trace
from kbtrain.backends.scope import LossScope
from kbtrain.data import signature
from kbtrain.errors import EAGER, causes, user_line

name = "jax"
logger = logging.getLogger("kbtrain")

# The variables of the step being traced. Keras' inner scopes do not see the outer scope's values,
# so every nested scope has to carry all of them.
_state: list[keras.Variable] = []


# Variables that a step has read without having been told of them: those of a user's own loss, say.
_strangers: list[keras.Variable] = []


class _Scope(keras.StatelessScope):
    """Notes the variables that are read and are not part of the state."""

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value in this scope; None where the variable itself has it."""
        value = super().get_current_value(variable)
        unknown = value is None and variable._value is not None
        if unknown and not any(variable is other for other in (*_state, *_strangers)):
            _strangers.append(variable)
        return value


@contextlib.contextmanager
def _tracing(variables: Sequence[keras.Variable]) -> Iterator[None]:
    global _state
    before, _state = _state, list(variables)
    try:
        yield
    finally:
        _state = before


class _LossScope(_Scope, LossScope):
    pass


def _run_stateless(
    fn: Callable[[], Any],
    values: Sequence[Any],
    of_loss: bool = False,
) -> tuple[Any, dict[int, Any]]:
    """Run ``fn`` with the state at ``values``; return its result and {index: new value}.

    With ``of_loss`` it is run for its gradient: losses of layers are collected.
    """
    mapping = list(zip(_state, values, strict=True))
    scope_class = _LossScope if of_loss else _Scope
    with scope_class(mapping, collect_losses=of_loss) as scope:
        before = [scope.get_current_value(v) for v in _state]
        result = fn()
        after = [scope.get_current_value(v) for v in _state]
    pairs = enumerate(zip(before, after, strict=True))
    return result, {i: new for i, (old, new) in pairs if new is not old}


def compile_step(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str = "auto",
) -> Callable[[Any], Any]:
    """Compile ``fn(inputs) -> outputs``, which reads and assigns ``variables``.

    After each call the variables hold the current values. The old buffers are donated: an array
    taken from ``variable.value`` before a call must not be used after it.

    Args:
        fn: Function of a structure of tensors, free of host side effects.
        variables: Everything ``fn`` reads or assigns.
        jit_compile: ``False`` runs eagerly, to debug; anything else jits.

    Returns:
        A function with the signature of ``fn``.
    """
    variables = list(variables)

    def eager(inputs: Any) -> Any:
        with _tracing(variables):
            return fn(inputs)

    if jit_compile is False:
        return eager

    def pure(values: list[Any], inputs: Any) -> tuple[Any, list[Any]]:
        with _tracing(variables):
            outputs, changed = _run_stateless(lambda: fn(inputs), values)
        return outputs, [changed.get(i, value) for i, value in enumerate(values)]

    jitted = jax.jit(pure, donate_argnums=0, compiler_options=compiler_options())
    complete = _completing(variables, jitted)

    def call(inputs: Any) -> Any:
        complete(inputs, lambda: ([v._value for v in variables], inputs))
        values = [variable._value for variable in variables]
        if len({id(value) for value in values}) != len(values):
            values = _without_aliases(values)
        outputs, values = jitted(values, inputs)
        # `assign` would convert and check each value again: ten times the cost of the whole call.
        for variable, value in zip(variables, values, strict=True):
            variable._value = value
        return outputs

    return call


def _completing(
    variables: list[keras.Variable], jitted: Any
) -> Callable[[Any, Callable[[], tuple[Any, ...]]], None]:
    """What a step reads beside its state would be a constant for ever, so it is made state.

    Returns:
        ``complete(inputs, arguments)``, to be called before ``jitted``: where it has not seen
        inputs like these, it is traced with its ``arguments()`` and ``variables`` are completed.
    """
    known: set[Any] = set()

    def complete(inputs: Any, arguments: Callable[[], tuple[Any, ...]]) -> None:
        if (key := signature(inputs)) in known:
            return
        _strangers.clear()
        jitted.trace(*arguments())
        variables.extend(_strangers)
        known.add(key)

    return complete


def compile_steps(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str = "auto",
    calls: int = 0,
) -> Callable[[Any, int], Any]:
    """Like ``compile_step``, for several steps in one call.

    Args:
        fn: One step, ``fn(inputs) -> outputs``.
        variables: Everything ``fn`` reads or assigns.
        jit_compile: As in ``compile_step``.
        calls: About how many steps there will be (of no use here).

    Returns:
        ``call(block, count)``: runs ``fn`` on the first ``count`` entries along the leading axis of
        ``block``; its outputs come along a leading axis of at least that length. The count does
        not enter the compiled code, so the numbers do not depend on how steps are put in blocks.
    """

    def steps(inputs: tuple[Any, Any]) -> Any:
        block, count = inputs
        before = [v.value for v in _state]

        def one(values: list[Any], index: Any) -> tuple[list[Any], Any]:
            row = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), block
            )
            outputs, changed = _run_stateless(lambda: fn(row), values)
            return [changed.get(i, value) for i, value in enumerate(values)], outputs

        if jax.tree.leaves(block)[0].shape[0] == 1:
            after, outputs = one(before, 0)
            outputs = jax.tree.map(lambda x: x[None], outputs)
        else:
            size = jax.tree.leaves(block)[0].shape[0]
            run, (_, shapes) = trace(one, before, jnp.int32(0))
            buffers = jax.tree.map(lambda s: jnp.zeros((size, *s.shape), s.dtype), shapes)

            def body(loop: tuple[Any, list[Any], Any]) -> tuple[Any, list[Any], Any]:
                index, values, buffers = loop
                values, outputs = run(values, index)
                buffers = jax.tree.map(lambda b, o: b.at[index].set(o), buffers, outputs)
                return index + 1, values, buffers

            _, after, outputs = jax.lax.while_loop(
                lambda loop: loop[0] < count, body, (jnp.int32(0), before, buffers)
            )
        for variable, value in zip(_state, after, strict=True):
            variable.assign(value)
        return outputs

    eager = _step_by_step(compile_step(fn, variables, False))
    if jit_compile is False:
        return eager
    call = compile_step(steps, variables, jit_compile)
    return _or_eagerly(lambda block, count: call((block, np.int32(count))), eager)


def _or_eagerly(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``; from where Python wants a value that a trace does not have, ``eager``."""
    use = compiled

    def call(*args: Any) -> Any:
        nonlocal use
        try:
            return use(*args)
        except Exception as error:
            if use is eager or not any(isinstance(e, _LOOKS_AT_VALUES) for e in causes(error)):
                raise
            logger.warning(EAGER, user_line(error))
        use = eager
        return use(*args)

    return call


_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,  # bool() and float(), too
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _step_by_step(step: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    def call(block: Any, count: int) -> Any:
        rows = [jax.tree.map(lambda x, i=i: x[i], block) for i in range(count)]
        return jax.tree.map(lambda *outputs: jnp.stack(outputs), *[step(row) for row in rows])

    return call


def compile_eval_steps(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    changing: Sequence[keras.Variable],
    jit_compile: bool | str = "auto",
    output_bytes: int = 1 << 22,
) -> Callable[[Any, int, int], tuple[Any, int]]:
    """Like ``compile_steps``, for steps that change few variables and may have large outputs.

    Args:
        fn: One step, ``fn(inputs) -> outputs``.
        variables: Everything ``fn`` reads.
        changing: Those of them it assigns; the others are neither donated nor replaced.
        jit_compile: As in ``compile_step``.
        output_bytes: Size of the outputs of one call, at most, unless those of a single step are
            larger.

    Returns:
        ``call(block, start, count)``: runs ``fn`` on the entries of ``block`` from ``start`` on:
        ``count`` of them, or as many as the outputs have room for. Its result is the outputs along
        a leading axis of at least that length, and the number of entries that were run. Neither
        number enters the compiled code.
    """
    changing = list(changing)
    fixed = [v for v in variables if not any(v is other for other in changing)]
    one_by_one = _step_by_step(compile_step(fn, [*fixed, *changing], False))

    def eager(block: Any, start: int, count: int) -> tuple[Any, int]:
        return one_by_one(jax.tree.map(lambda x: x[start:], block), 1), 1

    if jit_compile is False:
        return eager

    def pure(
        constant: list[Any], values: list[Any], block: Any, start: Any, count: Any
    ) -> tuple[Any, list[Any]]:
        def one(values: list[Any], index: Any) -> tuple[list[Any], Any]:
            row = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), block
            )
            outputs, changed = _run_stateless(lambda: fn(row), [*constant, *values])
            return [changed.get(len(constant) + i, v) for i, v in enumerate(values)], outputs

        with _tracing([*fixed, *changing]):
            run, (_, shapes) = trace(one, values, start)
            size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes))
            room = max(1, min(jax.tree.leaves(block)[0].shape[0], output_bytes // max(size, 1)))
            if room == 1:
                values, outputs = run(values, start)
                return jax.tree.map(lambda x: x[None], outputs), values
            buffers = jax.tree.map(lambda s: jnp.zeros((room, *s.shape), s.dtype), shapes)

            def body(loop: tuple[Any, list[Any], Any]) -> tuple[Any, list[Any], Any]:
                index, values, buffers = loop
                values, outputs = run(values, start + index)
                buffers = jax.tree.map(lambda b, o: b.at[index].set(o), buffers, outputs)
                return index + 1, values, buffers

            _, values, buffers = jax.lax.while_loop(
                lambda loop: (loop[0] < count) & (loop[0] < room),
                body,
                (jnp.int32(0), values, buffers),
            )
        return buffers, values

    jitted = jax.jit(pure, donate_argnums=1, compiler_options=compiler_options())
    complete = _completing(fixed, jitted)

    def call(block: Any, start: int, count: int) -> tuple[Any, int]:
        numbers = np.int32(start), np.int32(count)
        state = [fixed, changing]
        complete(block, lambda: (*([v._value for v in part] for part in state), block, *numbers))
        values = [v._value for v in changing]
        if len({id(value) for value in values}) != len(values):
            values = _without_aliases(values)
        constant = [v._value for v in fixed]
        outputs, values = jitted(constant, values, block, *numbers)
        for variable, value in zip(changing, values, strict=True):
            variable._value = value
        return outputs, min(count, jax.tree.leaves(outputs)[0].shape[0])

    return _or_eagerly(call, eager)


def _without_aliases(values: list[Any]) -> list[Any]:
    """Copy what appears twice: one buffer cannot be donated two times."""
    seen: set[int] = set()
    distinct = []
    for value in values:
        distinct.append(jnp.copy(value) if id(value) in seen else value)
        seen.add(id(value))
    return distinct


def value_and_grad(
    fn: Callable[..., tuple[Any, Any]], variables: Sequence[keras.Variable], *args: Any
) -> tuple[Any, Any, list[Any], list[tuple[keras.Variable, Any]]]:
    """Differentiate ``fn(*args) -> (scalar, aux)`` with respect to ``variables``.

    Returns:
        ``(value, aux, gradients, updates)``: updates are the ``(variable, new value)`` pairs that
        the layers asked for (moving statistics, seed states); nothing has been assigned yet.
    """
    positions = {id(v): i for i, v in enumerate(_state)}
    indices = [positions[id(v)] for v in variables]
    outside = [v.value for v in _state]
    changed_indices: list[int] = []

    def pure(values: list[Any]) -> tuple[Any, Any]:
        inside = list(outside)
        for index, value in zip(indices, values, strict=True):
            inside[index] = value
        (value, aux), changed = _run_stateless(lambda: fn(*args), inside, of_loss=True)
        changed_indices[:] = changed
        return value, (aux, list(changed.values()))

    (value, (aux, new)), gradients = jax.value_and_grad(pure, has_aux=True)(
        [outside[i] for i in indices]
    )
    updates = [(_state[i], v) for i, v in zip(changed_indices, new, strict=True)]
    return value, aux, gradients, updates


def dropping() -> keras.StatelessScope:
    """A scope in which assignments are forgotten; losses of layers are collected."""
    return _Scope([(v, v.value) for v in _state], collect_losses=True)


def recompute(
    fn: Callable[[Sequence[Any]], list[Any]],
    tensors: Sequence[Any],
    variables: Sequence[keras.Variable],
) -> list[Any]:
    """Run ``fn(tensors) -> list of tensors``; for gradients it is run again, not remembered.

    Args:
        fn: May read and assign variables; both times it finds the same values.
        tensors: Everything else it depends on.
        variables: Those it reads or assigns (of no use here).
    """
    if not _state:  # outside of a step there are no gradients
        return fn(tensors)
    scope = get_stateless_scope()
    held = [scope.get_current_value(v) for v in _state]
    before = [v._value if x is None else x for v, x in zip(_state, held, strict=True)]
    changed_indices: list[int] = []

    def pure(values: list[Any], tensors: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs, changed = _run_stateless(lambda: fn(tensors), values, of_loss=True)
        changed_indices[:] = changed
        return outputs, list(changed.values())

    outputs, new = jax.checkpoint(pure)(before, list(tensors))
    for index, value in zip(changed_indices, new, strict=True):
        _state[index].assign(value)
    return outputs


def scan(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``carry, output = fn(carry, x)`` for each x along the leading axis of ``inputs``.

    ``fn`` may assign variables. Returns the last carry and the outputs along a new leading axis.
    """

    def body(loop: tuple[Any, list[Any]], x: Any) -> tuple[tuple[Any, list[Any]], Any]:
        carry, values = loop
        (carry, output), changed = _run_stateless(lambda: fn(carry, x), values)
        return (carry, [changed.get(i, value) for i, value in enumerate(values)]), output

    before = [v.value for v in _state]
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
    for variable, value in zip(_state, after, strict=True):
        variable.assign(value)
    return carry, outputs


def commit_if(condition: Any, updates: Sequence[tuple[keras.Variable, Any]]) -> None:
    """Assign each new value where ``condition`` (a boolean scalar on the device) holds."""
    for variable, value in updates:
        variable.assign(jnp.where(condition, value, variable.value))


CONDITIONAL_BYTES = 1 << 20
"""Size of the variables from which on a CPU decides whether to update, not what to keep."""


def run_if(condition: Any, fn: Callable[[], None], variables: Sequence[keras.Variable]) -> None:
    """Run ``fn``, keeping what it assigns to ``variables`` only where ``condition`` holds.

    Small state is selected, and so is all state on a GPU, where reading a flag would stop the
    queue. On a CPU a select of large state costs more than the update: old and new values both
    have to be there, so XLA copies every slot that the rule reads twice (docs/decisions.md).
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
    """``lax.cond``: all that ``fn`` assigns, or everything as it was."""
    before = [v.value for v in _state]
    indices: list[int] = []

    def run(values: list[Any]) -> list[Any]:
        _, changed = _run_stateless(fn, values)
        indices[:] = changed
        return list(changed.values())

    # Traced here rather than by `cond`: what is left alone has to be known in both branches.
    update, _ = trace(run, before)
    after = jax.lax.cond(condition, update, lambda values: [values[i] for i in indices], before)
    for index, value in zip(indices, after, strict=True):
        _state[index].assign(value)


def undoable(fn: Callable[[], Any]) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``, which assigns variables through ``commit_if``.

    Returns:
        Its result, and ``undo_if(condition)``, which takes the assignments back.
    """
    before = [v.value for v in _state]
    result = fn()

    def undo_if(condition: Any) -> None:
        for variable, old in zip(_state, before, strict=True):
            if variable.value is not old:
                variable.assign(jnp.where(condition, old, variable.value))

    return result, undo_if


def apply_optimizer(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    factor: Any,
    variables: Sequence[keras.Variable],
) -> None:
    """Update ``variables`` with the gradients times ``factor``, a scalar.

    The stateless form, because some optimizers branch on the device.
    """
    state = optimizer.variables
    values, slots = optimizer.stateless_apply(
        [v.value for v in state], _scale(gradients, factor), [v.value for v in variables]
    )
    for variable, value in zip([*variables, *state], [*values, *slots], strict=True):
        variable.assign(value)


def global_norm(gradients: Sequence[Any]) -> Any:
    """Euclidean norm over all elements of all gradients, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype("float32"))) for g in gradients))


def _scale(gradients: Sequence[Any], factor: Any) -> list[Any]:
    """Multiply every gradient by one scalar, keeping dtypes."""
    return [g * factor.astype(g.dtype) for g in gradients]


def inference() -> contextlib.AbstractContextManager[Any]:
    """Code of the user's runs without keeping what a gradient would need: here always so."""
    return contextlib.nullcontext()
