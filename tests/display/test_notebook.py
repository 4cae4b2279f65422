"""A run in a notebook: what its output shows while it lives, and what stays in the saved file."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
from helpers import arguments, linear_model, make_data
from helpers_report import Page

from kbtrain import EarlyStoppingCallback, Trainer, TrainerState, TrainingArguments
from kbtrain.display import callbacks, notebook
from kbtrain.display.notebook import MAX_ROWS, NotebookView
from kbtrain.display.view import Evaluation
from kbtrain.evaluation.results import PredictionOutput, Results
from kbtrain.training.fit import TrainOutput


class Cell:
    """Stands in for the front end: the content of each output, newest and before."""

    def __init__(self, monkeypatch):
        self.outputs = []
        module = types.ModuleType("IPython.display")
        module.display = self.display
        package = types.ModuleType("IPython")
        package.display = module
        package.get_ipython = lambda: types.SimpleNamespace(kernel=object())
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", module)
        monkeypatch.setattr(callbacks, "is_terminal", lambda: False)

    def display(self, content, display_id):
        assert display_id is True
        self.outputs.append([content])
        return types.SimpleNamespace(update=self.outputs[-1].append)

    def html(self, output):
        return self.outputs[output][-1]._repr_html_()

    def plain(self, output):
        return repr(self.outputs[output][-1])


@pytest.fixture
def cell(monkeypatch):
    return Cell(monkeypatch)


def make(folder, **changes):
    x, y = make_data(16)
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "disable_tqdm": None,
    }
    args = arguments(folder, **(settings | changes))
    given = {"train_dataset": (x, y), "eval_dataset": (x, y), "loss": "mse"}
    return Trainer(linear_model(), args, metrics=["mae"], **given)


@pytest.mark.core
def test_the_output_has_table_curve_and_ending(tmp_path, cell, capsys):
    trainer = make(tmp_path)
    trainer.fit()
    assert len(cell.outputs) == 2
    status, results = Page(cell.html(0)).text, Page(cell.html(1))
    assert "Finished: all updates are done." in status
    assert "the model holds" in status
    head, *rows = cell.plain(1).splitlines()
    assert head.split() == ["step", "epoch", "loss", "eval_loss", "eval_mae"]
    assert [row.split()[0] for row in rows] == ["2", "4", "6", "8"]
    assert [row.split()[0] for row in rows if "best" in row] == [
        str(trainer.state.best_global_step)
    ]
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    column = head.split().index("eval_loss")
    shown = [float(row.split()[column]) for row in rows]
    np.testing.assert_allclose(shown, evaluated, rtol=1e-3)
    assert all(row.split()[column] in results.text for row in rows)
    assert len(results.all("polyline")) == 2
    assert "update" not in capsys.readouterr().err


def test_without_evaluations_the_table_has_the_logs(tmp_path, cell):
    make(tmp_path, eval_strategy="no", metric_for_best_model=None, max_steps=3).fit()
    head, *rows = cell.plain(1).splitlines()
    assert "loss" in head.split()
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]


def test_each_fit_has_an_output_of_its_own(tmp_path, cell):
    trainer = make(tmp_path)
    trainer.fit()
    trainer.fit()
    assert len(cell.outputs) == 4


def test_an_evaluation_outside_of_fit_is_shown_by_its_result(tmp_path, cell):
    make(tmp_path).evaluate()
    assert cell.outputs == []


def test_a_failed_run_says_so_in_its_output(tmp_path, cell):
    trainer = make(tmp_path, callbacks=None)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train_dataset[0][:] = np.nan
    with pytest.raises(FloatingPointError):
        trainer.fit()
    assert "Failed: the loss or the gradient of update 1 was not finite." in cell.plain(0)


def test_a_long_run_stays_a_short_table_with_its_best_row(cell):
    view = NotebookView()
    view._facts = None
    view._show = lambda **options: None
    for step in range(1, 1001):
        view.evaluation(Evaluation(step, 1000, 1.0, {"eval_loss": 1.0}, best=step == 377), True)
    steps = [row["step"] for row in view._rows]
    assert len(steps) <= 2 * MAX_ROWS
    assert {377, 1000} <= set(steps)


def test_the_output_is_not_updated_at_every_step(cell, monkeypatch):
    monkeypatch.setattr(notebook, "PAUSE", 1e9)
    view = NotebookView()
    monkeypatch.setattr(view, "_head", lambda: "")
    view._facts = object()
    view._show(now=True)
    for _ in range(100):
        view._show()
    assert len(cell.outputs[0]) == 1


def test_a_trial_of_a_search_leaves_an_empty_output(cell, monkeypatch):
    """Its row in the table of trials says what became of it."""
    view = NotebookView()
    monkeypatch.setattr(view, "_head", lambda: "model")
    view.begin(None, object(), trial=True)
    assert "compiling" in cell.plain(0)
    view.close()
    assert (cell.html(0), cell.plain(0)) == ("", "")


def test_only_a_kernel_is_a_notebook(monkeypatch):
    shell = types.ModuleType("IPython")
    shell.get_ipython = lambda: types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", shell)
    assert not callbacks.is_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not callbacks.is_notebook()


# --- values in a notebook -------------------------------------------------------------------------


def shown(value):
    return Page(value._repr_html_()).text


def test_arguments_show_what_was_changed():
    text = shown(TrainingArguments("out", learning_rate=3e-4, run_name="<b>"))
    assert "learning_rate 0.0003" in text
    assert 'run_name "<b>"' in text
    assert "weight_decay" not in text
    assert "All as by default." in shown(TrainingArguments())


def test_a_state_shows_where_it_is_and_its_newest_logs():
    state = TrainerState(global_step=1200, max_steps=4000, epoch=1.5)
    assert "1,200 of 4,000" in shown(state)
    state.best_metric, state.best_global_step = 0.25, 800
    state.append_log({"loss": 0.5, "epoch": 1.5})
    state.append_log({"eval_loss": 0.75, "eval_runtime": 9.0, "epoch": 1.5})
    text = shown(state)
    assert "0.25, at step 800" in text
    assert "log of step 1,200 loss 0.5, eval_loss 0.75" in text


def test_outputs_show_their_numbers():
    assert "training_loss 0.1235" in shown(TrainOutput(3, 0.123456, {"train_runtime": 2.0}))
    text = shown(PredictionOutput(np.zeros((3, 2), np.float32), None, {"test_loss": 0.5}))
    assert "predictions float32 (3, 2)" in text
    assert "test_loss 0.5" in text
    several = {"a": np.zeros(3, np.int32), "b": [np.zeros(1, np.int8)] * 2}
    text = shown(PredictionOutput(several, (), {}))
    assert "a: int32 (3,), b: 2 of int8 (1,)" in text


def test_the_results_of_an_evaluation_are_a_dict_in_all_that_matters(tmp_path):
    results = make(tmp_path).evaluate()
    assert isinstance(results, Results)
    assert f"eval_loss {results['eval_loss']:.4g}" in shown(results)
    plain = dict(results)
    assert results == plain
    assert repr(results) == repr(plain)
    assert json.dumps(results) == json.dumps(plain)
    assert type(pickle.loads(pickle.dumps(results))) is dict
    assert type(results.copy()) is dict


# --- a real notebook ------------------------------------------------------------------------------

PROGRAM = """
import os, sys
sys.path[:0] = os.environ["KBTRAIN_TEST_PATHS"].split(os.pathsep)
from helpers import arguments, linear_model, make_data
from kbtrain import Trainer, plot_history
x, y = make_data(16)
args = arguments(
    "run", max_steps=6, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2,
    metric_for_best_model="loss", disable_tqdm=None,
)
trainer = Trainer(linear_model(), args, train_dataset=(x, y), eval_dataset=(x, y), loss="mse")
output = trainer.fit()
"""


def test_what_a_notebook_showed_is_in_the_saved_file_and_its_export(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, ipykernel, nbconvert")
    pytest.importorskip("ipykernel", reason="needs nbclient, ipykernel, nbconvert")
    nbconvert = pytest.importorskip("nbconvert", reason="needs nbclient, ipykernel, nbconvert")
    from nbformat import v4, write

    paths = [path for path in sys.path if path]
    monkeypatch.setenv("KBTRAIN_TEST_PATHS", ":".join(paths))
    cells = [PROGRAM, "trainer.args", "trainer.evaluate()", "plot_history(trainer)"]
    book = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python",
        "language": "python",
    }
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    write(book, tmp_path / "saved.ipynb")
    saved = json.loads((tmp_path / "saved.ipynb").read_text())
    outputs = [o for o in saved["cells"][0]["outputs"] if o["output_type"] == "display_data"]
    status, results = ("".join(o["data"]["text/plain"]) for o in outputs)
    assert "Finished: all updates are done." in status
    assert [line.split()[0] for line in results.splitlines()] == ["step", "2", "4", "6"]
    picture = saved["cells"][3]["outputs"][0]["data"]
    assert "image/png" in picture
    page, _ = nbconvert.HTMLExporter().from_notebook_node(book)
    assert page.count("<polyline") >= 2
    for wanted in (
        "Finished: all updates are done.",
        "eval_loss",
        "TrainingArguments",
        "max_steps",
    ):
        assert wanted in page
