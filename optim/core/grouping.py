"""`Grouped`: parameter groups, and the rule, decay and learning rate of each variable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from optim.core.parameter_groups import Group, format_table, groups_for, parse_groups, path_of
from optim.core.rule import UpdateRule


class Grouped:
    """Part of `optim.Optimizer`: its parameter groups, and how each variable is updated.

    kbtrain uses ``set_parameter_groups`` and ``parameter_groups_table``, by name.
    """

    built: bool
    weight_decay: Any
    _get_variable_index: Any
    _state: Any
    _use_weight_decay: Any
    _trainable_variables: list[Any]
    _parameter_groups: tuple[Group, ...] = ()
    _has_been_built: bool = False

    def group_of(self, variable: Any) -> Group | None:
        """The parameter group of a variable.

        Args:
            variable: One of the variables the optimizer was built with.

        Returns:
            The first group that matched it; None if it is in none.
        """
        if not self._parameter_groups:
            return None
        result: Group | None = self._state.groups[self._get_variable_index(variable)]
        return result

    def learning_rate_multiplier_of(self, variable: Any) -> float:
        """What the learning rate is multiplied by for a variable, before its rule sees it.

        Args:
            variable: One of the variables the optimizer was built with.

        Returns:
            A Python number, known when the update is traced: 1.0, unless the variable's group or a
            subclass sets another.
        """
        group = self.group_of(variable)
        return 1.0 if group is None else group.lr_multiplier

    def weight_decay_of(self, variable: Any) -> float:
        """The decay of a variable: its group's or its rule's, 0.0 if it is excluded.

        Args:
            variable: One of the variables the optimizer was built with.

        Returns:
            A Python number, known when the update is traced.
        """
        group = self.group_of(variable)
        weight_decay = self.rule_of(variable).weight_decay
        if group is not None and group.weight_decay is not None:
            weight_decay = group.weight_decay
        if not weight_decay or not self._use_weight_decay(variable):
            return 0.0
        return float(weight_decay)

    def rule_of(self, variable: Any) -> Any:
        """The result of `rule_for` for a variable, as it was when the state was created.

        Args:
            variable: One of the variables the optimizer was built with.

        Returns:
            The optimizer whose rule updates it.
        """
        return self._state.rules[self._get_variable_index(variable)]

    def update_rule_of(self, variable: Any) -> UpdateRule:
        """How a variable is updated.

        Args:
            variable: One of the variables the optimizer was built with.

        Returns:
            Its optimizer, weight decay and learning-rate multiplier.
        """
        return UpdateRule(
            self.rule_of(variable),
            self.weight_decay_of(variable),
            float(self.learning_rate_multiplier_of(variable)),
        )

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups, as the argument of the constructor; empty if there are none."""
        return [group.get_config() for group in self._parameter_groups]

    def set_parameter_groups(
        self, groups: Sequence[Mapping[str, Any]] | None, model: keras.Model | None = None
    ) -> None:
        """Set the groups, before the state is made.

        Args:
            groups: As for the constructor; None for none.
            model: With it, ``match`` may be a type of layer, see `groups_for`.

        Raises:
            ValueError: If there is state already, or a group is wrong.
        """
        if self.built:
            raise ValueError(
                "Parameter groups decide which state is kept, so they must be set before the "
                "optimizer is built."
            )
        if model is not None:
            groups = groups_for(model, groups or ())
        self._parameter_groups = parse_groups(groups)

    def parameter_groups_table(self) -> str:
        """Who got what, as a table to print: a line for each variable.

        Returns:
            Path, shape, number of its group (``-`` for none), learning-rate multiplier, weight
            decay and rule of each variable, in their order.

        Raises:
            ValueError: If the optimizer has not been built.
        """
        if not self.built:
            raise ValueError("The table needs the variables: call `build(variables)` first.")
        number = {id(group): str(i) for i, group in enumerate(self._parameter_groups)}
        rows = [("variable", "shape", "group", "lr x", "decay", "rule")]
        for variable in self._trainable_variables:
            update_rule = self.update_rule_of(variable)
            rows.append(
                (
                    path_of(variable),
                    str(tuple(variable.shape)),
                    number.get(id(self.group_of(variable)), "-"),
                    f"{update_rule.learning_rate_multiplier:g}",
                    f"{update_rule.weight_decay:g}",
                    type(update_rule.optimizer).__name__,
                )
            )
        return format_table(rows)

    def _check_decay_of_groups(self, variables: Sequence[Any]) -> None:
        """A decay that no variable of its group can get is a mistake."""
        for index, group in enumerate(self._parameter_groups):
            own = [v for v in variables if self.group_of(v) is group]
            if group.weight_decay and not any(self.weight_decay_of(v) for v in own):
                raise ValueError(
                    f"parameter_groups[{index}], {group.describe()}, has weight_decay="
                    f"{group.weight_decay}, but all of its {len(own)} variables are excluded from "
                    f"weight decay: {', '.join(path_of(v) for v in own[:8])}."
                )
