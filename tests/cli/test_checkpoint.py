"""``python -m kbtrain checkpoint``: what it prints, its exit codes, and that it starts light."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from kbtrain.checkpoint import CheckpointStore
from kbtrain.cli import main

pytestmark = pytest.mark.core


@pytest.fixture
def run(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    for step in (5, 20, 100):
        store.save(
            step,
            {"model": {"net/kernel": np.ones((2, 3), "float32")}, "optimizer": {}},
            {"trainer_state": {"best_global_step": 20, "best_metric": 0.25, "max_steps": 200}},
            {"backend": "any", "versions": {"keras": "3"}},
            other_files={"assets/words": b"one two"},
        )
    return store.directory


def damage(path):
    (path / "optimizer.h5").write_bytes((path / "optimizer.h5").read_bytes()[:-1])


def called(capsys, *arguments):
    code = main(["checkpoint", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_ls_lists_by_step_and_marks_the_best(run, capsys):
    code, lines, _ = called(capsys, "ls", run)
    assert code == 0
    assert [line.split()[0] for line in lines[1:]] == [f"checkpoint-{n}" for n in (5, 20, 100)]
    assert [line.endswith("best (0.25)") for line in lines[1:]] == [False, True, False]
    assert all(" any" in line for line in lines[1:])


def test_ls_names_what_is_obviously_damaged(run, capsys):
    damage(run / "checkpoint-20")
    _, lines, _ = called(capsys, "ls", run)
    assert ["DAMAGED" in line for line in lines[1:]] == [False, True, False]
    assert "optimizer.h5" in lines[2]


def test_verify_reads_every_byte(run, capsys):
    assert called(capsys, "verify", run)[:2] == (
        0,
        ["checkpoint-5: intact", "checkpoint-20: intact", "checkpoint-100: intact"],
    )
    data = bytearray((run / "checkpoint-20" / "optimizer.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "checkpoint-20" / "optimizer.h5").write_bytes(data)
    code, lines, _ = called(capsys, "verify", run)
    assert (code, lines[1]) == (1, "checkpoint-20: DAMAGED")
    assert "optimizer.h5: contents altered" in lines[2]
    assert called(capsys, "verify", run / "checkpoint-5")[0] == 0


def test_show_has_arrays_shapes_dtypes_step_and_best(run, capsys):
    code, lines, _ = called(capsys, "show", run)
    assert code == 0
    assert lines[0].endswith("checkpoint-100")
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "step: 100 of 200" in text
    assert "best: 0.25 at step 20" in text
    assert "versions: keras 3" in text
    assert "net/kernel float32 (2, 3)" in text
    assert "model: 6 values" in text
    assert "optimizer: 0 arrays, 0 bytes" in text
    assert "other files: 1, 7 bytes\nassets/words" in text.replace("\n ", "\n")


@pytest.mark.parametrize("command", ["ls", "verify", "show"])
def test_what_is_no_checkpoint_is_an_error_in_words(command, tmp_path, capsys):
    code, _, err = called(capsys, command, tmp_path)
    assert code == 2
    assert err.startswith(f"kbtrain checkpoint: {tmp_path} is not a checkpoint")
    code, _, err = called(capsys, command, tmp_path / "nowhere")
    assert (code, err) == (2, f"kbtrain checkpoint: There is no {tmp_path / 'nowhere'}.\n")


def test_showing_a_damaged_one_is_an_error_in_words(run, capsys):
    damage(run / "checkpoint-100")
    code, _, err = called(capsys, "show", run)
    assert code == 2
    assert "checkpoint-100 is damaged: optimizer.h5" in err


@pytest.mark.parametrize("arguments", [[], ["ls"], ["nothing"]])
def test_arguments_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["checkpoint", *arguments])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("kbtrain checkpoint")
    assert said.endswith("--help.\n")


@pytest.fixture
def exported(monkeypatch):
    """The checkpoints that were exported, without exporting them."""
    found = []
    monkeypatch.setattr("kbtrain.cli.checkpoint.export", lambda path, *_, **__: found.append(path))
    return found


def test_a_run_is_exported_from_its_best_checkpoint_if_there_is_one(run, capsys, exported):
    said = called(capsys, "export", run, "a.keras")[1]
    assert exported.pop() == run / "checkpoint-20"
    assert said == [f"Wrote a.keras from {run / 'checkpoint-20'}, the best (0.25)."]

    damage(run / "checkpoint-100")  # the one before knows, too
    called(capsys, "export", run, "a.keras")
    assert exported.pop() == run / "checkpoint-20"

    shutil.rmtree(run / "checkpoint-20")
    said = called(capsys, "export", run, "a.keras")[1]
    assert exported.pop() == run / "checkpoint-100"
    assert said[0].endswith("checkpoint-100, the last.")


def test_the_best_that_was_saved_is_exported(tmp_path, capsys, exported):
    store = CheckpointStore(tmp_path)
    # The best evaluation was at update 7, of which there is no checkpoint.
    state = {"best_global_step": 7, "best_metric": 0.1, "best_model_checkpoint": "/at/checkpoint-5"}
    for step in (5, 10):
        arrays = {"model": {"w": np.ones(2, "float32")}}
        store.save(step, arrays, {"trainer_state": state}, {"backend": "any"})
    assert called(capsys, "export", tmp_path, "a.keras")[1][0].endswith("checkpoint-5, the best.")
    assert exported == [tmp_path / "checkpoint-5"]


def test_a_step_to_export(run, capsys, exported):
    assert called(capsys, "export", run, "a.keras", "--step", 5)[0] == 0
    assert called(capsys, "export", run / "checkpoint-100", "a.keras")[0] == 0
    assert exported == [run / "checkpoint-5", run / "checkpoint-100"]
    code, _, err = called(capsys, "export", run, "a.keras", "--step", 6)
    assert code == 2
    assert "no checkpoint of step 6: checkpoint-5, checkpoint-20, checkpoint-100." in err


def test_it_starts_without_keras_and_frameworks(run):
    program = (
        "import sys\nfrom kbtrain.cli import main\n"
        f"codes = [main(['checkpoint', c, {str(run)!r}]) for c in ('ls', 'verify', 'show')]\n"
        "heavy = {'keras', 'torch', 'tensorflow', 'jax'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or any(codes) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ls_marks_one_checkpoint(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "run")
    for step in (1, 2, 3):  # each one was the best when it was saved, but the last
        best = {"best_global_step": min(step, 2), "best_metric": 1 / min(step, 2)}
        store.save(step, {"model": {"k": np.ones(1, "float32")}}, {"trainer_state": best}, {})
    _, lines, _ = called(capsys, "ls", store.directory)
    assert [line.endswith("best (0.5)") for line in lines[1:]] == [False, True, False]


def test_checkpoints_at_an_address(run, tmp_path, capsys):
    address = run.as_uri()
    here, there = (called(capsys, "ls", place)[1] for place in (run, address))
    assert here == there
    assert called(capsys, "verify", address)[:2] == (
        0,
        ["checkpoint-5: intact", "checkpoint-20: intact", "checkpoint-100: intact"],
    )
    code, lines, _ = called(capsys, "show", f"{address}/checkpoint-20")
    assert code == 0
    assert lines[0] == f"{address}/checkpoint-20"
    assert "step:             20 of 200" in lines
    assert called(capsys, "show", address)[1][0] == f"{address}/checkpoint-100"
    damage(run / "checkpoint-20")
    assert "DAMAGED" in called(capsys, "ls", address)[1][2]
    code, lines, _ = called(capsys, "verify", address)
    assert code == 1
    assert lines[0] == "checkpoint-5: intact"
    assert lines[1] == "checkpoint-20: DAMAGED"
    assert "optimizer.h5" in lines[2]
    (run / "checkpoint-20" / "manifest.json").unlink()
    code, lines, _ = called(capsys, "verify", f"{address}/checkpoint-20")
    assert code == 2
    assert "is not complete: it has no manifest.json" in lines[1]
    code, _, error = called(capsys, "ls", (tmp_path / "none").as_uri())
    assert code == 2
    assert "There is no checkpoint at file://" in error


def test_an_export_from_an_address_takes_the_best_or_that_of_a_step(run, capsys, exported):
    words = ("export", run.as_uri(), "a.keras")
    said = called(capsys, *words)[1]
    assert exported.pop().name == "checkpoint-20"
    assert said == [f"Wrote a.keras from checkpoint-20 of {run.as_uri()}, the best (0.25)."]
    assert called(capsys, *words, "--step", 5)[0] == 0
    assert exported.pop().name == "checkpoint-5"
    code, _, error = called(capsys, *words, "--step", 7)
    assert code == 2
    assert f"{run.as_uri()} has no checkpoint of step 7" in error
    (run / "checkpoint-20" / "manifest.json").unlink()  # an upload that was not completed
    assert called(capsys, *words)[1][0].endswith(
        "checkpoint-100 of " + run.as_uri() + ", the last."
    )
    assert exported.pop().name == "checkpoint-100"
