"""PyTorch: the step is captured once per shape and run on the variables' own parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from torch.utils import checkpoint

from kbtrain.backends.scopes import LossScope, NoticingScope, is_overwritten
from kbtrain.backends.state_blocks import (  # noqa: F401
    assign_blocks,
    owned_blocks,
    spans_devices,
)
from kbtrain.backends.stateful_model_steps import (  # noqa: F401
    check_signature,
    run_predict_step,
    run_test_step,
)
from kbtrain.backends.step_program import compile_step_for, has_compiler_for  # noqa: F401
from kbtrain.backends.torch.capture.guard import NotCapturable, guard

# The rest of what a backend has, see kbtrain.backends.
from kbtrain.backends.torch.collectives import (  # noqa: F401
    all_gather,
    all_sum,
    gather_from_owners,
    shards,
    sum_to_owners,
)
from kbtrain.backends.torch.device import (  # noqa: F401
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
    prepare,
    ragged,
    rng_state,
    set_rng_state,
    start_to_host,
    synchronize,
    to_device,
    to_host,
)
from kbtrain.backends.torch.flops import count_flops, tf32_is_on  # noqa: F401
from kbtrain.backends.torch.model_steps import (  # noqa: F401
    reversible,
    run_train_step,
    try_train_step,
)
from kbtrain.backends.torch.processes import (  # noqa: F401
    copy_from_first,
    exchange,
    exchange_settings,
    joined_processes,
    local_rows,
    start_processes,
    stop_processes,
)
from kbtrain.backends.torch.profiler import start_profile  # noqa: F401
from kbtrain.backends.torch.runner import (  # noqa: F401
    CapturePerMicroBatch,
    Runner,
    context,
    cuda_graphs,
)
from kbtrain.backends.torch.state_blocks import check_model, checksums, whole_value  # noqa: F401
from kbtrain.utils.fallback import PrivateApi
from kbtrain.utils.packages.keras_private import read_values, stateless_scope

TAKES_STRINGS = False
"""Whether tensors can hold strings."""

HAS_MESHES = False
"""Whether one process can train on several devices."""

COMPILES_AHEAD = False
"""Whether steps can be compiled for devices that are not here."""

name = "torch"


def compile_step(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str = "auto",
) -> Callable[[Any], Any]:
    """Compile ``fn(inputs) -> outputs``, which reads and assigns ``variables``.

    The step is captured once for each shape of its inputs (``kbtrain.backends.torch.capture``), in
    a fraction of a second, and then runs without Keras' Python. A step that cannot be captured
    runs eagerly, and the reason is logged.

    Args:
        fn: Function of a structure of tensors, free of host side effects.
        variables: All variables that ``fn`` reads or assigns.
        jit_compile: ``False`` runs eagerly, for debugging; ``True`` compiles the captured step with
            ``torch.compile``; anything else captures.

    Returns:
        A function with the signature of ``fn``.
    """
    return Runner(fn, variables, jit_compile)


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
        ``block``; its outputs have a leading axis.
    """
    runner = Runner(fn, variables, jit_compile)

    def call(block: Any, count: int) -> Any:
        rows = [leaf[:count].unbind() for leaf in keras.tree.flatten(block)]
        step = runner.for_shape(_first_row(block))
        with torch.no_grad():
            results = [step(row) for row in zip(*rows, strict=True)]
        stacked = [torch.stack(tensors) for tensors in zip(*results, strict=True)]
        return keras.tree.pack_sequence_as(step.outputs, stacked)

    return call


def compile_model_steps(
    fn: Callable[[Any], Any],
    variables: Sequence[keras.Variable],
    jit_compile: bool | str,
    eagerly: bool,
) -> Callable[[Any, int], Any]:
    """Like ``compile_steps``, for a custom step of the model: eager, as it calls ``backward``."""
    return compile_steps(fn, variables, False)


