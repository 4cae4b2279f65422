"""From the operations of a recorded rule to the PyTorch calls that execute it on tiles.

PyTorch has operations that do the work of several: a step towards a value (``lerp``), an addition
that multiplies on the way, and its fused Adam kernel, which is one pass over memory for the chain

    velocity + share * (x * x - velocity)  ->  base + factor * top / (scale * sqrt(...) + epsilon)

that most rules contain. A square root alone costs as much as four other operations here; within the
fused kernel it is done while the memory is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

SAME = ("detach", "alias", "lift_fresh_copy", "clone", "view")
"""Operations that leave the values of a tile as they are."""

SUMS = ("sum", "mean")
"""Operations that make a scalar of a whole tensor."""

_COMMUTES = ("add", "mul", "maximum", "minimum")

# In the fused kernel the factor of the mean square is a rounded 1 - share: for smaller shares than
# these the rounding, of up to 3e-8, would be seen.
_SMALLEST_SHARE = 5e-4


@dataclass
class Call:
    """One operation on whole tiles: ``function(*args, **numbers)``."""

    name: str
    args: list[Any]
    numbers: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] | None = None


def name_of(node: Node) -> str:
    """An ATen operation's name without its overload."""
    return getattr(node.target, "__name__", "").partition(".")[0]


