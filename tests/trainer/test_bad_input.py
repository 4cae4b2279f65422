"""Mistakes: each a clear error of a documented type, nothing half-written, weights untouched."""

import keras
import numpy as np
import pytest
from helpers import arguments, batch_norm_model, fit, linear_model, make_data, same, weights

from kbtrain import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigurationError,
    DataError,
    KbtrainError,
    Trainer,
    TrainingArguments,
)


def make(tmp_path, model=None, data="default", args=None, **kwargs):
    """A Trainer in an output directory that does not exist yet."""
    if isinstance(data, str):
        data = make_data(8)
    return Trainer(
        model or linear_model(),
        args or arguments(tmp_path / "run", jit_compile=False),
        **({"train_dataset": data, "loss": "mse"} | kwargs),
    )


def refused(tmp_path, error, match, action):
    """The error is of this kind and says this; nothing was written."""
    with pytest.raises(error, match=match) as caught:
        action()
    assert isinstance(caught.value, KbtrainError)
    assert isinstance(caught.value, ValueError | RuntimeError)
    assert not (tmp_path / "run").exists()


# --- at construction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": "mean_squarred_error"}, "'mean_squarred_error'.*Did you mean"),
        ({"loss": 3}, "loss must be"),
        ({"metrics": ["acuracy_of_things"]}, "'acuracy_of_things' is not a metric"),
        ({"metrics": [3]}, "metrics must contain"),
        ({"optimizers": keras.optimizers}, "pair"),
        ({"optimizers": ("adam", None)}, "keras.optimizers.Optimizer"),
        ({"compute_loss_func": lambda o, y: o}, "either loss or compute_loss_func"),
        ({"model_init": linear_model}, "either model or model_init"),
        ({"callbacks": [3]}, "TrainerCallback"),
    ],
)
def test_arguments_of_the_trainer(tmp_path, changes, match):
    refused(tmp_path, ConfigurationError, match, lambda: make(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optim": "adamww"}, "optim='adamww'.*Did you mean 'adamw'"),
        ({"lr_scheduler_type": "cosinus"}, "lr_scheduler_type='cosinus'.*Did you mean 'cosine'"),
        ({"eval_strategy": "epoch"}, "eval_dataset"),
    ],
)
def test_names_in_the_arguments(tmp_path, changes, match):
    args = arguments(tmp_path / "run", **changes)
    refused(tmp_path, ConfigurationError, match, lambda: make(tmp_path, args=args))


@pytest.mark.parametrize("value", [0, -5, 2.5])
def test_negative_and_broken_steps(value):
    with pytest.raises(ConfigurationError, match="max_steps"):
        TrainingArguments(output_dir="x", max_steps=value)


@pytest.mark.parametrize(
    "changes",
    [
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
        {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 3,
        },
        {"save_strategy": "best", "eval_strategy": "no"},
        {"logging_steps": 0},
        {"eval_strategy": "steps", "eval_steps": 0},
    ],
)
def test_contradicting_strategies_are_refused(changes):
    with pytest.raises(ConfigurationError):
        TrainingArguments(output_dir="x", **changes)


def test_ratios_that_do_not_fit_once_the_steps_are_known(tmp_path):
    args = arguments(
        tmp_path / "run",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=0.1,
        save_steps=0.2,
        num_train_epochs=24,
        per_device_train_batch_size=8,
    )  # 24 steps: every 3 and every 5
    trainer = make(tmp_path, args=args, eval_dataset=make_data(8))
    refused(tmp_path, ConfigurationError, "multiple of `eval_steps`", trainer.fit)


def test_no_model_and_wrong_models(tmp_path):
    args = arguments(tmp_path / "run")
    refused(tmp_path, ConfigurationError, "neither", lambda: Trainer(None, args))
    refused(
        tmp_path, ConfigurationError, "keras.Model", lambda: Trainer(keras.layers.Dense(1), args)
    )
    refused(tmp_path, ConfigurationError, "model_init", lambda: Trainer(linear_model, args))
    refused(
        tmp_path,
        ConfigurationError,
        "TrainingArguments",
        lambda: Trainer(linear_model(), {"output_dir": "x"}),
    )
    refused(
        tmp_path,
        ConfigurationError,
        "optimizers",
        lambda: Trainer(
            model_init=linear_model, args=args, optimizers=(keras.optimizers.SGD(), None)
        ),
    )


