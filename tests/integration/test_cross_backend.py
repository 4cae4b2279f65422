"""The same run on the three backends, and runs that change backend half-way."""

import itertools
import shutil

import numpy as np
import pytest
from helpers_cross import initial_weights, on_backend

pytestmark = [pytest.mark.cross, pytest.mark.slow]

BACKENDS = ("jax", "tensorflow", "torch")
PAIRS = list(itertools.product(BACKENDS, repeat=2))
STEPS, STOP = 60, 25
RUNS = {
    "convnet": {"max_steps": 200},
    "gpt": {"max_steps": 200},
    "mlp": {"max_steps": STEPS, "learning_rate": 1e-2, "max_grad_norm": 0.1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cross")


@pytest.fixture(scope="module")
def curves(folder):
    """(backend, model) -> results, those of the run to go on from too: one process per backend."""
    for name in RUNS:
        initial_weights(name, folder / f"{name}.npz")
    found = {}
    for backend in BACKENDS:
        tasks = [
            {"model": name, "initial": str(folder / f"{name}.npz"), "changes": changes}
            for name, changes in RUNS.items()
        ]
        tasks.append(saving(folder, backend))
        names = [*RUNS, "whole"]
        found |= {
            (backend, n): r for n, r in zip(names, on_backend(backend, folder, tasks), strict=True)
        }
    return found


MOVING = {
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": STOP,
    "learning_rate": 1e-2,
}


def saving(folder, backend, **more):
    return {
        "model": "mlp",
        "initial": str(folder / "mlp.npz"),
        "output_dir": str(folder / f"whole-{backend}"),
        "changes": MOVING,
    } | more


@pytest.fixture(scope="module")
def continued(folder, curves):
    """(from, to) -> results of a run that went on in another process, here or elsewhere."""
    found = {}
    for target in BACKENDS:
        tasks = []
        for source in BACKENDS:
            output_dir, name = folder / f"{source}-to-{target}", f"checkpoint-{STOP}"
            shutil.copytree(folder / f"whole-{source}" / name, output_dir / name)
            tasks.append(saving(folder, target, resume=True, output_dir=str(output_dir)))
        for source, result in zip(BACKENDS, on_backend(target, folder, tasks), strict=True):
            found[source, target] = result
    return found


@pytest.mark.parametrize("pair", list(itertools.combinations(BACKENDS, 2)), ids="-".join)
@pytest.mark.parametrize("model", RUNS)
def test_loss_curves_agree_at_every_step(curves, model, pair):
    first, second = (curves[backend, model]["loss"] for backend in pair)
    assert len(first) == RUNS[model]["max_steps"]
    assert np.mean(first[-20:]) < 0.95 * np.mean(first[:20])  # it learns
    np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_a_run_goes_on_elsewhere(curves, continued, pair):
    source, target = pair
    whole, moved = curves[source, "whole"], continued[pair]
    assert len(moved["loss"]) == STEPS
    np.testing.assert_array_equal(moved["loss"][:STOP], whole["loss"][:STOP])
    if source == target:
        assert [name for name in whole if whole[name].tobytes() != moved[name].tobytes()] == []
    np.testing.assert_allclose(moved["loss"], whole["loss"], rtol=1e-5)
    np.testing.assert_allclose(moved["grad_norm"], whole["grad_norm"], rtol=1e-4)
