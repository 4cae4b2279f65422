"""What one field of ``TrainingArguments`` accepts: its type, range and the form it is stored in.

A *kind* is a function from what the user gave to what is stored; it raises `Unfit` with a text that
says what it expected. Stored values are immutable and in one normal form, so that equal settings
compare equal.
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

Kind = Callable[[Any], Any]

MAX_SEED = 2**32 - 1  # what NumPy's and Keras' seeding functions take


class Unfit(Exception):
    """A value that a kind refuses; the text says what was expected."""


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed: equal to a plain dict, but hashable and safe to share."""

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
        # The default way to copy a dict subclass goes through __setitem__.
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:
    """An immutable copy of a value made of what JSON can hold (NumPy scalars become Python's)."""
    value = plain(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise Unfit("a mapping whose keys are all strings")
        return FrozenDict({str(key): freeze(item) for key, item in value.items()})
    hint = (
        f" (in place of the class, the text {value.__name__!r})" if isinstance(value, type) else ""
    )
    raise Unfit(
        f"made of None, bool, int, finite float, str, list and dict{hint}, which JSON can hold"
    )


def thaw(value: Any) -> Any:
    """A mutable copy of a frozen value: lists for tuples, plain dicts for frozen ones."""
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return value


def plain(value: Any) -> Any:
    """Python's own value for a NumPy scalar, an enum member or an instance of a str subclass."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, str) else value


# --- kinds: one value at a time ------------------------------------------------------------------


def optional(kind: Kind) -> Kind:
    """``None``, or what `kind` accepts."""

    def accept(value: Any) -> Any:
        if value is None:
            return None
        try:
            return kind(value)
        except Unfit as refusal:
            raise Unfit(f"{refusal}, or None") from None

    return accept


def flag(value: Any) -> bool:
    """``True`` or ``False``; 0, 1 and strings are refused."""
    value = plain(value)
    if not isinstance(value, bool):
        raise Unfit("True or False")
    return value


def whole(low: int, high: int | None = None, *, or_exactly: int | None = None) -> Kind:
    """An int from `low` to `high`, or the one special value `or_exactly`."""
    wanted = f"a whole number of at least {low}"
    wanted += "" if high is None else f" and at most {high}"
    wanted += "" if or_exactly is None else f", or {or_exactly}"

    def accept(value: Any) -> int:
        value = plain(value)
        # bool is an int to Python, but True is never meant as a number here.
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise Unfit(wanted)
        number = int(value)
        too_high = high is not None and number > high
        if number != or_exactly and (number < low or too_high):
            raise Unfit(wanted)
        return number

    return accept


def real(
    low: float | None = None, *, above: float | None = None, below: float | None = None
) -> Kind:
    """A finite number with ``low <= x``, ``above < x`` and ``x < below``; ints become floats."""
    wanted = "a finite number"
    bounds = (("of at least", low), ("above", above), ("below", below))
    limits = [f"{word} {limit:g}" for word, limit in bounds if limit is not None]
    wanted = " ".join([wanted, " and ".join(limits)]) if limits else wanted

    def accept(value: Any) -> float:
        number = _number(value, wanted)
        inside = (
            (low is None or number >= low)
            and (above is None or number > above)
            and (below is None or number < below)
        )
        if not inside:
            raise Unfit(wanted)
        return number

    return accept


def _number(value: Any, wanted: str) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Unfit(wanted)
    try:
        number = float(value)
    except OverflowError:
        raise Unfit(wanted) from None
    if not math.isfinite(number):
        raise Unfit(wanted)
    return number


def duration(value: Any) -> float:
    """A time in seconds, as a number or as "HH:MM:SS" (or "D-HH:MM:SS", as SLURM writes it)."""
    wanted = "a time above 0, in seconds or as 'HH:MM:SS'"
    value = plain(value)
    if isinstance(value, str):
        match = re.fullmatch(
            r"(?:(\d{1,5})-)?(\d{1,5}):([0-5]\d):([0-5]\d)", value.strip(), re.ASCII
        )
        if not match:
            raise Unfit(wanted)
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        value = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    number = _number(value, wanted)
    if number <= 0:
        raise Unfit(wanted)
    return number


def steps(value: Any) -> int | float:
    """A count of steps (int), or a ratio of all steps (float strictly between 0 and 1)."""
    wanted = "a whole number of steps, or a ratio of all steps above 0 and below 1"
    number = _number(value, wanted)
    if 0 < number < 1:
        return number
    if number < 0 or number != int(number):
        raise Unfit(wanted)
    return int(plain(value))


def text(value: Any) -> str:
    """A string with something in it."""
    value = plain(value)
    if not isinstance(value, str) or not value.strip():
        raise Unfit("a string that is not empty")
    return value


def alias(kind: Kind, names: Mapping[str, str]) -> Kind:
    """What `kind` accepts, with other spellings replaced by the one that is stored."""

    def accept(value: Any) -> Any:
        accepted = kind(value)
        return names.get(accepted, accepted)

    return accept


def path(value: Any) -> str:
    """A path as a string, a leading ``~`` expanded; nothing is looked up on the disk."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        return os.path.expanduser(text(value))
    except Unfit:
        raise Unfit("a path (str or os.PathLike) that is not empty") from None


def choice(*allowed: str | bool) -> Kind:
    """One of `allowed`."""
    listed = ", ".join(repr(item) for item in allowed)

    def accept(value: Any) -> str | bool:
        value = plain(value)
        # `type` because 1 == True, and only the bool itself is meant.
        for item in allowed:
            if type(value) is type(item) and value == item:
                return value
        wanted = f"one of {listed}"
        if value is False and "no" in allowed:
            wanted += " (YAML reads an unquoted no as false: write 'no' with quotes)"
        raise Unfit(wanted)

    return accept


def either(word: str, kind: Kind) -> Kind:
    """One word, or what another kind accepts."""

    def accept(value: Any) -> Any:
        if value == word and isinstance(value, str):
            return word
        try:
            return kind(value)
        except Unfit as refusal:
            raise Unfit(f"{word!r} or {refusal}") from None

    return accept


def words(value: Any) -> tuple[str, ...]:
    """A list of strings (one string counts as a list of one), without doubles, in their order."""
    value = plain(value)
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise Unfit("a list of strings that is not empty")
    try:
        return tuple(dict.fromkeys(text(item) for item in items))
    except Unfit:
        raise Unfit("a list of strings that are not empty") from None


def keys(value: Any) -> tuple[str, ...]:
    """A list of strings that may be empty, otherwise like ``words``."""
    empty = isinstance(value, (list, tuple)) and not value
    return () if empty else words(value)


def patterns(value: Any) -> tuple[str, ...]:
    """A list of regular expressions (one string counts as a list of one)."""
    items = words(value)
    for item in items:
        try:
            re.compile(item)
        except re.error as error:
            raise Unfit(f"regular expressions ({item!r} is none: {error})") from None
    return items


def names(*allowed: str) -> Kind:
    """A list of names out of `allowed` (one string counts as a list of one), without doubles."""

    def accept(value: Any) -> tuple[str, ...]:
        value = plain(() if value is None else value)
        items = (value,) if isinstance(value, str) else value
        wanted = f"a list of names out of {', '.join(repr(item) for item in allowed)}"
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise Unfit(wanted)
        items = [plain(item) for item in items]
        for item in items:
            if not isinstance(item, str) or item not in allowed:
                raise Unfit(f"{wanted}, not {item!r}")
        # In the order of `allowed`, so that ["a", "b"] and ["b", "a"] are the same setting.
        return tuple(item for item in allowed if item in items)

    return accept


def trackers(value: Any) -> tuple[str, ...]:
    """Names of trackers; ``"none"`` (or None) stands for no tracker, ``"all"`` for every one.

    Which names exist is known where they are used: packages of their own can add some.
    """
    value = plain(() if value is None else value)
    items = (value,) if isinstance(value, str) else value
    wanted = "the name of a tracker, a list of names, 'all' or 'none'"
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise Unfit(wanted)
    names = [plain(item) for item in items]
    if not all(isinstance(item, str) and item.strip() for item in names):
        raise Unfit(wanted)
    found = set(names)
    if "none" in found and len(found) > 1:
        raise Unfit("'none' alone, or a list of trackers without 'none'")
    return ("all",) if "all" in found else tuple(sorted(found - {"none"}))


def tokens_seen(value: Any) -> Any:
    """What is counted as a token; True and False are the reference's older form."""
    value = {True: "all", False: "no"}[value] if isinstance(value, bool) else value
    return choice("no", "all", "non_padding")(value)


def average(value: Any) -> FrozenDict | None:
    """Options of an average of the weights: True, its decay, a dict of options, or None."""
    if value is None or value is False:
        return None
    if value is True:
        return FrozenDict()
    if isinstance(value, numbers.Real):
        try:
            return FrozenDict({"decay": real(0.0, below=1.0)(value)})
        except Unfit as refusal:
            raise Unfit(f"{refusal} (the decay), True, a dict of options, or None") from None
    return options(value)


def one_device(value: Any) -> str | None:
    """The name of one device: "cpu", "gpu" or "gpu:1"; a number is that of a GPU."""
    value = plain(value)
    if isinstance(value, list | tuple) and value:
        if len(value) > 1:
            raise Unfit("one device: training on several is to come")
        value = plain(value[0])
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"gpu:{value}"
    if isinstance(value, str) and re.fullmatch(r"(cpu|gpu|cuda|tpu)(:\d+)?", value, re.ASCII):
        return value.replace("cuda", "gpu")
    raise Unfit("'cpu', 'gpu', 'gpu:1', 'tpu:0', the number of a GPU, or None")


def nothing(value: Any) -> None:
    """None, or what else means that nothing is asked for: False, an empty string or list."""
    if value is not None and value is not False and value not in ("", [], (), {}):
        raise Unfit("None: there is one process on one device; several are to come")


def debug_options(value: Any) -> tuple[str, ...]:
    """Names of checks: a list, or a string with blanks between them."""
    items = value.split() if isinstance(value, str) else value
    if isinstance(items, list | tuple) and "tpu_metrics_debug" in items:
        raise Unfit("without 'tpu_metrics_debug', which prints counters of PyTorch/XLA")
    return tuple(names("underflow_overflow")(() if items is None else items))


def options(value: Any) -> FrozenDict:
    """A mapping of JSON values, a JSON object in a string, or None for no options."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as problem:
            raise Unfit(f"a dict, or a JSON object such as '{{\"a\": 1}}' ({problem})") from None
    if value is not None and not isinstance(value, Mapping):
        raise Unfit("a dict, a JSON object in a string, or None")
    frozen: FrozenDict = freeze({} if value is None else value)
    return frozen


def list_of_options(value: Any) -> tuple[FrozenDict, ...]:
    """A list of mappings of JSON values, a JSON list in a string, or None for an empty one."""
    wanted = "a list of dicts, a JSON list of objects in a string, or None"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as problem:
            raise Unfit(f"{wanted} ({problem})") from None
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise Unfit(wanted)
    return tuple(options(item) for item in value)


def key_values(value: Any) -> FrozenDict:
    """Like `options`, but a string may also read ``"key=value,key=value"``."""
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return options(value)
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        key, equals, written = (piece.strip() for piece in part.partition("="))
        if not (key and equals and written):
            raise Unfit(f"a dict, or a string 'key=value,key=value' (cannot read {part!r})")
        if key in found:
            raise Unfit(f"a string in which each key stands once ({key!r} stands twice)")
        found[key] = read_scalar(written)
    return options(found)


def read_scalar(written: str) -> bool | int | float | str:
    """A bool or number if it reads as one, else the text itself."""
    if written.lower() in ("true", "false"):
        return written.lower() == "true"
    for number in (int, float):
        try:
            return number(written)
        except ValueError:
            continue
    return written


def shown(value: Any) -> str:
    """The value's repr, cut where it would drown a message."""
    written = repr(value)
    return written if len(written) <= 200 else f"{written[:200]}..."
