"""Names, and what happens when an installed package misbehaves."""

import importlib.metadata
from types import SimpleNamespace

import keras
import pytest

import optim
from optim import registry

pytestmark = pytest.mark.core


def entry(name, loaded, dist="some-package", value=None):
    def load():
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    return SimpleNamespace(
        name=name, value=value or f"{dist}:{name}", dist=SimpleNamespace(name=dist), load=load
    )


@pytest.fixture
def install(monkeypatch):
    real = importlib.metadata.entry_points

    def install(group, *entries):
        def entry_points(**parameters):
            found = list(real(**parameters))
            return found + list(entries) if parameters.get("group") == group else found

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return install


def test_own_optimizers_are_entry_points_too():
    assert "adamw" in optim.names()
    assert {"constant", "constant_with_warmup", "linear", "cosine"} <= set(optim.scheduler_names())
    optimizer = optim.get("adamw", learning_rate=0.5, beta_1=0.8)
    assert type(optimizer) is optim.AdamW
    assert optimizer.beta_1 == 0.8


def test_every_own_name_makes_its_kind():
    for name in optim.names():
        assert isinstance(optim.get(name), keras.optimizers.Optimizer)
    needed = {
        "cosine_with_min_lr": {"min_lr": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 4},
    }
    metric_driven = {"reduce_lr_on_plateau", "greedy"}
    for name in optim.scheduler_names():
        schedule = optim.get_scheduler(name, 1.0, 2, 10, needed.get(name))
        if name in metric_driven:
            assert schedule.rate == 1.0
        else:
            assert isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule)
            assert 0.0 <= float(schedule(3)) <= 1.0


REFUSED = importlib.metadata.entry_points(group=registry.OPTIMIZERS + registry.REFUSED)
SAME = {
    "adamw": ["adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_anyprecision"],
    "lion": ["lion_32bit"],
    "adamw_8bit": ["adamw_torch_8bit", "adamw_bnb_8bit"],
    "rmsprop": ["rmsprop_bnb", "rmsprop_bnb_32bit"],
    "rmsprop_8bit": ["rmsprop_bnb_8bit"],
}


def test_names_of_the_reference():
    for name, others in SAME.items():
        assert {type(optim.get(other)) for other in others} == {type(optim.get(name))}
    assert type(optim.get("ftrl")) is keras.optimizers.Ftrl


@pytest.mark.parametrize("refused", sorted(entry.name for entry in REFUSED))
def test_a_refused_name_says_why_and_what_to_use(refused):
    assert refused not in optim.names()
    with pytest.raises(ValueError, match=f"'{refused}' is not supported: .* Use '"):
        optim.get(refused)


def test_other_packages_are_found(install):
    install(registry.OPTIMIZERS, entry("descent", keras.optimizers.SGD))
    assert "descent" in optim.names()
    assert isinstance(optim.get("descent", learning_rate=0.1), keras.optimizers.SGD)


@pytest.mark.parametrize("function", [optim.get, lambda name: optim.get_scheduler(name, 0.1)])
def test_unknown_name_lists_the_known_ones(function):
    close = "adamvw" if function is optim.get else "cosinus"
    with pytest.raises(ValueError, match="Did you mean") as caught:
        function(close)
    message = str(caught.value)
    assert ("'adamw'" if function is optim.get else "'cosine'") in message
    assert f"Received: name={close!r}" in message
    with pytest.raises(ValueError, match="Known: ") as caught:
        function("zzz")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["AdamW", "ADAMW"])
def test_a_name_in_other_letters_is_recognised(name):
    with pytest.raises(ValueError, match="Did you mean 'adamw'"):
        optim.get(name)


@pytest.mark.parametrize("error", [ModuleNotFoundError("no module"), ZeroDivisionError("oops")])
def test_broken_package_is_named_and_breaks_nothing_else(install, error):
    install(registry.OPTIMIZERS, entry("broken", error, dist="bad-package"))
    assert "broken" in optim.names()
    assert type(optim.get("adamw")) is optim.AdamW
    with pytest.raises(ImportError, match="bad-package") as caught:
        optim.get("broken")
    assert "'broken'" in str(caught.value)
    assert str(error) in str(caught.value)
    assert caught.value.__cause__ is error


