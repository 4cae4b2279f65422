"""Every example runs as its docstring says, in a process of its own, shortened by arguments."""

import ast
import importlib.util
import json
import math
import os
import pydoc_data.topics as topics
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib.image
import numpy as np
import optuna
import pytest
from paths import ROOT
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kbtrain import TrainingArguments
from kbtrain.errors import ConfigurationError

EXAMPLES = ROOT / "examples"
STEPS = 240
GPT = [
    *("--width", "32", "--depth", "1", "--heads", "2", "--length", "32", "--batch-size", "8"),
    *("--steps", str(STEPS), "--save-steps", "20", "--eval-steps", "80", "--max-bytes", "30000"),
    *("--learning-rate", "1e-2", "--sample-bytes", "12"),
]


def environment(backend: str | None = None) -> dict[str, str]:
    return os.environ | {"KERAS_BACKEND": backend or keras.backend.backend()}


def command(name: str, *options: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *map(str, options)]


def run(name: str, *options: object, backend: str | None = None) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command(name, *options),
        env=environment(backend),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


# The saver's thread kills the process, so that no poor timing of ours lets it come to its end.
KILLED = """
import os, runpy, signal, sys
from kbtrain.checkpoint import CheckpointStore

save, last = CheckpointStore.save, int(sys.argv[1])

def save_and_die(store, step, *rest):
    save(store, step, *rest)
    if step >= last:
        os.kill(os.getpid(), signal.SIGKILL)

CheckpointStore.save = save_and_die
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_at_checkpoint(step: int, name: str, *options: object, backend: str | None = None) -> None:
    """Run an example that is killed, without notice, once it has saved ``step`` or a later one."""
    python, *rest = command(name, *options)
    result = subprocess.run(
        [python, "-c", KILLED, str(step), *rest],
        env=environment(backend),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr


def resumed_at(result: subprocess.CompletedProcess) -> int:
    found = re.search(r"Resuming from .* at step (\d+)", result.stderr)
    assert found, result.stderr
    return int(found[1])


def bits_per_byte(result: subprocess.CompletedProcess) -> float:
    return float(re.search(r"held-out text: (\S+) bits per byte", result.stdout)[1])


def log_without_times(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second"))}
        for entry in entries
    ]


@pytest.mark.slow
def test_quickstart(tmp_path):
    result = run("quickstart.py", "--output-dir", tmp_path, "--epochs", 6)

    first, second, *_ = result.stdout.splitlines()
    assert first.startswith("importing Keras")  # which is a silence of some seconds
    assert second.startswith(f"backend {keras.backend.backend()}, device ")
    assert len(re.findall(r"^ +\d+( +\d+\.\d{4}){3}", result.stdout, re.MULTILINE)) == 6
    assert result.stdout.count("<- best") == 1
    printed = float(re.search(r"test accuracy (\d\.\d+)", result.stdout)[1])
    assert printed >= 0.9

    # The saved model alone, without kbtrain, has the accuracy that was printed.
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    *_, (images, labels) = quickstart.load_data()
    logits = keras.models.load_model(tmp_path / "digits.keras").predict(images, verbose=0)
    assert np.mean(logits.argmax(-1) == labels) == pytest.approx(printed, abs=5e-5)

    picture = matplotlib.image.imread(tmp_path / "history.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05


@pytest.mark.slow
def test_plain_keras():
    result = run("plain_keras.py", "--epochs", 4)
    assert float(re.search(r"test accuracy (\S+)", result.stdout)[1]) >= 0.85
    assert "kbtrain" not in (EXAMPLES / "plain_keras.py").read_text().replace("imports kbtrain", "")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """An uninterrupted run of the GPT example: its folder and its output."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run("char_gpt.py", "--output-dir", folder, *GPT)


@pytest.mark.slow
def test_char_gpt_killed_and_started_again_ends_where_an_unbroken_run_ends(tmp_path, unbroken):
    folder, expected = unbroken
    assert "Resuming" not in expected.stderr

    kill_at_checkpoint(20, "char_gpt.py", "--output-dir", tmp_path, *GPT)
    result = run("char_gpt.py", "--output-dir", tmp_path, *GPT)

    assert 20 <= resumed_at(result) < STEPS
    assert result.stdout == expected.stdout  # the sample's bytes too
    assert log_without_times(tmp_path) == log_without_times(folder)


