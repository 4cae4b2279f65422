"""The examples in the docstrings run."""

import doctest
import importlib

import pytest

MODULES = ["optim", *(f"optim.{name}" for name in ("adamw", "optimizer", "registry", "schedules"))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0
