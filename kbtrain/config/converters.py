"""Converters of the fields of ``TrainingArguments``: check a value and store it in a normal form.

A *converter* is a function from the user's value to the stored value; it raises ``InvalidValue``
with the value it expected. Stored values are immutable and in one normal form, so that equal
settings compare equal.
"""

from __future__ import annotations

import enum
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

Converter = Callable[[Any], Any]

MAX_SEED = 2**32 - 1  # the largest seed that NumPy and Keras accept


class InvalidValue(Exception):
    """A value that a converter rejects; the message says what was expected."""


class FrozenDict(dict[str, Any]):
    """An immutable dict: equal to a plain dict, but hashable and safe to share."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "The options of TrainingArguments cannot be changed in place. "
            "Use `args.replace(...)` with a new dict."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        # By default, copying a dict subclass calls __setitem__.
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:
    """An immutable copy of a JSON value (NumPy scalars become Python scalars)."""
    value = plain(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidValue("a mapping whose keys are all strings")
        return FrozenDict({str(key): freeze(item) for key, item in value.items()})
    hint = (
        f" (instead of the class, the string {value.__name__!r})" if isinstance(value, type) else ""
    )
    raise InvalidValue(
        f"made of None, bool, int, finite float, str, list and dict{hint}, as in JSON"
    )


def thaw(value: Any) -> Any:
    """A mutable copy of a frozen value: lists for tuples, plain dicts for frozen dicts."""
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return value


def plain(value: Any) -> Any:
    """The built-in value of a NumPy scalar, enum member or instance of a ``str`` subclass."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, str) else value


# --- converters ----------------------------------------------------------------------------------


def optional(converter: Converter) -> Converter:
    """``None``, or what ``converter`` accepts."""

    def accept(value: Any) -> Any:
        if value is None:
            return None
        try:
            return converter(value)
        except InvalidValue as refusal:
            raise InvalidValue(f"{refusal}, or None") from None

    return accept


def flag(value: Any) -> bool:
    """``True`` or ``False``; 0, 1 and strings are rejected."""
    value = plain(value)
    if not isinstance(value, bool):
        raise InvalidValue("True or False")
    return value


def whole(low: int, high: int | None = None, *, or_exactly: int | None = None) -> Converter:
    """An int from ``low`` to ``high``, or the special value ``or_exactly``."""
    expected = f"a whole number of at least {low}"
    expected += "" if high is None else f" and at most {high}"
    expected += "" if or_exactly is None else f", or {or_exactly}"

    def accept(value: Any) -> int:
        value = plain(value)
        # bool is a subclass of int, but True never means 1 here.
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InvalidValue(expected)
        number = int(value)
        too_high = high is not None and number > high
        if number != or_exactly and (number < low or too_high):
            raise InvalidValue(expected)
        return number

    return accept


def real(
    low: float | None = None, *, above: float | None = None, below: float | None = None
) -> Converter:
    """A finite number with ``low <= x``, ``above < x`` and ``x < below``; ints become floats."""
    expected = "a finite number"
    bounds = (("of at least", low), ("above", above), ("below", below))
    limits = [f"{word} {limit:g}" for word, limit in bounds if limit is not None]
    expected = " ".join([expected, " and ".join(limits)]) if limits else expected

    def accept(value: Any) -> float:
        number = _number(value, expected)
        inside = (
            (low is None or number >= low)
            and (above is None or number > above)
            and (below is None or number < below)
        )
        if not inside:
            raise InvalidValue(expected)
        return number

    return accept


def _number(value: Any, expected: str) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidValue(expected)
    try:
        number = float(value)
    except OverflowError:
        raise InvalidValue(expected) from None
    if not math.isfinite(number):
        raise InvalidValue(expected)
    return number


def duration(value: Any) -> float:
    """A time in seconds, as a number or as "HH:MM:SS" (or "D-HH:MM:SS", as SLURM writes it)."""
    expected = "a time above 0, in seconds or as 'HH:MM:SS'"
    value = plain(value)
    if isinstance(value, str):
        match = re.fullmatch(
            r"(?:(\d{1,5})-)?(\d{1,5}):([0-5]\d):([0-5]\d)", value.strip(), re.ASCII
        )
        if not match:
            raise InvalidValue(expected)
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        value = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    number = _number(value, expected)
    if number <= 0:
        raise InvalidValue(expected)
    return number


