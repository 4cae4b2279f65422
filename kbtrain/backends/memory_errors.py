"""The words in which the frameworks and their libraries say that a device has no memory left."""

from __future__ import annotations

_TEXTS = (
    "out of memory",
    "out_of_memory",  # of the CUDA driver
    "allocate memory",
    "you tried to allocate",
    "resource_exhausted",
    "failed to allocate request",
    "invalid buffer size",  # of MPS: more than a single buffer can have
    "alloc_failed",  # of cuBLAS, cuDNN, cuSOLVER, cuSPARSE and cuFFT, which allocate for themselves
    "nvml_success == r",  # of PyTorch, where NVIDIA's library cannot say how much memory there is
    # cuDNN found no algorithm whose workspace it could have.
    "cudnn_status_not_supported",
    "unable to find an engine to execute this computation",
)


def says_out_of_memory(error: BaseException) -> bool:
    """Whether the message of an error is about a lack of memory."""
    message = str(error).lower()
    return any(text in message for text in _TEXTS)