class CallFusion:
    """Operations to calls, several operations to one call where PyTorch has it.

    Args:
        is_wide: For each node, whether it has one value per element.
        on_cpu: Whether scalars are known to Python; reading one would stop the queue of a GPU.
    """

    def __init__(self, is_wide: dict[Node, bool], on_cpu: bool) -> None:
        self._is_wide = is_wide
        self._on_cpu = on_cpu
        # Running mean squares that were made by an earlier list of nodes: of what, by which share.
        self._mean_squares: dict[Node, tuple[Node, Any]] = {}

    def wide(self, value: Any) -> bool:
        """Whether an argument has one value per element."""
        return isinstance(value, Node) and self._is_wide[value]

    def calls(self, nodes: list[Node], places: list[tuple[Node, Any]]) -> dict[Node, Call]:
        """The calls that compute some nodes.

        Args:
            nodes: Wide nodes and sums, in order.
            places: Pairs of a node and the input whose place its value takes.

        Returns:
            Calls by the node they compute; a node that another call computes as well is left out.
        """
        uses = dict.fromkeys(self._is_wide, 0)
        for node, _ in places:
            uses[node] += 1
        for node in nodes:
            for argument in node.all_input_nodes:
                uses[argument] += sum(a is argument for a in node.args)
        calls: dict[Node, Call] = {}
        for node in nodes:
            self._add(node, calls, uses)
        if self._on_cpu:
            for node in list(calls):
                if node in calls and calls[node].name in ("addcdiv", "div"):
                    self._fuse_adam(node, nodes, calls, places)
            self._note_mean_squares(calls)
        return calls

    def _add(self, node: Node, calls: dict[Node, Call], uses: dict[Node, int]) -> None:
        name = name_of(node)
        args = list(node.args)
        if name in SUMS:
            calls[node] = self._sum(args[0], calls, uses)
            return
        if name in SAME:
            calls[node] = Call("same", args[:1])
            return
        if name in _COMMUTES and not self.wide(args[0]):
            args = [args[1], args[0]]
        calls[node] = Call(name, args, {}, node.target)
        alpha = node.kwargs.get("alpha", 1)
        if name not in ("add", "sub") or not self.wide(args[1]) or alpha != 1:
            if node.kwargs:
                calls[node] = Call("other", args, dict(node.kwargs), node.target)
            return
        sign = 1 if name == "add" else -1
        pairs = [(args[0], args[1])] + ([(args[1], args[0])] if sign == 1 else [])
        for base, term in pairs:
            inner = calls.get(term)
            if inner is None or uses[term] != 1 or not self.wide(base):
                continue
            if joined := self._joined(base, inner, sign, calls, uses):
                calls[node] = joined
                del calls[term]
                break

    def _sum(self, term: Node, calls: dict[Node, Call], uses: dict[Node, int]) -> Call:
        inner = calls.get(term)
        if inner is None or inner.name != "mul" or uses[term] != 1:
            return Call("sum", [term])
        if not all(map(self.wide, inner.args)):
            return Call("sum", [term])
        del calls[term]
        return Call("dot", inner.args)

    def _joined(
        self,
        base: Node,
        inner: Call,
        sign: int,
        calls: dict[Node, Call],
        uses: dict[Node, int],
    ) -> Call | None:
        """``base + sign * inner`` as one operation, if PyTorch has it."""
        if inner.name == "mul" and self._number(inner.args[1]):
            factor = inner.args[1]
            difference = calls.get(inner.args[0])
            if (
                sign == 1
                and difference is not None
                and difference.name == "sub"
                and not difference.numbers
                and uses[inner.args[0]] == 1
                and difference.args[1] is base
            ):
                del calls[inner.args[0]]
                return Call("lerp", [base, difference.args[0], factor])
            return Call("add", [base, inner.args[0]], {"alpha": (sign, factor)})
        if inner.name == "mul" and not inner.numbers and self.wide(inner.args[1]):
            return Call("addcmul", [base, *inner.args], {"value": (sign, 1)})
        if inner.name == "div" and all(map(self.wide, inner.args)):
            top, factor = self._without_factor(inner.args[0], calls, uses)
            return Call("addcdiv", [base, top, inner.args[1]], {"value": (sign, factor)})
        return None

    def _without_factor(
        self, top: Any, calls: dict[Node, Call], uses: dict[Node, int]
    ) -> tuple[Any, Any]:
        """``(x, number)`` for ``x * number`` that is needed for nothing else, else ``(x, 1)``."""
        scaled = calls.get(top)
        if scaled is None or scaled.name != "mul" or uses[top] != 1:
            return top, 1
        if not self._number(scaled.args[1]):
            return top, 1
        del calls[top]
        return scaled.args[0], scaled.args[1]

    # ---- the step of Adam ------------------------------------------------------------------------

    def _note_mean_squares(self, calls: dict[Node, Call]) -> None:
        for node, call in calls.items():
            square = calls.get(call.args[1]) if call.name == "lerp" else None
            if square is not None and square.name == "mul" and square.args[0] is square.args[1]:
                self._mean_squares[node] = square.args[0], call.args[2]

    def _fuse_adam(
        self,
        node: Node,
        nodes: list[Node],
        calls: dict[Node, Call],
        places: list[tuple[Node, Any]],
    ) -> None:
        """Make a quotient by a root of a running mean square one call, with the running mean."""
        call = calls[node]
        top, below = call.args[-2:]
        if not (self.wide(top) and self.wide(below)):
            return
        uses = _uses(calls, places)
        chain = [below]
        epsilon: Any = 0.0
        scale: Any = 1.0
        inner = calls.get(below)
        if inner is not None and inner.name == "add" and self._number(inner.args[1]):
            if inner.numbers:
                return
            epsilon = inner.args[1]
            chain.append(inner.args[0])
            inner = calls.get(inner.args[0])
        if inner is not None and inner.name == "mul" and self._number(inner.args[1]):
            scale = inner.args[1]
            chain.append(inner.args[0])
            inner = calls.get(inner.args[0])
        if inner is None or inner.name != "sqrt" or any(uses[n] != 1 for n in chain):
            return
        velocity = inner.args[0]
        if velocity in self._mean_squares and velocity not in calls:
            x, share = self._mean_squares[velocity]
            if all(x not in n.all_input_nodes for n in nodes):
                return  # it may not be there any more
            before, made = velocity, []
        else:
            moved = self._moved_in_place(velocity, calls, places, uses)
            square = calls.get(moved.args[1]) if moved is not None else None
            if moved is None or square is None or square.name != "mul" or uses[moved.args[1]] != 1:
                return
            share, x = moved.args[2], square.args[0]
            if square.args[1] is not x or not isinstance(share, float) or share < _SMALLEST_SHARE:
                return
            before, made = moved.args[0], [velocity, moved.args[1]]
        sign, factor = call.numbers.get("value", (1, 1))
        if call.name == "div":
            top, factor = self._without_factor(top, calls, uses)
        mean, kept = top, None
        advanced = self._moved_in_place(top, calls, places, uses)
        if advanced is not None and advanced.args[1] is x and self._number(advanced.args[2]):
            mean, kept = advanced.args[0], advanced.args[2]
            del calls[top]
        for old in (*chain, *made):
            del calls[old]
        numbers = {"factor": (sign, factor), "scale": scale, "epsilon": epsilon, "share_2": share}
        if not made:
            numbers["moved"] = True
        if kept is not None:
            numbers["share_1"] = kept
        calls[node] = Call("adam", [mean, x, before, *call.args[:-2]], numbers)

    def _moved_in_place(
        self,
        node: Any,
        calls: dict[Node, Call],
        places: list[tuple[Node, Any]],
        uses: dict[Node, int],
    ) -> Call | None:
        """The ``lerp`` that makes a variable's new value and is used once besides, if it is that.

        The old value must be needed by nothing else: it will change at the time of the use.
        """
        call = calls.get(node)
        if call is None or call.name != "lerp" or dict(places).get(node) is not call.args[0]:
            return None
        return call if uses[node] == 2 and uses[call.args[0]] == 1 else None

    def _number(self, value: Any) -> bool:
        if isinstance(value, Node):
            return self._on_cpu and not self._is_wide[value]
        return isinstance(value, int | float)


