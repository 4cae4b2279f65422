"""Whether a CUDA graph of a step may be made, and whether it computes what the step computes.

A graph has memory of its own, as large as all that a step allocates. It is made only where that
memory and what the comparison needs are free, by what a run without a graph has taken. If memory
runs out later, all graphs are given up before the error counts (``without_graphs_if_oom``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from kbtrain.backends.torch.device import is_oom, peak_memory, reset_peak_memory

T = TypeVar("T")

MARGIN = 1.1
"""How much more memory than was measured must be free."""

TOLERANCE = 10.0
"""Tolerance of the comparison, relative to the differences between runs without a graph, which
differ where atomic additions are used."""

FLOOR = 1e-6
"""Relative difference that is always tolerated in float32: chance may not show in few runs."""

TRIES = 3
"""Runs with and without the graph that are compared, unless the first ones are equal."""


# --- memory ---------------------------------------------------------------------------------------


def measured(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """The result of ``run``, and how many bytes it had allocated at most."""
    before = torch.cuda.memory_allocated(device)
    reset_peak_memory(device)
    result = run()
    return result, max(0, peak_memory(device) - before)


def free_bytes(device: torch.device) -> int:
    """What could be allocated, with what the allocator would give back if asked."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device)  # 1, unless the program has set it
    free = max(0, min(int(free), int(share * total) - int(reserved)))
    return free + max(0, int(reserved) - int(torch.cuda.memory_allocated(device)))


def lack_of_memory(step: int, state: int, device: torch.device) -> str | None:
    """Why there is no memory for a graph; None if there is.

    When it is compared with the plain step, the memory of both and a copy of the state are in use.

    Args:
        step: Bytes that a plain run allocates.
        state: Bytes of the variables that it changes.
        device: The device.
    """
    wanted, free = int(MARGIN * (2 * step + state)), free_bytes(device)
    if wanted <= free:
        return None
    return (
        f"it needs {_mebibytes(wanted)} of free memory ({_mebibytes(step)} for itself, as much for "
        f"the comparison with the plain step, {_mebibytes(state)} for a copy of the state, and a "
        f"margin), and {_mebibytes(free)} are free"
    )


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


def without_graphs_if_oom(
    run: Callable[[], T],
    state: Sequence[torch.Tensor],
    device: torch.device,
    release: Callable[[], bool],
) -> T:
    """Run; if memory runs out, give up the graphs and try again if nothing has been changed.

    Args:
        run: What runs without a graph.
        state: The tensors that it may change.
        device: The device.
        release: Gives up all graphs; returns whether there were any.
    """
    random = random_state(device)
    versions = [tensor._version for tensor in state]
    try:
        return run()
    except Exception as error:
        changed = [tensor._version for tensor in state] != versions
        if not is_oom(error) or not release() or changed:
            raise
    # Outside of the handler, where the error keeps the memory of the run alive.
    set_random_state(random, device)
    return run()


# --- random state ---------------------------------------------------------------------------------


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The state of the generators of the CPU and of a GPU."""
    return [torch.get_rng_state(), torch.cuda.get_rng_state(device)]


def set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    """Restore the result of ``random_state``."""
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state(state[1], device)


# --- comparison -----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a run has computed.

    Attributes:
        numbers: On the host, float64 of shape (tensors, 3): sum and norm of each tensor, and
            whether it differs from what it was before.
        random: The random state after the run.
    """

    numbers: torch.Tensor
    random: list[torch.Tensor]


def summary(tensors: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ``numbers`` of an outcome.

    Args:
        tensors: Results and changed variables.
        before: The values before the run of as many of the last tensors.
    """
    rows = []
    olds = [None] * (len(tensors) - len(before)) + list(before)
    for tensor, old in zip(tensors, olds, strict=True):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        values = real if real.is_floating_point() else real.double()
        total = values.sum(dtype=torch.float64)
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
        moved = torch.zeros_like(total) if old is None else (tensor != old).any().double()
        rows.append(torch.stack([total, norm, moved]))
    return torch.nan_to_num(torch.stack(rows).cpu()) if rows else torch.zeros(0, 3)


def floors(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The difference in each tensor that is always tolerated, in units of its norm."""

    def floor(dtype: torch.dtype) -> float:
        if not (dtype.is_floating_point or dtype.is_complex):
            return 0.0
        return max(FLOOR, 2 * float(torch.finfo(dtype).eps))

    return torch.tensor([floor(tensor.dtype) for tensor in tensors], dtype=torch.float64)


def agree(replayed: Sequence[Outcome], plain: Sequence[Outcome], tolerated: torch.Tensor) -> bool:
    """Whether every run of a graph is like a run without it, as far as these are alike.

    Args:
        replayed: Outcomes of the graph.
        plain: Outcomes without it, from the same state.
        tolerated: The result of ``floors``.
    """
    if not tolerated.numel():
        return _same_random(replayed, plain)
    pairs = [(a, b) for i, a in enumerate(plain) for b in plain[:i]]
    noise = torch.zeros_like(tolerated)
    for a, b in pairs:
        noise = torch.maximum(noise, _distances(a.numbers, b.numbers))
    limit = torch.maximum(tolerated, TOLERANCE * noise)
    moved = torch.stack([outcome.numbers[:, 2] for outcome in plain])
    for outcome in replayed:
        near = [_distances(outcome.numbers, other.numbers) <= limit for other in plain]
        if not torch.stack(near).any(0).all():
            return False
        if not (moved == outcome.numbers[:, 2]).any(0).all():
            return False
    return _same_random(replayed, plain)


def _same_random(replayed: Sequence[Outcome], plain: Sequence[Outcome]) -> bool:
    expected = plain[0].random
    return all(all(map(torch.equal, other.random, expected)) for other in replayed)


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The differences between two summaries, in units of the norms."""
    norms = torch.maximum(a[:, 1], b[:, 1]).clamp(min=torch.finfo(torch.float64).tiny)
    return (a[:, :2] - b[:, :2]).abs().amax(1) / norms
