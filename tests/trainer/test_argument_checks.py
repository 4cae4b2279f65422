"""What people who come from Keras or Lightning give the Trainer and TrainingArguments."""

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data

from kbtrain import ConfigurationError, Trainer, TrainingArguments

X, Y = make_data(8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": X, "y": Y}, r"'x'. Write train_dataset=\(x, y\)[^'].*\n.*'y'"),
        ({"validation_data": (X, Y)}, "Write eval_dataset="),
        ({"sample_weight": Y}, r"\(x, y, sample_weight\)"),
        ({"epochs": 3}, "Write num_train_epochs="),
        ({"batch_size": 3}, "Write per_device_train_batch_size="),
        ({"lr": 0.1}, "Such settings belong to TrainingArguments.*Write learning_rate=0.1"),
        ({"verbose": 0}, "Write disable_tqdm="),
        ({"learning_rate": 0.1}, r"use TrainingArguments\(learning_rate=...\)"),
        ({"steps_per_epoch": 3}, "field of TrainingArguments"),
        ({"push_to_hub": True}, r"use TrainingArguments\(push_to_hub=...\)"),
        ({"optimizer": "adam"}, r"optimizers=\(optimizer, schedule\)"),
        ({"collate_fn": list}, "data_collator"),
        ({"compute_metric": len}, "Did you mean compute_metrics"),
    ],
    ids=lambda item: "_".join(item) if isinstance(item, dict) else "",
)
def test_a_name_that_the_trainer_has_not(given, said):
    with pytest.raises(ConfigurationError, match=f"(?s)Trainer has no parameter.*{said}"):
        Trainer(linear_model(), **given)


def test_more_arguments_than_the_trainer_takes_by_position():
    with pytest.raises(ConfigurationError, match=r"7 arguments by position \(model, args.*9 by"):
        Trainer(*[None] * 9)


class Foreign:
    __module__ = "transformers.training_args"
    __qualname__ = "TrainingArguments"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            Foreign(),
            r"TrainingArguments\. It comes from transformers: import it from kbtrain.*from_dict",
        ),
        ({"max_steps": 3}, r"dict. Use TrainingArguments\(\*\*args\)"),
        ("runs/1", r"str. Use TrainingArguments\(output_dir\)"),
        (X, r"ndarray. Pass data by name: train_dataset=\(x, y\)"),
        ((X, Y), r"Pass data by name"),
        (3, "int.$"),
    ],
    ids=lambda item: type(item).__name__,
)
def test_args_of_another_kind(args, said):
    with pytest.raises(ConfigurationError, match=f"args must be a TrainingArguments.*{said}"):
        Trainer(linear_model(), args)


def test_arguments_of_transformers_can_be_converted():
    there = {
        **{"output_dir": "out", "local_rank": 0, "hub_token": "<HUB_TOKEN>", "deepspeed": None},
        **{"accelerator_config": {"split_batches": False, "dispatch_batches": None,
                                  "even_batches": True, "use_seedable_sampler": True,
                                  "non_blocking": False, "gradient_accumulation_kwargs": None}},
        **{"fsdp": [], "debug": [], "optim": "adamw_torch_fused", "lr_scheduler_type": "cosine"},
    }  # fmt: skip
    assert TrainingArguments.from_dict(there) == TrainingArguments(
        "out", lr_scheduler_type="cosine"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"verbose": 2}, "Write disable_tqdm"),
        ({"loss": "mse"}, "It is an argument of the Trainer"),
        ({"model": 1}, "It is an argument of the Trainer"),
        ({"validation_data": (1, 2)}, "eval_dataset"),
        ({"clipnorm": 0.5}, "optim_args={'clipnorm': 0.5}"),
        ({"max_epochs": 3}, "num_train_epochs=3"),
        ({"use_ema": True}, "ema=True"),
        ({"validation_steps": 3}, "eval_max_steps=3"),
        ({"early_stopping_patience": 3}, r"EarlyStoppingCallback\(3\)"),
    ],
    ids=lambda item: "_".join(item) if isinstance(item, dict) else "",
)
def test_a_name_that_the_arguments_have_not(given, said):
    with pytest.raises(ConfigurationError, match=said):
        TrainingArguments(**given)


# --- what can be known before a batch is seen ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
        ({"optim": "adamx"}, "Did you mean 'adamax'"),
        ({"report_to": "neptune"}, "'neptune' is not a known tracker"),
        ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}},
            "no argument 'num_cycle'. Did you mean 'num_cycles'",
        ),
    ],
    ids=str,
)
def test_names_are_looked_up_when_the_trainer_is_made(tmp_path, changes, said):
    with pytest.raises(ConfigurationError, match=said):
        Trainer(
            linear_model(), arguments(tmp_path, **changes), train_dataset=make_data(8), loss="mse"
        )


def functional(layer=None, outputs=None):
    inputs = keras.Input((3,))
    dense = layer or keras.layers.Dense(1)
    return keras.Model(inputs, (outputs or (lambda y: y))(dense(inputs)))


class AddsLoss(keras.layers.Dense):
    def call(self, x):
        y = super().call(x)
        self.add_loss(keras.ops.mean(y**2))
        return y


def compiled():
    model = linear_model()
    model.compile("adam", "mse")
    return model


@pytest.mark.parametrize(
    "make",
    [
        linear_model,
        functional,
        lambda: functional(outputs=lambda y: {"logits": y}),
        lambda: functional(keras.Sequential([keras.layers.Dense(1)])),
    ],
)
def test_a_model_that_cannot_have_a_loss_is_refused_at_once(tmp_path, make):
    model = make()
    with pytest.raises(ConfigurationError, match="There is no loss to train with"):
        Trainer(model, arguments(tmp_path), train_dataset=make_data(8))
    x = make_data(8)[0]
    predicted = Trainer(model, arguments(tmp_path)).predict(x).predictions
    keras.tree.map_structure(lambda a: np.testing.assert_equal(np.asarray(a).shape, (8, 1)),
                             predicted)  # fmt: skip


def test_a_model_that_may_have_a_loss_is_taken(tmp_path):
    regularized = keras.layers.Dense(1, kernel_regularizer="l2")
    models = [functional(AddsLoss(1)), functional(regularized), compiled(),
              functional(outputs=lambda y: {"loss": y})]  # fmt: skip
    for model in models:
        Trainer(model, arguments(tmp_path), train_dataset=make_data(8))

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            y = model(inputs[0])
            return (keras.ops.mean(y), y) if return_outputs else keras.ops.mean(y)

    Own(linear_model(), arguments(tmp_path), train_dataset=make_data(8))
