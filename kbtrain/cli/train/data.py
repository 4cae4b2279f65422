"""From the section data to arrays: features, tokens or images, and labels as classes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain.cli.train.preparation import (
    DIGEST,
    PREPROCESSING,
    TOKENIZER,
    check_alike,
    tokenizer_digest,
)
from kbtrain.cli.train.settings import Settings
from kbtrain.cli.train.tables import TABLES, ImageFolder, column, image_files, kind_of, read_table
from kbtrain.utils.packages.optional_imports import require

SETS = ("train", "eval", "test")
UNKNOWN, PADDING = "[UNK]", "[PAD]"


@dataclasses.dataclass
class Data:
    """Data sets for the Trainer, and what a model has to know of them.

    Attributes:
        task: "classification", "regression" or "language_modeling".
        kind: "features", "tokens", "images" or "strings" (for a preset's own preprocessing: arrays
            of texts with labels, or a plain text, whose ``outputs`` are 0 until it is loaded).
        shape: Shape of a sample.
        sets: Name -> data set.
        outputs: Classes, targets, or tokens to choose from.
        tokens: Size of the vocabulary; 0 where there are no tokens.
        classes: Names of the classes.
        features: Names of the columns.
        tokenizer: The tokenizer, if one was made.
        preset: The model of a preset, as KerasHub has it.
        preprocessor: That of the preset.
        prepared_by: The function that images go through first.
        standardized: Mean and variance of the features, if the model scales them.
    """

    task: str
    kind: str
    shape: tuple[int, ...]
    sets: dict[str, Any]
    outputs: int
    tokens: int = 0
    classes: list[Any] | None = None
    features: list[str] | None = None
    tokenizer: Any = None
    preset: Any = None
    preprocessor: Any = None
    prepared_by: str | None = None
    standardized: dict[str, Any] | None = None

    def save_pretrained(self, folder: str) -> None:
        """Write ``preprocessing.json`` and the tokenizer, which using the model needs."""
        text = json.dumps(self.known(), indent=1)
        (Path(folder) / PREPROCESSING).write_text(text + "\n", encoding="utf-8")
        if self.preprocessor is not None:
            self.preprocessor.save_to_preset(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(str(Path(folder) / TOKENIZER))

    def known(self) -> dict[str, Any]:
        """What ``preprocessing.json`` holds."""
        names = ("task", "kind", "classes", "features", "prepared_by", "standardized")
        known = {name: getattr(self, name) for name in names} | {"shape": list(self.shape)}
        if (digest := tokenizer_digest(self.preprocessor)) is not None:
            known[DIGEST] = digest
        return known

    def check_resumed(self, folder: Path) -> None:
        """Check that a checkpoint was trained on data prepared as these are.

        Args:
            folder: The checkpoint's.

        Raises:
            CheckpointMismatchError: The same numbers would mean something else.
        """
        check_alike(self, folder)


def read_data(settings: Settings, prepare_image: Callable[[Any], Any]) -> Data:
    """Read the data sets.

    Args:
        settings: The settings.
        prepare_image: What the model does with the pixels of an image first.

    Raises:
        ConfigurationError: A file, a column or a value does not fit; the message has the line.
    """
    if settings.data.train is None:
        raise settings.error(("data",), "train is missing: a file, or a folder, to train on.")
    given = [name for name in SETS if getattr(settings.data, name) is not None]
    kinds = {name: kind_of(settings, name) for name in given}
    for name, kind in kinds.items():
        if (kind in TABLES) != (kinds["train"] in TABLES) or kind not in (*TABLES, kinds["train"]):
            raise settings.error(("data", name), f"must be like train, {kinds['train']}: {kind}.")
    if settings.data.eval is not None and settings.data.eval_fraction is not None:
        raise settings.error(("data", "eval_fraction"), "is for a run without data.eval.")
    _check_used(settings, kinds["train"])
    if kinds["train"] == "text":
        return _plain_text(settings, given)
    if kinds["train"] == "images":
        return _images(settings, given, prepare_image)
    return _tables(settings, given)


def _check_used(settings: Settings, kind: str) -> None:
    """Refuse what would have no effect on data of this kind."""
    used = {*SETS, "eval_fraction", "split_seed"}
    what = {"images": "folders of images", "text": "a plain text"}.get(kind, "a table")
    if kind == "images":
        used |= {"image_size"}
    elif kind == "text":
        used |= {"length"}
    elif settings.data.text is None:
        used |= {"label", "task", "features", "standardize"}
        what += " without data.text"
    else:
        preset = settings.model.preset is not None
        used |= {"label", "task", "text", "length", *(() if preset else ("vocabulary",))}
        what += " with data.text" + (" and a preset" if preset else "")
    for name, value in (settings.get("data") or {}).items():
        if name not in used and value not in (None, False):
            raise settings.error(("data", name), f"has no effect on {what}. Remove it.")


def _tables(settings: Settings, given: list[str]) -> Data:
    chosen = settings.data
    if chosen.label is None:
        raise settings.error(("data",), "label is missing: the column to predict.")
    tables = {name: read_table(settings, name) for name in given}
    frames = {name: table for name, (table, _) in tables.items()}
    names = tables["train"][1]
    for place in ("text", "features"):
        used = getattr(chosen, place) or ()
        if chosen.label == used or (place == "features" and chosen.label in used):
            raise settings.error(
                ("data", place), f"has the column to predict, {chosen.label!r}. Leave it out."
            )
    targets = {
        name: column(settings, name, table, chosen.label, "label") for name, table in frames.items()
    }
    task = chosen.task or _task_of(targets["train"])
    if task not in ("classification", "regression"):
        raise settings.error(("data", "task"), "must be classification or regression.")
    classes = None
    if task == "classification":
        found = _distinct(settings, targets["train"])
        classes = sorted(found, key=lambda label: (type(label).__name__, label))
        y = {name: _codes(settings, name, target, classes) for name, target in targets.items()}
    else:
        y = {name: _numbers(settings, name, t, "label")[:, None] for name, t in targets.items()}
    outputs = 1 if classes is None else len(classes)
    data = Data(task, "features", (), {}, outputs, classes=classes)
    if names is not None and classes is not None:
        data.classes = [names[int(number)] for number in classes]
    if chosen.text is not None:
        texts = {
            name: column(settings, name, table, chosen.text, "text").astype(str).tolist()
            for name, table in frames.items()
        }
        x = _tokens(settings, texts, data)
    else:
        x = {name: _features(settings, name, table, data) for name, table in frames.items()}
        data.shape = x["train"].shape[1:]
    data.sets = {name: (x[name], y[name]) for name in frames}
    return _split(settings, data)


def _task_of(target: Any) -> str:
    fractions = target.dtype.kind == "f" and bool((target % 1 != 0).any())
    return "regression" if fractions else "classification"


def _distinct(settings: Settings, target: Any) -> set[Any]:
    """The different labels, of which there must be two."""
    place, values = ("data", "label"), target.tolist()
    try:
        found = set(values)
    except TypeError:
        raise settings.error(
            place,
            f"column {target.name!r} must have one label in each row, a text or a number, or with "
            f"data.task: regression a number. Its first: {values[0]!r:.60}.",
        ) from None
    if len(found) == 1:
        raise settings.error(
            place, f"column {target.name!r} has only one value, {values[0]}: nothing to tell apart."
        )
    return found


def _codes(settings: Settings, name: str, target: Any, classes: list[Any]) -> Any:
    """Labels as indices of classes."""
    index = {label: number for number, label in enumerate(classes)}
    try:
        unknown = sorted({str(label) for label in target.tolist() if label not in index})
    except TypeError:
        raise settings.error(
            ("data", name), f"column {target.name!r} has lists; in data.train it has labels."
        ) from None
    if unknown:
        raise settings.error(
            ("data", name), f"labels that are not in the training set: {', '.join(unknown[:10])}."
        )
    return np.array([index[label] for label in target.tolist()], "int32")


def _features(settings: Settings, name: str, table: Any, data: Data) -> Any:
    """The columns with numbers, side by side; one with lists of numbers by itself."""
    chosen = settings.data
    if data.features is None:
        data.features = chosen.features or [c for c in table.columns if c != chosen.label]
    if not data.features:
        raise settings.error(("data",), "there is no column besides the label.")
    columns = [column(settings, name, table, c, "features") for c in data.features]
    if len(columns) == 1 and columns[0].dtype == object and hasattr(columns[0].iloc[0], "__len__"):
        try:
            return np.stack([np.stack(list(row)) for row in columns[0]]).astype("float32")
        except (ValueError, TypeError):
            pass  # texts, or rows of different lengths
    return np.stack([_numbers(settings, name, c, "features") for c in columns], axis=1)


def _numbers(settings: Settings, name: str, values: Any, place: str) -> Any:
    try:
        numbers = values.to_numpy().astype("float32")
    except (ValueError, TypeError):
        raise settings.error(
            ("data", place),
            f"column {values.name!r} of {getattr(settings.data, name)} has values that are not "
            f"numbers, such as {values.iloc[0]!r}. Name the columns to use, data.features: [...], "
            "or the one with a text, data.text.",
        ) from None
    if not np.isfinite(numbers).all():
        raise settings.error(("data", name), f"column {values.name!r} has infinite values.")
    return numbers


def _tokens(settings: Settings, texts: dict[str, list[str]], data: Data) -> dict[str, Any]:
    """Texts as token ids of a tokenizer learned from those to train on."""
    chosen = settings.data
    if settings.model.preset is not None:
        data.kind = "strings"
        return {name: np.array(values, dtype=object) for name, values in texts.items()}
    tokenizers = require("tokenizers", "train", "A column with texts")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer = _learned(tokenizer, texts["train"], chosen.vocabulary)
    tokenizer.enable_truncation(chosen.length)
    tokenizer.enable_padding(length=chosen.length, pad_id=0, pad_token=PADDING)
    data.kind, data.shape, data.tokenizer = "tokens", (chosen.length,), tokenizer
    data.tokens = tokenizer.get_vocab_size()
    return {
        name: np.array([encoded.ids for encoded in tokenizer.encode_batch(values)], "int32")
        for name, values in texts.items()
    }


def _learned(tokenizer: Any, texts: list[str], size: int) -> Any:
    """A tokenizer with the vocabulary of texts: the same tokens and numbers in every process.

    The library numbers continuations of words, such as ``##a``, in the order of a hash table that
    differs from process to process, and with them merges of equal frequency. A resumed run would
    read other tokens. Those known in advance keep their order.
    """
    tokenizers = require("tokenizers", "train", "A column with texts")
    normalize = tokenizer.normalizer.normalize_str
    characters = set[str]().union(*map(normalize, texts))
    continued = [f"##{one}" for one in sorted(characters) if not one.isspace()]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[PADDING, UNKNOWN, *continued], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    learned = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN))
    learned.normalizer, learned.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    learned.add_special_tokens([PADDING, UNKNOWN])
    return learned


def _plain_text(settings: Settings, given: list[str]) -> Data:
    """Bytes of a text, each sample followed by the one that begins where it ends."""
    length = settings.data.length
    parts = {name: Path(getattr(settings.data, name)).expanduser().read_bytes() for name in given}
    if fraction := settings.data.eval_fraction:
        cut = int(len(parts["train"]) * (1 - fraction))
        parts["eval"], parts["train"] = parts["train"][cut:], parts["train"][:cut]
    if settings.model.preset is not None:  # it has tokens of its own
        texts = {name: part.decode("utf-8", errors="replace") for name, part in parts.items()}
        return Data("language_modeling", "strings", (length,), texts, 0)
    sets = {}
    for name, part in parts.items():
        ids, where = np.frombuffer(part, np.uint8), name if name in given else "eval_fraction"
        sets[name] = successors(settings, where, ids, length, "bytes")
    return Data("language_modeling", "tokens", (length,), sets, 256, 256)


def successors(
    settings: Settings, where: str, ids: np.ndarray, length: int, unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a text for a causal language model, and for each token the one that follows.

    Args:
        settings: The settings.
        where: The setting of section data that the text comes from.
        ids: The tokens of the text.
        length: Tokens of a sample.
        unit: What they are.

    Returns:
        Two arrays ``(samples, length)``; the last tokens that do not fill a sample are left out.
    """
    count = (len(ids) - 1) // length
    if count < 1:
        raise settings.error(
            ("data", where), f"{len(ids)} {unit} are less than one sample of {length} + 1."
        )
    ids = ids[: count * length + 1].astype("int32")
    return ids[:-1].reshape(count, length), ids[1:].reshape(count, length)


