"""The names under which the variables of a model and of an optimizer are saved."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import keras


def name_variables(variables: Iterable[keras.Variable]) -> dict[str, keras.Variable]:
    """Map every variable to the key under which it is saved: its path.

    Where several variables have the same path (Keras allows equal layer names in subclassed
    models), the first keeps it and the others get ``#1``, ``#2``, ... in order. Duplicates of the
    same variable are dropped.

    Args:
        variables: For instance ``model.variables``; their order matters when equal paths are
            matched.

    Returns:
        Key -> variable, in the given order.

    Example:
        >>> head = keras.layers.Dense(1, name="head")
        >>> model = keras.Sequential([keras.Input((2,)), head], name="net")
        >>> list(name_variables(model.variables))
        ['net/head/kernel', 'net/head/bias']
    """
    unique = list({id(variable): variable for variable in variables}.values())
    return dict(zip(_distinct([variable.path for variable in unique]), unique, strict=True))


def name_optimizer_variables(
    optimizer_variables: Iterable[keras.Variable], model_variables: Iterable[keras.Variable]
) -> dict[str, keras.Variable]:
    """Map every optimizer variable to the key under which it is saved.

    Keras names a slot ``"adam_3/sequential_dense_1_kernel_momentum"``; its key is
    ``"momentum/sequential/dense_1/kernel"``: the slot, then the model variable's key. Other
    variables lose the optimizer's name (``"iteration"``, ``"learning_rate"``); a name that is not
    recognised keeps its path. Equal keys (an inner optimizer's ``"iteration"``, Adafactor's
    factors) are numbered as in ``name_variables``.

    Args:
        optimizer_variables: ``optimizer.variables``.
        model_variables: ``model.variables``, as passed to ``name_variables``.

    Returns:
        Key -> variable, in the optimizer's order.
    """
    unique = list({id(variable): variable for variable in optimizer_variables}.values())
    owners = {
        variable.path.removesuffix("iteration")
        for variable in unique
        if variable.path.endswith("/iteration")
    }
    local = [_without_owner(variable.path, owners) for variable in unique]
    slots = _recognise_slots(local, name_variables(model_variables))
    keys = [slot or name for slot, name in zip(slots, local, strict=True)]
    return dict(zip(_distinct(keys), unique, strict=True))


def _distinct(keys: list[str]) -> list[str]:
    """Append ``#1``, ``#2``, ... to repeated keys without colliding with an existing key."""
    taken = set(keys)
    counts: Counter[str] = Counter()
    result = []
    for key in keys:
        unique = key
        if counts[key]:
            while unique in taken:
                unique = f"{key}#{counts[key]}"
                counts[key] += 1
            taken.add(unique)
        else:
            counts[key] = 1
        result.append(unique)
    return result


def _without_owner(path: str, owners: Iterable[str]) -> str:
    """Strip the optimizer's name from the path of one of its variables."""
    return path.removeprefix(max((o for o in owners if path.startswith(o)), key=len, default=""))


def _recognise_slots(names: list[str], model: Mapping[str, keras.Variable]) -> list[str | None]:
    """``"{slot}/{model key}"`` for every name that is a model variable's slot, else None."""
    by_flat_path: dict[str, list[str]] = defaultdict(list)
    for key, variable in model.items():
        by_flat_path[variable.path.replace("/", "_")].append(key)
    repeats = Counter(names)
    seen: Counter[str] = Counter()
    result: list[str | None] = []
    for name in names:
        result.append(None)
        # The longest match: "a_b" and "a_b_c" may both be variables.
        ends = (index for index in range(len(name) - 1, 0, -1) if name[index] == "_")
        flat = next((name[:end] for end in ends if name[:end] in by_flat_path), None)
        if flat is None:
            continue
        keys = by_flat_path[flat]
        # Equal flat paths ("a/b_c" and "a_b/c") follow the model's order, in which Keras creates
        # the slots.
        if len(keys) != repeats[name]:
            keys = [key for key in keys if model[key].trainable]
        if len(keys) == repeats[name]:
            result[-1] = f"{name[len(flat) + 1 :]}/{keys[seen[name]]}"
            seen[name] += 1
    return result
