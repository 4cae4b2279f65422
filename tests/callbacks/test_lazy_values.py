"""What callbacks see of the latest update, fetched on first access."""

import numpy as np
import pytest
from helpers import Recorder, make_data, train_logs
from helpers_trainer import make

from kbtrain import (
    TrainerCallback,
)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_callbacks_see_the_newest_update(tmp_path, accumulation):
    x, y = make_data(20)
    seen = []

    def look(event):
        def action(args, state, control, kwargs):
            batch, loss, metrics = kwargs["batch"], kwargs["loss"], kwargs["metrics"]
            loss = None if loss is None else float(loss)
            seen.append((event, list(batch), loss, dict(metrics)))

        return action

    recorder = Recorder({event: look(event) for event in ("on_step_begin", "on_step_end")})
    trainer = make(
        tmp_path,
        data=(x, y),
        callbacks=[recorder],
        metrics=["mean_squared_error"],
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_steps=-1,
    )
    trainer.fit()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]
    groups = [batches[i : i + accumulation] for i in range(0, 5, accumulation)]
    losses = train_logs(trainer)
    assert len(seen) == 2 * len(groups)
    for i, group in enumerate(groups):
        for event, batch, loss, metrics in seen[2 * i : 2 * i + 2]:
            np.testing.assert_equal(batch, group)
            began = event == "on_step_begin"
            assert loss is None if began else loss == pytest.approx(losses[i], rel=1e-6)
            # One update since the last log, or none.
            value = 0.0 if began else losses[i]
            assert metrics["mean_squared_error"] == pytest.approx(value, rel=1e-5)
    context = recorder.kwargs[0]  # on_init_end
    assert context["batch"] is context["loss"] is context["metrics"] is None
    assert trainer.current_run is None


def test_nothing_is_read_from_the_device_unless_it_is_looked_at(tmp_path, monkeypatch):
    reads = []
    recorder = Recorder()
    trainer = make(
        tmp_path, callbacks=[recorder], logging_strategy="no", metrics=["mean_squared_error"]
    )
    start_to_host = trainer.backend.start_to_host

    def counting(tree):
        wait = start_to_host(tree)

        def counted():
            reads.append(trainer.state.global_step)
            return wait()

        return counted

    monkeypatch.setattr(trainer.backend, "start_to_host", counting)
    monkeypatch.setattr(trainer.backend, "to_host", lambda tree: pytest.fail("something was read"))
    monkeypatch.setattr(
        type(trainer.bound.metrics), "result", lambda self: pytest.fail("metrics were read")
    )
    trainer.args = trainer.args.replace(steps_per_execution=1)
    trainer.fit()
    assert set(reads) == {4}  # the end of the run alone
    monkeypatch.undo()
    last = [k for e, k in zip(recorder.events, recorder.kwargs, strict=True) if e == "on_step_end"]
    assert "not read yet" in repr(last[-1]["loss"])
    assert f"{last[-1]['loss']:.3f}" == f"{float(np.asarray(last[-1]['loss'])):.3f}"
    assert "not read yet" in repr(last[-1]["metrics"])


def test_the_last_update_of_a_block_is_seen(tmp_path):
    x, y = make_data(32)

    class Look(TrainerCallback):
        every_step = False
        seen = ()

        def on_step_end(self, args, state, control, **kwargs):
            self.seen = (*self.seen, (state.global_step, kwargs["batch"][0], kwargs["loss"]))

    look = Look()
    make(tmp_path, data=(x, y), callbacks=[look], logging_steps=4, max_steps=8).fit()
    assert look.seen[-1][0] == 8
    for step, batch, loss in look.seen:
        np.testing.assert_array_equal(batch[0], x[4 * step - 4 : 4 * step])
        assert np.isfinite(loss)
