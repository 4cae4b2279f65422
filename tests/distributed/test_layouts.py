"""Which variables are divided along which axis of a mesh."""

import types

import keras
import pytest

from kbtrain import Trainer, TrainingArguments, backends
from kbtrain.config.training_args import TrainingArguments as Arguments
from kbtrain.distributed import placement
from kbtrain.distributed.layouts import StateLayout, state_layout
from kbtrain.errors import ConfigurationError

HAS_MESHES = backends.load().HAS_MESHES
GPUS = "gpu:0,gpu:1,gpu:2,gpu:3"


def variable(path, *shape, trainable=True):
    return types.SimpleNamespace(path=path, shape=shape, trainable=trainable)


def axes(layout, *variables):
    return layout.axes_of(variables)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 6), ("fsdp", None)),
        ((6, 8), (None, "fsdp")),
        ((3, 4, 4), (None, "fsdp", None)),
        ((7, 7), (None, None)),
        ((15,), (None,)),  # too small
        ((), ()),
    ],
)
def test_the_first_dimension_that_divides_is_divided(shape, expected):
    layout = StateLayout({"data": 1, "fsdp": 4, "tensor": 1}, smallest=16)
    assert axes(layout, variable("dense/kernel", *shape)) == [expected]


def test_a_pattern_comes_first_and_slots_follow_their_variable():
    layout = StateLayout(
        {"data": 1, "fsdp": 2, "tensor": 2}, {"mlp/kernel": (None, "tensor")}, smallest=1
    )
    found = axes(
        layout,
        variable("model/mlp/kernel", 4, 4),
        variable("model/mlp/bias", 4),
        variable("adam/model_mlp_kernel_momentum", 4, 4, trainable=False),
        variable("adam/model_mlp_kernel_row", 4, trainable=False),
    )
    assert found == [("fsdp", "tensor"), ("fsdp",), ("fsdp", "tensor"), ("fsdp",)]


def test_shard_grad_op_leaves_the_weights_whole():
    layout = StateLayout({"fsdp": 2}, smallest=1, weights=False)
    weight, slot = variable("dense/kernel", 4), variable("adam/m", 4, trainable=False)
    assert axes(layout, weight, slot) == [(None,), ("fsdp",)]


@pytest.mark.parametrize("given", [("tensor",), (None, None, "tensor"), ("tensor", None)])
def test_a_layout_that_does_not_fit_a_shape_is_refused(given):
    layout = StateLayout({"data": 1, "fsdp": 1, "tensor": 2}, {"kernel": given})
    with pytest.raises(ConfigurationError, match="does not fit dense/kernel.* \\(3, 4\\)"):
        axes(layout, variable("dense/kernel", 3, 4))


def test_a_pattern_that_matches_nothing_is_refused():
    layout = StateLayout({"tensor": 2}, {"mpl/kernel": (None, "tensor")})
    with pytest.raises(ConfigurationError, match="'mpl/kernel'.*mlp/kernel"):
        layout.check([variable("mlp/kernel", 2, 2)])


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"fsdp": True}, (1, 4, 1)),
        ({"fsdp": True, "parallelism_config": {"data": 2}}, (2, 2, 1)),
        ({"parallelism_config": {"fsdp": 2}}, (2, 2, 1)),
        ({"parallelism_config": {"dp_replicate_size": 2, "dp_shard_size": 2}}, (2, 2, 1)),
    ],
)
def test_the_mesh_has_all_devices(given, sizes):
    layout = state_layout(Arguments(devices=GPUS, **given))
    assert tuple(layout.sizes.values()) == sizes
    assert tuple(layout.sizes) == ("data", "fsdp", "tensor")


def test_rows_are_counted_once_along_the_tensor_axis():
    args = Arguments(
        devices=GPUS,
        per_device_train_batch_size=3,
        parallelism_config={"data": 2, "tensor": 2},
        fsdp_config={"layouts": {"kernel": [None, "tensor"]}},
    )
    assert args.total_train_batch_size == 6
    assert state_layout(args).patterns == {"kernel": (None, "tensor")}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"parallelism_config": {"data": 3}}, "mesh of 3 devices.*there are 4"),
        ({"parallelism_config": {"tensor": 2}}, "no variable is divided along it"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(given, expected):
    with pytest.raises(ConfigurationError, match=expected):
        state_layout(Arguments(devices=GPUS, **given))


@pytest.mark.skipif(HAS_MESHES, reason="this backend divides state")
@pytest.mark.parametrize("given", [{"fsdp": True}, {"parallelism_config": {"data": 1}}])
def test_a_backend_that_cannot_divide_state_says_so(tmp_path, given):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    args = TrainingArguments(tmp_path, save_strategy="no", **given)
    with pytest.raises(ConfigurationError, match="The backend jax divides weights|on jax"):
        Trainer(model, args, loss="mse")


@pytest.mark.parametrize(("parts", "warned"), [(8, False), (64, True)])
def test_weights_that_fsdp_leaves_whole_are_reported(caplog, parts, warned):
    layout = StateLayout({"data": 1, "fsdp": parts, "tensor": 1}, smallest=1)
    weights = [variable("attention/kernel", 1600, 40), variable("mlp/kernel", 64, 1600)]
    if warned:
        weights[0] = variable("attention/kernel", 1000, 40)
    placement._warn_of_whole(layout, types.SimpleNamespace(trainable_variables=weights))
    assert ("28 % of the weights" in caplog.text and "attention/kernel" in caplog.text) == warned
