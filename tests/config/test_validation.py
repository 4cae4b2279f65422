"""Several fields: strategies that contradict each other, saves and evaluations, what follows."""

import pytest
from helpers_arguments import best, refusal

from kbtrain.config.training_args import TrainingArguments
from kbtrain.config.validation import check_saves_follow_evaluations
from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.core


def test_max_steps_makes_epochs_irrelevant():
    assert TrainingArguments(max_steps=5, num_train_epochs=0).max_steps == 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_strategy": "best"},
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "save_strategy": "no"},
        {"load_best_model_at_end": True, "save_strategy": "best"},
        {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "steps"},
        {"eval_strategy": "steps", "eval_steps": 0},
        {"eval_strategy": "steps", "logging_strategy": "no", "logging_steps": 0},
    ],
    ids=str,
)
def test_strategies_that_contradict_each_other(arguments):
    message = refusal(**arguments)
    assert "eval_" in message
    assert "Received: " in message


def test_persistent_workers_need_workers():
    assert "dataloader_num_workers=0" in refusal(dataloader_persistent_workers=True)
    TrainingArguments(dataloader_persistent_workers=True, dataloader_num_workers=1)


@pytest.mark.parametrize(
    ("save_steps", "eval_steps"),
    [(100, 60), (50, 100), (10**10 + 1, 10**10), (0.25, 0.1), (0.1, 0.2), (100, 0.1)],
)
def test_saves_must_fall_on_evaluations(save_steps, eval_steps):
    message = refusal(**best(save_steps, eval_steps))
    assert f"save_steps={save_steps}" in message
    assert f"eval_steps={eval_steps}" in message
    assert "save_strategy='best'" in message


@pytest.mark.parametrize(("save_steps", "eval_steps"), [(100, 50), (7, 7), (0.3, 0.1), (0.6, 0.2)])
def test_saves_that_fall_on_evaluations(save_steps, eval_steps):
    args = TrainingArguments(**best(save_steps, eval_steps))
    assert (args.save_steps, args.eval_steps) == (save_steps, eval_steps)


def test_ratios_are_compared_as_steps_once_the_steps_are_known():
    # ceil(0.2 * 24) = 5 is no multiple of ceil(0.1 * 24) = 3, although 0.2 is one of 0.1.
    assert "save_steps=5, eval_steps=3" in refusal(**best(0.2, 0.1, max_steps=24))
    assert TrainingArguments(**best(0.2, 0.1, max_steps=20)).max_steps == 20
    # 60 steps are a tenth of 600, so a count and a ratio can fit, but only when that is known.
    assert TrainingArguments(**best(120, 0.1, max_steps=600)).save_steps == 120
    with pytest.raises(ConfigurationError, match="save_steps=5, eval_steps=3"):
        check_saves_follow_evaluations(5, 3)


def test_two_names_of_one_setting():
    args = TrainingArguments(gradient_checkpointing=True)
    assert args.activation_checkpointing is True
    assert args.replace(activation_checkpointing=False).gradient_checkpointing is False
    assert args.replace(seed=1).gradient_checkpointing is True
    given = TrainingArguments(activation_checkpointing_kwargs={"every_n_layers": 2})
    assert given.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    message = refusal(gradient_checkpointing=True, activation_checkpointing=False)
    assert "two names of one setting" in message


def test_do_eval_follows_the_strategy_and_two_devices_contradict():
    assert TrainingArguments(eval_strategy="epoch").do_eval is True
    assert TrainingArguments(do_eval=True).do_eval is True
    assert TrainingArguments(use_cpu=True, devices="cpu:0").chosen_device == "cpu:0"
    assert TrainingArguments(devices="gpu:1").chosen_device == "gpu:1"
    assert "two different devices" in refusal(use_cpu=True, devices="gpu")


def test_eval_steps_follow_logging_steps_when_they_are_needed():
    assert TrainingArguments(eval_strategy="steps", logging_steps=20).eval_steps == 20
    assert TrainingArguments(eval_strategy="steps", logging_steps=20, eval_steps=5).eval_steps == 5
    assert TrainingArguments(eval_strategy="epoch", logging_steps=20).eval_steps is None


@pytest.mark.parametrize(
    ("arguments", "metric", "greater"),
    [
        ({}, None, None),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, "loss", False),
        (best(10, 10), "loss", False),
        (best(10, 10, metric_for_best_model="accuracy"), "accuracy", True),
        (best(10, 10, metric_for_best_model="eval_loss"), "eval_loss", False),
        (best(10, 10, metric_for_best_model="loss_ratio"), "loss_ratio", True),
        (best(10, 10, metric_for_best_model="wer", greater_is_better=False), "wer", False),
        ({"metric_for_best_model": "f1"}, "f1", True),
    ],
    ids=str,
)
def test_the_best_metric_and_its_direction_are_derived(arguments, metric, greater):
    args = TrainingArguments(**arguments)
    assert args.metric_for_best_model == metric
    assert args.greater_is_better is greater


def test_a_cuda_graph_needs_a_captured_step():
    with pytest.raises(ConfigurationError, match="cuda_graphs=True, jit_compile=False"):
        TrainingArguments(cuda_graphs=True, jit_compile=False)
    assert TrainingArguments(cuda_graphs=False, jit_compile=False).cuda_graphs is False
