"""Matches labels, losses, weights and names to the outputs of a model.

The rules are those of ``Model.compile`` and ``Model.fit``. A dict is matched by the keys of the
outputs, or by the names of a functional model's outputs; a list is matched by order; a single loss
applies to all outputs. An output whose loss is None needs no label, and a single label goes to the
only output with a loss. An output that is not a tensor (usually None) keeps its position; losses,
weights and labels may have an entry for it or leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kbtrain.data import LabelNames, label_keys
from kbtrain.errors import ConfigurationError
from kbtrain.model.losses.keras_losses import describe, name_of, resolve_crossentropy

Path = tuple[Any, ...]


def is_tensor(leaf: Any) -> bool:
    """Whether an output of a model is a tensor, concrete or symbolic."""
    return isinstance(leaf, keras.KerasTensor) or ops.is_tensor(leaf)


def only_tensors(outputs: Any) -> Any:
    """The outputs of a model with everything that is not a tensor replaced by None."""
    if not keras.tree.is_nested(outputs):
        return outputs  # a single output: an error is raised where it is used
    return keras.tree.map_structure(lambda leaf: leaf if is_tensor(leaf) else None, outputs)


def beside_tensors(outputs: Any, values: Any) -> Any:
    """``values``, in the structure of the outputs, without entries for outputs that are no tensor.

    Values in another structure are returned unchanged.
    """
    if isinstance(outputs, Mapping):
        if not isinstance(values, Mapping) or set(values) != set(outputs):
            return values
        kept = [key for key, item in outputs.items() if any(_tensors_in(item))]
        return {key: beside_tensors(outputs[key], values[key]) for key in kept}
    if isinstance(outputs, list | tuple):
        if not isinstance(values, list | tuple) or len(values) != len(outputs):
            return values
        pairs = zip(outputs, values, strict=True)
        items = [beside_tensors(item, value) for item, value in pairs if any(_tensors_in(item))]
        return items if isinstance(outputs, list) else tuple(items)
    return values


def _tensors_in(tree: Any) -> list[bool]:
    return [is_tensor(leaf) for leaf in keras.tree.flatten(tree)]


class Outputs:
    """The outputs of a model in a fixed order, each with a name.

    Args:
        tree: The model's outputs: one, or a (possibly nested) dict, list or tuple of them.
        names: The output names of a functional model.

    Attributes:
        leaves: The outputs.
        tensors: Positions of the outputs that are tensors, to which losses and metrics apply.
        names: Their names: the keys of a dict, else ``names``, else ``output_0``, ``output_1``.
        nested: Whether ``tree`` is a structure, even of a single output.
        named: Whether the names come from the model and are not ``output_0``, ...
    """

    def __init__(self, tree: Any, names: Sequence[str] | None) -> None:
        flat = keras.tree.flatten_with_path(tree)
        self.tree, self.nested = tree, keras.tree.is_nested(tree)
        self.paths: list[Path] = [tuple(path) for path, _ in flat]
        self.leaves = [leaf for _, leaf in flat]
        positions = range(len(flat))
        self.tensors = [i for i in positions if is_tensor(self.leaves[i])] or list(positions)
        self._given = list(names or ())
        if len(self._given) != len(flat):
            self._given = []
        self.named = bool(self._given) or all(p and isinstance(p[-1], str) for p in self.paths)
        own = self._given or [f"output_{i}" for i in range(len(flat))]
        self.names = _distinct([_named(p, name) for p, name in zip(self.paths, own, strict=True)])

    def find(self, path: Path) -> list[int]:
        """Positions of the outputs below a path; outputs in a list also match by name."""
        found = [i for i, own in enumerate(self.paths) if own[: len(path)] == path]
        if not found and len(path) == 1 and not isinstance(self.tree, Mapping):
            names = self._given or ([] if self.nested else list(path))
            found = [i for i, name in enumerate(names) if name == path[0]]
        return found

    def assign(self, tree: Any, what: str) -> dict[int, Any]:
        """Distribute losses, loss weights or metrics over the outputs: position -> value.

        Args:
            tree: One value for all outputs, or a dict or list of values.
            what: Its name in errors.

        Raises:
            ConfigurationError: An entry matches no output, or an output has no entry.
        """
        values: dict[int, Any] = {}
        self._assign(tree, (), list(range(len(self.leaves))), what, values)
        return values

    def _assign(
        self, tree: Any, path: Path, below: list[int], what: str, values: dict[int, Any]
    ) -> None:
        if isinstance(tree, Mapping):
            for key, value in tree.items():
                found = [i for i in self.find((*path, key)) if i in below]
                if not found:
                    raise ConfigurationError(
                        f"The {what} has an entry for {key!r}, which is not an output of the "
                        f"model. Received: {describe(tree)}. The outputs are {self.names}."
                    )
                self._assign(value, (*path, key), found, what, values)
        elif isinstance(tree, list | tuple):
            groups = [[i] for i in below]
            if len(tree) != len(groups):  # a list of lists, as the outputs are
                end = len(path) + 1
                parts = dict.fromkeys(self.paths[i][:end] for i in below)
                groups = [[i for i in below if self.paths[i][:end] == part] for part in parts]
            tensors = [[i] for i in below if i in self.tensors]
            if len(tree) != len(groups) and len(tree) == len(tensors):
                groups = tensors  # a list that leaves out what is no tensor
            if len(tree) != len(groups):
                raise ConfigurationError(
                    f"The {what} is {describe(tree)}, but there are {len(groups)} outputs: "
                    f"{[self.names[i] for i in below]}. Give one entry for each, None where there "
                    "is none."
                )
            for value, group in zip(tree, groups, strict=True):
                below_path = self.paths[group[0]][: len(path) + 1]
                self._assign(value, below_path, group, what, values)
        elif len(below) == 1:
            values[below[0]] = tree
        else:  # one value for all
            values.update((i, tree) for i in below if i in self.tensors)

    def labels(
        self,
        y: Any,
        active: Sequence[int],
        what: str = "label",
        label_names: LabelNames = None,
    ) -> dict[int, Any]:
        """Labels (or sample weights) by the position of their output; some may have none.

        Args:
            y: One array, or a dict or list of them.
            active: The outputs that need one.
            what: Their name in errors.
            label_names: The order of labels in a dict whose keys are not names of outputs.

        Raises:
            ConfigurationError: The labels cannot be matched to the outputs.
        """
        if not keras.tree.is_nested(y):
            if len(self.tensors) == 1 or len(active) == 1:
                return {(active or self.tensors)[0]: y}
            raise ConfigurationError(
                f"The losses are for the outputs {[self.names[i] for i in active]}, but the {what} "
                f"is {describe(y)}. Pass a dict or a list with one {what} per output, or None as "
                "the loss of outputs without one."
            )
        if isinstance(y, Mapping):
            return self._labels_by_name(y, active, what, label_keys(label_names).names)
        if keras.tree.is_nested(self.tree) and len(y) < len(keras.tree.flatten(y)):
            same = Outputs(y, None)  # lists of lists
            known = dict(zip(same.paths, same.leaves, strict=True))
            if set(known) == set(self.paths):
                return {i: known[path] for i, path in enumerate(self.paths)}
        for positions in (range(len(self.leaves)), self.tensors, active):
            if len(positions) == len(y):
                return dict(zip(positions, y, strict=True))
        raise ConfigurationError(
            f"The {what} is {describe(y)}, but the outputs are {self.names}. Pass one per "
            "output, in this order."
        )

    def _labels_by_name(
        self, y: Mapping[Any, Any], active: Sequence[int], what: str, order: Sequence[str] | None
    ) -> dict[int, Any]:
        flat = keras.tree.flatten_with_path(dict(y))
        found = {i: leaf for path, leaf in flat for i in self.find(tuple(path))}
        if all(i in found for i in active):
            return found
        if order and set(order) == set(y) and not any(name in self.names for name in y):
            return self.labels([y[name] for name in order], active, what)
        missing = next(self.names[i] for i in active if i not in found)
        raise ConfigurationError(
            f"The loss for {missing!r} has no {what}: the {what} is {describe(y)}, the outputs are "
            f"{self.names}. Use the same keys (or order) for both."
        )

    def pack(self, values: Mapping[int, Any]) -> Any:
        """Pack values by position into the structure of the outputs; None for missing ones."""
        flat = [values.get(i) for i in range(len(self.leaves))]
        return keras.tree.pack_sequence_as(self.tree, flat) if self.nested else flat[0]


def _named(path: Path, name: str) -> str:
    """Keras' name of an output: its keys, with the layer's name in place of a list index."""
    if not path or isinstance(path[-1], int):
        path = (*path[:-1], name)
    return "/".join(map(str, path))


def _distinct(names: list[str]) -> list[str]:
    """Make names unique: a layer may have several outputs."""
    taken: dict[str, int] = {}
    for i, name in enumerate(names):
        taken[name] = taken.get(name, -1) + 1
        names[i] = f"{name}_{taken[name]}" if taken[name] else name
    return names


class OutputLoss(NamedTuple):
    """The inputs to the loss of one output.

    Attributes:
        position: Position among the outputs.
        name: Name of the output.
        loss: A Keras loss or function.
        weight: A number, or None for 1.
        label: The labels.
        output: The output.
        sample_weight: The sample weights, or None.
    """

    position: int
    name: str
    loss: Any
    weight: Any
    label: Any
    output: Any
    sample_weight: Any


def pair_up(
    losses: Any,
    loss_weights: Any,
    y: Any,
    outputs: Outputs,
    sample_weight: Any = None,
    label_names: LabelNames = None,
) -> list[OutputLoss]:
    """Collect, for each output that has a loss, the inputs to that loss.

    Args:
        losses: One resolved loss, or a dict or list of these; None for no loss.
        loss_weights: A number for one output, a dict or list for several, or None.
        y: The labels.
        outputs: The outputs.
        sample_weight: One for all outputs, or a dict or list; or None.
        label_names: The order of labels in a dict whose keys are not names of outputs.

    Raises:
        ConfigurationError: An entry is missing or cannot be matched.
    """
    by_output = outputs.assign(losses, "loss")
    active = [i for i in range(len(outputs.leaves)) if by_output.get(i) is not None]
    if not active:
        raise ConfigurationError("There is no loss: it is None for every output.")
    weights = loss_weights_of(loss_weights, active, outputs)
    labels = outputs.labels(y, active, label_names=label_names)
    if not keras.tree.is_nested(losses):
        for i in set(labels).difference(outputs.tensors):
            if labels[i] is not None:
                raise ConfigurationError(
                    f"There is a label for the output {outputs.names[i]!r}, which is not a tensor, "
                    "and one loss for all outputs. Pass a list or dict of losses with None for "
                    "this output, or leave its label out."
                )
    sample_weights: dict[int, Any] = dict.fromkeys(active, sample_weight)
    if keras.tree.is_nested(sample_weight):
        sample_weights = outputs.labels(sample_weight, active, "sample weight", label_names)
    rows = []
    for i in active:
        label, output = labels.get(i), outputs.leaves[i]
        for part, what in ((label, "label"), (output, "model output")):
            if part is None:
                raise ConfigurationError(
                    f"The loss for {outputs.names[i]!r} has no {what}: it is None. Set the loss of "
                    "this output to None as well."
                )
        loss = by_output[i]
        if hasattr(label, "shape") and hasattr(output, "shape"):
            loss = resolve_crossentropy(loss, label, output)
        weight = sample_weights.get(i)
        rows.append(OutputLoss(i, outputs.names[i], loss, weights.get(i), label, output, weight))
    return rows if outputs.named else _named_by_loss(rows, outputs)


def _named_by_loss(rows: list[OutputLoss], outputs: Outputs) -> list[OutputLoss]:
    """Name unnamed outputs after their losses, as Keras does, if the losses differ."""
    paths = [outputs.paths[row.position] for row in rows]
    names = [_named(path, name_of(row.loss)) for path, row in zip(paths, rows, strict=True)]
    if len(set(names)) < len(names):
        return rows
    return [row._replace(name=name) for row, name in zip(rows, names, strict=True)]


def loss_weights_of(loss_weights: Any, active: Sequence[int], outputs: Outputs) -> dict[int, float]:
    """The loss weights by the position of their output.

    Raises:
        ConfigurationError: A weight is missing or matches no output.
    """
    if loss_weights is None:
        return {}
    if not keras.tree.is_nested(loss_weights) and len(active) > 1:
        raise ConfigurationError(
            f"loss_weights={loss_weights!r} is one number for several outputs: "
            f"{[outputs.names[i] for i in active]}. Pass a dict or a list with one for each."
        )
    if isinstance(loss_weights, list | tuple) and len(loss_weights) == len(active):
        weights = dict(zip(active, loss_weights, strict=True))
    else:
        weights = outputs.assign(loss_weights, "loss_weights")
    if missing := [outputs.names[i] for i in active if weights.get(i) is None]:
        raise ConfigurationError(
            f"The loss for {missing[0]!r} has no loss weight: loss_weights={loss_weights!r}. Pass "
            "one for each output that has a loss."
        )
    return weights


def mapped(function: Callable[[Any], Any], losses: Any) -> Any:
    """Apply ``function`` to each loss in a structure; None stays None."""
    if isinstance(losses, Mapping):
        return {name: mapped(function, item) for name, item in losses.items()}
    if isinstance(losses, list | tuple):
        return [mapped(function, item) for item in losses]
    return None if losses is None else function(losses)


def check_loss_weights(loss_weights: Any, loss: Any, loss_func: Any) -> None:
    """Validate the argument ``loss_weights`` as far as possible without the model.

    Raises:
        ConfigurationError: It is not a number or a dict or list of numbers, it has keys that the
            losses lack, or ``compute_loss_func`` computes the whole loss.
    """
    if loss_weights is None:
        return
    if loss_func is not None:
        raise ConfigurationError(
            "loss_weights apply to losses that the Trainer adds up, but compute_loss_func returns "
            "the whole loss. Apply the weights there, or pass loss=... instead."
        )
    for weight in keras.tree.flatten(loss_weights):
        is_number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
        if not (is_number or weight is None or hasattr(weight, "dtype")):
            raise ConfigurationError(
                "loss_weights must be a number, or a dict or list of numbers, one per output. "
                f"Received: loss_weights={loss_weights!r}."
            )
    both = isinstance(loss, Mapping) and isinstance(loss_weights, Mapping)
    if both and (unknown := [key for key in loss_weights if key not in loss]):
        raise ConfigurationError(
            f"loss_weights has an entry for {unknown[0]!r}, which has no loss. "
            f"Received: loss_weights={loss_weights!r}, losses for {list(loss)}."
        )
