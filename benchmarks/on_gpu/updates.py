"""Updates of an optimizer alone: the tensors of GPT-2, against torch's fused AdamW."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch

from on_gpu.machine import timed
from on_gpu.rows import Reporter

NAMES = ["adamw", "lion", "adamw_8bit", "adan", "lamb", "schedule_free_radam", "adafactor"]
NAMES += ["muon", "soap"]

FUSED = "torch.optim.AdamW, fused"


def shapes(tiny: bool) -> list[tuple[int, ...]]:
    """The shapes of GPT-2's 124 million parameters, or of very few."""
    width, depth, vocabulary, length = (16, 1, 32, 8) if tiny else (768, 12, 50_304, 1024)
    found: list[tuple[int, ...]] = [(vocabulary, width), (length, width)]
    for _ in range(depth):
        found += [(width, 3 * width), (3 * width,), (width, width), (width, 4 * width)]
        found += [(4 * width,), (4 * width, width), *[(width,)] * 6]
    return [*found, (width,), (width,)]


def draw(tiny: bool, seed: int, device: str) -> Iterator[torch.Tensor]:
    """Tensors of these shapes."""
    generator = np.random.default_rng(seed)
    for shape in shapes(tiny):
        yield torch.tensor(0.02 * generator.standard_normal(shape, "float32"), device=device)


def updates(report: Reporter) -> None:
    """Time, bytes per second and temporary memory of an update."""
    tiny, on_gpu = report.settings.tiny, report.settings.on_gpu
    device = "cuda" if on_gpu else "cpu"
    gradients = list(draw(tiny, 1, device))
    parameters = sum(gradient.numel() for gradient in gradients)
    speeds: dict[str, float] = {}

    def native() -> dict[str, Any]:
        values = [torch.nn.Parameter(value) for value in draw(tiny, 0, device)]
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        optimizer = torch.optim.AdamW(values, lr=1e-3, fused=True, capturable=on_gpu)
        found = measured(optimizer.step, 28 * parameters, on_gpu)
        speeds[FUSED] = found["TB/s"]
        return found

    def ours(name: str) -> dict[str, Any]:
        import optim

        optimizer = optim.get(name, learning_rate=1e-3)
        variables = [keras.Variable(value) for value in draw(tiny, 0, device)]
        optimizer.build(variables)
        state = sum(variable.value.nbytes for variable in optimizer.variables)

        def step() -> None:
            with torch.no_grad():
                optimizer.apply(list(gradients), variables)

        # What no kernel can do without: parameters and state read and written, gradients read.
        found = measured(step, 12 * parameters + 2 * state, on_gpu)
        if FUSED in speeds:
            found["of torch fused"] = found["TB/s"] / speeds[FUSED]
        return found | {"target": "update adamw" if name == "adamw" else "update"}

    report.attempt(FUSED, native)
    for name in NAMES[:2] if tiny else NAMES:
        report.attempt(f"optim {name}", functools.partial(ours, name))
        gc.collect()


def measured(step: Callable[[], Any], moved: int, on_gpu: bool) -> dict[str, Any]:
    """Milliseconds of a step, as it is called and as a CUDA graph, and its memory.

    Args:
        step: One update.
        moved: Bytes that it cannot do without reading or writing.
        on_gpu: Whether it runs on a GPU.
    """
    found: dict[str, Any] = {}
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        found["temporary MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    seconds = timed(step, 5, on_gpu)
    found["ms, called"] = seconds * 1e3
    if on_gpu:
        here = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            seconds = timed(graph.replay, 10, True)
            found["ms, graph"] = seconds * 1e3
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # which a failed capture does not do
            found["no graph"] = str(error).splitlines()[0][:120]
    return found | {"TB/s": moved / seconds / 1e12}
