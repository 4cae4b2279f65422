"""What people who come from Transformers type: imports, results, states, methods of their own."""

import json
import random

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data

import kbtrain
from kbtrain import (
    ConfigurationError,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from kbtrain.utils.packages.import_hints import IMPORTS


def make(tmp_path, cls=Trainer, **changes):
    given = {n: changes.pop(n) for n in ("compute_metrics", "loss") if n in changes}
    args = arguments(tmp_path, **({"per_device_train_batch_size": 4, "max_steps": 3} | changes))
    data = make_data(8)
    return cls(
        linear_model(), args, train_dataset=data, eval_dataset=data, **({"loss": "mse"} | given)
    )


# --- imports -------------------------------------------------------------------------------------


def test_set_seed_repeats_what_is_drawn():
    def draw():
        set_seed(7)
        layer = keras.layers.Dense(3)
        layer.build((None, 2))
        return random.random(), np.random.rand(), keras.ops.convert_to_numpy(layer.kernel).tolist()

    assert draw() == draw()
    with pytest.raises(ConfigurationError, match="seed must be a whole number.*'7'"):
        set_seed("7")
    with pytest.raises(ConfigurationError, match="full_determinism=True"):
        set_seed(7, deterministic=True)


@pytest.mark.parametrize("name", [*IMPORTS, "AutoModelForSequenceClassification",
                                  "get_linear_schedule_with_warmup"])  # fmt: skip
def test_an_import_that_kbtrain_has_not_says_what_to_write(name):
    with pytest.raises(ImportError, match=f"kbtrain has no '{name}'. [A-Z]"):
        exec(f"from kbtrain import {name}")
    assert not hasattr(kbtrain, "_" + name)


def test_the_parser_has_the_references_name_and_arguments(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    file = tmp_path / "a.json"
    file.write_text('{"seed": 5, "push_to_hub": false}')
    assert parser.parse_json_file(json_file=file)[0].seed == 5
    assert parser.parse_yaml_file(yaml_file=file)[0].seed == 5
    words = ["--seed", "3", "--mine", "a", "b", "--lr=1", "--bf16"]
    args, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    assert (args.seed, args.bf16) == (3, True)
    assert rest == ["--mine", "a", "b", "--lr=1"]
    with pytest.raises(ConfigurationError, match="--config FILE"):
        parser.parse_args_into_dataclasses([], args_filename="run.args")


# --- results -------------------------------------------------------------------------------------


def test_a_prediction_indexes_and_unpacks_like_a_tuple():
    p = EvalPrediction(predictions=np.zeros(2), label_ids=np.ones(2))
    predictions, labels = p
    assert p[0] is predictions is p.predictions
    assert p[1] is labels is p.label_ids
    assert (len(p), p[-1] is labels, len(p[:1])) == (2, True, 1)
    with pytest.raises(IndexError):
        p[2]
    assert EvalPrediction(np.zeros(2), np.ones(2), inputs=3, losses=4)[2:] == (3, 4)


def test_a_metric_that_indexes(tmp_path):
    def error(p):
        return {"error": float(np.abs(p[0].reshape(-1) - np.asarray(p[1]).reshape(-1)).mean())}

    trainer = make(tmp_path, compute_metrics=error)
    x, y = trainer.eval_dataset
    expected = np.abs(trainer.model.predict(x, verbose=0).reshape(-1) - y.reshape(-1)).mean()
    assert trainer.evaluate()["eval_error"] == pytest.approx(expected, rel=1e-5)


def test_results_say_the_epoch(tmp_path):
    trainer = make(tmp_path)
    assert trainer.evaluate()["epoch"] == 0
    assert trainer.train().metrics["epoch"] == 1.5  # 3 updates of 2 an epoch
    assert trainer.evaluate(metric_key_prefix="again")["epoch"] == 1.5
    assert "epoch" not in trainer.predict(trainer.eval_dataset).metrics


# --- the state of a run --------------------------------------------------------------------------


def test_a_state_is_written_and_read(tmp_path):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.fit()
    trainer.state.save_to_json(tmp_path / "state.json")
    assert TrainerState.load_from_json(str(tmp_path / "state.json")) == trainer.state
    path = trainer.save_state()
    assert TrainerState.load_from_json(path).global_step == 3


def test_a_state_of_transformers_is_read(tmp_path):
    there = {
        **{"epoch": 1.0, "global_step": 5, "max_steps": 10, "total_flos": 1e9, "eval_steps": 500},
        **{"log_history": [{"loss": 0.5, "epoch": 1.0, "step": 5}], "best_metric": None},
        **{"stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}}}},
        "trial_params": None,
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(there))
    state = TrainerState.load_from_json(tmp_path / "trainer_state.json")
    assert (state.global_step, state.log_history[0]["loss"]) == (5, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("[1]", "the state of a run"), ("{}", "the state of a run"),
     ('{"global_step": "3"}', "global_step='3'"), ('{"global_step": -1}', "global_step=-1")],
)  # fmt: skip
def test_a_file_that_is_no_state_is_refused(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        TrainerState.load_from_json(tmp_path / "a.json")


# --- methods -------------------------------------------------------------------------------------


def test_questions_that_scripts_ask(tmp_path):
    trainer = make(tmp_path)
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="other")], name="m")
    assert trainer.get_decay_parameter_names(other) == ["m/other/kernel"]
    assert trainer.get_decay_parameter_names(trainer.model) == trainer.get_decay_parameter_names()
    assert trainer.label_names == ["labels"]
    assert make(tmp_path, label_names=["a", "b"]).label_names == ["a", "b"]


def test_a_loss_of_ones_own_need_not_take_num_items_in_batch(tmp_path):
    class Doubled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            return (loss._replace(sum=2 * loss.sum), outputs) if return_outputs else 2 * loss

    class Anything(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            assert "num_items_in_batch" in kwargs
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    plain = make(tmp_path).evaluate()["eval_loss"]
    assert make(tmp_path, Anything).evaluate()["eval_loss"] == plain
    assert make(tmp_path, Doubled).evaluate()["eval_loss"] == pytest.approx(2 * plain, rel=1e-6)


def test_the_model_card_takes_what_scripts_say(tmp_path):
    card = make(tmp_path).create_model_card(
        "en", finetuned_from="bert", tasks="text-classification", dataset_tags="glue",
        dataset="GLUE MRPC", dataset_args="mrpc", tags="text",
    ).read_text(encoding="utf-8")  # fmt: skip
    for line in ('language: "en"', 'base_model: "bert"', 'pipeline_tag: "text-classification"',
                 'datasets:\n- "glue"', 'tags:\n- "kbtrain"\n- "text"'):  # fmt: skip
        assert line + "\n" in card
    assert "It was fine-tuned from bert. It was trained on GLUE MRPC (mrpc).\n" in card
