"""`benchmarks/gpu_run.py`: whatever happens to a part, the others run and the file is whole."""

import dataclasses
import importlib
import json
import logging
import os
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_run")


PROGRAMS = {
    "good": "row('first', True)",
    "bad": "row('before it dies', True); print('its last words'); os.abort()",
    "endless": "row('before it hangs', False); subprocess.Popen(['sleep', '600']); time.sleep(600)",
    "blind": "print('it sees no GPU'); sys.exit(3)",
    "blind too": "row('never', True)",
    "last": "row('last', None)",
}

BEFORE = """
import json, os, subprocess, sys, time
def row(case, passed):
    found = {"part": sys.argv[2], "case": case, "passed": passed, "figures": {"x": 0.5}}
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(found) + chr(10))
    open(sys.argv[1], "a").write('{"cut')
"""


@pytest.mark.neutral
@pytest.mark.skipif(os.name != "posix", reason="sessions of processes are POSIX")
def test_a_part_that_dies_or_hangs_ends_no_other(gpu_run, monkeypatch, tmp_path):
    def command(part, settings, rows):
        return [sys.executable, "-c", BEFORE + PROGRAMS[part.name], str(rows), part.name]

    monkeypatch.setattr(gpu_run, "command", command)
    monkeypatch.setattr(gpu_run, "LEAST_SECONDS", 1.0)
    parts = [
        gpu_run.Part(name, "blind" if "blind" in name else "torch", "", 1, 1.5, "blind" in name)
        for name in PROGRAMS
    ]
    parts.append(gpu_run.Part("too long", "torch", "", 1000, 1000))
    path = tmp_path / "found.json"
    run = gpu_run.Run(gpu_run.Settings("gpu"), tmp_path, 60.0, path)
    documents = []
    write = run.write
    monkeypatch.setattr(
        run, "write", lambda: (write(), documents.append(json.loads(path.read_text())))
    )
    start = time.monotonic()
    run.run(parts)
    assert time.monotonic() - start < 30
    ended = {name: outcome["how"] for name, outcome in documents[-1]["parts"].items()}
    assert ended == {
        "good": "done",
        "bad": "failed with status -6",
        "endless": "ended at its limit of 2 s",
        "blind": "left out",
        "blind too": "left out",
        "last": "done",
        "too long": "left out",
    }
    assert [len(document["parts"]) for document in documents] == list(range(1, 8))
    cases = {row["case"] for row in documents[-1]["rows"]}
    assert cases == {"first", "before it dies", "before it hangs", "last"}
    said = {name: outcome["said"].strip() for name, outcome in documents[-1]["parts"].items()}
    assert said["bad"] == "its last words"
    assert said["blind too"] == "it sees no GPU"
    assert not list(tmp_path.glob("*.new"))
    text = "\n".join(gpu_run.table(run.rows, run.outcomes, run.settings))
    assert "FAIL before it hangs" in text
    assert "2 of 3 checks passed" in text


@pytest.mark.neutral
@pytest.mark.parametrize("budget", [390, 230])
def test_what_matters_most_fits_into_the_shorter_budgets(gpu_run, budget):
    """By the expected times, with checks side by side: the figures of the README's claims."""
    parts = {part.name: part for part in gpu_run.PARTS}
    needed = ["machine", "graphs torch", "like cpu torch", "gpt124m torch", "mlp torch"]
    needed += ["resnet50 torch", "gpt124m jax"] if budget == 390 else []
    order = list(parts)
    last = max(order.index(name) for name in needed)
    checks = [part for part in gpu_run.PARTS[: last + 1] if not part.alone]
    alone = [part for part in gpu_run.PARTS[: last + 1] if part.alone]
    seconds = sum(part.expected for part in checks) / gpu_run.SIDE_BY_SIDE
    assert seconds + sum(part.expected for part in alone) < budget
    assert all(part.limit >= part.expected for part in gpu_run.PARTS)


@pytest.mark.neutral
def test_optimizers_are_found_where_kbtrain_is_only_on_the_path(gpu_run, monkeypatch, tmp_path):
    metadata = importlib.import_module("importlib.metadata")
    installed = metadata.entry_points(group="kbtrain.optimizers")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    gpu_run.as_if_installed(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    written = {e.name: e.value for e in found.entry_points if e.group == "kbtrain.optimizers"}
    assert {e.name: e.value for e in installed} == written


@pytest.mark.neutral
def test_an_optimizer_that_does_nothing_or_falls_back_fails(gpu_run, monkeypatch):
    correctness = importlib.import_module("on_gpu.correctness")
    start, moved = np.zeros(3), np.full(3, 1e-3)
    cpu = correctness.Outcome(np.ones(2), [start], [moved], [moved], [])
    for end, way in ((moved, 0.0), (start, 1.0), (1.005 * moved, 0.005), (moved * np.nan, np.inf)):
        here = dataclasses.replace(cpu, end=[end])
        assert correctness.way_apart(here, cpu) == pytest.approx(way, abs=1e-9)
    with correctness.Listener() as listener:
        logging.getLogger("optim").warning("Making a kernel does not work with triton 3")
        logging.getLogger("kbtrain").warning("Drawing random numbers does not work with triton 3")
        logging.getLogger("kbtrain").info("The step runs as a CUDA graph")
        logging.getLogger("kbtrain").info("of no interest")
    assert len(listener.messages) == 3
    assert [correctness.is_broken([m]) for m in listener.messages] == [True, True, False]


@pytest.mark.neutral
def test_a_target_is_judged_on_a_gpu_only(gpu_run):
    row = {"part": "mlp", "case": "kbtrain", "passed": None, "target": "mlp torch"}
    outcomes = {"mlp": {"how": "done", "seconds": 1.0, "said": "", "parts": ["mlp"]}}
    for device, ratio, verdict in (
        ("gpu", 0.4, "met"),
        ("gpu", 0.5, "MISSED"),
        ("cpu", 0.4, "not judged"),
    ):
        rows = [row | {"figures": {"kbtrain / torch loop": ratio}}]
        text = "\n".join(gpu_run.table(rows, outcomes, gpu_run.Settings(device)))
        assert f"at most 0.45 ({verdict})" in text


@pytest.mark.slow
def test_a_rehearsal_runs_all_parts_without_a_gpu(tmp_path):
    backend = keras.backend.backend()
    path = tmp_path / "found.json"
    command = [sys.executable, BENCHMARKS / "gpu_run.py", "--device", "cpu", "--tiny", "--together"]
    command += ["--backends", backend, "--json", path, "--budget", "800"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    (outcome,) = found["parts"].values()
    assert outcome["how"] == "done", outcome["said"]
    assert [row for row in found["rows"] if row["passed"] is False] == []
    assert {row["part"] for row in found["rows"]} == set(outcome["parts"])
    assert "no target is judged" in result.stdout


@pytest.mark.cross
def test_the_hand_written_resnet_has_the_parameters_of_the_one_of_keras(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    native = importlib.import_module("native_torch")
    parameters = native.MODELS["resnet50"]().parameters()
    assert sum(parameter.numel() for parameter in parameters) == 25_583_592
