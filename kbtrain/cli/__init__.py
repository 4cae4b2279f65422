"""``kbtrain COMMAND``, or ``python -m kbtrain COMMAND``: one module each, imported when called.

A command's module has a function ``run(words) -> exit status``, which gets the words after the
command's name. A user's mistake is printed without a stack trace and gives status 2.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence

from kbtrain.errors import KbtrainError

COMMANDS = {
    "train": "train, evaluate and save a model from a file of settings",
    "launch": "start a script as several processes that train together",
    "plan": "predict whether a script's training fits on devices that are not here, and how fast",
    "report": "write the report of a run, or of several side by side, as one HTML page",
    "checkpoint": "list, verify, show and export checkpoints",
    "migrate": "show what to change in a script for the Trainer of Transformers",
    "args": "explain the fields of TrainingArguments, and the names they had elsewhere",
    "env": "print versions, backend and devices, for bug reports",
}
"""Command -> description; each module has the name of its command."""

FRAMEWORKS = ("torch", "tensorflow", "jax")
"""What Keras can run on, by the names of their packages."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: The words after ``kbtrain``; those of this process by default.

    Returns:
        The exit status: 0, 2 after a mistake in the command line, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"kbtrain {importlib.import_module('kbtrain').__version__}")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        print(
            f"kbtrain: there is no command {command!r}. {meant}It has: {', '.join(COMMANDS)}.\n"
            "See kbtrain --help.",
            file=sys.stderr,
        )
        return 2
    try:
        status = int(importlib.import_module(f"kbtrain.cli.{command}").run(rest))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader is done, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # a run has said what it saved, as far as it had begun
        print(f"kbtrain {command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as problem:
        if problem.name not in FRAMEWORKS or "keras" in sys.modules:
            raise
        print(f"kbtrain {command}: {_no_backend(problem.name)}", file=sys.stderr)
        return 2
    except (KbtrainError, OSError) as problem:  # the output may go to a file on a full disk
        print(f"kbtrain {command}: {problem}", file=sys.stderr)
        return 2


def _no_backend(name: str) -> str:
    """Why Keras could not be imported: its backend is not installed."""
    here = [each for each in FRAMEWORKS if importlib.util.find_spec(each) is not None]
    ways = [f"set KERAS_BACKEND={each}" for each in here] or [f"pip install 'kbtrain[{name}]'"]
    return f"Keras would run on {name}, which is not installed: {', or '.join(ways)}."


def _usage() -> str:
    listed = "\n".join(f"  {name:<12}{about}" for name, about in COMMANDS.items())
    return (
        "usage: kbtrain COMMAND ...\n\nTrain Keras models on PyTorch, TensorFlow or JAX.\n\n"
        f"commands:\n{listed}\n\n"
        "kbtrain COMMAND --help explains one of them, kbtrain --version prints the version."
    )
