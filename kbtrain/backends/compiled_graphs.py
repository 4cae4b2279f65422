"""The argument ``cuda_graphs`` where a compiler decides."""

from __future__ import annotations

import contextlib

from kbtrain.errors import ConfigurationError


def refuse_cuda_graphs(wanted: bool | str, backend: str) -> contextlib.AbstractContextManager[None]:
    """Check that no CUDA graphs are asked for on a backend whose compiler launches kernels.

    Raises:
        ConfigurationError: They are.
    """
    if wanted is True:
        raise ConfigurationError(
            "cuda_graphs=True makes CUDA graphs of the steps that are captured on the backend "
            f"torch; on {backend} XLA decides how kernels are launched. Received: "
            "cuda_graphs=True. Write 'auto'."
        )
    return contextlib.nullcontext()
