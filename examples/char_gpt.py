"""Train a byte-level GPT on Python's own documentation, then generate text.

Run it with ``KERAS_BACKEND=jax python examples/char_gpt.py`` (or torch, or tensorflow). The text is
``pydoc_data.topics``, about half a megabyte of English that comes with every CPython, so nothing is
downloaded. The last tenth is held out; the result is the model's bits per byte on it.

Stop it at any time, even with ``kill -9``, and run the same command again: it resumes from its
newest checkpoint and ends with the same weights as without the interruption.
"""

from __future__ import annotations

import argparse
import logging
import math
import pydoc_data.topics
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.lib.stride_tricks import sliding_window_view

from kbtrain import Trainer, TrainingArguments

VOCABULARY = 256


def load_bytes() -> np.ndarray:
    """The whole text as an int32 vector of bytes."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype("int32")


def windows(data: np.ndarray, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next bytes, both (n, length): views of ``data``, so overlaps need no memory."""
    view = sliding_window_view(data, length + 1)[::stride]
    return view[:, :-1], view[:, 1:]


class BitsPerByte(keras.metrics.SparseCategoricalCrossentropy):  # type: ignore[misc]
    """Cross-entropy in bits: the size of a byte in an ideal compressor with this model."""

    def __init__(self, name: str = "bits_per_byte", **kwargs: Any) -> None:
        super().__init__(name=name, from_logits=True, **kwargs)

    def result(self) -> Any:
        """The mean over everything since the last reset."""
        return super().result() / math.log(2)


class Positions(layers.Layer):  # type: ignore[misc]
    """Adds a learned embedding of each position."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Create one embedding per position; ``shape`` is (batch, length, width)."""
        self.table = self.add_weight(shape=shape[1:], initializer=_normal(), name="positions")

    def call(self, x: Any) -> Any:
        """Return ``x`` plus the position embeddings."""
        return x + ops.cast(self.table, x.dtype)


def _normal(residual_branches: int = 1) -> keras.initializers.Initializer:
    """GPT-2's initialization, with smaller weights for layers that write to the residual stream."""
    return keras.initializers.RandomNormal(stddev=0.02 / math.sqrt(residual_branches))


def make_model(length: int, width: int, depth: int, heads: int, dropout: float) -> keras.Model:
    """A pre-norm transformer from bytes (batch, length) to logits (batch, length, 256)."""
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(VOCABULARY, width, embeddings_initializer=_normal())(tokens)
    x = layers.Dropout(dropout)(Positions()(x))
    for _ in range(depth):
        h = layers.LayerNormalization(epsilon=1e-5)(x)
        h = layers.MultiHeadAttention(
            heads, width // heads, dropout=dropout, kernel_initializer=_normal()
        )(h, h, use_causal_mask=True)
        x = x + layers.Dropout(dropout)(h)
        h = layers.LayerNormalization(epsilon=1e-5)(x)
        h = layers.Dense(4 * width, activation="gelu", kernel_initializer=_normal())(h)
        h = layers.Dense(width, kernel_initializer=_normal(2 * depth))(h)
        x = x + layers.Dropout(dropout)(h)
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, kernel_initializer=_normal())(x))


def generate(model: keras.Model, prompt: bytes, count: int, temperature: float, seed: int) -> bytes:
    """Continue ``prompt`` by ``count`` bytes sampled from the model's distribution.

    The model always gets a full window, so it is compiled for one shape. The zeros to the right of
    the last byte have no effect, because attention is causal.
    """
    length = model.input_shape[1]
    generator = np.random.default_rng(seed)
    text = list(prompt)
    for _ in range(count):
        seen = text[-length:]
        window = np.zeros((1, length), "int32")
        window[0, : len(seen)] = seen
        logits = model.predict_on_batch(window)[0, len(seen) - 1].astype("float64")
        logits = (logits - logits.max()) / temperature
        weights = np.exp(logits)
        text.append(int(generator.choice(VOCABULARY, p=weights / weights.sum())))
    return bytes(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="runs/char_gpt", help="checkpoints and logs")
    parser.add_argument("--steps", type=int, default=1200, help="total updates")
    parser.add_argument("--save-steps", type=int, default=100, help="updates between checkpoints")
    parser.add_argument("--eval-steps", type=int, default=300, help="updates between evaluations")
    parser.add_argument("--batch-size", type=int, default=16, help="windows in an update")
    parser.add_argument("--length", type=int, default=128, help="bytes in a window")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak")
    parser.add_argument("--max-bytes", type=int, help="use only the first bytes of the text")
    parser.add_argument("--prompt", default="The for statement ")
    parser.add_argument("--sample-bytes", type=int, default=400, help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def make_trainer(options: argparse.Namespace) -> Trainer:
    """Create the trainer with its data and model; the same options give the same run."""
    data = load_bytes()[: options.max_bytes]
    split = int(0.9 * len(data))
    keras.utils.set_random_seed(options.seed)
    return Trainer(
        model=make_model(
            options.length, options.width, options.depth, options.heads, options.dropout
        ),
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            adam_beta2=0.99,
            logging_steps=100,
            eval_strategy="steps",
            eval_steps=options.eval_steps,
            save_steps=options.save_steps,
            save_total_limit=2,
            report_to="json",
            seed=options.seed,
        ),
        train_dataset=windows(data[:split], options.length, stride=1),
        eval_dataset=windows(data[split:], options.length, stride=options.length),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[BitsPerByte()],
    )


def main() -> None:
    options = parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kbtrain").setLevel(logging.INFO)  # to log where it resumes
    trainer = make_trainer(options)
    print(
        f"backend {trainer.backend.name}, device {trainer.backend.device_info()}, "
        f"{trainer.get_num_trainable_parameters():,} parameters",
        flush=True,
    )
    try:
        result = trainer.fit(resume_from_checkpoint="auto")
    except KeyboardInterrupt:
        raise SystemExit(
            "Interrupted. Run the same command again to resume from the newest checkpoint."
        ) from None
    for entry in trainer.state.log_history:
        if "eval_bits_per_byte" in entry:
            print(f"step {entry['step']:>6}: {entry['eval_bits_per_byte']:.4f} bits per byte")
    metrics = trainer.evaluate()
    print(
        f"{result.global_step} updates, loss {result.training_loss:.4f}; held-out text: "
        f"{metrics['eval_bits_per_byte']:.6f} bits per byte"
    )
    sample = generate(
        trainer.model,
        options.prompt.encode(),
        options.sample_bytes,
        options.temperature,
        options.seed,
    )
    print(f"\n{sample.decode('utf-8', errors='replace')}")


if __name__ == "__main__":
    main()
