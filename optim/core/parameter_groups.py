"""Which parameter gets which learning rate, weight decay and rule.

A list of groups is an argument of every `optim.Optimizer`. A group is a dictionary:

================= ============================================================================
``match``         its variables: a regular expression searched for in a variable's path, a list
                  of paths, or a type of layer (through `groups_for`, which takes the model)
``lr_multiplier`` what the learning rate is multiplied by
``weight_decay``  the decay in place of the optimizer's; variables that are excluded stay so
``optimizer``     whose rule is executed: a name, ``{"name": ..., argument: value}``, or an object
================= ============================================================================

A variable belongs to the first group that matches it; one that none matches is updated as if there
were no groups. A group without variables is an error, since it is usually a typing mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from optim import registry
from optim.core.checks import check_pattern, check_range
from optim.core.fallback import flatten_layers

KEYS = ("match", "lr_multiplier", "weight_decay", "optimizer")

OF_THE_WHOLE = (
    *("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor"),
    *("gradient_accumulation_steps", "metric_schedule"),
)
"""Arguments for all variables together, which would have no effect on a group's optimizer."""


@dataclass(frozen=True)
class Group:
    """One group, checked.

    Attributes:
        match: A regular expression, or the exact paths of the variables.
        lr_multiplier: What the learning rate is multiplied by.
        weight_decay: The decay; None for the one the rule has.
        optimizer: Whose rule is executed; None for the one of the optimizer that has the groups.
    """

    match: str | tuple[str, ...]
    lr_multiplier: float = 1.0
    weight_decay: float | None = None
    optimizer: Any = None

    def members(self, paths: Sequence[str]) -> tuple[set[str], list[str]]:
        """The paths of variables that belong here, and the listed ones that do not exist.

        Keras puts a `keras.Sequential`'s own name in front of its variables' paths, or leaves it
        out when the model comes from a file: a listed path may have it or not.
        """
        if isinstance(self.match, str):
            return {path for path in paths if re.search(self.match, path)}, []
        found = {wanted: _find(wanted, paths) for wanted in self.match}
        unknown = sorted(wanted for wanted, path in found.items() if path is None)
        return {path for path in found.values() if path is not None}, unknown

    def describe(self) -> str:
        """The group by its match, for messages."""
        if isinstance(self.match, str):
            return f"match={self.match!r}"
        return f"match of {len(self.match)} paths ({', '.join(self.match[:3])}, ...)"

    def get_config(self) -> dict[str, Any]:
        """The group as a serializable dictionary."""
        config: dict[str, Any] = {
            "match": self.match if isinstance(self.match, str) else list(self.match),
            "lr_multiplier": self.lr_multiplier,
        }
        if self.weight_decay is not None:
            config["weight_decay"] = self.weight_decay
        if self.optimizer is not None:
            config["optimizer"] = keras.saving.serialize_keras_object(self.optimizer)
        return config


def path_of(variable: Any) -> str:
    """The path of a variable, or its name where it has none (a bare ``tf.Variable``)."""
    result: str = getattr(variable, "path", None) or variable.name
    return result


def parse_groups(groups: Sequence[Mapping[str, Any]] | None) -> tuple[Group, ...]:
    """Check a list of groups.

    Args:
        groups: As described at the top of this module; None for none.

    Returns:
        The groups in their order.

    Raises:
        ValueError: If a key is unknown or missing, or a value is out of range.
        TypeError: If something is not of the right kind.
    """
    if groups is None:
        return ()
    _check_list("parameter_groups", groups)
    return tuple(_parse_group(index, group) for index, group in enumerate(groups))


def _check_list(name: str, groups: Any) -> None:
    if isinstance(groups, str | Mapping) or not isinstance(groups, Sequence):
        raise TypeError(f"`{name}` must be a list of dictionaries. Received: {name}={groups!r}")


def _parse_group(index: int, group: Any) -> Group:
    where = f"parameter_groups[{index}]"
    if not isinstance(group, Mapping):
        raise TypeError(f"{where} must be a dictionary. Received: {group!r}")
    unknown = sorted(str(key) for key in group if key not in KEYS)
    if unknown or "match" not in group:
        problem = f"the unknown key {unknown[0]!r}" if unknown else "no 'match'"
        raise ValueError(f"{where} has {problem}. Its keys: {', '.join(KEYS)}. Received: {group!r}")
    if len(group) == 1:
        raise ValueError(
            f"{where} changes nothing: give it one of {', '.join(KEYS[1:])}. Received: {group!r}"
        )
    decay = group.get("weight_decay")
    return Group(
        _parse_match(where, group["match"]),
        check_range(f"{where}['lr_multiplier']", group.get("lr_multiplier", 1.0), 0.0),
        None if decay is None else check_range(f"{where}['weight_decay']", decay, 0.0),
        _parse_optimizer(where, group.get("optimizer")),
    )


