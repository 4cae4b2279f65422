"""Types of fields: the stored type to a type checker, the type to parse to a parser.

``kbtrain.ArgumentParser`` uses ``command_line`` in a field's metadata. Other parsers use the
annotations, above all ``HfArgumentParser`` of Transformers: it passes them to ``argparse``, which
calls them, and which supports neither ``Mapping`` nor unions other than ``Optional``. The parsed
value is checked and converted by the field's converter in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kbtrain.config.converters import read_scalar

if TYPE_CHECKING:
    Options = Mapping[str, Any]
    ListOfOptions = Sequence[Mapping[str, Any]]
    Names = Sequence[str]
    FlagOrAuto = bool | Literal["auto"]
    FlagOrNone = bool | None
    CountOrAuto = int | Literal["auto"]
    PathOrTrue = str | Literal[True]
else:
    Options = ListOfOptions = PathOrTrue = str
    Names = list[str]
    FlagOrNone = bool  # so that the option needs no value
    FlagOrAuto = CountOrAuto = read_scalar


class Metadata(dict[str, Any]):
    """A field's metadata, whose ``keys()`` are only those that ``argparse`` accepts.

    Parsers unpack the metadata of a field into ``add_argument``.
    """

    def keys(self) -> Any:
        """Only ``"help"``; the other entries are available by name."""
        return {"help": None}.keys()
