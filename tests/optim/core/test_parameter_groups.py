"""Parameter groups: who gets what, in plain Keras."""

import json

import keras
import numpy as np
import pytest

import optim
from optim.core.parameter_groups import parse_groups


@keras.saving.register_keras_serializable(package="test")
class Descent(optim.Optimizer):
    """Plain gradient descent with decay."""

    def slot_shapes(self, shape):
        return {}

    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        decayed = parameter * (1.0 - learning_rate * weight_decay)
        return decayed - learning_rate * gradient, {}


def variables(*names, value=1.0):
    made = []
    for name in names:
        folder, _, last = name.rpartition("/")
        with keras.name_scope(folder or "root"):
            made.append(keras.Variable([value], name=last))
    return made


def built(groups, names=("a/kernel", "a/bias", "b/kernel"), **kwargs):
    optimizer = Descent(0.5, parameter_groups=groups, **kwargs)
    listed = variables(*names)
    optimizer.build(listed)
    return optimizer, listed


def update_rules(optimizer, listed):
    return [optimizer.update_rule_of(variable)[1:] for variable in listed]


def test_the_first_match_wins(tools):
    optimizer, listed = built(
        [
            {"match": "bias$", "weight_decay": 0.0},
            {"match": "^a/", "lr_multiplier": 0.5, "weight_decay": 0.25},
        ],
        weight_decay=0.125,
    )
    assert update_rules(optimizer, listed) == [(0.25, 0.5), (0.0, 1.0), (0.125, 1.0)]
    tools.run(optimizer, listed, [[np.ones(1, "float32")] * 3])
    expected = [1 - 0.25 * 0.25 - 0.25, 1 - 0.5, 1 - 0.5 * 0.125 - 0.5]
    assert [float(tools.to_numpy(v)[0]) for v in listed] == expected


def test_a_multiplier_of_0_freezes(tools):
    optimizer, listed = built([{"match": "a/", "lr_multiplier": 0}], weight_decay=0.1)
    tools.run(optimizer, listed, [[np.ones(1, "float32")] * 3])
    assert [float(tools.to_numpy(v)[0]) for v in listed[:2]] == [1.0, 1.0]


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_in_groups_is_several_adamws(tools, rng, kernel, dtype):
    settings = [(1.0, 0.1), (0.25, 0.1), (1.0, 0.0)]
    start = [rng.normal(size=(3,)).astype("float32") for _ in settings]
    gradients = [[rng.normal(size=(3,)).astype("float32") for _ in settings] for _ in range(4)]
    with keras.name_scope("x"):
        listed = [keras.Variable(value, name=f"v{i}", dtype=dtype) for i, value in enumerate(start)]
    optimizer = optim.AdamW(
        0.01,
        weight_decay=0.1,
        kernel=kernel,
        parameter_groups=[
            {"match": "v1$", "lr_multiplier": 0.25},
            {"match": "v2$", "weight_decay": 0.0},
        ],
    )
    first = [tools.to_numpy(v) for v in listed]
    tools.run(optimizer, listed, gradients)
    for i, (multiplier, decay) in enumerate(settings):
        expected = tools.reference_adamw(
            first[i], [step[i] for step in gradients], 0.01 * multiplier, weight_decay=decay
        )
        tolerance = {"float32": 1e-6, "bfloat16": 5e-3}[dtype]
        np.testing.assert_allclose(tools.to_numpy(listed[i]), expected, rtol=tolerance)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", {"name": "adamw", "beta_1": 0.5}, optim.AdamW(1.0, beta_1=0.5)],
    ids=["name", "arguments", "object"],
)
def test_another_rule(tools, optimizer):
    groups = [{"match": "^a/", "optimizer": optimizer, "weight_decay": 0.0}]
    made, listed = built(groups, ("a/kernel", "b/kernel"))
    assert [type(made.rule_of(v)) for v in listed] == [optim.AdamW, Descent]
    assert made.slots_of(listed[0]).keys() == {"momentum", "velocity"}
    assert made.slots_of(listed[1]) == {}
    if optimizer != "adamw":
        assert made.rule_of(listed[0]).beta_1 == 0.5
    tools.run(made, listed, [[np.full(1, 3.0, "float32")] * 2])
    # AdamW's first step is the learning rate of the optimizer with the groups.
    np.testing.assert_allclose(tools.to_numpy(listed[0]), [0.5], rtol=1e-6)
    np.testing.assert_allclose(tools.to_numpy(listed[1]), [1 - 0.5 * 3])


