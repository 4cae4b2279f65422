"""The Trainer's smaller methods, evaluation, arguments of the wrong kind, files of results."""

import doctest
import json
import logging

import keras
import numpy as np
import pytest
from helpers import Recorder, arguments, linear_model, make_data, same, train_logs, weights
from helpers_trainer import make

from kbtrain import (
    ConfigurationError,
    DataError,
    OutputError,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from kbtrain.config import process_properties
from kbtrain.evaluation import gather

pytestmark = pytest.mark.core

# --- questions ------------------------------------------------------------------------------------


def test_one_process_answers_for_itself():
    args = TrainingArguments(log_level="error")
    assert (args.world_size, args.process_index, args.local_process_index) == (1, 0, 0)
    assert args.should_log
    assert args.should_save
    assert args.get_process_log_level() == logging.ERROR
    passive = TrainingArguments().get_process_log_level()
    assert passive == logging.getLogger("kbtrain").getEffectiveLevel()
    with args.main_process_first(desc="tokenizing"):
        done = True
    assert done
    assert doctest.testmod(process_properties).failed == 0


def test_samples_of_an_update(tmp_path):
    trainer = make(tmp_path, gradient_accumulation_steps=3)
    assert trainer.get_total_train_batch_size() == 12
    assert trainer.get_total_train_batch_size(TrainingArguments()) == 8
    assert trainer.is_local_process_zero()
    assert trainer.is_world_process_zero()
    assert trainer.num_examples(trainer.get_train_dataloader()) == 16


def test_learning_rates_of_the_next_update(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(kwargs["trainer"].get_learning_rates())

    trainer = make(tmp_path, callbacks=[Look()], learning_rate=0.1, lr_scheduler_type="linear")
    with pytest.raises(ConfigurationError, match="no optimizer before fit"):
        trainer.get_learning_rates()
    trainer.fit()
    expected = [0.1 * (1 - step / 4) for step in range(5)]
    np.testing.assert_allclose(seen, np.array(expected)[:4, None], rtol=1e-6)
    np.testing.assert_allclose(trainer.get_learning_rates(), [0.0], atol=1e-9)
    np.testing.assert_allclose(train_logs(trainer, "learning_rate"), expected[:4], rtol=1e-6)


def test_learning_rates_of_parameter_groups(tmp_path):
    groups = [{"match": "bias", "lr_multiplier": 3.0}]
    trainer = make(tmp_path, parameter_groups=groups, lr_scheduler_type="constant", max_steps=1)
    trainer.fit()
    np.testing.assert_allclose(trainer.get_learning_rates(), [0.01, 0.03], rtol=1e-6)


# --- evaluation -----------------------------------------------------------------------------------


def test_a_named_evaluation_set(tmp_path):
    x, y = make_data(8)
    trainer = make(tmp_path, eval_dataset={"near": (x, y), "far": (x, y + 10)})
    both = trainer.evaluate()
    assert trainer.evaluate("far")["eval_loss"] == both["eval_far_loss"]
    assert trainer.evaluate({"two": (x, y)})["eval_two_loss"] == both["eval_near_loss"]
    with pytest.raises(ConfigurationError, match="no evaluation set 'fare'.*'near', 'far'"):
        trainer.evaluate("fare")
    with pytest.raises(ConfigurationError, match=r"dict of several data sets.*Received: tuple"):
        make(tmp_path).evaluate("far")


class OwnEvaluate(Trainer):
    def evaluate(self, eval_dataset=None, metric_key_prefix="eval"):
        return super().evaluate(eval_dataset, metric_key_prefix=metric_key_prefix) | {"own": 1}


def test_an_evaluate_without_ignore_keys_may_override_ours(tmp_path):
    sets = {"near": make_data(4), "far": make_data(4)}
    trainer = OwnEvaluate(linear_model(), arguments(tmp_path), eval_dataset=sets, loss="mse")
    assert {"eval_near_loss", "eval_far_loss", "own"} <= trainer.evaluate().keys()


def test_the_loop_alone_neither_logs_nor_fires(tmp_path):
    recorder = Recorder()
    trainer = make(tmp_path, callbacks=[recorder], per_device_eval_batch_size=8)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader())
    assert recorder.events == ["on_init_end", "on_prediction_step", "on_prediction_step"]
    assert output.num_samples == 16
    np.testing.assert_array_equal(output.label_ids, make_data(16)[1])
    loss = np.mean((output.predictions - output.label_ids) ** 2)
    assert output.metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    only = trainer.evaluation_loop([make_data(16)], True, None, "a")
    assert only.predictions is None
    assert only.metrics["a_loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.state.log_history == []


# --- wrong kinds of arguments ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        *(
            ({name: 3}, rf"{name} must be a function \(.*Received: int")
            for name in (
                "data_collator",
                "compute_loss_func",
                "compute_metrics",
                "preprocess_logits_for_metrics",
            )
        ),
        ({"model_init": 3, "model": None}, "model_init must be a function"),
        ({"compute_metrics": lambda: {}}, r"compute_metrics must be.*arguments \(\): too many"),
        ({"compute_metrics": lambda p, q: {}}, "missing a required argument: 'q'"),
        ({"compute_loss_func": lambda outputs: 0.0}, r"compute_loss_func must be.*\(outputs\)"),
        ({"preprocess_logits_for_metrics": lambda x: x}, "preprocess_logits_for_metrics must be"),
        ({"data_collator": Recorder}, "data_collator must be.*the class Recorder"),
        ({"loss": keras.losses.MeanSquaredError}, r"Instantiate it: MeanSquaredError\(\)"),
        ({"metrics": [keras.metrics.Mean]}, r"objects, not classes.*Use Mean\(\)"),
        ({"compute_metric": len}, "no parameter 'compute_metric'. Did you mean compute_metrics"),
        ({"learning_rate": 0.1}, "'learning_rate'. It is a field of TrainingArguments"),
        ({"xyz": 1}, "'xyz'. It has: model, args"),
        ({"callbacks": TrainerCallback}, "must be a list of callbacks. Received: TrainerCallback"),
        ({"callbacks": Recorder()}, "must be a list of callbacks. Received: Recorder"),
        ({"optimizers": (None, 0.1)}, r"optimizers\[1\] must be.*Received: float"),
        ({"optimizers": "adam"}, "pair"),
        ({"args": {"learning_rate": 1.0}}, "args must be a TrainingArguments. Received: dict"),
        ({"processing_class": "gpt2"}, "processing_class is saved.*Received: str"),
    ],
)
def test_arguments_of_the_wrong_kind(tmp_path, changes, match):
    given = {"model": linear_model(), "args": arguments(tmp_path)} | changes
    with pytest.raises(ConfigurationError, match=match):
        Trainer(**given)


