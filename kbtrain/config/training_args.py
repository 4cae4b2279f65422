"""``TrainingArguments``: every setting of a run, as one immutable value."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kbtrain.config.fields import Fields
from kbtrain.config.process_properties import ProcessProperties
from kbtrain.config.serialization import Serializable
from kbtrain.config.validation import (
    SYNONYMS,
    check_consistency,
    derived_values,
    normalise,
    resolve_steps,
)
from kbtrain.utils.files.addresses import local_folder
from kbtrain.utils.html import notebook_table, setting


@dataclass(kw_only=True)
class TrainingArguments(ProcessProperties, Serializable, Fields):
    """The settings of a run: immutable, comparable and serializable as JSON.

    Names, defaults and meanings are those of ``transformers.TrainingArguments`` 5.x where the same
    setting exists; a name of 4.x raises an error that gives the new one. ``output_dir`` may be
    given by position, all other arguments are keywords. Values are checked on construction and
    stored in one normal form, so that equal settings compare equal; ``replace`` makes a changed
    copy. Construction touches no device, file or environment variable, except that a leading ``~``
    in a path is expanded to the home directory.

    A *step* is one update of the weights, never a micro-batch. Fields in steps also accept a ratio
    of all steps, above 0 and below 1.

    The fields are declared in ``kbtrain.config.fields``; ``python -m kbtrain args`` lists them.

    Raises:
        ConfigurationError: A name is unknown, a value has the wrong type or range, or two values
            contradict each other. The message names the field, the value and the remedy.

    Example:
        >>> args = TrainingArguments(learning_rate=3e-4, warmup_steps=0.1, max_steps=24)
        >>> args.get_warmup_steps(24)
        3
        >>> args.replace(learning_rate=1e-3).learning_rate
        0.001
        >>> TrainingArguments.from_dict(args.to_dict()) == args
        True

    Reference:
        `transformers.TrainingArguments
        <https://huggingface.co/docs/transformers/main_classes/trainer>`_
    """

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values."""
        defaults = TrainingArguments().to_dict()
        for each in dataclasses.fields(self):  # those that a user's subclass has added
            defaults.setdefault(each.name, each.default)
        missing = object()
        return {n: v for n, v in self.to_dict().items() if v != defaults.get(n, missing)}

    def _repr_html_(self) -> str:
        changed = {name: setting(value) for name, value in self.changed().items()}
        note = "Those that differ from the defaults." if changed else "All as by default."
        return notebook_table(type(self).__name__, changed, note)

    def settle(self) -> None:
        """Store every field in its normal form, derive missing values, check consistency.

        Raises:
            ConfigurationError: A value is invalid, or two contradict each other.
        """
        # object.__setattr__ because a subclass may be a frozen dataclass.
        for field in dataclasses.fields(self):
            # A subclass may redeclare a field with another default: its converter still applies.
            known = Fields.__dataclass_fields__.get(field.name, field)
            object.__setattr__(self, field.name, normalise(known, getattr(self, field.name)))
        for name, value in derived_values(self).items():
            object.__setattr__(self, name, value)
        check_consistency(self)

    @property
    def output_folder(self) -> Path:
        """The folder of the run on this machine: ``output_dir``, if that is not an address.

        The files of a run at an address are written to a folder of the user's cache first, and
        uploaded from there; see docs/checkpoints.md.

        Example:
            >>> from kbtrain import TrainingArguments
            >>> TrainingArguments(output_dir="s3://bucket/digits").output_folder.name
            'digits-cfb654f387'
        """
        return local_folder(self.output_dir)

    @property
    def train_batch_size(self) -> int:
        """Training examples per micro-batch on all devices of this process."""
        return self._of_this_process(self.total_train_batch_size)

    @property
    def eval_batch_size(self) -> int:
        """Evaluation examples per batch on all devices of this process."""
        return self._of_this_process(self.total_eval_batch_size)

    @property
    def total_train_batch_size(self) -> int:
        """Training examples per micro-batch on all devices of all processes."""
        return self._total(self.per_device_train_batch_size)

    @property
    def total_eval_batch_size(self) -> int:
        """Evaluation examples per batch on all devices of all processes."""
        return self._total(self.per_device_eval_batch_size)

    def _total(self, size: int) -> int:
        if self.split_batches:
            return size
        # Devices along the axis "tensor" compute the same rows.
        together: int = (self.parallelism_config or {}).get("tensor", 1)
        return size * max(1, self.device_count * self.world_size // together)

    def _of_this_process(self, total: int) -> int:
        rank, size = self.process_index, self.world_size
        return total * (rank + 1) // size - total * rank // size

    @property
    def device_count(self) -> int:
        """Number of devices that this process uses."""
        return 1 if self.chosen_device is None else len(self.chosen_device.split(","))

    @property
    def chosen_device(self) -> str | None:
        """The device of ``use_cpu`` or ``devices``, several with commas; None: the backend's."""
        return "cpu" if self.use_cpu and self.devices is None else self.devices

    @property
    def full_eval_policy(self) -> str | None:
        """Dtype policy of evaluations outside of training; None means the training policy."""
        if self.bf16_full_eval:
            return "mixed_bfloat16"
        return "mixed_float16" if self.fp16_full_eval else None

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Number of warmup steps in a run of the given length.

        Args:
            num_training_steps: Total number of update steps.

        Returns:
            ``warmup_steps``; if that is a ratio, this share of ``num_training_steps``, rounded up.

        Raises:
            ConfigurationError: ``warmup_steps`` is a ratio and ``num_training_steps`` is below 1.
        """
        return resolve_steps(self.warmup_steps, num_training_steps)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new object.

        Derived values (``eval_steps``, ``metric_for_best_model``) keep their value, except that a
        new ``metric_for_best_model`` derives ``greater_is_better`` again.

        Args:
            **changes: Fields and their new values.

        Raises:
            ConfigurationError: As for a new object.
        """
        given = self.__dict__.get("_given", frozenset()) | changes.keys()
        if "metric_for_best_model" in changes:
            # The direction belongs to the metric: "loss" -> "accuracy" must not keep "lower".
            changes.setdefault("greater_is_better", None)
        for one, other in [*SYNONYMS, *(pair[::-1] for pair in SYNONYMS)]:
            if one in changes:
                changes.setdefault(other, None)
        changed = dataclasses.replace(self, **changes)
        changed._seal(given & changed.__dataclass_fields__.keys())
        return changed

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """``to_dict`` for trackers: with batch sizes, and everything but scalars as strings."""
        values = self.to_dict()
        values["train_batch_size"] = self.train_batch_size
        values["eval_batch_size"] = self.eval_batch_size
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in values.items()
        }


def _described_fields() -> str:
    """The ``Args:`` section of the docstring, from the help text of each field."""
    lines = []
    for field in dataclasses.fields(Fields):
        described = f"{field.name} (default {field.default!r}): {field.metadata['help']}"
        lines.append(textwrap.fill(described, 96, subsequent_indent="    "))
    return "Args:\n" + textwrap.indent("\n".join(lines), "    ")


if TrainingArguments.__doc__ is not None:  # there is none under `python -OO`
    # Python 3.13 strips the indentation of docstrings, earlier versions do not.
    TrainingArguments.__doc__ = inspect.cleandoc(TrainingArguments.__doc__).replace(
        "\nRaises:", f"\n{_described_fields()}\n\nRaises:", 1
    )
