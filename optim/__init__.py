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

from optim.adafactor import Adafactor, RelativeStep
from optim.adagrad import Adagrad
from optim.adam import Adam
from optim.adamw import AdamW
from optim.adamw_8bit import AdamW8bit
from optim.adan import Adan
from optim.ademamix import AdEMAMix
from optim.ademamix_8bit import AdEMAMix8bit
from optim.apollo import APOLLOAdamW
from optim.cosine import (
    CosineWarmupWithMinLR,
    CosineWithMinLR,
    CosineWithRestarts,
    CosineWithWarmup,
)
from optim.decay import decay_parameter_names, exclude_norms_and_biases
from optim.ema import EMA
from optim.evaluation_weights import SwapEvaluationWeights
from optim.feed_metric import FeedMetricSchedule
from optim.galore import GaLoreAdamW
from optim.grokadamw import GrokAdamW
from optim.lamb import LAMB
from optim.lion import Lion
from optim.lion_8bit import Lion8bit
from optim.metric_schedule import MetricSchedule
from optim.muon import Muon
from optim.nadam import NAdam
from optim.optimizer import Optimizer, Slot
from optim.parameter_groups import groups_for, layerwise_lr_decay
from optim.plateau import GreedyLR, ReduceLROnPlateau
from optim.plotting import plot_schedule
from optim.radam import RAdam
from optim.registry import get, get_scheduler, names, scheduler_names
from optim.rmsprop import RMSprop
from optim.rmsprop_8bit import RMSprop8bit
from optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from optim.schedules import (
    Constant,
    ConstantWithWarmup,
    InverseSqrtWithWarmup,
    LinearWithWarmup,
    PolynomialWithWarmup,
    Schedule,
)
from optim.sgd import SGD
from optim.soap import SOAP
from optim.stable_adamw import StableAdamW
from optim.warmup_stable_decay import WarmupStableDecay

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
    "exclude_norms_and_biases",
    "get",
    "get_scheduler",
    "groups_for",
    "layerwise_lr_decay",
    "names",
    "plot_schedule",
    "scheduler_names",
]
