"""The least time of an update, against figures computed by hand."""

import dataclasses

import pytest

from kbtrain.plan.program import ProgramFacts
from kbtrain.plan.roofline import roofline
from kbtrain.utils.machine.devices import DeviceSpec

pytestmark = pytest.mark.neutral

DEVICE = DeviceSpec(
    "d", "D", "gpu", 1000, 0.1, {"bfloat16": 200.0, "tensorfloat32": 100.0, "float32": 10.0},
    bandwidth=50.0, link_bandwidth=20.0, linked_devices=4, network_bandwidth=2.0,
)  # fmt: skip


def facts(**changes):
    made = ProgramFacts(
        compiled_for="d", device_count=1, batch_size=8, accumulation=1, samples=8, tokens=None,
        parameters=10, parameter_bytes=40, trainable_bytes=40, gradient_bytes=40,
        optimizer_bytes=80, other_state_bytes=4, batch_bytes=32, temporary_bytes=100,
        program_bytes=0, peak_bytes=256, flops=1000.0, program_flops=1200.0, bytes_accessed=200.0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_products_take_operations_over_peak():
    bound = roofline(facts(), DEVICE, "bfloat16")
    assert bound.compute_seconds == 6.0  # 1200 / 200
    assert bound.memory_seconds == 4.0  # 200 / 50
    assert (bound.network_seconds, bound.seconds, bound.bound_by) == (0.0, 6.0, "compute")
    assert bound.samples_per_second == pytest.approx(8 / 6)
    assert bound.mfu == pytest.approx(1000 / 200 / 6)
    assert bound.tokens_per_second is None


def test_tokens():
    assert roofline(facts(tokens=512), DEVICE, "bfloat16").tokens_per_second == 512 / 6


@pytest.mark.parametrize(
    ("dtype", "tf32", "peak", "shown"),
    [
        ("float32", True, 100.0, "tensorfloat32"),
        ("float32", False, 10.0, "float32"),
        ("float16", True, 200.0, "float16"),
    ],
)
def test_the_peak_is_that_of_the_products(dtype, tf32, peak, shown):
    bound = roofline(facts(bytes_accessed=0), DEVICE, dtype, tf32)
    assert bound.compute_seconds == 1200 / peak
    assert bound.dtype == shown


def test_a_dtype_without_a_peak_leaves_memory_and_network():
    bound = roofline(facts(), DEVICE, "float64")
    assert (bound.compute_seconds, bound.mfu) == (None, None)
    assert (bound.seconds, bound.bound_by) == (4.0, "memory")


def test_collectives_go_over_the_links_within_a_group():
    sent = {"all-reduce": (2, 140), "all-gather": (1, 60)}
    bound = roofline(facts(device_count=4, collectives=sent), DEVICE, "bfloat16")
    assert bound.network_seconds == 10.0  # 200 / 20
    assert bound.bound_by == "network"


def test_what_leaves_a_machine_goes_over_the_network():
    sent = {"collectives": {"all-reduce": (1, 200)}, "link_bytes": 160.0}
    within = roofline(facts(device_count=8, **sent), DEVICE, "float16")
    assert within.network_seconds == 8.0  # 160 / 20
    across = roofline(facts(device_count=8, network_bytes=50.0, **sent), DEVICE, "float16")
    assert across.network_seconds == 25.0  # 50 / 2


def test_unknown_traffic_is_no_zero():
    assert roofline(facts(bytes_accessed=None), DEVICE, "bfloat16").memory_seconds is None
