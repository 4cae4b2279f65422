"""A run that pushes: what arrives, when, under which names, and that it can be used from there."""

import functools
import json
import logging
import re
import signal
import threading

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, same, weights
from hub_server import TOKEN
from paths import ROOT

from kbtrain import Trainer, TrainerCallback, TrainingArguments
from kbtrain.errors import ConfigurationError, HubError, TrainingInterrupted

# huggingface_hub 2.4 passes bytes in a way that its own package for requests warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

X, Y = make_data(16)
RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
PUSHED = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "ada/digits"}


def trainer_in(folder, seed=0, callbacks=(), **changes):
    args = arguments(folder, **{**RUN, **PUSHED, **changes})
    model = linear_model(seed=seed)
    return Trainer(model, args, train_dataset=(X, Y), loss="mse", callbacks=list(callbacks))


def messages(hub):
    return [message for _, _, message, _, _ in hub.commits]


def loaded(files, folder, name="model.keras"):
    path = folder / "downloaded.keras"
    path.write_bytes(files[name])
    return keras.models.load_model(path)


def is_private(asked):
    """Whether a request asks for a private repository, in the words of either version."""
    return asked.get("visibility") == "private" or asked.get("private") is True


class SlowSteps(TrainerCallback):
    """Waits after a step until a push is over, as in a run that is slower than its pushes."""

    def on_step_end(self, args, state, control, trainer, **kwargs):
        trainer.saver.settle()
        assert trainer.pusher._uploads.wait(60)


@pytest.mark.core
def test_a_run_is_pushed_and_what_arrives_is_the_model(hub, tmp_path):
    trainer = trainer_in(tmp_path / "run", callbacks=[SlowSteps()])
    trainer.fit()
    assert messages(hub) == [
        *("Training in progress, step 2", "Training in progress, step 4", "End of training")
    ]
    files = hub.files("ada/digits")
    # A plot of the losses is there where matplotlib is installed.
    assert files.keys() - {"loss.png"} == {"README.md", "model.keras", "training_args.json"}
    model = loaded(files, tmp_path)
    np.testing.assert_array_equal(model.predict(X, verbose=0), trainer.predict(X).predictions)
    card = files["README.md"].decode()
    assert 'load_model(hf_hub_download("ada/digits", "model.keras"))' in card
    assert not (tmp_path / "run" / ".hub").exists()


def test_the_model_of_a_push_is_that_of_its_checkpoint(hub, tmp_path):
    """Also while the run goes on: it is set aside before the next update."""
    gate = threading.Event()
    hub.fail("/commit/", gate)
    trainer = trainer_in(tmp_path / "run", hub_always_push=True, save_total_limit=1)

    class Open(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            gate.set()

    trainer.add_callback(Open())
    states = []
    commit = trainer.pusher.repository._api.create_commit

    def noted(*args, **kwargs):
        info = commit(*args, **kwargs)
        states.append(dict(hub.files("ada/digits")))
        return info

    trainer.pusher.repository._api.create_commit = noted
    trainer.fit()
    plain = trainer_in(
        tmp_path / "plain", push_to_hub=False, max_steps=2, lr_scheduler_type="linear"
    )
    plain.args = plain.args.replace(max_steps=4)
    plain.add_callback(StopAfter(2))
    plain.fit()
    assert same(weights(loaded(states[0], tmp_path)), weights(plain.model))
    assert same(weights(loaded(states[1], tmp_path)), weights(trainer.model))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    ("strategy", "expected", "folders"),
    [
        ("end", ["End of training"], set()),
        ("checkpoint", None, {"last-checkpoint"}),
        ("all_checkpoints", None, {"checkpoint-2", "checkpoint-4"}),
    ],
)
@pytest.mark.neutral
def test_the_strategy_says_what_is_pushed(hub, tmp_path, strategy, expected, folders):
    changes = {"hub_strategy": strategy, "hub_always_push": True, "save_total_limit": 1}
    trainer = trainer_in(tmp_path / "run", **changes)
    trainer.fit()
    steps = [f"Training in progress, step {step}" for step in (2, 4)]
    assert messages(hub) == (expected or [*steps, "End of training"])
    found = {path.split("/")[0] for path in hub.files("ada/digits") if "/" in path}
    assert found == folders
    for folder in folders:
        assert f"{folder}/manifest.json" in hub.files("ada/digits")


