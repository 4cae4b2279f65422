"""Signals and max_time: save after the step, stop, leave no handler behind, lose nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import Recorder, StopAt, arguments, linear_model, make_data, weights, without_timings
from paths import SUPPORT

from kbtrain import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingInterrupted
from kbtrain.checkpoint import CheckpointStore, async_checkpointer
from kbtrain.training import stop_signals
from kbtrain.training.stop_signals import StopSignals


def make_trainer(folder, callbacks=(), **changes):
    """Twelve steps in three shuffled epochs."""
    defaults = {
        "save_strategy": "steps",
        "save_steps": 100,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "random",
    }
    data = make_data()
    return Trainer(
        linear_model(),
        arguments(folder, **(defaults | changes)),
        train_dataset=data,
        eval_dataset=data,
        loss="mse",
        callbacks=list(callbacks),
    )


def outcome(trainer):
    """The weights bit for bit, and the log."""
    return (
        [w.tobytes() for w in weights(trainer.model)],
        without_timings(trainer.state.log_history[:-1]),
    )


class Send(TrainerCallback):
    """Sends signals to this process at the end of a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def python_handles_sigint():
    """As in a terminal: a program that is started in the background has SIGINT ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def handlers():
    return [signal.getsignal(number) for number in stop_signals.SIGNALS]


def saved_steps(folder):
    return [step for step, _ in CheckpointStore(folder).list()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.fit()
    return outcome(trainer)


@pytest.mark.core
@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGTERM, TrainingInterrupted, 143),
        (signal.SIGUSR1, TrainingInterrupted, 138),
        (signal.SIGINT, KeyboardInterrupt, None),
    ],
)
def test_a_signal_saves_stops_and_the_run_goes_on_exactly(
    tmp_path, whole, caplog, number, error, code
):
    before = handlers()
    trainer = make_trainer(tmp_path, [Send(5, number)])
    with pytest.raises(error, match="step 5.*checkpoint-5") as caught:
        trainer.fit()
    assert getattr(caught.value, "code", None) == code
    assert handlers() == before
    assert trainer.interruption == number.name
    assert f"{number.name}: saving at step 5 of 12" in caplog.text
    assert saved_steps(tmp_path) == [5]
    again = make_trainer(tmp_path)
    again.fit(resume_from_checkpoint=True)
    assert again.interruption is None
    assert outcome(again) == whole


def test_what_the_exception_tells(tmp_path):
    trainer = make_trainer(tmp_path, [Send(2, signal.SIGTERM)])
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.fit()
    assert caught.value.signal is signal.SIGTERM
    assert (caught.value.step, caught.value.checkpoint) == (2, tmp_path / "checkpoint-2")


def test_the_last_step_of_an_epoch_leaves_its_end_to_the_resumed_run(tmp_path, whole):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [Send(8, signal.SIGTERM), recorder])
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    assert recorder.events.count("on_epoch_end") == 1  # of the first epoch
    assert recorder.events[-1] == "on_train_end"
    again = make_trainer(tmp_path)
    again.fit(resume_from_checkpoint=True)
    assert outcome(again) == whole


@pytest.mark.parametrize("before", [(), (signal.SIGTERM,), (signal.SIGUSR1,)], ids=str)
def test_a_second_sigint_stops_at_once(tmp_path, before):
    send = Send(3, *before, signal.SIGINT, signal.SIGINT)
    trainer = make_trainer(tmp_path, [send])
    former = handlers()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert handlers() == former
    assert saved_steps(tmp_path) == []
    assert not trainer.is_in_train


@pytest.mark.parametrize(
    "later",
    [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)],
    ids=str,
)
def test_sigterm_and_more_is_sigterm(tmp_path, later):
    """One SIGINT behind a SIGTERM is no second SIGINT: the step ends and is saved."""
    trainer = make_trainer(tmp_path, [Send(3, signal.SIGTERM, *later)])
    with pytest.raises(TrainingInterrupted, match="SIGTERM"):
        trainer.fit()
    assert saved_steps(tmp_path) == [3]


def test_nothing_is_saved_where_nothing_is_to_be_saved(tmp_path, caplog):
    # A message of the loop, for the log alone where the signal was answered at once.
    settings = {"save_strategy": "no", "log_level": "info"}
    trainer = make_trainer(tmp_path, [Send(3, signal.SIGTERM)], **settings)
    with pytest.raises(TrainingInterrupted, match="newest checkpoint: None"):
        trainer.fit()
    assert list(tmp_path.iterdir()) == []
    assert "not saving (save_strategy='no')" in caplog.text


def test_a_signal_at_the_very_end_lets_the_run_end_and_the_program_too(tmp_path, whole):
    trainer = make_trainer(tmp_path, [Send(12, signal.SIGTERM)])
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    assert trainer.interruption is None
    assert outcome(trainer) == whole


def test_without_the_switch_nothing_is_handled(tmp_path):
    seen = []
    watch = [Recorder({"on_step_end": lambda *rest: seen.append(handlers())})]
    before = handlers()
    make_trainer(tmp_path, watch, enable_jit_checkpoint=False, num_train_epochs=1).fit()
    assert seen[0] == before


def test_a_handler_of_the_program_is_left_in_place(tmp_path):
    heard = []
    former = signal.signal(signal.SIGUSR1, lambda *rest: heard.append("ours"))
    try:
        trainer = make_trainer(tmp_path, [Send(3, signal.SIGUSR1)])
        trainer.fit()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert heard == ["ours"]
    assert trainer.state.global_step == 12


def test_another_thread_trains_with_a_warning_and_without_handlers(tmp_path, caplog):
    before, done = handlers(), []

    def train():
        trainer = make_trainer(tmp_path, [StopAt(2)])
        done.append(trainer.fit().global_step)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert done == [2]
    assert handlers() == before
    assert "not run in the main thread" in caplog.text


def test_handlers_are_restored_after_an_error(tmp_path):
    def fail(*rest):
        raise ZeroDivisionError

    before = handlers()
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, [Recorder({"on_step_end": fail})]).fit()
    assert handlers() == before


# --- during an evaluation -------------------------------------------------------------------------


class SendInEvaluation(TrainerCallback):
    """Sends a signal in the middle of an evaluation; counts the batches of all of them."""

    def __init__(self, step, number=signal.SIGTERM, at_batch=2):
        self.step, self.number, self.at_batch, self.seen = step, number, at_batch, {}

    def on_prediction_step(self, args, state, control, **kwargs):
        done = self.seen[state.global_step] = self.seen.get(state.global_step, 0) + 1
        if (state.global_step, done) == (self.step, self.at_batch):
            os.kill(os.getpid(), self.number)


class Noisy:
    """An evaluation set that draws from NumPy's global generator."""

    def __init__(self):
        self.x, self.y = make_data(8, seed=5)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.x[index] + np.float32(np.random.normal()), self.y[index]


