"""Variables by name: the key each is saved under, and how keys are matched to variables.

Keras numbers layers and optimizers across the process (``dense``, ``dense_1``, ...), so the same
model built twice has different paths the second time. The saved keys are the paths. On loading they
match exactly or, failing that, after both sides are renumbered in order of appearance, or by
position if one side only lacks the names of parents. Anything that still does not match is an
error: nothing is skipped, and nothing is assigned before everything has been checked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import ml_dtypes
import numpy as np

from kbtrain import backends
from kbtrain.checkpoint.frozen_base import ExpectedArray
from kbtrain.checkpoint.storage.blocks import StoredArray
from kbtrain.errors import CheckpointMismatchError
from kbtrain.model.variable_names import name_variables
from kbtrain.utils.array_blocks import Block, OwnedBlocks, ReadBlock
from kbtrain.utils.machine.host_buffers import HostBuffers

_AUTO_SUFFIX = re.compile(r"(.+?)_(\d+)(#\d+)?", re.ASCII)
_SHOWN = 10


@dataclass(frozen=True)
class RestorePlan:
    """Which saved array is assigned to which variable; checked, but not yet applied.

    Attributes:
        names: Variable's key in this process -> key in the checkpoint, for variables with a value.
            The optimizer's plan follows the model's.
        values: Pairs of a variable and its array, cast to the variable's dtype. A ``StoredArray``
            is read when the plan is applied.
        missing: Keys of variables without a value. In a strict plan this and the next two are
            empty.
        unexpected: Keys of the checkpoint that are not used.
        different: Descriptions of values that do not fit their variable.
        frozen: Keys of variables that the checkpoint leaves out, and that have the value they had
            when it was saved. They are in ``names`` too.
    """

    names: dict[str, str]
    values: list[tuple[keras.Variable, Any]]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def apply(self) -> None:
        """Assign the values."""
        for variable, value in self.values:
            _assign(variable, value)


def capture(
    named: Mapping[str, keras.Variable],
    buffers: HostBuffers | None = None,
    group: str = "",
    divided_only: bool = False,
) -> dict[str, Any]:
    """Copy the values of variables to the host.

    Args:
        named: Key -> variable, from ``name_variables`` or ``name_optimizer_variables``.
        buffers: Host memory to copy into; new memory by default.
        group: Prefix that keeps these keys apart from others in the buffers.
        divided_only: Whether to leave out variables that are whole on every process.

    Returns:
        Key -> array with the variable's dtype (bfloat16 and float8 as in ``ml_dtypes``), sharing no
        memory with the variable; ``OwnedBlocks`` of a variable that is divided among processes.
    """
    buffers = HostBuffers() if buffers is None else buffers
    backend, found = backends.load(), dict[str, Any]()
    for name, variable in named.items():
        owned = backend.owned_blocks(variable)
        if owned is not None:
            found[name] = _copy_blocks(owned, buffers, f"{group}:{name}")
        elif not divided_only:
            found[name] = _copy_to_host(variable, buffers, f"{group}:{name}")
    return found


def restore(
    named: Mapping[str, keras.Variable],
    saved: Mapping[str, np.ndarray],
    what: str = "model",
    model_names: Mapping[str, str] | None = None,
) -> None:
    """Assign saved values to variables, all of them or none.

    Args:
        named: Key -> variable of this process.
        saved: Key -> array from the checkpoint.
        what: Owner of the variables, for messages: ``"model"``, ``"optimizer"``, ...
        model_names: For an optimizer: ``plan_restore(...).names`` of its model.

    Raises:
        CheckpointMismatchError: If names, shapes or values do not fit; then no variable has been
            changed.
    """
    plan_restore(named, saved, what, model_names).apply()


def plan_restore(
    named: Mapping[str, keras.Variable],
    saved: Mapping[str, Any],
    what: str = "model",
    model_names: Mapping[str, str] | None = None,
    strict: bool = True,
) -> RestorePlan:
    """Check that saved values fit variables, without assigning any.

    To restore a model and its optimizer together or not at all, make both plans, then apply both.

    Args:
        named: As in ``restore``.
        saved: As in ``restore``, or objects with a shape that NumPy can convert to arrays; a
            ``ExpectedArray`` is compared with its variable.
        what: As in ``restore``.
        model_names: As in ``restore``; the optimizer's slots then follow the match of their model
            variable, rather than being renumbered themselves.
        strict: Whether everything must fit. If False, the plan has what fits and lists the rest.

    Returns:
        The plan.

    Raises:
        CheckpointMismatchError: If names, shapes or values do not fit; if not ``strict``, only if
            none do.
    """
    names = _match(list(named), list(saved), model_names)
    missing = [key for key in named if key not in names]
    used = set(names.values())
    unexpected = [key for key in saved if key not in used]
    different: list[str] = []
    values, frozen = [], []
    for key, saved_key in names.items():
        variable, shape = named[key], tuple(np.shape(saved[saved_key]))
        label = key if key == saved_key else f"{key} (saved as {saved_key})"
        if tuple(variable.shape) != shape:  # checked first: the array may not have been read yet
            different.append(f"{label}: {shape} saved, {tuple(variable.shape)} expected")
            continue
        if isinstance(saved[saved_key], ExpectedArray):
            if saved[saved_key].is_value_of(variable):
                frozen.append(key)
            else:
                different.append(
                    f"{label}: it was frozen and is not in the checkpoint, and has another value "
                    "now"
                )
            continue
        dtype = _dtype_of(variable)
        if isinstance(saved[saved_key], StoredArray) and saved[saved_key].dtype == dtype:
            values.append((variable, saved[saved_key]))
            continue
        array = np.asarray(saved[saved_key])
        if (value := _cast(array, dtype)) is None:
            different.append(f"{label}: {array.dtype} values that {variable.dtype} cannot hold")
        else:
            values.append((variable, value))
    misfit = bool(missing or unexpected or different)
    if misfit and (strict or not values):
        raise CheckpointMismatchError(
            _mismatch_message(what, len(named), len(saved), missing, unexpected, different)
        )
    planned = {id(variable) for variable, _ in values} | {id(named[key]) for key in frozen}
    names = {key: found for key, found in names.items() if id(named[key]) in planned}
    return RestorePlan(
        names, values, tuple(missing), tuple(unexpected), tuple(different), tuple(frozen)
    )


def restore_model_arrays(
    model: keras.Model, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Load the arrays of a checkpoint into a model without metrics or optimizer.

    Args:
        model: A model built from the configuration in the checkpoint.
        arrays: The checkpoint's groups. Where training and evaluation weights differ, those for
            evaluation are used.

    Raises:
        CheckpointMismatchError: If the arrays do not fit.
    """
    values = {**arrays.get("model", {}), **arrays.get("evaluation", {})}
    restore(name_variables(model.variables), values)


