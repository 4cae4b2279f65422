"""The device that a run is planned for: one of the table, or a user's own in a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kbtrain.config import yaml
from kbtrain.errors import ConfigurationError
from kbtrain.utils.machine.devices import DeviceSpec, known_devices

RESERVES = {"gpu": 0.08, "tpu": 0.03}
"""The part of the memory that is kept for the framework, where a file does not say it."""

_POSITIVE = ("memory_bytes", "bandwidth", "link_bandwidth", "linked_devices", "network_bandwidth")
_NEEDED = ("memory_bytes", "peak_flops", "bandwidth")
_OF_TARGET = {"memory_bytes": "device_memory_size", "bandwidth": "memory_bandwidth"}
"""Figures of a device that XLA has to know, and their names there."""

_TARGETS = {
    "tpu": (("topology",), ()),
    "cuda": (
        ("description", "compute_capability"),
        (
            *("core_count", "fpus_per_core", "shared_memory_per_core", "l2_cache_size"),
            *("shared_memory_per_block_optin", "threads_per_core_limit", "clock_rate_ghz"),
            *("device_memory_size", "memory_bandwidth"),
        ),
    ),
}
"""For each platform what a target must say: texts, and numbers."""

_DTYPES = ("bfloat16", "float16", "tensorfloat32", "float32")


def device_named(device: str | os.PathLike[str] | DeviceSpec) -> DeviceSpec:
    """The device of a name or file.

    Args:
        device: A name such as "h100" or "v5e"; the path of a YAML file; or a specification.

    Raises:
        ConfigurationError: The name is unknown, or the file is not a specification.
    """
    if isinstance(device, DeviceSpec):
        return device
    if not isinstance(device, str | os.PathLike) or not os.fspath(device):
        raise ConfigurationError(
            f"device must be a name such as 'h100', or the path of a YAML file. Received: "
            f"{device!r}."
        )
    text = os.fspath(device)
    if text.lower().endswith((".yaml", ".yml")):
        return _from_file(Path(text).expanduser())
    wanted = text.lower().replace("_", "-").replace(" ", "-")
    named = {each.name: each for each in known_devices()}
    everything = named | {other: each for each in named.values() for other in each.aliases}
    if wanted in everything:
        return everything[wanted]
    close = difflib.get_close_matches(wanted, everything, n=1, cutoff=0.5)
    nearest = f" Did you mean {everything[close[0]].name}?" if close else ""
    raise ConfigurationError(
        f"There is no device {text!r}.{nearest} Known are {', '.join(sorted(named))}. For another "
        "one, write its figures into a file and give that: --device my.yaml (see docs/plan.md)."
    )


def _from_file(path: Path) -> DeviceSpec:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigurationError(f"The device {path} cannot be read: {problem}") from None
    return device_from(yaml.loads(text, str(path)), str(path))


def device_from(values: Mapping[str, Any], source: str) -> DeviceSpec:
    """A device of the figures that a user gives.

    Args:
        values: ``like``, the name of a known device whose figures are used where none is given;
            and figures under the names of the fields of ``DeviceSpec``. Without ``like`` at least
            ``memory_bytes``, ``peak_flops`` and ``bandwidth``.
        source: Where they are from, for messages.

    Raises:
        ConfigurationError: A name is unknown, a figure is missing or not a positive number.
    """
    fields = [each.name for each in dataclasses.fields(DeviceSpec)]
    own = ["like", *(name for name in fields if name not in ("pattern", "aliases"))]
    for name in values:
        if name not in own:
            close = difflib.get_close_matches(name, own, n=1)
            nearest = f" Did you mean {close[0]}?" if close else ""
            raise ConfigurationError(
                f"{source}: a device has no {name!r}.{nearest} It takes: {', '.join(own)}."
            )
    base: dict[str, Any] = {}
    if values.get("like") is not None:
        base = device_named(values["like"]).to_dict() | {"aliases": (), "pattern": ""}
        base |= {"title": "", "sources": ()}
    else:
        missing = [name for name in _NEEDED if name not in values]
        if missing:
            raise ConfigurationError(
                f"{source} must say {', '.join(missing)}, or name a device that it is like: "
                "`like: h100`."
            )
    given = {name: value for name, value in values.items() if name != "like"}
    found = base | given
    kind = found.setdefault("kind", "gpu")
    if kind not in RESERVES:
        raise ConfigurationError(f"{source}: kind must be gpu or tpu. Received: {kind!r}.")
    name = Path(source).stem
    found.setdefault("reserve", RESERVES[kind])
    found.setdefault("link_bandwidth", found["bandwidth"])
    found.setdefault("linked_devices", 1)
    found.setdefault("network_bandwidth", found["link_bandwidth"])
    for field in _POSITIVE:
        found[field] = _positive(found[field], f"{source}: {field}")
    for field in ("memory_bytes", "linked_devices"):
        found[field] = int(found[field])
    reserve = found["reserve"]
    if isinstance(reserve, bool) or not isinstance(reserve, int | float) or not 0 <= reserve < 1:
        raise ConfigurationError(
            f"{source}: reserve is a part of the memory, from 0 to 1. Received: {reserve!r}."
        )
    peaks = found["peak_flops"]
    if not isinstance(peaks, Mapping) or not peaks or set(peaks) - set(_DTYPES):
        raise ConfigurationError(
            f"{source}: peak_flops has a number of floating-point operations a second for each "
            f"dtype, of {', '.join(_DTYPES)}. Received: {peaks!r}."
        )
    found["peak_flops"] = {d: _positive(v, f"{source}: peak_flops.{d}") for d, v in peaks.items()}
    found["name"] = str(given.get("name", name))
    found["title"] = str(given.get("title", found["name"]))
    if "target" in given:
        _check_target(found["target"], source)
    elif found.get("target") is not None:  # of the device that it is like
        target = dict(found["target"])
        for field, of_target in _OF_TARGET.items():
            if field in given and of_target in target:
                target[of_target] = int(found[field])
        found["target"] = target
    sources = found.get("sources") or ()
    found["sources"] = (sources,) if isinstance(sources, str) else tuple(map(str, sources))
    return DeviceSpec(**found)


def _check_target(target: Any, source: str) -> None:
    """Check what a file says of the compiler's target."""
    if target is None:
        return
    if not isinstance(target, Mapping):
        raise ConfigurationError(f"{source}: target must be a mapping. Received: {target!r}.")
    platform = target.get("platform")
    if platform not in _TARGETS:
        raise ConfigurationError(
            f"{source}: target.platform must be cuda or tpu. Received: {platform!r}."
        )
    needed, numbers = _TARGETS[platform]
    if missing := [name for name in (*needed, *numbers) if name not in target]:
        raise ConfigurationError(
            f"{source}: the target of the platform {platform} must say {', '.join(missing)}, too."
        )
    for name in numbers:
        _positive(target[name], f"{source}: target.{name}")


