"""RMSprop with its state in 8 bits."""

from typing import Any, Unpack

import keras

from optim.algorithms.rmsprop import RMSprop
from optim.core.eight_bit import EightBit
from optim.core.optimizer import CommonArguments


@keras.saving.register_keras_serializable(package="optim")
class RMSprop8bit(EightBit, RMSprop):
    """`optim.RMSprop` with its state in 8 bits, block by block.

    A slot of 1.016 bytes an element, two with momentum, in place of 4 bytes each: see
    `optim.core.eight_bit.EightBit`. There is no centred form: the difference of two rounded numbers
    of nearly the same size would be mostly rounding, and it is the denominator.

    Args:
        learning_rate: a number, a learning-rate schedule or a callable without arguments.
        rho: decay rate of the mean square, in [0, 1).
        momentum: decay rate of the sum of movements, in [0, 1].
        epsilon: keeps the denominator away from zero, not negative.
        weight_decay: as in `optim.RMSprop`.
        keep: regular expression; variables whose path it matches keep float32 state. ``None`` for
            embeddings. Variables of fewer than 4096 elements keep it in any case.
        **common: the arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: if a hyperparameter is out of its range.

    Example:
        >>> import numpy as np, keras, optim
        >>> variable = keras.Variable(np.ones((64, 64), "float32"))
        >>> optimizer = optim.RMSprop8bit(learning_rate=0.25)
        >>> optimizer.build([variable])
        >>> slots = optimizer.slots_of(variable)
        >>> slots["velocity_codes"].dtype
        'uint8'

    Reference:
        - [Dettmers et al., 8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861)
    """

    full_precision = RMSprop

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        rho: float = 0.99,
        momentum: float = 0.0,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        keep: str | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            rho=rho,
            momentum=momentum,
            epsilon=epsilon,
            weight_decay=weight_decay,
            keep=keep,
            **common,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        config = super().get_config()
        del config["centered"]
        return config
