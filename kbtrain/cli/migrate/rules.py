"""What changes in a script for the Trainer of Transformers, and what a person has to decide.

The names come from the tables that the error messages of kbtrain are made of.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

from kbtrain.cli.migrate.edits import Edits
from kbtrain.cli.migrate.imports import FRAMEWORK_CODE, Imports, moved, rewrite_import
from kbtrain.config.inactive_settings import is_inactive
from kbtrain.config.migration import DROPPED, MEMBERS, NOT_YET, OTHER_MEANING, RENAMED, rewritten
from kbtrain.config.migration import reason as reason_for
from kbtrain.config.trainer_names import MEMBERS as TRAINER_MEMBERS
from kbtrain.config.trainer_names import OLD_MEMBERS, PARAMETERS
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import KERAS, ConfigurationError
from kbtrain.utils.packages.import_hints import IMPORTS, import_hint, is_model

_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
_NO_LOSS = (
    "A model of Keras returns outputs, not a loss: pass loss=... (for classes "
    "keras.losses.SparseCategoricalCrossentropy(from_logits=True)), or compile the model with one."
)
_SHIFTED = (
    "A language model of Transformers shifts the labels itself, one of Keras does not: labels are "
    "the next tokens here. DataCollatorForLanguageModeling(mlm=False) makes them."
)
_CHANNELS = (
    "pixel_values of Transformers are (channels, height, width); models of Keras expect "
    "(height, width, channels), or the setting keras.config.set_image_data_format."
)
_RESUMES = (
    'resume_from_checkpoint=True is an error where there is no checkpoint; "auto" starts a new run '
    "then."
)


@dataclass(frozen=True)
class Note:
    """Something that a person has to decide, or to know.

    Attributes:
        line: Its line in the script.
        new_line: Its line in the changed script.
        text: What it is.
        done: Whether the script is changed already, so that there is nothing to decide.
    """

    line: int
    new_line: int
    text: str
    done: bool = False


@dataclass(frozen=True)
class Migration:
    """A changed script.

    Attributes:
        text: The changed script.
        changes: How many places were changed.
        notes: What is left, by line.
    """

    text: str
    changes: int
    notes: list[Note]


def migrate(text: str, name: str = "<script>") -> Migration:
    """Change a script for the Trainer of Transformers into one for kbtrain, as far as is certain.

    Args:
        text: The script.
        name: Its name, for error messages.

    Raises:
        ConfigurationError: It is not a Python script.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as problem:
        raise ConfigurationError(f"{name} is not a Python script: {problem}") from None
    script = _Script(Edits(text))
    for node in ast.walk(tree):  # imports may be anywhere, in functions too
        if isinstance(node, ast.Import | ast.ImportFrom):
            script.imports.add(node)
    script.learn(tree)
    script.visit(tree)
    script.finish()
    edits, notes = script.edits, script.notes
    found = [
        Note(line, edits.new_line(line), said, said in script.done) for said, line in notes.items()
    ]
    return Migration(edits.apply(), script.changes, sorted(found, key=lambda note: note.line))


