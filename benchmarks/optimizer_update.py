"""Time and memory of one update: every optimizer of ``optim``, of Keras and of the framework.

    python benchmarks/optimizer_update.py --backend torch
    python benchmarks/optimizer_update.py --backend jax --optimizers adamw lion --json jax.json

The candidates for one algorithm alternate within a round, together with ``optim.AdamW``, so that
noise affects all of them alike. The ratios are the figures to compare; they are medians over the
rounds.

- ``x AdamW``: time relative to ``optim.AdamW``.
- ``per byte``: the same per byte of unavoidable memory traffic (parameter and state read and
  written, gradient read).
- ``extra MiB``: peak memory of one update, on top of the memory in use before it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# 12 layers of width 512 with ten tensors each, like the blocks of a small transformer: 37.8 million
# parameters in 120 tensors.
LAYERS = 12
SHAPES = [(512, 1536), (1536,), (512, 512), (512,), (512, 2048), (2048,), (2048, 512), (512,)]
SHAPES += [(512,), (512,)]
SMALL = [(32, 96), (96,), (32, 32), (32,)]

KERAS = {
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamw": "AdamW",
    "lamb": "Lamb",
    "lion": "Lion",
    "muon": "Muon",
    "nadam": "Nadam",
    "rmsprop": "RMSprop",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "sgd": "SGD",
}
TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "adafactor": ("Adafactor", {}),
    "adagrad": ("Adagrad", {"fused": True}),
    "adam": ("Adam", {"fused": True}),
    "adamw": ("AdamW", {"fused": True}),
    "nadam": ("NAdam", {"foreach": True}),
    "radam": ("RAdam", {"foreach": True}),
    "rmsprop": ("RMSprop", {"foreach": True}),
    "sgd": ("SGD", {"fused": True, "momentum": 0.9}),
}
OPTAX: dict[str, dict[str, Any]] = {
    "adafactor": {},
    "adagrad": {},
    "adam": {},
    "adamw": {},
    "adan": {},
    "lamb": {},
    "lion": {},
    "nadam": {},
    "radam": {},
    "rmsprop": {},
    "sgd": {"momentum": 0.9},
}
ARGUMENTS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
BASE = "optim.AdamW"


@dataclass
class Candidate:
    """Something that updates the parameters.

    Attributes:
        step: Runs one update.
        wait: Returns when the device has finished.
        state: Size of its state in bytes.
    """

    step: Callable[[], Any]
    wait: Callable[[], Any]
    state: int = 0


def arrays(seed: int, shapes: list[tuple[int, ...]]) -> list[Any]:
    import numpy as np

    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape, dtype="float32") for shape in shapes]


def state_bytes(optimizer: Any) -> int:
    import numpy as np

    sizes = {"bfloat16": 2}
    return sum(
        int(np.prod(v.shape)) * (sizes.get(str(v.dtype)) or np.dtype(str(v.dtype)).itemsize)
        for v in optimizer.variables
    )


def through_keras(shapes: list[tuple[int, ...]], compile_update: Any, optimizer: Any) -> Candidate:
    """A Keras optimizer, compiled as usual for the backend."""
    import keras

    variables = [keras.Variable(a) for a in arrays(0, shapes)]
    optimizer.build(variables)
    step, wait = compile_update(optimizer, variables)
    return Candidate(step, wait, state_bytes(optimizer))


# ---- by framework --------------------------------------------------------------------------------


def torch_tools(shapes: list[tuple[int, ...]]) -> tuple[Any, dict[str, Callable[[], Candidate]]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gradients = [torch.tensor(a, device=device) for a in arrays(1, shapes)]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def compile_update(optimizer: Any, variables: list[Any]) -> Any:
        return lambda: optimizer.apply(gradients, variables), wait

    def native(name: str, kwargs: dict[str, Any]) -> Candidate:
        values = [torch.nn.Parameter(torch.tensor(a, device=device)) for a in arrays(0, shapes)]
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        return Candidate(getattr(torch.optim, name)(values, lr=1e-3, **kwargs).step, wait)

    natives: dict[str, Callable[[], Candidate]] = {
        key: functools.partial(native, *entry) for key, entry in TORCH.items()
    }
    return {"": compile_update}, natives


def jax_tools(shapes: list[tuple[int, ...]]) -> tuple[Any, dict[str, Callable[[], Candidate]]]:
    import jax
    import optax

    gradients = [jax.numpy.asarray(a) for a in arrays(1, shapes)]

    def running(update: Any, held: list[Any]) -> tuple[Any, Any]:
        jitted = jax.jit(update, donate_argnums=(0, 1))

        def step() -> None:
            held[:] = jitted(*held, gradients)

        return step, lambda: jax.block_until_ready(held)

    def compile_update(optimizer: Any, variables: list[Any]) -> Any:
        def update(parameters: Any, state: Any, gradients: Any) -> Any:
            return optimizer.stateless_apply(state, gradients, parameters)

        # JAX assigns a donated buffer to the first result of its shape: if the results were in
        # another order than the arguments, XLA would copy every tensor (three times the time).
        values = [[v.value for v in variables], [v.value for v in optimizer.variables]]
        return running(update, values)

    def native(name: str, kwargs: dict[str, Any]) -> Candidate:
        transformation = getattr(optax, name)(1e-3, **kwargs)

        def update(parameters: Any, state: Any, gradients: Any) -> Any:
            updates, state = transformation.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        parameters = [jax.numpy.asarray(a) for a in arrays(0, shapes)]
        return Candidate(*running(update, [parameters, transformation.init(parameters)]))

    natives: dict[str, Callable[[], Candidate]] = {
        key: functools.partial(native, key, kwargs)
        for key, kwargs in OPTAX.items()
        if hasattr(optax, key)
    }
    return {"": compile_update}, natives


def tensorflow_tools(
    shapes: list[tuple[int, ...]],
) -> tuple[Any, dict[str, Callable[[], Candidate]]]:
    import tensorflow as tf

    gradients = [tf.constant(a) for a in arrays(1, shapes)]

    def compiled(jit_compile: bool) -> Any:
        def compile_update(optimizer: Any, variables: list[Any]) -> Any:
            step = tf.function(
                lambda: optimizer.apply(gradients, variables), jit_compile=jit_compile
            )
            return step, lambda: variables[-1].numpy()

        return compile_update

    return {", XLA": compiled(True), ", tf.function": compiled(False)}, {}


TOOLS = {"torch": torch_tools, "tensorflow": tensorflow_tools, "jax": jax_tools}


# ---- measuring -----------------------------------------------------------------------------------


def resident(field: str) -> int | None:
    """A field of ``/proc/self/status`` in bytes; None on systems other than Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Return free memory of the C library to the system, so that allocations become visible."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def extra_memory(candidate: Candidate) -> float | None:
    """Peak memory of one update in MiB, on top of the memory in use before it."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.step()
        candidate.wait()
        result: float | None = (torch.cuda.max_memory_allocated() - before) / 2**20
        return result
    gc.collect()
    give_back()
    before_step = resident("VmRSS")
    if before_step is None:
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    except OSError:
        return None
    candidate.step()
    candidate.wait()
    return ((resident("VmHWM") or before_step) - before_step) / 2**20


def timed(candidate: Candidate) -> float:
    candidate.wait()
    start = time.perf_counter()
    candidate.step()
    candidate.wait()
    return time.perf_counter() - start


def measure(
    makers: dict[str, Callable[[], Candidate]], rounds: int, values: int
) -> dict[str, dict[str, Any]]:
    """First call, median time, ratios to the first candidate, and memory of each candidate."""
    candidates, first, memory = {}, {}, {}
    for name, make in makers.items():
        candidates[name] = make()
        first[name] = timed(candidates[name])
        timed(candidates[name])
        memory[name] = extra_memory(candidates[name])
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            times[name].append(timed(candidate))
    base = next(iter(candidates))
    moved = {name: 12 * values + 2 * c.state for name, c in candidates.items()}
    result = {}
    for name in candidates:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
        known = candidates[name].state or name == base
        result[name] = {
            "first_call_s": first[name],
            "median_ms": statistics.median(times[name]) * 1e3,
            "relative_to_adamw": ratio,
            "relative_per_byte": ratio * moved[base] / moved[name] if known else None,
            "state_bytes_per_parameter": candidates[name].state / values,
            "extra_mib": memory[name],
        }
    return result


def candidates_of(
    name: str, shapes: list[tuple[int, ...]], tools: tuple[Any, Any]
) -> dict[str, Callable[[], Candidate]]:
    """Factories of all candidates for one algorithm, ``optim.AdamW`` first."""
    import keras

    import optim

    forms, natives = tools
    makers: dict[str, Callable[[], Candidate]] = {}
    given = ARGUMENTS.get(name, {})
    for label, form in forms.items():

        def maker(factory: Any, form: Any = form) -> Callable[[], Candidate]:
            return lambda: through_keras(shapes, form, factory())

        makers.setdefault(BASE + label, maker(lambda: optim.AdamW(1e-3)))
        if name != "adamw":
            makers[f"optim {name}{label}"] = maker(
                lambda: optim.get(name, learning_rate=1e-3, **given)
            )
        if name in KERAS:
            counterpart = getattr(keras.optimizers, KERAS[name])
            makers[f"keras.optimizers.{KERAS[name]}{label}"] = maker(
                lambda counterpart=counterpart: counterpart(learning_rate=1e-3, **given)
            )
    if name in natives:
        makers[f"native {name}"] = natives[name]
    return makers


def registered() -> list[str]:
    """One name for each optimizer class of ``optim``, the shortest if there are several."""
    import optim

    found: dict[Any, str] = {}
    for name in sorted(optim.names(), key=lambda n: (len(n), n)):
        factory = optim.registry.load(optim.registry.OPTIMIZERS, name)
        if factory.__module__.startswith("optim."):
            found.setdefault(factory, name)
    return sorted(found.values())


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    print(f"\n{name:42} first call s  median ms   x AdamW  per byte  extra MiB", flush=True)
    for label, row in rows.items():
        print(
            f"  {label:40} {row['first_call_s']:12.2f} {row['median_ms']:10.2f} "
            f"{row['relative_to_adamw']:9.2f} {cell(row['relative_per_byte'], 2):>9} "
            f"{cell(row['extra_mib'], 1):>10}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=sorted(TOOLS), default=None)
    parser.add_argument("--optimizers", nargs="*", default=None, help="names; all by default")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=LAYERS, help="size of the model")
    parser.add_argument("--small", action="store_true", help="tiny tensors, to try it out")
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    arguments = parser.parse_args()
    if arguments.backend is not None:
        os.environ["KERAS_BACKEND"] = arguments.backend  # Keras reads it on import
    import keras

    shapes = (SMALL if arguments.small else SHAPES) * arguments.layers
    values = sum(a.size for a in arrays(0, shapes))
    backend = keras.backend.backend()
    print(f"{backend}: {values / 1e6:.1f} million parameters in {len(shapes)} tensors")
    tools = TOOLS[backend](shapes)
    results = {}
    for name in arguments.optimizers or registered():
        results[name] = measure(candidates_of(name, shapes, tools), arguments.rounds, values)
        show(name, results[name])
        gc.collect()
        if arguments.json is not None:
            document = {"backend": backend, "parameters": values, "results": results}
            arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
