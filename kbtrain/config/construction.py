"""Construction of ``TrainingArguments``: names are checked, then the object is immutable."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from kbtrain.config.converters import shown
from kbtrain.config.inactive_settings import NEUTRAL, is_inactive
from kbtrain.config.migration import MEMBERS, explain_unknown, reason
from kbtrain.errors import ConfigurationError, FrozenArgumentsError


class ImmutableMeta(abc.ABCMeta):
    """Metaclass that checks the names in a constructor call and seals the new object.

    Only a metaclass sees the call before the ``__init__`` that ``dataclass`` generates, and the
    object after a subclass's ``__post_init__``. It derives from ``ABCMeta`` so that a subclass may
    also have an abstract base class.
    """

    if not TYPE_CHECKING:  # a type checker goes by the generated __init__

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            """Construct an object, normalize its values and seal it."""
            given = _given(cls, args, kwargs)
            self = super().__call__(*args, **{n: v for n, v in kwargs.items() if n in given})
            if type(self).__post_init__ is not Immutable.__post_init__:  # it may have set fields
                self.settle()
            # If every field is passed (a copy, a parser), nothing says which ones a user chose.
            everything = given.keys() >= {f.name for f in dataclasses.fields(cls) if f.init}
            self._seal(frozenset(() if everything else given))
            return self

        @property
        def __signature__(cls) -> inspect.Signature:
            """The signature of ``__init__``, which ``__call__`` of a metaclass would hide."""
            own = inspect.signature(cls.__init__)
            return own.replace(parameters=list(own.parameters.values())[1:])

        def __setattr__(cls, name: str, value: Any) -> None:
            """Allow subclasses declared with ``frozen=True`` as well as without.

            ``dataclass`` refuses to mix frozen and other classes. Here both mean the same, since
            no object can be changed, so the bases adopt the setting of the class being created.
            """
            if name == "__dataclass_params__" and hasattr(value, "frozen"):
                for base in cls.__mro__[1:]:
                    params = vars(base).get(name)
                    if isinstance(base, ImmutableMeta) and hasattr(params, "frozen"):
                        params.frozen = value.frozen
            super().__setattr__(name, value)


class Immutable(metaclass=ImmutableMeta):
    """Base of dataclasses whose instances are immutable once constructed.

    A subclass may set fields in its own ``__post_init__``; they are checked afterwards.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep instances hashable: ``dataclass`` alone allows that for frozen classes only."""
        super().__init_subclass__(**kwargs)
        if "__hash__" not in vars(cls):
            cls.__hash__ = cls.__hash__  # type: ignore[method-assign]

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.compare))

    def settle(self) -> None:
        """Check the values and store them in their normal form."""

    def is_set(self, name: str) -> bool:
        """Whether a field was passed to the constructor, or differs from its default.

        A copy by ``replace`` remembers what was passed to the original. A copy by
        ``dataclasses.replace``, or from all fields (``to_dict``), goes by the values alone.

        Args:
            name: The name of a field.

        Raises:
            ConfigurationError: There is no such field.

        Example:
            >>> from kbtrain import TrainingArguments
            >>> args = TrainingArguments(max_grad_norm=1.0)  # the default
            >>> args.is_set("max_grad_norm"), args.is_set("weight_decay")
            (True, False)
        """
        fields = self.__dataclass_fields__
        if name not in fields:
            raise ConfigurationError(explain_unknown(name, None, list(fields)))
        # The class that knows the normal form of the defaults: not a user's subclass, which may
        # have required fields, and not a base with only some of the fields.
        bases = type(self).__mro__
        root = [b for b in bases if "settle" in vars(b) and b is not Immutable][-1]
        default = getattr(_by_default(root), name, fields[name].default)
        return name in self.__dict__.get("_given", ()) or getattr(self, name) != default

    def _seal(self, given: frozenset[str]) -> None:
        """Reject changes from here on.

        Args:
            given: Names of the fields that the caller passed.
        """
        object.__setattr__(self, "_given", given)

    def __post_init__(self) -> None:
        """Normalize all fields; a subclass calls this before it reads them.

        Raises:
            ConfigurationError: A value is invalid, or two contradict each other.
        """
        self.settle()

    def __setstate__(self, state: Any) -> None:
        """Restore a copy; with slots the state has two parts."""
        for part in state if isinstance(state, tuple) else (state,):
            for name, value in (part or {}).items():
                object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # a type checker would accept any attribute

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute during construction; refuse to later."""
            if "_given" in self.__dict__:
                self._refuse_change(name, f"{name}={shown(value)}")
            object.__setattr__(self, name, value)

        def __delattr__(self, name: str) -> None:
            """Refuse to delete an attribute."""
            self._refuse_change(name, f"del {name}")

        def __getattr__(self, name: str) -> Any:
            """The inactive value of a Transformers setting that kbtrain does not have.

            Scripts read ``args.deepspeed`` and the like.
            """
            if name in NEUTRAL:
                return NEUTRAL[name]
            why = MEMBERS.get(name) or reason(name, ...)
            said = f". {why}" if why else ""
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}{said}")

    def _refuse_change(self, name: str, received: str) -> NoReturn:
        name_of_class = type(self).__name__
        known = name in self.__dataclass_fields__
        remedy = f"Make a changed copy: args = args.replace({name}=...)." if known else ""
        raise FrozenArgumentsError(
            f"{name_of_class} cannot be changed after construction, so that a run is what its "
            f"arguments say. Received: {received}. {remedy}".rstrip()
        )


@functools.cache
def _by_default(cls: type) -> Any:
    """An instance with all defaults."""
    return cls()


def _given(cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without inactive settings of Transformers.

    Raises:
        ConfigurationError: A name does not exist, or there are too many positional arguments.
    """
    taken = inspect.signature(cls).parameters.values()
    parameter_kinds = {parameter.kind for parameter in taken}
    positional = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]
    written = ", ".join(shown(arg) for arg in args)
    if len(args) > len(positional) and inspect.Parameter.VAR_POSITIONAL not in parameter_kinds:
        raise ConfigurationError(
            f"{cls.__name__} takes {' and '.join(positional)} by position and all other arguments "
            f"by name. Received: {len(args)} positional arguments: {written}."
        )
    by_position = dict(zip(positional, args, strict=False))
    if twice := sorted(by_position.keys() & kwargs.keys()):
        named = ", ".join(f"{name}={shown(kwargs[name])}" for name in twice)
        raise ConfigurationError(
            f"{', '.join(twice)} is given both by position and by name. "
            f"Received: {written}; {named}."
        )
    known = [p.name for p in taken if p.kind is not p.VAR_KEYWORD]
    unknown = {name: value for name, value in kwargs.items() if name not in known}
    refused = {n: v for n, v in unknown.items() if not is_inactive(n, v)}
    if refused and inspect.Parameter.VAR_KEYWORD not in parameter_kinds:
        raise ConfigurationError(
            "\n".join(_explained(cls, n, v, known) for n, v in refused.items())
        )
    return by_position | {n: v for n, v in kwargs.items() if n in known or n in refused}


def _explained(cls: type, name: str, value: Any, known: list[str]) -> str:
    """The explanation of one unknown name."""
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", {}) and "__dataclass_fields__" not in vars(
            base
        ):
            return (
                f"`{name}` is annotated in {base.__name__}, which is not decorated as a dataclass, "
                f"so it is not an argument. Received: {name}={shown(value)}. Write "
                f"@dataclasses.dataclass above class {base.__name__}."
            )
    return explain_unknown(name, value, known)
