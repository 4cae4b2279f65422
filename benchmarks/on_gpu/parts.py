"""The parts of a run on a GPU, the most important ones first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NO_DEVICE = 3
"""Status of a process whose framework sees no GPU."""


@dataclass(frozen=True)
class Part:
    """What one process of a run does.

    Attributes:
        name: What it is called.
        backend: The backend of Keras that it runs on.
        function: "module:function" in this folder; the function takes a ``Reporter``.
        expected: Seconds that it will probably take on a GPU (an estimate, nothing was timed).
        limit: Seconds after which it is ended.
        alone: Whether nothing else may run meanwhile, because it measures time.
        arguments: Further arguments of the function.
        members: The names of the parts that it consists of, if it is more than one.
    """

    name: str
    backend: str
    function: str
    expected: float
    limit: float
    alone: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parts that its process runs."""
        return self.members or (self.name,)


def _speed(name: str, backend: str, expected: float, **arguments: Any) -> Part:
    arguments = {"workload": name.split()[0]} | arguments
    title = f"{name} {backend}"
    return Part(title, backend, "speed:in_turns", expected, 3 * expected, True, arguments)


PARTS = [
    Part("machine", "torch", "machine:machine", 15, 60, True),
    # Correctness, side by side.
    Part("graphs torch", "torch", "correctness:graphs", 60, 130),
    Part("like cpu torch", "torch", "correctness:like_cpu", 40, 100),
    Part("resume torch", "torch", "correctness:resume", 40, 100),
    Part("precision torch", "torch", "correctness:precision", 40, 100),
    Part("optimizers torch", "torch", "correctness:optimizers", 70, 150),
    Part("devices torch", "torch", "correctness:devices", 20, 60),
    Part("like cpu jax", "jax", "correctness:like_cpu", 40, 100),
    Part("resume jax", "jax", "correctness:resume", 40, 100),
    # Speed, alone.
    _speed("gpt124m", "torch", 45, bf16=True, target="gpt124m torch"),
    _speed("mlp", "torch", 25, target="mlp torch"),
    Part("updates torch", "torch", "updates:updates", 40, 100, True),
    _speed("gpt124m", "jax", 45, bf16=True, target="jax"),
    _speed("resnet50", "torch", 45, bf16=True, target="resnet50 torch"),
    # Memory, by counters of each process.
    Part("memory kbtrain", "torch", "speed:memory", 25, 70, False, {"who": "kbtrain"}),
    Part("memory no graph", "torch", "speed:memory", 25, 70, False, {"who": "kbtrain, no graph"}),
    Part("memory loop", "torch", "speed:memory", 25, 70, False, {"who": "loop"}),
    Part("launches torch", "torch", "speed:launches", 35, 90, True),
    _speed("gpt124m compiled", "torch", 90, bf16=True, compiled=True, target="gpt124m compiled"),
    _speed("mlp", "jax", 25, target="jax"),
    Part("saves torch", "torch", "speed:saves", 25, 70, True),
    Part("precision jax", "jax", "correctness:precision", 40, 100),
    Part("devices jax", "jax", "correctness:devices", 20, 60),
    Part("like cpu tensorflow", "tensorflow", "correctness:like_cpu", 50, 120),
    Part("resume tensorflow", "tensorflow", "correctness:resume", 50, 120),
    Part("precision tensorflow", "tensorflow", "correctness:precision", 50, 120),
    Part("devices tensorflow", "tensorflow", "correctness:devices", 20, 60),
    _speed("mlp", "tensorflow", 35),
    _speed("resnet50", "jax", 60, bf16=True, target="jax"),
    _speed("gpt124m", "tensorflow", 90, bf16=True),
]


def together(parts: Sequence[Part]) -> list[Part]:
    """One part per backend in place of the given ones."""
    found = []
    for backend in dict.fromkeys(part.backend for part in parts):
        own = [part for part in parts if part.backend == backend]
        names = tuple(part.name for part in own)
        limit = sum(part.limit for part in own)
        found.append(Part(f"all {backend}", backend, "", limit, limit, True, members=names))
    return found
