"""AdamW, AdEMAMix, Lion and RMSprop with their state in 8 bits."""

from __future__ import annotations

from typing import Any, Unpack

import keras

from optim.algorithms.adamw import AdamW
from optim.algorithms.ademamix import AdEMAMix
from optim.algorithms.lion import Lion
from optim.algorithms.rmsprop import RMSprop
from optim.core.eight_bit import EightBit
from optim.core.optimizer import CommonArguments


@keras.saving.register_keras_serializable(package="optim")
class AdamW8bit(EightBit, AdamW):
    """`optim.AdamW` with its state in 8 bits, block by block.

    Two slots of 1.016 bytes an element, in place of 8 bytes: see `optim.core.eight_bit.EightBit`.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: As in `optim.AdamW`.
        keep: Regular expression; variables whose path it matches keep float32 state. ``None`` for
            embeddings. Variables of fewer than 4096 elements keep it in any case.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import numpy as np, keras, optim
        >>> variable = keras.Variable(np.ones((64, 64), "float32"))
        >>> optimizer = optim.AdamW8bit(learning_rate=0.25)
        >>> optimizer.build([variable])
        >>> slots = optimizer.slots_of(variable)
        >>> slots["momentum_codes"].dtype
        'uint8'

    Reference:
        - [Dettmers et al., 8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861)
    """

    full_precision = AdamW

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        keep: str | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            keep=keep,
            **common,
        )


@keras.saving.register_keras_serializable(package="optim")
class AdEMAMix8bit(EightBit, AdEMAMix):
    """`optim.AdEMAMix` with its state in 8 bits, block by block.

    Three slots of 1.016 bytes an element, in place of 12 bytes: see
    `optim.core.eight_bit.EightBit`. In most updates the slow mean moves by less than the spacing of
    its codes, and then it stays.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        beta_3: Decay rate of the slow mean, in [0, 1).
        alpha: Weight of the slow mean, not negative.
        t_alpha: Updates over which ``alpha`` grows from 0; ``None``: at once.
        t_beta3: Updates over which the slow mean slows down; ``None``: at once.
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: As in `optim.AdEMAMix`.
        keep: Regular expression; variables whose path it matches keep float32 state. ``None`` for
            embeddings. Variables of fewer than 4096 elements keep it in any case.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

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


@keras.saving.register_keras_serializable(package="optim")
class Lion8bit(EightBit, Lion):
    """`optim.Lion` with its state in 8 bits, block by block.

    One slot of 1.016 bytes an element, in place of 4: see `optim.core.eight_bit.EightBit`. The
    momentum moves by less than the gap between two codes in most updates, so it is rounded up or
    down at random, each as often as it is near.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Share of the momentum in the direction, in [0, 1).
        beta_2: Decay rate of the momentum, in [0, 1).
        weight_decay: As in `optim.Lion`.
        keep: Regular expression; variables whose path it matches keep float32 state. ``None`` for
            embeddings. Variables of fewer than 4096 elements keep it in any case.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

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


@keras.saving.register_keras_serializable(package="optim")
class RMSprop8bit(EightBit, RMSprop):
    """`optim.RMSprop` with its state in 8 bits, block by block.

    A slot of 1.016 bytes an element, two with momentum, in place of 4 bytes each: see
    `optim.core.eight_bit.EightBit`. There is no centred form: the difference of two rounded numbers
    of nearly the same size would be mostly rounding, and it is the denominator.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        rho: Decay rate of the mean square, in [0, 1).
        momentum: Decay rate of the sum of updates, in [0, 1].
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: As in `optim.RMSprop`.
        keep: Regular expression; variables whose path it matches keep float32 state. ``None`` for
            embeddings. Variables of fewer than 4096 elements keep it in any case.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

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
