"""Runs a user's program up to its first ``fit`` and writes the plan: ``kbtrain plan`` starts this.

It is a process of its own because the backend is chosen when Keras is imported.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kbtrain.errors import KbtrainError, causes, first_lines, user_line
from kbtrain.plan.process import chosen_by_program
from kbtrain.plan.request import FRAMEWORKS, PlanMade, PlanRequest, requested
from kbtrain.plan.request import outcome as outcome_of_fit
from kbtrain.utils.files.output_files import save_json


def main(words: Sequence[str], leave: Callable[[int], object] | None = None) -> int:
    """Run a program.

    Args:
        words: A JSON object with ``program``, ``module`` (whether that is the name of a module),
            ``arguments``, ``request`` and ``result``: the file for the result, an object with
            either ``plan`` or ``error``.
        leave: Ends the process with an exit status, at once: it is called when the outcome is
            written, so that nothing of the program runs after its first ``fit``. Without it the
            outcome is raised in the program.

    Returns:
        0 if there is a plan, else 2.
    """
    task = json.loads(words[0])
    values = task["request"]
    request = PlanRequest.from_dict({**values, "batch": tuple(values["batch"])})

    def write(outcome: BaseException | None) -> int:
        result = _result(outcome, task["program"], request)
        save_json(Path(task["result"]), result)
        return 0 if "plan" in result else 2

    def written(outcome: BaseException) -> None:
        assert leave is not None
        leave(write(outcome))

    __import__("keras")  # with the backend of this process, whatever the program sets later
    ended: BaseException | None = None
    try:
        with requested(request, None if leave is None else written):
            _run(task["program"], task["module"], task["arguments"])
    except BaseException as error:
        ended = error
    return write(outcome_of_fit() or ended)


def _result(outcome: BaseException | None, program: str, request: PlanRequest) -> dict[str, Any]:
    """The result of a program that ended, with or without an exception."""
    if outcome is None:
        return {"error": _never(program)}
    if isinstance(outcome, PlanMade):
        return {"plan": outcome.plan.to_dict()}
    if isinstance(outcome, KbtrainError):
        return {"error": f"{outcome}{_about_jax(outcome, request)}"}
    if isinstance(outcome, SystemExit):
        return {"error": f"{_never(program)} It ended with exit status {outcome.code!r}."}
    if isinstance(outcome, KeyboardInterrupt):
        return {"error": "It was interrupted."}
    if not _framework_of(outcome):
        _print_traceback(outcome)
    when = "in" if outcome is outcome_of_fit() else "before"
    text = f"{program} failed {when} its first fit(){user_line(outcome)}: {_named(outcome)}"
    return {"error": f"{text}{_about_jax(outcome, request)}"}


def _leave_at_once(status: int) -> None:
    """End this process without what the program wants to do at its end: it could save weights.

    Neither ``finally`` nor ``atexit`` runs; processes that the program has started with
    ``multiprocessing`` are ended.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the program may have closed or replaced it
            stream.flush()
    os._exit(status)


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
    sys.exit(main(sys.argv[1:], _leave_at_once))
