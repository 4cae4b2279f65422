"""Starts ``kbtrain launch`` with small scripts, and looks at what has become of the processes."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

SECONDS = 60.0

# What the scripts below share. They import neither kbtrain nor a framework.
PRELUDE = """\
import json, os, pathlib, signal, sys, time
rank, here = int(os.environ["RANK"]), pathlib.Path(__file__).parent

def note(name, text=""):
    (here / "unfinished").with_suffix(f".{rank}").write_text(str(text))
    os.replace(here / f"unfinished.{rank}", here / name)

def wait_for(condition):
    while not condition():
        time.sleep(0.01)

def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

"""


def write_script(folder, text):
    """A script of ``PRELUDE`` and more lines."""
    path = Path(folder) / "script.py"
    path.write_text(PRELUDE + textwrap.dedent(text), encoding="utf-8")
    return path


def start(*words, patch="", environ=(), prefix=(), **options):
    """Start ``kbtrain launch``, after the statements ``patch``, through the command ``prefix``."""
    program = f"import sys\n{patch}\nfrom kbtrain.cli import main\nsys.exit(main(sys.argv[1:]))"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", program, "launch", *map(str, words)],
        env=os.environ | dict(environ),
        text=True,
        **pipes | options,
    )


@contextlib.contextmanager
def started(*words, **options):
    """A launcher that is killed at the end of the context."""
    launcher = start(*words, **options)
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.communicate(timeout=SECONDS)


def launch(*words, stdin="", timeout=SECONDS, **options):
    """Run ``kbtrain launch`` to its end: status, standard output, errors."""
    with started(*words, **options) as launcher:
        out, err = launcher.communicate(stdin, timeout=timeout)
    return launcher.returncode, out, err


def wait_for(condition, what):
    """Wait until ``condition()`` is true."""
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit, f"timed out: {what}"
        time.sleep(0.01)


def read_notes(folder, *names):
    """The files that the processes have written, once they are there."""
    for name in names:
        wait_for((Path(folder) / name).exists, f"{name} is written")
    return [json.loads((Path(folder) / name).read_text()) for name in names]


def is_running(pid):
    """Whether a process exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # it has ended, and nobody has asked how
