"""`Grouped`: the part of an optimizer that knows its parameter groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from optim.core.parameter_groups import Group, format_table, groups_for, parse_groups, path_of


class Grouped:
    """Part of `optim.Optimizer`: its parameter groups, and who got what.

    A trainer needs ``set_parameter_groups`` and ``parameter_groups_table`` only, by name.
    """

    built: bool
    treatment_of: Any
    weight_decay_of: Any
    _get_variable_index: Any
    _state: Any
    _trainable_variables: list[Any]
    _parameter_groups: tuple[Group, ...] = ()
    _has_been_built: bool = False

    def group_of(self, variable: Any) -> Group | None:
        """The parameter group of a variable.

        Args:
            variable: one of the variables the optimizer was built with.

        Returns:
            The first group that matched it; None if it is in none.
        """
        if not self._parameter_groups:
            return None
        result: Group | None = self._state.groups[self._get_variable_index(variable)]
        return result

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups, as the argument of the constructor; empty if there are none."""
        return [group.get_config() for group in self._parameter_groups]

    def set_parameter_groups(
        self, groups: Sequence[Mapping[str, Any]] | None, model: keras.Model | None = None
    ) -> None:
        """Set the groups, before the state is made.

        Args:
            groups: as for the constructor; None for none.
            model: with it, ``match`` may be a type of layer, see `groups_for`.

        Raises:
            ValueError: if there is state already, or a group is wrong.
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
            ValueError: if the optimizer has not been built.
        """
        if not self.built:
            raise ValueError("The table needs the variables: call `build(variables)` first.")
        number = {id(group): str(i) for i, group in enumerate(self._parameter_groups)}
        rows = [("variable", "shape", "group", "lr x", "decay", "rule")]
        for variable in self._trainable_variables:
            treatment = self.treatment_of(variable)
            rows.append(
                (
                    path_of(variable),
                    str(tuple(variable.shape)),
                    number.get(id(self.group_of(variable)), "-"),
                    f"{treatment.learning_rate_multiplier:g}",
                    f"{treatment.weight_decay:g}",
                    type(treatment.rule).__name__,
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
