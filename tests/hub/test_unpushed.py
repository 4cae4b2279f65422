"""Checkpoints whose push failed or was skipped are pushed later; a silent Hub ends no run."""

import json
import logging
import threading

import pytest
from helpers import arguments, linear_model, make_data
from hub_server import TOKEN

from kbtrain import Trainer, TrainerCallback
from kbtrain.errors import HubError
from kbtrain.hub.unpushed import UnpushedCheckpoints

pytestmark = [
    pytest.mark.neutral,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

X, Y = make_data(16)
RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 4}
PUSHED = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "ada/digits"}


def trainer_in(folder, callbacks=(), **changes):
    args = arguments(folder, **{**RUN, **PUSHED, **changes})
    return Trainer(
        linear_model(), args, train_dataset=(X, Y), loss="mse", callbacks=list(callbacks)
    )


class SlowSteps(TrainerCallback):
    """Waits after a step until its push is over."""

    def on_step_end(self, args, state, control, trainer, **kwargs):
        trainer.saver.settle()
        assert trainer.pusher._uploads.wait(60)


class OpenAtEnd(TrainerCallback):
    def __init__(self, gate):
        self.gate = gate

    def on_train_end(self, args, state, control, **kwargs):
        self.gate.set()


def checkpoints(files):
    """Folder of the repository -> step of the checkpoint in it."""
    return {
        name.partition("/")[0]: json.loads(content)["global_step"]
        for name, content in files.items()
        if name.endswith("/trainer_state.json")
    }


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("failing", [2, 6])
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("checkpoint", {"last-checkpoint": 6}),
        ("all_checkpoints", {"checkpoint-2": 2, "checkpoint-4": 4, "checkpoint-6": 6}),
    ],
)
def test_a_push_that_failed_is_made_up_for(hub, tmp_path, caplog, strategy, expected, failing):
    hub.fail("/commit/", *[403 if step == failing else None for step in (2, 4, 6)])
    trainer = trainer_in(tmp_path / "run", [SlowSteps()], hub_strategy=strategy)
    with caplog.at_level(logging.INFO, "kbtrain"):
        trainer.fit()
    assert checkpoints(hub.files("ada/digits")) == expected
    assert len(warnings_of(caplog)) == 1
    assert "1 pushes to ada/digits failed, a later one did not." in caplog.text
    sent = [path for *_, paths, _ in hub.commits for path in paths if "/manifest.json" in path]
    assert len(sent) == (3 if strategy == "all_checkpoints" or failing == 6 else 2), "each once"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("checkpoint", {"last-checkpoint": 6}),
        ("all_checkpoints", {"checkpoint-2": 2, "checkpoint-4": 4, "checkpoint-6": 6}),
    ],
)
@pytest.mark.parametrize("fault", [None, 403])
def test_pushes_that_were_skipped_are_made_up_for(hub, tmp_path, strategy, expected, fault):
    """The one that was under way meanwhile may fail as well."""
    gate = threading.Event()
    hub.fail("/preupload/", gate)
    hub.fail("/commit/", fault)
    trainer_in(tmp_path / "run", [OpenAtEnd(gate)], hub_strategy=strategy).fit()
    assert [message for _, _, message, _, _ in hub.commits][-1] == "End of training"
    assert len(hub.commits) == (1 if fault else 2)
    assert checkpoints(hub.files("ada/digits")) == expected


def test_a_model_that_cannot_be_saved_for_a_push_costs_no_checkpoint(hub, tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path / "run", [SlowSteps()], hub_strategy="all_checkpoints")
    save = trainer.pusher._save_model

    def broken(trainer, folder):
        if folder.name == "step-4":
            raise OSError(28, "No space left on device")
        return save(trainer, folder)

    monkeypatch.setattr(trainer.pusher, "_save_model", broken)
    trainer.fit()
    assert set(checkpoints(hub.files("ada/digits"))) == {f"checkpoint-{n}" for n in (2, 4, 6)}
    assert len(hub.commits) == 3


def test_what_never_arrives_is_named_and_a_push_by_hand_has_it(hub, tmp_path, caplog):
    hub.fail("/commit/", None, *[403] * 3)
    trainer = trainer_in(
        tmp_path / "run", [SlowSteps()], hub_strategy="all_checkpoints", save_total_limit=1
    )
    trainer.fit()
    last = warnings_of(caplog)[-1]
    assert "ada/digits on the Hub is not up to date (failures: 3)" in last
    assert "Not pushed: checkpoint-6. Everything is in" in last, "checkpoint-4 was deleted"
    assert trainer.push_to_hub("Elsewhere", revision="main") is not None
    assert set(checkpoints(hub.files("ada/digits"))) == {"checkpoint-2"}
    trainer.push_to_hub("Again")
    assert checkpoints(hub.files("ada/digits")) == {"checkpoint-2": 2, "checkpoint-6": 6}


def test_only_the_newest_of_a_folder_is_missing(tmp_path):
    two, four, six = (tmp_path / f"checkpoint-{step}" for step in (2, 4, 6))
    for path in (four, six):
        path.mkdir()
    unpushed = UnpushedCheckpoints()
    unpushed.add({"last-checkpoint": six})
    unpushed.add({"last-checkpoint": four})  # its push was under way when that of 6 was skipped
    unpushed.add({"checkpoint-2": two})  # deleted
    assert unpushed.names() == ["checkpoint-6"]
    unpushed.remove({"last-checkpoint": four})
    assert unpushed.names() == ["checkpoint-6"]
    assert unpushed.set_aside(tmp_path, {"last-checkpoint": four}) == {}
    unpushed.remove({"last-checkpoint": six})
    assert unpushed.names() == []


# --- a Hub that does not answer -------------------------------------------------------------------


@pytest.mark.parametrize("request_", ["/commit/", "/repos/create"])
def test_a_run_ends_although_the_hub_is_silent(hub, tmp_path, caplog, monkeypatch, request_):
    gate = threading.Event()
    hub.fail(request_, *[gate] * 1000)
    monkeypatch.setattr("kbtrain.hub.pusher.ANSWERS_WITHIN", 0.1)
    monkeypatch.setattr("kbtrain.hub.pusher.PATIENCE", 0.1)
    trainer = trainer_in(tmp_path / "run", hub_strategy="end", max_steps=1)
    trainer.fit()
    assert "It takes too long." in warnings_of(caplog)[-1]
    with pytest.raises(HubError, match=r"ada/digits on the Hub: no answer within 0 s\. Everything"):
        trainer.push_to_hub()
    trainer.save_model()  # also pushes; it is saved all the same
    assert "The model is saved, but was not pushed." in warnings_of(caplog)[-1]
    gate.set()
    assert trainer.pusher._uploads.wait(60)
