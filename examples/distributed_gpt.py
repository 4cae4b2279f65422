"""Train a byte-level GPT in several processes, with the numbers of one.

One process, several on one machine, or a cluster; the script is the same::

    export KERAS_BACKEND=jax                                        # or torch, or tensorflow
    python examples/distributed_gpt.py
    kbtrain launch -n 2 --max-restarts 3 examples/distributed_gpt.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed_gpt.py
    srun --ntasks 2 python examples/distributed_gpt.py
    mpirun -np 2 python examples/distributed_gpt.py

``split_batches=True`` makes ``--batch-size`` that of all processes together, so that an update
trains on the same windows however many there are. A run that was stopped, or has lost a process,
continues from its newest checkpoint, and may do so with another number of processes.

The text is ``pydoc_data.topics``, about half a megabyte of English that comes with every CPython.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.lib.stride_tricks import sliding_window_view

# Joins the processes that a launcher started; JAX and TensorFlow need that before the first tensor.
from kbtrain import Trainer, TrainingArguments

VOCABULARY = 256


def load_windows(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next bytes, both (n, length): views of one text."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    view = sliding_window_view(np.frombuffer(text.encode(), np.uint8).astype("int32"), length + 1)
    return view[:, :-1], view[:, 1:]


class Positions(layers.Layer):  # type: ignore[misc]
    """Adds a learned embedding of each position."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Create one embedding per position; ``shape`` is (batch, length, width)."""
        self.table = self.add_weight(shape=shape[1:], name="positions")

    def call(self, x: Any) -> Any:
        """Return ``x`` plus the position embeddings."""
        return x + ops.cast(self.table, x.dtype)


def make_model(length: int, width: int, depth: int, heads: int) -> keras.Model:
    """A pre-norm transformer from bytes (batch, length) to logits (batch, length, 256)."""
    tokens = keras.Input((length,), dtype="int32")
    x = Positions()(layers.Embedding(VOCABULARY, width)(tokens))
    for _ in range(depth):
        h = layers.LayerNormalization()(x)
        h = layers.MultiHeadAttention(heads, width // heads)(h, h, use_causal_mask=True)
        x = x + layers.Dropout(0.1)(h)
        h = layers.LayerNormalization()(x)
        h = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(h))
        x = x + layers.Dropout(0.1)(h)
    return keras.Model(tokens, layers.Dense(VOCABULARY)(layers.LayerNormalization()(x)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="runs/distributed_gpt", help="on a shared disk")
    parser.add_argument("--steps", type=int, default=600, help="total updates")
    parser.add_argument("--save-steps", type=int, default=50, help="updates between checkpoints")
    parser.add_argument("--batch-size", type=int, default=16, help="windows over all processes")
    parser.add_argument("--length", type=int, default=128, help="bytes in a window")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak")
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    keras.utils.set_random_seed(0)
    args = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        split_batches=True,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=50,
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to="json",
    )
    trainer = Trainer(
        make_model(options.length, options.width, options.depth, options.heads),
        args,
        train_dataset=load_windows(options.length),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    result = trainer.fit(resume_from_checkpoint="auto")
    if args.process_index == 0:
        print(
            f"backend {trainer.backend.name}, processes: {args.world_size}, "
            f"{result.global_step} updates, loss {result.training_loss:.6f}"
        )


if __name__ == "__main__":
    main()
