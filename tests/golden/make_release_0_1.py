"""Made tests/golden/release_0_1 with kbtrain 0.1 (81fda9c): files that later versions must read.

``KERAS_BACKEND=jax python tests/golden/make_release_0_1.py FOLDER`` there. It writes

- ``checkpoint-4`` of a run of 9 updates, and what the uninterrupted run came to;
- a ``.keras`` file for each kind of optimizer, compiled and trained for three updates, and the
  losses of the two updates after them.

Kept so that one can see what the files are; a newer kbtrain writes them with other module paths.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from helpers import make_data, train_logs, weights
from helpers_resume import make_trainer

import optim


def optimizers():
    """One optimizer of each kind of state: moments, factors, codes, averages, low rank."""
    return {
        "adamw": optim.AdamW(
            optim.CosineWithWarmup(0.05, num_warmup_steps=2, num_training_steps=10),
            weight_decay=0.01,
        ),
        "adafactor": optim.Adafactor(0.05),
        "adamw_8bit": optim.AdamW8bit(0.05),
        "ema": optim.EMA(optim.SGD(0.05, momentum=0.9), decay=0.9),
        "schedule_free": optim.ScheduleFreeAdamW(0.05),
        "muon": optim.Muon(0.05),
        "groups": optim.AdamW(0.05, parameter_groups=[{"match": "bias", "lr_multiplier": 0.1}]),
    }


def compiled_model(optimizer):
    """Two dense layers with fixed weights, compiled."""
    keras.utils.clear_session()
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape).astype("float32") for w in model.get_weights()])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def train(model, updates):
    """The losses of full-batch updates."""
    x, y = make_data(16, seed=4)
    return [float(model.train_on_batch(x, y)) for _ in range(updates)]


def main(target):
    """Write everything into ``target``."""
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer("deterministic", folder)
        trainer.fit()
        shutil.copytree(Path(folder) / "checkpoint-4", target / "checkpoint-4")
    expected = {
        "loss": train_logs(trainer),
        "weights": [w.tolist() for w in weights(trainer.model)],
        "next_losses": {},
    }
    for name, optimizer in optimizers().items():
        model = compiled_model(optimizer)
        train(model, 3)
        model.save(target / f"{name}.keras")
        expected["next_losses"][name] = train(model, 2)
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
