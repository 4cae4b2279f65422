"""Pre-train a small BERT on Python's own documentation, with a tokenizer trained on it.

Run it with ``KERAS_BACKEND=jax python examples/masked_lm.py`` (or torch, or tensorflow); it needs
the extra ``examples`` and KerasHub: ``pip install --no-deps keras-hub`` (without the flag pip also
installs TensorFlow). ``--help`` lists all options.

The text is ``pydoc_data.topics``, half a megabyte of English that comes with every CPython, so
nothing is downloaded. In every epoch a different 15 % of the words are masked, and the model
predicts them from both sides. ``text_classification.py`` can start from the weights learned here.
"""

from __future__ import annotations

import dataclasses
import math
import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from kbtrain import ArgumentParser, Trainer, TrainingArguments
from kbtrain.data import DataCollatorForLanguageModeling

try:
    import keras_hub
except ImportError:
    raise SystemExit("This example needs KerasHub: pip install --no-deps keras-hub") from None

DEFAULTS = [
    *(
        "--output_dir",
        "runs/masked_lm",
        "--max_steps",
        "800",
        "--per_device_train_batch_size",
        "32",
    ),
    *("--learning_rate", "2e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.1"),
    *("--weight_decay", "0.01", "--adam_beta2", "0.98", "--per_device_eval_batch_size", "32"),
    *("--eval_strategy", "steps", "--eval_steps", "0.25", "--logging_steps", "0.25"),
    *("--save_steps", "0.25", "--save_total_limit", "1"),
]
"""Default options; those on the command line come later and override them."""

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IGNORED = -100  # the label of a token that is not masked


@dataclasses.dataclass
class ModelArguments:
    """Options of the model, in addition to those of training."""

    vocabulary: int = dataclasses.field(default=1500, metadata={"help": "Size of the vocabulary."})
    length: int = dataclasses.field(default=64, metadata={"help": "Maximum tokens of a text."})
    width: int = dataclasses.field(default=64, metadata={"help": "Size of a token's embedding."})
    depth: int = dataclasses.field(default=2, metadata={"help": "Transformer blocks."})
    dropout: float = dataclasses.field(default=0.0, metadata={"help": "Dropout rate."})


def train_tokenizer(texts: list[str], options: ModelArguments) -> Tokenizer:
    """Train a WordPiece tokenizer like BERT's, in lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=options.vocabulary, special_tokens=SPECIAL, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(options.length)
    return tokenizer


def make_encoder(tokenizer: Tokenizer, options: ModelArguments) -> keras.Model:
    """KerasHub's BERT, from a configuration instead of a download."""
    return keras_hub.models.BertBackbone(
        vocabulary_size=tokenizer.get_vocab_size(),
        num_layers=options.depth,
        num_heads=options.width // 32,
        hidden_dim=options.width,
        intermediate_dim=4 * options.width,
        max_sequence_length=options.length,
        dropout=options.dropout,
        name="encoder",
    )


def bert_inputs() -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs with the names of the collators, and the same with those KerasHub expects."""
    ids = keras.Input((None,), dtype="int32", name="input_ids")
    mask = keras.Input((None,), dtype="int32", name="attention_mask")
    return (
        {"input_ids": ids, "attention_mask": mask},
        {"token_ids": ids, "padding_mask": mask, "segment_ids": ops.zeros_like(ids)},
    )


def make_model(encoder: keras.Model) -> keras.Model:
    """Logits for every position: the encoder, and its token embedding as the output layer."""
    inputs, renamed = bert_inputs()
    hidden = layers.Dense(encoder.hidden_dim, activation="gelu")(
        encoder(renamed)["sequence_output"]
    )
    hidden = layers.LayerNormalization()(hidden)
    return keras.Model(inputs, encoder.token_embedding(hidden, reverse=True))


def main(words: list[str]) -> None:
    """Train the tokenizer and the model, and compare with unigram frequencies."""
    parser = ArgumentParser(ModelArguments, TrainingArguments, description=__doc__.splitlines()[0])
    options, args = parser.parse_args([*DEFAULTS, *words])
    keras.utils.set_random_seed(args.seed)
    topics = pydoc_data.topics.topics
    paragraphs = {" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")}
    texts = sorted(text for text in paragraphs if len(text) > 40)
    held_out = texts[::10]
    train = [text for number, text in enumerate(texts) if number % 10]

    tokenizer = train_tokenizer(train, options)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save(f"{args.output_dir}/tokenizer.json")

    def encode(texts: list[str]) -> list[dict[str, Any]]:
        encoded = tokenizer.encode_batch(texts)
        return [{"input_ids": item.ids, "word_ids": item.word_ids} for item in encoded]

    trainer = Trainer(
        make_model(make_encoder(tokenizer, options)),
        args,
        data_collator=DataCollatorForLanguageModeling(
            whole_word_mask=True,
            pad_token_id=SPECIAL.index("[PAD]"),
            mask_token_id=SPECIAL.index("[MASK]"),
            vocab_size=tokenizer.get_vocab_size(),
            padding="max_length",
            max_length=options.length,
        ),
        train_dataset=encode(train),
        eval_dataset=encode(held_out),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED),
    )
    result = trainer.fit(resume_from_checkpoint="auto")

    size = tokenizer.get_vocab_size()
    tokens = [
        np.concatenate([s["input_ids"][1:-1] for s in encode(part)]) for part in (train, held_out)
    ]
    counts = np.bincount(tokens[0], minlength=size) + 1.0
    guess = -np.mean(np.log(counts[tokens[1]] / counts.sum()))
    loss = trainer.evaluate()["eval_loss"]
    print(f"{result.global_step} updates on {trainer.backend.name}, {len(train)} paragraphs")
    print(
        f"perplexity of masked words: {math.exp(loss):.1f}; "
        f"by frequency alone {math.exp(guess):.1f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
