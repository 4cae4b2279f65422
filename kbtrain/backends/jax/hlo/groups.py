"""Which devices take part in a collective together, as XLA prints it."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_ALL = re.compile(r"replica_groups=\{\}")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_TILE = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'?([^':=,]+)'?(?::\((\d+)\)(\d+))?")


class UnknownGroupsError(ValueError):
    """The groups of a collective are printed in a form that is not known here."""


def groups_of(rest: str, devices: int) -> Groups:
    """The groups of devices that exchange something; of a permutation, the pairs.

    Args:
        rest: What is printed after the operation's name.
        devices: Number of devices.

    Raises:
        UnknownGroupsError: The form is not known.
    """
    if found := _PAIRS.search(rest):
        return _listed(found[1])
    if _ALL.search(rest):
        return (tuple(range(devices)),)
    if found := _LISTED.search(rest):
        groups = _listed(found[1])
    elif found := _IOTA.search(rest):
        groups = _rows(_ids(found[3]).reshape(int(found[1]), int(found[2])))
    elif found := _MESH.search(rest):
        groups = _of_mesh(found[1], found[2] or "", found[3])
    else:
        printed = rest.partition("replica_groups=")[2][:80] or "nothing"
        raise UnknownGroupsError(f"the groups of a collective, printed as {printed!r}")
    # Numbers of replicas (the only one, of which all partitions take part), not of devices.
    replicas = "channel_id=" in rest and "use_global_device_ids=true" not in rest
    return (tuple(range(devices)),) if replicas and groups == ((0,),) else groups


@functools.lru_cache(maxsize=256)
def _listed(text: str) -> Groups:
    found = re.findall(r"\{([\d,]*)\}", text)
    return tuple(tuple(int(n) for n in each.split(",") if n) for each in found)


@functools.lru_cache(maxsize=256)
def _of_mesh(axes: str, order: str, grouped: str) -> Groups:
    """``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}``: a group is all along some axes."""
    sizes = dict(re.findall(r"'?([^'=,]+)'?=(\d+)", axes))
    names, lengths = list(sizes), [int(n) for n in sizes.values()]
    ids = _ids(order) if order else np.arange(math.prod(lengths))
    if not names or ids.size != math.prod(lengths):
        raise UnknownGroupsError(f"the groups of a collective, of the mesh {axes!r}, {order!r}")
    cuts: dict[str, list[tuple[int, int]]] = {}
    for name, before, length in (found.groups() for found in _AXIS.finditer(grouped)):
        if name not in sizes:
            raise UnknownGroupsError(f"the groups of a collective, along {grouped!r}")
        whole = int(sizes[name])
        cuts.setdefault(name, []).append((int(before or 1), int(length or whole)))
    shape: list[int] = []
    along: list[int] = []
    for name, whole in zip(names, lengths, strict=True):
        at = 1
        for before, length in sorted(cuts.get(name, [])):  # 'a':(2)4 is a part of the axis
            shape += [before // at, length]
            along.append(len(shape) - 1)
            at = before * length
        shape.append(whole // at)
    if math.prod(shape) != ids.size:
        raise UnknownGroupsError(f"the groups of a collective, along {grouped!r} of {axes!r}")
    across = [i for i in range(len(shape)) if i not in along]
    members = math.prod(shape[i] for i in along)
    return _rows(ids.reshape(shape).transpose(across + along).reshape(-1, members))


def _ids(text: str) -> np.ndarray:
    """Device numbers: ``[4,2]T(1,0)``, counted in one order and read in another, or a list."""
    if found := _TILE.fullmatch(text):
        shape = [int(n) for n in found[1].split(",")]
        ids = np.arange(math.prod(shape)).reshape(shape)
        return (ids.transpose([int(n) for n in found[2].split(",")]) if found[2] else ids).ravel()
    try:
        return np.asarray([int(n) for n in text.split(",")])
    except ValueError as error:
        raise UnknownGroupsError(f"the order of devices, printed as {text[:80]!r}") from error


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in ids.tolist())
