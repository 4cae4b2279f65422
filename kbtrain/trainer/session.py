"""One call of ``Trainer.fit`` from its arguments to its end: signals, lock, checkpoint, ending."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kbtrain import distributed
from kbtrain.checkpoint.processing_class import check_resumed
from kbtrain.distributed import placement
from kbtrain.evaluation import evaluate as evaluation
from kbtrain.plan import request as planning
from kbtrain.report.ending import ending_of
from kbtrain.trainer import argument_checks
from kbtrain.training import actions
from kbtrain.training.auto_batch_size import find_and_fit
from kbtrain.training.fit import TrainOutput, fit
from kbtrain.training.resuming import resolve_together
from kbtrain.training.stop_signals import StopSignals

if TYPE_CHECKING:
    from kbtrain.callbacks.handler import CallbackHandler
    from kbtrain.trainer.trainer import Trainer

logger = logging.getLogger("kbtrain")


def run_session(
    trainer: Trainer, resume: Any, ignore_keys_for_eval: Sequence[str] | None
) -> TrainOutput:
    """Train; see ``Trainer.fit``.

    Args:
        trainer: The Trainer.
        resume: ``resume_from_checkpoint`` of the call.
        ignore_keys_for_eval: As in ``Trainer.fit``.
    """
    argument_checks.check_fit(trainer, resume)
    evaluation.check_ignore_keys(ignore_keys_for_eval)
    if planning.pending():
        planning.answer(trainer)
    args, handler = trainer.args, trainer.callback_handler
    resume = args.resume_from_checkpoint if resume is None else resume
    trainer.is_in_train, trainer.interruption = True, None
    trainer.resume_requested, trainer.resumed_from, trainer.loaded_best = resume, None, None
    trainer.weights_note = trainer.weights_step = None
    trainer.fit_began = time.perf_counter()
    trainer.ignore_keys_for_eval = ignore_keys_for_eval
    signals = trainer.stop_signals = StopSignals(
        args.enable_jit_checkpoint,
        args.max_time,
        functools.partial(handler.tell, "notice") if _shows_notices(handler) else None,
        saves=args.save_strategy != "no",
    )
    failure: BaseException | None = None
    try:
        saving = trainer.saver.running(args.save_strategy != "no", args.on_save_error)
        with distributed.working("the start of fit"), signals, saving:
            handler.tell("phase", "looking for a checkpoint" if resume else "preparing")
            if trainer.pusher is not None:
                trainer.pusher.begin(trainer.model)
                resume = trainer.pusher.fetch(resume)
            checkpoint = resolve_together(trainer, resume)
            trainer.resumed_from = None if checkpoint is None else checkpoint.path
            if checkpoint is not None:
                check_resumed(trainer.processing_class, checkpoint.path)
            with placement.settings(trainer.backend, args, trainer.model):
                train = find_and_fit if args.auto_find_batch_size else fit
                output = train(trainer, checkpoint)
        if trainer.pusher is not None and trainer.trial is None:
            handler.tell("phase", f"pushing to {trainer.pusher.name}")
            if trainer.interruption is None:
                push = functools.partial(trainer.push_to_hub, "End of training", blocking=False)
                trainer.pusher.finish(push)
            trainer.pusher.close(waits=True)  # another Ctrl-C ends it
        newest = actions.last_checkpoint(trainer) if trainer.interruption else None
        signals.raise_received(trainer.state.global_step, newest, trainer.interruption)
        return output
    except BaseException as error:
        failure = error
        raise
    finally:
        if trainer.pusher is not None:
            trainer.pusher.close(waits=not isinstance(failure, KeyboardInterrupt))
        _tell_ending(trainer, failure)
        if args.should_save:
            trainer.store.send_files(once=failure is not None)
        trainer.is_in_train, trainer.current_run = False, None
        handler.close()


def _shows_notices(handler: CallbackHandler) -> bool:
    return any(hasattr(callback, "notice") for callback in handler.callbacks)


def _tell_ending(trainer: Trainer, error: BaseException | None) -> None:
    """Tell the callbacks that show a run how it ended; nothing here may hide its result."""
    try:
        ending = ending_of(trainer, error)
    except Exception as problem:
        logger.debug("The end of the run cannot be described: %r", problem)
        return
    trainer.callback_handler.tell("ended", ending)
