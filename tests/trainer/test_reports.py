"""Reports: formats, files, the model card, tokens, memory, tracked values, the log level."""

import doctest
import gc
import json
import logging
import sys

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, train_logs, weights

from kbtrain import Trainer
from kbtrain.data import token_count
from kbtrain.errors import DataError
from kbtrain.report import model_card
from kbtrain.trainer import reports
from kbtrain.utils import logging as verbosity
from kbtrain.utils.machine import memory

X, Y = make_data(16)


def make_trainer(folder, model=None, data=(X, Y), **changes):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4} | changes
    given = {"loss": settings.pop("loss", "mse")} if settings.get("loss", 1) is not None else {}
    others = ("compute_loss_func", "callbacks", "processing_class")
    given |= {k: settings.pop(k) for k in others if k in settings}
    settings.pop("loss", None)
    args = arguments(folder, **settings)
    return Trainer(model or linear_model(), args, train_dataset=data, eval_dataset=data, **given)


# --- tables and files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("train_runtime", 0.004, "0:00:00.00"),
        ("train_runtime", 59.996, "0:01:00.00"),
        ("eval_runtime", 3725.126, "1:02:05.13"),
        ("train_runtime", 90000.0, "1 day, 1:00:00.00"),
        ("eval_mem_gpu_peaked_delta", (5 << 20) + 1, "5MB"),
        ("eval_loss", 0.00004, "0.0"),
        ("eval_loss", 1.23456, "1.2346"),
        ("epoch", 3, "3"),
        ("note", "text", "text"),
        ("eval_loss", float("nan"), "nan"),
    ],
)
def test_metrics_as_people_read_them(name, value, shown):
    assert reports.metrics_format({name: value}) == {name: shown}


def test_the_table_is_sorted_and_aligned(tmp_path, capsys):
    make_trainer(tmp_path).log_metrics("eval", {"eval_loss": 0.5, "epoch": 10.0})
    assert capsys.readouterr().out == (
        "***** eval metrics *****\n  epoch     = 10.0\n  eval_loss =  0.5\n"
    )
    assert reports.metrics_table("test", {}) == "***** test metrics *****"


def test_results_are_files_and_all_of_them_together(tmp_path):
    trainer = make_trainer(tmp_path / "new")
    path = trainer.save_metrics("train", {"train_loss": 0.5, "epoch": 1.0})
    trainer.save_metrics("eval", {"eval_loss": 0.25, "epoch": 2.0})
    trainer.save_metrics("test", {"test_loss": 0.1}, combined=False)
    assert json.loads(path.read_text()) == {"train_loss": 0.5, "epoch": 1.0}
    assert json.loads((path.parent / "all_results.json").read_text()) == {
        "train_loss": 0.5,
        "eval_loss": 0.25,
        "epoch": 2.0,
    }
    assert sorted(p.name for p in path.parent.glob("*_results.json")) == [
        "all_results.json",
        "eval_results.json",
        "test_results.json",
        "train_results.json",
    ]


# --- the model card -------------------------------------------------------------------------------


def test_the_model_card_has_results_settings_and_versions(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, run_name="a run: 1")
    trainer.fit()
    path = trainer.create_model_card(license="apache-2.0", tags=["regression"])
    card = path.read_text(encoding="utf-8")
    assert card.startswith(
        '---\nlibrary_name: "keras"\nlicense: "apache-2.0"\ntags:\n- "kbtrain"\n'
    )
    assert "# a run: 1\n" in card
    assert "4 parameters, of which 4 were trained for 4 updates (1.00 epochs)" in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows[0] == "| Training loss | Epoch | Step | Validation loss |"
    losses, evaluations = train_logs(trainer), train_logs(trainer, "eval_loss")
    assert rows[1:] == [
        f"| {round(losses[i], 4)} | {epoch} | {step} | {round(evaluations[j], 4)} |"
        for i, epoch, step, j in ((1, 0.5, 2, 0), (3, 1.0, 4, 1))
    ]
    assert "- learning_rate: 0.01\n" in card
    assert "weight_decay" not in card
    assert f"- keras {keras.version()}" in card
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "![Loss](loss.png)" in card


def test_the_model_card_of_a_model_that_was_not_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = make_trainer(tmp_path / "somewhere")
    card = trainer.create_model_card().read_text()
    assert "# somewhere" in card
    assert "Nothing was logged." in card
    assert "loss.png" not in card


