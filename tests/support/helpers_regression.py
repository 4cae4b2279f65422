"""Transformers' regression problem, and a NumPy float64 re-enactment of a whole run on it."""

import math

import keras
import numpy as np


def regression_data(length=64, seed=42, a=2.0, b=3.0):
    """``y = a x + b + noise``; Transformers' draw for the default arguments."""
    state = np.random.RandomState(seed)
    x = state.normal(size=(length,)).astype(np.float32)
    y = a * x + b + state.normal(scale=0.1, size=(length,)).astype(np.float32)
    return x, y.astype(np.float32)


class Line(keras.Model):
    """``a x + b`` with two scalars, which are named so that both are decayed."""

    def __init__(self, a=0.0, b=0.0):
        super().__init__()
        self.a = self.add_weight(shape=(), initializer=keras.initializers.Constant(a), name="a")
        self.b = self.add_weight(shape=(), initializer=keras.initializers.Constant(b), name="b")

    def call(self, x):
        return self.a * x + self.b


def line_values(model):
    """``(a, b)`` as Python floats."""
    return tuple(float(keras.ops.convert_to_numpy(v.value)) for v in (model.a, model.b))


def learning_rate(kind, step, base, warmup, total):
    """Transformers' schedules."""
    if kind == "constant":
        return base
    if step < warmup:
        return base * step / max(1, warmup)
    if kind == "constant_with_warmup":
        return base
    if kind == "linear":
        return base * max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return base * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def simulate(
    x,
    y,
    *,
    start=(0.0, 0.0),
    batch_size=8,
    accumulation=1,
    epochs=3.0,
    max_steps=-1,
    drop_last=False,
    rate=0.1,
    schedule="linear",
    warmup=0.0,
    decay=0.0,
    clip=1.0,
    betas=(0.9, 0.999),
    epsilon=1e-8,
    order=lambda epoch, length: range(length),
):
    """AdamW on the line, in float64: per-step losses, norms and rates, final a and b, mean loss.

    The loss of an update is the mean over all its samples, whatever the micro-batches.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    batches = len(x) // batch_size if drop_last else math.ceil(len(x) / batch_size)
    per_epoch = max(1, math.ceil(batches / accumulation))
    total = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    warmup = int(warmup) if warmup >= 1 else math.ceil(warmup * total - 1e-9)
    p, m, v = np.array(start, np.float64), np.zeros(2), np.zeros(2)
    losses, norms, rates, marks = [], [], [], []
    epoch = 0
    while len(losses) < total:
        indices = np.asarray(order(epoch, len(x)))
        for group in range(per_epoch):
            if len(losses) == total:
                break
            first, last = group * accumulation, min((group + 1) * accumulation, batches)
            rows = indices[first * batch_size : last * batch_size]
            error = p[0] * x[rows] + p[1] - y[rows]
            gradient = np.array([np.mean(2 * error * x[rows]), np.mean(2 * error)])
            norm = np.linalg.norm(gradient)
            if clip > 0:
                gradient = gradient * min(1.0, clip / (norm + 1e-6))
            step = len(losses)
            lr = learning_rate(schedule, step, rate, warmup, total)
            p = p * (1 - lr * decay)
            m = betas[0] * m + (1 - betas[0]) * gradient
            v = betas[1] * v + (1 - betas[1]) * gradient**2
            t = step + 1
            p = p - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + epsilon)
            losses.append(float(np.mean(error**2)))
            norms.append(float(norm))
            rates.append(lr)
            marks.append(epoch + last / batches)
        epoch += 1
    return {
        "loss": losses,
        "grad_norm": norms,
        "learning_rate": rates,
        "epoch": marks,
        "a": p[0],
        "b": p[1],
        "train_loss": float(np.mean(losses)),
        "steps": total,
    }
