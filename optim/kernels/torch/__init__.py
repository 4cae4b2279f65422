"""Execution on PyTorch: a fused kernel over lists of tensors where one exists, else the rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import keras
import torch

from optim.core.fallback import PrivateApi, report
from optim.core.precision import working_dtype
from optim.kernels.torch import custom_op
from optim.kernels.torch.adafactor import run_adafactor
from optim.kernels.torch.custom_op import NumberedObjects, settings_of
from optim.kernels.torch.eight_bit import run_eight_bit
from optim.kernels.torch.elementwise import record_program, run_elementwise
from optim.kernels.torch.recording import NotElementwise
from optim.kernels.torch.refresh import refresh  # noqa: F401
from optim.kernels.torch.rule_groups import RuleGroups, on_device
from optim.kernels.torch.stacked import is_stackable, stacks, update_stack
from optim.kernels.torch.triton_kernels.coded import coding_of

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def no_gradient() -> AbstractContextManager[Any]:
    """Variables are parameters that require a gradient; their update must not be recorded."""
    result: AbstractContextManager[Any] = torch.no_grad()
    return result


def colocated(variable: Any) -> AbstractContextManager[Any]:
    """Keras places every variable on the one device of its scope."""
    return nullcontext()


def outside_of_tracing() -> AbstractContextManager[Any]:
    """PyTorch always executes."""
    return nullcontext()


def dense_gradient(gradient: Any, variable: Any, as_it_is: bool = False) -> Any:
    """The gradient as a dense tensor of the working dtype, or of its own on a GPU."""
    if not torch.is_tensor(gradient):  # an array of NumPy's
        gradient = keras.ops.convert_to_tensor(gradient)
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if as_it_is and custom_op.on_gpu(gradient.device):
        return gradient  # kernels read it in any dtype; `execute` makes float32 of it for others
    return _widened(gradient, variable)


def _widened(gradient: torch.Tensor, variable: Any) -> torch.Tensor:
    dtype = torch.float64 if working_dtype(variable) == "float64" else torch.float32
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


def next_step(iterations: Any, dtype: str) -> Any:
    """The number of the update, 1 at the first, as a scalar."""
    at = iterations if torch.is_tensor(iterations) else _storage(iterations)
    if dtype == str(torch.get_default_dtype()).removeprefix("torch.") == "float32":
        return at + 1.0  # one operation; exact up to 2 ** 24, as the other order is
    return (at + 1).to(getattr(torch, dtype))


def execute(
    optimizer: Any, gradients: list[Any], variables: list[Any], step: Any, learning_rate: Any
) -> None:
    """Run the fused equivalent of each rule, one call per update rule, or the rule itself."""
    in_place = optimizer.kernel is None and not _in_stateless_scope()
    groups = RuleGroups()
    matrices: list[tuple[Any, Any]] = []
    batches: dict[Any, _Batch] = {}
    failures: list[Exception] = []
    wide_step, wide_rate = step, learning_rate
    if step.dtype is torch.float64:  # some variables are, and the others have kernels for float32
        step, learning_rate = step.float(), learning_rate.float()
    for gradient, variable in zip(gradients, variables, strict=True):
        update_rule = optimizer.update_rule_of(variable)
        parameter = _storage(variable)
        in_list = in_place and _fused(update_rule.optimizer) and _fusible(parameter)
        if in_list and _has_kernel_of_its_own(update_rule.optimizer, parameter):
            slots = {n: _storage(slot) for n, slot in optimizer.slots_of(variable).items()}
            if groups.add(update_rule, parameter, gradient, slots):
                continue
        gradient = _widened(gradient, variable)
        if in_place and _fusible(parameter) and _is_stacked(update_rule.optimizer, parameter):
            matrices.append((gradient, variable))
            continue
        if not in_list:
            optimizer.update_variable(gradient, variable, wide_step, wide_rate)
            continue
        key = update_rule, parameter.device
        if key not in batches:
            batches[key] = _Batch(failure=_failure(*key))
        batch = batches[key]
        if batch.failure is not None:
            optimizer.update_variable(gradient, variable, step, learning_rate)
            failures.append(batch.failure)
            continue
        batch.add(parameter, gradient, optimizer.slots_of(variable))
    groups.run(step, learning_rate)
    for group in stacks(matrices, optimizer):
        update_stack(group, optimizer, step, learning_rate, _storage)
    for (update_rule, device), batch in batches.items():
        if batch.parameters:
            batch.run(
                _fused(update_rule.optimizer),
                update_rule.optimizer,
                on_device(step, device),
                update_rule.learning_rate(on_device(learning_rate, device)),
                update_rule.weight_decay,
            )
    if failures:  # the rule itself does not fail
        report(
            "Updating lists of tensors in place",
            "torch",
            failures[0],
            "The rule runs as it is written, which takes longer.",
        )


def _asks_the_scope() -> bool:
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    return bool(in_stateless_scope())


_in_stateless_scope = PrivateApi(
    "Asking for a stateless scope",
    "keras",
    _asks_the_scope,
    lambda: True,
    "The rule runs as it is written, which takes longer.",
)
"""Whether values belong to the caller, so that nothing may be changed in place."""

_FAILURES: NumberedObjects[Exception | None] = NumberedObjects()


def _failure(update_rule: Any, device: torch.device) -> Exception | None:
    """What a rule's kernel fails with in this version of PyTorch, before anything is changed."""
    rule, weight_decay = update_rule.optimizer, update_rule.weight_decay
    key = (weight_decay, device, settings_of(rule))
    return _FAILURES[_FAILURES.number(rule, key, lambda: _tried(rule, weight_decay, device))]


