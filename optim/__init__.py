"""Optimizers and learning-rate schedules for Keras 3, one rule over PyTorch, TensorFlow and JAX.

Every optimizer is a `keras.optimizers.Optimizer`, so it works in ``model.compile``, in a ``.keras``
file, inside `keras.optimizers.LossScaleOptimizer` and in a training loop of your own. Its algorithm
is one pure float32 rule; how the rule is executed (a fused kernel, or the rule as it is written) is
the business of the running backend.

Example:
    >>> import numpy as np, keras, optim
    >>> schedule = optim.CosineWithWarmup(1e-2, num_warmup_steps=2, num_training_steps=20)
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=optim.AdamW(schedule, weight_decay=0.01), loss="mse")
    >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), epochs=2, verbose=0)
    >>> len(history.history["loss"])
    2
    >>> sorted(optim.scheduler_names())[:2]
    ['constant', 'constant_with_warmup']
"""

from __future__ import annotations

from optim.algorithms import optimizer_classes
from optim.algorithms.adafactor import Adafactor, RelativeStep
from optim.algorithms.adagrad import Adagrad
from optim.algorithms.adam import Adam
from optim.algorithms.adamw import AdamW
from optim.algorithms.adan import Adan
from optim.algorithms.ademamix import AdEMAMix
from optim.algorithms.apollo import APOLLOAdamW
from optim.algorithms.eight_bit import AdamW8bit, AdEMAMix8bit, Lion8bit, RMSprop8bit
from optim.algorithms.ema import EMA
from optim.algorithms.galore import GaLoreAdamW
from optim.algorithms.grokadamw import GrokAdamW
from optim.algorithms.lamb import LAMB
from optim.algorithms.lion import Lion
from optim.algorithms.muon import Muon
from optim.algorithms.nadam import NAdam
from optim.algorithms.radam import RAdam
from optim.algorithms.rmsprop import RMSprop
from optim.algorithms.schedule_free import ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from optim.algorithms.sgd import SGD
from optim.algorithms.soap import SOAP
from optim.algorithms.stable_adamw import StableAdamW
from optim.core.evaluation_weights import SwapEvaluationWeights
from optim.core.optimizer import Optimizer, Slot
from optim.core.parameter_groups import groups_for, layerwise_lr_decay
from optim.core.rule import elementwise
from optim.core.weight_decay import decay_parameter_names, exclude_norms_and_biases
from optim.moved import register_moved
from optim.registry import get, get_scheduler, names, scheduler_names
from optim.schedules.cosine import (
    CosineWarmupWithMinLR,
    CosineWithMinLR,
    CosineWithRestarts,
    CosineWithWarmup,
)
from optim.schedules.keras_callback import FeedMetricSchedule
from optim.schedules.metric_driven import MetricSchedule
from optim.schedules.plateau import GreedyLR, ReduceLROnPlateau
from optim.schedules.plotting import plot_schedule
from optim.schedules.warmup import (
    Constant,
    ConstantWithWarmup,
    InverseSqrtWithWarmup,
    LinearWithWarmup,
    PolynomialWithWarmup,
    Schedule,
)
from optim.schedules.warmup_stable_decay import WarmupStableDecay

DISTRIBUTION = "kbtrain"
"""The distribution with this package, by which kbtrain tells it from others called optim."""

__all__ = [
    "APOLLOAdamW",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "Adan",
    "Constant",
    "ConstantWithWarmup",
    "CosineWarmupWithMinLR",
    "CosineWithMinLR",
    "CosineWithRestarts",
    "CosineWithWarmup",
    "EMA",
    "FeedMetricSchedule",
    "GaLoreAdamW",
    "GreedyLR",
    "GrokAdamW",
    "InverseSqrtWithWarmup",
    "LAMB",
    "LinearWithWarmup",
    "Lion",
    "Lion8bit",
    "MetricSchedule",
    "Muon",
    "NAdam",
    "Optimizer",
    "PolynomialWithWarmup",
    "RAdam",
    "RMSprop",
    "RMSprop8bit",
    "ReduceLROnPlateau",
    "RelativeStep",
    "SGD",
    "SOAP",
    "Schedule",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Slot",
    "StableAdamW",
    "SwapEvaluationWeights",
    "WarmupStableDecay",
    "decay_parameter_names",
    "elementwise",
    "exclude_norms_and_biases",
    "get",
    "get_scheduler",
    "groups_for",
    "layerwise_lr_decay",
    "names",
    "plot_schedule",
    "scheduler_names",
]

# The imports above are what type checkers and readers see; an optimizer that is missing there is
# exported like the others.
for _name, _class in optimizer_classes().items():
    if _name not in __all__:
        globals()[_name] = _class
        __all__.append(_name)
__all__.sort()

register_moved()
