"""TensorFlow under XLA on a CPU: results that overwrite their old values.

See `optim.kernels.inplace_order`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from optim.core.fallback import PrivateApi
from optim.kernels.inplace_order import LARGE, Pure, ResultOrder, flattened


def zero_after(value: Any) -> Any:
    """A zero that is not known before ``value`` is, and that XLA does not know to be one."""
    first = tf.slice(value, [0] * value.shape.rank, [1] * value.shape.rank)
    bits = tf.bitcast(tf.cast(tf.reshape(first, []), "float32"), "int32")
    count = tf.raw_ops.PopulationCount(x=bits)
    return tf.cast(tf.bitwise.right_shift(count, tf.constant(6, count.dtype)), "float32")


def after(zero: Any, value: Any) -> Any:
    """``value``, not before ``zero`` is known."""
    return value + tf.cast(zero, value.dtype)


def for_xla_on_cpu() -> bool:
    """Whether what is traced now is compiled by XLA for a CPU."""
    return _for_xla() and not tf.config.list_logical_devices("GPU")


def _asks_the_graph() -> bool:
    from tensorflow.python.ops import control_flow_util

    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


_for_xla = PrivateApi(
    "Asking a graph whether XLA compiles it",
    "tensorflow",
    _asks_the_graph,
    lambda: False,
    "The update of large variables takes longer under XLA on a CPU.",
)


def in_place(pure: Pure, value: Any, gradient: Any, slots: dict[str, Any]) -> Any:
    """``pure(value, gradient, slots)`` with results that wait for the readers of their old values.

    Args:
        pure: An elementwise rule.
        value: The variable's value.
        gradient: float32 tensor.
        slots: Slot name -> tensor.

    Returns:
        What ``pure`` returns.
    """
    if value.shape.num_elements() < LARGE:
        return pure(value, gradient, slots)
    flat = flattened(pure, list(slots))
    inputs = [value, *slots.values(), gradient]
    wanted = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    traced = tf.function(flat, autograph=False).get_concrete_function(*wanted)
    known = {
        placeholder.name: given
        for placeholder, given in zip(
            traced.inputs, [*inputs, *traced.captured_inputs], strict=True
        )
    }
    operations = {operation.name: operation for operation in traced.graph.get_operations()}
    order = _result_order(traced, operations, len(inputs))
    sums = [o.outputs[0].name for o in operations.values() if _is_sum(o)]
    nodes = {node.name: node for node in traced.graph.as_graph_def().node}

    def evaluate(result: Any, known: dict[Any, Any]) -> Any:
        needed = order.needed(result, known)
        made = {str(name).partition(":")[0] for name in needed if name not in known}
        part = tf.compat.v1.GraphDef(node=[nodes[name] for name in made])
        used = {name: given for name, given in known.items() if name in needed}
        return tf.graph_util.import_graph_def(part, used, [result], name="rule")[0]

    results, _ = order.run(known, sums, evaluate, zero_after, after)
    return results[0], dict(zip(slots, results[1:], strict=True))


def _result_order(traced: Any, operations: dict[str, Any], given: int) -> ResultOrder:
    """Which result of a traced rule reads what."""
    made = [o for o in operations.values() if o.type != "Placeholder"]
    made_of = {t.name: [operand.name for operand in o.inputs] for o in made for t in o.outputs}
    every = [t for o in operations.values() for t in o.outputs]
    tensors = frozenset(t.name for t in every if t.shape.rank)
    outputs = []
    for tensor in traced.outputs:
        while tensor.op.type == "Identity":  # the trace returns copies of its results
            tensor = tensor.op.inputs[0]
        outputs.append(tensor.name)
    return ResultOrder([t.name for t in traced.inputs[:given]], outputs, made_of, tensors)


def _is_sum(operation: Any) -> bool:
    """Whether an operation makes a scalar of a tensor."""
    scalar = all(t.shape.rank == 0 for t in operation.outputs)
    return scalar and any(t.shape.rank for t in operation.inputs)
