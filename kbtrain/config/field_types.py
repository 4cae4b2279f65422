"""Types of fields: what is stored, to a type checker; what to read a word as, to a parser.

``kbtrain.ArgumentParser`` goes by ``command_line`` in a field's metadata. Others go by the
annotations, transformers' ``HfArgumentParser`` above all: it hands them to ``argparse``, which
calls them, and knows neither ``Mapping`` nor a union of more than a type and ``None``. What is read
is in any case checked and converted by the field's kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kbtrain.config.converters import read_scalar

if TYPE_CHECKING:
    Options = Mapping[str, Any]
    ListOfOptions = Sequence[Mapping[str, Any]]
    Names = Sequence[str]
    FlagOrAuto = bool | Literal["auto"]
    FlagOrNone = bool | None
    CountOrAuto = int | Literal["auto"]
    PathOrTrue = str | Literal[True]
    Nothing: TypeAlias = None
else:
    Options = ListOfOptions = PathOrTrue = Nothing = str
    Names = list[str]
    FlagOrNone = bool  # so that the option may stand alone
    FlagOrAuto = CountOrAuto = read_scalar


class Metadata(dict[str, Any]):
    """What a field knows about itself; its keys are those that ``argparse`` takes.

    Parsers hand a field's metadata to ``add_argument`` as a whole.
    """

    def keys(self) -> Any:
        """The help text alone; the others are there for who asks for them by name."""
        return {"help": None}.keys()
