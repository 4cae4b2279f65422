"""What the kernels that are made of rules are given, without Triton and without a GPU."""

import json

import pytest
from helpers_resume import run_script
from paths import ROOT, SUPPORT

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def found():
    return json.loads(
        run_script(SUPPORT / "helpers_rule_groups.py", [], "torch", [ROOT], timeout=300)
    )


def test_a_table_has_room_for_all_that_a_kernel_writes_into_it(found):
    """However many tensors there are: one launch writes 448 numbers, wherever it begins."""
    assert {count: room for count, (room, *_) in found["room"].items() if room < 448} == {}


def test_as_many_kernels_are_launched_as_are_counted(found):
    launches = {int(count): pair for count, (_, *pair) in found["room"].items()}
    assert launches == {
        **{1: [2, 2], 128: [2, 2], 129: [2, 2], 448: [2, 2]},
        **{449: [3, 3], 450: [3, 3], 897: [4, 4]},
    }


def test_a_changed_hyperparameter_is_in_the_next_kernel(found):
    for (before,), (after,), again in found["changed"]:
        assert 0.5 not in before
        assert 0.5 in after
        assert again == []  # the same ones


def test_a_hyperparameter_that_changes_with_every_update_needs_few_kernels(found):
    """And nothing is left of them when their optimizer is gone."""
    made, texts, left = found["many numbers"]
    assert made == 20
    assert texts <= 8 + 2  # one reads its numbers, one writes tables
    assert left == 0


def test_tensors_on_several_devices_get_no_kernel(found):
    assert found["devices"] == [True, False, False]


def test_autograd_notices_an_update(found):
    assert min(found["versions"].values()) >= 1
    assert found["versions on a GPU"] >= 1


def test_the_default_dtype_changes_nothing(found):
    assert all(found["default dtype"].values())