EVALUATING = {
    "per_device_eval_batch_size": 1,
    "metric_for_best_model": "first_loss",
    "load_best_model_at_end": True,
    "report_to": "json",
}
WITH_STEPS = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
WITH_EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}


def evaluating(folder, callbacks, **changes):
    trainer = make_trainer(
        folder, [EarlyStoppingCallback(50), *callbacks], **(EVALUATING | changes)
    )
    trainer.eval_dataset = {"first": Noisy(), "second": Noisy()}
    return trainer


def story(trainer):
    """All that a run leaves behind, also in its log file."""
    log = (Path(trainer.args.output_dir) / "log.jsonl").read_text().splitlines()
    state = trainer.state
    return (
        outcome(trainer),
        without_timings([json.loads(line) for line in log])[:-1],
        (state.best_metric, state.best_global_step, trainer.callback_handler.state()),
        [step for step, _ in trainer.store.list()],
        np.random.random(),
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The uninterrupted runs: by steps and by epochs."""

    def run(name, changes):
        trainer = evaluating(tmp_path_factory.mktemp(name), [], **changes)
        trainer.fit()
        return story(trainer)

    return {"steps": run("steps", WITH_STEPS), "epochs": run("epochs", WITH_EPOCHS)}


@pytest.mark.parametrize("batch", [2, 11], ids=["first set", "second set"])
@pytest.mark.parametrize(
    ("strategy", "step"), [("steps", 5), ("steps", 12), ("epochs", 4), ("epochs", 12)]
)
def test_an_evaluation_is_left_at_once_and_made_up_for(
    tmp_path, evaluated, caplog, strategy, step, batch
):
    changes = WITH_STEPS if strategy == "steps" else WITH_EPOCHS
    send = SendInEvaluation(step, at_batch=batch)
    with pytest.raises(TrainingInterrupted, match=f"step {step}.*checkpoint-{step}"):
        evaluating(tmp_path, [send], **changes).fit()
    assert send.seen[step] == batch
    assert f"The evaluation of step {step} is postponed to the resumed run" in caplog.text
    assert saved_steps(tmp_path)[-1] == step
    again = evaluating(tmp_path, [], **changes)
    again.fit(resume_from_checkpoint=True)
    assert story(again) == evaluated[strategy]


def test_an_evaluation_may_be_left_again_and_again(tmp_path, evaluated):
    for batch in (1, 2, 3):
        with pytest.raises(TrainingInterrupted):
            evaluating(tmp_path, [SendInEvaluation(5, at_batch=batch)], **WITH_STEPS).fit("auto")
    again = evaluating(tmp_path, [], **WITH_STEPS)
    again.fit(resume_from_checkpoint=True)
    assert story(again) == evaluated["steps"]


def test_a_run_that_evaluates_no_more_goes_on_without(tmp_path):
    with pytest.raises(TrainingInterrupted):
        evaluating(tmp_path, [SendInEvaluation(5)], **WITH_STEPS).fit()
    again = make_trainer(tmp_path)
    again.eval_dataset = None
    assert again.fit(resume_from_checkpoint=True).global_step == 12


def test_a_signal_in_a_step_does_not_wait_for_the_evaluation_behind_it(tmp_path, evaluated):
    counter = SendInEvaluation(-1)
    with pytest.raises(TrainingInterrupted):
        evaluating(tmp_path, [Send(5, signal.SIGTERM), counter], **WITH_STEPS).fit()
    assert counter.seen == {}
    again = evaluating(tmp_path, [], **WITH_STEPS)
    again.fit(resume_from_checkpoint=True)
    assert story(again) == evaluated["steps"]


def test_a_signal_in_the_evaluation_before_the_first_step(tmp_path):
    send = SendInEvaluation(0, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 0"):
        evaluating(tmp_path, [send], eval_on_start=True, **WITH_STEPS).fit()
    assert send.seen == {0: 2}
    assert saved_steps(tmp_path) == []


def test_max_time_does_not_wait_for_an_evaluation_either(tmp_path, clock, evaluated):
    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            clock[0] += 1.0

    trainer = evaluating(tmp_path, [Slow()], max_time=10, **WITH_STEPS)
    trainer.saver.longest = 0.5
    output = trainer.fit()
    assert (output.global_step, trainer.interruption) == (5, "max_time")
    again = evaluating(tmp_path, [], **WITH_STEPS)
    again.fit(resume_from_checkpoint=True)
    assert story(again)[0] == evaluated["steps"][0]


def test_an_evaluation_of_the_users_own_is_not_left(tmp_path):
    """Between two steps, in a callback: what would come back to the middle of it?"""
    results = []
    send = SendInEvaluation(3)

    def evaluate(args, state, control, kwargs):
        if state.global_step == 3:
            results.append(kwargs["trainer"].evaluate(make_data(4), None, "mine"))

    trainer = make_trainer(
        tmp_path, [Recorder({"on_step_end": evaluate}), send], per_device_eval_batch_size=1
    )
    with pytest.raises(TrainingInterrupted, match="step 3"):
        trainer.fit()
    assert "mine_loss" in results[0]
    assert send.seen == {3: 4}


# --- max_time -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it."""
    now = [1000.0]

    class Time:
        monotonic = perf_counter = staticmethod(lambda: now[0])

    monkeypatch.setattr(stop_signals, "time", Time)
    # How long a checkpoint takes decides when to stop.
    monkeypatch.setattr(async_checkpointer, "time", Time)
    return now


def tick(clock, seconds=1.0):
    def move(*rest):
        clock[0] += seconds

    return Recorder({"on_step_end": move})


@pytest.mark.core
def test_max_time_saves_and_returns_before_it_is_over(tmp_path, whole, clock):
    trainer = make_trainer(tmp_path, [tick(clock)], max_time="00:00:10")
    trainer.saver.longest = 1.5
    output = trainer.fit()
    # After 6 s: one second for another step and 2 x 1.5 s for checkpoints would just do.
    assert (output.global_step, trainer.interruption) == (6, "max_time")
    assert saved_steps(tmp_path) == [6]
    again = make_trainer(tmp_path)
    again.fit(resume_from_checkpoint=True)
    assert outcome(again) == whole


def test_before_the_first_checkpoint_a_tenth_of_the_time_is_kept(tmp_path, clock):
    trainer = make_trainer(tmp_path, [tick(clock)], max_time=10)
    assert trainer.fit().global_step == 8
    trainer = make_trainer(tmp_path, [tick(clock, 100)], max_time=1000)
    assert trainer.fit().global_step == 9  # of 30 s at most: 900 + 100 is the limit


def test_max_time_counts_from_the_beginning_of_each_fit(tmp_path, clock):
    trainer = make_trainer(tmp_path, [tick(clock)], max_time=20)
    for _ in range(2):
        trainer.fit()
        assert (trainer.interruption, trainer.state.global_step) == (None, 12)


def test_the_best_model_is_not_loaded_by_a_run_that_is_to_go_on(tmp_path, clock):
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, save_strategy="epoch", eval_strategy="epoch", num_train_epochs=20,
                  per_device_train_batch_size=4, load_best_model_at_end=True, max_time=10),
        train_dataset=make_data(), eval_dataset=make_data(), loss="mse", callbacks=[tick(clock)],
    )  # fmt: skip
    trainer.saver.longest = 0.0
    trainer.fit()
    assert (trainer.interruption, trainer.state.global_step) == ("max_time", 9)
    assert saved_steps(tmp_path) == [4, 8, 9]


