"""What JAX's profiler writes, read in two ways."""

import importlib
from collections import Counter

import pytest

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


def test_the_operations_are_the_same_where_jax_writes_no_trace(tmp_path, monkeypatch):
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
    if not hasattr(jax.profiler, "ProfileData"):  # JAX 0.6 always writes a trace
        return
    (recorded,) = tmp_path.rglob("*.xplane.pb")
    again = profiler.operations(profiler.recorded_spans(recorded))
    assert Counter(span.name for span in again) == Counter(span.name for span in spans)
    assert sum(s.duration for s in again) == pytest.approx(sum(s.duration for s in spans), rel=0.01)

    path.unlink()
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: None)
    path, spans = profiler.start_profile(tmp_path)()
    assert path.exists()
    assert Counter(span.name for span in again) == Counter(span.name for span in spans)
