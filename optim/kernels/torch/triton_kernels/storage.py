"""In which dtypes the tensors that a kernel updates are stored."""

from __future__ import annotations

from dataclasses import dataclass

TYPES = {"float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16"}
"""dtypes as Triton names them."""


@dataclass(frozen=True)
class Storage:
    """How the tensors that a kernel updates are stored.

    Attributes:
        parameter: dtype of the parameters; with one other than float32 there are residuals.
        gradient: dtype of the gradients.
    """

    parameter: str = "float32"
    gradient: str = "float32"
