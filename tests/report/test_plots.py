"""plot_history: what is drawn, from what it can be drawn, and what is said where it cannot."""

import sys

import pytest
from helpers_report import run_record

from kbtrain import TrainerState, plot_history
from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.neutral

LOGS = [
    {"step": 10, "epoch": 1.0, "loss": 2.0, "accuracy": 0.5},
    {"step": 10, "epoch": 1.0, "eval_loss": 1.5, "eval_accuracy": 0.6},
    {"step": 20, "epoch": 2.0, "loss": 0.01, "accuracy": 0.9},
    {"step": 20, "epoch": 2.0, "eval_loss": 1.25, "eval_accuracy": 0.7},
]


def lines(axis):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}


def test_loss_and_metrics_over_the_epochs_with_the_best(tmp_path):
    state = TrainerState(global_step=20, log_history=LOGS, best_global_step=20)
    figure = plot_history(state, tmp_path / "new" / "history.png", "A title")
    loss, accuracy = figure.axes
    assert lines(loss)["training"] == [(1.0, 2.0), (2.0, 0.01)]
    assert lines(loss)["validation"] == [(1.0, 1.5), (2.0, 1.25)]
    assert lines(accuracy)["validation"] == [(1.0, 0.6), (2.0, 0.7)]
    assert lines(loss)["best model"][0][0] == 2.0
    assert loss.get_yscale() == "log"
    assert loss.get_xlabel() == "epoch"
    assert (tmp_path / "new" / "history.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_within_an_epoch_the_axis_counts_updates():
    figure = plot_history([{"step": 1, "epoch": 0.1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert figure.axes[0].get_xlabel() == "update"
    assert lines(figure.axes[0])["training"] == [(1.0, 2.0), (2.0, 1.0)]


def test_a_folder_is_a_run(tmp_path):
    run_record().save(tmp_path)
    assert len(lines(plot_history(tmp_path).axes[0])["training"]) == 25


@pytest.mark.parametrize("run", [[], 3, [{"loss": 1.0}], TrainerState()])
def test_what_has_nothing_to_plot_is_refused(run):
    with pytest.raises(ConfigurationError, match="plot_history"):
        plot_history(run)


def test_without_matplotlib_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    from kbtrain.report import plots

    plots._figure_class.cache_clear()
    with pytest.raises(ConfigurationError, match=r"kbtrain\[examples\]"):
        plot_history(LOGS)
