"""A pytest plugin that runs Keras' own tests of its optimizers on those of `optim`.

Keras' wheel has the tests. From the root of the repository, on each backend::

    PYTHONPATH=tests/support KERAS_BACKEND=torch \\
        pytest -p keras_suite -c /dev/null --pyargs keras.src.optimizers

Where the tests name a class of Keras, they get optim's. Those that ask for what `optim` does
otherwise by choice (docs/optim.md says why) are expected to fail, and one that passes after all
fails the run.
"""

import types

import keras
import pytest

import optim

CLASSES = {
    keras.optimizers.Adafactor: optim.Adafactor,
    keras.optimizers.Adagrad: optim.Adagrad,
    keras.optimizers.Adam: optim.Adam,
    keras.optimizers.AdamW: optim.AdamW,
    keras.optimizers.Lamb: optim.LAMB,
    keras.optimizers.Lion: optim.Lion,
    keras.optimizers.Muon: optim.Muon,
    keras.optimizers.Nadam: optim.NAdam,
    keras.optimizers.RMSprop: optim.RMSprop,
    keras.optimizers.ScheduleFreeAdamW: optim.ScheduleFreeAdamW,
    keras.optimizers.SGD: optim.SGD,
}

REFERENCE = "in the arithmetic, and with the defaults, of PyTorch or the paper"
COUPLED = "weight_decay is the L2 term of PyTorch's optimizer of this name"
MESSAGE = "another wording of the error"
MUON = "other arguments: variables are told apart by their shape and by parameter_groups"

CHOICES = {
    "AdafactorTest.test_single_step_1d": REFERENCE,
    "AdafactorTest.test_single_step_2d": REFERENCE,
    "AdafactorTest.test_correctness_with_golden": REFERENCE,
    "AdagradTest.test_single_step": REFERENCE,
    "AdagradTest.test_weight_decay": COUPLED,
    "AdamTest.test_weight_decay": COUPLED,
    "AdamWTest.test_single_step": REFERENCE,
    "AdamWTest.test_correctness_with_golden": REFERENCE,
    "AdamWTest.test_weight_decay_is_none": "None is no decay",
    "LambTest.test_weight_decay": "decay is part of the direction whose norm is taken",
    "LionTest.test_correctness_with_golden": REFERENCE,
    "LionTest.test_invalid_beta_1": MESSAGE,
    "MuonTest.test_Newton_Schulz": MUON,
    "MuonTest.test_adamw_single_step": REFERENCE,
    "MuonTest.test_adamw_weight_decay": MUON,
    "MuonTest.test_lr_adjust_2d": MUON,
    "MuonTest.test_lr_adjust_none": MUON,
    "MuonTest.test_model_fit": MUON,
    "MuonTest.test_muon_single_step": REFERENCE,
    "MuonTest.test_muon_weight_decay": REFERENCE,
    "MuonTest.test_should_use_adamw": MUON,
    "NadamTest.test_build_with_empty_var_list": "no variable for a product that the step tells",
    "NadamTest.test_single_step": REFERENCE,
    "NadamTest.test_correctness_with_golden": REFERENCE,
    "NadamTest.test_weight_decay": COUPLED,
    "OptimizerSparseTest.test_sparse_gradients_loss_scale_optimizer_sgd": "they are made dense",
    "OptimizerTest.test_get_method": "keras.optimizers.get knows Keras' names only",
    "RMSpropTest.test_single_step": REFERENCE,
    "RMSpropTest.test_correctness_with_golden": REFERENCE,
    "RMSpropTest.test_weight_decay": COUPLED,
    "SGDTest.test_correctness_with_golden": "nesterov without momentum is refused",
    "SGDTest.test_invalid_momentum": MESSAGE,
}


def _optims(value):
    """What a test module finds in the place of something of Keras."""
    if isinstance(value, type):
        return CLASSES.get(value, value)
    if isinstance(value, types.ModuleType) and value.__name__ == "keras.src.optimizers":
        return types.SimpleNamespace(**{name: _optims(x) for name, x in vars(value).items()})
    return value


def pytest_configure(config):
    for name in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{name}: of Keras")


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items}:
        for name, value in list(vars(module).items()):
            if not name.startswith("__"):
                setattr(module, name, _optims(value))
    for item in items:
        test = f"{item.cls.__name__}.{item.name}"
        if test in CHOICES:
            item.add_marker(pytest.mark.xfail(reason=CHOICES[test], strict=True))
