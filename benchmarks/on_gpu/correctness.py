"""Is a run on the device right? Short runs of small models, compared with other runs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kbtrain import Trainer, TrainerCallback, TrainingArguments
from on_gpu.models import Small, small_models
from on_gpu.rows import Reporter

UPDATES = 8
LIKE_CPU = 2e-3
"""Greatest relative difference of a loss from the CPU's, in float32 without TensorFloat-32."""

LIKE_PLAIN = 1e-5
"""The same for a CUDA graph and the plain step, if plain steps agree better among themselves."""

HALF_PRECISION = 5e-2
"""Greatest relative difference of a loss in half precision from that in float32."""

WAY = 1e-2
"""Greatest distance of the weights from the CPU's, as a part of the way that the CPU's went."""

WAY_OF_MATRICES = 1e-1
"""The same for optimizers that decompose matrices, or multiply them in bfloat16 on a GPU."""

OF_MATRICES = ("muon", "soap", "galore", "apollo")

WAY_IS_CERTAIN = ("dense", "recurrent")
"""Models all of whose weights matter. A bias before a normalization has gradients that are nothing
but rounding, and so has that of the keys of an attention; Adam makes whole steps of them."""


@dataclass(frozen=True)
class Outcome:
    """What a run has left.

    Attributes:
        losses: The logged losses.
        start: The trainable weights before.
        end: The trainable weights.
        weights: The model's variables.
        messages: What the log said about graphs and recording, and all warnings.
    """

    losses: np.ndarray
    start: list[np.ndarray]
    end: list[np.ndarray]
    weights: list[np.ndarray]
    messages: list[str]


class Listener(logging.Handler):
    """Keeps what kbtrain and optim say about how the step is run, and all of their warnings."""

    loggers = ("kbtrain", "optim")

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        words = ("graph", "captured", "eagerly", "loss scale")
        if record.levelno >= logging.WARNING or any(word in message for word in words):
            self.messages.append(message)

    def __enter__(self) -> Listener:
        for name in self.loggers:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: Any) -> None:
        for name in self.loggers:
            logging.getLogger(name).removeHandler(self)


def is_broken(messages: Sequence[str]) -> bool:
    """Whether some kernel was not used, or was not there."""
    return any("does not work" in message or "Triton" in message for message in messages)


class StopAt(TrainerCallback):
    """Ends a run early, as a user may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def train(
    report: Reporter,
    small: Small,
    *,
    dropout: float = 0.0,
    folder: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    x: np.ndarray | None = None,
    **settings: Any,
) -> Outcome:
    """Train a small model for a few updates."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": UPDATES,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "tf32": False,
        "use_cpu": not report.settings.on_gpu,
    }
    if keras.backend.backend() != "torch":
        settings.pop("cuda_graphs", None)
    model = small.model(dropout)
    start = _trainable(model)
    with tempfile.TemporaryDirectory() as own, Listener() as listener:
        trainer = Trainer(
            model,
            TrainingArguments(output_dir=folder or own, **(defaults | settings)),
            train_dataset=(small.x if x is None else x, small.y),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            callbacks=list(callbacks),
        )
        trainer.fit(resume_from_checkpoint=True) if resume else trainer.fit()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = [np.asarray(array, "float64") for array in trainer.model.get_weights()]
    messages = sorted(set(listener.messages))
    losses = np.asarray(logged, "float64")
    return Outcome(losses, start, _trainable(trainer.model), weights, messages)


def _trainable(model: keras.Model) -> list[np.ndarray]:
    arrays = (keras.ops.convert_to_numpy(v.value) for v in model.trainable_variables)
    return [np.array(array, "float64") for array in arrays]


def way_apart(here: Outcome, cpu: Outcome) -> float:
    """How far the weights are from the CPU's, as a part of the way that the CPU's went."""
    flat = [np.concatenate([a.ravel() for a in x]) for x in (here.end, cpu.end, cpu.start)]
    if not all(np.isfinite(x).all() for x in flat):
        return float("inf")
    return float(np.linalg.norm(flat[0] - flat[1]) / (np.linalg.norm(flat[1] - flat[2]) + 1e-30))


