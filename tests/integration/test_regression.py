"""Whole runs against Transformers' recorded ones, and against a NumPy float64 re-enactment."""

import json

import numpy as np
import pytest
from helpers import Recorder, arguments, train_logs
from helpers_regression import Line, line_values, regression_data, simulate
from paths import GOLDEN

from kbtrain import Trainer
from kbtrain.data import epoch_order
from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.core

GOLDEN = json.loads((GOLDEN / "train_runs.json").read_text())
RUNS = {
    "base": {},
    "ga2_bs4": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "wd": {"weight_decay": 0.1},
    "noclip": {"max_grad_norm": 0.0},
    "max10": {"max_steps": 10},
    "adafactor": {"optim": "adafactor", "learning_rate": 0.05},
    "sgd": {"optim": "sgd", "learning_rate": 0.05},
}


def run(output_dir, model=None, data=None, callbacks=(), **changes):
    args = arguments(
        output_dir,
        **(
            {"learning_rate": 0.1, "num_train_epochs": 3, "per_device_train_batch_size": 8}
            | changes
        ),
    )
    x, y = regression_data() if data is None else data
    trainer = Trainer(
        model or Line(),
        args,
        train_dataset=(x, y),
        eval_dataset=(x, y),
        loss="mse",
        callbacks=list(callbacks),
    )
    return trainer, trainer.fit()


@pytest.mark.parametrize("name", RUNS)
def test_reference_run(tmp_path, name):
    steps, a, b, train_loss = GOLDEN[f"{name}: steps,a,b,train_loss"]
    trainer, output = run(tmp_path, **RUNS[name])
    assert output.global_step == steps
    np.testing.assert_allclose(line_values(trainer.model), (a, b), rtol=2e-6)
    np.testing.assert_allclose(output.training_loss, train_loss, rtol=2e-6)
    assert output.metrics["train_loss"] == output.training_loss


def test_a_name_that_is_not_offered_says_what_to_use(tmp_path):
    with pytest.raises(
        ConfigurationError, match="optim='lomo' is not supported: .*Use 'adafactor'"
    ):
        run(tmp_path, optim="lomo")


# Time spent per part, which Transformers does not report.
SPLIT = {"train_data_runtime", "train_compute_runtime", "train_host_runtime"}


def test_reference_logs_step_by_step(tmp_path):
    trainer, _ = run(tmp_path)
    for name, key in (
        ("per-step loss", "loss"),
        ("per-step grad_norm", "grad_norm"),
        ("per-step lr", "learning_rate"),
    ):
        np.testing.assert_allclose(train_logs(trainer, key), GOLDEN[f"base {name}"], rtol=2e-6)
    for entry, expected in zip(
        trainer.state.log_history, GOLDEN["base logs first 3"], strict=False
    ):
        assert entry.keys() == expected.keys()
        assert entry["step"] == expected["step"]
        assert entry["epoch"] == expected["epoch"]
    last, expected = trainer.state.log_history[-1], GOLDEN["base logs last"]
    assert last.keys() - SPLIT == expected.keys() - {"total_flos"}
    assert (last["step"], last["epoch"]) == (24, 3.0)


def test_reference_event_order_with_step_strategies(tmp_path):
    recorder = Recorder()
    run(
        tmp_path,
        data=regression_data(),
        callbacks=[recorder],
        gradient_accumulation_steps=2,
        max_steps=4,
        per_device_eval_batch_size=32,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    assert recorder.events == GOLDEN["events ga2 max_steps=4 log2 eval2 save2"]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == GOLDEN["output_dir"]


def test_reference_event_order_with_epoch_strategies(tmp_path):
    recorder = Recorder()
    trainer, _ = run(
        tmp_path,
        callbacks=[recorder],
        num_train_epochs=1,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        eval_on_start=True,
    )
    assert recorder.events == GOLDEN["events epoch strategies eval_on_start"]
    for entry, expected in zip(
        trainer.state.log_history, GOLDEN["epoch-run log_history"], strict=True
    ):
        assert entry.keys() - SPLIT == expected.keys() - {"total_flos"}
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "step"):
            if key in expected:
                assert entry[key] == pytest.approx(expected[key], rel=2e-6), key


def test_last_step_evaluates_and_saves_whatever_the_interval(tmp_path):
    recorder = Recorder()
    run(
        tmp_path,
        callbacks=[recorder],
        max_steps=5,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
    )
    evaluated = [
        s for e, s in zip(recorder.events, recorder.steps, strict=True) if e == "on_evaluate"
    ]
    assert evaluated == [2, 4, 5]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == GOLDEN["extra ckpts"]


def test_trainer_state_file_has_the_references_fields(tmp_path):
    run(
        tmp_path,
        max_steps=4,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=4,
        num_train_epochs=1,
    )
    written = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    not_here = {
        "is_hyper_param_search",
        "num_input_tokens_seen",
        "total_flos",
        "trial_name",
        "trial_params",
    }
    assert GOLDEN["trainer_state.json"].keys() - not_here <= written.keys()
    assert (written["global_step"], written["max_steps"], written["epoch"]) == (4, 4, 1.0)


