"""A captured step as a CUDA graph: one launch in place of hundreds.

A CUDA graph replays operations on fixed memory. This suits a step: its variables are updated in
place, its inputs are copied into the graph's memory and its results out of it. The procedure:

1. A few updates run without a graph on the capture stream, as a warm-up of libraries.
2. The step is captured, which executes nothing, and then runs once without the graph.
3. The next update is computed twice from the same state: by the graph, then without it. The graph
   is used from then on only if results, variables and random state agree. The result without the
   graph is kept.

If the step is unsuitable, it continues without a graph and the reason is logged: the host needs a
value, memory is short, or a capture fails (it is not tried again). If the memory of a variable
changes, the procedure restarts.

All graphs share one memory pool: it holds nothing between launches, and the launches of a thread
are sequential.

No GPU was available for testing. It was tested with a stand-in for torch's graphs (``tests/``) that
records and replays operations, on a CPU and on a simulated GPU (docs/lab/pytorch-capture.md).

See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence

import torch

from kbtrain.backends.torch.capture.program import StepProgram, no_collection
from kbtrain.errors import causes, first_lines

logger = logging.getLogger("kbtrain")

RUNS_BEFORE = 3
"""Updates of a shape before its graph is captured, which does not pay off for rare shapes."""

MOST_GRAPHS = 16
"""Maximum number of graphs of a step, one per input shape."""

MOST_BYTES = 1 << 28
"""Maximum size of the inputs and results of a step, which are copied in each launch."""

MOST_BEGINNINGS = 4
"""How often the memory of variables may change before a step gives up on graphs."""

TOLERANCE = 10.0
"""Tolerance of the comparison, relative to the difference between two runs without a graph, which
differ where atomic additions are used."""

KIND = "cuda"
"""Device types that support graphs."""

IS_SAFE = torch.__version__ >= (2, 13)
"""In older versions a failed capture breaks the allocator and the random state."""

_Place = tuple[torch.device, int]
"""A device and a thread: the launches of one thread are sequential and can share memory."""

_ALIVE: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, _Place] = weakref.WeakKeyDictionary()
"""All graphs: a memory pool can only be shared while one of its graphs is alive."""

_CAPTURING = threading.Lock()
_TOO_LARGE = "its inputs and results are too large to copy them in each step"

Run = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], list[torch.Tensor]]


class Graphs:
    """The graphs of one step, for all shapes of its inputs.

    Attributes:
        alive: The existing graphs.
        failed: Why a capture failed. PyTorch does not release all memory of a failed capture.
    """

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.failed: str | None = None


def with_graph(program: StepProgram, examples: Sequence[torch.Tensor], graphs: Graphs) -> Run:
    """Run a program as a CUDA graph if it is on a GPU and suitable, else without one.

    Args:
        program: The recorded step.
        examples: A value for each of its inputs, including the state.
        graphs: The graphs of the same step for other shapes.

    Returns:
        ``run(inputs, state)``, the program's results.
    """

    def plain(inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return program.run(*inputs, *state)

    # A constant with a single element may be on any device: it is inlined into the operations.
    held = [tensor for tensor in program.holds if tensor.dim()]
    devices = {tensor.device for tensor in (*examples, *held)}
    if not any(device.type == KIND for device in devices):
        return plain
    reason = program.waits
    if not IS_SAFE:
        reason = f"they need PyTorch 2.13, this is {torch.__version__}"
    elif len(devices) > 1:
        reason = f"it is on several devices ({', '.join(map(str, devices))})"
    if reason is not None:
        _explain(reason)
        return plain
    return _Graphed(program, devices.pop(), graphs)


def _explain(why: str) -> None:
    logger.info("The captured step runs without a CUDA graph: %s", why)


class _Graphed:
    """A program that becomes a graph during its first runs.

    Args:
        program: The program, which uses a single device and never waits for it.
        device: The device.
        graphs: The graphs of the same step for other shapes.
    """

    def __init__(self, program: StepProgram, device: torch.device, graphs: Graphs) -> None:
        self._program = program
        self._place = device, threading.get_ident()
        self._graphs = graphs
        self._addresses: list[int] = []
        self._beginnings = self._runs = 0
        self._given: list[torch.Tensor] = []
        self._results: list[torch.Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_proven = self._is_plain = False

    def __call__(
        self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run the program."""
        device, thread = self._place
        if self._is_plain or threading.get_ident() != thread:
            return self._program.run(*inputs, *state)
        addresses = [tensor.data_ptr() for tensor in (*state, *self._program.holds)]
        if addresses != self._addresses:
            self._begin(inputs, addresses)
            if self._is_plain:
                return self._program.run(*inputs, *state)
        if self._given:
            torch._foreach_copy_(self._given, list(inputs))
        if self._is_proven:
            return self._replay()
        self._runs += 1
        with torch.cuda.device(device):
            if self._graph is not None:
                return self._prove(state)
            if self._runs > RUNS_BEFORE:
                self._capture(state)
            elif self._runs == RUNS_BEFORE:
                return self._watched(state)
            return self._run_without_graph(state)

    def _begin(self, inputs: Sequence[torch.Tensor], addresses: list[int]) -> None:
        self._drop()
        self._addresses, self._runs, self._given = addresses, 0, []
        self._beginnings += 1
        if self._beginnings > MOST_BEGINNINGS:
            self._give_up("its variables have other memory again and again")
            return
        if _size(inputs) > MOST_BYTES:
            self._give_up(_TOO_LARGE)
            return
        self._given = [torch.empty_like(tensor) for tensor in inputs]
        if any(a.stride() != b.stride() for a, b in zip(self._given, inputs, strict=True)):
            self._give_up("an input has gaps in memory")

    def _drop(self) -> None:
        self._results, self._graph, self._is_proven = [], None, False

    def _give_up(self, why: str) -> None:
        self._continue_without_graph()
        _explain(why)

    def _continue_without_graph(self) -> None:
        self._drop()
        self._is_plain = True
        torch.cuda.empty_cache()  # of the side stream, which no other stream allocates from

    def _run_without_graph(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run like the graph: on the same memory and, as PyTorch requires, on a side stream.

        Memory allocated by the side stream is reused only after it has waited for this stream.
        """
        here, side = torch.cuda.current_stream(), _stream(self._place)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            results = self._program.run(*self._given, *state)
        here.wait_stream(side)
        if not self._is_plain and _size([*self._given, *results]) > MOST_BYTES:
            self._give_up(_TOO_LARGE)
        return [result.clone() for result in results]

    def _watched(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run, and give up on a graph if the host waits for the device during the run."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                results = self._run_without_graph(state)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if not self._is_plain and any("synchronizing" in str(w.message) for w in caught):
            self._give_up("the host waits for the device in it")
        return results

    def _capture(self, state: Sequence[torch.Tensor]) -> None:
        if len(self._graphs.alive) >= MOST_GRAPHS:
            self._give_up(f"inputs of {MOST_GRAPHS} other shapes have one")
            return
        if self._graphs.failed is not None:
            self._give_up(self._graphs.failed)
            return
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            # One capture at a time; garbage collection could free device memory during the capture.
            with _CAPTURING, no_collection():
                pools = [other.pool() for other, place in _ALIVE.items() if place == self._place]
                with torch.cuda.graph(
                    graph,
                    pool=pools[0] if pools else None,
                    stream=_stream(self._place),
                    capture_error_mode="thread_local",  # other threads are not restricted
                ):
                    self._results = self._program.run(*self._given, *state)
                _ALIVE[graph] = self._place
        except Exception as error:
            torch.cuda.set_stream(here)  # torch does not restore the stream on failure
            self._graphs.failed = f"its capture failed ({_first_error(error)})"
            self._give_up(self._graphs.failed)
            return
        self._graph = graph
        self._graphs.alive.add(graph)

    def _replay(self) -> list[torch.Tensor]:
        assert self._graph is not None
        self._graph.replay()
        return [result.clone() for result in self._results]  # the next launch overwrites them

    def _prove(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one update with and without the graph, and keep the result without it."""
        tensors = [*self._given, *state]
        changed = [tensors[i] for i in self._program.changes]
        before: list[torch.Tensor] = []
        device = self._place[0]
        random = _random_state(device)

        def trial(run: Callable[[], list[torch.Tensor]]) -> _Outcome:
            # Without a copy nothing has been changed yet.
            for tensor, old in zip(changed, before, strict=False):
                tensor.copy_(old)
            _set_random_state(random, device)
            results = run()
            return results, _summary([*results, *changed]), _random_state(device)

        def without_graph() -> list[torch.Tensor]:
            return self._run_without_graph(state)

        agree = None
        try:
            before += [tensor.clone() for tensor in changed]
            _, replayed, drawn = trial(self._replay)
            results, plain, expected = trial(without_graph)
            noise = 0.0
            if not torch.equal(replayed, plain):
                results, again, _ = trial(without_graph)
                noise = _distance(again, plain)
            agree = _distance(replayed, plain) <= TOLERANCE * noise
            agree = agree and all(map(torch.equal, drawn, expected))
        except torch.OutOfMemoryError:
            pass  # outside the handler, where the error keeps memory alive
        if agree is None:
            self._give_up("there is no memory to compare it with the plain step")
            return trial(without_graph)[0]
        if agree:
            self._is_proven = True
            torch.cuda.empty_cache()
        else:
            logger.warning(
                "A CUDA graph of the step gave other numbers than the step itself, which continues "
                "without it. No update was lost. Please report this, with model and optimizer."
            )
            self._continue_without_graph()
        return results


_Outcome = tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]
"""Results of a run, a summary of the state it changed, and the random state after it."""


@functools.cache
def _stream(place: _Place) -> torch.cuda.Stream:
    """The stream of all captures on a device: graphs of one stream can share memory."""
    return torch.cuda.Stream(place[0])


def _first_error(error: Exception) -> str:
    """The first error, in one line."""
    return first_lines(causes(error)[0], 1) or type(error).__name__


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state(device)]


def _set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state(state[1], device)


def _summary(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum and the norm of each tensor, on the host: float64 of shape (tensors, 2)."""
    rows = []
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        values = real if real.is_floating_point() else real.float()
        total = values.sum(dtype=torch.float64)
        rows.append(torch.stack([total, torch.linalg.vector_norm(values, dtype=torch.float64)]))
    return torch.nan_to_num(torch.stack(rows).cpu()) if rows else torch.zeros(0, 2)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two summaries, in units of the norms."""
    if not a.numel():
        return 0.0
    norms = torch.maximum(a[:, 1], b[:, 1]).clamp(min=torch.finfo(torch.float64).tiny)
    return float(((a - b).abs().amax(1) / norms).max())