@pytest.mark.parametrize("action", ["fit", "evaluate", "predict"])
def test_data_of_another_shape_after_the_first(tmp_path, action):
    x, y = make_data(16)
    trainer = make(tmp_path, max_steps=1)
    trainer.fit()
    trainer.train_dataset = trainer.eval_dataset = (x[:, :2], y)
    given = [x[:, :2]] if action == "predict" else []
    with pytest.raises(
        DataError, match=r"does not accept the inputs of the data: float32\[\d, 2\]"
    ):
        getattr(trainer, action)(*given)


def test_results_become_what_json_can_hold(tmp_path):
    def compute(prediction):
        return {
            "tensor": keras.ops.ones(()),
            "array": np.arange(4).reshape(2, 2),
            "one": np.array([0.1]),
            "scalar": np.float64(0.1),
            "text": "high",
            "nested": {"a": [np.float32(2.0)]},
        }

    data = make_data(4)
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path),
        eval_dataset=data,
        loss="mse",
        compute_metrics=compute,
    )
    metrics = trainer.evaluate()
    expected = {
        "eval_tensor": 1.0,
        "eval_array": [[0, 1], [2, 3]],
        "eval_one": 0.1,
        "eval_scalar": 0.1,
        "eval_text": "high",
        "eval_nested": {"a": [2.0]},
    }
    assert {name: metrics[name] for name in expected} == expected
    assert type(metrics["eval_scalar"]) is float
    path = trainer.save_metrics("eval", metrics | {"more": np.float32(0.5)})
    assert json.loads(path.read_text())["more"] == 0.5
    trainer.log({"more": np.float32(0.5)})
    assert trainer.state.log_history[-1]["more"] == 0.5
    with pytest.raises(ConfigurationError, match=r"log\(\) got.*'thing'. Received: object"):
        trainer.log({"thing": object()})
    assert doctest.testmod(gather).failed == 0


