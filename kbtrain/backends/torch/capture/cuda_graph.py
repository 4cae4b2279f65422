"""A captured step as a CUDA graph: one launch in place of hundreds.

A CUDA graph replays operations on fixed memory. This suits a step: its variables are updated in
place, its inputs are copied into the graph's memory and its results out of it. The procedure:

1. A few updates run without a graph on the capture stream, as a warm-up of libraries. The last of
   them is watched: does the host wait for the device, and how much memory does it take?
2. The step is captured if there is memory for that (``graph_checks``). This executes nothing, so
   the step then runs once without the graph.
3. The next update is computed by the graph and without it, from the same state, several times if
   the results differ. The graph is used from then on only if results, variables and random state
   agree. A result without the graph is kept.

If the step is unsuitable, it continues without a graph and the reason is logged: the host needs a
value, memory is short, or a capture fails (it is not tried again). If the memory of a variable
changes, the procedure restarts. If memory runs out later, in whatever step, all graphs are given
up.

All graphs share one memory pool: it holds nothing between launches, and the launches of a thread
are sequential.

No GPU was available for testing. It was tested with a stand-in for torch's graphs (``tests/``) that
records and replays operations, on a CPU and on a simulated GPU (docs/lab/pytorch-capture.md).

See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from kbtrain.backends.torch.capture import graph_checks as checks
from kbtrain.backends.torch.capture.program import StepProgram, no_collection
from kbtrain.backends.torch.device import is_oom
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

KIND = "cuda"
"""Device types that support graphs."""

IS_SUPPORTED = torch.__version__ >= (2, 9)
"""Older versions do not say which operations must not be in a graph."""

LEAVES_STATE_INTACT = torch.__version__ >= (2, 13)
"""In older versions a failed capture leaves the allocator and the generators as if it went on."""

WAITS = "called a synchronizing CUDA operation"
"""What PyTorch warns of in the debug mode; the mode's own notice has other words."""

NOTICE = "Synchronization debug mode is a prototype feature"
"""The notice, which appears once in a process."""

T = TypeVar("T")

_Place = tuple[torch.device, int]
"""A device and a thread: the launches of one thread are sequential and can share memory."""

_ALIVE: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, _Place] = weakref.WeakKeyDictionary()
"""All graphs: a memory pool can only be shared while one of its graphs is alive."""

_CAPTURING = threading.Lock()
_TOO_LARGE = "its inputs and results are too large to copy them in each step"

Run = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], list[torch.Tensor]]


_GRAPHED: weakref.WeakSet[_Graphed] = weakref.WeakSet()
"""All programs that are graphs, or may become graphs."""


class Graphs:
    """The graphs of one step, for all shapes of its inputs.

    Args:
        wanted: The argument ``cuda_graphs``.

    Attributes:
        wanted: The same.
        alive: The existing graphs.
        failed: Why a capture failed. PyTorch does not release all memory of a failed capture.
    """

    def __init__(self, wanted: bool | str) -> None:
        self.wanted = wanted
        self.alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.failed: str | None = None
        self._said: set[str] = set()

    def say(self, message: str, *, without: bool = False) -> None:
        """Log once, for all shapes, whether the step runs as a graph, or why not.

        Args:
            message: What to say.
            without: Whether there is no graph, which is a warning if ``cuda_graphs=True``.
        """
        if message not in self._said:
            self._said.add(message)
            level = logging.WARNING if without and self.wanted is True else logging.INFO
            logger.log(level, "%s", message)

    def explain(self, why: str) -> None:
        """Log why the step runs without a graph."""
        self.say(f"The captured step runs without a CUDA graph: {why}", without=True)


def beside_graphs(run: Callable[[], T], state: Sequence[torch.Tensor], device: torch.device) -> T:
    """Run without a graph; if memory runs out, give up the graphs that have some of it."""
    if not _ALIVE or device.type != KIND:
        return run()
    return checks.without_graphs_if_oom(run, state, device, _release_all)


def _release_all() -> bool:
    graphed = [each for each in _GRAPHED if each.has_graph]
    for each in graphed:
        each._give_up("memory ran out, and its own was needed")
    return bool(graphed)


