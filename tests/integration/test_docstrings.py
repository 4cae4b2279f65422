"""The examples in the docstrings of kbtrain run; those of optim are in tests/optim."""

import doctest
import importlib

import pytest
from paths import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "kbtrain").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]

# The first line of the package, and a plot of a run that is not there.
ONLY_SHOWN = {"kbtrain", "kbtrain.report.plots"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    # Python 3.13 counts what is skipped as well.
    assert results.attempted - getattr(results, "skipped", 0) > 0 or name in ONLY_SHOWN
