"""The profiler: a trace, the slowest operations, and a training that takes no notice of it."""

import gzip
import json
import logging
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import arguments, same, weights

from kbtrain import ConfigurationError, ProfilerCallback, Trainer
from kbtrain.callbacks.library.profile_summary import summarize
from kbtrain.training.run import Run
from kbtrain.utils.files import chrome_trace
from kbtrain.utils.files.chrome_trace import Span


def make(tmp_path, callbacks=(), **changes):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 16, 16, 3)).astype(np.float32)
    y = generator.integers(0, 10, size=64)
    layers = keras.layers
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )
    defaults = {"per_device_train_batch_size": 16, "max_steps": 40, "logging_steps": 20}
    args = arguments(tmp_path, **defaults | changes)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Trainer(model, args, train_dataset=(x, y), loss=loss, callbacks=list(callbacks))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A training with a profile, and the same without."""
    folder = tmp_path_factory.mktemp("profiled")
    kept = folder / "profile" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    trainer = make(folder, profile=True)
    trainer.fit()
    plain = make(tmp_path_factory.mktemp("plain"))
    plain.fit()
    return trainer, plain


def callback_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProfilerCallback))


@pytest.mark.core
def test_the_training_takes_no_notice(profiled):
    trainer, plain = profiled
    assert callback_of(trainer).summary is not None
    assert same(weights(trainer.model), weights(plain.model))
    losses = [[log.get("loss") for log in t.state.log_history] for t in profiled]
    assert losses[0] == losses[1]


def test_the_trace_is_in_the_output_folder(profiled, tmp_path):
    trainer, _ = profiled
    summary = callback_of(trainer).summary
    folder = trainer.store.directory.absolute() / "profile"
    assert (folder / "mine.txt").read_text() == "mine"
    assert summary.trace.startswith(str(folder / "step-"))
    document = json.loads(gzip.decompress(Path(summary.trace).read_bytes()))
    assert any(event.get("ph") == "X" for event in document["traceEvents"])
    json.dumps(summary.to_dict())
    (section,) = trainer.record.sections
    assert section["title"].startswith(f"Profile of updates {summary.first_step} to ")
    assert [row[0] for row in section["table"]] == [
        "operation",
        *(each.name for each in summary.operations),
    ]


def test_products_and_convolutions_are_among_the_slowest(profiled):
    summary = callback_of(profiled[0]).summary
    assert 11 <= summary.first_step <= 20
    assert 1 <= summary.updates <= 29
    names = [each.name.lower() for each in summary.operations]
    assert 1 <= len(names) <= 10
    found = [
        name for name in names if any(word in name for word in ("conv", "dot", "mm", "matmul"))
    ]
    assert found, names
    shares = [each.share for each in summary.operations]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1.0 + 1e-6
    assert 0.0 <= summary.idle_share < 1.0
    assert all(each.count >= summary.updates for each in summary.operations if each.name in found)


def test_what_a_summary_counts():
    spans = [
        Span("outer", 0.0, 100.0, "p", "1"),
        Span("inner", 20.0, 30.0, "p", "1"),
        Span("inner", 60.0, 10.0, "p", "1"),
        Span("other", 150.0, 50.0, "p", "2"),
        Span("other", 160.0, 20.0, "p", "1"),
    ]
    summary = summarize("trace.json", spans, first_step=11, updates=4)
    assert [(o.name, o.count, round(1e6 * o.seconds)) for o in summary.operations] == [
        ("other", 2, 70),
        ("outer", 1, 60),
        ("inner", 2, 40),
    ]
    assert [round(o.share, 4) for o in summary.operations] == [0.4118, 0.3529, 0.2353]
    assert summary.seconds == pytest.approx(200e-6)
    assert summary.idle_share == pytest.approx(0.25)
    assert summary.caption() == (
        "Updates 11 to 14: 0.2 ms, of which no operation was running in 25.0%."
    )


def test_a_trace_is_read_as_it_was_written(tmp_path):
    spans = [Span("a", 1.5, 2.0, "p", "t", "op", {"x": 1}), Span("b", 2.0, 0.5, "p", "u")]
    chrome_trace.write(tmp_path / "t.json.gz", spans)
    assert chrome_trace.read(tmp_path / "t.json.gz") == spans
    (tmp_path / "n.json").write_text("{}")
    with pytest.raises(ValueError, match="Chrome trace format"):
        chrome_trace.read(tmp_path / "n.json")


@pytest.mark.parametrize("steps", [(3,), (5, 5), (-1, 2), "ab", None, (1.5, 3)])
def test_steps_must_be_an_interval(steps):
    with pytest.raises(ConfigurationError, match="steps=\\(start, stop\\)"):
        ProfilerCallback(steps=steps)


@pytest.mark.parametrize("fails", ["start", "stop"])
def test_a_profiler_that_fails_costs_a_warning(tmp_path, caplog, monkeypatch, fails):
    callback = ProfilerCallback(steps=(1, 3), folder=tmp_path / "elsewhere")
    trainer = make(tmp_path, [callback], max_steps=6)

    def stop():
        raise RuntimeError("it was stopped already")

    def start(folder):
        assert folder.parent == tmp_path / "elsewhere"
        if fails == "start":
            raise RuntimeError("another profiler is running")
        return stop

    monkeypatch.setattr(trainer.backend, "start_profile", start)
    with caplog.at_level(logging.WARNING, "kbtrain"):
        trainer.fit()
    assert trainer.state.global_step == 6
    assert callback.summary is None
    messages = [r.getMessage() for r in caplog.records if "profiler" in r.getMessage()]
    assert len(messages) == 1
    assert "Training continues without it" in messages[0]


def test_nothing_but_the_table_is_on_the_screen(tmp_path, capfd):
    make(tmp_path, [ProfilerCallback(steps=(2, 3))], max_steps=4, log_level="error").fit()
    assert "profiler" not in capfd.readouterr().err


def test_a_run_that_is_too_short_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "kbtrain"):
        make(tmp_path, profile=True, max_steps=3).fit()
    assert "would have begun after 10 updates, and this run did 3" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_why_there_is_no_profile_is_true(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Run, "next_is_compiled", property(lambda run: False))
    with caplog.at_level(logging.WARNING, "kbtrain"):
        make(tmp_path, profile=True, max_steps=12, logging_steps=1).fit()
    (said,) = (r.getMessage() for r in caplog.records if "no profile" in r.getMessage())
    assert "would have begun after" not in said
    assert (
        "that needs no compilation, after 10 updates, and this run of 12 updates had none" in said
    )


def test_a_second_profile_at_the_same_time_is_refused(tmp_path, caplog):
    first, second = (ProfilerCallback(steps=(2, 6), folder=tmp_path / str(i)) for i in range(2))
    with caplog.at_level(logging.WARNING, "kbtrain"):
        make(tmp_path, [first, second], max_steps=8, logging_steps=1).fit()
    assert first.summary is not None
    assert second.summary is None
    assert caplog.text.count("another ProfilerCallback of this run is recording") == 1
    assert "There is no profile" not in caplog.text


def test_a_profiler_of_the_user_is_left_alone(tmp_path, caplog):
    callback = ProfilerCallback(steps=(2, 4))
    trainer = make(tmp_path, [callback], max_steps=6, logging_steps=1)
    (tmp_path / "own").mkdir()
    stop = trainer.backend.start_profile(tmp_path / "own")
    with caplog.at_level(logging.WARNING, "kbtrain"):
        trainer.fit()
    assert stop()[1]  # it has recorded operations
    assert callback.summary is None
    assert caplog.text.count("The profiler could not start") == 1
    assert not list((tmp_path / "profile").iterdir())


def test_an_error_stops_the_profiler(tmp_path, monkeypatch):
    stopped = []
    callback = ProfilerCallback(steps=(0, 100))
    trainer = make(tmp_path, [callback], max_steps=6, logging_steps=4)
    monkeypatch.setattr(trainer.backend, "start_profile", lambda folder: lambda: stopped.append(1))
    monkeypatch.setattr(trainer, "log", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert stopped == [1]
