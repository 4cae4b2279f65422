"""Learning-rate schedules."""

from __future__ import annotations

from optim.schedules.cosine import (
    CosineWarmupWithMinLR,
    CosineWithMinLR,
    CosineWithRestarts,
    CosineWithWarmup,
)
from optim.schedules.plateau import GreedyLR, ReduceLROnPlateau
from optim.schedules.warmup import (
    Constant,
    ConstantWithWarmup,
    FiniteSchedule,
    InverseSqrtWithWarmup,
    LinearWithWarmup,
    PolynomialWithWarmup,
    Schedule,
)
from optim.schedules.warmup_stable_decay import WarmupStableDecay

__all__ = [
    "Constant",
    "ConstantWithWarmup",
    "CosineWarmupWithMinLR",
    "CosineWithMinLR",
    "CosineWithRestarts",
    "CosineWithWarmup",
    "FiniteSchedule",
    "GreedyLR",
    "InverseSqrtWithWarmup",
    "LinearWithWarmup",
    "PolynomialWithWarmup",
    "ReduceLROnPlateau",
    "Schedule",
    "WarmupStableDecay",
]
