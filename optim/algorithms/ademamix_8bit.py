"""AdEMAMix with its state in 8 bits."""

from typing import Any, Unpack

import keras

from optim.algorithms.ademamix import AdEMAMix
from optim.core.eight_bit import EightBit
from optim.core.optimizer import CommonArguments


@keras.saving.register_keras_serializable(package="optim")
class AdEMAMix8bit(EightBit, AdEMAMix):
    """`optim.AdEMAMix` with its state in 8 bits, block by block.

    Three slots of 1.016 bytes an element, in place of 12 bytes: see
    `optim.core.eight_bit.EightBit`. In most updates the slow mean moves by less than the spacing of
    its codes, and then it stays.

    Args:
        learning_rate: a number, a learning-rate schedule or a callable without arguments.
        beta_1: decay rate of the mean of the gradient, in [0, 1).
        beta_2: decay rate of the mean of its square, in [0, 1).
        beta_3: decay rate of the slow mean, in [0, 1).
        alpha: weight of the slow mean, not negative.
        t_alpha: updates over which ``alpha`` grows from 0; ``None``: at once.
        t_beta3: updates over which the slow mean slows down; ``None``: at once.
        epsilon: keeps the denominator away from zero, not negative.
        weight_decay: as in `optim.AdEMAMix`.
        keep: regular expression; variables whose path it matches keep float32 state. ``None`` for
            embeddings. Variables of fewer than 4096 elements keep it in any case.
        **common: the arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: if a hyperparameter is out of its range.

    Example:
        >>> import numpy as np, keras, optim
        >>> variable = keras.Variable(np.ones((64, 64), "float32"))
        >>> optimizer = optim.AdEMAMix8bit(learning_rate=0.25)
        >>> optimizer.build([variable])
        >>> slots = optimizer.slots_of(variable)
        >>> slots["momentum_codes"].dtype
        'uint8'

    Reference:
        - [Dettmers et al., 8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861)
    """

    full_precision = AdEMAMix

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        beta_3: float = 0.9999,
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        keep: str | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            beta_3=beta_3,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            epsilon=epsilon,
            weight_decay=weight_decay,
            keep=keep,
            **common,
        )
