"""JAX: steps as pure functions of the variables' values, jitted with donated state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from kbtrain.backends.collective_check import about_to_run, is_observed
from kbtrain.backends.jax import target
from kbtrain.backends.jax.compilation_cache import replacing_damaged
from kbtrain.backends.jax.device import compiler_options, free_memory
from kbtrain.backends.jax.mesh import (
    check_can_run_eagerly,
    current,
    gathered,
    layouts_of,
    to_mesh,
    to_process,
)
from kbtrain.backends.jax.scope import context, run_stateless
from kbtrain.backends.jax.trace import on_gpu, trace
from kbtrain.data import signature
from kbtrain.errors import EAGER, ConcreteValueNeeded, ConfigurationError, causes, user_line
from kbtrain.utils.packages.keras_private import read_values, write_values

logger = logging.getLogger("kbtrain")


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
        variables: All variables that ``fn`` reads or assigns.
        jit_compile: ``False`` runs eagerly, for debugging; anything else jits.

    Returns:
        A function with the signature of ``fn``.
    """
    variables = list(variables)

    def eager(inputs: Any) -> Any:
        check_can_run_eagerly(variables)
        with context.tracing(variables):
            return fn(gathered(inputs))

    if jit_compile is False:
        return eager

    def pure(values: list[Any], inputs: Any) -> tuple[Any, list[Any]]:
        with context.tracing(variables):
            outputs, changed = run_stateless(lambda: fn(inputs), values)
        return outputs, [changed.get(i, value) for i, value in enumerate(values)]

    jitted = _jit(pure, donated=0, state=[variables], others=1)
    complete = _completing(variables, jitted)

    def call(inputs: Any) -> Any:
        new = complete(inputs, lambda: (to_mesh(read_values(variables)), inputs))
        values = to_mesh(read_values(variables))
        if len({id(value) for value in values}) != len(values):
            values = _without_aliases(values)
        program = jitted()
        if new:
            target.found(program, variables, layouts_of(variables), (values, inputs))
            _compile(program, values, inputs)
        _announce(program, values, inputs)
        outputs, values = program(values, inputs)
        # `assign` would convert and check each value, at ten times the cost of the whole call.
        write_values(variables, to_process(values))
        return to_process(outputs)

    return call


def _jit(
    pure: Callable[..., tuple[Any, list[Any]]],
    donated: int,
    state: Sequence[list[keras.Variable]],
    others: int,
) -> Callable[[], Any]:
    """Jit a step; on several devices its state has its layouts, and its outputs are whole on each.

    Args:
        pure: The step. It returns its outputs, and the new values of the last part of its state.
        donated: Position of the state that the call uses up.
        state: The variables of its first arguments.
        others: Number of its other arguments, which come as they are.

    Returns:
        A function that returns the jitted step for the variables that there are now.
    """
    made: dict[tuple[int, ...], Any] = {}

    def jitted() -> Any:
        key = tuple(len(part) for part in state)
        if key not in made:
            layouts: dict[str, Any] = {}
            if (run := current()) is not None:
                parts = [layouts_of(part) for part in state]
                layouts["in_shardings"] = (*parts, *[None] * others)
                layouts["out_shardings"] = (run.whole, parts[-1])
            made[key] = jax.jit(
                pure, donate_argnums=donated, compiler_options=compiler_options(), **layouts
            )
        return made[key]

    return jitted


def _completing(
    variables: list[keras.Variable], jitted: Callable[[], Any]
) -> Callable[[Any, Callable[[], tuple[Any, ...]]], bool]:
    """Add undeclared variables that a step reads to its state; else they would be constants.

    Returns:
        ``complete(inputs, arguments)``, to be called before ``jitted``. For inputs of a new
        structure it traces the step with ``arguments()``, completes ``variables``, and returns
        True.
    """
    known: set[Any] = set()

    def complete(inputs: Any, arguments: Callable[[], tuple[Any, ...]]) -> bool:
        if (key := signature(inputs)) in known:
            return False
        context.undeclared.clear()
        jitted().trace(*arguments())
        variables.extend(context.undeclared)
        known.add(key)
        return True

    return complete


def _compile(jitted: Any, *args: Any) -> None:
    """Compile for these arguments ahead of the next call.

    Memory that the compiler leaves in the C library's pools (a hundred megabytes) is returned to
    the system before the step allocates its own.
    """
    with replacing_damaged():
        jitted.lower(*args).compile()
    free_memory()