# --- a real program -------------------------------------------------------------------------------

# What a shell does with three programs, but they share what takes longest, the imports.
PROGRAMS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
from test_stop_signals import Send, make_trainer

for number in map(int, sys.argv[2:]):
    program = os.fork()
    if program == 0:
        break
    print(number, os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]), flush=True)
else:
    sys.exit(0)
trainer = make_trainer(f"{sys.argv[1]}/{number}", [Send(5, number)])
trainer.fit(resume_from_checkpoint="auto")
print("the script went on")
"""


@pytest.mark.slow
@pytest.mark.neutral
def test_the_exit_code_of_a_program(tmp_path):
    codes = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: -signal.SIGINT}
    paths = os.pathsep.join([str(SUPPORT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS, str(tmp_path), *(str(int(number)) for number in codes)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [f"{int(number)} {int(code)}" for number, code in codes.items()]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]
    for number in codes:
        folder = tmp_path / str(int(number))
        assert saved_steps(folder) == [5]
        assert json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())


@pytest.mark.neutral
def test_a_stop_is_announced_once():
    said: list[str] = []
    with StopSignals(True, None, said.append) as signals:
        signal.raise_signal(signal.SIGTERM)
    assert said == ["SIGTERM: stopping after this update, saving."]
    assert signals.announce()
    with StopSignals(True, None, said.append) as signals:
        assert not signals.announce()
        signal.raise_signal(signal.SIGTERM)
    assert len(said) == 1
