"""PyTorch: what a step and its record say to each other."""

from __future__ import annotations

import torch

from kbtrain.utils.fallback import NoFallback


class NotCapturable(NoFallback):
    """The step cannot be recorded; the message says why.

    Attributes:
        failure: What recording failed with, if nobody knows why: PyTorch may have changed. It is
            none of PyTorch's if the step fails by itself, too.
    """

    failure: Exception | None = None


class GuardFailed(NoFallback):
    """The guard's condition was false; no variable has been changed."""


def guard(condition: torch.Tensor) -> None:
    """Record that everything from here on needs ``condition`` (a boolean scalar)."""
    torch._assert_async(condition)