def _parse_match(where: str, match: Any) -> str | tuple[str, ...]:
    if isinstance(match, str) and match:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(
                f"{where}['match'] is not a regular expression: {error}. Received: {match!r}"
            ) from None
        return match
    if isinstance(match, type):
        raise TypeError(
            f"{where}['match'] is a type of layer, and an optimizer has variables only. Give "
            f"parameter_groups=optim.groups_for(model, [...]). Received: {match!r}"
        )
    paths = isinstance(match, list | tuple) and all(isinstance(path, str) for path in match)
    if not paths or not match:
        raise TypeError(
            f"{where}['match'] must be a regular expression or a list of paths. Received: {match!r}"
        )
    return tuple(match)


def _parse_optimizer(where: str, optimizer: Any) -> Any:
    if optimizer is None:
        return None
    if isinstance(optimizer, str):
        optimizer = registry.get(optimizer)
    elif isinstance(optimizer, Mapping) and "class_name" in optimizer:
        optimizer = keras.saving.deserialize_keras_object(dict(optimizer))
    elif isinstance(optimizer, Mapping):
        optimizer = _by_name(where, dict(optimizer))
    if not (hasattr(optimizer, "slot_shapes") and hasattr(optimizer, "rule_for")):
        raise TypeError(
            f"{where}['optimizer'] must be an optimizer of `optim`, the name of one or "
            f"{{'name': ..., argument: value}}. Received: {optimizer!r}"
        )
    if unused := [name for name in OF_THE_WHOLE if getattr(optimizer, name, None)]:
        raise ValueError(
            f"{where}['optimizer'] has a {unused[0]}, which would not be used: that is one for all "
            "variables. Give it to the optimizer that has the groups. "
            f"Received: {unused[0]}={getattr(optimizer, unused[0])!r}"
        )
    if optimizer.parameter_groups:
        raise ValueError(f"{where}['optimizer'] has groups of its own; put them into this list.")
    return optimizer


def _by_name(where: str, arguments: dict[str, Any]) -> Any:
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"{where}['optimizer'] has no 'name'. Received: {arguments!r}")
    if "learning_rate" in arguments:
        raise ValueError(
            f"{where}['optimizer'] has a learning_rate, which would not be used: the optimizer "
            "with the groups has one for all. Give the group an 'lr_multiplier'."
        )
    return registry.get(name, **arguments)


def assign(
    groups: Sequence[Group], variables: Sequence[Any], strict: bool = True
) -> list[Group | None]:
    """Assign every variable to the first group that matches it.

    Args:
        groups: The groups in their order.
        variables: The variables of the optimizer.
        strict: Whether a group without variables is an error.

    Returns:
        For each variable its group, or None.

    Raises:
        ValueError: If no variable goes to a group, or one that it lists does not exist.
    """
    paths = [path_of(variable) for variable in variables]
    members = []
    for index, group in enumerate(groups):
        found, unknown = group.members(paths)
        if unknown and strict:
            raise ValueError(
                f"parameter_groups[{index}] lists {unknown[0]!r}, which is not among the "
                f"{len(paths)} trained variables: {_some(paths)}."
            )
        members.append(found)
    chosen = [
        next((group for group, found in zip(groups, members, strict=True) if path in found), None)
        for path in paths
    ]
    taken = {id(group) for group in chosen}
    for index, (group, found) in enumerate(zip(groups, members, strict=True)):
        if strict and id(group) not in taken:
            problem = (
                f"gets no variable: groups before it take the {len(found)} it matches"
                if found
                else f"matches none of the {len(paths)} trained variables: {_some(paths)}. (A type "
                "of layer has to be looked up in the model: optim.groups_for(model, [...]))"
            )
            raise ValueError(f"parameter_groups[{index}], {group.describe()}, {problem}.")
    return chosen


def _find(wanted: str, paths: Sequence[str]) -> str | None:
    """The path itself if it exists, or the only one that differs by a leading name."""
    tail = wanted.partition("/")[2]
    for candidates in (
        [path for path in paths if path == wanted],
        [path for path in paths if tail and path == tail],
        [path for path in paths if path.partition("/")[2] == wanted],
    ):
        if candidates:
            return candidates[0] if len({*candidates}) == 1 else None
    return None


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")