@pytest.mark.parametrize("model", [None, 3, "model"])
def test_a_model_init_that_makes_no_model(tmp_path, model):
    refused(
        tmp_path,
        ConfigurationError,
        "keras.Model",
        lambda: Trainer(model_init=lambda: model, args=arguments(tmp_path / "run")),
    )


# --- data -----------------------------------------------------------------------------------------


def test_missing_and_empty_data_are_errors(tmp_path):
    refused(tmp_path, ConfigurationError, "train_dataset", lambda: make(tmp_path, data=None).fit())
    refused(tmp_path, ConfigurationError, "eval_dataset", lambda: make(tmp_path).evaluate())
    empty = (np.zeros((0, 3), np.float32), np.zeros((0, 1), np.float32))
    refused(tmp_path, DataError, "empty", lambda: make(tmp_path, data=empty).fit())
    refused(tmp_path, DataError, "empty", lambda: make(tmp_path).evaluate(empty))


def test_missing_labels_are_an_error_and_leave_the_weights(tmp_path):
    x, y = make_data(8)
    model = linear_model()
    before = weights(model)
    refused(tmp_path, DataError, "no labels", make(tmp_path, model, data=x).fit)
    refused(tmp_path, DataError, "no labels", make(tmp_path, model, data=(x,)).fit)
    refused(tmp_path, DataError, "no labels", make(tmp_path, model, eval_dataset=x).evaluate)
    assert same(weights(model), before)


