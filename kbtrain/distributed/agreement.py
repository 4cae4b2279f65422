"""Whether all processes of a run do the same: facts compared before it, operations during it.

Processes that differ do not fail by themselves: they compute something, or wait for each other.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kbtrain.backends.collective_check import Operation
from kbtrain.errors import DistributedError
from kbtrain.utils.machine.processes import ProcessGroup

Exchange = Callable[[bytes], list[bytes]]
"""Gives the messages of all processes, in order of rank; all processes call it alike."""

NAMED = 3
"""Differences that a message names."""
SHOWN = 120
"""Characters of a value that a message shows."""


def agree(group: ProcessGroup, exchange: Exchange, facts: Mapping[str, Any]) -> None:
    """Check that all processes have the same facts. All of them call it.

    Checksums are compared first, so facts may be long, such as the shapes of all variables.

    Args:
        group: The processes.
        exchange: Carries the messages.
        facts: Values that JSON can hold, by the name that a message gives them.

    Raises:
        DistributedError: They differ; it is raised in all processes, and names the processes, the
            fact and both values.
    """
    if group.size == 1:
        return
    texts = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    digests = {name: _digest(text) for name, text in texts.items()}
    if len(set(exchange(_digest(json.dumps(digests, sort_keys=True)).encode()))) == 1:
        return
    found = _gather(exchange, digests)
    names = list(dict.fromkeys(name for each in found for name in each))
    different = [n for n in names if len({each.get(n) for each in found}) > 1][:NAMED]
    own = {name: [facts[name]] for name in different if name in facts}
    values = _gather(exchange, {"host": socket.gethostname(), "facts": own})
    sentences = [
        _difference(name, [each.get(name) for each in found], values) for name in different
    ]
    raise DistributedError(
        f"The processes of this run differ: {'; '.join(sentences)}. All processes have to run the "
        "same program with the same versions, arguments, data and model."
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _gather(exchange: Exchange, value: Any) -> list[Any]:
    return [json.loads(data) for data in exchange(json.dumps(value).encode())]


def _difference(name: str, digests: Sequence[str | None], values: Sequence[Any]) -> str:
    """What one process has for a fact, and what most others have.

    Args:
        name: The fact.
        digests: Its checksums on all processes; None on a process that does not have it.
        values: The host and the facts of each process.
    """
    counts = collections.Counter(digests)
    most = max(counts.values())
    usual = next(rank for rank, digest in enumerate(digests) if counts[digest] == most)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[usual])
    path, here, there = _first_difference(
        *(values[rank]["facts"].get(name, [_NOTHING])[0] for rank in (other, usual))
    )
    return (
        f"process {other} (host {values[other]['host']}) has {name}{path}={_short(here)}, process "
        f"{usual} (host {values[usual]['host']}) has {_short(there)}"
    )


def _first_difference(one: Any, other: Any) -> tuple[str, Any, Any]:
    """Where two JSON values differ first, and what each has there, or ``_NOTHING``."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys: Sequence[Any] = list(dict.fromkeys([*one, *other]))
        pairs = [(one.get(key, _NOTHING), other.get(key, _NOTHING)) for key in keys]
    elif isinstance(one, list) and isinstance(other, list):
        pairs = list(itertools.zip_longest(one, other, fillvalue=_NOTHING))
        keys = range(len(pairs))
    else:
        return "", one, other
    for key, pair in zip(keys, pairs, strict=True):
        # As text: 1, 1.0 and True are equal, and NaN is not.
        if len({json.dumps(value, sort_keys=True, default=repr) for value in pair}) > 1:
            path, here, there = _first_difference(*pair)
            return f"[{key!r}]{path}", here, there
    return "", one, other


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class CollectiveSequence:
    """The collective operations of this process in their order, compared with those of the others.

    Args:
        group: The processes.
        exchange: Carries the messages, and is no collective operation itself.
        place: Says what this process does, such as "update 17".
    """

    def __init__(
        self, group: ProcessGroup, exchange: Exchange, place: Callable[[], str] = lambda: ""
    ) -> None:
        self._group = group
        self._exchange = exchange
        self._place = place
        self._compared = 0

    def compare(self, operations: Sequence[Operation]) -> None:
        """Compare the operations that are about to run. All processes call it.

        Args:
            operations: What they do, such as "all_sum of float32[8]", or the lines of a program.

        Raises:
            DistributedError: They differ; it is raised in all processes, and names the first
                operation that does, or the first line.
        """
        facts: dict[str, Any] = {"the place": self._place()}
        for number, each in enumerate(operations, self._compared + 1):
            name = "collective operation" if isinstance(each, str) else "program"
            facts[f"{name} {number}"] = each
        self._compared += len(operations)
        agree(self._group, self._exchange, facts)
