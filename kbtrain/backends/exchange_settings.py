"""Checks of the arguments about how processes exchange tensors, for all backends."""

from __future__ import annotations

from kbtrain.errors import ConfigurationError


def check_library(wanted: str | None, used: str, backend: str) -> None:
    """Check that ``ddp_backend`` names what is in use.

    Raises:
        ConfigurationError: It names something else.
    """
    if wanted not in (None, used):
        raise ConfigurationError(
            f"On the backend {backend} and this device, processes exchange tensors by {used}. "
            f"Received: ddp_backend={wanted!r}. Remove it."
        )


def refuse_bucket_size(megabytes: float | None, backend: str) -> None:
    """Check that no size of buckets is set on a backend that has none.

    Raises:
        ConfigurationError: One is.
    """
    if megabytes is not None:
        raise ConfigurationError(
            "ddp_bucket_cap_mb sets the buckets in which gradients travel on the backend torch; "
            f"on {backend} the compiler decides. Received: {megabytes}. Remove it."
        )
