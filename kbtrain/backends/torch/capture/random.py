"""Random numbers from a seed tensor, in operations that can be recorded.

Keras creates a generator from the seed of a layer, whose value it reads on the host. On a CPU that
is free, and the recorded step does the same, with the same numbers. On a GPU it would stall the
queue for every layer in every step and rule out CUDA graphs, so the numbers are computed from the
seed on the device. The generator is SplitMix64, which advances a counter by a constant and mixes
its bits, so that every number of a tensor can be computed independently:

    z = key + (i + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z ^ (z >> 31)

modulo 2^64, where the key is mixed from the two integers of the seed. One Triton kernel does it
(``fusion.random_kernel``), or a dozen operations of PyTorch where that is not installed. See
Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

# The only function in which Keras turns the state of a seed generator into a torch generator.
from keras.src.backend.torch import random as keras_random
from keras.src.random.seed_generator import draw_seed

from kbtrain.backends.torch.device import is_oom
from kbtrain.backends.torch.fusion import random_kernel
from kbtrain.backends.torch.fusion.scalar_kernel import is_available, is_capturing
from kbtrain.utils.fallback import PrivateApi


class Seeds:
    """Stands in for ``torch_seed_generator``, and keeps the seed of each generator."""

    def __init__(self) -> None:
        self._known: list[tuple[torch.Generator, torch.Tensor]] = []

    def generator(self, seed: Any) -> torch.Generator | None:
        """A generator that is never used to draw; ``of`` returns its seed."""
        device = keras_random.get_device()
        if device == "meta":
            return None
        generator = torch.Generator(device=device)
        self._known.append((generator, draw_seed(seed)))
        return generator

    def of(self, generator: Any) -> torch.Tensor | None:
        """The seed (two integers) of a generator created here; None for others."""
        for known, seed in self._known:
            if known is generator:
                return seed
        return None


def _seeded(seed: torch.Tensor) -> torch.Generator:
    """The generator that Keras' ``torch_seed_generator`` creates from a drawn seed."""
    generator = torch.Generator(device=seed.device)
    generator.manual_seed(int(seed[0] + seed[1]) & 0xFFFFFFFF)
    return generator


# --- on a GPU -------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_FRACTION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Number of random bits that a dtype represents exactly in [0, 1)."""


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """Unsigned ``z >> by``."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix_(z: torch.Tensor) -> torch.Tensor:
    z.bitwise_xor_(_shifted(z, 30)).mul_(_FACTORS[0])
    z.bitwise_xor_(_shifted(z, 27)).mul_(_FACTORS[1])
    return z.bitwise_xor_(_shifted(z, 31))


def random_bits(key: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """64 random bits for each element.

    Args:
        key: An int64 scalar.
        size: Shape of the result.
    """
    count = math.prod(size)
    numbers = torch.arange(1, count + 1, dtype=torch.int64, device=key.device)
    return _mix_(numbers.mul_(_STEP).add_(key)).view(tuple(size))


def _bits(seed: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    first, second = seed.long().unbind()
    return random_bits(_mix_(_mix_(first + _STEP) + second * _STEP), size)


def _below_one(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uniform in [0, 1)."""
    digits = _FRACTION[dtype]
    return _shifted(bits, 64 - digits).to(dtype).mul_(2.0**-digits)


