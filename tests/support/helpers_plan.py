"""Programs for the tests of plans: made up, with sizes that are easy to compute."""

import keras
import numpy as np

from kbtrain import Trainer, TrainingArguments
from kbtrain.plan.program import ProgramFacts

GIB = 2**30
STATE, SAMPLE = 10 * GIB, 2 * GIB


def made_up(trainer, *, device, count, changes, backend=None):
    """10 GiB of state and 2 GiB a sample; what arguments do to them is simple.

    Recomputing needs a quarter of the activations and 1.5 times the operations, bfloat16 half of
    both, an 8-bit optimizer 5 GiB less, fsdp a part of the state and twice the bytes sent.
    """
    args = trainer.args.replace(**changes)
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    half = 0.5 if args.bf16 or args.fp16 else 1
    state = STATE - (STATE // 2 if args.optim.endswith("8bit") else 0)
    state //= count if args.fsdp else 1
    activations = int(batch * SAMPLE * half * (0.25 if args.gradient_checkpointing else 1))
    flops = batch * steps * 1e12
    again = 1.5 if args.gradient_checkpointing else 1
    samples = batch * steps * count
    return ProgramFacts(
        compiled_for=device.name,
        device_count=count,
        batch_size=samples,
        accumulation=steps,
        samples=samples,
        tokens=128 * samples,
        parameters=1000,
        parameter_bytes=state // 4,
        trainable_bytes=state // 4,
        gradient_bytes=state // 4,
        optimizer_bytes=state // 2,
        other_state_bytes=16,
        batch_bytes=4 * samples,
        temporary_bytes=activations,
        program_bytes=0,
        peak_bytes=state + activations,
        flops=flops,
        program_flops=flops * again,
        bytes_accessed=activations * 4,
        collectives={} if count == 1 else {"all-reduce": (1, (2 if args.fsdp else 1) * GIB)},
        exact={"state": "compiled: shapes", "memory": "made up"},
    )


def make_trainer(folder, **changes):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="net")
    args = TrainingArguments(
        **{"output_dir": str(folder), "per_device_train_batch_size": 8, "report_to": "none"}
        | changes
    )
    data = np.zeros((16, 4), "float32"), np.zeros((16, 2), "float32")
    return Trainer(model, args, train_dataset=data, loss="mse")
