"""Compiled steps on disk: where, how many, and what happens to damaged ones."""

import importlib
import os
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The module, in a process without a cache."""
    jax = importlib.import_module("jax")
    jax_cache = importlib.import_module("jax.experimental.compilation_cache.compilation_cache")
    module = importlib.import_module("kbtrain.backends.jax.compilation_cache")
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    jax.config.update(names[1], 0)
    jax_cache.reset_cache()
    module.keep_programs.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(module.VARIABLE, raising=False)
    yield module
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()
    module.keep_programs.cache_clear()


def test_on_a_cpu_it_is_asked_for_and_on_others_it_is_there(cache, monkeypatch, tmp_path):
    jax = importlib.import_module("jax")
    assert cache.keep_programs() is None
    for chosen, on_cpu, base in (
        ("1", True, "home/kbtrain"),
        (str(tmp_path / "mine"), True, "mine"),
        ("", False, "home/kbtrain"),
        ("0", False, None),
    ):
        cache.keep_programs.cache_clear()
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv(cache.VARIABLE, chosen)
        monkeypatch.setattr(cache, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        folder = cache.keep_programs()
        assert jax.config.jax_compilation_cache_dir == (None if base is None else str(folder))
        assert base is None or folder.parent == tmp_path / base / "jax"


def test_what_the_user_has_set_stays(cache, monkeypatch, tmp_path):
    jax = importlib.import_module("jax")
    monkeypatch.setenv(cache.VARIABLE, "1")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert cache.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")


@pytest.mark.skipif(os.name != "posix", reason="about permissions of POSIX")
def test_a_folder_that_others_may_write_to_is_not_used(cache, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    folder = tmp_path / "jax" / cache._machine()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cache.keep_programs() is None
    assert "others may write" in caplog.text


def test_a_damaged_program_is_compiled_again_and_replaced(cache, monkeypatch):
    jax = importlib.import_module("jax")
    compiling = importlib.import_module("kbtrain.backends.jax.compile")
    monkeypatch.setenv(cache.VARIABLE, "1")
    x = np.arange(3.0, dtype="float32")

    def files():
        return sorted(cache.keep_programs().glob("jit_thrice-*"))

    def run():
        def thrice(x):
            return x * 3

        jax.clear_caches()
        jitted = jax.jit(thrice)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiling._compile(jitted, x)
        np.testing.assert_array_equal(jitted(x), x * 3)

    run()
    (path,) = files()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run()
    assert files() == []
    run()
    assert [each.name for each in files()] == [path.name]


def test_the_programs_that_were_not_used_for_longest_go_first(cache, tmp_path):
    for age, name in enumerate("cab"):
        path = tmp_path / name
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    cache.prune(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    cache.prune(tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 2
