"""The text of Triton kernels: numbers in place of their names, pointers as arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

POINTERS = 448
"""Most pointers that a kernel gets as arguments: with the others they are less than 4 KiB."""


def function(name: str, arguments: str, body: Iterable[str]) -> str:
    """The text of a function."""
    return f"def {name}({arguments}):\n" + "\n".join(f"    {line}" for line in body)


def literal(number: float) -> str:
    """A number as it is written in Triton's language."""
    return repr(number) if math.isfinite(number) else f"float('{number}')"


def specialized(text: str, numbers: Sequence[float], columns: Sequence[int], rows: int) -> str:
    """The source with its numbers, or with reading those that differ between tensors.

    Args:
        text: `RuleSource.text`.
        numbers: Its numbers.
        columns: Which of them differ; they are in the rows of the table after ``rows``.
        rows: `RuleSource.rows`.
    """

    def replaced(part: str) -> str:
        at = "lanes, mask=here, other=0" if part.startswith("def prepare") else "t"
        used = sorted({int(i) for i in re.findall(r"\bc(\d+)\b", part)} & set(columns))
        reads = [
            f"    c{i} = tl.load(table + {rows + columns.index(i)} * n + {at})"
            ".to(tl.int32).to(tl.float32, bitcast=True)"
            for i in used
        ]
        head, _, body = part.partition("\n")
        start, body = _after_indices(body)
        body = re.sub(
            r"\bc(\d+)\b",
            lambda m: m[0] if int(m[1]) in columns else literal(numbers[int(m[1])]),
            body,
        )
        return "\n".join([head, *start, *reads, body])

    return "\n\n\n".join(map(replaced, text.split("\n\n"))) + "\n"


def _after_indices(body: str) -> tuple[list[str], str]:
    """The lines that say which tensor it is, and the rest."""
    lines = body.split("\n")
    for i, line in enumerate(lines):
        if line.strip() in ("kept = here", "t = tl.program_id(0)"):
            return lines[: i + 1], "\n".join(lines[i + 1 :])
    return [], body


def with_pointers(source: str, count: int) -> str:
    """The source with as many arguments of ``prepare`` for pointers to gradients."""
    arguments = ", ".join(f'p{i}: "i64"' for i in range(count))
    stores = "\n    ".join(f"tl.store(gradients + {i}, p{i})" for i in range(count))
    return source.replace("POINTER_ARGUMENTS", arguments).replace("STORE_POINTERS", stores)


def fill_source(count: int) -> str:
    """A kernel ``fill`` that writes its arguments into a table."""
    arguments = ", ".join(f'p{i}: "i64"' for i in range(count))
    body = [f"tl.store(table + {i}, p{i})" for i in range(count)]
    return function("fill", f"table, {arguments}", body) + "\n"
