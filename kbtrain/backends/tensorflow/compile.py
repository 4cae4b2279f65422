"""TensorFlow: a step as a ``tf.function``, with XLA if that is likely to be faster."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from kbtrain.backends.tensorflow.loop import loop
from kbtrain.backends.tensorflow.model_steps import one_by_one
from kbtrain.backends.tensorflow.optimizer import LARGE_BYTES, size_of
from kbtrain.backends.tensorflow.processes import named, shards
from kbtrain.backends.tensorflow.scope import context
from kbtrain.data import signature
from kbtrain.data.ragged import has_ragged
from kbtrain.errors import EAGER, ConcreteValueNeeded, causes, first_lines, user_line

logger = logging.getLogger("kbtrain")


def compile_step(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str = "auto",
    calls: int = 0,
) -> Callable[[Any], Any]:
    """Compile ``fn(inputs) -> outputs``, which reads and assigns ``variables``.

    One graph is traced per structure, shapes and dtypes of the inputs.

    Args:
        fn: Function of a structure of tensors, free of host side effects.
        variables: All variables that ``fn`` reads or assigns.
        jit_compile: ``True`` compiles with XLA, ``False`` runs the graph, ``"auto"`` decides by
            the operations of the graph and the number of calls (``_against_xla``).
        calls: The approximate number of calls.

    Returns:
        A function with the signature of ``fn``.
    """

    def traced(inputs: Any) -> Any:
        with context.tracing(variables):
            return fn(inputs)

    graphs: dict[Any, Callable[[Any], Any]] = {}
    refused = False

    def refuse(reason: str, whose: str = ", which refuses it") -> None:
        nonlocal refused
        refused = True
        level = logging.WARNING if jit_compile is True else logging.INFO
        logger.log(level, "The step runs without XLA%s: %s", whose, reason)

    def say_compiled() -> None:
        if len(graphs) == 1:  # not again for inputs of other shapes
            why = ", which makes fewer kernels of it" if _on_gpu() else ""
            logger.info("The step is compiled by XLA%s.", why)

    def compile_for(inputs: Any) -> Callable[[Any], Any]:
        # One function per signature: TensorFlow never has to guess whether to relax shapes. (It
        # warns of many functions with the same code; a partial has none.)
        graph: Any = tf.function(functools.partial(traced), autograph=False)
        compiled = tf.function(functools.partial(traced), jit_compile=True, autograph=False)
        if not refused and jit_compile is not False and _has_strings(inputs):
            refuse("strings are none of its types")  # XLA would end the process
        if not refused and jit_compile is not False and has_ragged(inputs):
            refuse("the sizes of ragged tensors depend on values")
        if not refused and jit_compile is not False and shards() > 1:
            # On a CPU it would compute nonsense, and then end the process.
            refuse("sums over several processes would be wrong under it", "")
        plain: Callable[[Any], Any] = named(graph)
        if refused:  # failed for another shape: trying again takes seconds, with the same result
            return plain
        if jit_compile is True:
            return _with_fallback(compiled, graph, refuse, say_compiled)
        if jit_compile == "auto" and calls >= XLA_CALLS:
            reason = _against_xla(graph.get_concrete_function(inputs), variables)
            if not reason:
                return _with_fallback(compiled, graph, refuse, say_compiled)
            logger.info("The step runs as a graph, without XLA: %s.", reason)
        elif jit_compile == "auto" and calls and not graphs and _on_gpu():
            logger.info(
                "The step runs as a graph, without XLA: compiling takes longer than a run of less "
                "than %d updates gains. jit_compile=True compiles it.",
                XLA_CALLS,
            )
        return plain

    def call(inputs: Any) -> Any:
        key = signature(inputs)
        if key in graphs:
            return graphs[key](inputs)
        try:
            graphs[key] = compile_for(inputs)
            return graphs[key](inputs)
        except Exception as error:
            if not _needs_values(error):
                raise
            logger.warning(EAGER, user_line(error))
            graphs[key] = traced
        return graphs[key](inputs)

    return call


def _on_gpu() -> bool:
    return bool(tf.config.list_logical_devices("GPU"))


def _has_strings(inputs: Any) -> bool:
    return any(getattr(x, "dtype", None) == tf.string for x in tf.nest.flatten(inputs))


def _needs_values(error: BaseException) -> bool:
    """Whether Python needed the value of a symbolic tensor while the graph was traced."""
    return any(
        isinstance(cause, ConcreteValueNeeded) or "symbolic" in str(cause).lower()
        for cause in causes(error)
    )


XLA_CALLS = 200
"""Number of updates above which the seconds XLA takes to compile pay off."""


def _against_xla(concrete: Any, variables: Sequence[keras.Variable]) -> str:
    """Why XLA is unlikely to be faster; empty if it is likely, as always on a GPU.

    This is a rule about the graph, not a measurement, so a program always makes the same choice.
    On a CPU XLA's convolutions take twice as long as the graph's, its random numbers twenty times
    as long, and matrix decompositions (of an optimizer, for example) minutes. XLA also copies
    large tables around their update; the graph does not, and its update can itself be compiled by
    XLA (docs/lab/large-tables.md).
    """
    if _on_gpu():
        return ""
    definition = concrete.graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    if any("Conv" in node.op for node in nodes):
        return "on a CPU its convolutions are slower"
    if any("StatelessRandom" in node.op for node in nodes):
        return "on a CPU its random numbers are slower"
    if any(node.op in _DECOMPOSITIONS for node in nodes):
        return "on a CPU its matrix decompositions are slower"
    tables = sum(map(_table_bytes, nodes))
    if 2 * tables >= sum(size_of(v.value) for v in variables if v.trainable) > 0:
        return "on a CPU it copies large tables"
    return ""


_DECOMPOSITIONS = frozenset(["Qr", "SelfAdjointEigV2", "Svd"])


def _table_bytes(node: Any) -> int:
    """Bytes of the gradient that ``node`` computes, if it is that of a table, from ``_dense``."""
    if node.op != "UnsortedSegmentSum":
        return 0
    sizes = [side.size for side in node.attr["_output_shapes"].list.shape[0].dim]
    size = math.prod(sizes) * tf.as_dtype(node.attr["T"].type).size
    return size if size >= LARGE_BYTES else 0


def _with_fallback(
    compiled: Callable[[Any], Any],
    graph: Callable[[Any], Any],
    refuse: Callable[[str], None],
    compiles: Callable[[], None],
) -> Callable[[Any], Any]:
    """Run the step under XLA, or as a graph if XLA cannot compile it.

    Args:
        compiled: The step under XLA, compiled on its first call.
        graph: The step as a graph.
        refuse: Called with the reason if XLA rejects the step.
        compiles: Called if XLA compiles it.
    """
    works: bool | None = None

    def call(inputs: Any) -> Any:
        nonlocal works
        if works:
            return compiled(inputs)
        if works is None:
            try:
                result = compiled(inputs)  # XLA compiles the whole step before anything runs
            except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
                works = False
                refuse(first_lines(error, 1))
            else:
                works = True
                compiles()
                return result
        return graph(inputs)

    return call


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
        calls: The approximate number of steps.

    Returns:
        ``call(block, count)``: runs ``fn`` on the first ``count`` entries along the leading axis of
        ``block``; its outputs have a leading axis of at least that length. The count is not part
        of the compiled code, so results do not depend on how steps are grouped into blocks.
    """

    def steps(inputs: tuple[Any, Any]) -> Any:
        block, count = inputs
        if tf.nest.flatten(block)[0].shape[0] == 1:
            outputs = fn(tf.nest.map_structure(lambda t: t[0], block))
            return tf.nest.map_structure(lambda t: t[None], outputs)
        return loop(lambda carry, x: (carry, fn(x)), (), block, count)[1]

    call = compile_step(steps, variables, jit_compile, calls)
    return lambda block, count: call((block, tf.constant(count)))