def with_graph(program: StepProgram, examples: Sequence[torch.Tensor], graphs: Graphs) -> Run:
    """Run a program as a CUDA graph if it is on a GPU and suitable, else without one.

    Args:
        program: The recorded step.
        examples: A value for each of its inputs, including the state.
        graphs: The graphs of the same step for other shapes.

    Returns:
        ``run(inputs, state)``, the program's results.
    """
    # A constant with a single element may be on any device: it is inlined into the operations.
    held = [tensor for tensor in program.holds if tensor.dim()]
    devices = {tensor.device for tensor in (*examples, *held)}
    on_gpu = [device for device in devices if device.type == KIND]
    if not on_gpu:
        return lambda inputs, state: program.run(*inputs, *state)

    def plain(inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return beside_graphs(lambda: program.run(*inputs, *state), state, on_gpu[0])

    reason = program.waits
    if graphs.wanted is False:
        reason = "cuda_graphs=False"
    elif not IS_SUPPORTED:
        reason = f"they need PyTorch 2.9, this is {torch.__version__}"
    elif len(devices) > 1:
        reason = f"it is on several devices ({', '.join(map(str, devices))})"
    if reason is not None:
        graphs.explain(reason)
        return plain
    return _Graphed(program, on_gpu[0], graphs)


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
        self._beginnings = self._runs = self._bytes = 0
        self._given: list[torch.Tensor] = []
        self._results: list[torch.Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_proven = self._is_plain = False
        _GRAPHED.add(self)

    @property
    def has_graph(self) -> bool:
        """Whether a graph exists, which has memory of its own."""
        return self._graph is not None

    def __call__(
        self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run the program."""
        device, thread = self._place
        if self._is_plain or threading.get_ident() != thread:
            return self._run_plainly(inputs, state)
        addresses = [tensor.data_ptr() for tensor in (*state, *self._program.holds)]
        if addresses != self._addresses:
            self._begin(inputs, addresses)
            if self._is_plain:
                return self._run_plainly(inputs, state)
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

    def _run_plainly(
        self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        return beside_graphs(lambda: self._program.run(*inputs, *state), state, self._place[0])

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
        """Continue without a graph, and log the reason."""
        self._continue_without_graph()
        self._graphs.explain(why)

    def _continue_without_graph(self) -> None:
        self._drop()
        self._is_plain = True
        torch.cuda.empty_cache()  # of the side stream, which no other stream allocates from

    def _run_without_graph(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run like the graph: on the same memory and, as PyTorch requires, on a side stream.

        Memory allocated by the side stream is reused only after it has waited for this stream.
        """
        results = beside_graphs(lambda: self._on_side_stream(state), state, self._place[0])
        if not self._is_plain and _size([*self._given, *results]) > MOST_BYTES:
            self._give_up(_TOO_LARGE)
        return results

    def _on_side_stream(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        here, side = torch.cuda.current_stream(), _stream(self._place)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            results = self._program.run(*self._given, *state)
        here.wait_stream(side)
        return _copies(results)

    def _watched(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run; give up on a graph if the host waits for the device; measure the memory."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                results, self._bytes = checks.measured(
                    lambda: self._run_without_graph(state), self._place[0]
                )
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [w for w in caught if WAITS in str(w.message)]
        for other in caught:
            if other not in waits and NOTICE not in str(other.message):
                warnings.warn_explicit(
                    other.message, other.category, other.filename, other.lineno, source=other.source
                )
        if waits and not self._is_plain:
            self._give_up("the host waits for the device in it")
        return results

    def _reason_not_to_capture(self, state: Sequence[torch.Tensor]) -> str | None:
        if len(self._graphs.alive) >= MOST_GRAPHS:
            return f"inputs of {MOST_GRAPHS} other shapes have one"
        if self._graphs.failed is not None:
            return self._graphs.failed
        changed = _size(self._changed(state))
        return checks.lack_of_memory(self._bytes, changed, self._place[0])

    def _changed(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        tensors = [*self._given, *state]
        return [tensors[i] for i in self._program.changes]

    def _capture(self, state: Sequence[torch.Tensor]) -> None:
        if (reason := self._reason_not_to_capture(state)) is not None:
            self._give_up(reason)
            return
        if not LEAVES_STATE_INTACT:
            self._graphs.say(
                f"A CUDA graph is captured with PyTorch {torch.__version__}, where a capture that "
                "fails may leave the GPU's memory and random numbers in disorder; since 2.13 it "
                "does not. cuda_graphs=False does without.",
                without=True,
            )
        device = self._place[0]
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        # One capture at a time; garbage collection could free device memory during the capture.
        with _CAPTURING, no_collection():
            pools = [other.pool() for other, place in _ALIVE.items() if place == self._place]
            pool = pools[0] if pools else torch.cuda.graph_pool_handle()
            recover = _noting_state(device, pool)
            try:
                with torch.cuda.graph(
                    graph,
                    pool=pool,
                    stream=_stream(self._place),
                    capture_error_mode="thread_local",  # other threads are not restricted
                ):
                    self._results = self._program.run(*self._given, *state)
                _ALIVE[graph] = self._place
            except Exception as error:
                torch.cuda.set_stream(here)  # torch does not restore the stream on failure
                recover()
                self._graphs.failed = f"its capture failed ({_first_error(error)})"
        if self._graphs.failed is not None:
            self._give_up(self._graphs.failed)
            return
        self._graph = graph
        self._graphs.alive.add(graph)

    def _replay(self) -> list[torch.Tensor]:
        assert self._graph is not None
        self._graph.replay()
        return _copies(self._results)  # the next launch overwrites them

    def _prove(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one update with and without the graph, and keep a result without it."""
        changed = self._changed(state)
        before: list[torch.Tensor] = []
        device = self._place[0]
        random = checks.random_state(device)

        def trial(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
            # Without a copy nothing has been changed yet.
            for tensor, old in zip(changed, before, strict=False):
                tensor.copy_(old)
            checks.set_random_state(random, device)
            return run()

        def outcome(results: Sequence[torch.Tensor]) -> checks.Outcome:
            numbers = checks.summary([*results, *changed], before)
            return checks.Outcome(numbers, checks.random_state(device))

        def plainly() -> list[torch.Tensor]:
            return self._on_side_stream(state)

        agrees, failure = None, None
        try:
            before += [tensor.clone() for tensor in changed]
            replayed, plain = [], []
            for _ in range(checks.TRIES):
                replayed.append(outcome(trial(self._replay)))
                results = trial(plainly)
                plain.append(outcome(results))
                if torch.equal(replayed[0].numbers, plain[0].numbers):
                    break
            agrees = checks.agree(replayed, plain, checks.floors([*results, *changed]))
        except Exception as error:
            if not is_oom(error):
                raise
            failure = error.with_traceback(None)  # which would keep memory alive
        if agrees is None or failure is not None:
            self._give_up("there is no memory to compare it with the plain step")
            return trial(plainly)
        if agrees:
            self._is_proven = True
            torch.cuda.empty_cache()
            self._graphs.say(
                f"The captured step runs as a CUDA graph, with {self._bytes / (1 << 20):,.0f} MiB "
                "of memory of its own."
            )
        else:
            logger.warning(
                "A CUDA graph of the step gave other numbers than the step itself, which continues "
                "without it. No update was lost. Please report this, with model and optimizer."
            )
            self._continue_without_graph()
        return results


def _noting_state(device: torch.device, pool: Any) -> Callable[[], None]:
    """What puts the allocator and the generator in order after a failed capture."""
    if LEAVES_STATE_INTACT:
        return lambda: None
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    state = generator.clone_state()

    def recover() -> None:
        generator.graphsafe_set_state(state)
        with contextlib.suppress(RuntimeError):  # it may have ended
            torch._C._cuda_endAllocateToPool(index, pool)

    return recover


@functools.cache
def _stream(place: _Place) -> torch.cuda.Stream:
    """The stream of all captures on a device: graphs of one stream can share memory."""
    return torch.cuda.Stream(place[0])


def _copies(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies, in one kernel for all results of a dtype."""
    copies = [torch.empty_like(result) for result in results]
    pairs: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for copy, result in zip(copies, results, strict=True):
        pairs.setdefault(copy.dtype, []).append((copy, result))
    for of_dtype in pairs.values():
        into, given = zip(*of_dtype, strict=True)
        torch._foreach_copy_(list(into), list(given))
    return copies


def _first_error(error: Exception) -> str:
    """The first error, in one line."""
    return first_lines(causes(error)[0], 1) or type(error).__name__


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
