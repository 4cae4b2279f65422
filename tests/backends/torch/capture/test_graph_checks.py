"""Whether a CUDA graph fits into memory, and whether its numbers are those of the plain step."""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def checks():
    return importlib.import_module("kbtrain.backends.torch.capture.graph_checks")


@pytest.fixture
def outcome(torch, checks):
    """``outcome(value, before)``: what a run has computed that changed a variable so."""
    random = [torch.zeros(3, dtype=torch.uint8)]

    def make(value, before, drawn=random):
        return checks.Outcome(checks.summary([value], [before]), drawn)

    return make


def test_two_possible_sums_of_atomic_additions_are_no_wrong_graph(torch, checks, outcome):
    """Each run gives one of them, the second in three of ten runs: a graph may give either."""
    before = torch.ones(8)
    accepted = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)

        def run(draw=draw):
            rare = float(draw.random() < 0.3)
            return outcome(before * 0.5 * (1 + 2.5e-7 * rare), before)

        runs = [run() for _ in range(6)]
        accepted += checks.agree(runs[:3], runs[3:], checks.floors([before]))
    assert accepted == 200


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_a_graph_with_other_numbers_is_recognized(torch, checks, outcome, dtype):
    dtype = getattr(torch, dtype)
    before = torch.full((16,), 1_000_000, dtype=torch.float64).to(dtype)
    right = before + torch.ones((), dtype=dtype) * (2**14 if dtype is torch.bfloat16 else 16)
    wrong = {torch.int64: right + 1, torch.float32: right * 1.0001}.get(dtype, right * 1.1)
    plain = [outcome(right, before)] * 3
    floors = checks.floors([before])
    assert checks.agree(plain, plain, floors)
    assert not checks.agree([plain[0], outcome(wrong, before)], plain, floors)


def test_a_graph_that_changes_nothing_is_recognized_however_small_the_update_is(
    torch, checks, outcome
):
    before = torch.ones(16)
    plain = [outcome(before * (1 + 1.2e-7), before)] * 3
    assert not checks.agree([outcome(before.clone(), before)], plain, checks.floors([before]))


def test_a_graph_that_draws_other_random_numbers_is_recognized(torch, checks, outcome):
    before = torch.ones(4)
    plain = outcome(before, before)
    other = outcome(before, before, [torch.ones(3, dtype=torch.uint8)])
    assert not checks.agree([other], [plain], checks.floors([before]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_no_run_without_a_graph_is_further_from_others_than_noise(torch, checks, outcome, dtype):
    """Where runs differ by more than rounding, a graph may be as far from them."""
    before = torch.full((16,), 1000, dtype=getattr(torch, dtype))
    plain = [outcome(before + 10 * i, before) for i in (1, 2, 3)]
    assert checks.agree([outcome(before + 20, before)], plain, checks.floors([before]))


def test_memory_is_needed_for_graph_comparison_and_state(torch, checks, monkeypatch):
    device = torch.device("cuda", 1)
    memory = {"memory_reserved": 500 << 20, "memory_allocated": 200 << 20}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda which, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda which: (300 << 20, 1 << 30))
    share = [1.0]
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda which: share[0])
    for share[0], free in ((0.6, 300 + 114), (0.5, 300 + 12), (0.4, 300), (1.0, 600)):
        assert checks.free_bytes(device) >> 20 == free
    assert checks.lack_of_memory(200 << 20, 100 << 20, device) is None
    reason = checks.lack_of_memory(200 << 20, 150 << 20, device)
    assert reason == (
        "it needs 605 MiB of free memory (200 MiB for itself, as much for the comparison with the "
        "plain step, 150 MiB for a copy of the state, and a margin), and 600 MiB are free"
    )


@pytest.mark.parametrize("changed", [True, False])
def test_a_run_is_repeated_without_graphs_only_if_it_changed_nothing(
    torch, checks, monkeypatch, changed
):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    state, log = [torch.zeros(3)], []

    def run():
        log.append(float(torch.rand(())))
        if changed:
            state[0].add_(1)
        if len(log) == 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ...")
        return "done"

    def call():
        return checks.without_graphs_if_oom(
            run, state, torch.device("cuda"), lambda: log.append("released") is None
        )

    if changed:
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            call()
        assert log[1:] == ["released"]
    else:
        assert call() == "done"
        assert log[1] == "released"
        assert log[0] == log[2]  # the same random numbers
