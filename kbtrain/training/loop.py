"""The training loop, on one screen."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from kbtrain.callbacks.state import TrainerControl, decide_after_epoch, decide_after_step
from kbtrain.training import actions
from kbtrain.training.run import Run

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


def train_loop(trainer: TrainerBase, run: Run) -> None:
    """Run updates until the plan is complete or a stop is requested.

    ::

        for each epoch:
            <on_epoch_begin>
            for each block of updates:                  # one update, if a callback needs each
                <on_step_begin>
                <on_substep_end>                        # for every micro-batch but the last
                <on_pre_optimizer_step>                 # variables are still the old ones
                the steps: loss, gradients, accumulate, clip, finite check, optimizer, metrics
                <on_optimizer_step>                     # variables are the new ones
                decide what is due
                <on_step_end>
                log      -> <on_log>
                evaluate -> <on_evaluate_begin> (<on_prediction_step_begin> <on_prediction_step>)...
                            <on_log> <on_evaluate>
                save     -> <on_save>
            decide what is due
            <on_epoch_end>
            log, evaluate, <on_epoch_results>, save

    A block is one call to the device and ends where an action is due; it has a single update if a
    callback listens to the events of each step. The events between micro-batches fire just before
    it. The host waits for the device when it logs, evaluates or saves, and once per
    ``run.MAX_PENDING`` calls.
    """
    args, state, progress = trainer.args, trainer.state, run.progress
    done = 0 < run.plan.max_steps <= state.global_step
    if done and progress.unfinished is None:
        logger.warning("Nothing to do: step %d of %d.", state.global_step, run.plan.max_steps)
        return
    trainer.control.should_training_stop |= done
    if catch_up(trainer, run, "epoch") and trainer.control.should_training_stop:
        return
    for epoch in range(progress.epoch, run.plan.num_epochs):
        trainer.control.new_epoch()
        trainer.fire("on_epoch_begin")
        if catch_up(trainer, run, "step") and trainer.interruption:
            return
        with contextlib.closing(run.blocks()) as blocks:
            for block in [] if ends_epoch(trainer.control) else blocks:
                trainer.control.new_step()
                trainer.fire("on_step_begin")
                for _ in range(block.micro_batches - 1):
                    trainer.fire("on_substep_end")
                trainer.fire("on_pre_optimizer_step")
                run.update(block)
                trainer.fire("on_optimizer_step")
                decide_after_step(args, state, trainer.control)
                trainer.fire("on_step_end")
                trainer.agreement.control("step")
                actions.check_stop_requests(trainer)
                log_evaluate_save(trainer, run, "step")
                if trainer.interruption:
                    return  # the actions at the end of the epoch are left to the resumed run
                if ends_epoch(trainer.control):
                    break
        exhausted = progress.batch == 0 and not ends_epoch(trainer.control)
        last = exhausted or (epoch + 1 == run.plan.num_epochs and not ends_epoch(trainer.control))
        if exhausted:
            logger.warning(
                "No data in epoch %d: training ends at step %s.", epoch, actions.position(state)
            )
            trainer.control.should_training_stop = True
        run.end_epoch(stopped=trainer.control.should_training_stop)
        if ends := last and not run.plan.max_steps:
            state.max_steps = state.global_step
        decide_after_epoch(args, state, trainer.control, ends)
        trainer.fire("on_epoch_end")
        trainer.agreement.control("epoch")
        log_evaluate_save(trainer, run, "epoch")
        if trainer.control.should_training_stop:
            break


def ends_epoch(control: TrainerControl) -> bool:
    """Whether the end of the epoch or of the training was requested."""
    return control.should_epoch_stop or control.should_training_stop


def catch_up(trainer: TrainerBase, run: Run, after: str) -> bool:
    """Make up for an evaluation that a signal interrupted, and for the save that follows it.

    Args:
        trainer: The Trainer.
        run: The run.
        after: "step" or "epoch"; actions due at the other are left alone.

    Returns:
        Whether there was an unfinished action.
    """
    unfinished = run.progress.unfinished
    if unfinished is None or unfinished["after"] != after:
        return False
    run.progress.unfinished = None
    # Evaluation may have been turned off in the resumed run, which then has no data for it.
    evaluates = trainer.args.eval_strategy != "no" or trainer.eval_dataset is not None
    trainer.control.should_evaluate, trainer.control.should_save = evaluates, unfinished["save"]
    log_evaluate_save(trainer, run, after)
    return True


def log_evaluate_save(trainer: TrainerBase, run: Run, after: str) -> None:
    """Log, evaluate and save as due after a "step" or an "epoch", in this order.

    An evaluation interrupted by a signal is left to the resumed run.
    """
    control = trainer.control
    acts = control.should_log or control.should_evaluate or control.should_save
    if control.should_log:
        control.should_log = False
        actions.log_window(trainer, run)
    if control.should_evaluate:
        control.should_evaluate = False
        run.read()
        with run.times.of("other"):
            finished = actions.evaluate(trainer)
        if not finished:
            actions.leave_unfinished(trainer, run, after)
    if after == "epoch" and trainer.interruption is None:
        trainer.fire("on_epoch_results")
        trainer.agreement.control("results")
        control = trainer.control
    if control.should_save:
        control.should_save = False
        run.read()
        with run.times.of("other"):
            actions.save(trainer, run)
    if acts:
        trainer.agreement.control("action")
