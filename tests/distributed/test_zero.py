"""Two processes that divide the optimizer's state give the numbers of one that has all of it."""

import json

import distributed_cases
import divided_cases
import numpy as np
import pytest
from helpers_together import SUPPORT, run_processes

from kbtrain import backends
from kbtrain.checkpoint.storage.folder_reader import read_checkpoint

TOLERANCE = 1e-5 if backends.load().name == "tensorflow" else 2e-6
CASES = ["tokens", "accumulated", "half precision", "averaged", "adamw", "muon", "adafactor"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("divided")


@pytest.fixture(scope="module")
def one(folder):
    """One process, whose state is not divided."""
    distributed_cases.FOLDER = folder / "of 1"
    return divided_cases.run(divided=False)


@pytest.fixture(scope="module")
def two(folder, one):
    output = folder / "results"
    program = SUPPORT / "divided_cases.py"
    run_processes(2, program, str(output), str(folder / "of 1"), timeout=540)
    return [json.loads((folder / f"results.{rank}").read_text()) for rank in range(2)]


def assert_close(found, expected, tolerance=TOLERANCE):
    for name, numbers in expected.items():
        if name != "elements":
            np.testing.assert_allclose(found[name], numbers, tolerance, tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_one_process(one, two, case):
    # float16 rounds the gradients of each process.
    assert_close(two[0][case], one[case], 1e-3 if case == "half precision" else TOLERANCE)


@pytest.mark.slow
def test_an_overflow_is_found_by_all(one, two):
    assert [found["half precision"]["updates"] for found in (one, *two)] == [[2], [2], [2]]


@pytest.mark.slow
def test_both_processes_have_the_same_weights_bit_for_bit(two):
    for case in two[0]:
        for name, numbers in two[0][case].items():
            assert name == "elements" or two[1][case][name] == numbers, (case, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_each_process_has_a_part_of_the_state(one, two, name):
    parts = [found[name]["elements"][0] for found in two]
    (whole,) = one[name]["elements"]
    if backends.load().HAS_MESHES:  # shapes are those of the whole
        assert parts == [whole, whole]
    else:
        assert sum(parts) == whole
        assert max(parts) < 0.6 * whole


@pytest.mark.slow
def test_a_run_of_one_process_is_resumed_by_two_and_the_other_way_round(folder, one, two):
    final = {n: v for n, v in one["averaged"].items() if n.startswith("weight")}
    assert_close(two[0]["resumed"], final)
    saved = folder / "of 2" / "averaged" / "checkpoint-3"
    distributed_cases.FOLDER = folder / "again"
    assert_close(divided_cases.averaged(False, "resumed", saved), final)


@pytest.mark.slow
def test_the_checkpoint_of_two_has_the_arrays_of_that_of_one(folder, one, two):
    paths = [folder / f"of {n}" / "averaged" / "checkpoint-6" for n in (1, 2)]
    alone, together = (read_checkpoint(path) for path in paths)
    assert alone.arrays.keys() == together.arrays.keys()
    for group in ("model", "optimizer", "evaluation"):
        shapes = [
            sorted((np.shape(x), str(x.dtype)) for x in c.arrays[group].values())
            for c in (alone, together)
        ]
        assert shapes[0] == shapes[1]
