"""What every backend offers: the contract of ``kbtrain.backends.{jax,tensorflow,torch}``.

The modules themselves fulfil it, function by function; a test compares the signatures. What a
function means is said here, what is particular about it on one framework, there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np

Updates = Sequence[tuple[keras.Variable, Any]]
"""Variables with the values they are to get."""


class Backend(Protocol):
    """A framework that Keras runs on.

    Attributes:
        name: The name Keras has for it: "jax", "tensorflow" or "torch".
        TAKES_STRINGS: Whether tensors can hold texts, and be ragged.
    """

    name: str
    TAKES_STRINGS: bool

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
        """Compile several calls of ``fn`` in a row as one.

        Args:
            fn: The step, over the chunks of one update.
            variables: All it reads and assigns.
            jit_compile: XLA, where it is a choice.
            calls: How many calls there will be; 0 where that is not known.

        Returns:
            ``run(block, count) -> results``, with a leading axis of that many updates.
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
            variables: All it reads.
            changing: Those it assigns.
            jit_compile: XLA, where it is a choice.
            output_bytes: Above these many bytes of outputs a call has one batch only.

        Returns:
            ``run(block, start, count) -> (results, how many batches they are of)``.
        """

    def compile_model_steps(
        self,
        fn: Callable[[Any], Any],
        variables: Sequence[keras.Variable],
        jit_compile: bool | str,
        eagerly: bool,
    ) -> Callable[[Any, int], Any]:
        """Like ``compile_steps``, for a step of the model's own."""

    # --- a model's own steps --------------------------------------------------------------------

    def check_signature(self, model: keras.Model, name: str) -> None:
        """Make sure that a step can be called as Keras calls it on this framework."""

    def run_train_step(self, model: keras.Model, data: Any) -> Any:
        """One update by the model's ``train_step``; what it returns."""

    def try_train_step(self, model: keras.Model, data: Any) -> None:
        """Run the model's ``train_step`` for the variables it creates."""

    def run_test_step(self, model: keras.Model, data: Any) -> Any:
        """Update the metrics with one batch by the model's ``test_step``."""

    def run_predict_step(self, model: keras.Model, data: Any) -> Any:
        """The outputs for one batch by the model's ``predict_step``."""

    def reversible(
        self, fn: Callable[[], Any], variables: Sequence[keras.Variable]
    ) -> tuple[Any, Callable[[Any], None]]:
        """Run ``fn``; return its result, and ``undo_if(condition)``, which undoes its changes."""

    # --- inside a step --------------------------------------------------------------------------

    def value_and_grad(
        self,
        fn: Callable[..., tuple[Any, Any]],
        variables: Sequence[keras.Variable],
        *args: Any,
    ) -> tuple[Any, Any, list[Any], list[tuple[keras.Variable, Any]]]:
        """Differentiate ``fn(*args) -> (scalar, aux)`` with respect to ``variables``.

        Returns:
            The scalar, ``aux``, the gradients, and what layers want to assign.
        """

    def dropping(self) -> contextlib.AbstractContextManager[keras.StatelessScope]:
        """A scope in which assignments are forgotten; losses of layers are collected."""

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
        """Run ``fn(tensors) -> list of tensors``; for gradients it is run again, not remembered."""

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
        """Update ``variables`` with the gradients times ``factor``, a scalar."""

    def global_norm(self, gradients: Sequence[Any]) -> Any:
        """Euclidean norm over all elements of all gradients, in float32, or float64 if any is."""

    def accept_numbers(self, cls: type) -> None:
        """Let the framework's functions take objects of a class for their ``value``; once."""

    def is_symbolic(self, variable: keras.Variable) -> bool:
        """Whether a step is being traced, of which ``variable`` is a part."""

    def stateless_scope(self) -> Any:
        """The scope that a step runs in, or None."""

    def inference(self) -> contextlib.AbstractContextManager[Any]:
        """Run user code without recording gradients."""

    def ragged(self, dense: Any, lengths: Sequence[Any]) -> Any:
        """The ragged tensor that ``kbtrain.data.ragged.Ragged`` stands for.

        Args:
            dense: Its values, padded.
            lengths: The lengths of the rows along each ragged axis, padded.

        Raises:
            NotImplementedError: The framework has none; such data is refused before.
        """

    # --- host and device ------------------------------------------------------------------------

    def to_device(self, tree: Any, pin: bool = False) -> Any:
        """Copy a structure of NumPy arrays to the device.

        Args:
            tree: The arrays.
            pin: By way of page-locked memory, where that makes the copy faster.
        """

    def to_host(self, tree: Any) -> Any:
        """Wait for a structure of tensors and return it as NumPy arrays."""

    def start_to_host(self, tree: Any) -> Callable[[], Any]:
        """Start copying tensors to the host; the result waits for the copy and returns it."""

    def host_view(self, value: Any) -> np.ndarray:
        """A variable's value on the host, in its own memory where that is there; read only."""

    def synchronize(self) -> None:
        """Wait until all computations that were started are done."""

    def place(self, variables: Sequence[keras.Variable], device: str | None) -> None:
        """Move the values of ``variables`` to ``device``; without one leave them."""

    def device_scope(self, device: str | None) -> contextlib.AbstractContextManager[None]:
        """Inside, new tensors go to ``device`` ("cpu", "gpu:1"), or to the default one."""

    def devices(self) -> list[str]:
        """The devices of this process, as ``device_scope`` takes them."""

    def device_info(self, device: str | None = None) -> str:
        """The device in use, as a person would name it."""

    def memory_stats(self) -> dict[str, int]:
        """Bytes in use and at the peak on the accelerator; empty on a CPU, which does not count."""

    def is_oom(self, error: BaseException) -> bool:
        """Whether ``error`` says that the device ran out of memory."""

    def free_memory(self) -> None:
        """Give memory that is held for later back to the device."""

    # --- numbers --------------------------------------------------------------------------------

    def numerics(
        self, tf32: bool | None, deterministic: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Precision of float32 products, and kernels that give the same result each time."""

    def rng_state(self) -> dict[str, np.ndarray]:
        """The framework's own random state, outside Keras' seed generators."""

    def set_rng_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore what ``rng_state`` returned; that of another framework has nothing for us."""
