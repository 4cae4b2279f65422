"""Other trainers on PyTorch, with a torch.nn model of the same shape.

Each trainer runs in a separate thread and pauses after each round until the next is requested, so
that trainers can alternate in one process and are timed without their start-up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from native_torch import MODELS, cross_entropy
from on_gpu.turns import Turns
from torch import nn
from workloads import in_bf16

ROUNDS = 10_000  # more than any benchmark runs


def trainers(workload: str, x: Any, y: Any, size: int, steps: int) -> dict[str, Turns]:
    """The installed trainers, ready for rounds of ``steps`` steps."""
    found = {}
    for name, make in (("HF Trainer", _hugging_face), ("Lightning", _lightning)):
        try:
            found[name] = Turns(make(workload, x, y, size, steps))
        except ImportError as error:
            print(f"{name} is not installed ({error.name}): pip install '.[bench]'")
    return found


def _hugging_face(workload: str, x: Any, y: Any, size: int, steps: int) -> Any:
    import accelerate  # noqa: F401  (the HF Trainer wants it, and says so only when it is made)
    import transformers

    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = MODELS[workload]()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.body(inputs)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    class Rows(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"inputs": x[i], "labels": y[i]}

    def run(pause: Callable[[], bool]) -> None:
        class Callback(transformers.TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step % steps == 0:
                    control.should_training_stop = not pause()

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=size,
                max_steps=steps * ROUNDS,
                logging_steps=steps,
                save_strategy="no",
                learning_rate=1e-3,
                weight_decay=0.01,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                disable_tqdm=True,
                bf16=in_bf16(),
                use_cpu=not torch.cuda.is_available(),
            )
            trainer = transformers.Trainer(
                Model(), arguments, train_dataset=Rows(), callbacks=[Callback()]
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()

    return run


def _lightning(workload: str, x: Any, y: Any, size: int, steps: int) -> Any:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = MODELS[workload]()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01, foreach=True)

    def run(pause: Callable[[], bool]) -> None:
        class Callback(lightning.Callback):  # type: ignore[misc]
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step % steps == 0:
                    trainer.should_stop = not pause()

        data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        loader = torch.utils.data.DataLoader(data, batch_size=size, shuffle=True)
        trainer = lightning.Trainer(
            max_steps=steps * ROUNDS,
            max_epochs=-1,
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if in_bf16() else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            callbacks=[Callback()],
        )
        trainer.fit(Module(), loader)

    return run
