"""Runs a user's program up to its first ``fit`` and writes the plan: ``kbtrain plan`` starts this.

It is a process of its own because the backend is chosen when Keras is imported.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kbtrain.errors import KbtrainError, causes, first_lines, user_line
from kbtrain.plan.process import chosen_by_program
from kbtrain.plan.request import FRAMEWORKS, PlanMade, PlanRequest, requested
from kbtrain.utils.output_files import save_json


def main(words: Sequence[str]) -> int:
    """Run a program.

    Args:
        words: A JSON object with ``program``, ``module`` (whether that is the name of a module),
            ``arguments``, ``request`` and ``result``: the file for the result, an object with
            either ``plan`` or ``error``.

    Returns:
        0 if there is a plan, else 2.
    """
    task = json.loads(words[0])
    values = task["request"]
    request = PlanRequest.from_dict({**values, "batch": tuple(values["batch"])})
    result: dict[str, Any]
    __import__("keras")  # with the backend of this process, whatever the program sets later
    try:
        with requested(request):
            _run(task["program"], task["module"], task["arguments"])
        result = {"error": _never(task["program"])}
    except PlanMade as made:
        result = {"plan": made.plan.to_dict()}
    except KbtrainError as error:
        result = {"error": f"{error}{_about_jax(error, request)}"}
    except SystemExit as error:
        result = {"error": f"{_never(task['program'])} It ended with exit status {error.code!r}."}
    except KeyboardInterrupt:
        result = {"error": "It was interrupted."}
    except BaseException as error:
        if not _framework_of(error):
            _print_traceback(error)
        text = f"{task['program']} failed before its first fit(){user_line(error)}: {_named(error)}"
        result = {"error": f"{text}{_about_jax(error, request)}"}
    save_json(Path(task["result"]), result)
    return 0 if "plan" in result else 2


def _run(program: str, is_module: bool, arguments: Sequence[str]) -> None:
    # As Python starts a program: its folder comes first. This package stays importable.
    home = str(Path(__file__).parents[2])
    sys.path[0] = os.getcwd() if is_module else str(Path(program).resolve().parent)
    if home not in sys.path:
        sys.path.append(home)
    sys.argv = [program, *arguments]
    if is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


def _never(program: str) -> str:
    return (
        f"{program} ended without a call of Trainer.fit(), so there is nothing to plan. Arguments "
        "of the program come after --: `kbtrain plan train.py --device h100 -- --epochs 3`."
    )


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_lines(error, 2)}"


def _about_jax(error: BaseException, request: PlanRequest) -> str:
    """What an error has to do with JAX, if the program is written for another backend."""
    if name := _framework_of(error):
        own = FRAMEWORKS[name]
        return (
            f"\nA plan is compiled with JAX. A model that calls {own} itself (its layers, "
            "functions or tensors) cannot be planned; one of Keras layers and keras.ops can."
        )
    backend = chosen_by_program(os.environ, request.backend)
    if backend == "jax" or isinstance(error, KbtrainError):
        return ""
    own = FRAMEWORKS.get(backend, backend)
    return f"\nIt ran with JAX, which a plan is compiled with: what needs {own} cannot be planned."


def _framework_of(error: BaseException) -> str:
    """The framework other than JAX that an error is about; empty if it is about none."""
    for cause in reversed(causes(error)):
        said = str(cause).lower()
        paths = [frame.filename for frame in traceback.extract_tb(cause.__traceback__)][-3:]
        for name in ("torch", "tensorflow"):
            if f"{name}." in said or any(f"{os.sep}{name}{os.sep}" in path for path in paths):
                return name
    return ""


def _print_traceback(error: BaseException) -> None:
    """Print where the program failed, without the frames of this module and runpy."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_INTERNAL):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


_INTERNAL = (__file__, runpy.__file__, "<frozen")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