def test_a_missing_loss_is_an_error(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    # A model of Keras' own parts says so at once; of another one only a batch tells.
    refused(tmp_path, ConfigurationError, "There is no loss", lambda: make(tmp_path, loss=None))
    trainer = make(tmp_path, Own(), loss=None)
    refused(tmp_path, ConfigurationError, "There is no loss", trainer.fit)


def test_unsized_data_needs_max_steps(tmp_path):
    def samples():
        yield from zip(*make_data(8), strict=True)

    for data in (samples, samples(), iter(list(samples()))):
        refused(tmp_path, ConfigurationError, "max_steps", make(tmp_path, data=data).fit)


def test_an_own_unsized_loader_needs_max_steps(tmp_path):
    class Own(Trainer):
        def get_train_dataloader(self):
            return (batch for batch in [make_data(4)])

    refused(
        tmp_path,
        ConfigurationError,
        "max_steps",
        Own(linear_model(), arguments(tmp_path / "run"), loss="mse").fit,
    )


def test_drop_last_of_everything(tmp_path):
    args = arguments(tmp_path / "run", dataloader_drop_last=True, per_device_train_batch_size=9)
    refused(tmp_path, (ConfigurationError, DataError), "drop_last", make(tmp_path, args=args).fit)


@pytest.mark.parametrize("built", [True, False])
def test_inputs_of_another_shape(tmp_path, built):
    model = linear_model(features=3)
    if not built:
        model = keras.Sequential([keras.layers.Conv2D(2, 3), keras.layers.Dense(1)])
    x, y = make_data(8, features=5)
    before = weights(model) if built else None
    trainer = make(tmp_path, model, data=(x, y))
    refused(tmp_path, DataError, r"^[^\x1b]*float32\[8, 5\][^\x1b]*$", trainer.fit)
    if built:
        assert same(weights(model), before)


def test_labels_of_another_shape(tmp_path):
    x, _ = make_data(8)
    y = np.zeros((8, 4), np.float32)
    model = linear_model(outputs=3)
    before = weights(model)
    with pytest.raises(Exception, match=r"(4|3)"):
        make(tmp_path, model, data=(x, y)).fit()
    assert same(weights(model), before)
    assert not (tmp_path / "run").exists()


def test_arrays_of_different_lengths(tmp_path):
    x, y = make_data(8)
    refused(tmp_path, DataError, "same length", lambda: make(tmp_path, data=(x, y[:5])).fit())


@pytest.mark.parametrize("data", ["a/path.csv", 3, object()])
def test_data_of_no_kind(tmp_path, data):
    with pytest.raises(DataError):
        Trainer(linear_model(), arguments(tmp_path / "run"), train_dataset=data, loss="mse").fit()
    assert not (tmp_path / "run").exists()


def test_data_that_fails_in_the_middle(tmp_path):
    class Failing:
        def __len__(self):
            return 16

        def __getitem__(self, i):
            if i == 9:
                raise OSError("bad sector")
            x, y = make_data(16)
            return x[i], y[i]

    args = arguments(
        tmp_path / "run", per_device_train_batch_size=4, save_strategy="steps", save_steps=1
    )
    with pytest.raises(DataError, match="bad sector"):
        make(tmp_path, data=Failing(), args=args).fit()
    # What was complete before stays, with the record of the run, and nothing else is there.
    left = ["checkpoint-1", "checkpoint-2", "run.json"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == left


def test_bad_arguments_for_schedule_and_optimizer(tmp_path):
    args = arguments(tmp_path / "run", lr_scheduler_kwargs={"cycles": 3})
    refused(
        tmp_path,
        ConfigurationError,
        "lr_scheduler_kwargs.*'cycles'",
        lambda: make(tmp_path, args=args),
    )
    args = arguments(tmp_path / "run", optim_args="nesterov=True")
    refused(tmp_path, ConfigurationError, "optim_args", make(tmp_path, args=args).fit)


# --- what overridden things return ----------------------------------------------------------------


def test_a_compute_loss_without_outputs(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return keras.ops.mean(model(inputs[0]))

    trainer = Own(linear_model(), arguments(tmp_path / "run"), train_dataset=make_data(8))
    refused(tmp_path, ConfigurationError, r"must return \(loss, outputs\)", trainer.fit)


@pytest.mark.parametrize("value", [None, "loss", [1.0]])
def test_a_loss_function_that_returns_something_else(tmp_path, value):
    trainer = make(tmp_path, loss=None, compute_loss_func=lambda o, y: value)
    refused(tmp_path, ConfigurationError, "A loss must be", trainer.fit)


def test_compute_metrics_must_return_a_dict(tmp_path):
    trainer = make(tmp_path, eval_dataset=make_data(4), compute_metrics=lambda p: 3.0)
    refused(tmp_path, ConfigurationError, "compute_metrics must return a dict", trainer.evaluate)


def test_several_outputs_with_wrong_keys(tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, {"a": keras.layers.Dense(1)(inputs)})
    x, y = make_data(8)
    refused(
        tmp_path,
        ConfigurationError,
        "'b', which is not an output of the",
        make(tmp_path, model, data=(x, {"a": y, "b": y}), loss={"a": "mse", "b": "mse"}).fit,
    )


# --- resuming from the wrong things ---------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """The folder of a run with a checkpoint of two updates."""
    folder = tmp_path / "finished"
    fit(
        batch_norm_model(),
        arguments(folder, max_steps=2, save_strategy="steps", save_steps=2),
        make_data(8),
    )
    return folder


def listing(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def test_resuming_from_nothing_is_an_error(tmp_path):
    trainer = make(tmp_path)
    refused(tmp_path, CheckpointNotFoundError, "No checkpoint", lambda: trainer.fit(True))
    missing = str(tmp_path / "run" / "checkpoint-7")
    refused(tmp_path, CheckpointNotFoundError, "checkpoint-7", lambda: trainer.fit(missing))
    args = arguments(tmp_path / "run", resume_from_checkpoint=True, jit_compile=False)
    refused(tmp_path, CheckpointNotFoundError, "No checkpoint", make(tmp_path, args=args).fit)


def test_auto_begins_anew_where_there_is_nothing(tmp_path):
    args = arguments(tmp_path / "run", max_steps=1, jit_compile=False)
    assert make(tmp_path, args=args).fit("auto").global_step == 1


def test_resume_from_a_foreign_folder(tmp_path):
    foreign = tmp_path / "holiday"
    foreign.mkdir()
    (foreign / "photo.jpg").write_text("x")
    model = linear_model()
    before = weights(model)
    refused(
        tmp_path,
        CheckpointError,
        "not a checkpoint",
        lambda: make(tmp_path, model).fit(str(foreign)),
    )
    assert same(weights(model), before)
    assert [p.name for p in foreign.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("value", ["", 3, ["a"]])
def test_resuming_from_nonsense_is_an_error(tmp_path, value):
    refused(
        tmp_path, ConfigurationError, "resume_from_checkpoint", lambda: make(tmp_path).fit(value)
    )


def test_resume_from_another_architecture(tmp_path, finished):
    before_files = listing(finished)
    for model in (batch_norm_model(width=5), linear_model()):
        before = weights(model)
        trainer = Trainer(model, arguments(finished), train_dataset=make_data(8), loss="mse")
        with pytest.raises(CheckpointMismatchError, match="does not fit this model") as caught:
            trainer.fit(True)
        assert isinstance(caught.value, ValueError)
        assert same(weights(model), before)
    assert listing(finished) == before_files


def test_resume_with_another_optimizer_changes_nothing(tmp_path, finished):
    model = batch_norm_model(seed=5)
    before, before_files = weights(model), listing(finished)
    trainer = Trainer(
        model,
        arguments(finished),
        train_dataset=make_data(8),
        loss="mse",
        optimizers=(keras.optimizers.SGD(0.1, momentum=0.9), None),
    )
    with pytest.raises(CheckpointMismatchError, match="optimizer"):
        trainer.fit(True)
    assert same(weights(model), before)
    assert listing(finished) == before_files


def test_resume_from_weights_alone(tmp_path):
    args = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_only_model=True)
    fit(linear_model(), args, make_data(8))
    model = linear_model(seed=4)
    before = weights(model)
    with pytest.raises(CheckpointMismatchError, match="save_only_model"):
        make(tmp_path, model, args=args).fit(True)
    assert same(weights(model), before)


def test_a_finished_run_has_nothing_to_do(finished, caplog):
    model = batch_norm_model(seed=5)
    trainer = Trainer(
        model, arguments(finished, max_steps=2), train_dataset=make_data(8), loss="mse"
    )
    output = trainer.fit(True)
    assert output.global_step == 2
    assert "Nothing to do" in caplog.text


def two_outputs():
    inputs = keras.Input((3,))
    heads = {name: keras.layers.Dense(2, name=name)(inputs) for name in ("p", "q")}
    return keras.Model(inputs, heads)


class ReturnsNothing(keras.Model):
    def call(self, x):
        return None


FIVE_WIDE = np.zeros((8, 3, 5), "float32")


@pytest.mark.parametrize(
    ("make_model", "x", "loss", "metrics", "match"),
    [
        (two_outputs, None, "mse", None, r"outputs \['p', 'q'\], but the label is one array"),
        (linear_model, None, ["mse", "mae"], None, "a list of 2, but there are 1 outputs"),
        (ReturnsNothing, None, "mse", None, "returns None"),
        (linear_model, None, "mse", [keras.metrics.F1Score, "mse"], "metric 'f1_score' does not"),
        (linear_model, FIVE_WIDE, "mse", None, r"\(8, 3, 5\). Expected: \(None, 3\)"),
    ],
)
def test_a_model_its_data_and_what_measures_it_have_other_forms(
    make_model, x, loss, metrics, match, tmp_path
):
    data = make_data(8) if x is None else (x, make_data(8)[1])
    metrics = metrics and [m() if isinstance(m, type) else m for m in metrics]
    if metrics:  # F1 wants as many columns of labels as of outputs
        data = data[0], np.zeros(8, "float32")
    trainer = make(tmp_path, make_model(), data, loss=loss, metrics=metrics)
    refused(tmp_path, KbtrainError, match, trainer.fit)


@pytest.mark.parametrize("metrics", [None, ["accuracy"]])
def test_labels_that_do_not_fit_the_loss(metrics, tmp_path):
    """No frames of a framework either: the traceback ends in `fit`."""
    x, _ = make_data(16)
    trainer = Trainer(
        linear_model(outputs=4),
        arguments(tmp_path),
        train_dataset=(x, np.zeros((16, 3), "float32")),
        loss="categorical_crossentropy",
        metrics=metrics,
    )
    with pytest.raises(DataError, match=r"labels float32\[8, 3\] and model outputs") as caught:
        trainer.fit()
    assert caught.value.__cause__ is None
    frames = [str(entry.path) for entry in caught.traceback]
    assert not any("site-packages" in name and "keras" in name for name in frames)


def test_integers_that_the_backend_cannot_hold(tmp_path):
    """JAX makes 5 of 2**32 + 5, in silence; the others have integers of 64 bits."""
    numbers = keras.Input((1,), dtype="int64")
    high = keras.ops.cast(numbers // 2**32, "float32")
    model = keras.Model(numbers, keras.layers.Dense(1, kernel_initializer="ones")(high))
    data = np.full((8, 1), 2**32 + 5), np.zeros((8, 1), "float32")
    trainer = make(tmp_path, model, data, eval_dataset=data)
    if keras.backend.backend() == "jax":
        refused(tmp_path, DataError, "32 bits.*4294967301", trainer.fit)
        with pytest.raises(DataError, match="32 bits"):
            trainer.evaluate()
    else:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(1.0)
