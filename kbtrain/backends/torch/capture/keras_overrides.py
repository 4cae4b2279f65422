"""Overrides of Keras functions by operations that have fast torch kernels.

They are active while a step is recorded; results equal those of the layers up to rounding, and a
step that runs eagerly is plain Keras. Seven things are replaced: batch normalization by torch's
kernel (Keras makes a dozen passes over the data); copies between channels-last and channels-first
layouts of the same bytes, which are removed; ``isfinite``, by two operations instead of four; the
cross entropy of classes in the last axis, by that of a matrix; segment sums, by operations that
need no values on the host; cuDNN's LSTM and GRU, whose gradient cannot be recorded, by the loop
that Keras has for other devices; and random numbers from a seed tensor, by operations that can be
recorded.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import keras
import torch
from keras import ops

# Two operations whose Keras code reads values; metrics such as AUC and MeanIoU use them.
from keras.src.backend.torch import core as keras_core
from keras.src.backend.torch import math as keras_math

# The only function in which Keras turns the state of a seed generator into a torch generator.
from keras.src.backend.torch import random as keras_random
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kbtrain.backends.torch.capture.random import Seeds, draw
from kbtrain.backends.whole_batch import is_active

aten = torch.ops.aten

# What LSTM and GRU ask before they call cuDNN, whose gradient has no rule for fake tensors. The
# package has a function of the module's name.
keras_rnn = importlib.import_module("keras.src.backend.torch.rnn")


@contextlib.contextmanager
def native_operations() -> Iterator[None]:
    """Context with the replacements above, for code that is being recorded."""
    layer = keras.layers.BatchNormalization
    seeds = Seeds()
    with (
        mock.patch.object(layer, "call", _batch_normalization(layer.call)),
        mock.patch.object(keras_random, "torch_seed_generator", seeds.generator),
        mock.patch.object(keras_math, "_segment_reduction_fn", _segment_reduction),
        mock.patch.object(keras_core, "scatter", _scatter),
        # As on a CPU: a product for all steps, then a loop, which is recorded step by step.
        mock.patch.object(keras_rnn, "_is_cuda_cudnn_available", return_value=False),
        _Operations(seeds),
    ):
        yield


# --- layouts --------------------------------------------------------------------------------------


class _Operations(TorchFunctionMode):  # type: ignore[misc]
    """Intercepts every call of a torch function, and replaces some."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self._seeds = seeds

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.contiguous and not kwargs and _is_channels_last(args):
            return args[0]
        if func is torch.isfinite and args[0].is_floating_point():
            difference = args[0] - args[0]  # NaN where it is not finite, else 0
            return difference == difference
        if func in _LOSSES and _has_classes_last(args, kwargs):
            logits, targets = args
            flat = logits.movedim(1, -1).reshape(-1, logits.shape[1])
            return func(flat, targets.reshape(-1), **kwargs).view(targets.shape)
        if (seed := self._seeds.of(kwargs.get("generator"))) is not None:
            return draw(func, seed, args, {k: v for k, v in kwargs.items() if k != "generator"})
        return func(*args, **kwargs)


def _is_channels_last(args: Any) -> bool:
    """Whether a tensor is dense in memory with its second axis last, so needs no copy."""
    tensor = args[0]
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = layouts.get(tensor.dim()) if len(args) == 1 else None
    return layout is not None and tensor.is_contiguous(memory_format=layout)


# --- losses ---------------------------------------------------------------------------------------

_LOSSES = (functional.cross_entropy, functional.nll_loss)


