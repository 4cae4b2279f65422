"""How ``TrainingArguments`` are made: names checked, given ones remembered, then unchangeable."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from kbtrain.config.converters import shown
from kbtrain.config.inactive_settings import NEUTRAL, asks_for_nothing
from kbtrain.config.migration import MEMBERS, explain_unknown, reason
from kbtrain.errors import ConfigurationError, FrozenArgumentsError


class Making(abc.ABCMeta):
    """Makes the objects of a class: what is wrong with a call is said in kbtrain's words.

    A metaclass, because only that sees a call before the ``__init__`` which ``dataclass`` generates
    and the object after a subclass's ``__post_init__``. It derives from that of abstract classes,
    so that a subclass may have one of those as another base.
    """

    if not TYPE_CHECKING:  # a type checker goes by the generated __init__

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            """Make an object, settle its values and close it to changes."""
            given = _given(cls, args, kwargs)
            self = super().__call__(*args, **{n: v for n, v in kwargs.items() if n in given})
            if type(self).__post_init__ is not Closed.__post_init__:  # it may have set something
                self.settle()
            # Of a copy, or what a parser fills in, nothing says who had chosen which value.
            everything = given.keys() >= {f.name for f in dataclasses.fields(cls) if f.init}
            self._close(frozenset(() if everything else given))
            return self

        @property
        def __signature__(cls) -> inspect.Signature:
            """That of ``__init__``, which a metaclass with ``__call__`` would hide."""
            own = inspect.signature(cls.__init__)
            return own.replace(parameters=list(own.parameters.values())[1:])

        def __setattr__(cls, name: str, value: Any) -> None:
            """Let ``dataclass`` take a subclass, with ``frozen=True`` and without.

            It refuses to mix classes that are frozen with others. Here both mean the same, for no
            object can be changed; so the bases say what the class says that is being made.
            """
            if name == "__dataclass_params__" and hasattr(value, "frozen"):
                for base in cls.__mro__[1:]:
                    params = vars(base).get(name)
                    if isinstance(base, Making) and hasattr(params, "frozen"):
                        params.frozen = value.frozen
            super().__setattr__(name, value)


class Closed(metaclass=Making):
    """Base of a dataclass whose objects cannot be changed once they are made.

    A subclass may set fields in its own ``__post_init__``: they are checked after it.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep objects hashable, which ``dataclass`` allows frozen classes only by itself."""
        super().__init_subclass__(**kwargs)
        if "__hash__" not in vars(cls):
            cls.__hash__ = cls.__hash__  # type: ignore[method-assign]

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.compare))

    def settle(self) -> None:
        """Check the values and bring them into their normal form."""

    def is_set(self, name: str) -> bool:
        """Whether a field was given, or has another value than it has by default.

        A copy by ``replace`` knows what was given to the original. One by ``dataclasses.replace``,
        or made of all fields (``to_dict``), goes by the values alone.

        Args:
            name: A field.

        Raises:
            ConfigurationError: There is no such field.

        Example:
            >>> from kbtrain import TrainingArguments
            >>> args = TrainingArguments(max_grad_norm=1.0)  # which is the default
            >>> args.is_set("max_grad_norm"), args.is_set("weight_decay")
            (True, False)
        """
        fields = self.__dataclass_fields__
        if name not in fields:
            raise ConfigurationError(explain_unknown(name, None, list(fields)))
        root = [base for base in type(self).__mro__ if "__dataclass_fields__" in vars(base)][-1]
        default = getattr(_by_default(root), name, fields[name].default)
        return name in self.__dict__.get("_given", ()) or getattr(self, name) != default

    def _close(self, given: frozenset[str]) -> None:
        """Refuse changes from here on.

        Args:
            given: Names of the fields that the caller chose.
        """
        object.__setattr__(self, "_given", given)

    def __post_init__(self) -> None:
        """Bring all fields into their normal form; a subclass calls this before it looks at them.

        Raises:
            ConfigurationError: A value is refused, or two contradict each other.
        """
        self.settle()

    def __setstate__(self, state: Any) -> None:
        """Make a copy what the original is; with slots there are two parts."""
        for part in state if isinstance(state, tuple) else (state,):
            for name, value in (part or {}).items():
                object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # or assignments to attributes that do not exist would look right

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute of an object that is being made."""
            if "_given" in self.__dict__:
                self._refuse_change(name, f"{name}={shown(value)}")
            object.__setattr__(self, name, value)

        def __delattr__(self, name: str) -> None:
            """Refuse to delete."""
            self._refuse_change(name, f"del {name}")

        def __getattr__(self, name: str) -> Any:
            """Say what a setting of Transformers that does not exist here amounts to.

            Scripts look at ``args.push_to_hub`` and its like.
            """
            if name in NEUTRAL:
                return NEUTRAL[name]
            why = MEMBERS.get(name) or reason(name, ...)
            said = f". {why}" if why else ""
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}{said}")

    def _refuse_change(self, name: str, received: str) -> NoReturn:
        kind = type(self).__name__
        known = name in self.__dataclass_fields__
        remedy = f"Make a changed copy: args = args.replace({name}=...)." if known else ""
        raise FrozenArgumentsError(
            f"{kind} cannot be changed once it is made, so that a run is what its arguments say. "
            f"Received: {received}. {remedy}".rstrip()
        )


@functools.cache
def _by_default(cls: type) -> Any:
    """An object of which nothing was given."""
    return cls()


def _given(cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call gives, by name, without what asks for nothing.

    Raises:
        ConfigurationError: There are names that do not exist, or too many values.
    """
    taken = inspect.signature(cls).parameters.values()
    kinds = {parameter.kind for parameter in taken}
    positional = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]
    written = ", ".join(shown(arg) for arg in args)
    if len(args) > len(positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ConfigurationError(
            f"{cls.__name__} takes {' and '.join(positional)} by position and everything else by "
            f"name. Received: {len(args)} by position: {written}."
        )
    by_position = dict(zip(positional, args, strict=False))
    if twice := sorted(by_position.keys() & kwargs.keys()):
        named = ", ".join(f"{name}={shown(kwargs[name])}" for name in twice)
        raise ConfigurationError(
            f"{', '.join(twice)} is given twice, by position and by name. "
            f"Received: {written}; {named}."
        )
    known = [p.name for p in taken if p.kind is not p.VAR_KEYWORD]
    strangers = {name: value for name, value in kwargs.items() if name not in known}
    refused = {n: v for n, v in strangers.items() if not asks_for_nothing(n, v)}
    if refused and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ConfigurationError(
            "\n".join(_explained(cls, n, v, known) for n, v in refused.items())
        )
    return by_position | {n: v for n, v in kwargs.items() if n in known or n in refused}


def _explained(cls: type, name: str, value: Any, known: list[str]) -> str:
    """What to say about one unknown name."""
    for base in cls.__mro__:
        if name in vars(base).get("__annotations__", {}) and "__dataclass_fields__" not in vars(
            base
        ):
            return (
                f"`{name}` is annotated in {base.__name__}, which is no dataclass of its own, so "
                f"it is no argument. Received: {name}={shown(value)}. Write "
                f"@dataclasses.dataclass above class {base.__name__}."
            )
    return explain_unknown(name, value, known)
