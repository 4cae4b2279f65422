"""The train step of a run, compiled for devices that need not be there: ``ProgramFacts``.

``Trainer.fit`` is prepared as usual, on shapes alone, with other arguments if that is asked for, up
to the first step that it would compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kbtrain.backends.step_program import CompilerTarget, StepProgram
from kbtrain.callbacks.library.throughput import count_flops
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import (
    Block,
    count_samples,
    map_structure,
    signature,
    unpack,
    without_none,
)
from kbtrain.data.batch import named_leaves
from kbtrain.data.token_count import count_tokens
from kbtrain.distributed import placement
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.model import precision
from kbtrain.model.variables import unique
from kbtrain.optimization import division
from kbtrain.plan.devices import target_config
from kbtrain.plan.program import ProgramFacts
from kbtrain.plan.rehearsal import given_optimizer, rehearsing
from kbtrain.plan.run_backend import JAX, RunBackend
from kbtrain.tracing.captured import CapturedValues
from kbtrain.tracing.position import Position
from kbtrain.tracing.retrace import Traces
from kbtrain.training.fit import prepare, wrapped_calls
from kbtrain.utils import float64, rng
from kbtrain.utils.machine.devices import DeviceSpec
from kbtrain.utils.machine.processes import current
from kbtrain.utils.packages import keras_private

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

CPU = "cpu"


def compile_program(
    trainer: TrainerBase,
    *,
    device: DeviceSpec | None = None,
    count: int = 1,
    changes: Mapping[str, Any] | None = None,
    backend: RunBackend = JAX,
) -> ProgramFacts:
    """Compile the train step of ``trainer.fit()`` and return what is known of it.

    Nothing is run, and no array is made for it: state that the optimizer would have, activations
    and batches are shapes only. Afterwards the Trainer, its model and the random state are as
    before. Of the training data one batch is read; a batch of another size has its shapes.

    Args:
        trainer: The Trainer; the backend must be JAX.
        device: What to compile for. If it is None, or XLA's compiler for it is not installed, the
            program is that of this machine's processor, and what it says of memory an estimate.
        count: The number of devices.
        changes: Arguments (fields of ``TrainingArguments``) to use in place of the Trainer's.
        backend: The backend of the run.

    Raises:
        ConfigurationError: The step cannot be compiled: it runs in Python, or the arguments do not
            fit together or to so many devices.
        OutOfMemoryError: The compiler found that the step does not fit into the device.
    """
    began = time.perf_counter()
    changes = dict(changes or {})
    _check(trainer, changes)
    args = _arguments(trainer.args, count, changes)
    backend.check_division(args)
    kind = compiler_target(device)
    if kind is not None and not trainer.backend.has_compiler_for(kind.platform):
        kind = None
    with rehearsing(trainer, "plan", _kept_here) as first, _steps_anew(trainer):
        if first is None:
            raise ConfigurationError("The training data has no batches; see dataloader_drop_last.")
        rows, accumulation = args.total_train_batch_size, args.gradient_accumulation_steps
        batch = _of_size(first, rows, trainer)
        block = _block(batch, rows, accumulation)
        with _precision(trainer, args), _only_batch(trainer, batch):
            model_flops = _model_flops(trainer, batch)
            program = trainer.backend.compile_step_for(
                lambda: _first_update(trainer, block), kind, count
            )
        facts = _facts(
            trainer,
            program,
            block,
            device=device,
            count=count,
            model_flops=model_flops,
            seconds=time.perf_counter() - began,
        )
        if args.fsdp is not None and count > 1 and not backend.divides_weights:
            return _divided_by_variables(trainer, facts, backend)
        return facts


def _check(trainer: TrainerBase, changes: Mapping[str, Any]) -> None:
    if current().size > 1:
        raise ConfigurationError(
            "plan compiles for any number of devices in one process. Received: "
            f"{current().size} processes. Start one."
        )
    if trainer.is_in_train:
        raise ConfigurationError("plan cannot be called by a callback during fit().")
    of_optimizer = [name for name in ("optim", "optim_args", "ema") if name in changes]
    if of_optimizer and given_optimizer(trainer) is not None:
        raise ConfigurationError(
            f"The optimizer of this run was passed in ({type(given_optimizer(trainer)).__name__}), "
            f"so {' and '.join(of_optimizer)} would change nothing. Leave the optimizer to the "
            "arguments to compare others."
        )


def compiler_target(device: DeviceSpec | None) -> CompilerTarget | None:
    """What XLA compiles for; None for this machine's processor, and for a device it cannot know."""
    if device is None or device.target is None:
        return None
    platform = str(device.target["platform"])
    if platform == "cuda":
        major, _, minor = str(device.target["compute_capability"]).partition(".")
        return CompilerTarget(
            device.name,
            platform,
            config=target_config(device),
            per_host=device.linked_devices,
            compute_capability=(int(major), int(minor or 0)),
        )
    return CompilerTarget(device.name, platform, topology=str(device.target["topology"]))


def _arguments(
    args: TrainingArguments, count: int, changes: Mapping[str, Any]
) -> TrainingArguments:
    """The arguments of the run on so many devices."""
    names = [f"gpu:{i}" for i in range(count)] if count > 1 else None
    return args.replace(**{"devices": names, "use_cpu": False, **changes})