# A family of runs that the golden file does not have.
GRID = {
    "cosine with warmup": {"schedule": "cosine", "warmup": 5, "decay": 0.05},
    "warmup ratio": {"warmup": 0.3, "epochs": 2.0},
    "constant": {"schedule": "constant", "clip": 0.5},
    "constant with warmup": {"schedule": "constant_with_warmup", "warmup": 4, "max_steps": 9},
    "short last batch": {"length": 61, "batch_size": 7, "epochs": 2.0},
    "drop last": {"length": 61, "batch_size": 7, "drop_last": True, "epochs": 2.0},
    "short last group": {"batch_size": 5, "accumulation": 4, "epochs": 2.0},
    "short group and batch": {"length": 33, "batch_size": 4, "accumulation": 3, "decay": 0.2},
    "fraction of an epoch": {"epochs": 1.3},
    "less than one epoch": {"epochs": 0.4, "accumulation": 2, "batch_size": 4},
    "max_steps over epochs": {"max_steps": 19, "epochs": 1.0, "schedule": "cosine"},
    "batch above the data": {"length": 20, "batch_size": 32, "epochs": 4.0},
    "group above the data": {"length": 20, "batch_size": 8, "accumulation": 16, "epochs": 4.0},
    "another Adam": {"betas": (0.8, 0.95), "epsilon": 1e-3, "rate": 0.03, "start": (1.0, -2.0)},
    "hard clipping": {"clip": 1e-3, "decay": 0.01},
    "shuffled": {"seed": 7, "epochs": 2.0},
    "shuffled, data seed": {"seed": 7, "data_seed": 3, "accumulation": 2, "batch_size": 6},
}


@pytest.mark.parametrize("name", GRID)
def test_family_against_numpy(tmp_path, name):
    case = dict(GRID[name])
    data = regression_data(case.pop("length", 64), seed=1)
    seed, data_seed = case.pop("seed", None), case.pop("data_seed", None)
    changes = {
        "per_device_train_batch_size": case.get("batch_size", 8),
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "num_train_epochs": case.get("epochs", 3.0),
        "max_steps": case.get("max_steps", -1),
        "dataloader_drop_last": case.get("drop_last", False),
        "learning_rate": case.get("rate", 0.1),
        "lr_scheduler_type": case.get("schedule", "linear"),
        "warmup_steps": case.get("warmup", 0),
        "weight_decay": case.get("decay", 0.0),
        "max_grad_norm": case.get("clip", 1.0),
        "adam_beta1": case.get("betas", (0.9, 0.999))[0],
        "adam_beta2": case.get("betas", (0.9, 0.999))[1],
        "adam_epsilon": case.get("epsilon", 1e-8),
    }
    if seed is not None:
        changes |= {"train_sampling_strategy": "random", "seed": seed, "data_seed": data_seed}
        source = seed if data_seed is None else data_seed
        case["order"] = lambda epoch, length: epoch_order(length, source, epoch, "random")
    expected = simulate(*data, **case)

    trainer, output = run(
        tmp_path, model=Line(*case.get("start", (0.0, 0.0))), data=data, **changes
    )

    assert output.global_step == trainer.state.max_steps == expected["steps"]
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        np.testing.assert_allclose(
            train_logs(trainer, key)[: expected["steps"]], expected[key], rtol=1e-5, err_msg=key
        )
    np.testing.assert_allclose(
        line_values(trainer.model), (expected["a"], expected["b"]), rtol=5e-6, atol=1e-6
    )
    assert output.training_loss == pytest.approx(expected["train_loss"], rel=2e-6)


def test_the_data_order_changes_from_epoch_to_epoch_and_with_the_seed():
    orders = [epoch_order(64, seed, epoch, "random") for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(64)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 24),
        ({"num_train_epochs": 1.5}, 12),
        ({"max_steps": 10}, 10),
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 5}, 3),
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 5, "max_steps": 3}, 3),
    ],
)
def test_number_of_steps(tmp_path, changes, steps):
    _, output = run(tmp_path, jit_compile=False, **changes)
    assert output.global_step == steps


def test_logged_loss_is_the_mean_since_the_last_log(tmp_path):
    expected = simulate(*regression_data())
    trainer, _ = run(tmp_path, logging_steps=5, logging_first_step=True)
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["step"] for e in entries] == [1, 5, 10, 15, 20]
    windows = [(0, 1), (1, 5), (5, 10), (10, 15), (15, 20)]
    for entry, (start, stop) in zip(entries, windows, strict=True):
        assert entry["loss"] == pytest.approx(np.mean(expected["loss"][start:stop]), rel=5e-6)
        # The norm and the rate are those of the newest update.
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"][stop - 1], rel=5e-6)
        assert entry["learning_rate"] == pytest.approx(
            expected["learning_rate"][stop - 1], rel=1e-6
        )


def test_two_fits_begin_anew_with_the_trained_weights(tmp_path):
    x, y = regression_data()
    trainer, first = run(tmp_path, num_train_epochs=1)
    start = line_values(trainer.model)
    second = trainer.fit()
    expected = simulate(x, y, epochs=1.0, start=start)
    assert (first.global_step, second.global_step) == (8, 8)
    np.testing.assert_allclose(train_logs(trainer)[:8], expected["loss"], rtol=5e-6)
