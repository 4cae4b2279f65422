"""The properties of ``TrainingArguments`` about the processes that train together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal

from kbtrain.utils.machine.processes import current, one_after_the_other


class ProcessProperties:
    """The properties that Transformers has for distributed runs."""

    log_level: Literal["passive", "debug", "info", "warning", "error", "critical"]
    log_level_replica: Literal["passive", "debug", "info", "warning", "error", "critical"]
    log_on_each_node: bool
    save_on_each_node: bool

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return current().size

    @property
    def process_index(self) -> int:
        """Index of this process among all."""
        return current().rank

    @property
    def local_rank(self) -> int:
        """Index of this process among those on its machine; -1 without a launcher."""
        return current().local_rank if self.world_size > 1 else -1

    @property
    def local_process_index(self) -> int:
        """Index of this process among those on its machine."""
        return current().local_rank

    @property
    def should_log(self) -> bool:
        """Whether this process logs: the first one, or the first one of each machine."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes files: the first one, or the first one of each machine."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    def get_process_log_level(self) -> int:
        """The log level of this process, as a number of ``logging``.

        It is that of ``log_level`` for a process that logs, else that of ``log_level_replica``.

        Example:
            >>> from kbtrain import TrainingArguments
            >>> TrainingArguments(log_level="info").get_process_log_level()
            20
        """
        level = self.log_level if self.should_log else self.log_level_replica
        if level == "passive":
            return logging.getLogger("kbtrain").getEffectiveLevel()
        return logging.getLevelNamesMapping()[level.upper()]

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Run a block in the main process first, while the others wait; all must reach it.

        Args:
            local: The first process of each machine goes first, not the first of all.
            desc: What is done, for the log.
        """
        logging.getLogger("kbtrain").debug("%s, by the main process (local=%s)", desc, local)
        index = self.local_process_index if local else self.process_index
        with one_after_the_other(index == 0):
            yield
