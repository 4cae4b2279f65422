"""Random numbers from a seed tensor in one Triton kernel; see ``capture.random`` for the generator.

As operations of PyTorch they take a dozen passes over integers of 64 bits, 200 bytes a number. The
bits are the same, and so are uniform numbers, integers and choices. Normal numbers have other
roundings of a logarithm and a cosine.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from kbtrain.backends.torch.fusion.scalar_kernel import compiled

_TEXT = """\
import triton
import triton.language as tl


@triton.jit
def shuffled(z):
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def kernel(seed, given, out, count, a, b, KIND: tl.constexpr, DIGITS: tl.constexpr,
           WIDE: tl.constexpr, BLOCK: tl.constexpr):
    step = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    first = tl.load(seed).to(tl.int64).to(tl.uint64, bitcast=True)
    second = tl.load(seed + 1).to(tl.int64).to(tl.uint64, bitcast=True)
    key = shuffled(shuffled(first + step) + second * step)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    z = shuffled(key + (places + 1).to(tl.uint64, bitcast=True) * step)
    if KIND == "integer":
        width = tl.full((), 0, tl.int64) + b - a  # which 32 bits may not hold
        x = (z >> 1).to(tl.int64, bitcast=True) % width + a
    elif KIND == "normal":
        low = (z & tl.full((), 0xFFFFFFFF, tl.uint64)).to(tl.int64, bitcast=True)
        top = ((z >> 32) + 1).to(tl.int64, bitcast=True)
        radius = tl.log(top.to(WIDE) * 2.3283064365386963e-10) * -2.0
        angle = low.to(WIDE) * 1.4629180792671596e-09
        x = tl.sqrt(radius) * tl.cos(angle) * b + a
    else:
        digits = (z >> (64 - DIGITS)).to(tl.int64, bitcast=True)
        x = digits.to(WIDE) * (1.0 / (1 << DIGITS))
        if KIND == "choice":
            x = (x < tl.load(given + places, inside, 0).to(WIDE)).to(WIDE)
    tl.store(out + places, x.to(out.dtype.element_ty), inside)
"""

_BLOCK = 1024


@functools.cache
def _kernel() -> Any:
    return compiled(_TEXT)


def text() -> str:
    """The text of the kernel."""
    return _TEXT


def _fill(
    seed: torch.Tensor,
    out: torch.Tensor,
    kind: str,
    digits: int = 24,
    given: torch.Tensor | None = None,
    numbers: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    import triton.language as tl

    count = out.numel()
    if not count:
        return out
    wide = tl.float64 if out.dtype is torch.float64 else tl.float32
    # Triton launches on the current device.
    place = torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext()
    with place:
        _kernel()[(math.ceil(count / _BLOCK),)](
            *(seed, out if given is None else given, out, count, *numbers),
            KIND=kind,
            DIGITS=digits,
            WIDE=wide,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return out


def rand(seed: torch.Tensor, size: Sequence[int], dtype: torch.dtype, digits: int) -> torch.Tensor:
    """Uniform in [0, 1), of so many random bits."""
    out = torch.empty(tuple(size), dtype=dtype, device=seed.device)
    return _fill(seed, out, "uniform", digits)


def normal(
    seed: torch.Tensor, mean: float, std: float, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Normal, by Box-Muller."""
    out = torch.empty(tuple(size), dtype=dtype, device=seed.device)
    return _fill(seed, out, "normal", numbers=(mean, std))


def randint(
    seed: torch.Tensor, low: int, high: int, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Integers of [low, high)."""
    out = torch.empty(tuple(size), dtype=dtype, device=seed.device)
    return _fill(seed, out, "integer", numbers=(low, high))


def bernoulli(seed: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """1 with probability ``p``, else 0."""
    given = p.contiguous()
    return _fill(seed, torch.empty_like(given), "choice", given=given)