def _announce(jitted: Any, *args: Any) -> None:
    """Show the program to who compares those of all processes, before XLA divides and runs it."""
    run = current()
    if is_observed() and run is not None and not run.is_local:
        about_to_run([jitted.lower(*args).as_text().splitlines()])


def compile_steps(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str = "auto",
    calls: int = 0,
) -> Callable[[Any, int], Any]:
    """Like ``compile_step``, for several steps in one call.

    Args:
        fn: One step, ``fn(inputs) -> outputs``.
        variables: All variables that ``fn`` reads or assigns.
        jit_compile: As in ``compile_step``.
        calls: The approximate number of steps (unused here).

    Returns:
        ``call(block, count)``: runs ``fn`` on the first ``count`` entries along the leading axis of
        ``block``; its outputs have a leading axis of at least that length. The count is not part
        of the compiled code, so results do not depend on how steps are grouped into blocks.
    """

    def steps(inputs: tuple[Any, Any]) -> Any:
        block, number = inputs
        start, count = (number, 1) if on_gpu() else (0, number)
        before = [v.value for v in context.state]
        outputs, after = _loop(fn, [], before, block, start, count)
        for variable, value in zip(context.state, after, strict=True):
            variable.assign(value)
        return outputs

    eager = _explaining(_step_by_step(compile_step(fn, variables, False)))
    if jit_compile is False:
        return eager
    compiled = compile_step(steps, variables, jit_compile)

    def call(block: Any, count: int) -> Any:
        if not on_gpu():
            return compiled((block, np.int32(count)))
        rows = [compiled((block, np.int32(i))) for i in range(count)]
        return _joined(rows, _length(block))

    return _or_eagerly(call, eager)


def compile_model_steps(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str,
    eagerly: bool,
) -> Callable[[Any, int], Any]:
    """Like ``compile_steps``, for a custom step of the model; jitted unless eager is required."""
    return compile_steps(fn, variables, False if eagerly else jit_compile)


