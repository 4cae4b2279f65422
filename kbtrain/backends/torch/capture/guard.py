"""PyTorch: guards and errors shared by a step and its captured program."""

from __future__ import annotations

import torch

from kbtrain.utils.fallback import NoFallback


class NotCapturable(NoFallback):
    """The step cannot be recorded, for the reason in the message.

    Attributes:
        failure: An unexpected error of the recording, possibly due to a change in PyTorch; not if
            the step itself fails as well.
    """

    failure: Exception | None = None


class GuardFailed(NoFallback):
    """The guard's condition was false; no variable has been changed."""


def guard(condition: torch.Tensor) -> None:
    """Record that everything that follows requires ``condition`` (a boolean scalar)."""
    torch._assert_async(condition)
