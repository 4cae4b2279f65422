"""The device that a run is planned for."""

import pytest
from paths import ROOT

from kbtrain.errors import ConfigurationError
from kbtrain.plan.devices import device_from, device_named, target_config
from kbtrain.utils.machine.devices import known_devices

pytestmark = pytest.mark.neutral

H100_TARGET = device_named("h100").target
OWN = {"memory_bytes": 48e9, "peak_flops": {"bfloat16": 181e12}, "bandwidth": 864e9}


@pytest.mark.parametrize(
    ("given", "name"),
    [("H100", "h100"), ("a100", "a100-80gb"), ("TPU v5e", "v5e"), ("H100_PCIe", "h100-pcie")],
)
def test_names_and_other_spellings(given, name):
    assert device_named(given).name == name


@pytest.mark.parametrize(("given", "nearest"), [("h10", "h100"), ("a100-40", "a100-40gb")])
def test_an_unknown_name_is_refused_with_the_nearest_and_the_list(given, nearest):
    with pytest.raises(ConfigurationError, match=f"Did you mean {nearest}\\?") as caught:
        device_named(given)
    assert all(each.name in str(caught.value) for each in known_devices())


@pytest.mark.parametrize("device", [None, 3, ""])
def test_what_is_no_name_is_refused(device):
    with pytest.raises(ConfigurationError, match="must be a name"):
        device_named(device)


def test_a_device_of_one_s_own_in_a_file(tmp_path):
    path = tmp_path / "l40s.yaml"
    path.write_text(
        "title: NVIDIA L40S\nmemory_bytes: 48e9\nbandwidth: 864e9\nreserve: 0.1\n"
        "peak_flops:\n  bfloat16: 181e12\n  float32: 91.6e12\nlink_bandwidth: 32e9\n"
        "linked_devices: 8\nnetwork_bandwidth: 12.5e9\nsources: https://example.com/l40s\n"
    )
    device = device_named(str(path))
    assert (device.name, device.title, device.kind) == ("l40s", "NVIDIA L40S", "gpu")
    assert device.usable_bytes == pytest.approx(43.2e9)
    assert device.peak("float32") == 91.6e12
    assert device.target is None


def test_a_device_like_a_known_one(tmp_path):
    path = tmp_path / "slow.yaml"
    path.write_text("like: h100\nnetwork_bandwidth: 1.25e9\n")
    device, h100 = device_named(path), device_named("h100")
    assert device.network_bandwidth == 1.25e9
    assert (device.memory_bytes, device.peak_flops) == (h100.memory_bytes, h100.peak_flops)
    assert device.target == h100.target
    assert device.name == "slow"


def test_the_compiler_is_told_the_figures_of_the_file():
    device = device_from({"like": "h100", "memory_bytes": 40e9, "bandwidth": 2e12}, "half.yaml")
    text = target_config(device)
    assert "device_memory_size: 40000000000\n" in text
    assert "memory_bandwidth: 2000000000000\n" in text
    assert "device_memory_size: 84942979072\n" in target_config(device_named("h100"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "must say memory_bytes, peak_flops, bandwidth"),
        (OWN | {"memory": 1}, "no 'memory'. Did you mean memory_bytes"),
        (OWN | {"memory_bytes": "48 GB"}, "memory_bytes must be a number, such as 80e9"),
        (OWN | {"bandwidth": 0}, "bandwidth must be above 0"),
        (OWN | {"reserve": 1}, "reserve is a part"),
        (OWN | {"kind": "cpu"}, "kind must be gpu or tpu"),
        (OWN | {"peak_flops": {"bf16": 1}}, "for each dtype, of bfloat16"),
        (OWN | {"peak_flops": 181e12}, "for each dtype, of bfloat16"),
        (OWN | {"target": "sm_89"}, "target must be a mapping"),
        (OWN | {"target": {"platform": "rocm"}}, "platform must be cuda or tpu. Received: 'rocm'"),
        (OWN | {"target": {"platform": "tpu"}}, "platform tpu must say topology"),
        (OWN | {"target": {"platform": "cuda"}}, "cuda must say description, compute_capability"),
        (
            {"like": "h100", "target": {**H100_TARGET, "core_count": "many"}},
            "target.core_count must be a number",
        ),
        ({"like": "h1000"}, "Did you mean h100"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(values, message):
    with pytest.raises(ConfigurationError, match=message):
        device_from(values, "mine.yaml")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        device_named(tmp_path / "none.yaml")


def test_xla_gets_the_figures_of_the_table():
    text = target_config(device_named("h100"))
    assert "core_count: 132\n" in text
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert "device_memory_size: 84942979072\n" in text


def test_the_documentation_has_every_device():
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for device in known_devices():
        size = f"{device.memory_bytes / 2**30:.1f}"
        assert f"| `{device.name}` | {device.title} | {size} |" in page
