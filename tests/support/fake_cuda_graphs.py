"""A stand-in for PyTorch's CUDA graphs, for any device: records operations, and repeats them.

It is as strict as the real ones are. A capture executes nothing, refuses to look at a value, and
leaves the side stream in place when it fails. A replay works on the memory of the capture, whatever
the variables use by now; what a graph has computed is lost when another one runs. The debug mode
for waits announces itself once, in words like those of its warnings. Memory is counted: a step
takes ``Machine.step``, a graph as much, and there is only so much of it. Streams are those of
``fake_streams``, so that an operation that does not wait for another stream can be found.
"""

import contextlib
import warnings
import weakref

import torch
from fake_streams import Stream
from torch.utils._python_dispatch import TorchDispatchMode

ERROR = "operation not permitted when stream is capturing"
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Machine:
    """What there is once: streams, graphs, and what to do wrong."""

    def __init__(self):
        self.default = self.current = Stream()
        self.captures = self.replays = 0
        self.capturing = False
        self.alive = weakref.WeakSet()
        self.watching = 0
        self.was_announced = False
        self.wrong = 0.0
        self.step, self.free = 1 << 20, 1 << 30
        self.peak = 0


machine = Machine()


class UseStream:
    """Takes the place of `torch.cuda.stream`."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before, machine.current = machine.current, self.stream

    def __exit__(self, *error):
        machine.current = self.before


class CUDAGraph:
    def __init__(self):
        self._pool = None
        self.calls = []
        self.memory = {}

    def pool(self):
        assert self._pool is not None
        return self._pool

    def replay(self):
        assert not machine.capturing
        machine.replays += 1
        for other in machine.alive:
            if other is not self and other._pool == self._pool:
                other.spoil()
        for func, args, kwargs, made in self.calls:
            results = torch.utils._pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(made, results, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                    if old.is_floating_point() and machine.wrong:
                        old.mul_(1 + machine.wrong)

    def spoil(self):
        """What is in the memory of the graph is of no use to anybody."""
        for everything in self.memory.values():
            everything.fill_(1e30 if everything.is_floating_point() else 1)


class Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(ERROR)
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(x)]
        known = {address(x) for x in given}
        if func._schema.is_mutable:
            for tensor in given:
                if address(tensor) not in self.graph.memory and address(tensor) not in self.before:
                    self.before[address(tensor)] = whole(tensor), whole(tensor).clone()
        result = func(*args, **kwargs)
        made = torch.utils._pytree.tree_leaves(result)
        for tensor in made:
            if is_tensor(tensor) and tensor.numel() and address(tensor) not in known:
                self.graph.memory[address(tensor)] = whole(tensor)
        # Aliases: if a tensor gets other memory later, the graph has the memory of now.
        alias = [torch.utils._pytree.tree_map(detached, x) for x in (args, kwargs, made)]
        self.graph.calls.append((func, *alias))
        return result


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def whole(tensor):
    """All memory that a tensor has a part of."""
    return tensor.detach().as_strided(
        (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0
    )


def detached(x):
    return x.detach() if is_tensor(x) else x


def looking(original):
    """A method of tensors that has to wait for the value."""

    def look(self, *args, **kwargs):
        if machine.capturing:
            raise RuntimeError(ERROR)
        if machine.watching:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return original(self, *args, **kwargs)

    return look


def watch(mode):
    if not machine.was_announced:
        machine.was_announced = True
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all "
            "synchronizing operations",
            stacklevel=2,
        )
    machine.watching = {"default": 0, "warn": 1}.get(mode, mode)


class Capture:
    """Takes the place of `torch.cuda.graph`."""

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        # A pool is a new one, or that of a graph that is alive.
        assert type(pool) is object or any(other._pool == pool for other in machine.alive)
        assert stream is not None
        assert stream is not machine.default
        graph._pool = pool
        self.graph, self.stream = graph, stream
        self.recording = Recording(graph)

    def __enter__(self):
        machine.captures += 1
        machine.capturing = True
        self.context = UseStream(self.stream)
        self.context.__enter__()
        self.random = torch.get_rng_state()
        self.recording.__enter__()

    def __exit__(self, kind, error, trace):
        self.recording.__exit__(kind, error, trace)
        torch.set_rng_state(self.random)
        for storage, old in self.recording.before.values():
            storage.copy_(old)
        self.graph.spoil()
        machine.capturing = False
        if error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        machine.alive.add(self.graph)
        self.context.__exit__(None, None, None)


def install():
    """Let tensors of the CPU be captured as those of a GPU are."""
    from kbtrain.backends import torch as backend
    from kbtrain.backends.torch import device as device_module
    from kbtrain.backends.torch import fusion
    from kbtrain.backends.torch.capture import cuda_graph
    from kbtrain.backends.torch.capture import graph_checks as checks
    from kbtrain.backends.torch.capture import random as torch_random

    if not torch.cuda.is_available():
        cuda_graph.KIND = fusion.KIND = "cpu"
        torch_random._on_gpu = lambda seed: True
        backend._on_cpu = lambda condition: False
        torch.cuda.get_rng_state = lambda device: torch.get_rng_state()
        torch.cuda.set_rng_state = lambda state, device: torch.set_rng_state(state)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"):
        setattr(torch.Tensor, name, looking(getattr(torch.Tensor, name)))
    torch.cuda.get_sync_debug_mode = lambda: machine.watching
    torch.cuda.set_sync_debug_mode = watch
    torch.cuda.CUDAGraph = CUDAGraph
    torch.cuda.graph = Capture
    torch.cuda.is_current_stream_capturing = lambda: machine.capturing
    torch.cuda.Stream = Stream
    torch.cuda.stream = UseStream
    torch.cuda.current_stream = lambda: machine.current
    torch.cuda.set_stream = lambda stream: setattr(machine, "current", stream)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.graph_pool_handle = object
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda device: 0
    torch.cuda.get_per_process_memory_fraction = lambda device: 1.0
    torch.cuda.mem_get_info = lambda device: (machine.free, 1 << 40)
    device_module.peak_memory = lambda device: machine.peak
    device_module.reset_peak_memory = lambda device: setattr(machine, "peak", machine.step)
    checks.peak_memory, checks.reset_peak_memory = (
        device_module.peak_memory,
        device_module.reset_peak_memory,
    )
