"""The process that a plan is made in, which has JAX: its environment, and the run's own backend."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from kbtrain.errors import ConfigurationError

# The level of TensorFlow's log is one that kbtrain has set in this process; the others are of a
# launcher, and a plan is made by one process.
_NOT_PASSED_ON = (
    "TF_CPP_MIN_LOG_LEVEL",
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "KBTRAIN_ADDRESSES"),
)

LONGEST = 6 * 3600
"""Seconds after which a process that makes a plan is ended."""

_CHOICE = "KERAS_BACKEND"


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles with JAX on this machine's processor.

    Args:
        environ: That of this process.

    Raises:
        ConfigurationError: JAX is not installed.
    """
    if importlib.util.find_spec("jax") is None:
        raise ConfigurationError(
            "A plan is compiled with JAX, whatever the backend of the run, and JAX is not "
            "installed here: pip install 'kbtrain[jax]'."
        )
    kept = {name: value for name, value in environ.items() if name not in _NOT_PASSED_ON}
    return kept | {
        _CHOICE: "jax",
        "JAX_PLATFORMS": "cpu",
        "WANDB_MODE": "disabled",  # a program may call wandb.init() itself
    }


def run_process(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    captured: bool = False,
    stdout: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Wait for a process that makes a plan.

    Args:
        command: The program and its arguments.
        env: Its environment.
        captured: Whether to keep what it prints.
        stdout: The descriptor for its standard output, if that is not kept; None: this process's.

    Raises:
        ConfigurationError: It took too long, and was ended.
    """
    try:
        return subprocess.run(
            command,
            env=env,
            stdout=subprocess.PIPE if captured else stdout,
            stderr=subprocess.PIPE if captured else None,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"The process that makes the plan was ended after {LONGEST / 3600:.0f} hours. A plan "
            "of the run alone takes one compilation: --quick, or quick=True."
        ) from None


def backend_of(environ: Mapping[str, str]) -> str:
    """The backend that Keras would take in a process, unless its program chooses one itself.

    Args:
        environ: The environment of the process.
    """
    if name := environ.get(_CHOICE):
        return name
    home = Path(environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        return str(json.loads((home / "keras.json").read_text(encoding="utf-8"))["backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow"


def chosen_by_program(environ: Mapping[str, str], otherwise: str) -> str:
    """The backend of a program that runs in a process for plans.

    Args:
        environ: The environment, in which the program may have set the backend that it wants.
        otherwise: The backend that it has without that.
    """
    name = environ.get(_CHOICE, "jax")
    return otherwise if name == "jax" else name
