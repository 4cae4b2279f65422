"""Time of one AdamW update: optim, Keras and the framework's own, side by side.

    python benchmarks/optimizer_update.py --backend torch

The candidates take turns within a round, so that a noisy machine disturbs all of them alike; the
figure to read is the median over the rounds of the time relative to the native one.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

Step = Callable[[], None]

# 12 layers of width 512 with ten tensors each, like the blocks of a small transformer: 37.8 million
# parameters in 120 tensors.
LAYERS = 12
SHAPES = [(512, 1536), (1536,), (512, 512), (512,), (512, 2048), (2048,), (2048, 512), (512,)]
SHAPES += [(512,), (512,)]
HYPERPARAMETERS: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.01}


def arrays(seed: int, shapes: list[tuple[int, ...]]) -> list[Any]:
    import numpy as np

    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape, dtype="float32") for shape in shapes]


def torch_steps(shapes: list[tuple[int, ...]]) -> tuple[dict[str, Step], Callable[[], None]]:
    import keras
    import torch

    import optim

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gradients = [torch.tensor(a, device=device) for a in arrays(1, shapes)]

    def through_keras(optimizer: Any) -> Step:
        variables = [keras.Variable(a) for a in arrays(0, shapes)]
        optimizer.build(variables)
        return lambda: optimizer.apply(gradients, variables)

    parameters = [torch.nn.Parameter(torch.tensor(a, device=device)) for a in arrays(0, shapes)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    native = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
    steps = {
        "torch.optim.AdamW(fused=True)": native.step,
        "optim.AdamW": through_keras(optim.AdamW(**HYPERPARAMETERS)),
        "optim.AdamW(kernel='reference')": through_keras(
            optim.AdamW(**HYPERPARAMETERS, kernel="reference")
        ),
        "keras.optimizers.AdamW": through_keras(keras.optimizers.AdamW(**HYPERPARAMETERS)),
    }
    return steps, torch.cuda.synchronize if device == "cuda" else lambda: None


def jax_steps(shapes: list[tuple[int, ...]]) -> tuple[dict[str, Step], Callable[[], None]]:
    import jax
    import keras
    import optax

    import optim

    gradients = [jax.numpy.asarray(a) for a in arrays(1, shapes)]
    last: list[Any] = [None]

    def through_keras(optimizer: Any) -> Step:
        variables = [keras.Variable(a) for a in arrays(0, shapes)]
        optimizer.build(variables)

        def update(parameters: Any, state: Any, gradients: Any) -> Any:
            return optimizer.stateless_apply(state, gradients, parameters)

        # JAX gives a donated buffer to the first result of its shape: with results in another
        # order than the arguments, XLA would have to copy every tensor (three times the time).
        jitted = jax.jit(update, donate_argnums=(0, 1))
        held = [[v.value for v in variables], [v.value for v in optimizer.variables]]

        def step() -> None:
            held[:] = jitted(*held, gradients)
            last[0] = held[0]

        return step

    def native() -> Step:
        transformation = optax.adamw(1e-3, weight_decay=0.01)

        def update(parameters: Any, state: Any, gradients: Any) -> Any:
            updates, state = transformation.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        jitted = jax.jit(update, donate_argnums=(0, 1))
        parameters = [jax.numpy.asarray(a) for a in arrays(0, shapes)]
        held = [parameters, transformation.init(parameters)]

        def step() -> None:
            held[:] = jitted(*held, gradients)
            last[0] = held[0]

        return step

    steps = {
        "optax.adamw, jit, donated": native(),
        "optim.AdamW": through_keras(optim.AdamW(**HYPERPARAMETERS)),
        "keras.optimizers.AdamW": through_keras(keras.optimizers.AdamW(**HYPERPARAMETERS)),
    }
    return steps, lambda: jax.block_until_ready(last[0])


def tensorflow_steps(shapes: list[tuple[int, ...]]) -> tuple[dict[str, Step], Callable[[], None]]:
    import keras
    import tensorflow as tf

    import optim

    gradients = [tf.constant(a) for a in arrays(1, shapes)]
    watched: list[Any] = []

    def through_keras(optimizer: Any, jit_compile: bool) -> Step:
        variables = [keras.Variable(a) for a in arrays(0, shapes)]
        optimizer.build(variables)
        watched.append(variables[-1])

        @tf.function(jit_compile=jit_compile)
        def step() -> None:
            optimizer.apply(gradients, variables)

        return step

    steps = {
        "keras.optimizers.AdamW, XLA": through_keras(
            keras.optimizers.AdamW(**HYPERPARAMETERS), True
        ),
        "optim.AdamW, XLA": through_keras(optim.AdamW(**HYPERPARAMETERS), True),
        "keras.optimizers.AdamW, tf.function": through_keras(
            keras.optimizers.AdamW(**HYPERPARAMETERS), False
        ),
        "optim.AdamW, tf.function": through_keras(optim.AdamW(**HYPERPARAMETERS), False),
    }

    def wait() -> None:
        for variable in watched:
            variable.numpy()

    return steps, wait


def measure(steps: dict[str, Step], wait: Callable[[], None], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, float] = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        wait()
        first[name] = time.perf_counter() - start
        step()
        wait()
    for _ in range(rounds):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            times[name].append(time.perf_counter() - start)
    native = next(iter(steps))
    print(f"{'':40} first call s   median ms   relative to {native}")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times[native], strict=True))
        print(f"{name:40} {first[name]:12.2f} {statistics.median(values) * 1e3:11.2f} {ratio:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["torch", "tensorflow", "jax"], default=None)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--layers", type=int, default=LAYERS, help="size of the model")
    arguments = parser.parse_args()
    if arguments.backend is not None:
        os.environ["KERAS_BACKEND"] = arguments.backend  # read by Keras when it is imported
    import keras

    makers = {"torch": torch_steps, "tensorflow": tensorflow_steps, "jax": jax_steps}
    shapes = SHAPES * arguments.layers
    steps, wait = makers[keras.backend.backend()](shapes)
    measure(steps, wait, arguments.rounds)


if __name__ == "__main__":
    main()
