"""The algorithms once more, in NumPy float64, written from their papers and PyTorch's documents.

A reference is a function of one update: ``parameter, gradient, state, t, learning_rate`` and the
hyperparameters -> the new parameter. ``state`` is a dict that it fills as it likes.
"""

import numpy as np


def l2(p, g, weight_decay):
    return g + weight_decay * p


def mean(state, name, value, beta):
    state[name] = beta * state.get(name, 0.0) + (1 - beta) * value
    return state[name]


def adam_root(state, g, t, beta_2, amsgrad=False):
    v = mean(state, "v", g**2, beta_2)
    if amsgrad:
        v = state["max"] = np.maximum(state.get("max", 0.0), v)
    return np.sqrt(v / (1 - beta_2**t))


def adam(
    p, g, state, t, lr, beta_1=0.9, beta_2=0.999, epsilon=1e-8, weight_decay=0.0, amsgrad=False
):
    g = l2(p, g, weight_decay)
    m = mean(state, "m", g, beta_1) / (1 - beta_1**t)
    return p - lr * m / (adam_root(state, g, t, beta_2, amsgrad) + epsilon)


def adamw(
    p, g, state, t, lr, beta_1=0.9, beta_2=0.999, epsilon=1e-8, weight_decay=0.01, amsgrad=False
):
    m = mean(state, "m", g, beta_1) / (1 - beta_1**t)
    step = m / (adam_root(state, g, t, beta_2, amsgrad) + epsilon)
    return p * (1 - lr * weight_decay) - lr * step


def nadam(
    p,
    g,
    state,
    t,
    lr,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    momentum_decay=4e-3,
    decoupled_weight_decay=False,
):
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = l2(p, g, weight_decay)
    mu = beta_1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta_1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = state["product"] = state.get("product", 1.0) * mu
    m = mean(state, "m", g, beta_1)
    root = adam_root(state, g, t, beta_2) + epsilon
    p = p - lr * (1 - mu) / (1 - product) * g / root
    return p - lr * mu_next / (1 - product * mu_next) * m / root


def rectification(beta_2, t):
    """The factor of RAdam, None before it applies."""
    limit = 2 / (1 - beta_2) - 1
    rho = limit - 2 * t * beta_2**t / (1 - beta_2**t)
    if rho <= 5:
        return None
    return np.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))


def radam(
    p,
    g,
    state,
    t,
    lr,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    decoupled_weight_decay=False,
):
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = l2(p, g, weight_decay)
    m = mean(state, "m", g, beta_1) / (1 - beta_1**t)
    v = mean(state, "v", g**2, beta_2)
    factor = rectification(beta_2, t)
    if factor is None:
        return p - lr * m
    return p - lr * m * factor * np.sqrt(1 - beta_2**t) / (np.sqrt(v) + epsilon)


def sgd(p, g, state, t, lr, momentum=0.0, nesterov=False, dampening=0.0, weight_decay=0.0):
    g = l2(p, g, weight_decay)
    if not momentum:
        return p - lr * g
    first = "b" not in state
    state["b"] = g if first else momentum * state["b"] + (1 - dampening) * g
    return p - lr * (g + momentum * state["b"] if nesterov else state["b"])


def adagrad(
    p, g, state, t, lr, lr_decay=0.0, initial_accumulator_value=0.0, epsilon=1e-10, weight_decay=0.0
):
    g = l2(p, g, weight_decay)
    state["s"] = state.get("s", initial_accumulator_value) + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(state["s"]) + epsilon)


def rmsprop(
    p, g, state, t, lr, rho=0.99, momentum=0.0, epsilon=1e-8, centered=False, weight_decay=0.0
):
    g = l2(p, g, weight_decay)
    v = mean(state, "v", g**2, rho)
    if centered:
        v = v - mean(state, "a", g, rho) ** 2
    step = g / (np.sqrt(np.maximum(v, 0.0)) + epsilon)
    step = state["b"] = momentum * state.get("b", 0.0) + step
    return p - lr * step


def lion(p, g, state, t, lr, beta_1=0.9, beta_2=0.99, weight_decay=0.0):
    m = state.get("m", 0.0)
    direction = np.sign(beta_1 * m + (1 - beta_1) * g)
    state["m"] = beta_2 * m + (1 - beta_2) * g
    return p - lr * (direction + weight_decay * p)


def lamb(p, g, state, t, lr, beta_1=0.9, beta_2=0.999, epsilon=1e-6, weight_decay=0.0):
    m = mean(state, "m", g, beta_1) / (1 - beta_1**t)
    r = m / (adam_root(state, g, t, beta_2) + epsilon) + weight_decay * p
    size, length = np.linalg.norm(p), np.linalg.norm(r)
    return p - lr * (size / length if size and length else 1.0) * r