def _kept_here(variables: list[keras.Variable]) -> Callable[[], None]:
    """Keep the values of variables, which nothing overwrites, and their layouts."""
    held = [*variables, rng.global_seed_variable()]
    values = list(keras_private.read_values(held))
    layouts = [keras_private.get_layout(v) for v in held]

    def put_back() -> None:
        for variable, layout in zip(held, layouts, strict=True):
            keras_private.set_layout(variable, layout)
        keras_private.write_values(held, values)

    return put_back


@contextlib.contextmanager
def _steps_anew(trainer: TrainerBase) -> Iterator[None]:
    """Context in which steps are traced apart from those of ``fit``, as shapes."""
    before = trainer.position, trainer.captured, trainer.traces
    trainer.position = Position(trainer.backend)
    trainer.captured = CapturedValues(trainer)
    trainer.traces = Traces(
        trainer.backend, trainer.position, trainer.captured, lambda: trainer.state
    )
    try:
        yield
    finally:
        trainer.position, trainer.captured, trainer.traces = before


@contextlib.contextmanager
def _precision(trainer: TrainerBase, args: TrainingArguments) -> Iterator[None]:
    """Context in which the model computes as other arguments say than those it was bound with."""
    before, policy = trainer.args, None
    trainer.args = args  # the rehearsal puts them back
    if (before.bf16, before.fp16) != (args.bf16, args.fp16):
        policy = "mixed_bfloat16" if args.bf16 else "mixed_float16" if args.fp16 else "float32"
    with precision.computing_in(trainer.model, policy):
        yield


@contextlib.contextmanager
def _only_batch(trainer: TrainerBase, batch: Any) -> Iterator[None]:
    """Context in which the training data are one batch."""
    mine = vars(trainer).get("get_train_dataloader")
    vars(trainer)["get_train_dataloader"] = lambda: [batch]
    try:
        yield
    finally:
        del vars(trainer)["get_train_dataloader"]
        if mine is not None:
            vars(trainer)["get_train_dataloader"] = mine


# --- the first update -----------------------------------------------------------------------------


def _of_size(batch: Any, rows: int, trainer: TrainerBase) -> Any:
    """A batch of so many rows with the shapes of another; it takes no memory."""
    there = count_samples(batch, trainer.bound.label_names)

    def one(x: Any) -> Any:
        length = math.ceil(x.shape[0] * rows / max(there, 1))
        return np.broadcast_to(x[:1], (length, *x.shape[1:]))

    return map_structure(one, batch)


def _block(batch: Any, rows: int, accumulation: int) -> Block:
    """One update of equal micro-batches; it takes no memory."""
    kind, lead = ("single", (1,)) if accumulation == 1 else ("stacked", (1, accumulation))
    chunk = map_structure(lambda x: np.broadcast_to(x, (*lead, *x.shape)), batch)
    outline = (signature(batch),) * accumulation
    return Block([{kind: chunk}], 1, 1, accumulation, rows * accumulation, outline)


def _first_update(trainer: TrainerBase, block: Block) -> None:
    """Prepare a run as ``fit`` does, and begin its first update."""
    args = trainer.args
    with placement.settings(trainer.backend, args, trainer.model):
        run = prepare(trainer, None)
        with contextlib.closing(run.batches), wrapped_calls(trainer):
            run.step(trainer.backend.to_device(without_none(block.chunks)), block)


def _model_flops(trainer: TrainerBase, batch: Any) -> float | None:
    """The operations of forward and backward pass for a micro-batch; None if it is unknown."""
    if trainer.bound.overridden.train_step:
        return None
    try:
        with float64.kept(trainer.model):
            return count_flops(trainer, without_none(batch))
    except Exception:  # compiling the step explains it better, if it fails, too
        return None


# --- what is known of it --------------------------------------------------------------------------


def _facts(
    trainer: TrainerBase,
    program: StepProgram,
    block: Block,
    *,
    device: DeviceSpec | None,
    count: int,
    model_flops: float | None,
    seconds: float,
) -> ProgramFacts:
    accumulation = block.micro_batches
    optimizers = [x for x in (trainer.optimizer, *trainer.other_optimizers.values()) if x]
    slots = {id(v) for each in optimizers for v in each.variables}
    weights = trainer.model.weights
    trained = {id(v) for v in trainer.model.trainable_variables}
    parameters, optimizer, others, trainable = 0, 0, 0, 0
    known = {id(v) for v in weights}
    for variable, size in program.state:
        if id(variable) in slots:
            optimizer += size
        elif id(variable) in known:
            parameters += size
            trainable += size if id(variable) in trained else 0
        else:
            others += size
    flops = program.flops if model_flops is None else model_flops * accumulation / count
    here = program.platform == CPU
    links, network = program.sent_over(count if device is None else device.linked_devices)
    return ProgramFacts(
        compiled_for=CPU if here or device is None else device.name,
        device_count=count,
        batch_size=block.samples,
        accumulation=accumulation,
        samples=block.samples,
        tokens=_tokens(trainer, block),
        parameters=sum(math.prod(v.shape) for v in weights),
        parameter_bytes=parameters,
        trainable_bytes=trainable,
        gradient_bytes=trainable,
        optimizer_bytes=optimizer,
        other_state_bytes=others,
        batch_bytes=program.batch_bytes,
        temporary_bytes=program.temporary_bytes,
        program_bytes=program.program_bytes,
        peak_bytes=program.peak_bytes,
        flops=flops,
        program_flops=program.flops,
        bytes_accessed=program.bytes_accessed,
        collectives=dict(program.collectives),
        link_bytes=links,
        network_bytes=network,
        exact=_exact(device, program, count, model_flops is None),
        compile_seconds=seconds,
    )