class _Script(ast.NodeVisitor):
    """One pass over a script.

    Args:
        edits: Its text.
    """

    def __init__(self, edits: Edits) -> None:
        self.edits = edits
        self.imports = Imports()
        self.changes = 0
        self.notes: dict[str, int] = {}
        self.done: set[str] = set()
        self.used: dict[str, list[int]] = {}
        # Variables by what they hold. Scripts give these names to function parameters, too.
        self.args, self.trainers, self.models = {"training_args"}, {"trainer"}, {"model"}
        self.scope: list[ast.AST] = []
        self.classes: list[str] = []
        self.made_in: dict[str, ast.AST | None] = {}
        self.by_module: set[str] = set()

    # --- what names stand for -------------------------------------------------------------------

    def learn(self, tree: ast.AST) -> None:
        """Find classes derived from ours, and the variables that hold arguments and Trainers."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if (known := self.class_of(base)) in ("Trainer", "TrainingArguments"):
                        self.imports.classes[node.name] = known
        other = set()  # what `args` also is in the script: the result of argparse, say
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Assign) and len(node.targets) == 1):
                continue
            target, value = node.targets[0], node.value
            names = [t.id for t in ast.walk(target) if isinstance(t, ast.Name)]
            if not isinstance(value, ast.Call):
                continue
            known = self.class_of(value.func)
            if known == "TrainingArguments":
                self.args |= set(names)
            elif known == "Trainer":
                self.trainers |= set(names)
            elif isinstance(value.func, ast.Attribute) and self._is_model(value.func.value):
                self.models |= set(names)
            elif isinstance(target, ast.Name) and getattr(value.func, "attr", "") != "replace":
                other.add(target.id)
        self.args -= other

    def class_of(self, node: ast.AST) -> str | None:
        """The class of kbtrain that an expression names, if it does."""
        if isinstance(node, ast.Name):
            return self.imports.classes.get(node.id)
        modules = {*self.imports.modules, *self.imports.ours}
        if isinstance(node, ast.Attribute) and _name(node.value) in modules:
            return moved().get(node.attr)
        return None

    def _is_model(self, node: ast.AST) -> bool:
        return _name(node) in self.imports.models or (
            isinstance(node, ast.Attribute)
            and _name(node.value) in self.imports.modules
            and is_model(node.attr)
        )

    def note(self, node: Any, text: str, done: bool = False) -> None:
        """Leave something to a person, or say what was done; the same thing only once."""
        self.notes.setdefault(text, node.lineno)
        if done:
            self.done.add(text)

    # --- statements -----------------------------------------------------------------------------

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Import from kbtrain what it has."""
        if (node.module or "").partition(".")[0] != "transformers" or node.level:
            return
        if any(alias.name == "*" for alias in node.names):
            self.note(node, "It is not known what `import *` brings: import names.")
            return
        self.changes += rewrite_import(node, self.edits)
        for alias in node.names:
            name, hint = alias.name, import_hint(alias.name)
            # A tokenizer is of Transformers here, too. Models are noted where they are used.
            if hint and name not in moved() and name != "AutoTokenizer" and not is_model(name):
                self.note(alias, f"{name}: {hint}")

    def visit_FunctionDef(self, node: Any) -> None:
        """Remember in which function a statement is."""
        self.scope.append(node)
        self.generic_visit(node)
        self.scope.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Look at what a Trainer of the script's own overrides."""
        if self.imports.classes.get(node.name) == "Trainer" and node.bases:
            for method in node.body:
                if not isinstance(method, ast.FunctionDef):
                    continue
                if method.name in TRAINER_MEMBERS:
                    why = TRAINER_MEMBERS[method.name]
                    self.note(method, f"{node.name}.{method.name} would never be called. {why}")
                elif method.name == "compute_loss":
                    self.note(
                        method,
                        f"{node.name}.compute_loss is called here, too: write it in keras.ops; "
                        "model(inputs) returns outputs without a loss.",
                    )
                elif method.name != "__init__":
                    self.note(method, f"{node.name}.{method.name}: compare it with Trainer's here.")
        self.classes.append(self.imports.classes.get(node.name, ""))
        self.generic_visit(node)
        self.classes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        """Turn a change of arguments, which are immutable, into a changed copy."""
        target = node.targets[0]
        scope = self.scope[-1] if self.scope else None
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                self.made_in[name.id] = scope
        if isinstance(target, ast.Attribute) and _name(target.value) in self.args:
            owner = str(_name(target.value))
            known = target.attr in _FIELDS and len(node.targets) == 1
            if known and owner in self.made_in and self.made_in[owner] is scope:
                start, end = self.edits.start(target), self.edits.start(node.value)
                self.edits.replace(start, end, f"{owner} = {owner}.replace({target.attr}=")
                stop = self.edits.end(node.value)
                self.edits.replace(stop, stop, ")")
                self.changes += 1
            else:
                self._note_assigned(node, owner, target.attr)
            self.visit(node.value)
            return
        if isinstance(target, ast.Attribute) and self._is_trainer_args(target.value):
            self._note_assigned(node, ast.unparse(target.value), target.attr)
        if self._is_labels(target) and "input_ids" in ast.dump(node.value):
            self.note(node, _SHIFTED)
        self.generic_visit(node)

    def _is_trainer_args(self, node: ast.AST) -> bool:
        """Whether it is ``trainer.args``."""
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "args"
            and _name(node.value) in self.trainers
        )

    def _note_assigned(self, node: ast.Assign, owner: str, name: str) -> None:
        if name not in _FIELDS and (name in RENAMED or name in DROPPED):
            self.note(node, f"Arguments are immutable, and {name}: {reason_for(name, ...)}")
            return
        self.note(
            node,
            f"Arguments are immutable: make a copy, {owner}.replace({name}=...), and pass that on.",
        )

    def _is_labels(self, target: ast.AST) -> bool:
        return (
            isinstance(target, ast.Subscript)
            and isinstance(target.slice, ast.Constant)
            and target.slice.value == "labels"
        )

    # --- expressions ----------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        """Change the arguments of our classes."""
        known = self.class_of(node.func)
        of_base = self.classes and ast.unparse(node.func) == "super().__init__"
        if of_base:
            known = self.classes[-1]
        if known == "TrainingArguments":
            self._training_arguments(node)
        elif known == "Trainer":
            self._trainer(node)
            if not of_base and not {k.arg for k in node.keywords} & {
                "loss",
                "compute_loss_func",
                None,
            }:
                self.note(node, _NO_LOSS)
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg == "return_tensors" and getattr(value, "value", "np") == "pt":
                self.note(keyword, 'return_tensors="np" gives arrays that every backend takes.')
            if keyword.arg == "resume_from_checkpoint" and getattr(value, "value", 0) is True:
                self.note(keyword, _RESUMES)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "save_pretrained":
            owner = node.func.value
            if _name(owner) in self.models or getattr(owner, "attr", "") == "model":
                self.note(node, "Save the model with trainer.save_model(folder).")
        if isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if node.func.attr == "push_to_hub" and getattr(owner, "attr", "") == "model":
                self.note(node, "Push the model with trainer.push_to_hub().")
            made = owner.func if isinstance(owner, ast.Call) else None
            if isinstance(made, ast.Attribute) and self._is_model(made.value):
                self.note(node, f".{node.func.attr} is of Transformers; a keras.Model has none.")
        self.generic_visit(node)

    def _training_arguments(self, node: ast.Call) -> None:
        given = {keyword.arg for keyword in node.keywords}
        gone: set[int] = set()
        for index, keyword in enumerate(node.keywords):
            name, value = keyword.arg, _literal(keyword.value)
            if name is None:
                self.note(keyword, f"The names in {self.edits.source(keyword)} are not known.")
            elif name in _FIELDS:
                self._field(keyword, name, value)
            elif name in RENAMED and not is_inactive(name, value):
                new = rewritten(name, value, self.edits.source(keyword.value))
                if new is None or new[0] in given:
                    self.note(keyword, f"{name}: {reason_for(name, value)}")
                    continue
                start, field = self.edits.start(keyword), new[0]
                if new[1] == self.edits.source(keyword.value):
                    self.edits.replace(start, start + len(name), field)
                else:
                    written = new[1].replace("'", '"')
                    self.edits.replace(start, self.edits.end(keyword), f"{field}={written}")
                given.add(field)
                self.changes += 1
            elif name in DROPPED and not is_inactive(name, value):
                gone.add(index)
                self.note(keyword, f"{name} is left out. {DROPPED[name]}", done=True)
                self.changes += 1
            elif name in NOT_YET:
                self.note(keyword, f"{name}: {NOT_YET[name]}")
        items: list[Any] = [*node.args, *node.keywords]
        if gone:
            self.edits.remove(items, {index + len(node.args) for index in gone})

    def _field(self, keyword: ast.keyword, name: str, value: Any) -> None:
        """A field whose value, or meaning, may be another one here."""
        if name in OTHER_MEANING and value not in (None, False, "", 0):
            self.note(keyword, f"{name}: {OTHER_MEANING[name]}")
        elif name == "optim" and value in _refused_optimizers():
            self.note(keyword, f"optim={value!r} is not there: `kbtrain args optim` lists others.")

    def _trainer(self, node: ast.Call) -> None:
        given = {keyword.arg for keyword in node.keywords}
        for keyword in node.keywords:
            name = keyword.arg or ""
            if name in PARAMETERS and name not in KERAS:
                new = re.match(r"Write (\w+)=\.\.\.", PARAMETERS[name])
                if new is None or new[1] in given:
                    self.note(keyword, f"{name}: {PARAMETERS[name]}")
                    continue
                start = self.edits.start(keyword)
                self.edits.replace(start, start + len(name), new[1])
                self.changes += 1
            elif name in ("compute_loss_func", "preprocess_logits_for_metrics"):
                self.note(keyword, f"{name}: write it in keras.ops.")
            elif name == "optimizers":
                self.note(keyword, "optimizers: one of Keras or optim, and a schedule of optim.")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Look at what is read from arguments, Trainers, models and transformers itself."""
        owner = _name(node.value)
        if owner in self.args:
            self._read_argument(node)
        elif owner in self.trainers and node.attr in TRAINER_MEMBERS:
            self.note(node, f"trainer.{node.attr}: {TRAINER_MEMBERS[node.attr]}")
        elif owner in self.trainers and node.attr in OLD_MEMBERS:
            self.note(node, f"trainer.{node.attr}: {OLD_MEMBERS[node.attr]}")
        elif owner in self.trainers and node.attr == "lr_scheduler":
            self.note(
                node,
                "trainer.lr_scheduler is a schedule of Keras or optim here: a function of the "
                "update's number, without step() and get_last_lr().",
            )
        elif owner in self.imports.modules:
            if node.attr in moved():
                self.edits.replace(
                    self.edits.start(node), self.edits.end(node), f"kbtrain.{moved()[node.attr]}"
                )
                self.changes += 1
                self.by_module.add(owner)
            elif self._is_model(node) or node.attr in IMPORTS:
                self.note(node, f"{node.attr}: {import_hint(node.attr)}")
        elif owner in self.models and node.attr in ("config", "resize_token_embeddings", "to"):
            self.note(node, f"{owner}.{node.attr} is of Transformers; a keras.Model has none.")
        self.generic_visit(node)

    def _read_argument(self, node: ast.Attribute) -> None:
        name = node.attr
        if name in RENAMED and (new := rewritten(name, None, name)) and new[1] == name:
            stop = self.edits.end(node)
            self.edits.replace(stop - len(name), stop, new[0])
            self.changes += 1
        elif name in RENAMED:
            self.note(node, f"{_name(node.value)}.{name}: {reason_for(name, ...)}")
        elif why := MEMBERS.get(name) or DROPPED.get(name):
            self.note(node, f"{_name(node.value)}.{name}: {why}")

    def visit_Name(self, node: ast.Name) -> None:
        """Follow renamed classes, and collect where models and other frameworks are used."""
        new = self.imports.classes.get(node.id)
        if node.id in ("Seq2SeqTrainer", "Seq2SeqTrainingArguments") and new:
            self.edits.replace(self.edits.start(node), self.edits.end(node), new)
        if node.id in self.imports.models:
            name = self.imports.models[node.id]
            self.note(node, f"{name}: {import_hint(name)}")
        if package := self.imports.frameworks.get(node.id):
            self.used.setdefault(package, []).append(node.lineno)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Images have another layout."""
        if node.value == "pixel_values":
            self.note(node, _CHANNELS)

    def finish(self) -> None:
        """Say where other frameworks are used, and import kbtrain where it is used by name."""
        for package, lines in self.used.items():
            listed = ", ".join(map(str, dict.fromkeys(lines)))
            where = f"line{'s' if ',' in listed else ''} {listed}"
            text = f"{package} (used in {where}) is {FRAMEWORK_CODE[package]}."
            self.notes.setdefault(text, lines[0])
        for name in sorted(self.by_module):
            start = self.edits.start(self.imports.modules[name])
            indent = self.edits.indentation(start)
            self.edits.replace(start, start, f"import kbtrain{self.edits.newline()}{indent}")


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _literal(node: ast.AST) -> Any:
    """The value of an expression; Ellipsis if only the running program knows it."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ...


def _refused_optimizers() -> set[str]:
    """Optimizers of Transformers that no installed package offers."""
    return set(importlib.metadata.entry_points(group="kbtrain.optimizers.refused").names)