def _tried(rule: Any, weight_decay: float, device: torch.device) -> Exception | None:
    kernel = _fused(rule)
    try:
        if isinstance(kernel, functools.partial) and kernel.func is run_eight_bit:
            rule = rule.full
            kernel = _fused(rule)
        if kernel is run_elementwise:
            record_program(rule, weight_decay, device)
        elif kernel is not run_adafactor:
            _outside_of_modes(lambda: _try_on_one_number(kernel, rule, weight_decay, device))
    except NotElementwise:
        raise
    except Exception as error:
        return error
    return None


def _outside_of_modes(fn: Callable[[], None]) -> None:
    """Run ``fn`` in a thread: what records operations in this one does not see those of another."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fn).result()


def _try_on_one_number(
    kernel: Callable[..., None], rule: Any, weight_decay: float, device: torch.device
) -> None:
    def one() -> torch.Tensor:
        return torch.ones(1, dtype=torch.float32, device=device)

    slots = {name: [one()] for name in rule.slot_shapes((1,))}
    with torch.no_grad():
        kernel(rule, [one()], [one()], slots, one().squeeze(), one().squeeze(), weight_decay)


def _fused(rule: Any) -> Any:
    """What executes a rule over lists of tensors: a fused kernel, the rule in tiles, or None."""
    name = getattr(type(rule).update, "fused", None) or ""
    if (
        name == "sgd" and rule.dampening
    ):  # PyTorch's first step differs, and the kernel cannot tell which one is first
        name = ""
    if name == "eight_bit":
        kernel = _fused(rule.full)
        return kernel and functools.partial(run_eight_bit, kernel)
    elementwise = getattr(type(rule).update, "elementwise", False)
    return FUSED.get(name) or (run_elementwise if elementwise else None)


def _has_kernel_of_its_own(rule: Any, parameter: torch.Tensor) -> bool:
    """Whether a kernel is made of a rule, on a GPU.

    Of those that PyTorch has kernels for as well: its own launch one for every 320 pieces, or 36
    tensors, have no other form for a tensor with a residual, and write scaled gradients back.
    """
    full = rule.full if coding_of(rule) is not None else rule
    return custom_op.on_gpu(parameter.device) and bool(
        getattr(type(full).update, "elementwise", False)
    )


def _is_stacked(rule: Any, parameter: torch.Tensor) -> bool:
    return custom_op.on_gpu(parameter.device) and is_stackable(rule)


def _storage(variable: Any) -> torch.Tensor:
    """The tensor a variable holds, to be changed in place.

    Not `keras.Variable.value`: that is a cast copy inside an autocast scope, and it looks up three
    scopes at every access, which is half of the time of an update of a small model.
    """
    try:
        return variable._value
    except AttributeError as error:
        value = variable.value
        report("Reading the tensor of a variable", "keras", error, "It is read the public way.")
        return value


def _fusible(parameter: torch.Tensor) -> bool:
    # The fused kernels walk raw memory: every list has to be dense and in the same order.
    return (
        parameter.is_contiguous()
        and parameter.dtype is not torch.float64
        and parameter.device.type in _FUSED_DEVICES
    )


@dataclass
class _Batch:
    """Tensors that share an update rule and are updated by one call of a fused kernel.

    Attributes:
        failure: What the kernel fails with; the tensors are then updated one by one.
    """

    parameters: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    slots: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    failure: Exception | None = None
    low_precision: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list
    )

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor, slots: dict[str, Any]) -> None:
        if "residual" in slots:
            residual = _storage(slots["residual"])
            master = _joined(parameter, residual)
            self.low_precision.append((parameter, residual, master))
            parameter = master
        self.parameters.append(parameter)
        self.gradients.append(gradient if gradient.is_contiguous() else gradient.contiguous())
        for name, slot in slots.items():
            if name != "residual":
                self.slots.setdefault(name, []).append(_storage(slot))

    def run(
        self,
        fused: Callable[..., None],
        optimizer: Any,
        step: torch.Tensor,
        learning_rate: torch.Tensor,
        weight_decay: float,
    ) -> None:
        fused(
            optimizer,
            self.parameters,
            self.gradients,
            self.slots,
            step,
            learning_rate,
            weight_decay,
        )
        for parameter, residual, master in self.low_precision:
            parameter.copy_(master)
            residual.copy_(_remainder(master, parameter))


def _joined(parameter: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """`optim.core.precision.join`, with casts that eager PyTorch always executes."""
    wide = parameter.float()
    master = wide + residual
    return torch.where(master.to(parameter.dtype) == parameter, master, wide)


def _remainder(master: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What rounding ``master`` to ``parameter`` has cut off, 0 where it overflowed."""
    return torch.nan_to_num_(master - parameter, nan=0.0, posinf=0.0, neginf=0.0)


