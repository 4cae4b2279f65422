"""Programs for devices that are not here, compared with recorded ones; see the script's own page.

``tox -e aot`` has the compiler for TPUs, that for GPUs is the extra plan-gpu.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import GOLDEN, ROOT

COMPILERS = {"h100": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "v5e": ("libtpu",)}


@pytest.mark.neutral
def test_the_record_has_what_can_be_counted_by_hand():
    programs = json.loads((GOLDEN / "programs.json").read_text(encoding="utf-8"))["programs"]
    mlp = 16 * 64 + 64 + 64 * 4 + 4
    for device in COMPILERS:
        for count in (1, 8):
            facts = programs[f"mlp, {count} x {device}"]
            assert facts["parameter_bytes"] == 4 * mlp
            assert 0 <= facts["optimizer_bytes"] - 2 * 4 * mlp < 64
            assert facts["samples"] == 32 * count
            # The first layer's inputs need no gradient.
            assert facts["flops"] == 2 * 32 * (2 * 16 * 64 + 3 * 64 * 4)
        whole, divided = (programs[f"gpt, 8 x {device}{fsdp}"] for fsdp in ("", ", fsdp"))
        assert 7 * divided["optimizer_bytes"] < whole["optimizer_bytes"]
        # Each device sends its part of the gradients twice round the ring, in bfloat16 or float32.
        gradients = 2 * 7 / 8 * whole["parameter_bytes"]
        (_, sent) = whole["collectives"]["all-reduce"]
        assert gradients / 2 < sent < 1.02 * gradients


@pytest.mark.aot
@pytest.mark.parametrize("device", COMPILERS)
def test_programs_are_as_recorded(device):
    if not any(importlib.util.find_spec(name) for name in COMPILERS[device]):
        pytest.skip(f"no compiler for {device} is installed: tox -e aot")
    script = ROOT / "benchmarks" / "golden_programs.py"
    # What one machine keeps of a compilation is of no use for a device that is not there.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    result = subprocess.run(
        [sys.executable, str(script), "--devices", device],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("as recorded") == 7
