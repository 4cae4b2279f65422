"""What `import optim` offers."""

import keras

import optim
from optim.algorithms import optimizer_classes


def test_every_optimizer_of_the_package_is_exported():
    classes = optimizer_classes()
    assert {"AdamW", "AdamW8bit", "EMA", "ScheduleFreeSGD"} <= set(classes)
    assert "Optimizer" not in classes
    for name, cls in classes.items():
        assert name in optim.__all__
        assert getattr(optim, name) is cls
        assert issubclass(cls, keras.optimizers.Optimizer)


def test_an_optimizer_needs_no_line_in_the_package(monkeypatch):
    """One that a module of the folder registers is found without being imported by name."""
    from optim.algorithms import sgd

    @keras.saving.register_keras_serializable(package="optim")
    class NewOptimizer(optim.Optimizer):
        pass

    try:
        NewOptimizer.__module__ = sgd.__name__
        monkeypatch.setattr(sgd, "NewOptimizer", NewOptimizer, raising=False)
        assert optimizer_classes()["NewOptimizer"] is NewOptimizer
    finally:
        keras.saving.get_custom_objects().pop("optim>NewOptimizer")
    assert "NewOptimizer" not in optimizer_classes()
