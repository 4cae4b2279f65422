"""What a step is compiled for without being run, and what is known of it then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras

from kbtrain.errors import ConfigurationError


@dataclass(frozen=True)
class CompilerTarget:
    """A kind of device that XLA compiles for.

    Attributes:
        name: Its name, for messages.
        platform: "cuda" or "tpu".
        topology: "v5e" and the like; "" for GPUs.
        config: XLA's description of a GPU, as text; "" for TPUs.
        per_host: The number of GPUs in a machine.
    """

    name: str
    platform: str
    topology: str = ""
    config: str = ""
    per_host: int = 8
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class StepProgram:
    """The compiled program of a step. Bytes are those of one device, numbers those of an update.

    Attributes:
        platform: "cpu", "cuda" or "tpu".
        state: The variables of the step, with the bytes of each.
        batch_bytes: Its other inputs.
        argument_bytes: All inputs, as they lie in memory.
        output_bytes: All results.
        alias_bytes: How much of the results takes the place of inputs.
        temporary_bytes: What is needed besides them at the fullest moment.
        program_bytes: The machine code.
        flops: Operations of products and convolutions, a device's part of all: what each device
            computes whole, as an optimizer's products of weights that are not divided, is not told
            apart, so that a device computes at least this.
        bytes_accessed: What kernels read and write.
        collectives: Kind of a collective operation -> how many there are, and the bytes that a
            device sends in them, as in a ring.
        unknown_collectives: What could not be read of them, so that ``collectives`` is empty.
        sent_over: Number of devices of a machine -> the bytes that a device sends inside of its
            machine, and out of it, at least.
        attention: How attention is computed: "cudnn" by cuDNN's kernel, "scores" with all scores
            in memory, "refused: ..." likewise, as the compiler here cannot compile cuDNN's;
            "unknown"; "" without attention that a kernel might compute.
        text: The program, as XLA prints it.
    """

    platform: str
    state: Sequence[tuple[keras.Variable, int]]
    batch_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    program_bytes: int
    flops: float
    bytes_accessed: float
    collectives: Mapping[str, tuple[int, int]]
    unknown_collectives: str
    sent_over: Callable[[int], tuple[float, float]]
    attention: str
    text: str

    @property
    def peak_bytes(self) -> int:
        """All that it needs at once."""
        held = self.argument_bytes + self.output_bytes - self.alias_bytes
        return held + self.temporary_bytes + self.program_bytes


class CompilesAhead(Protocol):
    """The part of a backend that compiles steps without running them.

    Attributes:
        COMPILES_AHEAD: Whether it can.
    """

    COMPILES_AHEAD: bool

    def has_compiler_for(self, platform: str) -> bool:
        """Whether steps can be compiled for devices of "cuda" or "tpu" that are not here."""

    def compile_step_for(
        self, run: Callable[[], Any], kind: CompilerTarget | None, count: int
    ) -> StepProgram:
        """Compile the first step that ``run`` would compile, and do not run it.

        Inside ``run`` arrays are shapes, and the names of devices ("gpu:0") are those of the
        target, by their number. What it assigns to variables must be put back afterwards.

        Args:
            run: Prepares a run and begins its first step; it is ended there.
            kind: The devices; None for the processor of this machine.
            count: Their number.

        Raises:
            ConfigurationError: The framework cannot do that, there is no compiler for the devices
                here, the step is not compiled, or the compiler refuses it.
            OutOfMemoryError: The compiler found that the step does not fit.
        """


# Those of frameworks that compile only what they run:


def has_compiler_for(platform: str) -> bool:
    """Whether steps can be compiled for "cuda" or "tpu": no."""
    return False


def compile_step_for(
    run: Callable[[], Any], kind: CompilerTarget | None, count: int
) -> StepProgram:
    """Not available.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        f"On the backend {keras.backend.backend()} a step cannot be compiled without running it. "
        "JAX can do that, and the model is the same there: set KERAS_BACKEND=jax."
    )
