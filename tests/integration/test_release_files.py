"""Files written by kbtrain 0.1: later versions resume its checkpoints and load its models."""

import json
import shutil

import keras
import numpy as np
import pytest
from helpers import make_data, train_logs, weights
from helpers_resume import make_trainer
from paths import GOLDEN

RELEASE = GOLDEN / "release_0_1"
EXPECTED = json.loads((RELEASE / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED["next_losses"]))
def test_compiled_model_loads_and_its_optimizer_continues(name):
    import optim  # noqa: F401  (registers the classes that the file names)

    model = keras.saving.load_model(RELEASE / f"{name}.keras")
    model.jit_compile = False  # saved on JAX, where it is True; torch.compile is not the subject
    x, y = make_data(16, seed=4)
    losses = [float(model.train_on_batch(x, y)) for _ in range(2)]
    np.testing.assert_allclose(losses, EXPECTED["next_losses"][name], rtol=1e-4)
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 5


@pytest.mark.core
def test_checkpoint_resumes_to_the_end_of_the_uninterrupted_run(tmp_path):
    shutil.copytree(RELEASE / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = make_trainer("deterministic", tmp_path)
    trainer.fit(resume_from_checkpoint=True)
    np.testing.assert_allclose(train_logs(trainer), EXPECTED["loss"], rtol=1e-5)
    pairs = list(zip(weights(trainer.model), EXPECTED["weights"], strict=True))
    # The biases before BatchNormalization have no gradient but rounding noise, which Adam
    # amplifies to full steps; the moving mean follows them.
    for got, wanted in [pair for i, pair in enumerate(pairs) if i not in (1, 4)]:
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
