"""Convolutions inside of loops on JAX: other orders are turned into the one that is fast there."""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


CONVOLUTIONS = {
    # data, kernel, their orders, options
    "channels first": ((2, 3, 7, 8), (4, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {}),
    "a kernel's gradient": ((5, 6, 6, 2), (5, 4, 4, 3), ("CHWN", "IHWO", "HWNC"), {}),
    "strides, dilation": (
        (2, 3, 9, 8), (4, 3, 3, 2), ("NCHW", "OIHW", "HWNC"),
        {"window_strides": (2, 1), "rhs_dilation": (1, 2), "lhs_dilation": (2, 1),
         "padding": [(1, 1), (0, 2)]},
    ),
    "groups": ((2, 4, 7, 8), (6, 2, 3, 2), ("NCHW", "OIHW", "NCHW"), {"feature_group_count": 2}),
    "groups of samples": (
        (6, 3, 7, 8), (4, 3, 3, 2), ("NCHW", "OIHW", "HWNC"), {"batch_group_count": 2},
    ),
    "groups of samples, the fast order": (
        (6, 7, 8, 3), (3, 2, 3, 6), ("NHWC", "HWIO", "NHWC"), {"batch_group_count": 3},
    ),
    "three axes": ((2, 3, 4, 5, 6), (4, 3, 2, 2, 3), ("NCDHW", "OIDHW", "NDHWC"), {}),
    "the fast one": ((2, 7, 8, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_turned_convolution_gives_the_same_numbers(case):
    jax = importlib.import_module("jax")
    traces = importlib.import_module("kbtrain.backends.jax.trace")
    convolutions = importlib.import_module("kbtrain.backends.jax.conv_layout")
    data_shape, kernel_shape, order, options = CONVOLUTIONS[case]
    generator = np.random.default_rng(1)
    data = generator.normal(size=data_shape).astype("float32")
    kernel = generator.normal(size=kernel_shape).astype("float32")
    settings = {
        "window_strides": (1,) * (len(data_shape) - 2),
        "padding": "SAME",
        "dimension_numbers": order,
    }

    def convolve(data, kernel):
        return jax.lax.conv_general_dilated(data, kernel, **(settings | options))

    def in_a_loop(data, kernel):
        outputs, _ = jax.lax.scan(lambda c, _: (c + convolve(data, kernel), None),
                                  convolve(data, kernel) * 0, None, length=2)  # fmt: skip
        return {"sum": outputs}

    run, shapes = traces.trace(in_a_loop, data, kernel)
    result = run(data, kernel)
    assert result["sum"].shape == shapes["sum"].shape
    np.testing.assert_allclose(result["sum"], 2 * convolve(data, kernel), rtol=1e-4, atol=1e-4)
    assert not convolutions._has_unusual(jax.make_jaxpr(run)(data, kernel).jaxpr)
    before = jax.make_jaxpr(in_a_loop)(data, kernel).jaxpr
    assert convolutions._has_unusual(before) == (case != "the fast one")
