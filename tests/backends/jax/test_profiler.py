"""The traces that JAX's profiler writes."""

import importlib

import pytest

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


def test_the_operations_of_a_trace_and_none_without_a_trace(tmp_path, monkeypatch):
    jax = importlib.import_module("jax")
    profiler = importlib.import_module("kbtrain.backends.jax.profiler")
    step = jax.jit(jax.grad(lambda w, x: (x @ w).sum()))
    arrays = jax.numpy.ones((32, 32)), jax.numpy.ones((8, 32))
    step(*arrays).block_until_ready()
    stop = profiler.start_profile(tmp_path)
    for _ in range(3):
        step(*arrays).block_until_ready()
    path, spans = stop()
    assert path.name.endswith(".trace.json.gz")
    assert spans

    path.unlink()
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: None)
    with pytest.raises(FileNotFoundError, match="has written no trace"):
        profiler.start_profile(tmp_path)()