@pytest.mark.slow
def test_char_gpt_learns_and_says_so_in_bits(unbroken):
    folder, result = unbroken
    last = [entry for entry in log_without_times(folder) if "eval_loss" in entry][-1]
    assert last["step"] == STEPS
    assert last["eval_bits_per_byte"] == pytest.approx(last["eval_loss"] / math.log(2), rel=1e-5)
    assert bits_per_byte(result) == pytest.approx(last["eval_bits_per_byte"], rel=1e-5)
    # Better than the best code that knows how often each byte occurs in the held-out text, but
    # looks at no neighbours; its length is computed from the text alone.
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()[:30000]
    held_out = np.frombuffer(text[int(0.9 * len(text)) :], np.uint8)
    share = np.unique(held_out, return_counts=True)[1] / len(held_out)
    assert bits_per_byte(result) < -(share * np.log2(share)).sum()


@pytest.mark.cross
@pytest.mark.slow
def test_char_gpt_goes_from_backend_to_backend(tmp_path):
    options = [*GPT, "--dropout", 0]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    expected = run("char_gpt.py", "--output-dir", whole, *options, backend="jax")

    arguments = ["char_gpt.py", "--output-dir", moved, *options]
    kill_at_checkpoint(20, *arguments, backend="jax")
    kill_at_checkpoint(60, *arguments, backend="torch")
    result = run(*arguments, backend="tensorflow")

    assert 60 <= resumed_at(result) < STEPS
    assert result.stdout.startswith("backend tensorflow")
    assert bits_per_byte(result) == pytest.approx(bits_per_byte(expected), rel=1e-4)


@pytest.mark.slow
def test_distributed_gpt_in_two_processes_gives_the_loss_of_one(tmp_path):
    options = [
        *("--steps", 8, "--save-steps", 4, "--batch-size", 6, "--length", 16, "--width", 16),
        *("--depth", 1, "--heads", 2),
    ]
    one = run("distributed_gpt.py", "--output-dir", tmp_path / "one", *options)
    launcher = [sys.executable, "-m", "kbtrain", "launch", "-n", "2"]
    _, *script = command("distributed_gpt.py", "--output-dir", tmp_path / "two", *options)
    two = subprocess.run(
        launcher + script, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert two.returncode == 0, two.stdout + two.stderr
    losses = {}
    for number, output in ((1, one.stdout), (2, two.stdout)):
        (found,) = re.findall(rf"processes: {number}, 8 updates, loss (\S+)", output)
        losses[number] = float(found)
    assert losses[2] == pytest.approx(losses[1], abs=2e-6)  # as printed
    names = [path.name for path in sorted((tmp_path / "two").glob("checkpoint-*"))]
    assert names == ["checkpoint-4", "checkpoint-8"]


# --- around the trainer ---------------------------------------------------------------------------


def test_regression_writes_results_log_and_model_card(tmp_path):
    result = run(
        "regression.py", "--output-dir", tmp_path, "--num_train_epochs", 20, "--width", 16,
        "--disable_tqdm",
    )  # fmt: skip
    test = json.loads((tmp_path / "test_results.json").read_text())
    assert test["test_r2"] > 0.2, result.stdout
    card = (tmp_path / "README.md").read_text()
    assert "- num_train_epochs: 20.0" in card
    assert "![Loss](loss.png)" in card
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert sum(",," not in row for row in rows) >= 1
    assert len(rows) == 1 + 20 + 20 + 1  # header, training, evaluation, the whole run


def test_image_classification_evaluates_and_saves_the_average(tmp_path):
    result = run(
        "image_classification.py", "--output_dir", tmp_path, "--max_steps", 60, "--width", 16,
        "--warmup_steps", 6, "--per_device_train_batch_size", 8, "--disable_tqdm",
    )  # fmt: skip
    found = re.findall(r"weights(?: in training)?: accuracy (\S+), loss (\S+)", result.stdout)
    (accuracy, loss), (_, loss_in_training) = [tuple(map(float, pair)) for pair in found]
    assert accuracy > 0.6
    assert loss != loss_in_training  # which is the better one, so few updates do not decide
    # The file holds the average, and its augmentation does nothing where it is used.
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    _, images, _, labels = train_test_split(
        images, digits.target, train_size=300, stratify=digits.target, random_state=0
    )
    logits = keras.models.load_model(tmp_path / "digits.keras").predict(images, verbose=0)
    assert np.mean(logits.argmax(-1) == labels) == pytest.approx(accuracy, abs=5e-5)


def test_custom_optimizer_is_found_by_name(tmp_path):
    result = run("custom_optimizer.py", "--output-dir", tmp_path, "--epochs", 4)
    name, accuracy = re.search(r"(\w+): test accuracy (\S+)", result.stdout).groups()
    assert name == "Signum"
    assert float(accuracy) > 0.8


def test_hyperparameter_search_is_resumed(tmp_path):
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/study.db", study_name="digits", direction="maximize"
    )
    # Stands for an earlier run, and for its best trial, which is then trained once more.
    best = {"learning_rate": 1e-2, "per_device_train_batch_size": 16, "width": 64}
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"hyperparameters": best}))
    result = run(
        "hyperparameter_search.py", "--output-dir", tmp_path, "--epochs", 1, "--n-trials", 2,
        "--resume",
    )  # fmt: skip
    rows = result.stderr.partition("\nSearch digits: 2 trials")[0]
    assert re.findall(r"^ +(\d+) ", rows, re.MULTILINE) == ["1"]
    assert f"accuracy 1.0000, {best}" in result.stdout
    assert float(re.search(r"test accuracy: (\S+)", result.stdout)[1]) > 0.8


