"""Training under ``kbtrain launch``: on two hosts, and restarted after a process was killed."""

import json

import numpy as np
import pytest
from helpers_hosts import ADDRESSES, two_hosts
from helpers_launch import launch, started
from paths import SUPPORT

pytestmark = [pytest.mark.neutral, pytest.mark.slow]

SCRIPT = SUPPORT / "launched_line.py"
ENVIRON = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
SECONDS = 300
# After three epochs of SGD at 0.1 on 61 samples of y = 2x + 3 in batches of 8, in exact arithmetic.
EXACT = (1.583857, 3.171361)


def assert_exact(folder, size):
    found = [json.loads((folder / f"weights.{rank}").read_text()) for rank in range(size)]
    assert found == [found[0]] * size
    np.testing.assert_allclose(found[0], EXACT, atol=2e-6)


def test_a_killed_process_is_restarted_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    status, out, err = launch(
        *("-n", 2, "--max-restarts", 1, SCRIPT, tmp_path, 1, 9), environ=ENVIRON, timeout=SECONDS
    )
    assert status == 0, err
    assert (tmp_path / "died").exists()
    assert out.splitlines().count("done 0") == out.splitlines().count("[1] done 1") == 1
    assert "kbtrain launch: rank 1 on " in err
    assert "was killed by SIGKILL" in err
    assert "rank 0" in err, "it ends with an error of its own"
    assert "still running after another process failed" not in err
    assert_exact(tmp_path, 2)


def test_two_hosts(tmp_path):
    with two_hosts() as names:
        common = ("-n", 1, "--nodes", 2, "--address", f"{ADDRESSES[0]}:29400", "--node-rank")
        inside = [["ip", "netns", "exec", name] for name in names]
        with started(*common, 1, SCRIPT, tmp_path, prefix=inside[1], environ=ENVIRON) as second:
            status, _, err = launch(
                *common, 0, SCRIPT, tmp_path, prefix=inside[0], environ=ENVIRON, timeout=SECONDS
            )
            assert status == 0, err
            _, second_err = second.communicate(timeout=SECONDS)
    assert second.returncode == 0, second_err
    assert_exact(tmp_path, 2)
