"""The parser of every command's options: one style of help, one kind of error."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors say what is wrong and where the help is, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help.\n")


def command_parser(command: str, description: str, **settings: Any) -> CommandParser:
    """The parser of a command.

    Args:
        command: Its name.
        description: What it does, for ``--help``.
        **settings: Other arguments of ``argparse.ArgumentParser``.
    """
    settings = {"allow_abbrev": False} | settings
    return CommandParser(f"kbtrain {command}", description=description, **settings)
