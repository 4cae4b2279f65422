"""A run resumes bit for bit, whatever it uses: new model, new optimizer, new Trainer.

Other features have this test beside their own: workers (test_workers.py), orders by length
(test_by_length.py), the loss scale (test_float16.py), and in optimization/ weights evaluated in
place of others, metric-driven rates and parameter groups.
"""

import keras
import numpy as np
import pytest
from helpers import arguments, same, train_logs, weights, with_weights

from kbtrain import Trainer

WIDTH = 64  # 64 x 64 is the smallest matrix with an 8-bit state
SAVED = 5  # of 8 steps, 3 to an epoch: in the middle of an epoch


def make(folder, **changes):
    layers = [
        keras.Input((WIDTH,)),
        keras.layers.Dense(WIDTH, activation="tanh"),
        keras.layers.Dropout(0.2, seed=3),
        keras.layers.Dense(1),
    ]
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20, WIDTH)).astype(np.float32)
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "train_sampling_strategy": "random",
        "logging_steps": 2,
    }
    return Trainer(
        with_weights(keras.Sequential(layers), scale=0.1),
        arguments(folder, **(defaults | changes)),
        train_dataset=(x, x[:, :1] * 0.5),
        loss="mse",
    )


SAVING = {"save_strategy": "steps", "save_steps": SAVED, "save_total_limit": 2}
LOW_RANK = {"rank": 4, "update_proj_gap": 3}
FEATURES = {
    "blocks": {"steps_per_execution": 4},
    "8 bit, data in order": {"optim": "adamw_8bit", "train_sampling_strategy": "sequential"},
    "GaLore": {"optim": "galore_adamw", "optim_args": LOW_RANK},
    # Its random numbers depend on the path of the variable, and that on how many models there were.
    "APOLLO": {"optim": "apollo_adamw", "optim_args": LOW_RANK},
}


@pytest.fixture
def pair(tmp_path, request):
    """A run that saves along the way, and one that resumes from there with new objects."""
    first, second = (make(tmp_path, **FEATURES[request.param], **SAVING) for _ in range(2))
    first.fit()
    assert [step for step, _ in first.store.list()] == [SAVED, 8]
    second.fit(resume_from_checkpoint=str(first.store.path(SAVED)))
    return first, second


def assert_same_run(first, second):
    assert same(weights(first.model), weights(second.model))
    assert same(values(first.optimizer), values(second.optimizer))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert train_logs(first, key) == train_logs(second, key)


@pytest.mark.parametrize("pair", FEATURES, indirect=True)
def test_a_run_goes_on_bit_for_bit(pair):
    assert_same_run(*pair)


@pytest.mark.parametrize("pair", ["blocks"], indirect=True)
def test_a_save_in_the_middle_of_a_block_changes_nothing(pair, tmp_path):
    whole = make(tmp_path / "whole", **FEATURES["blocks"])
    whole.fit()
    assert_same_run(whole, pair[1])


def values(optimizer):
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in optimizer.variables]
