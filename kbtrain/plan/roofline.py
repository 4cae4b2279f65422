"""The least time an update can take: a bound from published figures, not a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kbtrain.plan.program import ProgramFacts
from kbtrain.utils.json_types import JsonDataclass
from kbtrain.utils.machine.devices import DeviceSpec

ASSUMPTION = (
    "Times: every operation at the published peak, all transfers behind computation, and memory "
    "answers what kernels read (caches may be faster for small tensors). Collectives use all "
    "links and network cards at once, and each part of a value leaves a machine once."
)


@dataclass(frozen=True)
class Roofline(JsonDataclass):
    """A lower bound of the time of an update, and what follows from it.

    Attributes:
        dtype: The dtype of the products, which the peak is of.
        compute_seconds: Operations of the program, divided by the peak; None without a peak.
        memory_seconds: Memory traffic divided by the bandwidth; None if the traffic is unknown.
        network_seconds: What a device sends over its links, divided by their bandwidth, or what
            leaves a group of linked devices, divided by that of the network, if that is longer.
        seconds: The longest of these.
        bound_by: "compute", "memory" or "network".
        samples_per_second: Samples of all devices at that time: the run is not faster.
        tokens_per_second: Likewise, for data of tokens; None for others.
        mfu: Model FLOPs utilization at that time: a run has less. None without a peak.
    """

    dtype: str
    compute_seconds: float | None
    memory_seconds: float | None
    network_seconds: float
    seconds: float
    bound_by: str
    samples_per_second: float
    tokens_per_second: float | None
    mfu: float | None


def roofline(facts: ProgramFacts, device: DeviceSpec, dtype: str, tf32: bool = True) -> Roofline:
    """The bound for a program on a number of devices.

    Args:
        facts: The program.
        device: The device; ``facts.device_count`` of them.
        dtype: The dtype that the model computes in.
        tf32: Whether products in float32 may use TensorFloat-32.
    """
    peak = device.peak(dtype, tf32)
    compute = None if peak is None else facts.program_flops / peak
    memory = None if facts.bytes_accessed is None else facts.bytes_accessed / device.bandwidth
    times = {
        "compute": compute or 0.0,
        "memory": memory or 0.0,
        "network": network_seconds(facts, device),
    }
    bound_by = max(times, key=lambda name: times[name])
    seconds = times[bound_by]
    return Roofline(
        dtype=_shown_dtype(device, dtype, tf32),
        compute_seconds=compute,
        memory_seconds=memory,
        network_seconds=times["network"],
        seconds=seconds,
        bound_by=bound_by,
        samples_per_second=_rate(facts.samples, seconds),
        tokens_per_second=None if facts.tokens is None else _rate(facts.tokens, seconds),
        mfu=None if peak is None or not seconds else facts.flops / peak / seconds,
    )


def network_seconds(facts: ProgramFacts, device: DeviceSpec) -> float:
    """The least time of all collectives of an update: of links and network, both at once."""
    sent = facts.link_bytes
    if sent is None:
        sent = float(sum(size for _, size in facts.collectives.values()))
    seconds = sent / device.link_bandwidth
    if facts.network_bytes:
        seconds = max(seconds, facts.network_bytes / device.network_bandwidth)
    return seconds


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else math.inf


def _shown_dtype(device: DeviceSpec, dtype: str, tf32: bool) -> str:
    """The dtype of the peak: that of products, which may differ from that of the values."""
    if dtype != "float32":
        return dtype
    if tf32 and "tensorfloat32" in device.peak_flops:
        return "tensorfloat32"
    return "float32" if "float32" in device.peak_flops else "bfloat16"
