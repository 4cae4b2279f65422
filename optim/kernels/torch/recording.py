"""An elementwise rule as a graph of ATen operations: recorded once, on a few elements.

What depends on scalars only (the step, the learning rate, slots of shape ``()``) is told apart from
what has a value per element, and what is summed over the tensor from what needs these sums. Kernels
are made of such a graph: `optim.kernels.torch.elementwise` for tiles on a CPU,
`optim.kernels.torch.triton_kernels.source` for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from optim.kernels.torch.codegen import SAME, SUMS, name_of

# Any size will do to record a rule that is elementwise.
EXAMPLE = 3


class NotElementwise(TypeError):
    """A rule is marked as elementwise and is not."""


class RecordedRule:
    """A rule with its hyperparameters and a weight decay, as a graph.

    Args:
        rule: The optimizer whose ``update`` is recorded.
        weight_decay: As the rule gets it.
        device: Where the variables are.

    Raises:
        NotElementwise: If the rule is not elementwise.

    Attributes:
        slots: Their names, in the order of the rule.
        slot_dtypes: Their dtypes.
        wide_slots: Those with a value per element.
        narrow_slots: The others.
        inputs: The parameter, the gradient, the step, the learning rate, the wide and the narrow
            slots, in this order.
        outputs: The new wide slots, the new narrow slots and the new parameter.
        constants: Tensors that the rule brings along.
        numbers: Those of a single element, as numbers.
        computed: All operations, in order.
        is_wide: For each node, whether it has a value per element.
        sums: Those that sum over a tensor.
        early: Scalars that do not depend on a sum.
        late: Scalars that do.
        needed: What the sums depend on.
    """

    def __init__(self, rule: Any, weight_decay: float, device: torch.device) -> None:
        self.shapes = {
            name: getattr(slot, "shape", slot)
            for name, slot in rule.slot_shapes((EXAMPLE,)).items()
        }
        self.slots = list(self.shapes)
        self.slot_dtypes = {
            name: getattr(slot, "dtype", "float32")
            for name, slot in rule.slot_shapes((EXAMPLE,)).items()
        }
        self.wide_slots = [name for name in self.slots if tuple(self.shapes[name]) == (EXAMPLE,)]
        self.narrow_slots = [name for name in self.slots if name not in self.wide_slots]
        self._rule = type(rule).__name__
        # The step that contains this update may be being recorded; this is not part of it.
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes(), torch.no_grad():
            self._sort(self._record(rule, weight_decay, device))

    def _record(self, rule: Any, weight_decay: float, device: torch.device) -> GraphModule:
        names = [*self.wide_slots, *self.narrow_slots]

        def flat(parameter: Any, gradient: Any, step: Any, rate: Any, *slots: Any) -> list[Any]:
            given = dict(zip(names, slots, strict=True))
            ordered = {name: given[name] for name in self.slots}
            new, new_slots = rule.update(parameter, gradient, ordered, step, rate, weight_decay)
            return [*(new_slots[name] for name in names), new]

        def example(shape: Any) -> torch.Tensor:
            return torch.full(tuple(shape), 0.5, dtype=torch.float32, device=device)

        from torch.fx.experimental.proxy_tensor import make_fx

        wide = [example((EXAMPLE,)), example((EXAMPLE,))]
        scalars = [example(()), example(())]
        return make_fx(flat)(*wide, *scalars, *(example(self.shapes[name]) for name in names))

    def _sort(self, module: GraphModule) -> None:
        nodes = list(module.graph.nodes)
        self.inputs = [n for n in nodes if n.op == "placeholder"]
        self.outputs: list[Node] = list(nodes[-1].args[0])
        self.constants = {
            n: getattr(module, str(n.target)).clone() for n in nodes if n.op == "get_attr"
        }
        # Read here, where no step is being recorded.
        self.numbers = {n: float(x) for n, x in self.constants.items() if x.numel() == 1}
        self.is_wide = {
            n: n.op != "get_attr" and tuple(n.meta["val"].shape) == (EXAMPLE,) for n in nodes[:-1]
        }
        self.computed = [n for n in nodes if n.op == "call_function"]
        self.sums = [n for n in self.computed if self._is_sum(n)]
        for node in self.computed:
            self._check(node)
        summed = descendants(self.computed, self.sums)
        self.needed = ancestors(self.computed, self.sums)
        if any(n in summed for n in self.needed):
            raise NotElementwise(f"{self._rule}.update sums over what depends on another sum.")
        scalars = [n for n in self.computed if not self.is_wide[n] and n not in self.sums]
        self.early = [n for n in scalars if n not in summed]
        self.late = [n for n in scalars if n in summed]

    def _is_sum(self, node: Node) -> bool:
        wide = any(self.is_wide[n] for n in node.all_input_nodes)
        scalar = tuple(node.meta["val"].shape) == ()
        return wide and scalar and name_of(node) in SUMS

    def _check(self, node: Node) -> None:
        """Raise for what is not elementwise, whether the rule is marked or not."""
        operation = node.target
        tags = getattr(operation, "tags", ())
        if node in self.sums:
            return
        mixes = not self.is_wide[node] and any(self.is_wide[n] for n in node.all_input_nodes)
        if mixes or (torch.Tag.pointwise not in tags and name_of(node) not in (*SAME, "_to_copy")):
            if not mixes and not self.is_wide[node]:
                return  # a scalar may be computed in any way
            raise NotElementwise(
                f"{self._rule}.update is marked as elementwise, but {operation} is not: remove the "
                "mark `@elementwise`, or the operation."
            )


def descendants(nodes: list[Node], roots: list[Node]) -> set[Node]:
    """The nodes that depend on any of some others, without these."""
    found: set[Node] = set()
    for node in nodes:
        if any(n in found or n in roots for n in node.all_input_nodes):
            found.add(node)
    return found


def ancestors(nodes: list[Node], roots: list[Node]) -> set[Node]:
    """The nodes that any of some others depends on, without these."""
    found: set[Node] = set()
    for node in reversed(nodes):
        if node in found or node in roots:
            found |= set(node.all_input_nodes)
    return found - set(roots)
