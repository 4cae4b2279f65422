"""The properties of ``TrainingArguments`` about processes: there is one process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal


class ProcessProperties:
    """The properties that Transformers has for distributed runs, for one process on one device."""

    log_level: Literal["passive", "debug", "info", "warning", "error", "critical"]

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return 1

    @property
    def process_index(self) -> int:
        """Index of this process among all."""
        return 0

    @property
    def local_process_index(self) -> int:
        """Index of this process among those on its machine."""
        return 0

    @property
    def should_log(self) -> bool:
        """Whether this process logs."""
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes checkpoints."""
        return self.process_index == 0

    def get_process_log_level(self) -> int:
        """The log level of this process, as a number of ``logging``.

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
        """Run a block in the main process first; with one process there is no waiting.

        Args:
            local: The first process of each machine goes first, not the first of all.
            desc: What is done, for the log.
        """
        logging.getLogger("kbtrain").debug("%s, by the main process (local=%s)", desc, local)
        yield
