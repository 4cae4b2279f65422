"""What GaLore and APOLLO have in common: which matrices are projected, and to what shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Unpack

from optim.algorithms.adamw import AdamW
from optim.core.checks import check_integer, check_pattern, check_range
from optim.core.eight_bit import EMBEDDINGS
from optim.core.matrices import sides_of
from optim.core.moments import adam_moments
from optim.core.optimizer import CommonArguments, Optimizer, Tensor
from optim.core.parameter_groups import path_of


class LowRank(Optimizer):
    """Base of the optimizers whose moments are those of a projected gradient.

    Matrices are the variables of two axes and more; a kernel of more axes is cut into rows and
    columns where that is the most square, as `optim.Muon` does. Those of `target_modules` whose
    smaller side is larger than ``rank`` get the rule of the subclass. Everything else (also a
    matrix that is too small, for which a projection would save nothing) gets exactly AdamW's.

    Args:
        learning_rate: Of all variables.
        rank: What the smaller side of a matrix is projected to.
        update_proj_gap: Number of updates for which a projection is kept.
        scale: Factor of the updates of the projected matrices.
        target_modules: Regular expressions, or a single one, searched for in the paths of
            variables; ``None`` or ``"all-linear"`` for all matrices apart from biases and
            embeddings.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        learning_rate: Any,
        rank: int,
        update_proj_gap: int,
        scale: float,
        target_modules: str | Sequence[str] | None,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        weight_decay: float | None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.rank = check_integer("rank", rank, 1)
        self.update_proj_gap = check_integer("update_proj_gap", update_proj_gap, 1)
        self.scale = check_range("scale", scale, 0.0)
        self._targets = _targets(target_modules)
        self.adamw = AdamW(0.0, beta_1, beta_2, epsilon, weight_decay, kernel=self.kernel)

    @property
    def target_modules(self) -> list[str] | None:
        """The regular expressions of the variables that are projected, or None for the default."""
        return None if self._targets is None else list(self._targets)

    def build(self, variables: list[Any]) -> None:
        """Create the state.

        Args:
            variables: The variables that will be updated, in the order of the gradients.

        Raises:
            ValueError: If one of `target_modules` matches none of them.
        """
        self._check_targets(variables)
        super().build(variables)

    def check_variables(self, variables: Sequence[Any]) -> None:
        """See `Optimizer.check_variables`; this includes `target_modules`."""
        self._check_targets(variables)
        super().check_variables(variables)

    def _check_targets(self, variables: Sequence[Any]) -> None:
        if self._has_been_built:  # they were checked when all variables were trained
            return
        paths = [path_of(variable) for variable in variables]
        for pattern in self._targets or ():
            if paths and not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"`target_modules`: {pattern!r} is found in no variable's path. Paths look "
                    f"like {paths[0]!r}. Received: target_modules={self.target_modules}"
                )

    def rule_for(self, variable: Any) -> Optimizer:
        """This rule for the matrices it is meant for, AdamW's for the rest.

        Args:
            variable: One of the variables the optimizer is built with.

        Returns:
            This optimizer, or the AdamW it holds.
        """
        path = path_of(variable)
        if self._targets is None:
            target = not path.endswith("bias") and not re.search(EMBEDDINGS, path)
        else:
            target = any(re.search(pattern, path) for pattern in self._targets)
        large = min(sides_of(tuple(variable.shape))) > self.rank
        return self if target and large else self.adamw

    def moments(self, slots: dict[str, Tensor], projected: Tensor) -> dict[str, Tensor]:
        """Adam's running means of the projected gradient.

        Args:
            slots: With ``"momentum"`` and ``"velocity"``.
            projected: float32 tensor of their shape.

        Returns:
            The new slots ``"momentum"`` and ``"velocity"``.
        """
        old = {name: slots[name] for name in ("momentum", "velocity")}
        return adam_moments(old, projected, self.adamw.beta_1, self.adamw.beta_2)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "rank": self.rank,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "target_modules": self.target_modules,
            "beta_1": self.adamw.beta_1,
            "beta_2": self.adamw.beta_2,
            "epsilon": self.adamw.epsilon,
        }


ALL_LINEAR = "all-linear"
"""As `target_modules`: all matrices apart from biases and embeddings, the default."""


def _targets(target_modules: Any) -> tuple[str, ...] | None:
    """The regular expressions of `target_modules`, None for the default."""
    if target_modules is None or target_modules in (ALL_LINEAR, [ALL_LINEAR], (ALL_LINEAR,)):
        return None
    if not isinstance(target_modules, str | Sequence):
        raise ValueError(
            "`target_modules` must be a regular expression, a list of them, or "
            f"{ALL_LINEAR!r}. Received: target_modules={target_modules!r}"
        )
    patterns = (target_modules,) if isinstance(target_modules, str) else target_modules
    return tuple(check_pattern("target_modules", pattern) for pattern in patterns)