def test_config_and_keras_file_keep_the_groups(tools, tmp_path):
    model = tools.linear_model(
        optim.AdamW(
            0.1,
            parameter_groups=[
                {"match": "dot", "lr_multiplier": 0.5, "optimizer": {"name": "adamw", "beta_1": 0}}
            ],
        ),
        [1.0, 2.0],
    )
    model.compile(optimizer=model.optimizer, loss="mse")
    x, y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
    model.fit(x, y, epochs=2, verbose=0)
    config = model.optimizer.get_config()
    again = optim.AdamW.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.parameter_groups == model.optimizer.parameter_groups
    assert loaded.optimizer.rule_of(loaded.trainable_variables[0]).beta_1 == 0
    for each in (model, loaded):
        each.fit(x, y, epochs=2, verbose=0)
    np.testing.assert_array_equal(
        *[tools.to_numpy(m.trainable_variables[0]) for m in (model, loaded)]
    )
    assert "parameter_groups" not in optim.AdamW().get_config()


@pytest.mark.parametrize("kind", ["types", "layers", "pattern"])
def test_a_loaded_model_may_have_other_paths(tools, tmp_path, kind):
    # Keras leaves out the name of a Sequential when it loads it.
    model = network()
    groups = {
        "types": optim.groups_for(model, [{"match": "Dense", "lr_multiplier": 0.5}]),
        "layers": optim.layerwise_lr_decay(model),
        "pattern": [{"match": "(^|/)head/", "lr_multiplier": 0.5}],
    }[kind]
    model.compile(optimizer=optim.AdamW(0.1, parameter_groups=groups), loss="mse")
    x, y = np.ones((4, 3), "int32"), np.ones((4, 1), "float32")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    rates = [
        [m.optimizer.update_rule_of(v)[2] for v in m.trainable_variables] for m in (model, loaded)
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    for each in (model, loaded):
        each.fit(x, y, verbose=0)
    for a, b in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(a), tools.to_numpy(b))


def test_a_listed_path_that_two_variables_could_mean():
    with pytest.raises(ValueError, match="lists 'kernel', which is not among"):
        built([{"match": ["kernel"], "lr_multiplier": 2}])
    optimizer, listed = built([{"match": ["net/a/bias", "b/kernel"], "lr_multiplier": 2}])
    assert [t[1] for t in update_rules(optimizer, listed)] == [1.0, 2.0, 2.0]


def test_the_table():
    optimizer, _ = built(
        [{"match": "bias$", "weight_decay": 0}, {"match": "^a/", "optimizer": "adamw"}],
        weight_decay=0.5,
    )
    assert optimizer.parameter_groups_table().splitlines() == [
        "variable  shape  group  lr x  decay  rule",
        "--------  -----  -----  ----  -----  -------",
        "a/kernel  (1,)   1      1     0.01   AdamW",
        "a/bias    (1,)   0      1     0      Descent",
        "b/kernel  (1,)   -      1     0.5    Descent",
    ]
    with pytest.raises(ValueError, match="build"):
        Descent(0.1).parameter_groups_table()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"match": "c/", "lr_multiplier": 2}, "matches none of the 3 trained variables: a/kernel"),
        ({"match": ["a/kernel", "c"], "lr_multiplier": 2}, "lists 'c', which is not among"),
    ],
)
def test_a_pattern_that_matches_nothing(group, message):
    with pytest.raises(ValueError, match=message):
        built([group])


