"""Fields about how several processes exchange what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kbtrain.config import converters
from kbtrain.config.construction import Immutable
from kbtrain.config.fields.option import HARMLESS, ROUNDING, option


@dataclass(kw_only=True)
class ProcessFields(Immutable):
    """The connection between processes; without effect in a run of one."""

    # Exchange between processes
    ddp_backend: Literal["gloo", "nccl"] | None = option(
        None,
        converters.optional(converters.choice("gloo", "nccl")),
        "The library that processes exchange tensors with. It follows from the device ('nccl' "
        "between GPUs, 'gloo' between CPUs); another one is an error.",
        on_resume=HARMLESS,
    )
    ddp_timeout: int = option(
        1800,
        converters.whole(1),
        "Seconds that processes wait for one that does not get on, before the run fails.",
        on_resume=HARMLESS,
    )
    ddp_bucket_cap_mb: float | None = option(
        None,
        converters.optional(converters.real(above=0.0)),
        "Size in megabytes of the buckets in which gradients travel (torch); each is sent as soon "
        "as the backward pass has filled it. None means 25.",
        on_resume=ROUNDING,
    )
