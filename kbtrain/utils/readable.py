"""Durations and sizes in memory as people read them, the same on screens and pages."""

from __future__ import annotations

import math

NONE = "–"
"""What stands for a value that is not known."""


def duration(seconds: float | None) -> str:
    """A duration to read.

    Example:
        >>> duration(0.034), duration(8.26), duration(75), duration(3725), duration(None)
        ('0.03 s', '8.3 s', '1:15', '1:02:05', '–')
    """
    if seconds is None:
        return NONE
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    return clock(round(seconds))


def clock(seconds: float) -> str:
    """Time that runs, in whole seconds.

    Example:
        >>> clock(7.9), clock(3725)
        ('0:07', '1:02:05')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def memory(size: float | None) -> str:
    """A size in bytes to read.

    Example:
        >>> memory(512), memory(222_248), memory(3 * 2**30), memory(None)
        ('512 bytes', '217 KiB', '3.0 GiB', '–')
    """
    if size is None:
        return NONE
    if size < 1024:
        return f"{size:.0f} bytes"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(size, 1024)), len(units))
    amount, unit = size / 1024**power, units[power - 1]
    return f"{amount:.0f} {unit}" if amount >= 100 else f"{amount:.1f} {unit}"
