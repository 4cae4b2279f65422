"""The examples in the docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

import optim

FOLDER = Path(optim.__file__).parent
MODULES = [
    ".".join(["optim", *path.relative_to(FOLDER).with_suffix("").parts]).removesuffix(".__init__")
    for path in sorted(FOLDER.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_every_optimizer_has_an_example():
    assert {
        "optim",
        "optim.algorithms.adamw",
        "optim.algorithms.sgd",
        "optim.schedules.warmup",
    } <= set(MODULES)
    assert len(MODULES) > 15


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0
