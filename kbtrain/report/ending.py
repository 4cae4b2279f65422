"""How a run ended: why, with which weights, how fast, and how to go on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbtrain.callbacks.base import evaluation_name
from kbtrain.errors import NonFiniteError, first_lines
from kbtrain.report.command import longer, resume_command
from kbtrain.utils.files.filesystem import parse_checkpoint_name
from kbtrain.utils.json_types import JsonDataclass

REASONS = {
    "SIGINT": "Ctrl-C (SIGINT)",
    "SIGTERM": "SIGTERM",
    "SIGUSR1": "SIGUSR1",
    "max_time": "max_time is over",
}
"""Why a run ended, by ``Trainer.interruption``."""


@dataclass(frozen=True)
class RunEnding(JsonDataclass):
    """The end of a call of ``fit``; JSON values only.

    Attributes:
        reason: Why it ended, a plain sentence without its full stop.
        completed: Whether it ended as planned or because a callback decided so; False after a
            signal, ``max_time`` or an error.
        step: Updates done.
        updates: Updates planned; 0 if unknown.
        epoch: Epochs done.
        best_metric: Name of the metric for the best model; None if there is none.
        best_step: Updates at the best evaluation.
        best_value: The metric there.
        evaluations_since_best: Evaluations after the best one; None if there is none.
        best_checkpoint: The best checkpoint that was saved.
        best_loaded: Whether the model holds the weights of that checkpoint.
        weights: Which weights the model holds, a phrase.
        weights_step: The update whose checkpoint, if there is one, holds these weights; None if
            none does.
        seconds: Duration of the call.
        first_step: Updates done before the call, by the sessions that it continues.
        compile_seconds: Duration of the calls of the step that were compiled first, most of it
            compiling.
        samples_per_second: Training speed without compiling, evaluating and saving.
        tokens_per_second: The same in tokens, where they are counted.
        shares: Shares of the time of the loop without compiling: "compute", "data" (waiting for
            batches), "other" (evaluating and saving) and "host" (the rest).
        checkpoint: The newest checkpoint, to go on from.
        resume_command: The command that goes on from there; empty if there is none to go on from,
            or if the program was not started by a command.
        resume_change: What has to be changed for it in the program, a phrase; empty if nothing has
            to be.
        resume_longer: What has to be changed for more updates than were planned, a phrase.
        error: The error that ended the run, its type and the first lines of its message; None
            after a signal.
        skipped: Those of the updates that were skipped because they were not finite.
    """

    reason: str
    completed: bool
    step: int
    updates: int
    epoch: float
    best_metric: str | None
    best_step: int | None
    best_value: float | None
    evaluations_since_best: int | None
    best_checkpoint: str | None
    best_loaded: bool
    weights: str
    seconds: float
    compile_seconds: float
    samples_per_second: float | None
    tokens_per_second: float | None
    shares: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    resume_command: str = ""
    resume_change: str = ""
    resume_longer: str = "more epochs"
    error: str | None = None
    skipped: int = 0
    first_step: int = 0
    weights_step: int | None = None


def ending_of(trainer: Any, error: BaseException | None) -> RunEnding:
    """Describe how the running call of ``fit`` ends.

    Args:
        trainer: The Trainer, before its ``current_run`` is cleared.
        error: The error that ends it, or None.
    """
    args, state, run = trainer.args, trainer.state, trainer.current_run
    checkpoint = _newest_checkpoint(trainer)
    command, change = (
        resume_command(trainer.resume_requested, trainer.backend.name) if checkpoint else ("", "")
    )
    samples, tokens, shares = _speed(run)
    loaded = trainer.loaded_best
    failure = None if isinstance(error, KeyboardInterrupt | SystemExit) else error
    return RunEnding(
        reason=_reason(trainer, error),
        completed=error is None and trainer.interruption is None,
        step=state.global_step,
        updates=state.max_steps,
        epoch=float(state.epoch),
        best_metric=args.metric_for_best_model if state.best_global_step is not None else None,
        best_step=state.best_global_step,
        best_value=state.best_metric,
        evaluations_since_best=_since_best(state, args.metric_for_best_model),
        best_checkpoint=state.best_model_checkpoint,
        best_loaded=loaded is not None and trainer.weights_note is None,
        weights=_weights(trainer, loaded),
        seconds=time.perf_counter() - trainer.fit_began,
        compile_seconds=0.0 if run is None else run.compile_seconds,
        samples_per_second=samples,
        tokens_per_second=tokens,
        shares=shares,
        checkpoint=checkpoint,
        resume_command=command,
        resume_change=change,
        resume_longer=longer(args),
        error=None if failure is None else _described(failure),
        skipped=0 if run is None else run.progress.skipped,
        first_step=0 if run is None else run.first_step,
        weights_step=held_step(trainer),
    )


def _reason(trainer: Any, error: BaseException | None) -> str:
    state, control = trainer.state, trainer.control
    if error is not None and trainer.interruption is None:
        if isinstance(error, NonFiniteError):
            return f"the loss or the gradient of update {state.global_step + 1} was not finite"
        if isinstance(error, KeyboardInterrupt):
            return "Ctrl-C, at once: nothing more was saved"
        return f"an error: {type(error).__name__}"
    if trainer.interruption is not None:
        return REASONS.get(trainer.interruption, str(trainer.interruption))
    run = trainer.current_run
    began = run is None or state.global_step > run.first_step
    if began and 0 < state.max_steps <= state.global_step:
        return "all updates are done"  # also if a callback asked to stop after the last one
    if control.stop_reason is not None:
        return str(control.stop_reason)
    return "the data has ended" if began else "there was nothing to do"


def _since_best(state: Any, metric: str | None) -> int | None:
    if state.best_global_step is None:
        return None
    name = evaluation_name(str(metric))
    steps = {entry["step"] for entry in state.log_history if name in entry}
    return len([step for step in steps if step > state.best_global_step])


def _described(error: BaseException) -> str:
    text = first_lines(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _newest_checkpoint(trainer: Any) -> str | None:
    if trainer.args.save_strategy == "no":
        return None
    trainer.saver.settle()
    listed = trainer.store.list()
    owned = [path for _, path in listed if trainer.store.owns(path)]
    return str(owned[-1]) if owned else None


def held_step(trainer: Any) -> int | None:
    """The update whose weights the model holds, as they were evaluated and saved; None if none."""
    if trainer.weights_note is not None:
        step: int | None = trainer.weights_step
    elif trainer.loaded_best is not None:
        step = parse_checkpoint_name(Path(trainer.loaded_best).name)
    else:
        step = int(trainer.state.global_step)
    return step


def _weights(trainer: Any, loaded: Any) -> str:
    state = trainer.state
    if trainer.weights_note is not None:
        return str(trainer.weights_note)
    if loaded is not None:
        return f"the best, of {Path(loaded).name}"
    averages = trainer.args.ema is not None or getattr(trainer.optimizer, "use_ema", False)
    kind = "averages, " if averages and not trainer.training_weights else ""
    if state.best_global_step == state.global_step:
        return f"{kind}the newest, of update {state.global_step}, which is the best"
    return f"{kind}the newest, of update {state.global_step}"


def _speed(run: Any) -> tuple[float | None, float | None, dict[str, float]]:
    """Samples and tokens per second, and the shares of the loop's time, without compiling."""
    if run is None or run.state.global_step == run.first_step:
        return None, None, {}
    times = run.times
    total = (times.total if run.seconds is None else run.seconds) - run.compile_seconds
    compute = max(0.0, times.compute - run.compile_seconds)
    host = max(0.0, total - compute - times.data - times.other)
    parts = {"compute": compute, "data": times.data, "host": host, "other": times.other}
    whole = sum(parts.values())
    if whole <= 0:
        return None, None, {}
    training = max(whole - times.other, 1e-9)
    # These samples took their time within that of compiling.
    samples = (run.samples - run.compiling_samples) / training
    tokens = (
        (run.tokens - run.compiling_tokens) / training if run.count_tokens is not None else None
    )
    shares = {name: round(seconds / whole, 4) for name, seconds in parts.items()}
    return samples or None, tokens or None, shares