def test_a_group_behind_another_one():
    groups = [{"match": "a", "lr_multiplier": 2}, {"match": "a/b", "lr_multiplier": 3}]
    with pytest.raises(ValueError, match=r"parameter_groups\[1\], match='a/b', gets no variable"):
        built(groups)


def test_a_decay_that_nobody_can_get():
    optimizer = Descent(0.1, parameter_groups=[{"match": "bias", "weight_decay": 0.1}])
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    with pytest.raises(ValueError, match="all of its 1 variables are excluded"):
        optimizer.build(variables("a/kernel", "a/bias"))
    # One of them is enough, and the others stay excluded.
    optimizer = Descent(0.1, parameter_groups=[{"match": "a/", "weight_decay": 0.1}])
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    listed = variables("a/kernel", "a/bias")
    optimizer.build(listed)
    assert [optimizer.weight_decay_of(v) for v in listed] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"match": "a"}, TypeError, "must be a list of dictionaries"),
        (["a"], TypeError, r"parameter_groups\[0\] must be a dictionary"),
        ([{"lr_multiplier": 1}], ValueError, "has no 'match'"),
        ([{"match": "a", "lr": 1}], ValueError, "unknown key 'lr'. Its keys: match, lr_mult"),
        ([{"match": "a"}], ValueError, "changes nothing"),
        ([{"match": "(", "lr_multiplier": 1}], ValueError, "not a regular expression"),
        ([{"match": "", "lr_multiplier": 1}], TypeError, "regular expression or a list"),
        ([{"match": [], "lr_multiplier": 1}], TypeError, "regular expression or a list"),
        ([{"match": 3, "lr_multiplier": 1}], TypeError, "regular expression or a list"),
        ([{"match": keras.layers.Dense, "lr_multiplier": 1}], TypeError, "optim.groups_for"),
        ([{"match": "a", "lr_multiplier": -1}], ValueError, r"\['lr_multiplier'\]` must be"),
        ([{"match": "a", "weight_decay": "x"}], ValueError, r"\['weight_decay'\]` must be"),
        ([{"match": "a", "optimizer": "adamww"}], ValueError, "Did you mean 'adamw'"),
        ([{"match": "a", "optimizer": 3}], TypeError, "must be an optimizer of `optim`"),
        ([{"match": "a", "optimizer": {"beta_1": 0}}], ValueError, "has no 'name'"),
        (
            [{"match": "a", "optimizer": {"name": "adamw", "learning_rate": 1}}],
            ValueError,
            "Give the group an 'lr_multiplier'",
        ),
        ([{"match": "a", "optimizer": keras.optimizers.SGD()}], TypeError, "must be an optimizer"),
        (
            [{"match": "a", "optimizer": {"name": "sgd", "clipnorm": 1.0}}],
            ValueError,
            "has a clipnorm, which would not be used",
        ),
        ([{"match": "a", "optimizer": optim.AdamW(use_ema=True)}], ValueError, "has a use_ema"),
    ],
)
def test_mistakes(groups, error, message):
    with pytest.raises(error, match=message):
        parse_groups(groups)


def test_groups_inside_of_groups():
    inner = optim.AdamW(parameter_groups=[{"match": "a", "lr_multiplier": 2}])
    with pytest.raises(ValueError, match="has groups of its own"):
        parse_groups([{"match": "a", "optimizer": inner}])


def test_no_average_of_what_is_evaluated_as_an_average():
    groups = [{"match": "kernel", "optimizer": "schedule_free_sgd"}]
    with pytest.raises(ValueError, match="by ScheduleFreeSGD in `parameter_groups`"):
        optim.AdamW(use_ema=True, parameter_groups=groups).build(variables("kernel", "bias"))
    with pytest.raises(ValueError, match="also in one of its groups"):
        optim.EMA(optim.AdamW(parameter_groups=groups)).build(variables("kernel", "bias"))


