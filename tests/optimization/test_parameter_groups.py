"""Which variables get what, through TrainingArguments: groups, target modules."""

import logging

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, make_data, same, train_logs, weights, with_weights

import optim
from kbtrain import ConfigurationError, Trainer
from kbtrain.optimization import weight_decay

GROUPS = [
    {"match": "first/", "lr_multiplier": 0.5, "weight_decay": 0.0},
    {"match": "LayerNormalization", "optimizer": {"name": "adamw", "beta_1": 0.0}},
]


def model(seed=0):
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4, name="first"),
        keras.layers.LayerNormalization(name="middle"),
        keras.layers.Dense(1, name="last"),
    ]
    return with_weights(keras.Sequential(layers, name="net"), seed)


def make_trainer(output_dir, groups=GROUPS, optimizers=(None, None), callbacks=(), **changes):
    args = arguments(
        output_dir,
        **{"max_steps": 4, "weight_decay": 0.1, "parameter_groups": groups, **changes},
    )
    return Trainer(
        model(),
        args,
        train_dataset=make_data(16),
        loss="mse",
        optimizers=optimizers,
        callbacks=list(callbacks),
    )


def test_each_variable_gets_the_decay_and_rate_of_its_group(tmp_path, caplog):
    trainer = make_trainer(tmp_path, lr_scheduler_type="constant")
    with caplog.at_level(logging.INFO, logger="kbtrain"):
        trainer.fit()
    update_rules = {
        v.path.removeprefix("net/"): trainer.optimizer.update_rule_of(v)
        for v in trainer.model.trainable_variables
    }
    decay_and_rate = {path: update_rule[1:] for path, update_rule in update_rules.items()}
    assert decay_and_rate == {
        "first/kernel": (0.0, 0.5),
        "first/bias": (0.0, 0.5),
        "middle/gamma": (0.0, 1.0),
        "middle/beta": (0.0, 1.0),
        "last/kernel": (0.1, 1.0),
        "last/bias": (0.0, 1.0),
    }
    assert update_rules["middle/gamma"].optimizer.beta_1 == 0.0
    assert update_rules["last/kernel"].optimizer.beta_1 == 0.9
    assert trainer.optimizer.parameter_groups_table() in caplog.text


def test_rates_are_multiplied(tmp_path):
    def moved(groups):
        trainer = make_trainer(tmp_path, groups, max_steps=1, weight_decay=0.0)
        before = weights(trainer.model)
        trainer.fit()
        return [a - b for a, b in zip(before, weights(trainer.model), strict=True)]

    plain, grouped = moved(None), moved([{"match": "first/", "lr_multiplier": 0.25}])
    for i, (a, b) in enumerate(zip(plain, grouped, strict=True)):
        np.testing.assert_allclose(b, (0.25 if i < 2 else 1.0) * a, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bf16", [False, True])
def test_groups_resume_exactly(tmp_path, bf16):
    changes = {"save_strategy": "steps", "save_steps": 1, "bf16": bf16}
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.fit()
    make_trainer(tmp_path / "cut", callbacks=[StopAt(2)], **changes).fit()
    resumed = make_trainer(tmp_path / "cut", **changes)
    resumed.fit(resume_from_checkpoint=True)
    assert train_logs(resumed) == train_logs(whole)
    assert same(weights(resumed.model), weights(whole.model))


def test_layerwise_decay_is_json(tmp_path):
    groups = optim.layerwise_lr_decay(model(), 0.5)
    trainer = make_trainer(tmp_path, groups)
    trainer.fit()
    assert type(trainer.args).from_json_string(trainer.args.to_json_string()) == trainer.args
    rates = [trainer.optimizer.update_rule_of(v)[2] for v in trainer.model.trainable_variables]
    assert rates == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"match": "nothing", "lr_multiplier": 1}, "matches none of the 6 trained variables"),
        ({"match": "first", "rate": 1}, "unknown key 'rate'"),
        ({"match": "first", "optimizer": "adamww"}, "Did you mean 'adamw'"),
        ({"match": "bias", "weight_decay": 0.1}, "excluded from weight decay"),
    ],
)
def test_a_group_that_cannot_be_is_refused(tmp_path, group, message):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path, [group]).fit()


def test_a_type_of_layer_is_given_by_its_name(tmp_path):
    with pytest.raises(ConfigurationError, match="instead of the class, the string 'Dense'"):
        make_trainer(tmp_path, [{"match": keras.layers.Dense, "lr_multiplier": 0.5}])


def test_an_optimizer_that_was_given(tmp_path):
    with pytest.raises(ConfigurationError, match="set its groups when you create it"):
        make_trainer(tmp_path, optimizers=(optim.AdamW(), None)).fit()


def test_an_optimizer_that_knows_no_groups(tmp_path):
    class Own(Trainer):
        def create_optimizer(self):
            return keras.optimizers.SGD(0.1)

    args = arguments(tmp_path, max_steps=1, parameter_groups=GROUPS)
    trainer = Own(model(), args, train_dataset=make_data(16), loss="mse")
    with pytest.raises(ConfigurationError, match="set_parameter_groups.*Received: .*SGD"):
        trainer.fit()


def test_kbtrain_and_optim_agree_on_what_is_not_decayed():
    assert weight_decay.NO_DECAY_NAMES.pattern == optim.core.weight_decay.NO_DECAY_NAMES.pattern
    assert weight_decay.NO_DECAY_LAYERS == optim.core.weight_decay.NO_DECAY_LAYERS
    assert weight_decay.decay_parameter_names(model()) == optim.decay_parameter_names(model())


# ---- target modules ------------------------------------------------------------------------------


def test_a_target_that_is_not_there(tmp_path):
    trainer = make_trainer(tmp_path, None, optim="galore_adamw", optim_target_modules=["nothing"])
    with pytest.raises(ConfigurationError, match="GaLoreAdamW: `target_modules`: 'nothing' is fou"):
        trainer.fit()


def projected(trainer):
    """Paths of the variables that are projected."""
    optimizer = trainer.optimizer
    return {
        v.path.removeprefix("net/")
        for v in trainer.model.trainable_variables
        if optimizer.rule_of(v) is optimizer
    }


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, {"first/kernel"}),
        ("all-linear", {"first/kernel"}),
        (["first", "middle"], {"first/kernel"}),
        ("middle|last", set()),  # vectors, and a matrix of one column
    ],
)
def test_target_modules_choose_what_is_projected(tmp_path, targets, expected):
    trainer = make_trainer(
        tmp_path,
        groups=None,
        optim="galore_adamw",
        optim_args={"rank": 1},
        optim_target_modules=targets,
    )
    trainer.fit()
    assert projected(trainer) == expected


def test_target_modules_that_match_nothing(tmp_path):
    changes = {"optim": "apollo_adamw", "optim_args": {"rank": 1}}
    trainer = make_trainer(tmp_path, groups=None, optim_target_modules=["ffn"], **changes)
    with pytest.raises(ValueError, match="'ffn' is found in no variable's path"):
        trainer.fit()


def test_target_modules_are_for_some_optimizers_only(tmp_path):
    trainer = make_trainer(tmp_path, groups=None, optim="adamw", optim_target_modules="first")
    with pytest.raises(ConfigurationError, match="apollo_adamw, .*galore_adamw.*optim='adamw'"):
        trainer.fit()


def test_target_modules_are_given_once(tmp_path):
    with pytest.raises(ConfigurationError, match="Remove one of them"):
        arguments(
            tmp_path,
            optim="galore_adamw",
            optim_args={"target_modules": ["a"]},
            optim_target_modules="a",
        )
