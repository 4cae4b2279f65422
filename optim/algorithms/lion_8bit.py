"""Lion with its state in 8 bits."""

from typing import Any, Unpack

import keras

from optim.algorithms.lion import Lion
from optim.core.eight_bit import EightBit
from optim.core.optimizer import CommonArguments


@keras.saving.register_keras_serializable(package="optim")
class Lion8bit(EightBit, Lion):
    """`optim.Lion` with its state in 8 bits, block by block.

    One slot of 1.016 bytes an element, in place of 4: see `optim.core.eight_bit.EightBit`. The
    momentum moves by less than the gap between two codes in most updates, so it is rounded up or
    down at random, each as often as it is near.

    Args:
        learning_rate: a number, a learning-rate schedule or a callable without arguments.
        beta_1: share of the momentum in the direction, in [0, 1).
        beta_2: decay rate of the momentum, in [0, 1).
        weight_decay: as in `optim.Lion`.
        keep: regular expression; variables whose path it matches keep float32 state. ``None`` for
            embeddings. Variables of fewer than 4096 elements keep it in any case.
        **common: the arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: if a hyperparameter is out of its range.

    Example:
        >>> import numpy as np, keras, optim
        >>> variable = keras.Variable(np.ones((64, 64), "float32"))
        >>> optimizer = optim.Lion8bit(learning_rate=0.25)
        >>> optimizer.build([variable])
        >>> slots = optimizer.slots_of(variable)
        >>> slots["momentum_codes"].dtype
        'uint8'

    Reference:
        - [Dettmers et al., 8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861)
    """

    full_precision = Lion
    dithered = frozenset({"momentum"})

    def __init__(
        self,
        learning_rate: Any = 1e-4,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        weight_decay: float | None = None,
        keep: str | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            weight_decay=weight_decay,
            keep=keep,
            **common,
        )