def _images(settings: Settings, given: list[str], prepare: Callable[[Any], Any]) -> Data:
    size = settings.data.image_size
    if size is None:
        raise settings.error(("data",), "image_size is missing: [height, width].")
    found = {name: image_files(settings, name) for name in given}
    classes = found["train"][1]
    if len(classes) == 1:
        raise settings.error(
            ("data", "train"), f"has images of only one class, {classes[0]}: nothing to tell apart."
        )
    sets = {}
    for name, (files, folders) in found.items():
        if unknown := sorted(set(folders) - set(classes)):
            there, here = ", ".join(unknown), ", ".join(classes)
            raise settings.error(
                ("data", name), f"classes that train does not have: {there}. It has: {here}."
            )
        labeled = [(path, classes.index(folder)) for path, folder in files]
        sets[name] = ImageFolder(labeled, size, prepare)
    data = Data("classification", "images", (*size, 3), sets, len(classes), classes=classes)
    return _split(settings, data)


def _split(settings: Settings, data: Data) -> Data:
    """Hold out a random part of the training set, if asked to."""
    fraction, whole = settings.data.eval_fraction, data.sets["train"]
    if fraction is None:
        return data
    is_images = isinstance(whole, ImageFolder)
    count = len(whole) if is_images else len(whole[1])
    held_out = max(1, round(count * fraction))
    if held_out == count:
        raise settings.error(("data", "eval_fraction"), f"leaves nothing of {count} samples.")
    order = np.random.default_rng(settings.data.split_seed).permutation(count)
    for name, rows in (("eval", order[:held_out]), ("train", np.sort(order[held_out:]))):
        if is_images:
            files = [whole.files[row] for row in rows]
            data.sets[name] = ImageFolder(files, whole.size, whole.prepare)
        else:
            data.sets[name] = tuple(part[rows] for part in whole)
    return data
