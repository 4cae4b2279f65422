"""What is checked before a run that is to push, and pushes of presets."""

import json
import sys
import types
from pathlib import Path

import keras
import pytest
from helpers import arguments, linear_model, make_data
from hub_server import TOKEN

from kbtrain import Trainer, TrainingArguments
from kbtrain.errors import ConfigurationError, HubError
from kbtrain.hub.staging import files_of_run, set_aside

pytestmark = [
    pytest.mark.neutral,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

X, Y = make_data(8)


class PresetModel(keras.Sequential):
    """A model that saves presets as those of KerasHub do."""

    def save_to_preset(self, folder):
        with open(f"{folder}/config.json", "w") as file:
            file.write('{"registered_name": "PresetModel"}')


def trainer_in(folder, model=None, **changes):
    settings = {"push_to_hub": True, "hub_token": TOKEN, "max_steps": 1, **changes}
    args = arguments(folder, **settings)
    return Trainer(model or linear_model(), args, train_dataset=(X, Y), loss="mse")


def preset_model():
    return PresetModel([keras.Input((3,)), keras.layers.Dense(1)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hub_token": None}, "needs a token with write access.*hf auth login.*HF_TOKEN"),
        ({"hub_model_id": "a/b/c"}, "hub_model_id must be 'user/name'.*'a/b/c'"),
        ({"hub_model_id": "my model"}, "hub_model_id must be"),
        ({"hub_model_id": "kaggle://ada"}, "kaggle://user/model/keras/variation"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(hub, tmp_path, changes, said):
    with pytest.raises(ConfigurationError, match=said):
        trainer_in(tmp_path / "run", **changes)
    assert hub.requests == []


def test_a_folder_whose_name_is_no_name_of_a_repository(hub, tmp_path):
    with pytest.raises(ConfigurationError, match="by default the name of output_dir"):
        trainer_in(tmp_path / "run 7 (new)")


@pytest.mark.parametrize(
    ("package", "changes", "extra"),
    [
        ("huggingface_hub", {}, "hub"),
        ("kagglehub", {"hub_model_id": "kaggle://a/b/keras/c", "hub_strategy": "end"}, "kaggle"),
    ],
)
def test_a_package_that_is_missing(hub, tmp_path, monkeypatch, package, changes, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"needs the package.*kbtrain\[{extra}\]"):
        trainer_in(tmp_path / "run", **changes)


def test_without_push_to_hub_nothing_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert trainer_in(tmp_path, push_to_hub=False).pusher is None


def test_the_token_is_not_part_of_what_is_saved_and_shown():
    args = TrainingArguments(hub_token=TOKEN)
    assert args.hub_token == TOKEN
    assert args.replace(seed=1).hub_token == TOKEN
    for shown in (repr(args), args.to_json_string(), str(args.changed()), args._repr_html_()):
        assert TOKEN not in shown
    assert args.to_dict()["hub_token"] == "<HUB_TOKEN>"
    assert TrainingArguments.from_dict(args.to_dict()).hub_token is None
    with pytest.raises(ConfigurationError, match="Received: hub_token=<HUB_TOKEN>"):
        TrainingArguments(hub_token=[TOKEN])


def test_files_of_a_run_that_are_pushed(tmp_path):
    pushed = ["logs/a.csv", "model.keras", "run-0/notes"]
    left_out = ["_draft.txt", ".hidden/x", "checkpoint-3/manifest.json", "last-checkpoint/rng.h5"]
    names = [*pushed, *left_out, "run-0/checkpoint-5/rng.h5", "run.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [name for name, _ in files_of_run(tmp_path)] == pushed


@pytest.mark.parametrize("given", [".", "..", "clone"])
def test_a_folder_that_is_not_the_runs_own_is_refused(hub, tmp_path, monkeypatch, given):
    here = tmp_path / "project" / "scripts"
    (here / "clone" / ".git").mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(ConfigurationError, match="takes all files of output_dir.*of its own"):
        trainer_in(given, hub_model_id="ada/digits")
    with pytest.raises(ConfigurationError, match="takes all files of output_dir"):
        trainer_in(given, hub_model_id="ada/digits", push_to_hub=False).push_to_hub()


def test_folders_of_this_machine_stay_here(hub, tmp_path):
    """But for those of a checkpoint, which has checksums, and of the report, which shows them."""
    changes = {"save_strategy": "steps", "save_steps": 1, "report_to": ["html", "csv"]}
    trainer = trainer_in(tmp_path / "run", hub_strategy="checkpoint", **changes)
    trainer.fit()
    trainer.push_to_hub()
    files = hub.files("ada/run")
    assert json.loads(files["training_args.json"])["output_dir"] == "run"
    told = sorted(name for name, content in files.items() if str(tmp_path).encode() in content)
    assert told == ["last-checkpoint/training_args.json", "report.html"]
    here = TrainingArguments.from_json_file(tmp_path / "run" / "training_args.json")
    assert here.output_dir == str(tmp_path / "run")


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").write_text("content")
    set_aside(tmp_path / "a", tmp_path / "folder" / "b", unchanging=True)
    assert (tmp_path / "folder" / "b").read_text() == "content"


# --- presets -------------------------------------------------------------------------------------


def test_a_preset_on_the_hugging_face_hub(hub, tmp_path):
    trainer = trainer_in(
        tmp_path / "run", preset_model(), hub_model_id="hf://ada/bert", save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    trainer.fit()
    files = hub.files("ada/bert")
    assert "config.json" in files
    assert "model.keras" not in files
    card = files["README.md"].decode()
    assert 'keras_hub.models.PresetModel.from_preset("hf://ada/bert")' in card


@pytest.fixture
def kaggle(monkeypatch):
    """Stand-ins of the two packages; the preset that was uploaded is kept."""
    uploaded = []

    def upload_preset(uri, preset):
        if "broken" in uri:
            raise RuntimeError("503")
        uploaded.append((uri, sorted(path.name for path in Path(preset).iterdir())))

    monkeypatch.setitem(sys.modules, "kagglehub", types.ModuleType("kagglehub"))
    keras_hub = types.ModuleType("keras_hub")
    keras_hub.upload_preset = upload_preset
    monkeypatch.setitem(sys.modules, "keras_hub", keras_hub)
    return uploaded


def test_a_preset_on_kaggle(kaggle, tmp_path):
    uri = "kaggle://ada/bert/keras/tiny"
    trainer = trainer_in(tmp_path / "run", preset_model(), hub_model_id=uri, hub_strategy="end")
    trainer.fit()
    ((address, names),) = kaggle
    assert address == uri
    assert {"README.md", "config.json"} <= set(names)
    assert "model.keras" not in names


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (linear_model, {}, "asks for a KerasHub preset, and Sequential has no save_to_preset"),
        (preset_model, {"hub_strategy": "every_save"}, "set hub_strategy='end'"),
    ],
)
def test_a_preset_that_cannot_be_pushed(kaggle, tmp_path, model, changes, said):
    settings = {"hub_model_id": "kaggle://ada/bert/keras/tiny", "hub_strategy": "end", **changes}
    trainer = trainer_in(tmp_path / "run", model(), **settings)
    with pytest.raises(ConfigurationError, match=said):
        trainer.fit()
    assert trainer.state.global_step == 0


def test_kaggle_fails(kaggle, tmp_path):
    uri = "kaggle://ada/bert/keras/broken"
    trainer = trainer_in(tmp_path / "run", preset_model(), hub_model_id=uri, push_to_hub=False)
    with pytest.raises(HubError, match="Could not upload to kaggle://ada/bert/keras/broken.*503"):
        trainer.push_to_hub()
