"""kbtrain uses the `optim` installed with it, and says so if another one stands in its place."""

import importlib.metadata
import sys
from types import ModuleType

import pytest

from kbtrain import ConfigurationError
from kbtrain.optimization import registry


@pytest.fixture
def other_optim(monkeypatch, tmp_path):
    """Another package of that name, which even has a class of the same name."""
    package = ModuleType("optim")
    package.__file__ = str(tmp_path / "optim" / "__init__.py")
    package.AdamW = object
    monkeypatch.setitem(sys.modules, "optim", package)
    return package


@pytest.mark.parametrize("name", ["adamw", "sgd", "paged_adamw_8bit"])
def test_another_package_called_optim_is_not_used(other_optim, name):
    with pytest.raises(ConfigurationError, match="finds another one of that name") as caught:
        registry.find(registry.OPTIMIZERS, name, "optim")
    assert f"optim={name!r}" in str(caught.value)
    assert other_optim.__file__ in str(caught.value)
    assert "reinstall kbtrain" in str(caught.value)


def test_the_distribution_it_belongs_to_is_named(other_optim, monkeypatch):
    owners = {"optim": ["kbtrain", "some-optim"], "numpy": ["numpy"]}
    monkeypatch.setattr(registry, "packages_distributions", lambda: owners)
    with pytest.raises(ConfigurationError, match="Uninstall some-optim, then reinstall kbtrain"):
        registry.find(registry.SCHEDULES, "linear", "lr_scheduler_type")


def test_keras_optimizers_do_not_need_it(other_optim):
    assert registry.find(registry.OPTIMIZERS, "adamax", "optim").__name__ == "Adamax"


def test_the_bundled_package_names_its_distribution():
    import optim

    assert optim.DISTRIBUTION == "kbtrain"
    assert "optim" in {name.partition(":")[0] for name in _offered_modules()}


def _offered_modules():
    entries = importlib.metadata.distribution("kbtrain").entry_points
    return {entry.value for entry in entries if entry.group == registry.OPTIMIZERS}