def test_a_method_that_would_never_be_called_is_an_error(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs):
            return 0.0

    with pytest.raises(ConfigurationError, match="Own.training_step would never.*compute_loss"):
        Own(linear_model(), arguments(tmp_path))
    with pytest.raises(
        AttributeError, match="'Trainer' has no attribute 'accelerator'. It belongs"
    ):
        _ = make(tmp_path).accelerator
    with pytest.raises(AttributeError, match="'Trainer' has no attribute 'nothing'$"):
        _ = make(tmp_path).nothing


class NoArguments(Trainer):
    def compute_loss(self, model, inputs):
        return 0.0


class NoOptimizer(Trainer):
    def create_optimizer(self):
        return None


def fit_inside(tmp_path):
    class Inside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kwargs["trainer"].fit()

    make(tmp_path, callbacks=[Inside()]).fit()


def one_optimizer_for_two(tmp_path):
    optimizers = (keras.optimizers.SGD(0.1), None)
    make(tmp_path, optimizers=optimizers).fit()
    make(tmp_path, optimizers=optimizers).fit()


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (lambda path: NoArguments(linear_model(), arguments(path)), "compute_loss must be defined"),
        (
            lambda path: NoOptimizer(
                linear_model(), arguments(path), train_dataset=make_data(), loss="mse"
            ).fit(),
            "create_optimizer must create a keras.optimizers.Optimizer. Received: NoneType",
        ),
        (fit_inside, r"while fit\(\) is running"),
        (one_optimizer_for_two, "SGD.*already used for other variables.*kernel"),
        (
            lambda path: make(path).evaluate(metric_key_prefix=""),
            "metric_key_prefix must be a string",
        ),
        (
            lambda path: make(path).fit(model_path="x"),
            "model_path.* Write resume_from_checkpoint=.* It takes: resume_from_checkpoint, ignore",
        ),
        (lambda path: make(path).predict(), "missing.*test_dataset.*It takes: test_dataset, "),
        (lambda path: make(path).evaluate(None, "test"), "ignore_keys='test'.*metric_key_prefix="),
        (lambda path: make(path).fit(None, 3), "ignore_keys must be a list"),
        (lambda path: make(path).track("a", "b"), "track.. got.*not a number.*'a'.*Received: str"),
        (lambda path: make(path).track("loss", 1.0), "'loss'.*is reserved"),
        (lambda path: make(path).track(3, 1.0), "not a string. Received: 3"),
        (lambda path: make(path).log(3), "log.. got .* other than a dict.*Received: int"),
        (lambda path: make(path).save_metrics("train", 4), "got something other than a dict"),
        (lambda path: make(path).log_metrics("train", None), "a dict.*Received: NoneType"),
        (lambda path: make(path).save_model(3), "save_model takes the path.*Received: 3"),
        (
            lambda path: make(path).fire("on_lunch"),
            "no event 'on_lunch'. Expected one of: on_init_end",
        ),
        (
            lambda path: make(path, metrics=[keras.metrics.MeanSquaredError("loss")]).evaluate(),
            "metrics has the name 'loss'",
        ),
        (
            lambda path: make(path, metrics=[keras.metrics.MeanSquaredError("m")] * 2).fit(),
            r"One metric object is given twice \('m'\)",
        ),
    ],
)
def test_mistakes_in_what_is_called(tmp_path, action, match):
    with pytest.raises(ConfigurationError, match=match):
        action(tmp_path)


@pytest.mark.parametrize("batchwise", [False, True])
def test_an_error_in_compute_metrics_is_named(tmp_path, batchwise):
    def compute(prediction, compute_result=True):
        raise KeyError("f1")

    args = arguments(tmp_path, batch_eval_metrics=batchwise)
    data = make_data(4)
    trainer = Trainer(linear_model(), args, eval_dataset=data, loss="mse", compute_metrics=compute)
    with pytest.raises(KeyError, match="f1") as caught:
        trainer.evaluate()
    assert caught.value.__notes__ == ["Raised by compute_metrics."]


