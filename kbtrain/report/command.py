"""The command that started this program, and the one that goes on from a checkpoint."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from kbtrain.utils.notebook import is_notebook
from kbtrain.utils.processes import current


def command_line() -> str:
    """The command that started this program; empty in a notebook or an interactive session."""
    main = sys.modules.get("__main__")
    if getattr(main, "__file__", None) is None or is_notebook():
        return ""
    words = [word for word in _arguments(main) if word]
    if current().size > 1 and current().launcher == "kbtrain launch":
        return shlex.join(["kbtrain", "launch", "-n", str(current().local_size), *words])
    return shlex.join(["python", *words])


def _arguments(main: Any) -> list[str]:
    """What follows ``python`` in the command."""
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__"), *_without_secrets(sys.argv[1:])]
    # A program that a tool runs (a debugger, a test) has an argv of its own.
    return _without_secrets(sys.argv) if sys.argv and sys.argv[0] else [str(main.__file__)]


def _without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command without a token, which must not get into a log or a report."""
    shown, hides = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.lstrip("-").replace("-", "_") == "hub_token" and name.startswith("-")
        shown.append(
            "<HUB_TOKEN>" if hides else f"{name}=<HUB_TOKEN>" if secret and equals else word
        )
        hides = secret and not equals
    return shown


def resume_command(resume: Any, backend: str) -> tuple[str, str]:
    """How to go on from the newest checkpoint.

    Args:
        resume: ``resume_from_checkpoint`` of the call of ``fit``.
        backend: The backend in use.

    Returns:
        The command, empty where the program was not started by one, and what has to be changed
        first, as a phrase that follows the command; empty if nothing has to be.
    """
    command = command_line()
    if current().size > 1 and current().launcher != "kbtrain launch":
        command = ""  # another launcher's, which does not tell its own arguments
    if command:
        command = f"KERAS_BACKEND={backend} {command}"
    if resume == "auto" or resume is True:
        return command, "" if command else "the same call of fit() again"
    return command, 'fit(resume_from_checkpoint="auto")'
