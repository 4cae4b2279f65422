"""The state of callbacks in a checkpoint, and what a handler gathers."""

import json

from helpers import arguments
from helpers_callbacks import make_trainer

from kbtrain import (
    TrainerCallback,
    TrainerControl,
)
from kbtrain.callbacks.handler import CallbackHandler
from kbtrain.callbacks.state import TrainerState


class Counting(TrainerCallback):
    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"]


def test_states_are_saved_and_restored_one_by_one(tmp_path):
    first, second = Counting(), Counting()
    second.count = 100
    trainer = make_trainer(tmp_path, [first, second], save_strategy="steps", save_steps=3)
    trainer.fit()
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["Counting"] == [{"count": 3}, {"count": 103}]
    first, second = Counting(), Counting()
    make_trainer(tmp_path, [first, second]).fit(str(tmp_path / "checkpoint-3"))
    assert (first.count, second.count) == (4, 104)


def test_states_can_be_left_alone(tmp_path):
    make_trainer(tmp_path, [Counting()], save_strategy="steps", save_steps=3).fit()
    counting = Counting()
    make_trainer(tmp_path, [counting], restore_callback_states_from_checkpoint=False).fit(
        str(tmp_path / "checkpoint-3")
    )
    assert counting.count == 1


def test_a_state_without_its_callback_is_reported(tmp_path, caplog):
    make_trainer(tmp_path, [Counting()], save_strategy="steps", save_steps=3).fit()
    make_trainer(tmp_path).fit(str(tmp_path / "checkpoint-3"))
    assert "Counting, which this run does not use" in caplog.text


def test_an_attribute_called_state_is_no_state(tmp_path):
    class Keeper(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.state = state

    make_trainer(tmp_path, [Keeper], save_strategy="steps", save_steps=4).fit()
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_handler_without_listeners_does_not_gather_arguments():
    def explode():
        raise AssertionError("nobody listens")

    handler = CallbackHandler([TrainerCallback()], explode)
    control = TrainerControl()
    args = arguments("unused")
    assert handler.fire("on_step_end", args, TrainerState(), control) is control