def _positive(value: Any, what: str) -> float:
    """A figure; YAML reads ``80e9`` as a number and ``80 GB`` as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{what} must be a number, such as 80e9. Received: {value!r}.")
    if not 0 < value < math.inf:
        raise ConfigurationError(f"{what} must be above 0. Received: {value!r}.")
    return float(value)


def target_config(device: DeviceSpec) -> str:
    """The description of a GPU that XLA compiles for, as the text of a protocol buffer.

    Args:
        device: A device whose target has the platform "cuda".
    """
    assert device.target is not None
    target = dict(device.target)
    major, _, minor = str(target["compute_capability"]).partition(".")
    numbers_of = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": target["shared_memory_per_core"],
        "threads_per_core_limit": target["threads_per_core_limit"],
        "core_count": target["core_count"],
        "fpus_per_core": target["fpus_per_core"],
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": target["memory_bandwidth"],
        "l2_cache_size": target["l2_cache_size"],
        "clock_rate_ghz": target["clock_rate_ghz"],
        "device_memory_size": target["device_memory_size"],
        "shared_memory_per_block_optin": target["shared_memory_per_block_optin"],
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = [f"  {name}: {value}" for name, value in numbers_of.items()]
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor or 0} }}"
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            capability,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{target["description"]}"',
            "",
        ]
    )