def _first_row(block: Any) -> Any:
    return keras.tree.map_structure(lambda leaf: leaf[0], block)


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
        or on as many as the outputs fit. It returns the outputs along a leading axis, and the
        number of entries that were run.
    """
    runner = Runner(fn, variables, jit_compile)

    def call(block: Any, start: int, count: int) -> tuple[Any, int]:
        rows = [leaf[start : start + count].unbind() for leaf in keras.tree.flatten(block)]
        step = runner.for_shape(_first_row(block))
        results: list[list[torch.Tensor]] = []
        capacity = 1
        for row in zip(*rows, strict=True):
            with torch.no_grad():
                results.append(step(row))
            if len(results) == 1:
                size = sum(t.numel() * t.element_size() for t in results[0])
                capacity = output_bytes // max(size, 1)
            if len(results) >= capacity:
                break
        stacked = [torch.stack(tensors) for tensors in zip(*results, strict=True)]
        return keras.tree.pack_sequence_as(step.outputs, stacked), len(results)

    return call


def value_and_grad(
    fn: Callable[..., tuple[Any, Any]], variables: Sequence[keras.Variable], *args: Any
) -> tuple[Any, Any, list[Any], list[tuple[keras.Variable, Any]]]:
    """Differentiate ``fn(*args) -> (scalar, aux)`` with respect to ``variables``.

    Returns:
        ``(value, aux, gradients, updates)``: updates are the ``(variable, new value)`` pairs that
        the layers requested (moving statistics, seed states); nothing has been assigned yet. A
        variable that the loss does not depend on has a zero gradient, as on JAX.
    """
    values = [v.value for v in variables]
    with torch.enable_grad():
        with NoticingScope(variables, values, context.register) as scope:
            value, aux = fn(*args)
        gradients = torch.autograd.grad(value, values, allow_unused=True)
    gradients = [
        torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True)
    ]
    updates = [(v, new.detach()) for v, new in scope.changes(context.variables)]
    return value.detach(), keras.tree.map_structure(_detach, aux), gradients, updates


def _detach(x: Any) -> Any:
    if not torch.is_tensor(x):
        return x
    detached = x.detach()
    if (mask := getattr(x, "_keras_mask", None)) is not None:
        detached._keras_mask = mask
    return detached


def dropping() -> keras.StatelessScope:
    """A scope that discards assignments and collects the losses of layers."""
    # With the values: a regularizer reads its weight from the scope.
    return keras.StatelessScope([(v, v.value) for v in context.variables], collect_losses=True)


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
    if not torch.is_grad_enabled():
        return fn(tensors)
    if context.capturing:
        # In a captured step the recomputation of a random layer would give different gradients.
        raise NotCapturable("layers are to be run again, which a record would not do")
    scope = stateless_scope()
    variables = list({id(v): v for v in variables}.values())
    held = [None if scope is None else scope.get_current_value(v) for v in variables]
    own = read_values(variables)
    before = [v if x is None else x for v, x in zip(own, held, strict=True)]
    changes: list[tuple[keras.Variable, torch.Tensor]] = []

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mapping = list(zip(variables, before, strict=True))
        with LossScope(mapping, collect_losses=True) as scope:
            given = [scope.get_current_value(v) for v in variables]
            outputs = fn(tensors)
        after = [scope.get_current_value(v) for v in variables]
        pairs = zip(variables, given, after, strict=True)
        changes[:] = [(v, new) for v, old, new in pairs if new is not old]
        return tuple(outputs)

    # No early stop: it works by an exception, which Keras reports as an error of the layer.
    with checkpoint.set_checkpoint_early_stop(False):
        outputs = checkpoint.checkpoint(run, *tensors, use_reentrant=False)
    for variable, value in list(changes):
        variable.assign(value)
    return list(outputs)


def scan(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``carry, output = fn(carry, x)`` for each x along the leading axis of ``inputs``.

    ``fn`` may assign variables; all other tensors it uses must be in the carry and the inputs, as
    it is captured and anything else would be a constant. Returns the last carry and the outputs
    along a new leading axis.
    """
    if context.capturing:
        raise CapturePerMicroBatch("it has a loop, whose body is captured by itself")
    body = fn if context.compile_body is None else context.compile_body(fn)
    length = keras.tree.flatten(inputs)[0].shape[0]
    outputs = []
    for i in range(length):
        carry, output = body(carry, keras.tree.map_structure(lambda t, i=i: t[i], inputs))
        outputs.append(output)
    return carry, keras.tree.map_structure(lambda *t: torch.stack(t), *outputs)