def _copy_blocks(owned: OwnedBlocks, buffers: HostBuffers, name: str) -> OwnedBlocks:
    blocks = []
    for start, values in owned.blocks:
        value = backends.load().host_view(values)
        copy = buffers.take(f"{name}@{start}", value.shape, value.dtype)
        np.copyto(copy, value)
        blocks.append(Block(start, copy))
    return OwnedBlocks(owned.shape, owned.dtype, blocks)


def _copy_to_host(variable: keras.Variable, buffers: HostBuffers, name: str) -> np.ndarray:
    try:
        value = backends.load().host_view(variable.value)
    except TypeError:
        # Not every framework can copy float8 to the host; all can copy its bits.
        bits = keras.ops.convert_to_numpy(keras.ops.view(variable.value, "uint8"))
        return np.array(bits).view(_dtype_of(variable))
    copy = buffers.take(name, value.shape, value.dtype)
    np.copyto(copy, value)
    return copy


def _assign(variable: keras.Variable, value: Any) -> None:
    backend = backends.load()
    if backend.spans_devices(variable):
        backend.assign_blocks(variable, _reader(value))
        return
    value = np.asarray(value)
    try:
        # A copy, because JAX may keep using the array's memory, which others can still write to.
        variable.assign(np.array(value))
    except TypeError:  # as in _copy_to_host
        variable.assign(keras.ops.view(np.array(value).view("uint8"), value.dtype.name))


def _reader(value: Any) -> ReadBlock:
    if isinstance(value, StoredArray):
        return value.read_block

    def read(start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        ends = zip(start, shape, strict=True)
        return np.array(value[tuple(slice(first, first + size) for first, size in ends)])

    return read


def _dtype_of(variable: keras.Variable) -> np.dtype[Any]:
    name = keras.backend.standardize_dtype(variable.dtype)
    result: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name, name))
    return result


def _match(
    keys: list[str], saved: list[str], model_names: Mapping[str, str] | None
) -> dict[str, str]:
    """Return key -> saved key for all that can be matched."""
    if model_names is not None:
        return _match_following(keys, saved, model_names)
    if set(keys) == set(saved):
        return {key: key for key in keys}
    canonical = dict(zip(_canonical(saved), saved, strict=True))
    own = dict(zip(_canonical(keys), keys, strict=True))
    if own.keys() == canonical.keys():
        return {key: canonical[name] for name, key in own.items()}
    if (without_root := _match_without_root(keys, saved)) is not None:
        return without_root
    if (without_parents := _match_without_parents(keys, saved)) is not None:
        return without_parents
    # A mismatch: for the error message, use the pairing that explains more of the names.
    by_canonical_name = {key: canonical[name] for name, key in own.items() if name in canonical}
    by_name = {key: key for key in keys if key in set(saved)}
    return max(by_name, by_canonical_name, key=len)


