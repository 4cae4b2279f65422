"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import optim

ROOMS = ["optim", *(f"optim.{m.name}" for m in pkgutil.iter_modules(optim.__path__))]
MODULES = [
    name
    for name in ROOMS
    if ">>> " in Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
]


def test_every_optimizer_has_an_example():
    assert {"optim", "optim.adamw", "optim.sgd", "optim.schedules"} <= set(MODULES)
    assert len(MODULES) > 15


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0
