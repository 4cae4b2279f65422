"""The file of ``kbtrain train``: what may be in it, and where each setting was written."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbtrain.cli import FRAMEWORKS
from kbtrain.config import yaml
from kbtrain.config.serialization import without_secrets
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError

Place = tuple[str | int, ...]
"""Keys from the outermost to a setting: ``("model", "layers", 0)``."""


def _setting(help: str, default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What to train on."""

    train: str | None = _setting(
        "A table (.csv, .jsonl, .parquet), a folder with a folder of images for each class, a data "
        "set of Hugging Face saved to disk, or a plain text (.txt)."
    )
    eval: str | None = _setting("The same, for evaluation.")
    test: str | None = _setting("The same, used once at the end.")
    eval_fraction: float | None = _setting(
        "Without eval: part of the training set to evaluate with; of a table or images drawn at "
        "random, of a plain text its end."
    )
    split_seed: int = _setting("Seed of that draw.", 0)
    label: str | None = _setting("Column with the target.")
    features: list[str] | None = _setting("Columns with numbers; by default all but label.")
    text: str | None = _setting("Column with a text, in place of features.")
    task: str | None = _setting(
        "classification or regression; by default the first, unless the label has fractions."
    )
    standardize: bool = _setting("Whether the model scales features to mean 0, variance 1.", False)
    length: int = _setting("Tokens of a text, and of a sample of a plain text.", 64)
    vocabulary: int = _setting("Tokens that are learned from the texts, without a preset.", 2000)
    image_size: list[int] | None = _setting("[height, width] that images are resized to.")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What to train: exactly one of the first five."""

    layers: list[Any] | None = _setting("Layers of Keras in a row, such as Dense: {units: 10}.")
    file: str | None = _setting("A model saved by Keras (.keras), or its configuration (.json).")
    function: str | None = _setting(
        "package.module:function or file.py:function that returns a keras.Model. Its parameters "
        "input_shape, num_outputs and vocabulary_size, if it has them, are filled in."
    )
    application: str | None = _setting("A model of keras.applications, such as MobileNetV2.")
    preset: str | None = _setting(
        "A preset of KerasHub, for texts or images: its name or a folder."
    )
    arguments: dict[str, Any] | None = _setting("Keyword arguments of any but layers and file.")


SECTIONS: dict[str, type] = {"data": DataSettings, "model": ModelSettings}
OTHERS = {
    "args": "Fields of TrainingArguments; `kbtrain args` explains them.",
    "loss": "A loss of Keras: its name, or Name: {arguments}. The default suits the task.",
    "metrics": "A list of metrics of Keras, in the same form. The default suits the task.",
    "callbacks": "A list of callbacks of kbtrain or Keras, in the same form.",
    "backend": "torch, tensorflow or jax; by default KERAS_BACKEND, or Keras' own setting.",
}
_HINTS = {
    "optimizer": "It is args.optim, with args.optim_args.",
    "training_args": "It is args.",
    "dataset": "It is data.",
    "trainer": "It is args.",
}
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda v: isinstance(v, str), "text"),
    "int": (lambda v: type(v) is int and v >= 0, "a whole number"),
    "float": (lambda v: type(v) in (int, float) and 0 < v < 1, "a number between 0 and 1"),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "list[str]": (lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
                  "a list of names, [a, b]"),
    "list[int]": (lambda v: isinstance(v, list) and len(v) == 2
                  and all(type(x) is int and x > 0 for x in v), "[height, width]"),
    "list[Any]": (lambda v: isinstance(v, list), "a list"),
    "dict[str, Any]": (lambda v: isinstance(v, dict), "a mapping, name: value"),
}  # fmt: skip


_LEAST = {"length": 1, "vocabulary": 3}  # padding, unknown, and a token


class Settings:
    """A file with settings, and those of the command line, which win.

    Args:
        path: A YAML or JSON file.
        changes: Settings of the command line: ``("args", "learning_rate")`` -> value.

    Attributes:
        data: The section data.
        model: The section model.
        args: The section args.
        values: All that was set, by section; tokens included.

    Raises:
        ConfigurationError: A setting is unknown or invalid; the message begins with its line.
    """

    def __init__(self, path: Path, changes: Mapping[Place, Any]) -> None:
        text = path.read_text(encoding="utf-8")
        self.path, self.changes = path, dict(changes)
        if path.suffix == ".json":
            try:
                json.loads(text)
            except json.JSONDecodeError as problem:
                raise ConfigurationError(f"{path} is not JSON: {problem}.") from None
        self.values: dict[str, Any] = yaml.loads(text, str(path))
        self._lines = yaml.lines_of(text)
        for place, value in changes.items():
            self._change(place, value)
        for name in self.values:
            if name not in SECTIONS and name not in OTHERS:
                self._refuse_name((name,), [*SECTIONS, *OTHERS], "there is no setting")
        self.data: DataSettings = self._section("data")
        self.model: ModelSettings = self._section("model")
        self.args = self._training_arguments()
        self._check_backend()

    def error(self, place: Place, problem: str) -> ConfigurationError:
        """The error of a setting.

        Args:
            place: Its keys.
            problem: What is wrong.
        """
        return ConfigurationError(f"{self.where(place)}: {problem}")

    def where(self, place: Place) -> str:
        """Where a setting was written: the line, or the option; and its name."""
        name = ".".join(map(str, place))
        if any(place[: len(key)] == key for key in self.changes):
            return f"--{name}"
        while place and place not in self._lines:
            place = place[:-1]
        line = f", line {self._lines[place]}" if place else ""
        return f"{self.path}{line}, {name}" if name else f"{self.path}{line}"

    def shown(self) -> str:
        """All that was set, as YAML without tokens; the same file of settings, otherwise."""
        args = self.values.get("args")
        hidden = {"args": without_secrets(TrainingArguments, args)} if args else {}
        return yaml.dumps(self.values | hidden)

    def get(self, name: str) -> Any:
        """The value of a setting outside of the sections, or None."""
        return self.values.get(name)

    def _change(self, place: Place, value: Any) -> None:
        inner = self.values
        for key in place[:-1]:
            if not isinstance(inner.setdefault(str(key), {}), dict):
                raise self.error(place, f"{key} is not a section with names.")
            inner = inner[str(key)]
        inner[str(place[-1])] = value

    def _section(self, name: str) -> Any:
        given = self.values.get(name) or {}
        if not isinstance(given, dict):
            raise self.error((name,), f"must be a mapping, `name: value`. Received: {given!r}.")
        fields = {field.name: field for field in dataclasses.fields(SECTIONS[name])}
        for key, value in given.items():
            if key not in fields:
                self._refuse_name((name, key), list(fields), f"{name} has no setting")
            fits, words = _KINDS[str(fields[key].type).removesuffix(" | None")]
            if value is not None and not fits(value):
                raise self.error((name, key), f"must be {words}. Received: {value!r}.")
            if value is not None and key in _LEAST and value < _LEAST[key]:
                raise self.error(
                    (name, key), f"must be at least {_LEAST[key]}. Received: {value!r}."
                )
        # null takes a setting back.
        return SECTIONS[name](**{key: value for key, value in given.items() if value is not None})

    def _training_arguments(self) -> TrainingArguments:
        given: Any = self.values.get("args") or {}
        if not isinstance(given, dict):
            raise self.error(("args",), f"must be a mapping, `name: value`. Received: {given!r}.")
        given = {"output_dir": f"runs/{self.path.stem}"} | given
        try:
            return TrainingArguments(**given)
        except ConfigurationError as problem:
            # The setting that the message speaks of first.
            words = str(problem).replace("`", " ").replace("=", " ").replace(",", " ").split()
            named = [word for word in words if word in given]
            raise self.error(("args", *named[:1]), str(problem)) from None

    def _check_backend(self) -> None:
        if "backend" in self.values and self.values["backend"] not in FRAMEWORKS:
            received = f"Received: {self.values['backend']!r}."
            raise self.error(("backend",), f"must be {', '.join(FRAMEWORKS)}. {received}")

    def _refuse_name(self, place: Place, known: Sequence[str], said: str) -> None:
        name = str(place[-1])
        close = difflib.get_close_matches(name, known, n=1)
        fields = TrainingArguments.__dataclass_fields__
        if name in _HINTS:
            meant = _HINTS[name]
        elif close:
            meant = f"Did you mean {close[0]}?"
        elif name in fields:
            meant = f"It is a field of TrainingArguments: args.{name}."
        else:
            meant = f"There are: {', '.join(known)}."
        raise self.error(place, f"{said} {name!r}. {meant}")