def test_groups_come_before_the_state():
    optimizer, _ = built([])
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.set_parameter_groups([{"match": "a", "lr_multiplier": 2}])


def network():
    """Embedding, a block of its own with norm and attention, and a head."""
    block = keras.Sequential(
        [
            keras.Input((3, 4)),
            keras.layers.Dense(4, name="up"),
            keras.layers.LayerNormalization(name="ln_1"),
        ],
        name="block",
    )
    layers = [
        keras.Input((3,)),
        keras.layers.Embedding(5, 4, name="words"),
        block,
        keras.layers.Flatten(),
        keras.layers.Dense(1, name="head"),
    ]
    return keras.Sequential(layers, name="net")


PATHS = [
    *("net/words/embeddings", "block/up/kernel", "block/up/bias"),
    *("block/ln_1/gamma", "block/ln_1/beta", "net/head/kernel", "net/head/bias"),
]


def short(paths):
    """Without the outer model's name."""
    return [path.removeprefix("net/") for path in paths]


class TestTypesOfLayers:
    @pytest.mark.parametrize(
        ("match", "paths"),
        [
            (keras.layers.Embedding, ["words/embeddings"]),
            ("Embedding", ["words/embeddings"]),
            ("Dense", ["block/up/kernel", "block/up/bias", "head/kernel", "head/bias"]),
            (keras.Sequential, short(PATHS[1:5])),  # what is inside belongs to it
        ],
    )
    def test_paths(self, match, paths):
        groups = optim.groups_for(network(), [{"match": match, "lr_multiplier": 2}])
        assert [short(group.pop("match")) for group in groups] == [paths]
        assert groups == [{"lr_multiplier": 2}]

    def test_a_subclass_belongs_to_its_base(self):
        class MyDense(keras.layers.Dense):
            pass

        model = keras.Sequential([keras.Input((2,)), MyDense(1, name="own")], name="net")
        for match in ("Dense", "MyDense", keras.layers.Dense):
            (group,) = optim.groups_for(model, [{"match": match, "lr_multiplier": 2}])
            assert short(group["match"]) == ["own/kernel", "own/bias"]

    def test_patterns_stay_patterns(self):
        groups = [{"match": "kernel$", "lr_multiplier": 2}]
        assert optim.groups_for(network(), groups) == groups

    def test_in_an_optimizer(self):
        model = network()
        optimizer = optim.AdamW(
            parameter_groups=optim.groups_for(model, [{"match": "Embedding", "lr_multiplier": 3}])
        )
        optimizer.build(model.trainable_variables)
        multipliers = [optimizer.update_rule_of(v)[2] for v in model.trainable_variables]
        assert multipliers == [3.0] + [1.0] * 6

    def test_a_type_that_is_not_there(self):
        groups = [{"match": keras.layers.Conv2D, "lr_multiplier": 2}]
        with pytest.raises(ValueError, match="of the type Conv2D. Types that have some: Dense, Em"):
            optim.groups_for(network(), groups)
        # A name that is no layer's is a pattern; the optimizer says that it matches nothing.
        optimizer = optim.AdamW()
        optimizer.set_parameter_groups([{"match": "Conv2D", "lr_multiplier": 2}], network())
        with pytest.raises(ValueError, match="has to be looked up in the model"):
            optimizer.build(network().trainable_variables)

    @pytest.mark.parametrize("groups", [None, {"match": "Dense"}, "Dense", [5]])
    def test_what_is_no_list_of_groups(self, groups):
        with pytest.raises(TypeError, match="must be a .*dictionar.* Received: "):
            optim.groups_for(network(), groups)

    def test_a_model_without_variables(self):
        model = keras.Sequential([keras.layers.Dense(1)])
        with pytest.raises(ValueError, match="Build it first"):
            optim.groups_for(model, [{"match": "Dense", "lr_multiplier": 2}])
        with pytest.raises(ValueError, match="Build it first"):
            optim.layerwise_lr_decay(model)