def _or_eagerly(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``compiled``, and ``eager`` from the first call that needs a concrete value."""
    use = compiled

    def call(*args: Any) -> Any:
        nonlocal use
        try:
            return use(*args)
        except Exception as error:
            if use is eager or not _needs_values(error):
                raise
            logger.warning(EAGER, user_line(error))
        use = eager
        return use(*args)

    return call


def _explaining(eager: Callable[..., Any]) -> Callable[..., Any]:
    """Run eagerly: Python may use concrete values, but not those being differentiated."""

    def call(*args: Any) -> Any:
        try:
            return eager(*args)
        except Exception as error:
            if not _needs_values(error):
                raise
            raise ConfigurationError(
                f"The step's Python takes a tensor that depends on the weights{user_line(error)} "
                "for a number or a NumPy array, as float() does: JAX does not allow that while it "
                "differentiates. Read keras.ops.stop_gradient(tensor) instead, or use "
                "keras.ops.where and keras.ops.cond, which can be compiled."
            ) from None

    return call


def _needs_values(error: BaseException) -> bool:
    return any(isinstance(cause, _LOOKS_AT_VALUES) for cause in causes(error))


_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,  # bool() and float(), too
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    ConcreteValueNeeded,
)


def _step_by_step(step: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    def call(block: Any, count: int) -> Any:
        target.check_runs()
        block = gathered(block)
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
        variables: All variables that ``fn`` reads.
        changing: Those that it assigns; the others are neither donated nor replaced.
        jit_compile: As in ``compile_step``.
        output_bytes: Limit on the size of the outputs of one call, unless a single step exceeds
            it.

    Returns:
        ``call(block, start, count)``: runs ``fn`` on ``count`` entries of ``block`` from ``start``,
        or on as many as the outputs fit. It returns the outputs along a leading axis of at least
        that length, and the number of entries that were run. Neither number is part of the
        compiled code.
    """
    changing = list(changing)
    fixed = [v for v in variables if not any(v is other for other in changing)]
    one_by_one = _step_by_step(compile_step(fn, [*fixed, *changing], False))

    def eager(block: Any, start: int, count: int) -> tuple[Any, int]:
        return one_by_one(jax.tree.map(lambda x: x[start:], gathered(block)), 1), 1

    if jit_compile is False:
        return eager

    def pure(
        constant: list[Any], values: list[Any], block: Any, start: Any, count: Any
    ) -> tuple[Any, list[Any]]:
        with context.tracing([*fixed, *changing]):
            return _loop(fn, constant, values, block, start, count, output_bytes)

    jitted = _jit(pure, donated=1, state=[fixed, changing], others=3)
    complete = _completing(fixed, jitted)

    def run(block: Any, start: int, count: int) -> tuple[Any, int]:
        numbers = np.int32(start), np.int32(count)
        state = [fixed, changing]
        new = complete(
            block, lambda: (*(to_mesh(read_values(part)) for part in state), block, *numbers)
        )
        values = to_mesh(read_values(changing))
        if len({id(value) for value in values}) != len(values):
            values = _without_aliases(values)
        constant = to_mesh(read_values(fixed))
        program = jitted()
        if new:
            _compile(program, constant, values, block, *numbers)
        _announce(program, constant, values, block, *numbers)
        outputs, values = program(constant, values, block, *numbers)
        write_values(changing, to_process(values))
        outputs = to_process(outputs)
        return outputs, min(count, _length(outputs))

    def call(block: Any, start: int, count: int) -> tuple[Any, int]:
        if not on_gpu():
            return run(block, start, count)
        rows = [run(block, start, 1)[0]]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(rows))
        capacity = max(1, min(_length(block), output_bytes // max(size, 1)))
        count = min(count, capacity)
        rows += [run(block, start + i, 1)[0] for i in range(1, count)]
        return _joined(rows, capacity), count

    return _or_eagerly(call, eager)


def _loop(
    fn: Callable[[Any], Any],
    constant: list[Any],
    values: list[Any],
    block: Any,
    start: Any,
    count: Any,
    output_bytes: int | None = None,
) -> tuple[Any, list[Any]]:
    """Trace a loop that runs ``fn`` on the entries of ``block`` from ``start``.

    On a GPU it has one entry, and its caller calls it for each: XLA runs a loop whose length it
    does not know by waiting, before every round, for the device to say whether there is another.

    Args:
        fn: One step; its state is ``[*constant, *values]``.
        constant: Values of the state that it does not change.
        values: Values of the state that it changes.
        block: Inputs along a leading axis.
        start: Index of the first entry.
        count: Maximum number of entries.
        output_bytes: Limit on the size of the outputs, unless a single entry exceeds it.

    Returns:
        The outputs along a leading axis, and the new ``values``.
    """

    def one(values: list[Any], index: Any) -> tuple[list[Any], Any]:
        row = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), block)
        outputs, changed = run_stateless(lambda: fn(row), [*constant, *values])
        return [changed.get(len(constant) + i, v) for i, v in enumerate(values)], outputs

    capacity = 1 if on_gpu() else _length(block)
    run: Any = one
    if capacity > 1:
        run, (_, shapes) = trace(one, values, jnp.int32(0))
        if output_bytes is not None:
            size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes))
            capacity = max(1, min(capacity, output_bytes // max(size, 1)))
    if capacity == 1:
        values, outputs = run(values, start)
        return jax.tree.map(lambda x: x[None], outputs), values
    buffers = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shapes)

    def body(loop: tuple[Any, list[Any], Any]) -> tuple[Any, list[Any], Any]:
        index, values, buffers = loop
        values, outputs = run(values, start + index)
        buffers = jax.tree.map(lambda b, o: b.at[index].set(o), buffers, outputs)
        return index + 1, values, buffers

    _, values, buffers = jax.lax.while_loop(
        lambda loop: (loop[0] < count) & (loop[0] < capacity), body, (jnp.int32(0), values, buffers)
    )
    return buffers, values


def _length(tree: Any) -> int:
    """The length of the leading axis."""
    length: int = jax.tree.leaves(tree)[0].shape[0]
    return length


def _joined(rows: Sequence[Any], capacity: int) -> Any:
    """Outputs of single entries along one axis; of ``capacity`` of them, to compile once."""
    if len(rows) == 1:
        return rows[0]
    return _concatenated([*rows, *[rows[-1]] * (capacity - len(rows))])


def _concatenate(rows: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


_concatenated = jax.jit(_concatenate)


def _without_aliases(values: list[Any]) -> list[Any]:
    """Copy duplicates: a buffer cannot be donated twice."""
    seen: set[int] = set()
    distinct = []
    for value in values:
        distinct.append(jnp.copy(value) if id(value) in seen else value)
        seen.add(id(value))
    return distinct
