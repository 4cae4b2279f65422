"""Pieces of HTML: escaped text, tables, numbers as people read them."""

from __future__ import annotations

import html
import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONG = 40
"""Rows beyond which a table scrolls within the page."""


class Html(str):
    """Text that is HTML already; all other text is escaped."""

    __slots__ = ()


def escaped(value: Any) -> Html:
    """A value as HTML text, with quotes escaped too, so that it can stand in an attribute.

    Example:
        >>> escaped('<a href="x">')
        '&lt;a href=&quot;x&quot;&gt;'
    """
    if isinstance(value, Html):
        return value
    # Lone surrogates (from names of files) could not be written as UTF-8.
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(text))


def element(name: str, *content: Any, **attributes: Any) -> Html:
    """An element with escaped content and attributes; ``class_`` is the attribute class.

    Example:
        >>> element("p", "a < b", class_="note")
        '<p class="note">a &lt; b</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{''.join(map(escaped, content))}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Pieces of HTML, one after the other; plain text among them is escaped."""
    return Html("\n".join(escaped(part) for part in parts if part))


def table(
    head: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    marked: int | None = None,
    numeric: bool = False,
) -> Html:
    """A table that scrolls by itself where the screen is narrow.

    Args:
        head: Titles of the columns; empty for none.
        rows: Cells; the first of a row is its header.
        marked: Index of a row to set off, the best one.
        numeric: Whether all cells but the first are numbers, aligned to the right.
    """
    lines = []
    for index, row in enumerate(rows):
        first, *others = row
        cells = element("th", first, scope="row") + "".join(element("td", c) for c in others)
        lines.append(element("tr", Html(cells), class_="best" if index == marked else None))
    titles = "".join(element("th", title, scope="col") for title in head)
    top = element("thead", element("tr", Html(titles))) if head else ""
    inner = element("table", Html(top), element("tbody", *lines), class_="n" if numeric else None)
    kind = "scroll long" if len(lines) > LONG else "scroll"
    return element("div", inner, class_=kind, tabindex="0")


def pairs(values: Mapping[str, Any]) -> Html:
    """A table of names and values; those that are None are left out."""
    return table((), [(n, v) for n, v in values.items() if v is not None and v != ""])


def number(value: Any, digits: int = 4) -> str:
    """A number with four significant digits; whole numbers in full, with commas.

    Example:
        >>> number(1234567), number(56868.719), number(0.000123456), number(12.0)
        ('1,234,567', '56,869', '0.0001235', '12')
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    found = float(value)
    if math.isfinite(found) and found == int(found) and abs(found) < 1e15:
        return f"{int(found):,}"
    if 10**digits <= abs(found) < 1e15:
        return f"{found:,.0f}"
    return f"{found:,.{digits}g}"


def setting(value: Any) -> str:
    """A value of an argument as it is written in Python: text in quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def notebook_table(title: str, values: Mapping[str, Any], note: str = "") -> str:
    """Names and values as a small table, for ``_repr_html_`` in a notebook."""
    cells = [
        element(
            "tr",
            element("td", name, style="text-align:left"),
            element("td", value, style="text-align:left"),
        )
        for name, value in values.items()
    ]
    heading = element("b", title)
    more = element("p", note, style="opacity:.75;margin:4px 0") if note else ""
    return element("div", heading, more, element("table", element("tbody", *cells)))


def copyable(text: str, label: str) -> Html:
    """Text in a box with a button that copies it."""
    return element(
        "div",
        element("pre", element("code", text)),
        element("button", "Copy", type="button", class_="copy", aria_label=f"Copy {label}"),
        class_="copybox",
    )