def steps(value: Any) -> int | float:
    """A count of steps (int), or a ratio of all steps (float strictly between 0 and 1)."""
    expected = "a whole number of steps, or a ratio of all steps above 0 and below 1"
    number = _number(value, expected)
    if 0 < number < 1:
        return number
    if number < 0 or number != int(number):
        raise InvalidValue(expected)
    return int(plain(value))


def text(value: Any) -> str:
    """A string that is not blank."""
    value = plain(value)
    if not isinstance(value, str) or not value.strip():
        raise InvalidValue("a string that is not empty")
    return value


def alias(converter: Converter, names: Mapping[str, str]) -> Converter:
    """What ``converter`` accepts, with aliases replaced by the stored name."""

    def accept(value: Any) -> Any:
        accepted = converter(value)
        return names.get(accepted, accepted)

    return accept


def path(value: Any) -> str:
    """A path as a string with a leading ``~`` expanded; the file system is not accessed."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        return os.path.expanduser(text(value))
    except InvalidValue:
        raise InvalidValue("a path (str or os.PathLike) that is not empty") from None


def choice(*allowed: str | bool) -> Converter:
    """One of ``allowed``."""
    listed = ", ".join(repr(item) for item in allowed)

    def accept(value: Any) -> str | bool:
        value = plain(value)
        # By type as well, because 1 == True.
        for item in allowed:
            if type(value) is type(item) and value == item:
                return value
        expected = f"one of {listed}"
        if value is False and "no" in allowed:
            expected += " (YAML reads an unquoted no as false: quote it, 'no')"
        raise InvalidValue(expected)

    return accept


def either(word: str, converter: Converter) -> Converter:
    """One word, or what another converter accepts."""

    def accept(value: Any) -> Any:
        if value == word and isinstance(value, str):
            return word
        try:
            return converter(value)
        except InvalidValue as refusal:
            raise InvalidValue(f"{word!r} or {refusal}") from None

    return accept


def words(value: Any) -> tuple[str, ...]:
    """A list of strings (a string is a list of one), without duplicates, in order."""
    value = plain(value)
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise InvalidValue("a list of strings that is not empty")
    try:
        return tuple(dict.fromkeys(text(item) for item in items))
    except InvalidValue:
        raise InvalidValue("a list of strings that are not empty") from None


def keys(value: Any) -> tuple[str, ...]:
    """Like ``words``, but the list may be empty."""
    empty = isinstance(value, (list, tuple)) and not value
    return () if empty else words(value)


def patterns(value: Any) -> tuple[str, ...]:
    """A list of regular expressions (a string is a list of one)."""
    items = words(value)
    for item in items:
        try:
            re.compile(item)
        except re.error as error:
            raise InvalidValue(f"regular expressions ({item!r} is invalid: {error})") from None
    return items


def names(*allowed: str) -> Converter:
    """A list of names from ``allowed`` (a string is a list of one), without duplicates."""

    def accept(value: Any) -> tuple[str, ...]:
        value = plain(() if value is None else value)
        items = (value,) if isinstance(value, str) else value
        expected = f"a list of names from {', '.join(repr(item) for item in allowed)}"
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise InvalidValue(expected)
        items = [plain(item) for item in items]
        for item in items:
            if not isinstance(item, str) or item not in allowed:
                raise InvalidValue(f"{expected}, not {item!r}")
        # In the order of ``allowed``, so that ["a", "b"] and ["b", "a"] compare equal.
        return tuple(item for item in allowed if item in items)

    return accept


def trackers(value: Any) -> tuple[str, ...]:
    """Names of trackers; ``"none"`` (or None) means no tracker, ``"all"`` every installed one.

    Whether a name exists is checked where it is used, because other packages can add trackers.
    """
    value = plain(() if value is None else value)
    items = (value,) if isinstance(value, str) else value
    expected = "the name of a tracker, a list of names, 'all' or 'none'"
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise InvalidValue(expected)
    names = [plain(item) for item in items]
    if not all(isinstance(item, str) and item.strip() for item in names):
        raise InvalidValue(expected)
    found = set(names)
    if "none" in found and len(found) > 1:
        raise InvalidValue("'none' alone, or a list of trackers without 'none'")
    return ("all",) if "all" in found else tuple(sorted(found - {"none"}))


def tokens_seen(value: Any) -> Any:
    """What counts as a token; True and False are an older form of Transformers."""
    value = {True: "all", False: "no"}[value] if isinstance(value, bool) else value
    return choice("no", "all", "non_padding")(value)


def average(value: Any) -> FrozenDict | None:
    """Options of a weight average: True, the decay, a dict of options, or None."""
    if value is None or value is False:
        return None
    if value is True:
        return FrozenDict()
    if isinstance(value, numbers.Real):
        try:
            return FrozenDict({"decay": real(0.0, below=1.0)(value)})
        except InvalidValue as refusal:
            raise InvalidValue(f"{refusal} (the decay), True, a dict of options, or None") from None
    return options(value)


def device_names(value: Any) -> str | None:
    """Names of devices: "cpu", "gpu" or "gpu:1"; several as a list or separated by commas.

    An int is the index of a GPU.
    """
    value = plain(value)
    items = value.split(",") if isinstance(value, str) else value
    if value is None:
        return None
    if not isinstance(items, list | tuple):
        items = [items]
    names = [_device_name(plain(item)) for item in items]
    if len(names) > 1:  # "gpu" and "gpu:0" are the same device
        names = [name if ":" in name else f"{name}:0" for name in names]
    if len({name.partition(":")[0] for name in names}) != 1 or len(set(names)) < len(names):
        raise InvalidValue("one device, or several different ones of one kind")
    return ",".join(names)


def _device_name(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"gpu:{value}"
    name = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"(cpu|gpu|cuda|tpu)(:\d+)?", name, re.ASCII):
        return name.replace("cuda", "gpu")
    raise InvalidValue(
        "'cpu', 'gpu', 'gpu:1', 'tpu:0', the index of a GPU, several of these, or None"
    )


def debug_options(value: Any) -> tuple[str, ...]:
    """Names of checks: a list, or a string with spaces between them."""
    items = value.split() if isinstance(value, str) else value
    if isinstance(items, list | tuple) and "tpu_metrics_debug" in items:
        raise InvalidValue("without 'tpu_metrics_debug', which prints counters of PyTorch/XLA")
    return tuple(names("underflow_overflow", "collectives")(() if items is None else items))


def options(value: Any) -> FrozenDict:
    """A mapping of JSON values, a JSON object as a string, or None for no options."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as problem:
            raise InvalidValue(
                f"a dict, or a JSON object such as '{{\"a\": 1}}' ({problem})"
            ) from None
    if value is not None and not isinstance(value, Mapping):
        raise InvalidValue("a dict, a JSON object as a string, or None")
    frozen: FrozenDict = freeze({} if value is None else value)
    return frozen