def accept_numbers(cls: type) -> None:
    """Make torch's functions accept objects of a class as their ``value``."""
    # Nothing to do: keras.Variable defines __torch_function__.


def is_symbolic(variable: keras.Variable) -> bool:
    """Whether a step is being recorded, which then has ``variable`` in its state."""
    if context.capturing:
        context.register(variable)
    return context.capturing


def _on_cpu(condition: Any) -> bool:
    result: bool = condition.device.type == "cpu"
    return result


def commit_if(condition: Any, updates: Sequence[tuple[keras.Variable, Any]]) -> None:
    """Assign each new value where ``condition`` (a boolean scalar on the device) holds."""
    guarded = context.capturing and _on_cpu(condition)
    if guarded:
        guard(condition)
    for variable, value in updates:
        if context.capturing:
            context.committed.append(variable)
        else:
            context.journal_value(variable)
        if not guarded:
            value = torch.where(condition, value.to(variable.value.dtype), variable.value)
        variable.assign(value)


def run_if(condition: Any, fn: Callable[[], None], variables: Sequence[keras.Variable]) -> None:
    """Run ``fn``, keeping what it assigns to ``variables`` only where ``condition`` holds.

    On the CPU reading the flag is free. On a GPU it would stall the queue: fused optimizers receive
    the flag, and for all other changes the old values are kept and selected.
    """
    if _on_cpu(condition):
        if context.capturing:
            guard(condition)
            fn()
        elif condition:
            fn()
        return
    values = [v.value for v in variables]
    before = [value.clone() for value in values]
    with _flagged_optimizers(condition):
        fn()
    for value, old in zip(values, before, strict=True):
        value.copy_(torch.where(condition, value, old))


def _flags(condition: Any) -> contextlib.AbstractContextManager[Any]:
    from kbtrain.backends.torch.capture.predication import FlaggedOptimizers

    return FlaggedOptimizers(condition)


_flagged_optimizers = PrivateApi(
    "Giving fused optimizers a flag",
    "torch",
    _flags,
    lambda condition: contextlib.nullcontext(),
    "Updates on a GPU take longer.",
    passes=is_oom,
)


def with_rollback(fn: Callable[[], Any]) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``, which assigns variables through ``commit_if``.

    Returns:
        Its result, and ``undo_if(condition)``, which reverts the assignments.
    """
    journal = context.journal = {}
    try:
        result = fn()
    finally:
        context.journal = None

    def undo_if(condition: Any) -> None:
        for variable, old in journal.values():
            variable.assign(torch.where(condition, old, variable.value))

    return result, undo_if


def apply_optimizer(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    factor: Any,
    variables: Sequence[keras.Variable],
) -> None:
    """Apply the gradients, multiplied by the scalar ``factor``, to ``variables``.

    Gradients that overwrite their variable are not multiplied.
    """
    _multiply(
        [g for g, v in zip(gradients, variables, strict=True) if not is_overwritten(v)], factor
    )
    optimizer.apply(list(gradients), list(variables))


def global_norm(gradients: Sequence[Any]) -> Any:
    """The Euclidean norm over all gradients, in float32, or in float64 if any of them is."""
    wide = any(g.dtype == torch.float64 for g in gradients)
    norms = _norms(list(gradients), torch.float64 if wide else torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


_norms = PrivateApi(
    "Taking the norms of a list of tensors",
    "torch",
    lambda tensors, dtype: torch._foreach_norm(tensors, 2.0, dtype),
    lambda tensors, dtype: [torch.linalg.vector_norm(t, dtype=dtype) for t in tensors],
    "They are taken one by one.",
    passes=is_oom,
)


_multiply = PrivateApi(
    "Multiplying a list of tensors",
    "torch",
    lambda tensors, factor: torch._foreach_mul_(tensors, factor),
    lambda tensors, factor: [t.mul_(factor.to(t.dtype)) for t in tensors],
    "They are multiplied one by one.",
    passes=is_oom,
)


def inference() -> contextlib.AbstractContextManager[Any]:
    """Run user code without recording gradients."""
    result: contextlib.AbstractContextManager[Any] = torch.no_grad()
    return result