def apart(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """The greatest difference of two arrays, in units of the greatest number in the second."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        if a.size:
            worst = max(worst, float(np.abs(a - b).max() / (np.abs(b).max() + 1e-30)))
    return worst


def some(report: Reporter, *names: str) -> dict[str, Small]:
    """The models of these names, or all; in a rehearsal only the first."""
    models = small_models()
    names = names or tuple(models)
    return {name: models[name] for name in (names[:1] if report.settings.tiny else names)}


def like_cpu(report: Reporter) -> None:
    """The device's losses are those of the CPU."""
    for name, small in some(report).items():

        def case(name: str = name, small: Small = small) -> dict[str, Any]:
            here, cpu = train(report, small), train(report, small, use_cpu=True)
            far = apart([here.losses], [cpu.losses])
            way = way_apart(here, cpu)
            passed = far <= LIKE_CPU and (way <= WAY or name not in WAY_IS_CERTAIN)
            figures = {"losses apart": far, "of the way apart": way}
            return figures | {"messages": here.messages, "passed": passed}

        report.attempt(name, case)


def graphs(report: Reporter) -> None:
    """A step as a CUDA graph computes what the plain step computes, random numbers included."""
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        ", bf16": {"bf16": True},
        ", accumulated": {"gradient_accumulation_steps": 2},
        ", fp16": {"fp16": True},
    }
    for name, small in some(report).items():
        for kind, settings in kinds.items():
            if kind and name not in ("dense", "attention"):
                continue

            def case(small: Small = small, settings: Any = settings) -> dict[str, Any]:
                runs = [
                    train(report, small, dropout=0.2, cuda_graphs=wanted, **settings)
                    for wanted in (False, False, "auto")
                ]
                plain, again, graphed = ([run.losses, *run.weights] for run in runs)
                noise, far = apart(again, plain), apart(graphed, plain)
                said = [m for m in runs[2].messages if "loss scale" not in m]
                made = any("runs as a CUDA graph" in m for m in said)
                wrong = any("gave other numbers" in m or "its capture failed" in m for m in said)
                return {
                    "apart": far,
                    "two plain runs": noise,
                    "graph": made,
                    "messages": said,
                    # There may be a reason not to make one, which has been said then.
                    "passed": far <= max(LIKE_PLAIN, 10 * noise)
                    and not wrong
                    and not is_broken(said)
                    and (made or bool(said) or not report.settings.on_gpu),
                }

            report.attempt(name + kind, case)


def resume(report: Reporter) -> None:
    """A run in two halves ends with the weights of a whole one, and a run can be repeated."""
    half = UPDATES // 2
    for name, small in some(report, "dense", "convolutions", "attention").items():
        for exact in (True,) if report.settings.tiny else (True, False):

            def case(small: Small = small, exact: bool = exact) -> dict[str, Any]:
                settings: dict[str, Any] = {
                    "dropout": 0.2,
                    "save_strategy": "steps",
                    "save_steps": half,
                    "full_determinism": exact,
                }
                with tempfile.TemporaryDirectory() as folder:
                    whole, parts = str(Path(folder, "whole")), str(Path(folder, "parts"))
                    full = train(report, small, folder=whole, **settings)
                    train(report, small, folder=parts, callbacks=[StopAt(half)], **settings)
                    rest = train(report, small, folder=parts, resume=True, **settings)
                    again = train(report, small, **settings) if exact else full
                resumed = apart(rest.weights, full.weights)
                repeated = apart(again.weights, full.weights)
                passed = not exact or resumed == repeated == 0.0
                found = (
                    {"resumed": resumed, "repeated": repeated} if exact else {"resumed": resumed}
                )
                return found | {"passed": passed}

            report.attempt(name + (", full_determinism" if exact else ""), case)


