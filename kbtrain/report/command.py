"""The command that started this program, and the one that goes on from a checkpoint."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kbtrain.config.serialization import secret_names
from kbtrain.config.training_args import TrainingArguments
from kbtrain.utils.files.addresses import without_credentials
from kbtrain.utils.machine.processes import current
from kbtrain.utils.notebook import is_notebook

_SECRETS = secret_names(TrainingArguments)
_IN_MAPPING = re.compile(
    rf"""(({"|".join(sorted(_SECRETS))})["']?\s*[:=]\s*)("[^"]*"|'[^']*'|[^\s,}}\]]+)"""
)
"""A secret in ``--args '{hub_token: X}'``."""


def command_line() -> str:
    """The command that started this program; empty if it is none, as in a notebook."""
    main = sys.modules.get("__main__")
    if getattr(main, "__file__", None) in (None, "<stdin>") or is_notebook():
        return ""  # what was typed, or piped in, cannot be started again
    words = [word for word in _arguments(main) if word]
    if current().size > 1 and current().launcher == "kbtrain launch":
        return shlex.join(["kbtrain", "launch", "-n", str(current().local_size), *words])
    if is_command() and getattr(main, "__spec__", None) is None:
        return shlex.join(["kbtrain", *words[1:]])  # not the path of the installed script
    return shlex.join(["python", *words])


def is_command(*names: str) -> bool:
    """Whether this program is the command ``kbtrain``, or one of the commands named."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    program = Path(sys.argv[0]).stem if spec is None and sys.argv else ""
    ours = program == "kbtrain" or getattr(spec, "name", None) == "kbtrain.__main__"
    return ours and (not names or sys.argv[1:2] in [[name] for name in names])


def longer(args: TrainingArguments) -> str:
    """What to change to train longer than was planned, a phrase.

    Args:
        args: The arguments of the run.
    """
    steps = args.max_steps > 0
    if not is_command("train"):
        return "a larger max_steps" if steps else "more epochs"
    name = "max_steps" if steps else "num_train_epochs"
    return f"--args.{name} N (more than {getattr(args, name):g})"


def _arguments(main: Any) -> list[str]:
    """What follows ``python`` in the command."""
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__"), *_without_secrets(sys.argv[1:])]
    # A program that a tool runs (a debugger, a test) has an argv of its own.
    return _without_secrets(sys.argv) if sys.argv and sys.argv[0] else [str(main.__file__)]


def _without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command without tokens and passwords, which no log or report may show.

    Options may have a prefix (``--args.hub_token X``), and settings no dashes (``hub_token=X``).
    """
    shown, hides = [], ""
    for word in words:
        option, equals, _ = word.partition("=")
        name = option.rpartition(".")[2].lstrip("-+").replace("-", "_").lower()
        hidden = f"<{name.upper()}>"
        secret = name in _SECRETS
        if hides:
            shown.append(hides)
        elif secret and equals:
            shown.append(f"{option}={hidden}")
        else:
            word = _IN_MAPPING.sub(lambda m: f"{m[1]}<{m[2].upper()}>", word)
            shown.append(without_credentials(word))
        hides = hidden if secret and not equals and option.startswith("-") else ""
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
        same = "the same command" if is_command("train") else "the same call of fit()"
        return command, "" if command else f"{same} again"
    if is_command("train"):
        return command, "--args.resume_from_checkpoint auto"
    return command, 'fit(resume_from_checkpoint="auto")'
