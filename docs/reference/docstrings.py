"""A Griffe extension: docstrings, written for `help()`, as the Markdown that mkdocstrings reads."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An equation on the line of its directive, and on the lines below it.
CONTINUED_EQUATION = re.compile(r"^( *)\.\. math:: *(\S.*(?:\n\1 +\S.*)*)", re.MULTILINE)
EQUATION = re.compile(r"^( *)\.\. math::\n((?:\1 +\S.*\n?)+)", re.MULTILINE)
LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_")
LITERAL = re.compile(r"^( *)(\S.*?)?::\n\n((?:\1 +\S.*\n|\n)+)", re.MULTILINE)


def as_markdown(text: str) -> str:
    r"""Replace what Markdown would not understand.

    Args:
        text: A docstring without its indentation.

    Returns:
        The same with ``$...$`` for the role ``:math:``, ``$$...$$`` for the directive, links as in
        Markdown, code after ``::`` fenced, and the headings of sections that Griffe knows.
    """
    text = re.sub(r":math:`([^`]+)`", lambda match: f"${one_line(match[1])}$", text)
    text = CONTINUED_EQUATION.sub(equation, text)
    text = EQUATION.sub(equation, text)
    text = LINK.sub(lambda match: f"[{one_line(match[1])}]({match[2]})", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^Reference:$", "References:", text, flags=re.MULTILINE)
    return LITERAL.sub(fenced, text + "\n")


def one_line(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


def equation(match: re.Match[str]) -> str:
    """The directive ``.. math::`` as a paragraph."""
    return f"{match[1]}\n{match[1]}$${one_line(match[2])}$$\n\n"


def fenced(match: re.Match[str]) -> str:
    """Indented lines after ``::`` as a fenced block."""
    before = f"{match[1]}{match[2]}:\n\n" if match[2] else ""
    return f"{before}{match[1]}```text\n{match[3].rstrip()}\n{match[1]}```\n\n"


class Docstrings(griffe.Extension):
    """Converts each docstring as soon as its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe with every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
