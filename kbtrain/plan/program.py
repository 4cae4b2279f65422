"""``ProgramFacts``: what is known of a run's train step, compiled and not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from kbtrain.utils.json_types import JsonDataclass


@dataclass(frozen=True)
class ProgramFacts(JsonDataclass):
    """The train step of a run, compiled for some devices. Bytes are those of one device.

    Attributes:
        compiled_for: The device of the program, as in the name of a ``DeviceSpec``; "cpu" if the
            program is that of this machine's processor.
        device_count: Devices that train together.
        batch_size: Samples of an update on all devices, accumulation included.
        accumulation: Micro-batches of an update.
        samples: Samples that an update of the run has, on all devices: ``batch_size``.
        tokens: Tokens that these have; None for data without tokens.
        parameters: Number of scalars in the model's weights, before they are divided.
        parameter_bytes: The weights of the model.
        trainable_bytes: Those of them that are trained.
        gradient_bytes: A gradient for each of these. They are part of ``temporary_bytes``.
        optimizer_bytes: The state of the optimizer.
        other_state_bytes: The rest of the state: metrics, random generators, counters.
        batch_bytes: The samples of one update.
        temporary_bytes: Activations, gradients and scratch memory, at the fullest moment.
        program_bytes: The machine code.
        peak_bytes: All that the step needs at once.
        flops: Operations of products and convolutions of an update on one device, forward and
            backward, as the MFU counts them: what is computed again does not count.
        program_flops: The same of the whole program: also the optimizer, and what is computed
            again. Of several devices each computes at least that: all divided by their number,
            though an optimizer may compute products of whole weights on each.
        bytes_accessed: Memory traffic of an update, as XLA counts it; None where it does not.
        collectives: For each kind of collective operation: how many an update has, and the bytes
            that a device sends in them, as in a ring.
        link_bytes: What a device sends inside of its machine, over its links; None: all of that.
        network_bytes: What it sends out of it, where several machines train together.
        exact: For each group of figures, whether it is a fact of the program for the device or an
            estimate, in a sentence.
        compile_seconds: How long tracing and compiling took.
    """

    compiled_for: str
    device_count: int
    batch_size: int
    accumulation: int
    samples: int
    tokens: int | None
    parameters: int
    parameter_bytes: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    other_state_bytes: int
    batch_bytes: int
    temporary_bytes: int
    program_bytes: int
    peak_bytes: int
    flops: float
    program_flops: float
    bytes_accessed: float | None = None
    collectives: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    link_bytes: float | None = None
    network_bytes: float = 0.0
    exact: Mapping[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``, also of what has been JSON."""
        made = {kind: (int(n), int(size)) for kind, (n, size) in values["collectives"].items()}
        return super().from_dict({**values, "collectives": made})

    @property
    def state_bytes(self) -> int:
        """What stays on the device between updates."""
        return self.parameter_bytes + self.optimizer_bytes + self.other_state_bytes