def _has_classes_last(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether logits were turned to have their classes second, as PyTorch requires of tensors.

    Of a matrix it has faster kernels, and on a GPU others copy all logits.
    """
    return (
        len(args) == 2
        and kwargs.get("reduction") == "none"
        and kwargs.get("reduce") is kwargs.get("size_average") is None  # these override it
        and args[0].dim() > 2
        and args[1].dim() == args[0].dim() - 1
        and args[0].movedim(1, -1).is_contiguous()
    )


# --- batch normalization --------------------------------------------------------------------------


def _batch_normalization(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BatchNormalization.call`` with torch's kernel, where there is one."""

    def call(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        wide = keras.backend.result_type(inputs.dtype, "float32")
        # On a GPU the kernel reads bfloat16 and computes in float32. On a CPU it would also add in
        # bfloat16 for gradients.
        x = inputs if _is_half_on_gpu(inputs) else ops.cast(inputs, wide)
        axis = self.axis % x.dim()
        values = x.numel() // x.shape[axis]
        special = self.synchronized or getattr(self, "renorm", False) or values < 2 or is_active()
        if mask is not None or special or axis not in (1, x.dim() - 1):
            return original(self, inputs, training=training, mask=mask)
        view, restore = _channels_second(x, axis)
        scale = ops.cast(self.gamma, wide) if self.scale else None
        offset = ops.cast(self.beta, wide) if self.center else None
        if training and self.trainable:
            mean, variance = (torch.zeros_like(ops.cast(self.moving_mean, wide)) for _ in "12")
            # With momentum 1 the kernel returns the statistics of this batch as the moving ones.
            result, *_ = aten._native_batch_norm_legit(
                view, scale, offset, mean, variance, True, 1.0, self.epsilon
            )
            biased = variance * ((values - 1) / values)
            for moving, new in ((self.moving_mean, mean), (self.moving_variance, biased)):
                old = ops.cast(moving, wide)
                moving.assign(old * self.momentum + new * (1.0 - self.momentum))
        else:
            moments = (ops.cast(v, wide) for v in (self.moving_mean, self.moving_variance))
            result, *_ = aten._native_batch_norm_legit_no_training(
                view, scale, offset, *moments, 0.0, self.epsilon
            )
        return ops.cast(restore(result), self.compute_dtype)

    return call


def _is_half_on_gpu(x: torch.Tensor) -> bool:
    from kbtrain.backends.torch import _on_cpu

    # On Apple's GPUs a process ends where the kernel gets dtypes of two kinds.
    has_kernel = not _on_cpu(x) and x.device.type != "mps"
    return x.dtype in (torch.bfloat16, torch.float16) and has_kernel


def _channels_second(
    x: torch.Tensor, axis: int
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """``x`` with the channels second, as torch requires, and the inverse permutation."""
    if axis == 1:
        return x, lambda result: result
    if x.dim() == 4:
        return x.permute(0, 3, 1, 2), lambda result: result.permute(0, 2, 3, 1)
    # (batch, ..., channels) as an image of width 1
    image = x.reshape(x.shape[0], -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return image, lambda result: result.permute(0, 2, 3, 1).reshape(x.shape)


# --- segment sums ---------------------------------------------------------------------------------


def _segment_reduction(data: Any, segment_ids: Any, method: str, num_segments: int | None) -> Any:
    """Keras' ``segment_sum`` and similar, whose implementation reads a shape from a tensor."""
    count = int(torch.max(segment_ids)) + 1 if num_segments is None else num_segments
    start = {"amax": -math.inf, "amin": math.inf, "prod": 1.0}.get(method, 0.0)
    # Elements outside all segments are added to an extra one, which is dropped.
    ids = segment_ids.long()
    ids = torch.where((ids < 0) | (ids >= count), count, ids)
    ids = ids.reshape(-1, *(1 for _ in data.shape[1:])).expand(data.shape)
    result = torch.full((count + 1, *data.shape[1:]), start, device=data.device)
    result = result.scatter_reduce(0, ids, data.float(), method)
    return result[:-1].type(data.dtype)


def _scatter(indices: Any, values: Any, shape: Any) -> Any:
    """Keras' ``scatter``, which is a loop over the indices in Python."""
    indices, values = ops.convert_to_tensor(indices).long(), ops.convert_to_tensor(values)
    depth = indices.shape[-1]
    places = indices.reshape(-1, depth).unbind(1)
    values = values.reshape(-1, *shape[depth:])
    zeros = torch.zeros(tuple(shape), dtype=values.dtype, device=values.device)
    return zeros.index_put(places, values, accumulate=True)
