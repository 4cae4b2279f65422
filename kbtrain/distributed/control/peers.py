"""Messages between the processes of a run, on the host and in any thread.

A checkpoint is written in the background while the main threads run collective operations of the
framework, which all processes must call in the same order. So what the writers tell each other must
not be a collective operation.
"""

from __future__ import annotations

from typing import Protocol


class Peers(Protocol):
    """The processes of a run, as one of them sees them.

    The same keys are used on all processes, each once. Waiting has no limit while the others are
    alive: a checkpoint may take long to write.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
    """

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def gather(self, key: str, data: bytes) -> list[bytes]:
        """Send ``data`` to process 0, which waits for that of all processes.

        Args:
            key: What the message is about.
            data: The message; a few bytes to a few megabytes.

        Returns:
            On process 0 the messages of all processes, in order of rank; elsewhere an empty list,
            without waiting.

        Raises:
            DistributedError: A process has failed or no longer answers.
        """

    def announce(self, key: str, data: bytes = b"") -> bytes:
        """Hand the message of process 0 to all processes.

        Args:
            key: What the message is about.
            data: The message, on process 0; not used elsewhere.

        Returns:
            The message of process 0, for which the other processes wait.

        Raises:
            DistributedError: A process has failed or no longer answers.
        """