def compile_model_steps(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str,
    eagerly: bool,
) -> Callable[[Any, int], Any]:
    """Like ``compile_steps``, for a custom step of the model; a graph unless eager is required."""
    if eagerly:
        return one_by_one(fn)
    return compile_steps(fn, variables, jit_compile is True)


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
        changing: Those that it assigns (unused here).
        jit_compile: As in ``compile_step``.
        output_bytes: Limit on the size of the outputs of one call, unless a single step exceeds
            it.

    Returns:
        ``call(block, start, count)``: runs ``fn`` on ``count`` entries of ``block`` from ``start``,
        or on as many as the outputs fit. It returns the outputs along a leading axis of at least
        that length, and the number of entries that were run. Neither number is part of the
        compiled code.
    """

    def steps(inputs: tuple[Any, Any, Any]) -> Any:
        block, start, count = inputs

        def row(i: Any) -> Any:
            return tf.nest.map_structure(lambda t: t[i], block)

        length = tf.nest.flatten(block)[0].shape[0]
        specs: Any = None
        if tf.executing_eagerly():  # an untraceable step runs one at a time
            length = 1
        if length > 1:  # traced once to learn the size of the outputs
            probe = tf.function(fn, autograph=False).get_concrete_function(row(0))
            specs = probe.structured_outputs
            sizes = [(s.shape.num_elements(), s.dtype.size) for s in tf.nest.flatten(specs)]
            if all(elements is not None for elements, _ in sizes):
                size = sum(elements * width for elements, width in sizes)
                length = max(1, min(length, output_bytes // max(size, 1)))
            else:  # a shape that depends on values: one step at a time
                length = 1
        if length == 1:
            return tf.nest.map_structure(lambda t: t[None], fn(row(start)))
        arrays = tf.nest.map_structure(
            lambda s: tf.TensorArray(s.dtype, size=length, element_shape=s.shape), specs
        )

        def body(i: Any, arrays: Any) -> tuple[Any, Any]:
            outputs = fn(row(start + i))
            return i + 1, tf.nest.map_structure(lambda a, o: a.write(i, o), arrays, outputs)

        _, arrays = tf.while_loop(
            lambda i, _: i < count,
            body,
            (tf.constant(0), arrays),
            maximum_iterations=length,
            parallel_iterations=1,
        )
        return tf.nest.map_structure(lambda a: a.stack(), arrays)

    compiled = compile_step(steps, variables, jit_compile)

    def call(block: Any, start: int, count: int) -> tuple[Any, int]:
        outputs = compiled((block, tf.constant(start), tf.constant(count)))
        return outputs, min(count, tf.nest.flatten(outputs)[0].shape[0])

    return call
