"""The table of accelerators."""

import json
from importlib import resources

import pytest

from kbtrain.utils.machine.devices import known_devices, recognized

pytestmark = pytest.mark.neutral

WANTED = {
    *("a100-40gb", "a100-80gb", "h100", "h100-pcie", "h200", "b200", "l4"),
    *("v4", "v5e", "v5p", "v6e"),
}


def test_the_devices_that_people_rent_are_in_the_table():
    names = [each.name for each in known_devices()]
    assert set(names) >= WANTED
    assert len(names) == len(set(names))


@pytest.mark.parametrize("device", known_devices(), ids=lambda each: each.name)
def test_a_device_has_all_figures_and_says_where_they_are_from(device):
    assert device.kind in ("gpu", "tpu")
    assert 8e9 < device.usable_bytes < device.memory_bytes < 300e9
    assert 1e11 < device.bandwidth < 1e13
    assert 1e10 <= device.link_bandwidth < device.bandwidth
    assert device.network_bandwidth < device.link_bandwidth
    half = device.peak("bfloat16") or device.peak("float16")
    assert half >= (device.peak("float32") or 0)
    assert all(each.startswith("https://") for each in device.sources)
    assert device.sources


def test_the_notes_explain_every_figure():
    table = json.loads(
        resources.files("kbtrain.utils.machine").joinpath("devices.json").read_text("utf-8")
    )
    explained = {note.partition(":")[0] for note in table["notes"]}
    figures = {"memory_bytes", "reserve", "peak_flops", "bandwidth", "link_bandwidth"}
    assert explained >= figures | {"linked_devices", "network_bandwidth", "target"}


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("gpu:0 (NVIDIA A100-SXM4-40GB)", "a100-40gb"),
        ("gpu:0 (NVIDIA A100 80GB PCIe)", "a100-80gb"),
        ("cuda:0 (NVIDIA H100 80GB HBM3)", "h100"),
        ("cuda:0 (NVIDIA H100 NVL)", "h100-nvl"),
        ("cuda:0 (NVIDIA L4)", "l4"),
        ("tpu:0 (TPU v6 lite)", "v6e"),
    ],
)
def test_a_framework_s_name_is_recognized(name, device):
    assert recognized(name).name == device


def test_what_has_no_bfloat16():
    without = {each.name for each in known_devices() if each.peak("bfloat16") is None}
    assert without == {"t4", "v100", "v100-pcie"}


def test_other_names_are_not():
    assert recognized("gpu:0 (NVIDIA L40S)") is None
    assert recognized("cpu:0") is None
