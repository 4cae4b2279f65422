"""What a process may ask ``TrainingArguments`` about itself: there is one process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class ProcessQuestions:
    """The reference's questions about processes, answered for one process on one device."""

    log_level: str

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return 1

    @property
    def process_index(self) -> int:
        """This process's number among all."""
        return 0

    @property
    def local_process_index(self) -> int:
        """This process's number among those of its machine."""
        return 0

    @property
    def should_log(self) -> bool:
        """Whether this process is the one that logs."""
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        """Whether this process is the one that writes checkpoints."""
        return self.process_index == 0

    def get_process_log_level(self) -> int:
        """The level of this process's log, as a number of ``logging``.

        Example:
            >>> from kbtrain import TrainingArguments
            >>> TrainingArguments(log_level="info").get_process_log_level()
            20
        """
        if self.log_level == "passive":
            return logging.getLogger("kbtrain").getEffectiveLevel()
        return logging.getLevelNamesMapping()[self.log_level.upper()]

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Let the first process do something before the others: here there are no others.

        Args:
            local: The first of each machine, not the first of all.
            desc: What is done, for the log.
        """
        logging.getLogger("kbtrain").debug("%s, by the main process (local=%s)", desc, local)
        yield