def list_of_options(value: Any) -> tuple[FrozenDict, ...]:
    """A list of mappings of JSON values, a JSON list as a string, or None for an empty list."""
    expected = "a list of dicts, a JSON list of objects as a string, or None"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as problem:
            raise InvalidValue(f"{expected} ({problem})") from None
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise InvalidValue(expected)
    return tuple(options(item) for item in value)


def key_values(value: Any) -> FrozenDict:
    """Like ``options``, but a string may also be ``"key=value,key=value"``."""
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return options(value)
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        key, equals, written = (piece.strip() for piece in part.partition("="))
        if not (key and equals and written):
            raise InvalidValue(f"a dict, or a string 'key=value,key=value' (cannot parse {part!r})")
        if key in found:
            raise InvalidValue(f"a string in which each key occurs once ({key!r} is repeated)")
        found[key] = read_scalar(written)
    return options(found)


def read_scalar(written: str) -> bool | int | float | str:
    """A bool or number if the string is one, otherwise the string itself."""
    if written.lower() in ("true", "false"):
        return written.lower() == "true"
    for number in (int, float):
        try:
            return number(written)
        except ValueError:
            continue
    return written


def shown(value: Any) -> str:
    """The value's repr, truncated to keep messages short."""
    written = "..." if value is ... else repr(value)
    return written if len(written) <= 200 else f"{written[:200]}..."