def _rand(seed: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return _below_one(_bits(seed, size), dtype)


def _normal(
    seed: torch.Tensor, mean: float, std: float, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Normal, by Box-Muller: half of the bits for the radius, half for the angle."""
    wide = torch.promote_types(dtype, torch.float32)
    bits = _bits(seed, size)
    length = (_shifted(bits, 32) + 1).to(wide).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = bits.bitwise_and_((1 << 32) - 1).to(wide).mul_(2.0**-31 * math.pi)
    return length.mul_(angle.cos_()).mul_(std).add_(mean).to(dtype)


def _randint(
    seed: torch.Tensor, low: int, high: int, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    return _shifted(_bits(seed, size), 1).remainder_(high - low).add_(low).to(dtype)


def _bernoulli(seed: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return (_rand(seed, p.shape, torch.float32) < p).to(p.dtype)


def _multinomial(seed: torch.Tensor, p: torch.Tensor, count: int) -> torch.Tensor:
    """Categorical: the class with the shortest exponential waiting time at the rates ``p``."""
    bits = _bits(seed, (*p.shape[:-1], count, p.shape[-1]))
    inside = (_shifted(bits, 41) + 0.5).mul_(2.0**-23)  # neither 0 nor 1
    return (p.float().unsqueeze(-2) / -inside.log_()).argmax(-1)


def _has_kernels(seed: torch.Tensor) -> bool:
    return seed.is_cuda and is_available()


def _normal_in_one_kernel(
    seed: torch.Tensor, mean: float, std: float, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    if dtype is torch.float64:  # a number that is an argument of a kernel is a float32
        return _normal(seed, mean, std, size, dtype)
    return random_kernel.normal(seed, mean, std, size, dtype)


_KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "rand": lambda seed, size, dtype: random_kernel.rand(seed, size, dtype, _FRACTION[dtype]),
    "normal": _normal_in_one_kernel,
    "randint": random_kernel.randint,
    "bernoulli": random_kernel.bernoulli,
}
"""Where Triton is installed."""


def checked(
    kernel: Callable[..., torch.Tensor], operations: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A kernel that is compared with PyTorch's operations the first time, for each dtype.

    Args:
        kernel: ``kernel(seed, *args)``.
        operations: The same by operations of PyTorch.

    Returns:
        The kernel, which raises a `RuntimeError` if its first numbers are not the same.
    """
    seen: set[torch.dtype] = set()

    def run(seed: torch.Tensor, *args: Any) -> torch.Tensor:
        dtypes = (getattr(a, "dtype", a) for a in args)
        (dtype,) = (found for found in dtypes if isinstance(found, torch.dtype))
        if dtype not in seen and not is_capturing(seed.device):
            few = [_few(argument) for argument in args]
            if not _are_close(kernel(seed, *few), operations(seed, *few)):
                raise RuntimeError("its numbers are not those of the operations")
            seen.add(dtype)
        return kernel(seed, *args)

    return run


def _are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to a rounding in their dtype, and those of a logarithm and a cosine."""
    if found.dtype is not expected.dtype or not found.is_floating_point():
        return bool(torch.equal(found, expected))
    limit = (1e-5 + 4 * torch.finfo(found.dtype).eps) * expected.abs().max().double()
    return bool(((found.double() - expected.double()).abs() <= limit).all())


def _few(argument: Any) -> Any:
    """A shape or a tensor of two blocks of a kernel."""
    if isinstance(argument, torch.Tensor):
        return argument.reshape(-1)[:_FEW]
    return [_FEW] if isinstance(argument, list | tuple) else argument


_FEW = 1100


# --- as operations --------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("kbtrain_random", "DEF")


def _define(
    signature: str,
    on_host: Callable[..., Any],
    on_device: Callable[..., Any],
    shape: Callable[..., Any],
) -> None:
    """Register an operation that can be recorded; ``shape`` returns a tensor like its result."""
    name = signature.partition("(")[0]
    in_one_kernel = PrivateApi(
        "Drawing random numbers in one kernel",
        "triton",
        checked(_KERNELS[name], on_device) if name in _KERNELS else on_device,
        on_device,
        "They are drawn in several, which takes longer.",
        passes=is_oom,
    )

    def run(seed: torch.Tensor, *args: Any) -> torch.Tensor:
        if not _on_gpu(seed):
            return on_host(_seeded(seed), *args)
        return (in_one_kernel if _has_kernels(seed) else on_device)(seed, *args)

    _LIBRARY.define(signature)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kbtrain_random::{name}", shape, lib=_LIBRARY)


def _on_gpu(seed: torch.Tensor) -> bool:
    result: bool = seed.is_cuda
    return result


_define(
    "rand(Tensor seed, int[] size, ScalarType dtype) -> Tensor",
    lambda generator, size, dtype: torch.rand(
        size, generator=generator, dtype=dtype, device=generator.device
    ),
    _rand,
    lambda seed, size, dtype: seed.new_empty(size, dtype=dtype),
)
_define(
    "normal(Tensor seed, float mean, float std, int[] size, ScalarType dtype) -> Tensor",
    lambda generator, mean, std, size, dtype: torch.normal(
        mean, std, size=size, generator=generator, dtype=dtype, device=generator.device
    ),
    _normal,
    lambda seed, mean, std, size, dtype: seed.new_empty(size, dtype=dtype),
)
_define(
    "randint(Tensor seed, int low, int high, int[] size, ScalarType dtype) -> Tensor",
    lambda generator, low, high, size, dtype: torch.randint(
        low, high, size=size, generator=generator, dtype=dtype, device=generator.device
    ),
    _randint,
    lambda seed, low, high, size, dtype: seed.new_empty(size, dtype=dtype),
)
_define(
    "bernoulli(Tensor seed, Tensor p) -> Tensor",
    lambda generator, p: torch.bernoulli(p, generator=generator),
    _bernoulli,
    lambda seed, p: torch.empty_like(p),
)
_define(
    "multinomial(Tensor seed, Tensor p, int count) -> Tensor",
    lambda generator, p, count: torch.multinomial(p, count, True, generator=generator),
    _multinomial,
    lambda seed, p, count: p.new_empty((*p.shape[:-1], count), dtype=torch.int64),
)


def draw(func: Any, seed: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """``func`` with a generator of this seed, as one operation that can be recorded."""
    operations = torch.ops.kbtrain_random
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if func is torch.rand:
        return operations.rand(seed, list(kwargs.get("size") or args[0]), dtype)
    if func is torch.normal:
        mean, std = (float(value) for value in args)
        return operations.normal(seed, mean, std, list(kwargs["size"]), dtype)
    if func is torch.randint:
        return operations.randint(seed, kwargs["low"], kwargs["high"], list(kwargs["size"]), dtype)
    if func is torch.bernoulli:
        return operations.bernoulli(seed, args[0].detach())
    if func is torch.multinomial:
        return operations.multinomial(seed, args[0].detach(), args[1])
    raise NotImplementedError(f"a seeded torch.{func.__name__} cannot be recorded")
