"""The interface of the backends ``kbtrain.backends.{jax,tensorflow,torch}``.

The modules themselves implement it; a test compares the signatures. The meaning of a function is
documented here, and details of one framework in its module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from kbtrain.backends.rows import LocalRows
from kbtrain.backends.step_program import CompilesAhead
from kbtrain.utils.array_blocks import OwnedBlocks, ReadBlock
from kbtrain.utils.files.chrome_trace import Span
from kbtrain.utils.machine.processes import ProcessGroup

Updates = Sequence[tuple[keras.Variable, Any]]
"""Variables with the values to assign to them."""


class StateLayout(Protocol):
    """How state is divided among devices, see ``kbtrain.distributed.layouts``."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The axes of the mesh of devices, outermost first, and their sizes."""

    def axes_of(self, variables: Sequence[keras.Variable]) -> list[tuple[str | None, ...]]:
        """The axis along which each dimension of each variable is divided; None: it is whole."""


class Backend(CompilesAhead, Protocol):
    """A framework that Keras runs on.

    Attributes:
        name: Its name in Keras: "jax", "tensorflow" or "torch".
        TAKES_STRINGS: Whether tensors can hold strings and be ragged.
        HAS_MESHES: Whether one process can train on several devices.
    """

    name: str
    TAKES_STRINGS: bool
    HAS_MESHES: bool

    # --- compiled steps -------------------------------------------------------------------------

    def compile_step(
        self,
        fn: Callable[[Any], Any],
        variables: Sequence[keras.Variable],
        jit_compile: bool | str = "auto",
    ) -> Callable[[Any], Any]:
        """Compile ``fn(inputs) -> outputs``, which reads and assigns ``variables``."""

    def compile_steps(
        self,
        fn: Callable[[Any], Any],
        variables: Sequence[keras.Variable],
        jit_compile: bool | str = "auto",
        calls: int = 0,
    ) -> Callable[[Any, int], Any]:
        """Compile several consecutive calls of ``fn`` into one.

        Args:
            fn: The step, over the chunks of one update.
            variables: All variables that it reads or assigns.
            jit_compile: Whether to use XLA, where that is optional.
            calls: The expected number of calls; 0 if unknown.

        Returns:
            ``run(block, count) -> results``, with a leading axis over updates.
        """

    def compile_eval_steps(
        self,
        fn: Callable[[Any], Any],
        variables: Sequence[keras.Variable],
        changing: Sequence[keras.Variable],
        jit_compile: bool | str = "auto",
        output_bytes: int = 4 << 20,
    ) -> Callable[[Any, int, int], tuple[Any, int]]:
        """Like ``compile_steps``, for steps that change few variables and may have large outputs.

        Args:
            fn: The evaluation step, over one batch.
            variables: All variables that it reads.
            changing: Those that it assigns.
            jit_compile: Whether to use XLA, where that is optional.
            output_bytes: Limit on the size of the outputs of one call, unless a single batch
                exceeds it.

        Returns:
            ``run(block, start, count) -> (results, number of batches that were run)``.
        """

    def compile_model_steps(
        self,
        fn: Callable[[Any], Any],
        variables: Sequence[keras.Variable],
        jit_compile: bool | str,
        eagerly: bool,
    ) -> Callable[[Any, int], Any]:
        """Like ``compile_steps``, for a custom step of the model."""

    # --- custom steps of a model ----------------------------------------------------------------

    def check_signature(self, model: keras.Model, name: str) -> None:
        """Check that a step has the signature that Keras uses on this framework."""

    def run_train_step(self, model: keras.Model, data: Any) -> Any:
        """Run one update by the model's ``train_step`` and return its result."""

    def try_train_step(self, model: keras.Model, data: Any) -> None:
        """Run the model's ``train_step`` only to create its variables."""

    def run_test_step(self, model: keras.Model, data: Any) -> Any:
        """Update the metrics with one batch, using the model's ``test_step``."""

    def run_predict_step(self, model: keras.Model, data: Any) -> Any:
        """Compute the outputs for one batch, using the model's ``predict_step``."""

    def reversible(
        self, fn: Callable[[], Any], variables: Sequence[keras.Variable]
    ) -> tuple[Any, Callable[[Any], None]]:
        """Run ``fn``; return its result and ``undo_if(condition)``, which reverts its changes."""

    # --- inside a step --------------------------------------------------------------------------

    def value_and_grad(
        self,
        fn: Callable[..., tuple[Any, Any]],
        variables: Sequence[keras.Variable],
        *args: Any,
    ) -> tuple[Any, Any, list[Any], list[tuple[keras.Variable, Any]]]:
        """Differentiate ``fn(*args) -> (scalar, aux)`` with respect to ``variables``.

        Returns:
            The scalar, ``aux``, the gradients, and the assignments that layers requested.
        """

    def dropping(self) -> contextlib.AbstractContextManager[keras.StatelessScope]:
        """A scope that discards assignments and collects the losses of layers."""

    def scan(
        self, fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any
    ) -> tuple[Any, Any]:
        """``carry, output = fn(carry, x)`` for each x along the leading axis of ``inputs``."""

    def recompute(
        self,
        fn: Callable[[Sequence[Any]], list[Any]],
        tensors: Sequence[Any],
        variables: Sequence[keras.Variable],
    ) -> list[Any]:
        """Run ``fn(tensors) -> list of tensors``, recomputing it in the backward pass."""

    def commit_if(self, condition: Any, updates: Updates) -> None:
        """Assign each new value where ``condition`` (a boolean scalar on the device) holds."""

    def run_if(
        self, condition: Any, fn: Callable[[], None], variables: Sequence[keras.Variable]
    ) -> None:
        """Run ``fn``, keeping what it assigns to ``variables`` only where ``condition`` holds."""

    def with_rollback(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[Any], None]]:
        """Run ``fn``, which assigns variables through ``commit_if``.

        Returns:
            Its result, and ``undo_if(condition)``.
        """

    def apply_optimizer(
        self,
        optimizer: keras.optimizers.Optimizer,
        gradients: Sequence[Any],
        factor: Any,
        variables: Sequence[keras.Variable],
    ) -> None:
        """Apply the gradients, multiplied by the scalar ``factor``, to ``variables``."""

    def global_norm(self, gradients: Sequence[Any]) -> Any:
        """The Euclidean norm over all gradients, in float32, or in float64 if any of them is."""

    def accept_numbers(self, cls: type) -> None:
        """Make the framework's functions accept objects of a class as their ``value``."""

    def is_symbolic(self, variable: keras.Variable) -> bool:
        """Whether a step is being traced that has ``variable`` in its state."""

    def stateless_scope(self) -> Any:
        """The scope that a step runs in, or None."""

    def inference(self) -> contextlib.AbstractContextManager[Any]:
        """Run user code without recording gradients."""

    def ragged(self, dense: Any, lengths: Sequence[Any]) -> Any:
        """Create the ragged tensor represented by ``kbtrain.data.ragged.Ragged``.

        Args:
            dense: Its values, padded.
            lengths: The lengths of the rows along each ragged axis, padded.

        Raises:
            NotImplementedError: The framework has no ragged tensors; such data is rejected
                earlier.
        """

    # --- several processes ----------------------------------------------------------------------

    def joined_processes(self) -> tuple[int, int] | None:
        """``(rank, size)`` if the framework's processes have been joined by another program."""

    def start_processes(self, group: ProcessGroup, timeout: float) -> None:
        """Join the processes of ``group`` through the framework's own runtime.

        Args:
            group: The processes and the place of this one; ``size`` is at least 2.
            timeout: Seconds that a collective operation may take.

        Raises:
            ConfigurationError: Tensors exist already and the framework does not allow it then.
            DistributedError: A process cannot be reached, or the port is taken.
        """

    def stop_processes(self) -> None:
        """Leave the processes; do nothing if none were joined."""

    def exchange(self, data: bytes) -> list[bytes]:
        """The ``data`` of every process, in order of rank. All processes call it alike.

        It is called on the host, between steps, for small messages.
        """

    def shards(self) -> int:
        """The number of processes or devices whose rows of a batch a step sees separately.

        It is 1 where a step sees whole batches: with one process, and where the framework itself
        divides the step (JAX, over a mesh). Otherwise ``all_sum`` adds up that many.
        """

    def all_sum(self, tensors: Sequence[Any]) -> list[Any]:
        """The sums over all shards of each tensor, inside a step.

        Tensors of one dtype travel together, in buckets. The result is the same on all processes,
        bit for bit. It is differentiable: the gradient of a sum is the sum of the gradients.
        """

    def all_gather(self, tensors: Sequence[Any]) -> list[Any]:
        """Each tensor of all shards along a new first axis, in their order, inside a step.

        The shapes are the same on all shards. Not differentiable.
        """

    def sum_to_owners(self, tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
        """Like ``all_sum``, where each sum is needed by one process; not differentiable.

        Args:
            tensors: Tensors of the same shapes on all processes.
            owners: The rank of the process that needs the sum, for each.

        Returns:
            The sums for which this process is the owner, and None in place of the others.
        """

    def gather_from_owners(self, tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
        """Each tensor as its owner has it, inside or between steps.

        Args:
            tensors: This process's values; the others have the same shapes and dtypes.
            owners: The rank of the process whose value counts, for each.
        """

    def exchange_settings(
        self, library: str | None, timeout: float, bucket_megabytes: float | None
    ) -> contextlib.AbstractContextManager[None]:
        """Context that applies settings of how processes exchange tensors.

        Args:
            library: The library that must be in use, "gloo" or "nccl"; None takes any.
            timeout: Seconds that an operation may take.
            bucket_megabytes: What one operation of ``all_sum`` carries at most; None is the
                default.

        Raises:
            ConfigurationError: Another library is in use, or there are no such buckets.
        """

    def copy_from_first(self, variables: Sequence[keras.Variable]) -> None:
        """Give variables the values that they have in process 0; all processes call it alike."""

    def local_rows(self, batch: Any) -> contextlib.AbstractContextManager[LocalRows]:
        """Context in which a step runs on its rows of a batch from ``to_device``.

        Random numbers drawn inside for a tensor of as many rows as the batch has here are those
        of the whole batch, and of them those of these rows.
        """

    def check_model(self, model: keras.Model) -> None:
        """Check that the variables of a model hold what it computes with.

        Raises:
            ConfigurationError: The framework has divided the model behind Keras' back.
        """

    def checksums(self, variables: Sequence[keras.Variable]) -> list[int | None]:
        """A number for each variable, the same for the same bits; None if it is divided.

        Args:
            variables: Variables of floating-point numbers.
        """

    def owned_blocks(self, variable: keras.Variable) -> OwnedBlocks | None:
        """The blocks of a variable that this process saves; None if its value is whole here.

        The blocks of all processes make up the variable, without overlap. Their values are on the
        device; ``host_view`` takes them.
        """

    def whole_value(self, variable: keras.Variable) -> np.ndarray:
        """The value of a variable on the host, whole even if no process has all of it.

        All processes call it alike, in the main thread.
        """

    def spans_devices(self, variable: keras.Variable) -> bool:
        """Whether a variable's value is laid out over several devices, here or elsewhere."""

    def assign_blocks(self, variable: keras.Variable, read: ReadBlock) -> None:
        """Assign a variable and keep its layout; each process reads what its devices hold.

        Args:
            variable: The variable.
            read: Returns the values of any block, with the variable's dtype.
        """

    # --- host and device ------------------------------------------------------------------------

    def to_device(self, tree: Any, pin: bool = False) -> Any:
        """Copy a structure of NumPy arrays to the device.

        With several processes or devices each takes its rows of the batches (see ``local_rows``).

        Args:
            tree: The chunks of a block, or the batches of an evaluation along a leading axis.
            pin: Whether to use page-locked memory, where that makes the copy faster.
        """

    def to_host(self, tree: Any) -> Any:
        """Wait for a structure of tensors and return it as NumPy arrays."""

    def start_to_host(self, tree: Any) -> Callable[[], Any]:
        """Start copying tensors to the host; the result waits for the copy and returns it."""

    def host_view(self, value: Any) -> np.ndarray:
        """A read-only view of a variable's value on the host, without a copy if possible."""

    def synchronize(self) -> None:
        """Wait for all pending computations."""

    def prepare(self) -> None:
        """Choose what can only be chosen before anything runs; each Trainer calls it first."""

    def place(self, variables: Sequence[keras.Variable], device: str | None) -> None:
        """Move the values of ``variables`` to ``device``; do nothing if it is None."""

    def device_scope(
        self, device: str | None, layout: StateLayout | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Context in which new tensors are placed on ``device`` ("cpu", "gpu:1") or the default.

        Args:
            device: The device, or several with commas.
            layout: How ``place`` divides state among them, where the backend has meshes.
        """

    def initializing(self) -> contextlib.AbstractContextManager[None]:
        """Context inside ``device_scope`` in which new variables are divided from the start."""

    def devices(self) -> list[str]:
        """The devices of this process, by the names that ``device_scope`` takes."""

    def device_info(self, device: str | None = None) -> str:
        """A readable name of the device in use."""

    def memory_stats(self) -> dict[str, int]:
        """Bytes in use and at the peak on the accelerator; empty on a CPU (no counters)."""

    def is_oom(self, error: BaseException) -> bool:
        """Whether ``error`` means that the device ran out of memory."""

    def free_memory(self) -> None:
        """Release cached memory."""

    # --- what a step costs ----------------------------------------------------------------------

    def start_profile(self, folder: Path) -> Callable[[], tuple[Path, list[Span]]]:
        """Start the framework's profiler.

        Args:
            folder: An empty folder for what it writes.

        Returns:
            A function that stops it. It returns a trace in the Chrome format, and the operations
            that ran: those of the accelerator, or of the CPU if there is none.
        """

    def count_flops(
        self, fn: Callable[[Any], Any], variables: Sequence[keras.Variable], inputs: Any
    ) -> float:
        """The floating-point operations of products and convolutions in ``fn(inputs)``.

        It is traced, not run, if possible: nothing changes. Both the multiplication and the
        addition count. What else a step does, and kernels that the framework knows nothing about,
        counts nothing.

        Args:
            fn: A function of a structure of tensors.
            variables: All variables that it reads or assigns.
            inputs: NumPy arrays.
        """

    def tf32_is_on(self) -> bool:
        """Whether products in float32 use TensorFloat-32 on a GPU that has it."""

    # --- numbers --------------------------------------------------------------------------------

    def numerics(
        self, tf32: bool | None, deterministic: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Context that sets the precision of float32 products, and deterministic kernels."""

    def cuda_graphs(self, wanted: bool | str) -> contextlib.AbstractContextManager[None]:
        """Context in which captured steps become CUDA graphs or not: "auto", True or False.

        Raises:
            ConfigurationError: True, and the framework has no captured steps.
        """

    def rng_state(self) -> dict[str, np.ndarray]:
        """The framework's random state, besides Keras' seed generators."""

    def set_rng_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore the result of ``rng_state``; that of another framework is ignored."""
