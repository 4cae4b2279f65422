"""The memory that is planned for a step, and what a process takes that runs it."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.cross
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("model", ["mlp", "resnet", "gpt"])
def test_the_peak_of_a_process_is_as_planned(model):
    script = ROOT / "benchmarks" / "planned_memory.py"
    result = subprocess.run(
        [sys.executable, str(script), model, "--here"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1)
