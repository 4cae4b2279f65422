"""Changes of a Python text by position, which leave everything else as it is."""

from __future__ import annotations

import ast
from collections.abc import Sequence


class Edits:
    """A text, its tree's positions in it, and replacements.

    Args:
        text: A Python program.
    """

    def __init__(self, text: str) -> None:
        # The columns of a tree count bytes.
        self.data = text.encode()
        self.lines = [0]
        for line in self.data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.made: list[tuple[int, int, bytes]] = []

    def start(self, node: ast.expr | ast.stmt | ast.alias | ast.keyword) -> int:
        """Where a node begins."""
        return self.lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt | ast.alias | ast.keyword) -> int:
        """Where a node ends."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def source(self, node: ast.expr | ast.stmt | ast.alias | ast.keyword) -> str:
        """The text of a node."""
        return self.data[self.start(node) : self.end(node)].decode()

    def replace(self, start: int, end: int, new: str) -> None:
        """Replace a part of the text."""
        self.made.append((start, end, new.encode()))

    def remove(self, items: Sequence[ast.alias | ast.keyword | ast.expr], gone: set[int]) -> None:
        """Remove items of a list in parentheses, with their commas.

        Args:
            items: All items, in the order of the text; at least one of them stays.
            gone: Indices of those to remove.
        """
        for index in sorted(gone):
            start, end = self.start(items[index]), self.end(items[index])
            following = self.start(items[index + 1]) if index + 1 < len(items) else None
            line, next_line = self._line_at(start), self._next_line(end)
            alone = not self.data[line:start].strip()
            rest = self.data[end:next_line].partition(b"#")[0].strip()
            if alone and rest in (b"", b",") and (following is None or following >= next_line):
                self.replace(line, next_line, "")
            elif following is not None:
                self.replace(start, following, "")
            else:
                kept = [self.end(item) for i, item in enumerate(items) if i not in gone]
                comma = len(rest) if not kept and rest == b"," else 0
                self.replace(kept[-1] if kept else start, end + comma, "")

    def apply(self) -> str:
        """The text with all replacements, but those inside of a removed part."""
        parts, position = [], 0
        for start, end, new in self._sorted():
            if start >= position:
                parts += [self.data[position:start], new]
            position = max(position, end)
        return b"".join([*parts, self.data[position:]]).decode()

    def new_line(self, line: int) -> int:
        """The number that a line of the old text has in the new one."""
        shift, position = 0, 0
        for start, end, new in self._sorted():
            if start >= self.lines[line - 1] and not (start == end == self.lines[line - 1]):
                break
            if start >= position:
                shift += new.count(b"\n")
            shift -= self.data[max(start, position) : end].count(b"\n")
            position = max(position, end)
        return max(1, line + shift)

    def indentation(self, position: int) -> str:
        """The blanks that the line of a position begins with."""
        line = self.data[self._line_at(position) : position]
        return line[: len(line) - len(line.lstrip())].decode()

    def newline(self) -> str:
        """The line end of the text."""
        return "\r\n" if b"\r\n" in self.data else "\n"

    def _sorted(self) -> list[tuple[int, int, bytes]]:
        return sorted(self.made, key=lambda edit: edit[:2])

    def _line_at(self, position: int) -> int:
        return max(line for line in self.lines if line <= position)

    def _next_line(self, position: int) -> int:
        return min((line for line in self.lines if line > position), default=len(self.data))
