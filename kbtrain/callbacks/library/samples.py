"""Sample predictions and generations at every evaluation, and a confusion matrix."""

from __future__ import annotations

import base64
import html
import logging
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.report_section import add_section
from kbtrain.callbacks.library.schedule import check_count
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.errors import ConfigurationError
from kbtrain.utils import rng
from kbtrain.utils.best_effort import best_effort

logger = logging.getLogger("kbtrain")

LONGEST_SIDE = 96
"""Pixels of an image in the report; larger ones are thinned out."""

KEPT = 5
"""Evaluations whose generated texts the report shows."""


class SampleCallback(TrainerCallback):
    """Shows what the model makes of some inputs, after every evaluation of a run.

    With ``generate`` the model generates from the inputs (``model.generate(inputs, ...)``, such as
    the causal language models of KerasHub); texts go to the log, the report and TensorBoard.
    Otherwise it classifies them: report and TensorBoard show the first inputs, as pictures if they
    are images, with label, prediction and probability, and the confusion matrix of all of them if
    there are labels. The weights are those of an evaluation, and the training is not affected.

    Args:
        inputs: Prompts, or an array (or structure of arrays) of inputs, as for ``predict``.
        labels: Labels of the classes, whole numbers or one-hot.
        class_names: Names of the classes.
        shown: Inputs to show in the report.
        generate: Arguments of ``model.generate``, such as ``{"max_length": 64}``; ``{}`` for none.
        decode: Turns a generated row of tokens into a text; by default ``decode`` of the Trainer's
            ``processing_class``, if it has one.
        title: Heading of the section in the report.

    Raises:
        ConfigurationError: An argument is invalid; when training begins, the model has no
            ``generate``, nothing is evaluated, or inputs, labels and names do not fit together.

    Attributes:
        newest: A dict for each shown input: "input" and "output", or "label", "prediction" and
            "probability".
        confusion: Counts, one row for each label and one column for each prediction; None before.
    """

    every_step = False
    decides_alike = True

    def __init__(
        self,
        inputs: Any,
        labels: Any = None,
        class_names: Sequence[str] | None = None,
        shown: int = 16,
        generate: Mapping[str, Any] | None = None,
        decode: Callable[[Any], str] | None = None,
        title: str = "Samples",
    ) -> None:
        self.inputs, self.labels = inputs, None if labels is None else _as_classes(labels)
        self.class_names = None if class_names is None else list(class_names)
        self.shown = check_count(shown, "shown", "SampleCallback", 1)
        self.generate = None if generate is None else dict(generate)
        self.decode, self.title = decode, title
        self.newest: list[dict[str, Any]] = []
        self.confusion: np.ndarray | None = None
        self._texts: list[list[Any]] = []
        self._step: int | None = None
        if self.generate is not None and labels is not None:
            raise ConfigurationError("SampleCallback: generated texts are shown without labels.")

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there will be evaluations, the labels, and that the model can generate."""
        self._step = None
        if args.eval_strategy == "no" and not args.eval_on_start:
            raise ConfigurationError(
                "SampleCallback shows samples after evaluations, and this run has none: set "
                "eval_strategy='epoch' in TrainingArguments and give an eval_dataset. "
                "Received: eval_strategy='no'."
            )
        if self.generate is not None and not callable(getattr(kwargs["model"], "generate", None)):
            raise ConfigurationError(
                "SampleCallback(generate=...) needs a model with a method generate(inputs, ...). "
                f"Received: {type(kwargs['model']).__name__}."
            )
        self._check_labels(_count(self.inputs))

    def _check_labels(self, inputs: int | None) -> None:
        """Check that there is a label for each input, and a name for each label.

        Args:
            inputs: Their number; None if it is not known.
        """
        if self.labels is None:
            return
        if inputs is not None and len(self.labels) != inputs:
            raise ConfigurationError(
                f"SampleCallback: there are {inputs} inputs and {len(self.labels)} labels. Give "
                "one label for each input."
            )
        highest = int(self.labels.max(initial=-1))
        if self.class_names is not None and highest >= len(self.class_names):
            raise ConfigurationError(
                f"SampleCallback: the highest label is {highest}, and class_names has "
                f"{len(self.class_names)} names, for the labels from 0 to "
                f"{len(self.class_names) - 1}. Name every class. Received: "
                f"class_names={self.class_names!r:.80}."
            )

    @best_effort
    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the samples, once for each step."""
        trainer = kwargs["trainer"]
        if not trainer.is_in_train or self._step == state.global_step:
            return
        self._step = state.global_step
        if self.generate is None:
            self._classify(trainer, state)
        else:
            self._generate(trainer, state)

    # --- texts ------------------------------------------------------------------------------------

    def _generate(self, trainer: Any, state: TrainerState) -> None:
        prompts = list(self.inputs) if isinstance(self.inputs, list | tuple) else self.inputs
        seeds = trainer.bound.advancing_variables
        before = [np.array(keras.ops.convert_to_numpy(v.value)) for v in seeds]
        try:
            with (
                rng.random_state_kept(trainer.backend),
                trainer.evaluation_weights(),
                trainer.backend.inference(),
            ):
                generated = trainer.model.generate(prompts, **(self.generate or {}))
        finally:
            for variable, value in zip(seeds, before, strict=True):
                variable.assign(value)
        texts = self._decoded(trainer, generated)
        shown = prompts if isinstance(prompts, list) else self._decoded(trainer, prompts)
        self.newest = [
            {"input": str(prompt), "output": text}
            for prompt, text in list(zip(shown, texts, strict=True))[: self.shown]
        ]
        if not state.is_world_process_zero:
            return
        step = state.global_step
        for sample in self.newest[:3]:
            logger.info("Step %d, %r -> %r", step, sample["input"], sample["output"])
        rows = [[step, sample["input"], sample["output"]] for sample in self.newest]
        self._texts = (rows + self._texts)[: KEPT * len(rows)]
        add_section(trainer, self.title, [["Step", "Prompt", "Generated"], *self._texts])
        text = "\n\n".join(f"**{s['input']}** {s['output']}" for s in self.newest)
        _track(trainer, "write_text", self.title, text, step)

    def _decoded(self, trainer: Any, generated: Any) -> list[str]:
        if isinstance(generated, dict):
            generated = generated.get("token_ids", next(iter(generated.values())))
        if isinstance(generated, str):
            return [generated]
        if keras.ops.is_tensor(generated):
            generated = trainer.backend.to_host(generated)
        decode = self.decode or getattr(trainer.processing_class, "decode", None)
        rows = []
        for row in generated:
            value = row.decode() if isinstance(row, bytes) else row
            if not isinstance(value, str):
                tokens = np.asarray(value).tolist()
                value = str(tokens) if decode is None else str(decode(tokens))
            rows.append(value)
        return rows

    # --- classes ----------------------------------------------------------------------------------

    def _classify(self, trainer: Any, state: TrainerState) -> None:
        loader = trainer.get_test_dataloader(self.inputs)
        output = trainer.evaluation_loop(loader, prediction_loss_only=False)
        predicted, probability = classes_of(output.predictions)
        count = min(self.shown, len(predicted))
        self.newest = [
            {
                "label": None if self.labels is None else self._name(self.labels[i]),
                "prediction": self._name(predicted[i]),
                "probability": float(probability[i]),
            }
            for i in range(count)
        ]
        captioned = self._captioned()
        parts = [f"<p>After update {state.global_step}.</p>", self._pictures(captioned)]
        if self.labels is not None:
            self._check_labels(len(predicted))
            size = max(int(predicted.max()), int(self.labels.max())) + 1
            size = max(size, len(self.class_names or ()))
            self.confusion = np.zeros((size, size), np.int64)
            np.add.at(self.confusion, (self.labels, predicted), 1)
            parts.append(self._matrix(self.confusion))
        if state.is_world_process_zero:
            add_section(trainer, self.title, "".join(parts))
            if captioned:
                _track(trainer, "write_pictures", self.title, captioned, state.global_step)
            if self.confusion is not None:
                text = _markdown(self.confusion, [self._name(i) for i in range(size)])
                _track(trainer, "write_text", f"{self.title}/confusion", text, state.global_step)
            wrong = (
                0
                if self.confusion is None
                else int(self.confusion.sum() - np.trace(self.confusion))
            )
            if self.confusion is not None:
                logger.info(
                    "Step %d: %d of %d samples are classified wrongly.",
                    state.global_step,
                    wrong,
                    len(predicted),
                )

    def _name(self, index: Any) -> str:
        known = self.class_names or []
        return known[int(index)] if int(index) < len(known) else str(int(index))

    def _captioned(self) -> list[tuple[str, bytes]]:
        """Captions and PNG files of the first inputs; empty if they are no images."""
        leaves = keras.tree.flatten(self.inputs)
        images = np.asarray(leaves[0]) if len(leaves) == 1 and not _is_text(leaves[0]) else None
        if images is None or not _are_images(images):
            return []
        found = []
        for image, sample in zip(images, self.newest, strict=False):
            right = sample["label"] in (None, sample["prediction"])
            said = f"{sample['prediction']} {100 * sample['probability']:.0f} %"
            found.append((said if right else f"wrong: {said} (is {sample['label']})", png(image)))
        return found

    def _pictures(self, captioned: Sequence[tuple[str, bytes]]) -> str:
        if not captioned:
            rows = "".join(
                f"<tr><td>{i}</td>{self._cells(sample)}</tr>"
                for i, sample in enumerate(self.newest)
            )
            return f"<table><tr><th>Sample</th>{self._head()}</tr>{rows}</table>"
        figures = []
        for caption, file in captioned:
            said, data = html.escape(caption), base64.b64encode(file).decode()
            figures.append(
                '<figure style="display:inline-block;margin:4px;width:7em;vertical-align:top">'
                f'<img width="96" style="image-rendering:pixelated" alt="{said}" '
                f'src="data:image/png;base64,{data}"/><figcaption>{said}</figcaption></figure>'
            )
        return "".join(figures)

    def _head(self) -> str:
        label = "" if self.labels is None else "<th>Label</th>"
        return f"{label}<th>Prediction</th><th>Probability</th>"

    def _cells(self, sample: Mapping[str, Any]) -> str:
        label = "" if self.labels is None else f"<td>{html.escape(sample['label'])}</td>"
        prediction = html.escape(sample["prediction"])
        return f"{label}<td>{prediction}</td><td>{sample['probability']:.3f}</td>"

    def _matrix(self, counts: np.ndarray) -> str:
        names = [html.escape(self._name(i)) for i in range(len(counts))]
        head = "".join(f"<th>{name}</th>" for name in names)
        top = max(int(counts.max()), 1)
        rows = []
        for name, row in zip(names, counts.tolist(), strict=True):
            cells = "".join(
                f'<td style="background:rgba(70,130,180,{0.6 * c / top:.2f})">{c}</td>' for c in row
            )
            rows.append(f"<tr><th>{name}</th>{cells}</tr>")
        return (
            "<p>Confusion matrix: a row for each label, a column for each prediction.</p>"
            f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
        )