@pytest.mark.slow
def test_masked_lm_is_where_text_classification_begins(tmp_path):
    encoder = ("--width", 32, "--depth", 1, "--length", 32, "--disable_tqdm")
    result = run(
        "masked_lm.py", "--output_dir", tmp_path / "lm", *encoder, "--max_steps", 80,
        "--vocabulary", 300, "--learning_rate", "5e-3", "--eval_strategy", "no",
    )  # fmt: skip
    found = re.search(r"masked words: (\S+); by frequency alone (\S+)", result.stdout)
    assert float(found[1]) < float(found[2])

    result = run(
        "text_classification.py", "--output_dir", tmp_path / "classifier", *encoder,
        "--pretrained", tmp_path / "lm", "--num_train_epochs", 4, "--learning_rate", "6e-3",
    )  # fmt: skip
    loaded, missing, unexpected = re.search(
        r"(\d+) variables loaded; (\d+) missing .*; (\d+) unexpected", result.stdout
    ).groups()
    assert int(loaded) == 3 + 2 + 16 + 2  # embeddings, their norm, a block, the pooled output
    assert (int(missing), int(unexpected)) == (1 + 2, 4)  # a dropout's seed, and the two heads
    # Begun to learn what it is shown: below equal shares for the 8 packages, and below the first
    # epoch. On texts it has not seen, so early and so small, better or worse is chance.
    losses = [float(x) for x in re.findall(r"(?<!_)\bloss ([0-9.]+)", result.stderr)][:4]
    assert losses[3] < min(losses[0], math.log(8))
    assert len(re.findall(r"eval_loss [0-9.]+", result.stderr)) == 4
    assert 0 < float(re.search(r"BERT: accuracy (\S+),", result.stdout)[1]) < 1


# --- the page on migrating ------------------------------------------------------------------------

PAGE = (EXAMPLES.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_migrated_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    names = {"__name__": "migrated"}
    exec(compile(AFTER, "migrating.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 66  # 3 epochs of ceil(ceil(1400 / 32) / 2) updates
    assert trainer.state.log_history[-1]["eval_accuracy"] > 0.8


def test_every_argument_of_the_script_before_is_kept_or_explained():
    calls = [node for node in ast.walk(ast.parse(BEFORE)) if isinstance(node, ast.Call)]
    call = next(node for node in calls if ast.unparse(node.func) == "TrainingArguments")
    refused = {}
    for keyword in call.keywords:
        given = {keyword.arg: ast.literal_eval(keyword.value)}
        try:
            TrainingArguments(**(given | RELATED.get(keyword.arg, {})))
        except ConfigurationError as error:
            refused[keyword.arg] = str(error)
    assert refused.keys() == SAID.keys()
    assert [name for name, said in SAID.items() if said not in refused[name]] == []


def test_every_refused_argument_is_in_the_table():
    table = PAGE.partition("## What to write instead")[2]
    assert [name for name in SAID if f"| `{name}=" not in table] == []


SAID = {
    "overwrite_output_dir": "never empties output_dir",
    "evaluation_strategy": "Write eval_strategy='epoch'",
    "warmup_ratio": "Write warmup_steps=0.1",
    "logging_dir": "a run is written to output_dir",
    "torch_compile": "Write jit_compile=True",
}
RELATED = {"load_best_model_at_end": {"eval_strategy": "epoch", "save_strategy": "epoch"}}
