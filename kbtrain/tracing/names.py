"""Finds the globals and closure variables that a function reads, from its code object."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbtrain.errors import is_user_file
from kbtrain.tracing.frozen_values import PLAIN, is_changeable


@dataclass(frozen=True)
class ValueSource:
    """A name in a namespace, through which code reads a value.

    Attributes:
        namespace: The mapping that holds the name.
        name: The name.
        label: Its description in messages, such as ``Model.beta``.
        where: The place that reads it, such as `` in loss.py:12``; may be empty.
        owner: The object it belongs to, kept alive.
    """

    namespace: Mapping[str, Any]
    name: str
    label: str
    where: str
    owner: Any

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the place."""
        return id(self.owner), self.name


class _Cells(Mapping[str, Any]):
    """The variables of a closure."""

    def __init__(self, function: types.FunctionType) -> None:
        names, cells = function.__code__.co_freevars, function.__closure__ or ()
        self._cells = dict(zip(names, cells, strict=True))

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except ValueError:  # not assigned yet
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


def names_read_by(functions: Iterable[Any]) -> Iterator[ValueSource]:
    """The places that functions, and the functions they call, read values from.

    Args:
        functions: Functions, bound methods, partials, callable objects. Only user code is
            inspected.
    """
    waiting, seen = list(functions), set()
    while waiting:
        for function, owner in _plain_functions(waiting.pop()):
            ours = (function.__module__ or "").partition(".")[0] in ("kbtrain", "optim")
            if id(function) in seen or ours or not is_user_file(function.__code__.co_filename):
                continue
            seen.add(id(function))
            names = _names(function.__code__)
            cells = _Cells(function)
            for namespace, shared in ((function.__globals__, names), (cells, set(cells))):
                for name in sorted(shared & _keys(namespace)):
                    value = namespace.get(name)
                    if _is_watched(value):
                        yield _place(namespace, name, function, cells)
                    elif isinstance(value, types.ModuleType):
                        if is_user_file(getattr(value, "__file__", None) or ""):
                            for inner in sorted(names & set(vars(value))):
                                if _is_watched(vars(value)[inner]):
                                    yield _place(vars(value), inner, function, cells)
                    else:
                        waiting.append(value)
            # Methods of the same object that the function calls.
            for name in names if owner is not None else ():
                method = getattr(type(owner), name, None)
                if isinstance(method, types.FunctionType):
                    waiting.append(types.MethodType(method, owner))


def _keys(namespace: Mapping[str, Any]) -> set[str]:
    return set(namespace)


def _place(
    namespace: Mapping[str, Any], name: str, function: types.FunctionType, cells: _Cells
) -> ValueSource:
    code = function.__code__
    where = f" in {function.__qualname__} ({Path(code.co_filename).name}:{code.co_firstlineno})"
    # A closure's variables belong to the function, globals to their module.
    owner = function if namespace is cells else namespace
    return ValueSource(namespace, name, name, where, owner)


def _is_watched(value: Any) -> bool:
    return isinstance(value, PLAIN) or is_changeable(value)


def _names(code: types.CodeType) -> set[str]:
    """Names used by a function's code, including its inner functions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _plain_functions(value: Any) -> Iterator[tuple[types.FunctionType, Any]]:
    """The Python functions that a call of ``value`` runs, each with its ``self``."""
    if isinstance(value, functools.partial):
        yield from _plain_functions(value.func)
        for item in (*value.args, *value.keywords.values()):
            yield from _plain_functions(item)
    elif isinstance(value, types.MethodType):
        if isinstance(value.__func__, types.FunctionType):
            yield value.__func__, value.__self__
    elif isinstance(value, types.FunctionType):
        yield _unwrapped(value), None
    elif not isinstance(value, type) and callable(value):
        method = type(value).__call__
        if isinstance(method, types.FunctionType):
            yield method, value


def _unwrapped(function: types.FunctionType) -> types.FunctionType:
    inner = getattr(function, "__wrapped__", None)
    return inner if isinstance(inner, types.FunctionType) else function
