"""One process of ``scaling.py``: a trainer that pauses after each round until the next is wanted.

Standard output carries a line of JSON for each round; a line on standard input starts the next.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

GLOBAL_BATCH = 8
FOREVER = 1_000_000_000


class Rounds:
    """Reports a round and waits for the next; the first one compiles.

    Args:
        steps: Updates in a round.
        folder: An empty folder.
    """

    def __init__(self, steps: int, folder: str) -> None:
        self.steps, self.folder = steps, folder
        self._channel = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what frameworks print
        self._updates = 0
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        self.facts: dict[str, Any] = {}

    def update(self, wait: Callable[[], Any] = lambda: None) -> None:
        """Count an update, after which a round may end.

        Args:
            wait: Waits until the update has been computed.
        """
        self._updates += 1
        if self._updates % self.steps == 0:
            wait()
            self.end()

    def end(self) -> None:
        """End a round."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        found = {"cpu": cpu / self.steps, "wall": wall / self.steps, "facts": self.facts}
        print(json.dumps(found), file=self._channel)
        if not sys.stdin.readline():
            os._exit(0)  # at once, whatever the framework would still wait for
        self._cpu, self._wall = time.process_time(), time.perf_counter()


def _take_one_core(rank: int) -> None:
    """Stay on one core: a pool of threads for several would burn time while it waits for work."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def kbtrain(rounds: Rounds, devices: int) -> None:
    import keras

    from kbtrain import Trainer, TrainerCallback, TrainingArguments

    class Callback(TrainerCallback):
        every_step = False

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rounds.end()

    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        torch.set_num_threads(1)
        _count_torch(rounds)
    elif backend == "jax":
        _count_jax(rounds, devices * processes())
    model, x, y, loss = _keras_model()
    rounds.facts["parameters"] = model.count_params()
    names = ",".join(f"cpu:{i}" for i in range(devices))
    args = TrainingArguments(
        output_dir=rounds.folder,
        devices=names if devices > 1 else None,
        per_device_train_batch_size=GLOBAL_BATCH // (devices * processes()),
        max_steps=FOREVER,
        logging_steps=rounds.steps,
        save_strategy="no",
        report_to="none",
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )
    Trainer(model, args, train_dataset=(x, y), loss=loss, callbacks=[Callback()]).fit()


def _count_torch(rounds: Rounds) -> None:
    """Count the collectives of the recorded step."""
    from kbtrain.backends.torch.capture import aliasing

    step: Any = importlib.import_module("kbtrain.backends.torch.capture.step")
    make = step.make_program

    def counted(module: Any, *args: Any) -> Any:
        program = make(module, *args)
        sent = [
            node.all_input_nodes[0].meta["val"]
            for node in module.graph.nodes
            if aliasing.is_collective(node) and "wait_tensor" not in str(node.target)
        ]
        rounds.facts["collectives"] = [t.numel() * t.element_size() for t in sent]
        return program

    step.make_program = counted


def _count_jax(rounds: Rounds, devices: int) -> None:
    """Count the collectives of the compiled step, as XLA's program for this machine has them."""
    from kbtrain.backends.jax import compile as compiling
    from kbtrain.backends.jax.hlo import Program

    def compile_and_count(jitted: Any, *args: Any) -> None:
        text = jitted.lower(*args).compile().as_text()
        found = Program(text, devices).collectives()
        rounds.facts["collectives"] = [each.size for each in found]

    compiling._compile = compile_and_count


def keras_fit(rounds: Rounds, devices: int) -> None:
    """Keras' own fit, over several devices with its DataParallel."""
    import keras

    if devices > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel())

    class Callback(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            rounds.update(lambda: float((logs or {})["loss"]))

    model, x, y, loss = _keras_model()
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.01, clipnorm=1.0), loss)
    model.fit(x, y, batch_size=GLOBAL_BATCH, epochs=FOREVER, verbose=0, callbacks=[Callback()])


def hugging_face(rounds: Rounds, devices: int) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    x, y = _texts()

    class Rows(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"inputs": x[i], "labels": y[i]}

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rounds.update()

    args = transformers.TrainingArguments(
        output_dir=rounds.folder,
        per_device_train_batch_size=GLOBAL_BATCH // processes(),
        max_steps=FOREVER,
        logging_steps=rounds.steps,
        save_strategy="no",
        report_to="none",
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    trainer = transformers.Trainer(
        _torch_model(), args, train_dataset=Rows(), callbacks=[Callback()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def lightning(rounds: Rounds, devices: int) -> None:
    import lightning as library
    import torch

    torch.set_num_threads(1)
    x, y = _texts()

    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = _torch_model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(*batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01, foreach=True)

    class Callback(library.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *args: Any) -> None:
            rounds.update()

    data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    size = GLOBAL_BATCH // processes()
    library.Trainer(
        max_steps=FOREVER,
        max_epochs=-1,
        accelerator="cpu",
        devices=processes(),
        strategy="ddp" if processes() > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[Callback()],
    ).fit(Module(), torch.utils.data.DataLoader(data, batch_size=size, shuffle=True))


def _size() -> Any:
    from workloads import GptSize

    return GptSize(depth=4, width=256, length=64, heads=4, vocabulary=512)


def _texts() -> tuple[Any, Any]:
    from workloads import texts

    x, y = texts(_size())(64 * GLOBAL_BATCH)
    return x, y


def _keras_model() -> tuple[Any, Any, Any, Any]:
    from workloads import gpt, loss

    return gpt(_size()), *_texts(), loss()


def _torch_model() -> Any:
    import torch
    from native_torch import Gpt, cross_entropy

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = Gpt(_size())

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.body(inputs)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    return Model()


TRAINERS = {
    "kbtrain": kbtrain,
    "keras": keras_fit,
    "hf": hugging_face,
    "lightning": lightning,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", required=True)
    options = parser.parse_args()
    if options.devices == 1:
        _take_one_core(int(os.environ.get("LOCAL_RANK", "0")))
    with contextlib.suppress(KeyboardInterrupt):
        TRAINERS[options.trainer](Rounds(options.steps, options.folder), options.devices)


if __name__ == "__main__":
    main()