def _divided_by_variables(
    trainer: TrainerBase, facts: ProgramFacts, backend: RunBackend
) -> ProgramFacts:
    """The facts of a run whose processes divide optimizer state by whole variables.

    The compiled program divides each variable evenly. Here the process with the most counts.
    """
    optimizers = [x for x in (trainer.optimizer, *trainer.other_optimizers.values()) if x]
    for each in optimizers:
        division.check_divisible(each)
    share = division.largest_share(trainer.model.trainable_variables, facts.device_count)
    scalars, slots = 0, 0
    for variable in unique([v for each in optimizers for v in each.variables]):
        size = math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
        scalars += 0 if variable.shape else size
        slots += size if variable.shape else 0
    optimizer = scalars + round(share * slots)
    return dataclasses.replace(
        facts,
        optimizer_bytes=optimizer,
        peak_bytes=facts.peak_bytes + optimizer - facts.optimizer_bytes,
        exact={
            **facts.exact,
            "state": f"computed: weights are whole on {backend.title}, and the optimizer's state "
            "is divided by whole variables; this is the process with the most",
            "memory": "estimated: the program divides gradients and the optimizer's state evenly, "
            f"{backend.title} by whole variables, and gradients not before all are computed",
        },
    )


def _exact(
    device: DeviceSpec | None, program: StepProgram, count: int, whole: bool
) -> dict[str, str]:
    """For each group of figures, whether it is a fact or an estimate."""
    here = program.platform == CPU
    found = {
        "state": "compiled: the shapes of the step's state and inputs",
        "flops": "compiled: products and convolutions of the whole program, as those of the model "
        "alone cannot be told"
        if whole
        else "compiled: products and convolutions, counted as it was traced",
    }
    if count > 1:
        found["flops"] += (
            f"; all of them divided by {count} devices, so that a device which computes some whole "
            "(an optimizer's products of weights that are not divided) computes more"
        )
    if attention := _attention(device, program):
        found["attention"] = attention
    unknown = f"unknown: the program's text has {program.unknown_collectives}; times are without"
    if not here or device is None:
        return found | {
            "memory": "compiled: what XLA has planned in this program",
            "collectives": unknown
            if program.unknown_collectives
            else "compiled: the operations of this program",
        }
    extra = "plan-gpu" if device.kind == "gpu" else "plan-tpu"
    why = (
        f"{device.name} is not known to XLA's compilers"
        if device.target is None
        else f"with the extra {extra} it is that for {device.name}"
    )
    return found | {
        "memory": "estimated: activations and scratch memory are those of the program for this "
        f"machine's processor; {why}",
        "collectives": unknown
        if program.unknown_collectives
        else "estimated: the operations are those of the program for as many processors",
    }


def _attention(device: DeviceSpec | None, program: StepProgram) -> str:
    """How attention was compiled, if a run on the device may compute it differently."""
    how, _, reason = program.attention.partition(": ")
    scores = "with all scores in memory"
    if device is None or how not in ("cudnn", "scores", "refused", "unknown"):
        return ""
    if how == "cudnn":
        return "compiled: cuDNN's kernel, which Keras uses on this GPU in half precision"
    if how == "refused":
        return (
            f"estimated: {scores}, as XLA cannot compile cuDNN's kernel here ({reason}); Keras "
            "uses it on this GPU, which takes less memory"
        )
    if how == "unknown":
        return (
            "unknown: whether Keras would use a kernel of cuDNN's on this device, which this JAX "
            f"decides elsewhere; compiled {scores} if not"
        )
    if device.kind == "tpu":
        return (
            f"estimated: {scores}; on a TPU Keras uses a kernel for lengths that fit it, which "
            "takes less memory"
        )
    if program.platform == CPU:
        return (
            f"estimated: {scores}; on GPUs of compute capability 8.0 and above Keras uses cuDNN's "
            "kernel in half precision, which takes less memory"
        )
    return ""


def _tokens(trainer: TrainerBase, block: Block) -> int | None:
    """The tokens of an update; None for data that does not look like any."""
    names = trainer.bound.label_names
    (batch,) = block.chunks[0].values()
    axes = 2 + (block.micro_batches > 1)  # those of the update, the micro-batch, the sample
    if all(x.ndim != axes + 1 for _, x in named_leaves(unpack(batch, names).x)):
        return None
    try:
        return count_tokens(block.chunks, 1, "all", names)
    except DataError:
        return None
