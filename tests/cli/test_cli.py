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


@pytest.mark.parametrize("name", ["warmup_ratio", "--warmup-ratio"])
def test_args_of_a_name_from_elsewhere_explains_the_field_it_became(capsys, name):
    assert cli.main(["args", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("warmup_ratio is not a field here. Write warmup_steps=...: below 1")
    assert "\nwarmup_steps: float = 0\n" in printed


def test_args_of_a_name_that_was_dropped_says_why(capsys):
    assert cli.main(["args", "deepspeed"]) == 0
    printed = capsys.readouterr().out
    assert "deepspeed is not a field here. DeepSpeed supports PyTorch models only." in printed
    assert "\nbf16: bool = False\n" in printed


def test_a_mistake_in_a_command_names_its_help(capsys):
    for command in cli.COMMANDS:
        if command in ("args", "train"):  # an option may be the name of a field, or a setting
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--no-such-option"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"kbtrain {command}")
        assert error.endswith(f"See kbtrain {command} --help.\n")
        assert "usage:" not in error


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
        (["nothing"], 2, "no command 'nothing'. It has: train"),
        (["repport"], 2, "Did you mean report?"),
        (["args", "warmup_stps"], 2, "Did you mean warmup_steps"),
        (["args", "evaluation_stratgy"], 2, "Did you mean eval_strategy"),
        (["args", "push_to_hub_tokn"], 2, "Did you mean push_to_hub"),
        (["args", "batch"], 2, "Did you mean per_device_train_batch_size"),
        (["args", "zzz"], 2, "has no argument `zzz`. It has: output_dir, num_train_epochs, "),
    ],
)
def test_exit_status_and_message_of_a_command(capsys, words, status, said):
    assert cli.main(words) == status
    assert said in "".join(capsys.readouterr())


def test_ctrl_c_ends_a_command_without_a_stack_trace(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("kbtrain.cli.env.run", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "kbtrain env: interrupted\n"


@pytest.mark.parametrize("installed", [["jax", "torch"], []])
def test_a_backend_that_is_not_installed_is_named_with_those_that_are(
    capsys, monkeypatch, installed
):
    def run(words):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr("kbtrain.cli.env.run", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    monkeypatch.delitem(sys.modules, "keras")
    assert cli.main(["env"]) == 2
    said = capsys.readouterr().err
    assert "Keras would run on tensorflow, which is not installed: " in said
    ways = ["KERAS_BACKEND=torch, or set KERAS_BACKEND=jax"] if installed else ["pip install"]
    assert all(way in said for way in ways)


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kbtrain {importlib.metadata.version('kbtrain')}\n"


def test_every_command_is_listed_and_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: kbtrain {command}")


def test_help_names_every_command_with_a_line_each(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[0] for line in lines if line.startswith("  ")]
    assert found == list(cli.COMMANDS)
    assert max(map(len, lines)) <= 100


@pytest.mark.core
def test_as_a_module_and_without_a_framework():
    program = (
        "import runpy, sys\n"
        "def run(*words):\n"
        "    sys.argv = ['kbtrain', *words]\n"
        "    try: runpy.run_module('kbtrain', run_name='__main__')\n"
        "    except SystemExit as stop: return stop.code\n"
        "codes = [run('args', 'seed'), run('--help')]\n"
        f"codes += [run(command, '--help') for command in {list(cli.COMMANDS)}]\n"
        "loaded = {'keras', 'torch', 'tensorflow', 'jax', 'pandas'} & set(sys.modules)\n"
        "print(set(codes), loaded)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("seed: int = 42")
    assert done.stdout.splitlines()[-1] == "{0} set()"
