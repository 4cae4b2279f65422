"""TensorFloat-32 on PyTorch, which has two sets of switches for it.

The older ones (``allow_tf32``, ``set_float32_matmul_precision``) raise an error when they are read
after one of the newer ones (``fp32_precision``, since PyTorch 2.9) was set. Setting the older ones
changes both, so that whoever reads either inside finds the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def allowing(tf32: bool | None) -> Iterator[None]:
    """Context in which float32 products and convolutions may use TensorFloat-32, or may not.

    Args:
        tf32: Whether they may; None touches and reads nothing.
    """
    if tf32 is None:
        yield
        return
    older = _readable(torch.get_float32_matmul_precision)
    cudnn = _readable(lambda: torch.backends.cudnn.allow_tf32)
    newer = {switch: _readable(switch.read) for switch in _SWITCHES}
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    for switch in _SWITCHES[:3]:  # False alone lets them inherit what a more general switch says
        if newer[switch] is not None:
            switch.write("tf32" if tf32 else "ieee")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for switch, value in newer.items():
            if value is not None:
                switch.restore(value)


def is_allowed() -> bool:
    """Whether float32 products may use TensorFloat-32, by whichever switches were set."""
    newer = _readable(_SWITCHES[0].read)
    return bool(torch.backends.cuda.matmul.allow_tf32) if newer is None else newer == "tf32"


class _Switch:
    """One of the newer switches.

    Args:
        find: Returns the object that has it, or raises AttributeError.
    """

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find

    def read(self) -> str:
        return str(self._find().fp32_precision)

    def write(self, value: str) -> None:
        self._find().fp32_precision = value

    def restore(self, value: str) -> None:
        self.write("none")  # inherited from a more general one, if that has the value
        if self.read() != value:
            self.write(value)


_SWITCHES = (
    _Switch(lambda: torch.backends.cuda.matmul),
    _Switch(lambda: torch.backends.cudnn.conv),
    _Switch(lambda: torch.backends.cudnn.rnn),
    _Switch(lambda: torch.backends.mkldnn.matmul),
)


def _readable(read: Callable[[], Any]) -> Any:
    """What ``read`` returns; None where this version has no such switch or refuses to read it."""
    try:
        return read()
    except (AttributeError, RuntimeError):
        return None
