"""Floating-point operations in a jaxpr: kernels, which have no products of their own."""

import importlib

import pytest

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


@pytest.fixture
def count():
    jax = importlib.import_module("jax")
    flops = importlib.import_module("kbtrain.backends.jax.flops")
    unknown = []

    def count(fn, *args):
        return flops._of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr, unknown)

    count.unknown = unknown
    return count


def test_cudnn_attention_counts_what_its_products_count(count, monkeypatch):
    jax = importlib.import_module("jax")
    kernel = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda wanted: True)
    query = jax.numpy.ones((2, 8, 4, 64), "bfloat16")
    keys = jax.numpy.ones((2, 16, 4, 64), "bfloat16")

    def gradients(implementation):
        def loss(query, keys):
            out = jax.nn.dot_product_attention(query, keys, keys, implementation=implementation)
            return out.astype("float32").sum()

        return count(jax.grad(loss, argnums=(0, 1)), query, keys)

    assert gradients("cudnn") == gradients("xla") == 3 * 2 * 2 * (2 * 8 * 4 * 64) * 16


def test_a_loop_counts_each_round_and_a_condition_its_larger_branch(count):
    jax = importlib.import_module("jax")
    a = jax.numpy.ones((4, 4))

    def rounds(a):
        a, _ = jax.lax.scan(lambda a, _: (a @ a, None), a, None, length=5)
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a, a)

    assert count(jax.jit(rounds), a) == (5 + 2) * 2 * 4**3
    assert count.unknown == []


def test_a_kernel_counts_its_estimate_or_is_named(count):
    jax = importlib.import_module("jax")
    pallas = importlib.import_module("jax.experimental.pallas")

    def double(ref, out):
        out[...] = ref[...] * 2

    x = jax.numpy.ones((8, 128))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    estimate = pallas.CostEstimate(flops=1024, transcendentals=0, bytes_accessed=0)
    known = pallas.pallas_call(double, out_shape=shape, cost_estimate=estimate, interpret=True)
    assert count(known, x) == 1024
    assert count.unknown == []
    assert count(pallas.pallas_call(double, out_shape=shape, interpret=True), x) == 0
    assert count.unknown == ["pallas_call"]
