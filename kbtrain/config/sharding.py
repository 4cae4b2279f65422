"""Converters of the fields about state that is divided among devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from kbtrain.config.converters import FrozenDict, InvalidValue, options, plain, whole

AXES = ("data", "fsdp", "tensor")
"""The axes of a mesh of devices, outermost first."""

_OF_ACCELERATE = {"dp_replicate_size": "data", "dp_shard_size": "fsdp", "tp_size": "tensor"}
_OTHERS = ("cp_size", "sp_size")
_INACTIVE = ("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt")


def fsdp(value: Any) -> Literal["full_shard", "shard_grad_op"] | None:
    """What is divided: True or "full_shard", "shard_grad_op", or None for nothing."""
    value = plain(value)
    if value is None or value is False or value in ("", [], (), {}):
        return None
    if value is True:
        return "full_shard"
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    expected = "True, 'full_shard', 'shard_grad_op', or None"
    if not isinstance(words, list | tuple):
        raise InvalidValue(expected)
    # Transformers writes 'full_shard auto_wrap'; which variables are divided is a rule here.
    found = [word for word in words if word != "auto_wrap"]
    if found == ["full_shard"]:
        return "full_shard"
    if found == ["shard_grad_op"]:
        return "shard_grad_op"
    raise InvalidValue(
        f"{expected} ('hybrid_shard' is a mesh: parallelism_config={{'data': 2, 'fsdp': 4}}; "
        "there is no 'offload')"
    )


def fsdp_config(value: Any) -> FrozenDict | None:
    """Options of the division: ``min_num_params`` and ``layouts``."""
    found = dict(options(value))
    for name in _INACTIVE:
        if found.get(name) is False:
            del found[name]
    if unknown := found.keys() - {"min_num_params", "layouts"}:
        raise InvalidValue(
            "a dict with 'min_num_params' (elements from which a variable is divided) and "
            "'layouts' (pattern of a path -> the axis of the mesh for each dimension), without "
            + ", ".join(sorted(map(repr, unknown)))
        )
    if "min_num_params" in found:
        found["min_num_params"] = whole(0)(found["min_num_params"])
    layouts = found.get("layouts", {})
    if not isinstance(layouts, Mapping) or not all(map(_is_layout, layouts.values())):
        raise InvalidValue(
            "'layouts' that map a regular expression to an axis ('fsdp', 'tensor') or None for "
            "each dimension, such as {'mlp/kernel': [None, 'tensor']}"
        )
    for pattern in layouts:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidValue(
                f"'layouts' with regular expressions as keys; {pattern!r} is none ({error})"
            ) from None
    return FrozenDict(found) if found else None


def _is_layout(axes: Any) -> bool:
    if not isinstance(axes, tuple):
        return False
    named = [axis for axis in axes if axis is not None]
    return all(axis in AXES for axis in named) and len(set(named)) == len(named)


def parallelism_config(value: Any) -> FrozenDict | None:
    """Sizes of the axes of a mesh: a dict, or an object with Accelerate's attributes."""
    names = [*AXES, *_OF_ACCELERATE, *_OTHERS]
    if value is None or value is False or value in ("", [], (), {}):
        return None
    if not isinstance(value, Mapping | str):
        value = {n: getattr(value, n) for n in names if getattr(value, n, None) is not None}
    found = dict(options(value))
    unknown = found.keys() - set(names)
    if unknown or not found:
        what = f", without {', '.join(map(repr, sorted(unknown)))}" if found else ""
        raise InvalidValue(f"a dict with the sizes of {', '.join(map(repr, AXES))}{what}")
    sizes = {_OF_ACCELERATE.get(name, name): whole(1)(size) for name, size in found.items()}
    if any(sizes.pop(name, 1) != 1 for name in _OTHERS):
        raise InvalidValue("without cp_size and sp_size: sequences are not divided")
    return FrozenDict({name: sizes[name] for name in AXES if name in sizes}) or None
