"""Peak memory of one update, for every optimizer of ``optim``, each in a separate process.

    python benchmarks/optimizer_memory.py --backend torch

Peaks are reported by Linux (``VmHWM``, reset before the measured update), on a GPU by PyTorch's or
XLA's allocator. Columns: state in bytes per parameter, then the peak that an update adds, in MiB
and relative to the parameters' float32 size. A full copy of the parameters is 1.00.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BACKENDS = ("torch", "tensorflow", "jax")


def measured(name: str, layers: int, dtype: str) -> dict[str, float]:
    """State and peak of one optimizer, in this process."""
    import keras
    import optimizer_update as tools

    import optim

    shapes = tools.SHAPES * layers
    values = sum(a.size for a in tools.arrays(0, shapes))
    forms, _ = tools.TOOLS[keras.backend.backend()](shapes)
    optimizer = optim.get(name, learning_rate=1e-3, **tools.ARGUMENTS.get(name, {}))
    form = next(iter(forms.values()))
    keras.config.set_floatx(dtype)
    candidate = tools.through_keras(shapes, form, optimizer)
    for _ in range(2):
        candidate.step()
        candidate.wait()
    extra = tools.extra_memory(candidate)
    return {
        "state_bytes_per_parameter": candidate.state / values,
        "extra_mib": float("nan") if extra is None else extra,
        "share_of_parameters": float("nan") if extra is None else extra * 2**20 / (4 * values),
    }


def in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
    command += ["--layers", str(arguments.layers), "--dtype", arguments.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default=None)
    parser.add_argument("--optimizers", nargs="*", default=None, help="names; all by default")
    parser.add_argument("--layers", type=int, default=2, help="of 3.1 million parameters each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.backend is not None:
        os.environ["KERAS_BACKEND"] = arguments.backend  # Keras reads it on import
    if arguments.one is not None:
        print(json.dumps(measured(arguments.one, arguments.layers, arguments.dtype)))
        return
    from optimizer_update import registered

    print(f"{'':22} state B  extra MiB  share of parameters", flush=True)
    for name in arguments.optimizers or registered():
        row = in_a_process(name, arguments)
        print(
            f"{name:22} {row['state_bytes_per_parameter']:7.2f} {row['extra_mib']:10.1f} "
            f"{row['share_of_parameters']:20.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
