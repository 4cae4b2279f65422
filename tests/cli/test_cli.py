"""``python -m kbtrain``: commands, and what goes wrong with them."""

import dataclasses
import importlib.metadata
import subprocess
import sys

import keras
import pytest

from kbtrain import TrainingArguments, cli


def test_args_lists_every_field_with_type_default_and_meaning(capsys):
    assert cli.main(["args"]) == 0
    printed = capsys.readouterr().out
    flowing = " ".join(printed.split())
    annotations = {}
    for part in TrainingArguments.__mro__:
        annotations |= vars(part).get("__annotations__", {})
    for field in dataclasses.fields(TrainingArguments):
        written = annotations[field.name]
        assert f"{field.name}: {written} = {field.default!r}\n" in printed
        assert field.metadata["help"] in flowing


def test_args_of_some_fields(capsys):
    assert cli.main(["args", "seed", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("seed: int = 42\n    Seed of")
    assert "\nbf16: bool = False\n" in printed
    assert "learning_rate" not in printed


def test_env_names_versions_backend_and_device(capsys):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["keras"] == importlib.metadata.version("keras")
    assert lines["backend"] == keras.backend.backend()
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert lines["device"]


def test_env_reports_a_backend_that_fails(capsys, monkeypatch):
    def fail():
        raise RuntimeError("no such driver")

    monkeypatch.setattr("kbtrain.backends.load", fail)
    assert cli.main(["env"]) == 0
    assert "backend: failed: RuntimeError: no such driver" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "usage"),
        (["nothing"], 2, "no command 'nothing'"),
        (["args", "warmup_ratio"], 2, "warmup_steps"),
    ],
)
def test_exit_status_and_message_of_a_command(capsys, words, status, said):
    assert cli.main(words) == status
    assert said in "".join(capsys.readouterr())


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kbtrain {importlib.metadata.version('kbtrain')}\n"


def test_every_command_is_listed_and_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert f"python -m kbtrain {command}" in capsys.readouterr().out


@pytest.mark.core
def test_as_a_module_and_without_a_framework():
    program = (
        "import runpy, sys; sys.argv = ['kbtrain', 'args', 'seed']\n"
        "try: runpy.run_module('kbtrain', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, {'keras', 'torch', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("seed: int = 42")
    assert done.stdout.splitlines()[-1] == "0 set()"
