"""The kernels that are made of rules for a GPU: run by Triton's interpreter, and compiled."""

import json
import sys

import pytest
from helpers_resume import run_script
from paths import ROOT, SUPPORT

pytestmark = [
    pytest.mark.cross,  # needs PyTorch and Triton, whatever Keras runs on
    pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only"),
]

# Sums, scalar slots, decay and L2; every second one with parameters in bfloat16.
NAMES = ["nadam", "lamb", "rmsprop", "adamw"]


def run(*arguments, program=SUPPORT / "triton_rules.py", **environ):
    """What a program prints, on PyTorch."""
    return run_script(program, arguments, "torch", [ROOT], **environ)


@pytest.fixture(scope="module")
def numbers():
    return json.loads(run("numbers", *NAMES, TRITON_INTERPRET="1"))


def test_follow_float64_in_every_group_of_tensors(numbers):
    assert list(numbers["distance"]) == NAMES
    assert {name: x for name, x in numbers["distance"].items() if not x < 1e-5} == {}


def test_a_flag_stops_all_of_an_update_and_a_scale_divides(numbers):
    assert numbers["flag and scale"] == dict.fromkeys(NAMES[:2], True)


def test_what_can_be_written_for_triton_and_that_the_rest_runs_and_says_so_once(numbers):
    assert numbers["inside"]  # LAMB brings a constant along
    value, *log = numbers["tanh"]
    assert value == pytest.approx(-0.761594, rel=1e-5)
    assert len(log) == 1
    assert "Tanh.update" in log[0]
    assert "aten.tanh" in log[0]


def test_matrices_that_are_updated_together_are_those_that_are_updated_one_by_one(numbers):
    found = numbers["stacked"]
    assert 1e-5 < found.pop("muon auto") < 0.02  # in bfloat16 on a GPU, on a CPU in float32
    assert {name: x for name, x in found.items() if not x < 1e-6} == {}


def test_more_tensors_than_a_launch_has_pointers_for(numbers):
    assert numbers["many"] < 1e-6


def test_wrong_kernels_are_found_before_they_update_anything(numbers):
    """A decay, and a branch that is taken late."""
    assert numbers["wrong"] == ["", "its results are not those of the rule (parameter)"] * 4


def test_8_bit_state_is_that_of_operations_on_lists(numbers):
    """Codes and scales, rounded to the nearest and at random, beside tensors in float32."""
    found = numbers["eight bit"]
    assert list(found) == ["adamw_8bit", "lion_8bit"]
    for errors in found.values():
        assert errors["difference"] < 1e-5
        assert errors["other codes"] < 1e-3
        a, b, c, embedding = errors["from float64"]
        assert max(a, c) < 0.01  # as near as 8 bits are
        assert max(b, embedding) < 1e-5


def test_without_triton_rules_run_on_lists_and_one_warning_says_so(numbers):
    log = [x for x in numbers["without"] if isinstance(x, str)]
    distances = [x for x in numbers["without"] if not isinstance(x, str)]
    assert len(log) == 1
    assert "Triton is not installed" in log[0]
    assert len(distances) == 2
    assert max(distances) < 1e-5


def test_compile_for_two_gpus():
    found = json.loads(run("compile", "lamb", "schedule_free_radam", "dithered"))
    assert len(found) == 2 * (4 + 2 + 2)
    for name, code in found.items():
        assert code["bytes"] > 1000, name
        assert code["spilled"] == 0, name
        if name.endswith(("update", "sums")):  # 16 bytes a load, of every tensor
            assert code["vector loads"] >= 6, name


def test_kernels_and_bytes_of_an_update():
    """With three kernels that count the update; bytes: what is read and what is written, once."""
    expected = {
        **{"sgd": (5, 12), "adam": (5, 28), "adamw": (5, 28), "adagrad": (5, 20), "lion": (5, 20)},
        **{"rmsprop": (5, 20), "nadam": (5, 28), "radam": (5, 28), "adan": (5, 44)},
        **{"ademamix": (5, 36), "grokadamw": (5, 36), "schedule_free_sgd": (5, 20)},
        **{"schedule_free_adamw": (5, 28), "schedule_free_radam": (5, 28)},
        # A norm of the parameter, or a mean, before anything is moved: two passes.
        **{"lamb": (7, 40), "stable_adamw": (7, 36)},
        # Parameter twice, gradient, and twice 1.016 bytes a slot; biases have float32 state.
        **{"adamw_8bit": (5, 16.1), "lion_8bit": (5, 14), "rmsprop_8bit": (5, 14)},
        "ademamix_8bit": (5, 18.1),
    }
    lines = run(*expected, program=ROOT / "benchmarks" / "optimizer_counts.py").splitlines()
    found = {line.split()[0]: (int(line.split()[1]), float(line.split()[3])) for line in lines}
    assert found == expected
    assert all("reads by the host 0" in line for line in lines)
