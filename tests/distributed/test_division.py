"""Whole variables divided among processes: who owns what, and what is refused. One process."""

import keras
import numpy as np
import pytest

from kbtrain import Trainer, TrainingArguments, backends
from kbtrain.distributed.partition import owners_of
from kbtrain.errors import ConfigurationError
from kbtrain.optimization.division import Division, own_variables, set_division
from kbtrain.utils.machine.processes import ProcessGroup


@pytest.mark.core
def test_the_largest_go_first_to_the_process_that_has_least():
    assert owners_of([10, 70, 40, 30], 2) == [0, 0, 1, 1]
    assert owners_of([5, 5, 5], 3) == [0, 1, 2]
    assert owners_of([], 2) == []


@pytest.mark.core
def test_no_process_has_more_than_its_share_and_one_variable():
    sizes = np.random.default_rng(0).integers(1, 1000, 100).tolist()
    owners = owners_of(sizes, 7)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == r) for r in range(7)]
    assert max(loads) <= sum(sizes) / 7 + max(sizes)
    assert max(loads) - min(loads) <= max(sizes)


def model():
    layers = [keras.layers.Dense(8), keras.layers.Dense(8), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((8,)), *layers])


def divided(net, rank, size=2):
    return Division(backends.load(), net, ProcessGroup(rank, size))


def test_each_variable_has_one_owner_that_stays_when_layers_are_frozen():
    net = model()
    parts = [divided(net, rank) for rank in range(2)]
    own = [part.own(net.trainable_variables) for part in parts]
    assert sorted(id(v) for part in own for v in part) == sorted(map(id, net.weights))
    assert parts[0].others(net.trainable_variables) == own[1]
    net.layers[0].trainable = False
    assert parts[0].own(net.trainable_variables) == [v for v in own[0] if v.trainable]


def test_a_process_without_a_variable_is_refused_on_all():
    net = model()
    for rank in range(7):
        part = divided(net, rank, 7)
        with pytest.raises(ConfigurationError, match=r"the 6 trained variables among 7 processes"):
            part.own(net.trainable_variables)


def test_an_optimizer_has_state_for_its_own_variables_only():
    net, optimizer = model(), keras.optimizers.Adam()
    set_division(optimizer, divided(net, 1))
    mine = own_variables(optimizer, net.trainable_variables)
    optimizer.build(mine)
    slots = [v for v in optimizer.variables if len(v.shape)]
    assert sum(np.prod(v.shape) for v in slots) == 2 * sum(np.prod(v.shape) for v in mine)


def test_an_optimizer_that_needs_all_gradients_is_refused():
    net = model()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(global_clipnorm=1.0))
    with pytest.raises(ConfigurationError, match=r"Set max_grad_norm=1.0"):
        set_division(optimizer, divided(net, 0))


def test_one_process_keeps_all():
    args = dict(fsdp="shard_grad_op", max_steps=2, save_strategy="no", report_to=[])
    trainer = Trainer(
        model(),
        TrainingArguments("unused", **args),
        train_dataset=(np.ones((8, 8), "float32"), np.ones((8, 1), "float32")),
        loss="mse",
    )
    trainer.fit()
    slots = [v for v in trainer.optimizer.variables if len(v.shape)]
    elements = sum(np.prod(v.shape) for v in trainer.model.trainable_variables)
    assert sum(np.prod(v.shape) for v in slots) == 2 * elements


@pytest.mark.parametrize("value", [{"fsdp": True}, {"parallelism_config": {"data": 2}}])
def test_what_only_a_mesh_divides_is_refused_elsewhere(value):
    if not backends.load().HAS_MESHES:
        with pytest.raises(ConfigurationError, match=r"fsdp='shard_grad_op' divides gradients"):
            Trainer(model(), TrainingArguments("unused", **value), loss="mse")


@pytest.mark.cross
def test_parameters_that_torch_divides_are_refused(monkeypatch):
    torch = pytest.importorskip("torch")
    from torch.distributed import tensor

    from kbtrain.backends.torch.state_blocks import check_model

    net = torch.nn.Linear(2, 2)
    check_model(net)
    monkeypatch.setattr(tensor, "DTensor", torch.nn.Parameter)
    with pytest.raises(ConfigurationError, match=r"'weight' of the model is a DTensor"):
        check_model(net)
