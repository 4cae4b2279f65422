"""Imports from Transformers: which names kbtrain has, and the statements that import them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field

import kbtrain
from kbtrain.cli.migrate.edits import Edits
from kbtrain.utils.packages.import_hints import is_model

RENAMED_CLASSES = {"Seq2SeqTrainer": "Trainer", "Seq2SeqTrainingArguments": "TrainingArguments"}
"""Classes that are part of another one here."""

FRAMEWORK_CODE = {
    "torch": "for PyTorch alone, but for a Dataset: the Trainer takes one on every backend",
    "torchvision": "for PyTorch alone",
    "accelerate": "of Accelerate, which kbtrain does not use",
    "deepspeed": "of DeepSpeed, which takes PyTorch modules",
    "bitsandbytes": "for PyTorch alone; optim has 8-bit optimizers",
    "trl": "for the Trainer of Transformers, which its own ones derive from",
    "peft": "for PyTorch modules; a layer of Keras has enable_lora(rank)",
}
"""Packages whose use a person has to look at."""


@dataclass
class Imports:
    """What the names of a script stand for.

    Attributes:
        classes: Name in the script -> name of the class that kbtrain has.
        models: Name in the script -> name of a model class of Transformers.
        modules: Name under which the script has ``transformers`` itself -> the import.
        ours: Names under which it has ``kbtrain`` itself.
        frameworks: Name in the script -> the package it is from.
    """

    classes: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    modules: dict[str, ast.Import] = field(default_factory=dict)
    ours: set[str] = field(default_factory=set)
    frameworks: dict[str, str] = field(default_factory=dict)

    def add(self, statement: ast.Import | ast.ImportFrom) -> None:
        """Take in a statement of the script."""
        for alias in statement.names:
            module = statement.module or "" if isinstance(statement, ast.ImportFrom) else alias.name
            package = module.partition(".")[0]
            name = alias.asname or alias.name.partition(".")[0]
            if package in FRAMEWORK_CODE:
                self.frameworks[name] = package
            elif package == "kbtrain":  # of a script that is partly migrated
                if isinstance(statement, ast.Import):
                    self.ours.add(name)
                else:
                    self.classes[name] = alias.name
            elif package != "transformers":
                continue
            elif isinstance(statement, ast.Import):
                self.modules[name] = statement
            elif alias.name in moved():
                self.classes[name] = moved()[alias.name]
            elif is_model(alias.name):
                self.models[name] = alias.name


def moved() -> Mapping[str, str]:
    """Name in Transformers -> name in kbtrain, of what both have."""
    return {name: name for name in kbtrain.__all__} | RENAMED_CLASSES


def rewrite_import(statement: ast.ImportFrom, edits: Edits) -> int:
    """Import from kbtrain what it has, and leave the rest of the statement.

    Args:
        statement: ``from transformers... import ...``.
        edits: The changes of the script.

    Returns:
        The number of changes.
    """
    names = statement.names
    ours = [index for index, alias in enumerate(names) if alias.name in moved()]
    if not ours:
        return 0
    written = [_written(names[index]) for index in ours]
    unique = list(dict.fromkeys(written))
    start = edits.start(statement)
    if len(ours) == len(names) and unique == written:
        head = edits.data[start : edits.start(names[0])]
        at = start + head.index(str(statement.module).encode(), len(b"from"))
        edits.replace(at, at + len(str(statement.module)), "kbtrain")
        for alias, new in zip(names, written, strict=True):
            if new != edits.source(alias):
                edits.replace(edits.start(alias), edits.end(alias), new)
        return 1
    line = f"from kbtrain import {', '.join(unique)}"
    indent, end = edits.indentation(start), edits.newline()
    if len(indent) + len(line) > 88:
        listed = "".join(f"{indent}    {name},{end}" for name in unique)
        line = f"from kbtrain import ({end}{listed}{indent})"
    if len(ours) == len(names):
        edits.replace(start, edits.end(statement), line)
    else:
        edits.replace(start, start, f"{line}{end}{indent}")
        edits.remove(names, set(ours))
    return 1


def _written(alias: ast.alias) -> str:
    new = moved()[alias.name]
    return f"{new} as {alias.asname}" if alias.asname and alias.asname != new else new