def _fused_adam(
    operation: str,
    rule: Any,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: dict[str, list[torch.Tensor]],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
) -> None:
    """PyTorch's own fused Adam or AdamW; step and learning rate stay on the device."""
    getattr(torch, operation)(
        parameters,
        gradients,
        slots["momentum"],
        slots["velocity"],
        slots.get("velocity_max", []),
        [step] * len(parameters),
        lr=learning_rate,
        beta1=rule.beta_1,
        beta2=rule.beta_2,
        weight_decay=weight_decay,
        eps=rule.epsilon,
        amsgrad=rule.amsgrad,
        maximize=False,
    )


def _fused_sgd(
    rule: Any,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: dict[str, list[torch.Tensor]],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
) -> None:
    """PyTorch's own fused SGD. A buffer of zeros without dampening needs no first step."""
    torch._fused_sgd_(
        parameters,
        gradients,
        slots.get("momentum", []),
        weight_decay=weight_decay,
        momentum=rule.momentum,
        lr=learning_rate,
        dampening=0.0,
        nesterov=rule.nesterov,
        maximize=False,
        is_first_step=False,
    )


def _fused_adagrad(
    rule: Any,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: dict[str, list[torch.Tensor]],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
) -> None:
    """PyTorch's own fused Adagrad."""
    torch._fused_adagrad_(
        parameters,
        gradients,
        slots["accumulator"],
        [step] * len(parameters),
        lr=learning_rate,
        lr_decay=rule.lr_decay,
        weight_decay=weight_decay,
        eps=rule.epsilon,
        maximize=False,
    )


FUSED: dict[str, Callable[..., None]] = {
    "adam": functools.partial(_fused_adam, "_fused_adam_"),
    "adamw": functools.partial(_fused_adam, "_fused_adamw_"),
    "sgd": _fused_sgd,
    "adagrad": _fused_adagrad,
    "adafactor": run_adafactor,
}


def take(table: Any, indices: Any) -> Any:
    """``table[indices]``, without Keras' handling of negative indices."""
    return torch.index_select(table, 0, indices.reshape(-1)).reshape(indices.shape)


def squared_norm(x: Any) -> Any:
    """The sum of the squares of all elements of a tensor."""
    return keras.ops.sum(x * x)


def mean_product(x: Any, y: Any) -> Any:
    """The mean of the products of the elements of two tensors."""
    return keras.ops.mean(x * y)


def singular_vectors(matrix: Any) -> Any:
    """The singular vectors on the smaller side of a matrix, as columns, the largest first.

    They are eigenvectors of a product with itself, which takes a third of the time of a singular
    value decomposition. In float64 squares lose nothing that float32 has; of a float64 matrix they
    would.
    """
    wide = (matrix if matrix.shape[0] < matrix.shape[1] else matrix.T).double()
    return torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1).to(matrix.dtype)


def matrix_dtype(x: Any) -> str:
    """bfloat16 where products of matrices are much faster in it: on a GPU with units for it."""
    if not custom_op.on_gpu(x.device):
        return "float32"
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0):
        return "bfloat16"
    return "float32"
