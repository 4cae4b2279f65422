"""The fields of TrainingArguments and the words of a refusal."""

import dataclasses

import pytest

from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


def refusal(**arguments):
    """The message with which TrainingArguments refuses `arguments`."""
    with pytest.raises(ConfigurationError) as caught:
        TrainingArguments(**arguments)
    return str(caught.value)


def best(save_steps, eval_steps, **more):
    return {
        **{"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
        **{"save_steps": save_steps, "eval_steps": eval_steps, **more},
    }