def test_without_evaluations_the_table_has_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    history = [{"loss": 2.0, "epoch": 0.5, "step": 1}, {"loss": 1.0, "epoch": 1.0, "step": 2}]
    assert model_card.results_table(history).splitlines()[2:] == [
        "| 2.0 | 0.5 | 1 |",
        "| 1.0 | 1.0 | 2 |",
    ]


# --- tokens ---------------------------------------------------------------------------------------

IDS = np.array([[[1, 2, 0], [3, 0, 0]], [[4, 5, 6], [7, 8, 0]]], np.int32)  # 2 updates of 2 rows


@pytest.mark.parametrize(
    ("batch", "mode", "updates", "expected"),
    [
        ((IDS, IDS), "all", 2, 12),
        ((IDS, IDS), "all", 1, 6),
        ((IDS, IDS), "non_padding", 2, 8),
        ((IDS, IDS), "non_padding", 1, 3),
        (({"token_ids": IDS, "segment_ids": IDS}, IDS), "all", 2, 12),
        (({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}, IDS), "non_padding", 2, 12),
        (({"ids": IDS, "attention_mask": IDS > 3}, IDS), "non_padding", 2, 5),
        (({"ids": IDS, "dense": IDS * 1.5}, IDS), "all", 2, 12),
    ],
)
def test_tokens_of_a_block(batch, mode, updates, expected):
    assert token_count.count_tokens([{"single": batch}], updates, mode) == expected


@pytest.mark.parametrize("x", [{"a": IDS, "b": IDS}, IDS * 0.5])
def test_without_a_clear_input_of_tokens_it_says_what_there_is(x):
    with pytest.raises(DataError, match="input_ids, token_ids, tokens.*float|input_ids.*int32"):
        token_count.count_tokens([{"single": (x, IDS)}], 1, "all")


def test_the_tokenizer_says_what_padding_is(tmp_path):
    class Tokenizer:
        pad_token_id = 7

        def save_pretrained(self, folder):
            pass

    ids = np.array([[1, 2, 7, 7], [3, 0, 0, 7]], np.int32)
    layers = [keras.Input((4,), dtype="int32"), keras.layers.Embedding(10, 2)]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(1)])
    trainer = make_trainer(
        tmp_path,
        model,
        (ids, Y[:2]),
        processing_class=Tokenizer(),
        include_num_input_tokens_seen="non_padding",
        max_steps=1,
    )
    trainer.fit()
    assert trainer.state.num_input_tokens_seen == 5


