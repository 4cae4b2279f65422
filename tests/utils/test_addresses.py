"""Which text is an address, where it may stand, and the local folder that belongs to it."""

import os
import traceback
from pathlib import Path

import pytest
from helpers import arguments, linear_model, make_data

import kbtrain
from kbtrain import Trainer
from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.remote import files, open_store
from kbtrain.cli import checkpoint as cli
from kbtrain.errors import ConfigurationError
from kbtrain.utils.files.addresses import beneath, check_local, local_folder

pytestmark = pytest.mark.neutral

ADDRESSES = ["s3://b/run", "gs://b", "hf://u/r", "memory://x", "hdfs://n/x", "file:///x", "S3://b"]
MALFORMED = ["dbfs:/x", "simplecache::s3://b/r", Path("s3://b/run"), "s3://"]


@pytest.mark.parametrize("address", [*ADDRESSES, *MALFORMED], ids=str)
def test_an_address_is_no_path(address):
    with pytest.raises(ConfigurationError, match="must be a path in the file system"):
        CheckpointStore(address)


def test_what_takes_no_address_creates_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(linear_model(), arguments(tmp_path), train_dataset=make_data(), loss="mse")
    with pytest.raises(ConfigurationError, match="must be a path in the file system"):
        trainer.save_model("s3://b/run")
    with pytest.raises(ConfigurationError, match="pathlib.Path takes one away"):
        trainer.fit(resume_from_checkpoint=Path("s3://b/run"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("address", MALFORMED, ids=str)
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigurationError, match="output_dir.*two slashes"):
        kbtrain.TrainingArguments(output_dir=address)
    with pytest.raises(ConfigurationError, match="resume_from_checkpoint"):
        kbtrain.TrainingArguments(resume_from_checkpoint=str(address))


@pytest.mark.core
@pytest.mark.parametrize(
    "address",
    [
        "sftp://ada:geheim@host/run",
        "sftp://:geheim@host/run",
        "SFTP://ada@corp:ge/he:im@geheim@host/run",
        "ftp://ada:geheim@host:21/run",
        "simplecache::sftp://ada:geheim@host/run",
        "sftp:/ada:geheim@host/run",
        "https://host/run?token=geheim&b",
        "s3://b/run/?key=geheim",
    ],
)
def test_a_password_in_an_address_is_refused_and_never_shown(tmp_path, address):
    model = linear_model()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=make_data(), loss="mse")
    attempts = [
        lambda: kbtrain.TrainingArguments(output_dir=address),
        lambda: kbtrain.TrainingArguments(resume_from_checkpoint=address),
        lambda: trainer.args.replace(output_dir=address),
        lambda: trainer.fit(resume_from_checkpoint=address),
        lambda: trainer.save_model(address),
        lambda: kbtrain.load_weights(model, address),
        lambda: open_store(address),
        lambda: cli.run(["ls", address]),
    ]
    for attempt in attempts:
        with pytest.raises(ConfigurationError) as info:
            attempt()
        shown = "".join(traceback.format_exception(info.value))
        assert "geheim" not in shown
        assert "<PASSWORD>" in shown or "<QUERY>" in shown
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "address", ["sftp://ada@host:22/run", "abfs://box@account/run", "hf://datasets/u/r@v1/run"]
)
def test_a_user_a_port_and_a_revision_are_no_password(address):
    assert kbtrain.TrainingArguments(output_dir=address).output_dir == address


@pytest.mark.parametrize("path", ["run", "a:b/run", "C:/run", "C:\\run", "~/x", "/a/b:c", "a/s3:x"])
def test_local_paths_are_accepted(path):
    check_local("output_dir", path)
    assert local_folder(path) == Path(path)


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_local_folder_of_an_address(tmp_path, monkeypatch, address):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    args = kbtrain.TrainingArguments(output_dir=address)
    assert args.output_dir == address
    assert args.output_folder.parent == tmp_path / "kbtrain" / "runs"
    assert args.output_folder == args.replace(output_dir=address + "/").output_folder
    assert args.output_folder != args.replace(output_dir=address + "2").output_folder
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert args.output_folder.parent == Path.home() / ".cache" / "kbtrain" / "runs"
    assert os.listdir(tmp_path) == []


def test_one_place_has_one_folder_however_it_is_written():
    same = ["s3://b/run", "S3://b/run", "s3a://b/run", "s3://b//run", "s3://b/run//", " s3://b/run"]
    assert len({local_folder(address) for address in same}) == 1
    assert len({local_folder(address) for address in ("s3://b/run", "gs://b/run", "s3://b/r")}) == 3
    assert open_store("MEMORY://b//run/").place == "memory://b/run"


def test_the_folder_of_a_trial_is_beneath_that_of_the_search(tmp_path):
    assert beneath("s3://b/run/", "run-3") == "s3://b/run/run-3"
    assert beneath(str(tmp_path), "run-3") == str(tmp_path / "run-3")


def test_a_scheme_that_nobody_knows():
    with pytest.raises(ConfigurationError, match=r"cannot open 'nope://b/run'.*Expected s3://"):
        open_store("nope://b/run")


def test_a_missing_package_is_named(monkeypatch):
    import fsspec.core

    def missing(address):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(
        ConfigurationError, match=r"besides 'kbtrain\[cloud\]'. Install it: pip inst"
    ):
        open_store("s3://b/run")
    assert files.PACKAGES["gs"] == "gcsfs"


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ConfigurationError, match=r"output_dir='s3://b/run'.*kbtrain\[cloud\]"):
        open_store("s3://b/run")