class TestLayerwiseDecay:
    def test_every_layer_is_a_level(self):
        groups = optim.layerwise_lr_decay(network(), 0.5)
        assert [(short(g["match"]), g["lr_multiplier"]) for g in groups] == [
            (["words/embeddings"], 0.125),
            (["block/up/kernel", "block/up/bias"], 0.25),
            (["block/ln_1/gamma", "block/ln_1/beta"], 0.5),
            (["head/kernel", "head/bias"], 1.0),
        ]

    def test_own_levels(self):
        model = network()
        groups = optim.layerwise_lr_decay(model, 0.5, levels=["words", "block", "head"])
        optimizer = optim.AdamW(parameter_groups=groups)
        optimizer.build(model.trainable_variables)
        multipliers = [optimizer.update_rule_of(v)[2] for v in model.trainable_variables]
        assert multipliers == [0.25] + [0.5] * 4 + [1.0] * 2

    @pytest.mark.parametrize(
        ("levels", "error", "message"),
        [
            (["words", "bloc", "heads"], ValueError, r"levels\[2\] matches none of the 7"),
            (["words", "("], ValueError, r"`levels\[1\]` must be a regular expression"),
            ("words", TypeError, "`levels` must be a list"),
            ([], TypeError, "`levels` must be a list"),
        ],
    )
    def test_mistaken_levels(self, levels, error, message):
        with pytest.raises(error, match=message):
            optim.layerwise_lr_decay(network(), 0.5, levels)

    @pytest.mark.parametrize("decay", [0.0, 1.5, "x"])
    def test_out_of_range(self, decay):
        with pytest.raises(ValueError, match="decay"):
            optim.layerwise_lr_decay(network(), decay)


class TestDecay:
    def test_norms_and_biases_are_left_out(self):
        model = network()
        assert short(optim.decay_parameter_names(model)) == [
            *("words/embeddings", "block/up/kernel", "head/kernel"),
        ]
        optimizer = optim.exclude_norms_and_biases(optim.AdamW(weight_decay=0.1), model)
        optimizer.build(model.trainable_variables)
        decays = [optimizer.weight_decay_of(v) for v in model.trainable_variables]
        assert decays == [0.1, 0.1, 0.0, 0.0, 0.0, 0.1, 0.0]

    @pytest.mark.parametrize("around", [keras.optimizers.LossScaleOptimizer, optim.EMA])
    def test_the_innermost_optimizer_is_told(self, around):
        model, inner = network(), optim.AdamW(weight_decay=0.1)
        optimizer = around(inner)
        assert optim.exclude_norms_and_biases(optimizer, model) is optimizer
        optimizer.build(model.trainable_variables)
        decays = [inner.weight_decay_of(v) for v in model.trainable_variables]
        assert decays == [0.1, 0.1, 0.0, 0.0, 0.0, 0.1, 0.0]

    @pytest.mark.parametrize(
        ("path", "decayed"),
        [
            ("net/dense/kernel", True),
            ("net/Dense/BIAS", False),
            ("net/rms/scale", False),
            ("net/gamma_block/kernel", True),
            ("net/upscale/kernel", True),
            ("scale", False),
            ("net/final_norm/kernel", False),
            ("net/norm/kernel", False),
            ("net/normal/kernel", True),
            ("net/embedding/embeddings", True),
        ],
    )
    def test_names(self, path, decayed):
        assert (optim.core.weight_decay.NO_DECAY_NAMES.search(path.lower()) is None) == decayed

    def test_the_kernel_of_a_spectral_normalization_is_decayed(self):
        layer = keras.layers.SpectralNormalization(keras.layers.Dense(1, name="dense"))
        model = keras.Sequential([keras.Input((2,)), layer])
        (path,) = optim.decay_parameter_names(model)
        assert path.endswith("kernel")