def groups_for(model: keras.Model, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Replace types of layers by the paths of their variables in a model.

    A type is a class (subclasses belong to it), or a text that is the name of the class of one of
    the model's layers or of its base classes. What is inside of such a layer belongs to it.

    Args:
        model: A built model.
        groups: The groups.

    Returns:
        The groups for ``parameter_groups``, without types.

    Raises:
        ValueError: If the model has no variables yet, or no layer of a class.
        TypeError: If ``groups`` is no list of dictionaries.

    Example:
        >>> import keras, optim
        >>> layers = keras.layers.Embedding(5, 2, name="words"), keras.layers.Dense(1)
        >>> model = keras.Sequential([keras.Input((3,)), *layers], name="net")
        >>> optim.groups_for(model, [{"match": "Embedding", "lr_multiplier": 0.1}])
        [{'match': ['net/words/embeddings'], 'lr_multiplier': 0.1}]
    """
    _check_list("groups", groups)
    if not model.trainable_variables:
        raise ValueError(
            f"The model {model.name!r} has no trainable variables. Build it first: call it on a "
            "batch, or give it an Input."
        )
    layers = flatten_layers(model)[1:]
    known = {base.__name__ for layer in layers for base in type(layer).__mro__}
    resolved = []
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise TypeError(f"groups[{index}] must be a dictionary. Received: {group!r}")
        match = group.get("match")
        if isinstance(match, type) or (isinstance(match, str) and match in known):
            group = {**group, "match": _paths_inside(model, layers, match)}
        resolved.append(dict(group))
    return resolved


def _paths_inside(model: keras.Model, layers: Sequence[Any], kind: type | str) -> list[str]:
    def fits(layer: Any) -> bool:
        if isinstance(kind, type):
            return isinstance(layer, kind)
        return kind in [base.__name__ for base in type(layer).__mro__]

    inside = {id(v) for layer in layers if fits(layer) for v in layer.trainable_variables}
    paths = [path_of(v) for v in model.trainable_variables if id(v) in inside]
    if not paths:
        types = sorted({type(layer).__name__ for layer in layers if layer.trainable_variables})
        name = kind if isinstance(kind, str) else kind.__name__
        raise ValueError(
            f"The model {model.name!r} has no trained variables in layers of the type {name}. "
            f"Types that have some: {', '.join(types)}. Received: match={kind!r}"
        )
    return list(dict.fromkeys(paths))


def layerwise_lr_decay(
    model: keras.Model, decay: float = 0.9, levels: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    r"""Groups with a smaller learning rate for each layer further from the output.

    The last of :math:`n` levels has the full rate, the one before :math:`\text{decay}` times it,
    the first :math:`\text{decay}^{n-1}`.

    Args:
        model: A built model.
        decay: In (0, 1].
        levels: Regular expressions for the paths of each level's variables, the one next to the
            inputs first; what none matches keeps the full rate. The default is every layer
            that has trained variables, in the model's order; of models inside it, their layers.

    Returns:
        The groups for ``parameter_groups``.

    Raises:
        ValueError: If ``decay`` is out of range, a level matches nothing, or the model has no
            variables yet.
        TypeError: If ``levels`` is no list.

    Example:
        >>> import keras, optim
        >>> layers = [keras.layers.Dense(2, name=name) for name in ("first", "second", "third")]
        >>> model = keras.Sequential([keras.Input((2,)), *layers], name="net")
        >>> groups = optim.layerwise_lr_decay(model, 0.5)
        >>> [(group["match"][0], group["lr_multiplier"]) for group in groups]
        [('net/first/kernel', 0.25), ('net/second/kernel', 0.5), ('net/third/kernel', 1.0)]

    Reference:
        - [Howard and Ruder, ULMFiT](https://arxiv.org/abs/1801.06146)
        - [Clark et al., ELECTRA](https://arxiv.org/abs/2003.10555)
    """
    if not 0.0 < check_range("decay", decay, 0.0) <= 1.0:
        raise ValueError(f"`decay` must be in (0, 1]. Received: decay={decay!r}")
    variables = model.trainable_variables
    if not variables:
        raise ValueError(f"The model {model.name!r} has no trainable variables. Build it first.")
    matches: list[Any] = _one_per_layer(model) if levels is None else _checked(levels, variables)
    count = len(matches)
    return [
        {"match": match, "lr_multiplier": decay ** (count - 1 - index)}
        for index, match in enumerate(matches)
    ]


def _checked(levels: Any, variables: Sequence[Any]) -> list[str]:
    """The levels, each a regular expression that matches the path of some variable."""
    if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
        raise TypeError(
            f"`levels` must be a list of regular expressions. Received: levels={levels!r}"
        )
    paths = [path_of(variable) for variable in variables]
    for index, level in enumerate(levels):
        pattern = check_pattern(f"levels[{index}]", level)
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"levels[{index}] matches none of the {len(paths)} trained variables: "
                f"{_some(paths)}. Received: {level!r}"
            )
    return list(levels)


def _one_per_layer(model: keras.Model) -> list[list[str]]:
    """The paths of each innermost layer of the model's own structure, every variable once."""
    levels: list[list[str]] = []
    seen: set[str] = set()

    def visit(layer: Any) -> None:
        if isinstance(layer, keras.Model) and layer.layers:
            for inner in layer.layers:
                visit(inner)
        paths = [path_of(variable) for variable in layer.trainable_variables]
        new = [path for path in dict.fromkeys(paths) if path not in seen]
        if new:
            seen.update(new)
            levels.append(new)

    visit(model)
    return levels


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as lines with aligned columns, a line under the first.

    Args:
        rows: The cells; the first row is the heading.

    Returns:
        The table, without a line break at its end.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
