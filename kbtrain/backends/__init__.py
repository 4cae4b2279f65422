"""What differs between the frameworks, and nothing else.

``load()`` returns the module of the backend Keras runs on. Each module has the same functions:

===========================  ======================================================================
``name``                     the backend's name
``compile_step``             a Python function over Keras variables -> one compiled call
``compile_steps``            the same, for several steps in one call
``compile_eval_steps``       several evaluation steps in one call, whose outputs may be large
``compile_model_steps``      a model's own ``train_step``, in place of ours
``run_train_step``, ...      a model's own steps, called as Keras calls them
``value_and_grad``           loss, gradients and the state the layers want to change
``dropping``                 a scope in which what layers assign is forgotten
``recompute``                a function that is run again for its gradients
``scan``                     a loop inside the step, over a leading axis
``accept_numbers``           a class whose objects stand for tensors
``is_symbolic``              whether a variable stands for its values in many calls: a trace
``commit_if``, ``run_if``    assignments that happen only when a flag on the device says so
``undoable``                 assignments that can be taken back by such a flag
``apply_optimizer``          one update of a Keras optimizer, with gradients times a factor
``global_norm``              over a list of gradients, in one pass
``to_device``, ``to_host``   batches in, numbers out
``ragged``                   a ragged tensor from padded arrays; on TensorFlow only
``start_to_host``            the same, begun now and waited for later
``host_view``                a variable's value on the host, read at once and never written to
``synchronize``              wait until everything that was started is done
``rng_state``, ...           the framework's own random state, outside Keras' seed generators
``inference``                code of the user's that wants no gradients
``place``, ``device_scope``  where variables and batches live; ``devices``: where they can
``numerics``                 TensorFloat-32, deterministic kernels
``device_info``, ...         what the hardware is, how much memory is used, what ran out, to free it
===========================  ======================================================================
"""

import importlib
from types import ModuleType

import keras


def load() -> ModuleType:
    """Return the backend module of the framework Keras was imported with.

    Raises:
        ImportError: Keras runs on a backend that kbtrain has no module for.
    """
    name = keras.backend.backend()
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise ImportError(
            f"kbtrain runs on torch, tensorflow and jax. Received: the Keras backend {name!r}. "
            "Set KERAS_BACKEND to one of the three before importing keras."
        ) from None