def precision(report: Reporter) -> None:
    """Half precision is near float32, and an overflow in float16 costs an update and no weight."""
    for name, small in some(report).items():
        single: list[Outcome] = []
        for dtype in ("bf16", "fp16"):
            settings: dict[str, Any] = {dtype: True}

            def case(
                small: Small = small, settings: Any = settings, single: list[Outcome] = single
            ) -> dict[str, Any]:
                single += [] if single else [train(report, small)]
                far = apart([train(report, small, **settings).losses], [single[0].losses])
                return {"losses apart": far, "passed": far <= HALF_PRECISION}

            report.attempt(f"{name}, {dtype}", case)

    small = small_models()["dense"]
    overflowing = small.x.copy()
    overflowing[24:32] = 6e4  # the fourth batch: its products are infinite in float16

    def overflow() -> dict[str, Any]:
        run = train(report, small, fp16=True, x=overflowing, on_nonfinite="skip")
        finite = all(np.isfinite(weight).all() for weight in run.weights)
        logged = int(np.isfinite(run.losses).sum())
        return {"finite losses": logged, "messages": run.messages, "passed": finite}

    report.attempt("an overflow in fp16", overflow)


def optimizers(report: Reporter) -> None:
    """Every optimizer of ``optim`` does on the device what it does on the CPU."""
    from optimizer_update import registered

    names = registered()
    small = small_models()["dense"]
    for name in ("adamw", "lion") if report.settings.tiny else names:

        def case(name: str = name) -> dict[str, Any]:
            here, cpu = (
                train(report, small, optim=name, use_cpu=on_cpu)
                for on_cpu in (not report.settings.on_gpu, True)
            )
            far, way = apart([here.losses], [cpu.losses]), way_apart(here, cpu)
            messages = [m for m in here.messages if "runs as a CUDA graph" not in m]
            found = {"losses apart": far, "of the way apart": way, "messages": messages}
            limit = WAY_OF_MATRICES if name.startswith(OF_MATRICES) else WAY
            return found | {"passed": way <= limit and not is_broken(messages)}

        report.attempt(name, case)


def devices(report: Reporter) -> None:
    """What only a device can answer: copies, counters, names, other GPUs."""
    from kbtrain import backends

    backend = backends.load()
    names = backend.devices()

    def facts() -> dict[str, Any]:
        found = {"device": backend.device_info(), "devices": ", ".join(names)}
        return found | {f"bytes {k}": v for k, v in backend.memory_stats().items()}

    def pinned() -> dict[str, Any]:
        """Pinned memory is not used again before it has been copied."""
        wrong, size = 0, 1 << (12 if report.settings.tiny else 24)
        for number in range(20):
            first = backend.to_device([np.full(size, float(number), "float32")], True)
            second = backend.to_device([np.full(size, -1.0, "float32")], True)
            found = np.asarray(backend.to_host(first)[0])
            wrong += int((found != number).any() or len(second) != 1)
        return {"wrong of 20": wrong, "passed": wrong == 0}

    def ordered() -> dict[str, Any]:
        """The memory of a result is not used again before it has come to the host."""
        wrong, variable = 0, keras.Variable(np.zeros(1 << 20, "float32"))
        for number in range(20):
            variable.assign(variable * 0 + float(number))
            wait = backend.start_to_host([variable.value + 0])
            variable.assign(variable.value * 0 - 1)
            wrong += int((np.asarray(wait()[0]) != number).any())
        return {"wrong of 20": wrong, "passed": wrong == 0}

    report.attempt("facts", facts)
    report.attempt("pinned memory", pinned)
    report.attempt("results on their way to the host", ordered)
    small = small_models()["dense"]
    for name in names if report.settings.on_gpu else names[:1]:

        def case(name: str = name) -> dict[str, Any]:
            run = train(report, small, devices=name, use_cpu=False)
            other = train(report, small, use_cpu=True)
            far = apart([run.losses], [other.losses])
            return {"losses apart": far, "messages": run.messages, "passed": far <= LIKE_CPU}

        report.attempt(f"devices={name!r}", case)