def test_a_model_may_be_assigned(tmp_path):
    data, other = make_data(16), linear_model(seed=1)
    trainer = make(tmp_path, data=data)
    trainer.fit()
    trainer.model = other
    error = data[0] @ weights(other)[0] + weights(other)[1] - data[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(error**2), rel=1e-5)
    before = weights(other)
    trainer.fit()
    assert not same(weights(other), before)


def test_a_model_card_of_a_model_without_variables(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)], name="bare")
    assert "`bare`, without variables yet." in make(tmp_path, model).create_model_card().read_text()


def test_evaluating_at_the_start_needs_data(tmp_path):
    with pytest.raises(ConfigurationError, match="eval_on_start=True needs an eval_dataset"):
        make(tmp_path, eval_dataset=None, eval_on_start=True)


def test_a_pair_of_optimizer_and_schedule_may_be_a_list(tmp_path):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 4)
    trainer = make(tmp_path, optimizers=[keras.optimizers.AdamW(0.1), schedule], max_steps=1)
    trainer.fit()
    assert trainer.lr_scheduler is schedule


def test_a_loss_may_not_log_under_the_names_of_the_log(tmp_path):
    """It would take the place of the loss in the log, and in the choice of the best model."""
    data = make_data(8)
    for name in ("loss", "grad_norm", "learning_rate", "epoch", "step", 7):
        trainer = Trainer(
            linear_model(),
            arguments(tmp_path, max_steps=1, jit_compile=False),
            train_dataset=data,
            compute_loss_func=lambda o, y, n=name: (keras.ops.mean((o - y) ** 2), {n: 777.0}),
        )
        with pytest.raises(ConfigurationError, match=str(name)):
            trainer.fit()


def test_values_to_log_may_come_per_sample(tmp_path):
    x, y = make_data(8)

    def loss(outputs, labels):
        return keras.ops.mean((outputs - labels) ** 2), {"labels": labels}

    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, logging_steps=1)
    trainer = Trainer(
        linear_model(), args, train_dataset=(x, y), eval_dataset=(x, y), compute_loss_func=loss
    )
    trainer.fit()
    assert train_logs(trainer, "labels") == [pytest.approx(y.mean(), rel=1e-5)]
    assert trainer.evaluate()["eval_labels"] == pytest.approx(y.mean(), rel=1e-5)


def test_compute_metrics_does_not_hide_the_loss(tmp_path, caplog):
    """As in Transformers, where the loss is added to the results last."""
    x, y = make_data(8)
    for names in (["loss"], ["eval_loss"]):
        trainer = Trainer(
            linear_model(),
            arguments(tmp_path),
            eval_dataset=(x, y),
            loss="mse",
            compute_metrics=lambda p, n=names: dict.fromkeys(n, -1.0) | {"n": len(p.predictions)},
        )
        kernel, bias = weights(trainer.model)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(np.mean((x @ kernel + bias - y) ** 2))
        assert metrics["eval_n"] == 8
        assert f"compute_metrics returned {names[0]!r}" in caplog.text


# --- files of results -----------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    folder = tmp_path / "file" / "out"
    trainer = make(folder)
    for write in (
        trainer.save_model,
        trainer.save_state,
        trainer.create_model_card,
        lambda: trainer.save_metrics("eval", {"a": 1}),
    ):
        with pytest.raises(OutputError, match=r"Could not write .*out.*choose another output_dir"):
            write()


def test_results_are_not_added_to_what_is_no_table_of_results(tmp_path):
    (tmp_path / "all_results.json").write_text("{", encoding="utf-8")
    trainer = make(tmp_path)
    with pytest.raises(OutputError, match="all_results.json does not hold a JSON object"):
        trainer.save_metrics("eval", {"a": 1})
    trainer.save_metrics("eval", {"a": 1}, combined=False)
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"a": 1}
    assert not list(tmp_path.glob(".tmp-*"))
