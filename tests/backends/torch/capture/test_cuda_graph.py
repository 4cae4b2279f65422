"""CUDA graphs on PyTorch, with a stand-in for them: the numbers are those of the plain step.

No GPU is needed, and nothing is said about one: the stand-in (fake_cuda_graphs.py) records
operations on a CPU and repeats them.
"""

import json

import pytest
from helpers_resume import run_script
from paths import SUPPORT

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on

AS_GRAPH = "The captured step runs as a CUDA graph, with 1 MiB of memory of its own."


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")
    printed = run_script(
        SUPPORT / "helpers_graphs.py", [folder], "torch", timeout=300, OMP_NUM_THREADS="1"
    )
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "captures", "replays"),
    [
        # Three batches of a shape run without a graph, the fourth is captured, then replays.
        # An evaluation has four batches, the prediction at the end of the first case has five.
        ("plain", 3, 8 + 0 + 1),
        ("blocks", 1, 8),
        ("seeded", 1, 8),
        ("two shapes", 2, 22),
        ("evaluations", 2, 8 + 8),
        ("accumulation", 1, 3 * 12 - 4),
        ("moved", 2, 4 + 4),
    ],
)
def test_updates_evaluations_and_predictions_are_those_of_the_plain_step(
    case, captures, replays, reports
):
    report = reports[case]
    assert report["equal"]
    assert set(report["messages"]) == {AS_GRAPH}
    assert (report["captures"], report["replays"]) == (captures, replays)


def test_nothing_in_all_of_these_runs_overtakes_another_stream(reports):
    """The runs would have ended with an error, see ``fake_streams``."""
    assert reports["uses of memory"] > 50_000


def test_a_line_for_each_step_says_that_it_runs_as_a_graph(reports):
    assert reports["two shapes"]["messages"] == [AS_GRAPH]
    assert reports["evaluations"]["messages"] == [AS_GRAPH] * 2  # training and evaluation


def test_an_update_that_is_not_finite_stops_the_run_where_it_was(reports):
    report = reports["not finite"]
    assert report["error"] == "Update 11 was not finite"
    assert report["steps"] == 10
    assert report["equal"]
    assert report["replays"] > 4


def test_batch_normalization_on_a_gpu_makes_no_copy_in_float32(reports):
    assert reports["normalized"] == {
        "aten._native_batch_norm_legit.default": "torch.bfloat16",
        "aten.native_batch_norm_backward.default": "torch.bfloat16",
    }


def test_the_memory_of_the_graphs_is_given_back_when_the_run_ends(reports):
    assert reports["left"] == 0


def test_a_step_that_is_not_captured_at_all_says_so_in_a_line(reports):
    (message,) = reports["run again"]
    assert message == (
        "The step runs eagerly, it cannot be captured: layers are to be run again, which a record "
        "would not do"
    )


def test_a_resumed_run_goes_on_bit_for_bit_random_numbers_included(reports):
    assert reports["resumed"] == {"replays": 3, "equal": True}


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("reading", "the host waits for the device in it"),
        ("unfit", "its capture failed (this is not for a graph)"),
        ("moving", "its variables have other memory again and again"),
        ("too many", "inputs of 0 other shapes have one"),
        ("short of memory", "there is no memory to compare it with the plain step"),
        ("shorter", "there is no memory to compare it with the plain step"),
        ("too large", "its inputs and results are too large to copy them in each step"),
        ("off", "cuda_graphs=False"),
        ("old", "they need PyTorch 2.9, this is "),
        ("full", "it needs 2 MiB of free memory (1 MiB for itself, as much for the comparison "),
        ("crowded", "memory ran out, and its own was needed"),
    ],
)
def test_an_unsuitable_step_runs_without_a_graph_and_the_reason_is_logged(case, why, reports):
    report = reports[case]
    assert report["equal"]
    (message,) = set(report["messages"]) - {AS_GRAPH}
    assert message.startswith(f"The captured step runs without a CUDA graph: {why}")
    if case not in ("crowded", "moving"):
        assert AS_GRAPH not in report["messages"]


@pytest.mark.parametrize(("case", "captures"), [("off", 0), ("old", 0), ("full", 0)])
def test_nothing_is_captured_that_is_not_wanted_or_does_not_fit(case, captures, reports):
    assert reports[case]["captures"] == captures


def test_an_evaluation_that_does_not_fit_beside_a_graph_gets_its_memory(reports):
    """Without graphs the run would fit, so it must fit with them."""
    report = reports["crowded"]
    assert report["error"] is None
    assert report["steps"] == 12
    assert AS_GRAPH in report["messages"]
    assert 0 < report["replays"] < 8


def test_a_capture_that_failed_is_not_tried_again_for_another_shape(reports):
    assert reports["unfit"]["captures"] == 1
    assert len(reports["unfit"]["messages"]) == 1


def test_a_graph_with_other_numbers_is_not_used(reports):
    report = reports["wrong"]
    assert report["equal"]
    assert report["replays"] == 3  # against three plain runs
    assert ["other numbers than the step itself" in m for m in report["messages"]] == [True]


def test_where_no_two_plain_runs_agree_a_graph_may_be_as_far_off(reports):
    report = reports["noisy"]
    assert report["messages"] == [AS_GRAPH]
    assert report["replays"] == 8 + 2
