"""What is published of accelerators: memory, peak speed, bandwidths. The table is devices.json."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from kbtrain.utils.json_types import JsonDataclass

TABLE = "devices.json"


@dataclass(frozen=True)
class DeviceSpec(JsonDataclass):
    """One accelerator; ``devices.json`` says how each figure was chosen.

    Attributes:
        name: The short name, as on the command line.
        title: The name to show.
        kind: "gpu" or "tpu".
        memory_bytes: Memory that a program is given.
        reserve: The part of it that is kept for the framework, from 0 to 1.
        peak_flops: Dense products, in floating-point operations a second, by dtype: bfloat16,
            float16, tensorfloat32, float32.
        bandwidth: Bytes a second of the memory.
        link_bandwidth: Bytes a second that a device can send over all its links, in one direction.
        linked_devices: Number of devices that these links connect.
        network_bandwidth: Bytes a second between such groups, in one direction, per device.
        target: What XLA has to know to compile for the device; None if that is unknown.
        pattern: Regular expression for the name that a framework gives the device.
        aliases: Other short names.
        sources: Addresses of the pages that the figures are from.
    """

    name: str
    title: str
    kind: str
    memory_bytes: int
    reserve: float
    peak_flops: Mapping[str, float]
    bandwidth: float
    link_bandwidth: float
    linked_devices: int
    network_bandwidth: float
    target: Mapping[str, Any] | None = None
    pattern: str = ""
    aliases: Sequence[str] = ()
    sources: Sequence[str] = ()

    @property
    def usable_bytes(self) -> int:
        """Memory without the reserve."""
        return int(self.memory_bytes * (1 - self.reserve))

    def peak(self, dtype: str, tf32: bool = True) -> float | None:
        """Floating-point operations a second of products in a dtype; None if unknown.

        Args:
            dtype: "bfloat16", "float16" or "float32".
            tf32: Whether products in float32 may use TensorFloat-32.
        """
        if dtype not in ("bfloat16", "float16", "float32"):
            return None
        if dtype == "float32":
            if tf32 and "tensorfloat32" in self.peak_flops:
                return self.peak_flops["tensorfloat32"]
            if "float32" in self.peak_flops or self.kind != "tpu":
                return self.peak_flops.get("float32")
            dtype = "bfloat16"  # a TPU's products in float32 use it
        return self.peak_flops.get(dtype, self.peak_flops.get("bfloat16"))


@functools.cache
def known_devices() -> tuple[DeviceSpec, ...]:
    """The devices of the table; of two whose patterns match a name the first is meant."""
    text = resources.files("kbtrain.utils.machine").joinpath(TABLE).read_text(encoding="utf-8")
    return tuple(DeviceSpec.from_dict(row) for row in json.loads(text)["devices"])


def recognized(name: str) -> DeviceSpec | None:
    """The device that a framework calls ``name``; None if it is not in the table."""
    return next((each for each in known_devices() if re.search(each.pattern, name)), None)