def _count(inputs: Any) -> int | None:
    """The number of inputs in arrays; None for other data, whose length may be that in batches."""
    shapes = [getattr(leaf, "shape", None) for leaf in keras.tree.flatten(inputs)]
    return int(shapes[0][0]) if shapes and shapes[0] else None


def _track(trainer: Any, method: str, *content: Any) -> None:
    """Pass texts or pictures to the trackers that take them."""
    for callback in trainer.callback_handler.callbacks:
        if write := getattr(callback, method, None):
            write(*content)


def _markdown(counts: np.ndarray, names: Sequence[str]) -> str:
    """The confusion matrix as a table of Markdown."""
    lines = ["| label | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, row in zip(names, counts.tolist(), strict=True):
        lines.append(f"| **{name}** | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def classes_of(predictions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes and their probabilities.

    Args:
        predictions: The outputs of a classifier, probabilities or logits: ``(samples, classes)``,
            or ``(samples,)`` or ``(samples, 1)`` for two classes.

    Raises:
        ConfigurationError: They have another form.
    """
    if isinstance(predictions, dict | list | tuple):
        raise ConfigurationError(
            "SampleCallback classifies with a model of one output. Received: "
            f"{len(predictions)} outputs. Use a model that returns one of them."
        )
    outputs = np.asarray(predictions, np.float64)
    if outputs.ndim == 1:
        outputs = outputs[:, None]
    if outputs.ndim != 2:
        raise ConfigurationError(
            "SampleCallback needs outputs with one row of classes for each sample. "
            f"Received: outputs of shape {outputs.shape}."
        )
    probable = bool(np.all((outputs >= 0) & (outputs <= 1)))
    if outputs.shape[1] == 1:
        second = outputs if probable else 1 / (1 + np.exp(-outputs))
        outputs = np.concatenate([1 - second, second], axis=1)
    elif not probable or not np.allclose(outputs.sum(1), 1, atol=1e-3):
        outputs = np.exp(outputs - outputs.max(1, keepdims=True))
        outputs /= outputs.sum(1, keepdims=True)
    chosen = outputs.argmax(1)
    return chosen, outputs[np.arange(len(outputs)), chosen]


def png(image: np.ndarray) -> bytes:
    """An image as a PNG file.

    Args:
        image: ``(height, width)`` or ``(height, width, 1 or 3)``: bytes, or numbers, whose range is
            stretched to black and white unless it is within [0, 1].
    """
    pixels = image if image.ndim == 3 else image[:, :, None]
    stride = -(-max(pixels.shape[:2]) // LONGEST_SIDE)
    pixels = pixels[::stride, ::stride]
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float64)
        low, high = float(pixels.min()), float(pixels.max())
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        elif low >= 0 and high <= 255 and high > 1:
            low, high = 0.0, 255.0
        pixels = np.clip(255 * (pixels - low) / max(high - low, 1e-12), 0, 255)
        pixels = np.round(pixels).astype(np.uint8)
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    colour = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _are_images(array: np.ndarray) -> bool:
    if array.dtype.kind not in "buif" or min(array.shape, default=0) < 1:
        return False
    small = array.ndim == 3 and min(array.shape[1:]) >= 4
    return small or (array.ndim == 4 and array.shape[-1] in (1, 3))


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes)


def _as_classes(labels: Any) -> np.ndarray:
    array = np.asarray(labels)
    numeric = array.dtype.kind in "biuf" and bool(np.all(np.isfinite(array)))
    if numeric and array.ndim == 2 and array.shape[1] > 1:
        array = array.argmax(1)
    array = array.reshape(-1)
    if not numeric or not np.array_equal(array, array.astype(np.int64)) or np.any(array < 0):
        raise ConfigurationError(
            "SampleCallback: labels must be classes, whole numbers from 0 or one-hot. "
            f"Received: {labels!r:.80}."
        )
    return array.astype(np.int64)
