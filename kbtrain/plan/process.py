"""The process that a plan is made in when this one cannot: its environment variables."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from kbtrain.errors import ConfigurationError

# The level of TensorFlow's log is one that kbtrain has set in this process; the others are of a
# launcher, and a plan is made by one process.
_NOT_PASSED_ON = (
    "TF_CPP_MIN_LOG_LEVEL",
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "KBTRAIN_ADDRESSES"),
)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles with JAX on this machine's processor.

    Args:
        environ: That of this process.

    Raises:
        ConfigurationError: JAX is not installed.
    """
    if importlib.util.find_spec("jax") is None:
        raise ConfigurationError(
            "A plan is compiled with JAX, whatever the backend of the run, and JAX is not "
            "installed here: pip install 'kbtrain[jax]'."
        )
    kept = {name: value for name, value in environ.items() if name not in _NOT_PASSED_ON}
    return kept | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "WANDB_MODE": "disabled",  # a program may call wandb.init() itself
    }
