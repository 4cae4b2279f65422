"""The train step compiled for TPUs that are not here: what XLA's program would do there.

``benchmarks/ahead_of_time.py`` compiles it, in a process of its own. ``tox -e aot`` has what that
needs besides JAX.
"""

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

ONE, EIGHT = "v5e:1", "v5e:8"

# Counted by hand: weights and biases, and for BatchNorm the scale and the shift.
MLP = 16 * 64 + 64 + 64 * 4 + 4
CONVNET = sum(9 * a * b + 3 * b for a, b in ((3, 32), (32, 64), (64, 128))) + 128 * 10 + 10
BLOCK = 4 * 128 * 128 + 4 * 128 + 2 * 4 * 128 * 128 + 5 * 128 + 4 * 128
GPT = 256 * 128 + 64 * 128 + 2 * BLOCK + 2 * 128 + 128 * 256 + 256
PARAMETERS = {"mlp": MLP, "convnet": CONVNET, "tiny-gpt": GPT}


def compiled(folder, *options):
    """A record of facts for each program."""
    path = folder / "facts.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "ahead_of_time.py"), "--json", str(path)]
    # What one machine keeps of a compilation is of no use for a device that is not there.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run(
        [*command, *options],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=900,
        check=True,
    )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    found = compiled(
        tmp_path_factory.mktemp("programs"), "--machine", ONE, EIGHT, "--model", *PARAMETERS
    )
    return {(each["model"], each["machine"]): each for each in found}


@pytest.mark.parametrize("machine", [ONE, EIGHT])
@pytest.mark.parametrize("model", PARAMETERS)
def test_state_is_updated_in_place_and_nothing_goes_to_the_host(programs, model, machine):
    facts = programs[model, machine]
    assert "error" not in facts
    # Weights and the two moments of AdamW; the results besides them are a few scalars.
    assert facts["aliased"] >= 3 * 4 * PARAMETERS[model]
    assert facts["donated"] > 0
    assert facts["results"] - facts["aliased"] < 8192
    assert facts["host_transfers"] == []


@pytest.mark.parametrize("model", PARAMETERS)
def test_one_chip_talks_to_nobody(programs, model):
    assert programs[model, ONE]["collectives"] == []


@pytest.mark.parametrize("model", ["mlp", "tiny-gpt"])
def test_gradients_and_loss_travel_once_an_update(programs, model):
    (only,) = programs[model, EIGHT]["collectives"]
    assert only["kind"] == "all-reduce"
    assert only["group"] == 8
    assert only["loops"] == 1  # that over the updates of a call
    gradients = 4 * PARAMETERS[model]
    assert gradients < only["size"] < 1.02 * gradients
    assert only["sent"] == pytest.approx(2 * 7 / 8 * only["size"])


def test_batch_norm_adds_statistics_of_the_whole_batch(programs):
    found = programs["convnet", EIGHT]["collectives"]
    assert {each["kind"] for each in found} == {"all-reduce"}
    assert max(each["loops"] for each in found) <= 1  # at most that over the updates of a call
    *statistics, gradients = sorted(each["size"] for each in found)
    assert 0.98 * 4 * CONVNET < gradients < 1.02 * 4 * CONVNET
    # Sums of a layer's channels, forward and backward.
    assert statistics
    assert max(statistics) <= 4 * 128 * 4


def test_gradients_travel_once_an_update_with_accumulation(tmp_path):
    (facts,) = compiled(tmp_path, "--machine", EIGHT, "--model", "tiny-gpt", "--accumulation", "4")
    (only,) = facts["collectives"]
    assert only["kind"] == "all-reduce"
    assert only["loops"] == 1  # outside of the loop over micro-batches
    assert only["size"] < 1.02 * 4 * GPT
