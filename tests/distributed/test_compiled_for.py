"""kbtrain's step beside a hand-written one, both compiled for a TPU that is not here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not (importlib.util.find_spec("libtpu") and importlib.util.find_spec("jax")),
        reason="libtpu is not installed: tox -e aot",
    ),
]

ROWS = "clipping and check", "accumulation", "evaluation"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    path = tmp_path_factory.mktemp("compared") / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "compiled_for.py"), "--json", str(path)]
    options = ["--machine", "v5e", "--size", "tiny", "--row", *ROWS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, *options], env=environment, timeout=900, check=True)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {each["row"]: each for each in found}


@pytest.mark.parametrize("row", ROWS)
def test_the_program_is_that_of_a_hand_written_step(row, compared):
    native, own = compared[row]["native"], compared[row]["kbtrain"]
    assert own["host_transfers"] == 0
    assert own["new"] - native["new"] <= 2048  # a few scalars; all state is in place
    # The flag of a run that has halted, and the numbers that each update gives.
    assert own["kernels"] <= native["kernels"] + 20
    assert own["copies"] <= native["copies"] + 8
