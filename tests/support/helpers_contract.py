"""What the contract suite knows about the optimizers, and the small problems it puts them to.

The optimizers come from the registry. One that needs something special says so in `SPECIAL`,
whose fields are all there is to say.
"""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

import optim
from kbtrain import backends

BACKEND = backends.load()


@dataclass(frozen=True)
class Special:
    """How an optimizer differs from the others in the contract suite."""

    # Learning rate at which the parabola and Rosenbrock's function are minimised.
    learning_rate: float = 0.05
    # Arguments to be given always: what has no default, or no sense on tensors this small.
    arguments: dict[str, Any] = field(default_factory=dict)
    # Arguments for the minimisation only.
    minimising: dict[str, Any] = field(default_factory=dict)
    # Numeric arguments for which a negative number makes sense.
    negative: frozenset[str] = frozenset()
    # How far the results of the two kernels may be apart, relative to the movement.
    kernel_tolerance: float = 1e-4
    # Whether a matrix's movements depend on its name, through the random numbers it is given.
    by_name: bool = False


SPECIAL: dict[str, Special] = {
    "adafactor": Special(negative=frozenset({"beta_2_decay"})),
    "adagrad": Special(learning_rate=0.5),
    "adan": Special(learning_rate=0.1),
    "apollo_adamw": Special(
        learning_rate=0.1,
        arguments={"rank": 1},
        minimising={"update_proj_gap": 5},
        by_name=True,
    ),
    # On tensors this small a rank that is smaller than their sides.
    "galore_adamw": Special(
        learning_rate=0.2,
        arguments={"rank": 1, "scale": 1.0},
        minimising={"update_proj_gap": 5},
    ),
    "lamb": Special(learning_rate=0.02),
    "lion": Special(learning_rate=0.02),
    "lion_8bit": Special(learning_rate=0.02),
    # The vectors among these small problems have AdamW's rule, of which the rate is a fraction.
    "muon": Special(arguments={"adamw_multiplier": 1.0}),
    "radam": Special(learning_rate=0.2, minimising={"clipnorm": 1.0}),  # begins as plain momentum
    "rmsprop": Special(learning_rate=0.02),
    "rmsprop_8bit": Special(learning_rate=0.02),
    "schedule_free_adamw": Special(learning_rate=0.2),
    "schedule_free_radam": Special(
        learning_rate=0.2, arguments={"silent_sgd_phase": False}, minimising={"clipnorm": 1.0}
    ),
    "schedule_free_sgd": Special(learning_rate=8e-3),
    "sgd": Special(learning_rate=2e-3, arguments={"momentum": 0.9}),
}


def special(name):
    """The entry of an optimizer, or the defaults."""
    return SPECIAL.get(name, Special())


def _own():
    """One name for each class of this package; aliases share the class."""
    found: dict[Any, str] = {}
    for name in sorted(optim.names(), key=lambda n: (len(n), n)):
        factory = optim.registry.load(optim.registry.OPTIMIZERS, name)
        if factory.__module__.partition(".")[0] == "optim":
            found.setdefault(factory, name)
    return sorted(found.values())


NAMES = _own()


def make(name, learning_rate=None, /, **kwargs):
    """An optimizer of that name with what it always needs."""
    entry = special(name)
    if learning_rate is not None:
        kwargs["learning_rate"] = learning_rate
    return optim.get(name, **({"learning_rate": entry.learning_rate} | entry.arguments | kwargs))


def parameters(name):
    """Hyperparameters with a number as their default: name -> default."""
    factory = optim.registry.load(optim.registry.OPTIMIZERS, name)
    found = {}
    for cls in inspect.getmro(factory):
        if cls is keras.optimizers.Optimizer or "__init__" not in vars(cls):
            continue
        for key, parameter in inspect.signature(cls.__init__).parameters.items():
            if isinstance(parameter.default, bool | int | float):
                found.setdefault(key, parameter.default)
        break
    return found


def optional_arguments(name):
    """Names of its own arguments whose default is None, patterns among them."""
    factory = optim.registry.load(optim.registry.OPTIMIZERS, name)
    return [
        key
        for key, parameter in inspect.signature(factory.__init__).parameters.items()
        if parameter.default is None
    ]


def compiled(optimizer, variables):
    """``call(gradients)``, compiled as the Trainer compiles a step, and its count of traces."""
    optimizer.build(variables)
    traces = []

    def step(gradients):
        traces.append(1)
        BACKEND.apply_optimizer(optimizer, gradients, ops.ones(()), variables)
        return optimizer.iterations + 0

    return BACKEND.compile_step(step, [*variables, *optimizer.variables]), traces


def host(x):
    """A float64 copy of any variable or tensor."""
    value = ops.cast(ops.convert_to_tensor(x), "float32")
    return np.asarray(ops.convert_to_numpy(value), "float64")


def minimise(name, steps=300):
    """Both problems at once, compiled: losses before and after, of each."""
    start = np.array([[3.0, -2.0, 1.0], [-1.0, 2.5, -3.0]], "float32")
    parabola = keras.Variable(start, name="parabola")
    valley = keras.Variable(np.array([-1.0, 1.5], "float32"), name="valley")
    variables = [parabola, valley]
    rate = optim.LinearWithWarmup(special(name).learning_rate, 0, steps)
    decay = {"weight_decay": 0.0} if decays(name) else {}
    optimizer = make(name, rate, **decay, **special(name).minimising)
    optimizer.build(variables)

    def losses():
        x, y = host(valley)
        return np.array([np.sum(host(parabola) ** 2), (1 - x) ** 2 + 20 * (y - x * x) ** 2])

    def step(scale):
        x, y = ops.convert_to_tensor(valley)[0], ops.convert_to_tensor(valley)[1]
        slope = y - x * x
        gradient = ops.stack([-2 * (1 - x) - 80 * slope * x, 40 * slope])
        optimizer.apply([scale * 2 * ops.convert_to_tensor(parabola), scale * gradient], variables)
        return optimizer.iterations + 0

    call = BACKEND.compile_steps(step, [*variables, *optimizer.variables], "auto", steps)
    before = losses()
    call(BACKEND.to_device(np.ones(steps, "float32")), steps)
    return before, losses(), optimizer


def decays(name):
    """Whether it has a weight decay."""
    factory = optim.registry.load(optim.registry.OPTIMIZERS, name)
    return "weight_decay" in inspect.signature(factory).parameters


def small_model():
    """An embedding, a matrix and a bias, named the same however often it is made."""
    model = keras.Sequential(
        [
            keras.layers.Input((3,), dtype="int32"),
            keras.layers.Embedding(5, 4, name="table"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(2, name="head"),
        ],
        name="small",
    )
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(np.sin(np.arange(math.prod(variable.shape)) + i).reshape(variable.shape))
    return model


def fill(variables, seed=3):
    """Give every variable a value of its own that its dtype can hold; returns them by path."""
    generator = np.random.default_rng(seed)
    for variable in variables:
        dtype = keras.utils.standardize_dtype(variable.dtype)
        if "float" in dtype:
            value = generator.uniform(0.25, 1.0, variable.shape)
        elif dtype == "bool":
            value = generator.integers(0, 2, variable.shape).astype(bool)
        else:
            value = generator.integers(1, 100, variable.shape)
        variable.assign(ops.cast(ops.convert_to_tensor(np.asarray(value)), dtype))
    return snapshot(variables)


def snapshot(variables):
    """Values by path, as NumPy arrays.

    The name of the model is in the paths of what was built after it only.
    """
    return {v.path.replace("small_", ""): host(v) for v in variables}
