"""Epochs of a fixed length from streams."""

import numpy as np
import pytest
from helpers import Recorder, StopAt, arguments, linear_model, make_data, same, weights

import kbtrain.data.fixed_epochs
from kbtrain import Trainer
from kbtrain.data import Batches, DataLoader, FixedEpochs, as_loader
from kbtrain.errors import ConfigurationError


def stream():
    return iter([([[float(i)]], [0.0]) for i in range(7)])


def read(loader, epoch=0, start=0):
    return [batch[0].item() for batch in loader.epoch(epoch, start)]


class Again:
    """An iterable that can be read several times."""

    def __iter__(self):
        return stream()


def test_the_example_in_the_docstring():
    import doctest

    assert doctest.testmod(kbtrain.data.fixed_epochs).failed == 0


def test_epochs_go_on_where_the_one_before_ended():
    loader = FixedEpochs(as_loader(Again()), 3)
    assert (len(loader), loader.sized, loader.num_examples) == (3, True, None)
    found = [read(loader, epoch) for epoch in range(5)]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4], [5, 6, 0]]
    for epoch in (4, 0, 2):
        for start in (0, 2, 3):
            assert read(loader, epoch, start) == found[epoch][start:]


def test_an_iterator_ends_when_it_is_used_up():
    loader = FixedEpochs(as_loader(stream()), 3)
    assert [read(loader, epoch) for epoch in range(4)] == [[0, 1, 2], [3, 4, 5], [6], []]


def test_an_iterator_is_read_forward_to_a_position():
    loader = FixedEpochs(as_loader(stream()), 3)
    assert Batches(loader).peek()[0].item() == 0
    assert read(loader, 1, 1) == [4, 5]


def test_an_epoch_that_is_left_early_is_gone():
    loader = FixedEpochs(as_loader(Again()), 3)
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    assert read(loader, 1) == [3, 4, 5]


X, Y = make_data(22)


def samples():
    yield from zip(X, Y, strict=True)


def train(folder, *callbacks, data=samples, **changes):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_epoch": 2,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    return Trainer(
        linear_model(),
        arguments(folder, **(options | changes)),
        train_dataset=data,
        loss="mse",
        callbacks=list(callbacks),
    )


def test_a_run_has_epochs_and_is_resumed_exactly(tmp_path):
    recorder = Recorder()
    whole, stopped = train(tmp_path / "a", recorder), train(tmp_path / "b", StopAt(3))
    resumed = train(tmp_path / "b")
    assert whole.fit().global_step == 6
    assert recorder.events.count("on_epoch_end") == 3
    assert whole.state.epoch == 3
    stopped.fit()
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))


def test_the_updates_are_those_of_the_data_in_one_go(tmp_path):
    cut = train(tmp_path, save_strategy="no")
    cut.fit()
    rows = np.arange(24) % 22
    plain = train(
        tmp_path,
        data=(X[rows], Y[rows]),
        steps_per_epoch=None,
        num_train_epochs=1,
        save_strategy="no",
    )
    # A pass over the stream ends with a batch of two (samples 20 and 21), as this data does.
    plain.fit()
    assert plain.state.global_step == cut.state.global_step == 6
    for ours, expected in zip(weights(cut.model), weights(plain.model), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_epochs_of_data_with_a_length_go_on_where_the_last_one_ended(tmp_path):
    """22 samples in 11 batches: the third epoch of 4 batches begins with the ninth."""
    loader = FixedEpochs(DataLoader(np.arange(22), 2), 4)
    assert [batch[0].item() for batch in loader.epoch(2)] == [16, 18, 20, 0]
    assert [batch[0].item() for batch in loader.epoch(1, 2)] == [12, 14]
    assert [batch[0].item() for batch in loader.epoch(5)] == [18, 20, 0, 2]
    shuffled = DataLoader(np.arange(22), 2, strategy="random")
    passes = [x.tolist() for n in range(2) for x in shuffled.epoch(n)]
    epochs = FixedEpochs(shuffled, 4)
    assert [x.tolist() for n in range(5) for x in epochs.epoch(n)] == passes[:20]


@pytest.mark.parametrize("data", [(X, Y), list(zip(X, Y, strict=True))], ids=["arrays", "list"])
def test_data_with_a_length_gives_the_same_updates_and_resumes(tmp_path, data):
    whole, stopped = train(tmp_path / "a", data=data), train(tmp_path / "b", StopAt(3), data=data)
    resumed = train(tmp_path / "b", data=data)
    assert whole.fit().global_step == 6
    assert whole.state.epoch == 3
    stream = train(tmp_path / "c")
    stream.fit()
    for ours, expected in zip(weights(whole.model), weights(stream.model), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    stopped.fit()
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))


def test_without_it_a_stream_needs_max_steps(tmp_path):
    with pytest.raises(ConfigurationError, match="max_steps, or steps_per_epoch"):
        train(tmp_path, steps_per_epoch=None).fit()


def test_it_can_be_read_ahead():
    loader = FixedEpochs(DataLoader(samples, 2, read_ahead=3), 4)
    batches = Batches(loader)
    rows = [
        block.chunks[0]["single"][0][: block.updates].reshape(-1, 3)
        for epoch in range(2)
        for block in batches.blocks(epoch, 0, 1, lambda: 2)
    ]
    np.testing.assert_array_equal(np.concatenate(rows), X[:16])
