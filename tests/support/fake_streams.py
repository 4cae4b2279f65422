"""Streams that keep no order but the one they are told: what a GPU could do, without one.

Operations run at once, on the CPU. ``Order`` notes on which stream each belongs, what it reads,
writes and allocates, and what its stream has waited for (vector clocks, as in PyTorch's CUDA
sanitizer). It raises an error where nothing keeps two streams apart:

- an operation reads what another stream writes, or writes what another stream reads or writes;
- memory goes back to the stream that it was allocated on, which uses it for something else, while
  another stream still works with it. The caching allocator gives memory out again at once.
"""

import collections
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OutOfOrder(AssertionError):
    """Two streams use the same memory at the same time."""


class Stream:
    """A stream; ``seen`` says how many operations of each stream are over when its next begins."""

    def __init__(self, device=None):
        self.seen = collections.Counter()

    def wait_stream(self, other):
        self.seen |= other.seen  # the maximum for each stream


class Event:
    """A point in the order of one stream; operations that are started later do not belong to it.

    Args:
        host: What waits for it.
    """

    def __init__(self, host):
        self.host, self.seen = host, collections.Counter()

    def record(self, stream):
        self.seen = collections.Counter(stream.seen)

    def synchronize(self):
        self.host.seen |= self.seen


class Memory:
    """What is known of one piece of memory.

    Attributes:
        owner: The stream that it was allocated on.
        write: The last write: a stream, and the number of its operation.
        reads: For each stream the number of its last operation that reads it.
    """

    def __init__(self, stream):
        self.owner = stream
        self.write = stream, stream.seen[stream]
        self.reads = {}

    def uses(self):
        return [*self.reads.items(), self.write]


class Order(TorchDispatchMode):
    """Context that checks the order of all operations in it.

    Args:
        current: Returns the current stream.
        paused: Returns whether operations are only noted down, as in a capture.

    Attributes:
        host: The host, in the role of a stream: it reads what it has waited for.
        checked: How many uses of memory were in order.
    """

    def __init__(self, current, paused):
        super().__init__()
        self.current, self.paused = current, paused
        self.memory = {}
        self.freed = collections.defaultdict(list)
        self.host, self.checked = Stream(), 0

    def on_host(self, tensor):
        """A tensor that has been copied to the host, to be read there."""
        other, number = self.memory[address(tensor)].write
        if self.host.seen[other] < number:
            raise OutOfOrder("the host reads what has not arrived")
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(filter(is_real, torch.utils._pytree.tree_leaves((args, kwargs))))
        if self.paused():
            return func(*args, **kwargs)
        addresses = {address(tensor) for tensor in given}
        stream = self.current()
        stream.seen[stream] += 1
        written = written_by(func, args, kwargs)
        for tensor in given:
            self._use(func, tensor, address(tensor) in written, stream)
        result = func(*args, **kwargs)
        for tensor in filter(is_real, torch.utils._pytree.tree_leaves(result)):
            if address(tensor) not in addresses:
                self._allocate(func, tensor, stream)
        return result

    def _use(self, func, tensor, writes, stream):
        memory = self.memory.get(address(tensor))
        if memory is None:  # it was there before
            return
        self.checked += 1
        for other, number in memory.uses() if writes else [memory.write]:
            if stream.seen[other] < number:
                raise OutOfOrder(f"{func} does not wait for what another stream does")
        if writes:
            memory.write, memory.reads = (stream, stream.seen[stream]), {}
        else:
            memory.reads[stream] = stream.seen[stream]

    def _allocate(self, func, tensor, stream):
        for other, number in self.freed.pop(stream, []):
            if stream.seen[other] < number:
                raise OutOfOrder(f"{func} may get memory that another stream works with")
        key, storage = address(tensor), tensor.untyped_storage()
        self.memory[key] = memory = Memory(stream)
        weakref.finalize(storage, self._free, key, memory)

    def _free(self, key, memory):
        if self.memory.get(key) is memory:
            del self.memory[key]
        self.freed[memory.owner] += [use for use in memory.uses() if use[0] is not memory.owner]


def is_real(x):
    """Whether something is a tensor with memory, and so no fake one."""
    if not isinstance(x, torch.Tensor) or x.device.type == "meta":
        return False
    return not torch._subclasses.fake_tensor.is_fake(x) and address(x) != 0


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def written_by(func, args, kwargs):
    """The addresses that an operation changes, by its schema."""
    if not func._schema.is_mutable:
        return set()
    found = set()
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            leaves = torch.utils._pytree.tree_leaves(value)
            found |= {address(x) for x in leaves if is_real(x)}
    return found
