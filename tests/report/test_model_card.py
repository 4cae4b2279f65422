"""The model card: which weights it is about, their results, how to use them, its header."""

import importlib.util
import logging
import re
import sys
import types

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data
from helpers_report import SAVING_RUN

from kbtrain import Trainer, WeightAveraging
from kbtrain.errors import ConfigurationError
from kbtrain.report.model_card import CardFacts, results_table

X, Y = make_data(16)


def trained(folder, callbacks=(), **changes):
    """Four updates whose first evaluation is the best, as the larger loss counts as better."""
    settings = {"load_best_model_at_end": True, "greater_is_better": True, "learning_rate": 3.0}
    args = arguments(folder, **(SAVING_RUN | settings | changes))
    data = {"train_dataset": (X, Y), "eval_dataset": (X, Y), "loss": "mse"}
    trainer = Trainer(linear_model(), args, callbacks=list(callbacks), **data)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def best_first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "digits"
    trainer = trained(folder)
    assert trainer.state.best_global_step == 2, "the case needs a best step before the last"
    trainer.predict((X[:8], Y[:8]))
    trainer.save_model()
    return trainer, folder


@pytest.mark.core
def test_the_card_says_which_weights_it_is_about(best_first):
    trainer, _ = best_first
    card = trainer.create_model_card().read_text(encoding="utf-8")
    value = round(trainer.state.best_metric, 4)
    assert "were trained for 4 updates (1.00 epochs)." in card
    assert f"It holds the weights of update 2, the best by loss ({value})." in card
    assert f"These weights on the evaluation set, at update 2:\n\n- loss: {value}\n" in card
    test = round(trainer.record.tests["test_loss"], 4)
    assert f"These weights on the test set:\n\n- loss: {test}\n" in card
    (row,) = re.findall(r"^\| \*\*.*$", card, re.MULTILINE)
    assert "**2**" in row
    assert "- training: 16 examples\n- evaluation: 16 examples\n- an update: 4 examples" in card


def test_the_last_weights_are_called_the_last(tmp_path):
    trainer = trained(tmp_path, load_best_model_at_end=False)
    card = trainer.create_model_card().read_text(encoding="utf-8")
    assert "It holds the weights of the last update." in card
    assert "The best by loss were those of update 2." in card
    assert "on the evaluation set, at update 4:" in card


@pytest.mark.core
def test_results_are_those_of_the_weights_that_a_callback_restored(tmp_path):
    stop = keras.callbacks.EarlyStopping(patience=1, mode="max", restore_best_weights=True)
    changes = {"eval_strategy": "epoch", "save_strategy": "no", "learning_rate": 0.01}
    trainer = trained(tmp_path, [stop], **changes, max_steps=8, load_best_model_at_end=False)
    card = trainer.create_model_card().read_text(encoding="utf-8")
    assert "It holds the best by val_loss, of update 4, restored by EarlyStopping." in card
    loss = round(trainer.evaluate()["eval_loss"], 4)
    assert f"These weights on the evaluation set, at update 4:\n\n- loss: {loss}\n" in card


def test_no_results_of_other_weights_are_claimed(tmp_path):
    average = WeightAveraging(2, 1, "steps")
    trainer = trained(tmp_path, [average], load_best_model_at_end=False)
    card = trainer.create_model_card().read_text(encoding="utf-8")
    assert "It holds the average of the weights of 3 updates." in card
    assert "were not evaluated during the training." in card
    assert "These weights on the evaluation set" not in card


def test_the_usage_is_a_program_that_runs(best_first, monkeypatch):
    trainer, folder = best_first
    card = trainer.create_model_card().read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "# x: float32 (n, 3)" in program
    monkeypatch.chdir(folder)
    monkeypatch.setattr(keras.models.Model, "predict", lambda model, x: model(x))
    found = {"x": X}
    exec(program, found)
    expected = keras.ops.convert_to_numpy(trainer.model(X))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found["predictions"]), expected)


@pytest.mark.parametrize(
    "given",
    [
        {"tags": 3},
        {"license": ["mit"]},
        {"language": 1},
        {"dataset": ["a", 1]},
        {"tasks": b"x"},
    ],
    ids=str,
)
def test_what_is_no_text_is_refused_in_words(best_first, given):
    trainer, _ = best_first
    (name,) = given
    with pytest.raises(ConfigurationError, match=f"create_model_card: {name} must be text"):
        trainer.create_model_card(**given)


def test_the_header_is_what_the_hub_expects(best_first):
    hub = pytest.importorskip("huggingface_hub")
    trainer, _ = best_first
    path = trainer.create_model_card(
        language=["en", "de"],
        license="apache-2.0",
        tags="regression",
        tasks="tabular-regression",
        dataset_tags="uci/wine",
        dataset="Wine: quality",
        finetuned_from="a/b",
    )
    data = hub.ModelCard.load(path).data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en", "de"], "a/b")
    assert data.pipeline_tag == "tabular-regression"
    assert data.datasets == ["uci/wine"]
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type) == ("tabular-regression", "uci/wine")
    assert result.dataset_name == "Wine: quality"
    assert (result.metric_type, result.metric_value) == ("loss", trainer.record.tests["test_loss"])


def test_a_header_that_the_hub_refuses_is_pointed_out(best_first, monkeypatch, caplog):
    def refuse(text):
        raise ValueError("no such license")

    hub = types.ModuleType("huggingface_hub")
    hub.ModelCard, hub.__spec__ = refuse, importlib.util.find_spec("json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    trainer, _ = best_first
    with caplog.at_level(logging.WARNING, logger="kbtrain"):
        assert trainer.create_model_card().exists()
    assert "huggingface_hub expects: no such license" in caplog.text


def test_no_results_in_the_header_without_a_task_or_a_data_set():
    header = CardFacts(tasks=["a", "b"], tags=["c"]).header()
    assert header == {"library_name": "keras", "tags": ["kbtrain", "c", "a", "b"]}


def test_the_best_row_is_bold():
    history = [
        {"step": 1, "epoch": 1.0, "loss": 2.0},
        {"step": 1, "epoch": 1.0, "eval_loss": 3.0, "eval_runtime": 1.0},
        {"step": 2, "epoch": 2.0, "eval_loss": 4.0, "eval_f1": 0.5},
    ]
    assert results_table(history, best_step=1).splitlines() == [
        "| Training loss | Epoch | Step | Validation loss | f1 |",
        "|---:|---:|---:|---:|---:|",
        "| **2.0** | **1.0** | **1** | **3.0** |  |",
        "| 2.0 | 2.0 | 2 | 4.0 | 0.5 |",
        "",
        "The best row is in bold.",
    ]


def test_an_evaluation_of_the_best_weights_is_no_point_of_the_curves(best_first):
    trainer, folder = best_first
    before = len(trainer.record.logs)
    loss = trainer.evaluate()["eval_loss"]
    (entry,) = [log for log in trainer.state.log_history if "weights_step" in log]
    assert (entry["weights_step"], entry["step"], entry["eval_loss"]) == (2, 4, loss)
    assert len(trainer.record.logs) == before
    best = next(log for log in trainer.record.logs if log["step"] == 2 and "eval_loss" in log)
    assert loss == pytest.approx(best["eval_loss"], rel=1e-5)
    rows = re.findall(r"^\| \S*\d.*$", results_table(trainer.state.log_history, 2), re.MULTILINE)
    assert len(rows) == 2
