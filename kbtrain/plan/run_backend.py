"""The backend of a planned run, as far as it does something else than JAX, which compiles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kbtrain.config.training_args import TrainingArguments
from kbtrain.distributed import placement


@dataclass(frozen=True)
class RunBackend:
    """What a plan has to know of the backend of a run.

    Attributes:
        name: Its name.
        title: Its name in sentences.
        divides_weights: Whether ``fsdp`` can divide weights; else a process has all weights, and
            the optimizer's state is divided by whole variables.
        tf32: Whether products in float32 use TensorFloat-32 if the arguments do not say; None: as
            JAX does it in this process.
    """

    name: str = "jax"
    title: str = "JAX"
    divides_weights: bool = True
    tf32: bool | None = None

    @property
    def fsdp(self) -> Literal["full_shard", "shard_grad_op"]:
        """The most that it can divide, as the value of ``fsdp``."""
        return "full_shard" if self.divides_weights else "shard_grad_op"

    def check_division(self, args: TrainingArguments) -> None:
        """Check that it can divide state as the arguments say.

        Raises:
            ConfigurationError: It cannot: the run would raise the same.
        """
        if not self.divides_weights:
            placement.refuse_division(self.name, args)


JAX = RunBackend()
_KNOWN = {
    "jax": JAX,
    "torch": RunBackend("torch", "PyTorch", divides_weights=False, tf32=False),
    "tensorflow": RunBackend("tensorflow", "TensorFlow", divides_weights=False, tf32=True),
}


def run_backend(name: str) -> RunBackend:
    """The backend of a name, with the settings that it starts with."""
    return _KNOWN.get(name) or RunBackend(name, name)
