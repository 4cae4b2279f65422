"""The examples in the docstrings run."""

import doctest
import importlib

import pytest

ROOMS = (
    *("adamw", "cosine", "optimizer", "plateau", "registry", "schedules"),
    "warmup_stable_decay",
)
MODULES = ["optim", *(f"optim.{name}" for name in ROOMS)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0