def test_tokens_are_logged_and_resumed(tmp_path):
    ids = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 0], [7, 8, 0, 0]] * 4, np.int32)
    common = {
        "include_num_input_tokens_seen": "non_padding",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def make():
        embed = [keras.Input((4,), dtype="int32"), keras.layers.Embedding(10, 2)]
        head = [keras.layers.Flatten(), keras.layers.Dense(1)]
        return make_trainer(tmp_path, keras.Sequential(embed + head), (ids, Y), **common)

    trainer = make()
    output = trainer.fit()
    assert train_logs(trainer, "num_input_tokens_seen") == [8, 16, 24, 32]
    assert trainer.state.num_input_tokens_seen == 32
    assert output.metrics["train_tokens_per_second"] > 0
    assert all(rate > 0 for rate in train_logs(trainer, "train_tokens_per_second"))
    # The speed so far, with its parts, is in each log, and what counts only grows.
    for name in ("train_runtime", "train_data_runtime", "train_compute_runtime"):
        seen = train_logs(trainer, name)
        assert len(seen) == 5
        assert seen[-1] == output.metrics[name]
        assert seen == sorted(seen)
    for log in [entry for entry in trainer.state.log_history if "loss" in entry]:
        rate, seconds = log["train_samples_per_second"], log["train_runtime"]
        assert rate * seconds == pytest.approx(4 * log["step"], rel=0.2)
        parts = [log[f"train_{part}_runtime"] for part in ("data", "compute", "host")]
        assert sum(parts) <= seconds + 1e-3
    resumed = make()
    resumed.fit(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert train_logs(resumed, "num_input_tokens_seen") == [8, 16, 24, 32]


def test_labels_by_name_are_no_tokens():
    batch = {"tokens": IDS, "target": IDS}
    assert token_count.count_tokens([{"single": {"ids": IDS, "target": IDS}}], 1, "all", ["target"])
    with pytest.raises(DataError, match="ids.*target"):
        token_count.count_tokens([{"single": {"ids": IDS, "target": IDS}}], 1, "all")
    assert token_count.count_tokens([{"single": batch}], 1, "all") == IDS[:1].size


def test_no_tokens_are_counted_unless_asked(tmp_path):
    trainer = make_trainer(tmp_path)
    assert "train_tokens_per_second" not in trainer.fit().metrics
    assert train_logs(trainer, "num_input_tokens_seen") == []
    assert len(train_logs(trainer, "train_runtime")) == 1  # at the end


# --- memory ---------------------------------------------------------------------------------------


class Counting:
    """A device that counts: 100 bytes more at each look, with a peak of 1000."""

    def __init__(self):
        self.held = 0

    def memory_stats(self):
        self.held += 100
        return {"in_use": self.held, "peak": 1000}


def test_memory_of_the_device_by_the_names_of_the_reference():
    with memory.measured(Counting(), "train", skip=False) as found:
        assert found == {}
    assert found["train_mem_gpu_alloc_delta"] == 100
    assert found["train_mem_gpu_peaked_delta"] == 800


def test_memory_of_the_process():
    gc.collect()  # what other tests left may be freed at any time
    with memory.measured(Counting(), "x", skip=False) as found:
        kept = np.ones(512 << 20, np.uint8)
    if memory.resource is not None and memory._STATM.exists():
        assert found["x_mem_cpu_alloc_delta"] > 0.8 * kept.nbytes
        assert found["x_mem_cpu_peaked_delta"] >= 0


def test_memory_metrics_are_there_when_asked_for(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, skip_memory_metrics=False)
    monkeypatch.setattr(trainer.backend, "memory_stats", Counting().memory_stats)
    assert "train_mem_gpu_alloc_delta" in trainer.fit().metrics
    assert "eval_mem_gpu_alloc_delta" in trainer.evaluate()
    assert "test_mem_gpu_alloc_delta" in trainer.predict((X, Y)).metrics
    quiet = make_trainer(tmp_path)
    assert not [name for name in quiet.evaluate() if "_mem_" in name]


# --- tracked values -------------------------------------------------------------------------------


def test_tracked_values_are_averaged_and_logged(tmp_path):
    """Against NumPy: the mean of the outputs over the micro-batches of an update."""
    trainer = make_trainer(
        tmp_path,
        loss=None,
        compute_loss_func=lambda outputs, labels: _tracked(trainer, outputs, labels),
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        max_steps=2,
    )
    kernel, bias = weights(trainer.model)
    outputs = X.astype(np.float64) @ kernel + bias
    trainer.fit()
    np.testing.assert_allclose(
        train_logs(trainer, "mean_output"), [outputs[:8].mean(), outputs[8:].mean()], rtol=1e-5
    )
    np.testing.assert_allclose(trainer.evaluate()["eval_mean_output"], outputs.mean(), rtol=1e-5)
    assert trainer._tracked == {}


def _tracked(trainer, outputs, labels):
    trainer.track("mean_output", outputs)
    return keras.ops.mean(keras.ops.square(outputs - labels))


# --- the log level --------------------------------------------------------------------------------


def test_the_log_level_is_set_or_left_alone(tmp_path, kbtrain_logger):
    kbtrain_logger.setLevel(logging.ERROR)
    make_trainer(tmp_path)
    assert kbtrain_logger.level == logging.ERROR
    make_trainer(tmp_path, log_level="debug")
    assert kbtrain_logger.level == logging.DEBUG
    assert kbtrain_logger.handlers == [], "another handler already shows the messages"


def test_messages_are_shown_if_there_is_no_handler(kbtrain_logger, monkeypatch, capsys):
    monkeypatch.setattr(kbtrain_logger, "propagate", False)
    verbosity.set_log_level("info")
    verbosity.set_log_level("info")
    kbtrain_logger.info("hello")
    assert capsys.readouterr().err.count("INFO kbtrain: hello") == 1


def test_examples_in_docstrings():
    assert doctest.testmod(reports).failed == 0
