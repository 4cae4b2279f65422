"""Documents with correct checksums and arbitrary contents: restored or rejected with an error."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
from helpers import arguments, linear_model, make_data
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain import EarlyStoppingCallback, Trainer
from kbtrain.errors import CheckpointDamagedError, CheckpointError
from kbtrain.training import fit as fitting

QUICK = settings(max_examples=150, deadline=None, derandomize=True, database=None)
NAMES = ("progress", "rng", "trainer_state", "training_args", "lr_scheduler")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Trainer that has everything that has a state, and its checkpoint."""
    trainer = Trainer(
        linear_model(),
        arguments(
            tmp_path_factory.mktemp("run"), max_steps=4, save_strategy="steps", save_steps=2,
            eval_strategy="steps", eval_steps=2, metric_for_best_model="loss",
            load_best_model_at_end=True, lr_scheduler_type="greedy", report_to="tensorboard",
        ),
        train_dataset=make_data(), eval_dataset=make_data(), loss="mse",
        callbacks=[EarlyStoppingCallback(50)],
    )  # fmt: skip
    trainer.fit()
    checkpoint = trainer.store.load(trainer.store.path(4))
    assert set(NAMES) <= set(checkpoint.documents)
    return trainer, checkpoint


def restore(run, **changes):
    """What ``fit`` does with a checkpoint that has other contents."""
    trainer, checkpoint = run
    trainer.control.new_training()
    changed = dataclasses.replace(checkpoint, **changes)
    return fitting._restore(trainer, changed, trainer.optimizer, trainer.train_dataloader)


def places(value, path=()):
    """Where something can be replaced in a value of JSON."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, -1, 2**63, "nan", "checkpoint-4", "../checkpoint-4", "step"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@QUICK
@given(st.data())
def test_anything_in_a_document_is_taken_over_or_refused(run, data):
    documents = dict(run[1].documents)
    name = data.draw(st.sampled_from(NAMES))
    path = data.draw(st.sampled_from(list(places(documents[name]))))
    documents[name] = replaced(documents[name], path, data.draw(JSON))
    with contextlib.suppress(CheckpointError):  # any other error would end the test
        restore(run, documents=documents)


@pytest.mark.parametrize("name", NAMES)
def test_a_document_that_is_missing_is_named(run, name):
    documents = {key: value for key, value in run[1].documents.items() if key != name}
    with pytest.raises(CheckpointError, match=name if name != "lr_scheduler" else "learning rate"):
        restore(run, documents=documents)


WRONG = [
    ("progress", "epoch", "0"),
    ("progress", "batch", -1),
    ("progress", "batch", 1.5),
    ("progress", "batch", True),
    ("progress", "window_extras", {"x": "y"}),
    ("progress", "unfinished", {"after": "step"}),
    ("progress", "unfinished", {"after": "else", "save": True}),
    ("trainer_state", "global_step", 3),
    ("trainer_state", "log_history", [1]),
    ("trainer_state", "best_model_checkpoint", "/etc/passwd"),
    ("trainer_state", "stateful_callbacks", {"EarlyStoppingCallback": [{"best": []}]}),
    ("trainer_state", "stateful_callbacks", {"EarlyStoppingCallback": [3]}),
    ("trainer_state", "stateful_callbacks", {"EarlyStoppingCallback": 3}),
    ("trainer_state", "stateful_callbacks", {"TensorBoardCallback": [{"run": "../../elsewhere"}]}),
    ("rng", "python", {"version": 3, "gauss": "x"}),
    ("rng", "numpy", {}),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_what_cannot_be_is_named(run, name, field, value):
    documents = run[1].documents
    changed = {**documents, name: {**documents[name], field: value}}
    with pytest.raises(CheckpointDamagedError, match=rf"{name}\.json"):
        restore(run, documents=changed)


@pytest.mark.parametrize("name", ["python", "numpy", "keras"])
@pytest.mark.parametrize(
    "array", [np.zeros(0), np.full(3, np.nan), np.zeros((2, 2), "complex64"), None], ids=str
)
def test_random_states_that_are_none(run, name, array):
    states = {**run[1].arrays["rng"], name: array}
    if array is None:
        del states[name]
    with pytest.raises(CheckpointDamagedError, match=r"rng\.json"):
        restore(run, arrays={**run[1].arrays, "rng": states})


def test_the_best_checkpoint_is_looked_for_where_the_folder_is_now(run):
    """A run's folder was moved: its documents name the former place."""
    documents, trainer = run[1].documents, run[0]
    state = {**documents["trainer_state"], "best_model_checkpoint": "/former/place/checkpoint-4"}
    restore(run, documents={**documents, "trainer_state": state})
    assert trainer.state.best_model_checkpoint == str(trainer.store.path(4))
