"""An operation between devices, and what each of them sends."""

from __future__ import annotations

from dataclasses import dataclass

from kbtrain.backends.jax.hlo.groups import Groups

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
        kind: One of ``KINDS``.
        size: Bytes of the whole value: what is added up, gathered or scattered.
        groups: The devices that take part together; of a permutation, the pairs.
        loops: Number of loops that it is in.
        rounds: How often it runs, as far as the lengths of these loops are known.
        overlapped: Pieces of work (fusions, products, kernels) between its start and its end; None
            if the device waits for it.
        scalar: Whether its largest array has a single element.
    """

    kind: str
    size: int
    groups: Groups
    loops: int
    rounds: int
    overlapped: int | None
    scalar: bool

    @property
    def group(self) -> int:
        """Number of devices that take part together."""
        if self.kind == "collective-permute":
            return len({device for pair in self.groups for device in pair})
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Bytes that each device sends, at least: those of a ring."""
        if self.kind == "collective-permute":
            return self.size
        return self._whole * (self.group - 1) / self.group

    @property
    def _whole(self) -> int:
        return 2 * self.size if self.kind == "all-reduce" else self.size

    def sent_over(self, machine: int, devices: int) -> tuple[float, float]:
        """Bytes that a device sends inside of its machine and out of it, at least, on average.

        The devices of a machine exchange what they have first, so that each part of a value leaves
        the machine once, by the network card of one of them.

        Args:
            machine: Number of devices of a machine.
            devices: Number of all devices.
        """
        inside = outside = 0.0
        for group in self.groups:
            machines = len({device // machine for device in group})
            if self.kind == "collective-permute":
                moved = self.size if len(set(group)) > 1 else 0
                inside += moved * (machines == 1)
                outside += moved * (machines > 1)
                continue
            members = len(group) / machines  # in one machine
            if self.kind == "all-to-all":
                inside += self.size * (members - 1)
                outside += self.size * (len(group) - members)
            else:
                inside += self._whole * (members - 1) * machines
                outside += self._whole * (machines - 1)
        return inside / devices, outside / devices