def _match_without_root(keys: list[str], saved: list[str]) -> dict[str, str] | None:
    """Match names where only one side starts with the model's own name.

    A Sequential built from layers has a ``sequential/dense/kernel``; built from its configuration
    (``from_config``, ``load_model``) it calls the same variable ``dense/kernel``.
    """
    for shorter, longer in ((keys, saved), (saved, keys)):
        for root in {key.partition("/")[0] for key in longer if "/" in key}:
            cut = [key.removeprefix(root + "/") for key in longer]
            known = dict(zip(_canonical(shorter), shorter, strict=True))
            found = dict(zip(_canonical(cut), longer, strict=True))
            if known.keys() == found.keys() and len(found) == len(longer):
                pairs = {known[name]: found[name] for name in found}
                return pairs if shorter is keys else {v: k for k, v in pairs.items()}
    return None


def _match_without_parents(keys: list[str], saved: list[str]) -> dict[str, str] | None:
    """Match names by position where one side lacks some of the parents' names.

    A copy (``clone_model``, ``load_model``) of a model of several Sequentials has ``dense/kernel``
    for ``sequential_2/sequential/dense/kernel``, because its parts were built before they were
    nested. The order of layers and variables and their base names stay the same.
    """
    if len(keys) != len(saved):
        return None
    pairs = dict(zip(keys, saved, strict=True))
    for shorter, longer in ((keys, saved), (saved, keys)):
        if all(map(_is_without_parents, shorter, longer)):
            return pairs
    return None


def _is_without_parents(short: str, long: str) -> bool:
    """Whether ``short`` is ``long`` with some components before the last two left out."""
    found, full = (
        [_AUTO_SUFFIX.sub(r"\1", component) for component in key.partition("#")[0].split("/")]
        for key in (short, long)
    )
    remaining = iter(full)
    return found[-2:] == full[-2:] and all(component in remaining for component in found)


def _match_following(
    keys: list[str], saved: list[str], model_names: Mapping[str, str]
) -> dict[str, str]:
    """Match slots through their model variable, and the rest by name."""
    followed = {}
    for key in keys:
        slot, _, model_key = key.partition("/")
        if model_key in model_names:
            followed[key] = f"{slot}/{model_names[model_key]}"
    known, saved_models = set(saved), set(model_names.values())
    names = {key: target for key, target in followed.items() if target in known}
    rest = [key for key in keys if key not in followed]
    saved_rest = [key for key in saved if key.partition("/")[2] not in saved_models]
    return names | _match(rest, saved_rest, None)


def _canonical(keys: list[str]) -> list[tuple[Any, ...]]:
    """Renumber the automatic ``_N`` suffixes of all path components in order of appearance.

    Numbering restarts below every parent, so ``net_4/dense_7`` and ``net/dense_2`` become equal if
    each is the first of its kind. Keys that differ stay different.
    """
    numbers: dict[tuple[Any, ...], dict[str, int]] = defaultdict(dict)
    result = []
    for key in keys:
        parent: tuple[Any, ...] = ()
        for component in key.split("/"):
            match = _AUTO_SUFFIX.fullmatch(component)
            base = match[1] if match else component.partition("#")[0]
            known = numbers[*parent, base]
            parent = (*parent, (base, known.setdefault(component, len(known))))
        result.append(parent)
    return result


def _cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray | None:
    """Return the array in another dtype, or None if values would be lost.

    Between floating-point types rounding is allowed, but a finite value must not become infinite or
    NaN; all other casts must preserve every value.
    """
    if array.dtype == dtype:
        return array
    if array.dtype.kind == "c" and dtype.kind != "c":
        return None
    with np.errstate(all="ignore"):
        result = array.astype(dtype)
        if _is_float(array.dtype) and _is_float(dtype):
            wide, cast = array.astype("float64"), result.astype("float64")
            return result if np.array_equal(np.isfinite(wide), np.isfinite(cast)) else None
        try:
            same = np.array_equal(result.astype(array.dtype), array)
        except TypeError:
            same = False
    signs_agree = np.array_equal(result < 0, array < 0) if same else False
    return result if same and signs_agree else None


def _is_float(dtype: np.dtype[Any]) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype.name.startswith(("bfloat16", "float"))


def _mismatch_message(
    what: str,
    wanted: int,
    found: int,
    missing: list[str],
    unexpected: list[str],
    different: list[str],
) -> str:
    lines = [
        f"The checkpoint does not fit this {what}: {wanted} variables expected, {found} saved. "
        "Nothing was changed."
    ]
    for title, items in (
        (f"In the {what} but not in the checkpoint", missing),
        (f"In the checkpoint but not in the {what}", unexpected),
        ("Different", different),
    ):
        if items:
            lines.append(f"{title} ({len(items)}):")
            lines += [f"  {item}" for item in items[:_SHOWN]]
            if len(items) > _SHOWN:
                lines.append(f"  ... and {len(items) - _SHOWN} more")
    if any("it was frozen" in item for item in different):
        lines.append("Load the pretrained weights that the run had before you resume it.")
    lines.append(
        f"Build the {what} with the code and settings of the run that saved it, or train from the "
        "beginning without resuming."
    )
    return "\n".join(lines)
