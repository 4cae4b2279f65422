"""Sets the logger's level; adds a stderr handler if none exists."""

from __future__ import annotations

import logging

from kbtrain.utils.best_effort import guard_logger


def set_log_level(level: str) -> None:
    """Set the level of the logger ``kbtrain``.

    Args:
        level: "debug" to "critical"; "passive" changes nothing. If neither this logger nor the root
            logger has a handler, one that writes to stderr is added, because Python by default
            shows warnings only.
    """
    guard_logger()
    if level == "passive":
        return
    logger = logging.getLogger("kbtrain")
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