def test_two_packages_with_the_same_name(install):
    install(registry.OPTIMIZERS, entry("adamw", keras.optimizers.AdamW, dist="rival"))
    with pytest.raises(ValueError, match="more than one package") as caught:
        optim.get("adamw")
    assert "kbtrain" in str(caught.value)
    assert "rival" in str(caught.value)
    assert optim.names().count("adamw") == 1


def test_one_package_found_twice_is_no_clash(install):
    install(registry.OPTIMIZERS, *[entry("mine", keras.optimizers.SGD)] * 2)
    assert isinstance(optim.get("mine"), keras.optimizers.SGD)


def test_an_entry_that_makes_something_else(install):
    install(registry.OPTIMIZERS, entry("number", lambda: 5))
    with pytest.raises(TypeError, match="must make a Keras optimizer. Received: int"):
        optim.get("number")
    install(registry.SCHEDULES, entry("number", lambda learning_rate: 5))
    with pytest.raises(TypeError, match="schedule. Received: int"):
        optim.get_scheduler("number", 0.1)


class TestGetScheduler:
    @pytest.mark.parametrize(
        ("name", "missing"),
        [
            ("constant_with_warmup", "num_warmup_steps"),
            ("linear", "num_warmup_steps"),
            ("linear", "num_training_steps"),
            ("cosine", "num_training_steps"),
        ],
    )
    def test_missing_count_is_named(self, name, missing):
        counts = {"num_warmup_steps": 1, "num_training_steps": 10, missing: None}
        with pytest.raises(ValueError, match=f"'{name}' needs `{missing}`"):
            optim.get_scheduler(name, 0.1, **counts)

    def test_counts_are_an_offer(self):
        constant = optim.get_scheduler("constant", 0.5, num_warmup_steps=5, num_training_steps=9)
        assert type(constant) is optim.Constant
        warmup = optim.get_scheduler("constant_with_warmup", 0.5, 5, 9)
        assert warmup.get_config() == {"learning_rate": 0.5, "num_warmup_steps": 5}

    def test_missing_specific_argument_is_named(self):
        with pytest.raises(ValueError, match="needs `num_decay_steps` among its scheduler_spec"):
            optim.get_scheduler("warmup_stable_decay", 0.1, 1, 9)
        with pytest.raises(TypeError, match="must be a dictionary. Received: .*'num_cycles'"):
            optim.get_scheduler("cosine", 0.1, 1, 9, "num_cycles")

    def test_specific_arguments_are_passed(self):
        schedule = optim.get_scheduler("cosine", 0.5, 1, 9, {"num_cycles": 2, "clamp": False})
        assert (schedule.num_cycles, schedule.clamp) == (2.0, False)

    @pytest.mark.parametrize("name", ["constant", "linear"])
    @pytest.mark.parametrize("key", ["num_cycles", "num_training_steps", "learning_rate"])
    def test_useless_specific_argument_is_an_error(self, name, key):
        with pytest.raises(ValueError, match=f"does not take .*{key}.*It takes: none"):
            optim.get_scheduler(name, 0.1, 1, 9, {key: 2})

    def test_factory_with_free_arguments(self, install):
        def factory(learning_rate, *, num_training_steps=100, **options):
            return keras.optimizers.schedules.CosineDecay(
                learning_rate, num_training_steps, **options
            )

        install(registry.SCHEDULES, entry("theirs", factory))
        schedule = optim.get_scheduler("theirs", 0.5, 3, None, {"alpha": 0.25})
        assert schedule.alpha == 0.25
        assert schedule.decay_steps == 100
        assert optim.get_scheduler("theirs", 0.5, 3, 7).decay_steps == 7