@pytest.mark.neutral
def test_a_push_is_skipped_while_one_is_running_and_the_end_makes_up_for_it(hub, tmp_path):
    gate = threading.Event()
    hub.fail("/commit/", gate)

    class Open(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            gate.set()

    trainer = trainer_in(tmp_path / "run", callbacks=[Open()], hub_strategy="checkpoint")
    trainer.fit()
    assert messages(hub) == ["Training in progress, step 2", "End of training"]
    state = json.loads(hub.files("ada/digits")["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 4


@pytest.mark.neutral
def test_a_run_resumes_from_the_last_checkpoint_of_the_repository(hub, tmp_path):
    whole = trainer_in(tmp_path / "whole", push_to_hub=False, max_steps=6)
    whole.fit()
    first = trainer_in(tmp_path / "a", hub_strategy="checkpoint", max_steps=6)
    first.add_callback(StopAfter(4))
    first.fit()
    again = trainer_in(tmp_path / "b", seed=1, hub_strategy="checkpoint", max_steps=6)
    again.fit(resume_from_checkpoint="last-checkpoint")
    assert again.resumed_from == tmp_path / "b" / "last-checkpoint"
    assert same(weights(again.model), weights(whole.model))


@pytest.mark.neutral
def test_files_of_an_earlier_checkpoint_do_not_stay_in_the_folder(hub, tmp_path):
    hub.repositories["ada/digits"] = {"main": {"last-checkpoint/old.h5": b"1", "other/x": b"2"}}
    trainer_in(tmp_path / "run", hub_strategy="checkpoint", hub_always_push=True).fit()
    files = hub.files("ada/digits")
    assert "last-checkpoint/old.h5" not in files
    assert files["other/x"] == b"2"


@pytest.mark.neutral
def test_resuming_from_a_repository_without_a_checkpoint(hub, tmp_path):
    trainer = trainer_in(tmp_path / "run")
    with pytest.raises(HubError, match="ada/digits on the Hub has no folder last-checkpoint"):
        trainer.fit(resume_from_checkpoint="last-checkpoint")


@pytest.mark.neutral
def test_a_run_whose_folder_is_an_address(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address = f"memory://{tmp_path.name}/digits"
    settings = {**RUN, **PUSHED, "hub_strategy": "checkpoint", "hub_always_push": True}
    args = TrainingArguments(address, disable_tqdm=True, **{**settings, "hub_model_id": None})
    trainer = Trainer(linear_model(), args, train_dataset=(X, Y), loss="mse")
    trainer.fit()
    files = hub.files("ada/digits")
    assert same(weights(loaded(files, tmp_path)), weights(trainer.model))
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 4


@pytest.mark.neutral
def test_the_programs_of_the_page(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text = (ROOT / "docs" / "hub.md").read_text("utf-8")
    first, download, push, resume = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    quiet = functools.partial(TrainingArguments, disable_tqdm=True, num_train_epochs=1)
    names = {"Trainer": Trainer, "TrainingArguments": quiet, "x": X, "y": Y}
    names["model"] = linear_model()
    exec(first, names)
    exec(download, names)
    assert same(weights(names["model"]), weights(names["trainer"].model))
    exec(push, names)
    assert hub.files("ada/digits")["README.md"].decode().count("MNIST") == 1
    names["trainer"].args = names["trainer"].args.replace(num_train_epochs=2)
    exec(resume, names)
    assert names["trainer"].state.epoch == 2


@pytest.mark.neutral
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_waits_for_its_last_push(hub, tmp_path, sent):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                signal.raise_signal(sent)

    gate = threading.Event()
    hub.fail("/commit/", gate)
    changes = {"hub_strategy": "checkpoint", "save_steps": 3, "max_steps": 9}
    trainer = trainer_in(tmp_path / "run", callbacks=[Stop()], **changes)
    close = trainer.pusher.close

    def opened(waits):
        gate.set()  # only now can a push be over
        close(waits)

    trainer.pusher.close = opened
    with pytest.raises((TrainingInterrupted, KeyboardInterrupt)):
        trainer.fit()
    assert messages(hub) == ["Training in progress, step 3"]
    assert "last-checkpoint/manifest.json" in hub.files("ada/digits")
    assert not (tmp_path / "run" / ".hub").exists()


# --- trainer.push_to_hub and save_model ----------------------------------------------------------


@pytest.mark.neutral
def test_push_to_hub_without_the_argument(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    args = arguments(tmp_path / "my-model")
    trainer = Trainer(linear_model(), args, train_dataset=(X, Y), loss="mse")
    events = []

    class Noted(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            events.append("push")

    trainer.add_callback(Noted())
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "_private.txt").write_text("no")
    (tmp_path / "my-model" / "notes").mkdir()
    (tmp_path / "my-model" / "notes" / "a.txt").write_text("yes")
    info = trainer.push_to_hub("First", private=True, tags="digits", license="mit")
    assert info.commit_message == "First"
    assert events == ["push"]
    assert hub.created[0]["name"] == "my-model"
    assert is_private(hub.created[0])
    files = hub.files("ada/my-model")
    assert sorted(files) == ["README.md", "model.keras", "notes/a.txt", "training_args.json"]
    card = files["README.md"].decode()
    assert 'license: "mit"' in card
    assert '- "digits"' in card
    assert "ada/my-model" in card
    trainer.save_model()
    assert messages(hub) == ["First"], "save_model pushes only with args.push_to_hub"


@pytest.mark.neutral
def test_save_model_pushes_with_the_argument_and_in_the_background_on_request(hub, tmp_path):
    trainer = trainer_in(tmp_path / "run", hub_revision="trial", hub_private_repo=True)
    trainer.save_model(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "model.keras").exists()
    assert is_private(hub.created[0])
    future = trainer.push_to_hub("Later", blocking=False, revision="other")
    assert future.result(60).commit_message == "Later"
    assert [(branch, message) for _, branch, message, _, _ in hub.commits] == [
        *(("trial", "Model save"), ("other", "Later"))
    ]


@pytest.mark.neutral
def test_a_save_model_of_a_subclass_is_used(hub, tmp_path):
    class Own(Trainer):
        def save_model(self, output_dir=None):
            path = super().save_model(output_dir)
            path.with_name("vocabulary.txt").write_text("a b c")
            return path

    args = arguments(tmp_path / "run", **PUSHED)
    Own(linear_model(), args, train_dataset=(X, Y), loss="mse").push_to_hub()
    assert hub.files("ada/digits")["vocabulary.txt"] == b"a b c"
    assert messages(hub) == ["End of training"]


# --- failures ------------------------------------------------------------------------------------


def test_failures_do_not_end_a_run(hub, tmp_path, caplog):
    """All pushes but the last one fail: that has everything."""
    hub.fail("/commit/", *[500, "drop", (429, {"Retry-After": "0"})] * 2)
    trainer = trainer_in(tmp_path / "run", callbacks=[SlowSteps()])
    with caplog.at_level(logging.INFO, "kbtrain"):
        assert trainer.fit().global_step == 4
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "A push failed. Could not push to ada/digits on the Hub" in warned[0]
    assert "2 pushes to ada/digits failed, a later one did not." in caplog.text
    assert messages(hub) == ["End of training"]
    model = loaded(hub.files("ada/digits"), tmp_path)
    assert same(weights(model), weights(trainer.model))


@pytest.mark.neutral
@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_hub_that_is_down_all_the_time(hub, tmp_path, caplog, fault):
    hub.fail("/api/", *[fault] * 1000)
    trainer = trainer_in(tmp_path / "run")
    trainer.fit()
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert warned[0].startswith("Creating the repository failed. Could not reach ada/digits")
    assert warned[1].startswith("ada/digits on the Hub is not up to date (failures: ")
    assert f"Everything is in {tmp_path / 'run'}; trainer.push_to_hub() tries again." in warned[1]
    assert TOKEN not in caplog.text
    assert (tmp_path / "run" / "model.keras").exists()
    with pytest.raises(HubError, match="Could not reach ada/digits") as caught:
        trainer.push_to_hub()
    assert ("Check the network" in str(caught.value)) is (fault == "drop")
    hub.faults.clear()
    trainer.push_to_hub()
    assert same(weights(loaded(hub.files("ada/digits"), tmp_path)), weights(trainer.model))


@pytest.mark.neutral
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hub_token": "hf_wrong"}, "The Hub refuses to push to ada/digits: .*the token"),
        ({"hub_model_id": "forbidden/digits"}, "refuses to push to forbidden/digits"),
    ],
)
def test_what_the_hub_refuses_ends_the_run_before_training(hub, tmp_path, changes, said):
    trainer = trainer_in(tmp_path / "run", **changes)
    with pytest.raises(ConfigurationError, match=said) as caught:
        trainer.fit()
    assert "hf_wrong" not in str(caught.value)
    assert trainer.state.global_step == 0


@pytest.mark.neutral
def test_a_full_disk_costs_a_push_not_the_run(hub, tmp_path, caplog, monkeypatch):
    def full(source, target, unchanging=False):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kbtrain.hub.staging.set_aside", full)
    trainer = trainer_in(tmp_path / "run", hub_strategy="checkpoint")
    assert trainer.fit().global_step == 4
    assert "Setting checkpoint-2 aside for a push failed." in caplog.text
    assert "No space left on device" in caplog.text
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


# --- the token -----------------------------------------------------------------------------------


@pytest.mark.neutral
def test_the_token_is_in_no_file_and_no_log(hub, tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", f"--hub_token={TOKEN}", "--hub-token", TOKEN])
    hub.fail("/commit/", 400)  # the answer repeats the request's headers
    settings = {"hub_strategy": "checkpoint", "report_to": ["html", "csv"], "logging_steps": 1}
    with caplog.at_level(logging.DEBUG, "kbtrain"):
        trainer = trainer_in(tmp_path / "run", hub_always_push=True, **settings)
        trainer.fit()
    assert "<HUB_TOKEN>" in caplog.text
    print(trainer.args, trainer.args._repr_html_(), trainer.args.to_sanitized_dict())
    shown = capsys.readouterr()
    contents = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    contents += [*hub.files("ada/digits").values(), caplog.text.encode()]
    contents += [shown.out.encode(), shown.err.encode()]
    assert len(contents) > 20
    assert not any(TOKEN.encode() in content for content in contents)
