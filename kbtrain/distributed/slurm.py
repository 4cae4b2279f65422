"""SLURM's abbreviations for lists of hosts and of numbers of tasks."""

from __future__ import annotations

import itertools
import re

from kbtrain.errors import ConfigurationError


def expand_hosts(text: str) -> list[str]:
    """Write out a list of hosts, in order.

    Args:
        text: A list as in ``SLURM_STEP_NODELIST``.

    Raises:
        ConfigurationError: It is not such a list.

    Example:
        >>> expand_hosts("node[08-10,12],gpu5")
        ['node08', 'node09', 'node10', 'node12', 'gpu5']
    """
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\]|,)+", text):
        raise _malformed("SLURM_STEP_NODELIST", text, "node[01-03,7],gpu5")
    hosts = []
    for part in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text, range, text, range, ..., text
        choices = [
            _expand_ranges(piece, text) if number % 2 else [piece]
            for number, piece in enumerate(pieces)
        ]
        hosts += ["".join(combination) for combination in itertools.product(*choices)]
    return hosts


def expand_counts(text: str) -> list[int]:
    """Write out the number of tasks on each host.

    Args:
        text: A list as in ``SLURM_STEP_TASKS_PER_NODE``.

    Raises:
        ConfigurationError: It is not such a list.

    Example:
        >>> expand_counts("2(x3),1")
        [2, 2, 2, 1]
    """
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise _malformed("SLURM_STEP_TASKS_PER_NODE", text, "2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def hosts_of_tasks(
    nodes: str, tasks_per_node: str, distribution: str
) -> tuple[list[str], list[tuple[int, int]]]:
    """Where each task of a step runs.

    Args:
        nodes: ``SLURM_STEP_NODELIST``.
        tasks_per_node: ``SLURM_STEP_TASKS_PER_NODE``.
        distribution: ``SLURM_DISTRIBUTION``: "cyclic" deals the tasks out to the hosts in turn;
            anything else is taken for "block", which fills one host after the other.

    Returns:
        The hosts, and for each task the index of its host and its own index there.
    """
    hosts, counts = expand_hosts(nodes), expand_counts(tasks_per_node)
    if len(hosts) != len(counts):
        raise ConfigurationError(
            f"SLURM_STEP_NODELIST={nodes!r} names {len(hosts)} hosts, and "
            f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} has tasks for {len(counts)}. srun sets "
            "both: do not change them in the script."
        )
    places = [(host, task) for host, count in enumerate(counts) for task in range(count)]
    if distribution.startswith("cyclic"):
        places.sort(key=lambda place: (place[1], place[0]))
    return hosts, places


def _expand_ranges(text: str, whole: str) -> list[str]:
    """``01-03,7`` as 01, 02, 03, 7."""
    numbers = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found:
            raise _malformed("SLURM_STEP_NODELIST", whole, "node[01-03,7],gpu5")
        first, last = found[1], found[2] or found[1]
        numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return numbers


def _malformed(name: str, text: str, example: str) -> ConfigurationError:
    return ConfigurationError(
        f"The environment variable {name} must be a list such as {example}; srun sets it. "
        f"Received: {name}={text!r}"
    )
