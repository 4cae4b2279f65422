"""Fine-tune KerasHub's BERT classifier: which package of Python does a docstring come from?

Run it with ``KERAS_BACKEND=jax python examples/text_classification.py`` (or torch, or tensorflow);
it has the requirements of ``masked_lm.py`` and uses its encoder. With
``--pretrained runs/masked_lm``, after a run of that example, it also uses its tokenizer and
weights, so that it starts with an encoder trained on Python's documentation (too briefly to be
better: see docs/lab/examples.md).

The texts are the docstrings of eight packages of the standard library, read from their source, so
nothing is downloaded. For comparison there is a linear model on word frequencies, which is hard to
beat on so few texts.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import sysconfig
from pathlib import Path

import keras
import numpy as np
from masked_lm import SPECIAL, ModelArguments, bert_inputs, make_encoder, train_tokenizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer

from kbtrain import (
    ArgumentParser,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    load_weights,
)
from kbtrain.data import DataCollatorWithPadding

PACKAGES = (
    *("asyncio", "email", "http", "importlib"),
    *("logging", "multiprocessing", "unittest", "xml"),
)
DEFAULTS = [
    *("--output_dir", "runs/text_classification", "--num_train_epochs", "12"),
    *("--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64"),
    *("--learning_rate", "1e-3", "--warmup_steps", "0.1", "--weight_decay", "0.01"),
    *("--train_sampling_strategy", "group_by_length", "--logging_strategy", "epoch"),
    *("--eval_strategy", "epoch", "--save_strategy", "epoch", "--save_total_limit", "1"),
    *("--load_best_model_at_end", "--metric_for_best_model", "f1"),
]
"""Default options; those on the command line come later and override them."""


@dataclasses.dataclass
class TextArguments(ModelArguments):
    """The options of the encoder, and its initial weights."""

    pretrained: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Folder of a run of masked_lm.py, to start from."},
    )


def load_docstrings() -> tuple[list[str], list[int]]:
    """The docstrings of all modules, classes and functions, and the indices of their packages."""
    found: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text.split()) >= 6:
                        found.setdefault(" ".join(text.split()), label)
    return list(found), list(found.values())


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Called once per evaluation, with NumPy arrays of the whole set."""
    chosen = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": accuracy_score(prediction.label_ids, chosen),
        "f1": f1_score(prediction.label_ids, chosen, average="macro"),
    }


def main(words: list[str]) -> None:
    """Train, choose the best epoch on the validation set, and use the test set once."""
    parser = ArgumentParser(TextArguments, TrainingArguments, description=__doc__.splitlines()[0])
    options, args = parser.parse_args([*DEFAULTS, *words])
    keras.utils.set_random_seed(args.seed)
    texts, labels = load_docstrings()
    rest, test, y_rest, y_test = train_test_split(
        texts, labels, test_size=0.2, stratify=labels, random_state=0
    )
    train, val, y_train, y_val = train_test_split(
        rest, y_rest, test_size=0.15, stratify=y_rest, random_state=0
    )
    if options.pretrained is None:
        tokenizer = train_tokenizer(train, options)
    else:
        tokenizer = Tokenizer.from_file(f"{options.pretrained}/tokenizer.json")

    def encode(texts: list[str], labels: list[int]) -> list[dict[str, object]]:
        encoded = tokenizer.encode_batch(texts)
        return [{"input_ids": e.ids, "label": y} for e, y in zip(encoded, labels, strict=True)]

    import keras_hub  # after masked_lm, whose error explains how to install it

    classifier = keras_hub.models.BertTextClassifier(
        make_encoder(tokenizer, options),
        num_classes=len(PACKAGES),
        preprocessor=None,
        compile=False,  # or it is compiled with an optimizer that overrides the arguments
    )
    inputs, renamed = bert_inputs()
    model = keras.Model(inputs, classifier(renamed))
    if options.pretrained is not None:
        # Not strict, because the two models have different heads.
        print(load_weights(model, options.pretrained, strict=False))
    trainer = Trainer(
        model,
        args,
        # Lengths are rounded up, because the step is compiled once for each length.
        data_collator=DataCollatorWithPadding(
            pad_token_id=SPECIAL.index("[PAD]"), pad_to_multiple_of=32
        ),
        train_dataset=encode(train, y_train),
        eval_dataset=encode(val, y_val),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=4)],
    )
    result = trainer.fit()
    metrics = trainer.predict(encode(test, y_test)).metrics

    words_of = TfidfVectorizer(sublinear_tf=True)
    linear = LogisticRegression(C=10, max_iter=1000).fit(words_of.fit_transform(train), y_train)
    chosen = linear.predict(words_of.transform(test))
    print(f"{result.global_step} updates on {trainer.backend.name}; {len(train)} docstrings")
    print(
        f"linear model: accuracy {accuracy_score(y_test, chosen):.3f}, "
        f"F1 {f1_score(y_test, chosen, average='macro'):.3f}"
    )
    print(f"BERT: accuracy {metrics['test_accuracy']:.3f}, F1 {metrics['test_f1']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
