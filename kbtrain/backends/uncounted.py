"""Kernels whose floating-point operations a framework does not know."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger("kbtrain")


def warn_of_uncounted(kernels: Iterable[str]) -> None:
    """Warn that kernels count nothing, once for each call; do nothing if there are none."""
    names = sorted(set(kernels))
    if names:
        logger.warning(
            "The floating-point operations of %s are not known, so they count nothing and the MFU "
            "is too low. Pass flops_per_sample=... to ThroughputCallback.",
            ", ".join(names[:5]) + (" and others" if len(names) > 5 else ""),
        )
