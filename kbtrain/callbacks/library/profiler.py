"""A profile of some updates: which operations take the time, and how long the device waits."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.profile_summary import ProfileSummary, summarize
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.config import converters
from kbtrain.errors import ConfigurationError, first_lines
from kbtrain.utils.best_effort import best_effort, print_line

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")

STEPS = (10, 20)
"""The updates that ``profile=True`` records: later than the compilation and the first blocks."""


class ProfilerCallback(TrainerCallback):
    """Records some updates with the framework's own profiler.

    The trace is for TensorBoard and Perfetto. The ten slowest operations are in ``summary``, in the
    log and in the report of the run. The training computes the same numbers as without it.

    Updates are recorded as they run, so several that run in one call to the device are recorded
    together: a profile begins and ends with a call. It begins with one that needs no compilation,
    if there is one in time. With several processes the first one is recorded.

    A profiler that fails costs a warning, and no profile. So does another one that is recording
    already, because two at a time may end the process.

    Args:
        steps: The first update to record and the one after the last, counted from the begin of
            this call of ``fit``.
        folder: Where to put the trace, in a new folder for each profile; None means ``profile`` in
            ``output_dir``.

    Attributes:
        summary: What the newest profile tells; None before.

    Raises:
        ConfigurationError: ``steps`` are not two whole numbers, the second one larger.
    """

    every_step = False
    decides_alike = True

    def __init__(self, steps: tuple[int, int] = STEPS, folder: str | Path | None = None) -> None:
        self.steps, self.folder = _check(steps), folder
        self.summary: ProfileSummary | None = None
        self._stop: Callable[[], tuple[Path, Any]] | None = None
        self._first = self._began = self._until = 0
        self._done = True
        self._compiled_instead = False

    @property
    def is_recording(self) -> bool:
        """Whether a profile is being recorded."""
        return self._stop is not None

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Be ready for a profile."""
        self.close()  # a first attempt did not fit into memory
        self._first, self._done = state.global_step, not state.is_world_process_zero
        self._compiled_instead = False

    @best_effort
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, if it is time."""
        start, stop = self.steps
        done = state.global_step - self._first
        if self._done or self._stop is not None or done < start:
            return
        trainer = kwargs["trainer"]
        if done < stop and not trainer.current_run.next_is_compiled:
            self._compiled_instead = True
            return  # its time would be that of the compiler
        others = (c for c in trainer.callback_handler.callbacks if c is not self)
        if any(isinstance(other, ProfilerCallback) and other.is_recording for other in others):
            self._done = True
            logger.warning(
                "There is no second profile: another ProfilerCallback of this run is recording "
                "updates. Give them steps that do not overlap."
            )
            return
        folder = args.output_folder / "profile" if self.folder is None else Path(self.folder)
        folder = _new(folder.absolute(), state.global_step + 1)
        try:
            trainer.backend.synchronize()
            self._stop = trainer.backend.start_profile(folder)
        except Exception as error:
            self._failed("start", error)
            with contextlib.suppress(OSError):
                folder.rmdir()  # it is empty
            return
        self._began = state.global_step
        self._until = self._began + (stop - max(done, start) if done < stop else stop - start)

    @best_effort
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, if the last update to record is done."""
        if self._stop is not None and state.global_step >= self._until:
            self._finish(state, kwargs["trainer"])

    @best_effort
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop with the run."""
        if self._stop is not None:
            self._finish(state, kwargs["trainer"])
        elif not self._done:
            self._done = True
            self._explain(state.global_step - self._first)

    def close(self) -> None:
        """Stop the profiler, if an error ended the run while it was recording."""
        stop, self._stop, self._done = self._stop, None, True
        if stop is not None:
            try:
                stop()
            except Exception as error:
                self._failed("stop", error)

    def _finish(self, state: TrainerState, trainer: Any) -> None:
        stop, self._stop, self._done = self._stop, None, True
        assert stop is not None
        try:
            trainer.backend.synchronize()
            trace, spans = stop()
            updates = state.global_step - self._began
            self.summary = summarize(trace, spans, self._began + 1, updates)
        except Exception as error:
            self._failed("write its trace", error)
            return
        trainer.record.add_section(self.summary.title(), self.summary.rows())
        _show(self.summary)

    def _explain(self, updates: int) -> None:
        """Say why there is no profile of a run."""
        start = self.steps[0]
        if updates <= start:
            logger.warning(
                "There is no profile: it would have begun after %d updates, and this run did %d.",
                start,
                updates,
            )
            return
        logger.warning(
            "There is no profile: it begins with a call to the device%s, after %d updates, and "
            "this run of %d updates had none. Train longer, or begin earlier: "
            "ProfilerCallback(steps=%r).",
            " that needs no compilation" if self._compiled_instead else "",
            start,
            updates,
            (0, max(1, self.steps[1] - start)),
        )

    def _failed(self, what: str, error: Exception) -> None:
        self._done = True
        logger.warning(
            "The profiler could not %s (%s: %s). Training continues without it.",
            what,
            type(error).__name__,
            first_lines(error, 1),
        )


def _show(summary: ProfileSummary) -> None:
    """Log a summary; who asked for a profile sees it without setting a log level, too."""
    text = (
        f"{summary.text()}\nThe trace is {summary.trace}: open it with https://ui.perfetto.dev, or "
        "its folder with TensorBoard."
    )
    if logger.isEnabledFor(logging.INFO):
        logger.info("Profile of the training. %s", text)
    elif logger.isEnabledFor(logging.WARNING):
        print_line(text)


def _check(steps: Any) -> tuple[int, int]:
    whole = converters.whole(0)
    try:
        start, stop = (whole(step) for step in steps)
    except (TypeError, ValueError, converters.InvalidValue):
        start = stop = 0
    if start >= stop:
        raise ConfigurationError(
            "ProfilerCallback needs steps=(start, stop): two whole numbers, the second one larger, "
            f"such as (10, 20). Received: {steps!r}."
        )
    return start, stop


def _new(folder: Path, step: int) -> Path:
    """A new folder for the profile that begins with an update."""
    name = f"step-{step}_{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        found = folder / (name if number == 1 else f"{name}-{number}")
        try:
            found.mkdir(parents=True)
        except FileExistsError:
            continue
        return found
    raise FileExistsError(str(folder / name))