def ademamix(
    p,
    g,
    state,
    t,
    lr,
    beta_1=0.9,
    beta_2=0.999,
    beta_3=0.9999,
    alpha=5.0,
    t_alpha=None,
    t_beta3=None,
    epsilon=1e-8,
    weight_decay=0.01,
):
    if t_alpha:
        alpha = min(t * alpha / t_alpha, alpha)
    if t_beta3:
        first, last, part = np.log(beta_1), np.log(beta_3), t / t_beta3
        between = np.exp(first * last / ((1 - part) * last + part * first))
        beta_3 = min(between, beta_3) if part < 1 else beta_3
    m = mean(state, "m", g, beta_1) / (1 - beta_1**t)
    s = mean(state, "s", g, beta_3)
    step = (m + alpha * s) / (adam_root(state, g, t, beta_2) + epsilon)
    return p - lr * (step + weight_decay * p)


def stable_adamw(p, g, state, t, lr, beta_1=0.9, beta_2=0.99, epsilon=1e-8, weight_decay=0.01):
    m = mean(state, "m", g, beta_1 * (1 - beta_1 ** (t - 1)) / (1 - beta_1**t))
    v = mean(state, "v", g**2, beta_2 * (1 - beta_2 ** (t - 1)) / (1 - beta_2**t))
    lr = lr / max(1.0, np.sqrt(np.mean(g**2 / np.maximum(v, epsilon**2))))
    return p - lr * weight_decay * p - lr * m / (np.sqrt(v) + epsilon)


def grokadamw(
    p,
    g,
    state,
    t,
    lr,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-8,
    weight_decay=0.01,
    alpha_init=0.98,
    lamb=2.0,
):
    g = g + lamb * mean(state, "slow", g, alpha_init)
    return adamw(p, g, state, t, lr, beta_1, beta_2, epsilon, weight_decay)


def adan(
    p, g, state, t, lr, betas=(0.98, 0.92, 0.99), epsilon=1e-8, weight_decay=0.0, no_prox=False
):
    b1, b2, b3 = betas
    d = g - state.get("previous", g)
    state["previous"] = g
    m = mean(state, "m", g, b1) / (1 - b1**t)
    v = mean(state, "v", d, b2) / (1 - b2**t)
    n = mean(state, "n", (g + b2 * d) ** 2, b3) / (1 - b3**t)
    step = lr * (m + b2 * v) / (np.sqrt(n) + epsilon)
    if no_prox:
        return p * (1 - lr * weight_decay) - step
    return (p - step) / (1 + lr * weight_decay)


REFERENCES = {
    f.__name__: f
    for f in (
        adagrad,
        adam,
        adamw,
        adan,
        ademamix,
        grokadamw,
        lamb,
        lion,
        nadam,
        radam,
        rmsprop,
        sgd,
        stable_adamw,
    )
}

# Hyperparameters to be tried; each is compared over many updates at all gradient scales.
CASES = {
    "adam": [
        {},
        {"amsgrad": True, "weight_decay": 0.1},
        {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3},
        {"beta_2": 0.0},
    ],
    "adamw": [{}, {"amsgrad": True, "weight_decay": 0.1}, {"weight_decay": None}],
    "nadam": [
        {},
        {"weight_decay": 0.1, "momentum_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "beta_1": 0.0},
        {"beta_2": 0.0},
    ],
    "radam": [
        {},
        {"weight_decay": 0.1, "beta_2": 0.9},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "beta_2": 0.99999},
        {"beta_2": 0.5},
        {"beta_2": 0.0},
    ],
    "sgd": [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8, "dampening": 0.3},
        {"momentum": 1.0, "dampening": 1.0},
    ],
    "adagrad": [
        {},
        {"lr_decay": 0.1, "weight_decay": 0.1},
        {"initial_accumulator_value": 0.5, "epsilon": 1e-4},
    ],
    "rmsprop": [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"centered": True, "rho": 0.9},
        {"centered": True, "momentum": 0.5, "epsilon": 1e-3},
    ],
    "lamb": [{}, {"weight_decay": 0.1, "epsilon": 1e-3}],
    "ademamix": [
        {},
        {"weight_decay": None, "t_alpha": 10, "t_beta3": 20},
        {"beta_3": 0.99, "t_alpha": 100, "t_beta3": 100, "alpha": 8.0},
    ],
    "stable_adamw": [{}, {"weight_decay": 0.1, "epsilon": 1e-3}, {"beta_2": 0.5, "beta_1": 0.0}],
    "grokadamw": [{}, {"alpha_init": 0.5, "lamb": 5.0, "weight_decay": 0.1}],
    "adan": [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "no_prox": True, "betas": (0.9, 0.5, 0.9)},
        {"betas": (0.0, 0.0, 0.0)},
    ],
    "lion": [{}, {"weight_decay": 0.1}, {"beta_1": 0.0, "beta_2": 0.5}],
}


def trajectory(name, start, gradients, learning_rate, **hyperparameters):
    """The parameter after each update, in float64."""
    p, state, path = np.asarray(start, "float64"), {}, []
    hyperparameters = {k: 0.0 if v is None else v for k, v in hyperparameters.items()}
    for t, gradient in enumerate(gradients, start=1):
        gradient = np.asarray(gradient, "float64")
        p = REFERENCES[name](p, gradient, state, t, learning_rate, **hyperparameters)
        path.append(p)
    return path
