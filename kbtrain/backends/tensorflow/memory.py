"""TensorFlow: memory of GPUs is taken as it is needed, where that can still be chosen."""

from __future__ import annotations

import logging
import os

import tensorflow as tf

logger = logging.getLogger("kbtrain")

VARIABLE = "TF_FORCE_GPU_ALLOW_GROWTH"
"""TensorFlow's environment variable for the same."""

_is_told = False


def prepare() -> None:
    """Let the memory of each GPU grow with its use.

    By default TensorFlow takes nearly all of it when it starts, so that nothing else fits beside
    it. What the program or the environment has set stays. Once the GPUs are in use (a model has
    been built, say) nothing can be changed: a line of the log says so.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus or VARIABLE in os.environ:
        return
    try:
        for gpu in gpus:
            is_set = tf.config.experimental.get_memory_growth(gpu) is not None
            if not is_set and not tf.config.get_logical_device_configuration(gpu):
                tf.config.experimental.set_memory_growth(gpu, True)
    except (RuntimeError, ValueError):
        _tell()


def _tell() -> None:
    global _is_told
    if not _is_told:
        _is_told = True
        logger.info(
            "TensorFlow holds nearly all memory of the GPU, as it does by default: it was in use "
            "before the Trainer was made. For memory that grows with its use, set the environment "
            "variable %s=true, or let model_init make the model.",
            VARIABLE,
        )
