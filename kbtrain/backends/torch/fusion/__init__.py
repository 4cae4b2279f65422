"""PyTorch on a GPU: fewer kernels for the small operations of a recorded step.

A GPU takes two microseconds for a kernel, however small its tensors are, so the scalars of a step
and the statistics of its normalization layers can take longer than its products. Of a recorded
step, in which all operations and their order are known, four things change here. Small operations
of one kind become one operation over a list of tensors (``lists``). The norm of all gradients is
taken by three kernels (``norm_kernel``), and everything that is computed of scalars becomes one
(``scalars``, ``scalar_kernel``). A fused optimizer reads the factor of its gradients and the flag
of the step, in place of passes of their own (``optimizer_arguments``).

Each falls back to the operations as they were recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis
from kbtrain.utils.fallback import report

KIND = "cuda"
"""The type of devices whose steps are changed; tests change it."""

_BROKEN: list[Failure] = []


class Failure(Exception):
    """Rewriting a step failed, for the reason that caused this; the graph is of no use."""


def give_up(failure: Failure) -> None:
    """From now on, leave steps as they are recorded, and say so."""
    _BROKEN.append(failure)
    cause = failure.__cause__
    assert isinstance(cause, Exception)
    report(
        "Putting small operations of a step together",
        "torch",
        cause,
        "They run one by one, which takes longer on a GPU.",
    )


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Failure("a step could not be rewritten") from error


def use_arguments(graph: Graph) -> None:
    """Let fused optimizers apply the factor of the gradients and the flag of the step.

    Args:
        graph: A recorded graph; changed in place.
    """
    from kbtrain.backends.torch.fusion.optimizer_arguments import pass_factors, pass_flags

    with _failures():
        pass_flags(graph)
        pass_factors(graph)


def fewer_kernels(
    pure: Sequence[Node],
    late: Sequence[Node],
    analysis: AliasAnalysis,
    constants: dict[Node, torch.Tensor],
) -> list[Node]:
    """Rewrite the operations of a step that runs on a GPU.

    Args:
        pure: Operations that do not change the state, in order.
        late: The other operations, in order.
        analysis: The analysis of their graph.
        constants: Nodes that are constant tensors, with these tensors.

    Returns:
        Operations with the same results, in order.
    """
    from kbtrain.backends.torch.fusion import scalar_kernel
    from kbtrain.backends.torch.fusion.lists import use_lists
    from kbtrain.backends.torch.fusion.norm_kernel import use_norm_kernel
    from kbtrain.backends.torch.fusion.scalars import fuse_scalars

    with _failures():
        operations = use_lists(pure, late, analysis)
        if scalar_kernel.is_available():
            operations = use_norm_kernel(operations, KIND)
            operations = fuse_scalars(operations, constants)
    return operations


def applies_to(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a step with these inputs runs on a GPU."""
    return not _BROKEN and any(tensor.device.type == KIND for tensor in tensors)