def _uses(calls: dict[Node, Call], places: list[tuple[Node, Any]]) -> dict[Any, int]:
    """How often each value is an argument, or takes a variable's place."""
    count: dict[Any, int] = {}
    for node, _ in places:
        count[node] = count.get(node, 0) + 1
    for call in calls.values():
        for argument in call.args:
            if isinstance(argument, Node):
                count[argument] = count.get(argument, 0) + 1
    return count


# ---- PyTorch's fused Adam as an operation among others -------------------------------------------

# So late an update that the kernel's own corrections of the bias are 1.
_LATE = torch.tensor(2.0**60, device="cpu")
# A share of nothing would make the correction 1 - (1 - share) ** step vanish, and this one is lost
# in the rounding of what it is added to.
_NO_SHARE = 2.0**-53
# A share of nothing of a square is lost in a mean that has at least this share of it already.
_SMALLEST_MOVED_SHARE = 2.0**-24
# The smallest scale of a root: what is added to it, divided by this, is still a float32.
_NO_SCALE = 1e-25


def adam_(
    base: torch.Tensor,
    mean: torch.Tensor,
    x: torch.Tensor,
    velocity: torch.Tensor,
    factor: float,
    scale: float,
    epsilon: float,
    share_2: float,
    share_1: float = _NO_SHARE,
    moved: bool = False,
) -> None:
    """``base += factor * mean / (scale * sqrt(velocity) + epsilon)`` in one pass, on the CPU.

    Args:
        base: Changed in place.
        mean: Moved towards ``x`` by ``share_1`` of the distance before it is used.
        x: Read only.
        velocity: Moved towards ``x * x`` by ``share_2`` of the distance before it is used.
        factor: A number.
        scale: A number, not negative.
        epsilon: A number, not negative.
        share_2: In (0, 1].
        share_1: A number, in [0, 1] as a rule; without it ``mean`` stays as it is.
        moved: Whether ``velocity`` has been moved already.
    """
    # Shares that are computed may be any numbers; for these the kernel's corrections are not 1.
    if not _NO_SHARE <= share_1 <= 1.5 or (moved and not share_2 >= _SMALLEST_MOVED_SHARE):
        if not moved:
            velocity.lerp_(x * x, share_2)
        if share_1 != _NO_SHARE:
            mean.lerp_(x, share_1)
        base.addcdiv_(mean, velocity.sqrt().mul_(scale).add_(epsilon), value=factor)
        return
    if moved:
        share_2 = _NO_SHARE
    scale = scale or _NO_SCALE
    torch._fused_adam_(
        [base],
        [x],
        [mean],
        [velocity],
        [],
        [_LATE],
        lr=-factor / scale,
        beta1=1.0 - share_1,
        beta2=1.0 - share_2,
        weight_decay=0.0,
        eps=epsilon / scale,
        amsgrad=False,
        maximize=False,
    )
