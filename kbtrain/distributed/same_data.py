"""Whether all processes have the same data: each computes its rows of batches that all have."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator
from typing import Any

import numpy as np

from kbtrain.backends.protocol import Backend
from kbtrain.data import Block, Loader
from kbtrain.data.batch import named_leaves
from kbtrain.distributed import host
from kbtrain.errors import DistributedError
from kbtrain.utils.machine.processes import current


def described(batch: Any) -> dict[str, str]:
    """What each array of a batch is, with a checksum of what it holds."""
    return {str(name): _described(leaf) for name, leaf in named_leaves(batch)}


def _described(leaf: Any) -> str:
    array = np.ascontiguousarray(leaf)
    data = repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes()
    checksum = hashlib.sha256(data).hexdigest()[:12]
    return f"{array.dtype}{list(array.shape)}, SHA-256 {checksum}"


def checked(
    backend: Backend, loader: Loader, blocks: Generator[Block, None, None]
) -> Generator[Block, None, None]:
    """The blocks, compared with those of the other processes where only reading shows their number.

    A stream may end earlier in one process, or give it other samples. The others would wait for it
    in a collective operation.

    Args:
        backend: The backend in use.
        loader: Where the blocks come from. One of known length was compared before.
        blocks: The blocks.

    Raises:
        DistributedError: They differ; it is raised in all processes.
    """
    if current().size == 1 or loader.sized:
        return blocks
    return _checked(backend, getattr(loader, "name", "the data"), blocks)


def _checked(
    backend: Backend, name: str, blocks: Generator[Block, None, None]
) -> Generator[Block, None, None]:
    with contextlib.closing(blocks):
        for number in range(1 << 62):
            block = next(blocks, None)
            found = host.gather(backend, None if block is None else _of_block(block), name)
            for rank, other in enumerate(found):
                if other != found[0]:
                    raise DistributedError(
                        f"{name} is not the same on all processes: after {number} blocks of "
                        f"batches process 0 has {_short(found[0])}, process {rank} "
                        f"{_short(other)}. Every process must read the same samples in the same "
                        "order; kbtrain gives each its rows of every batch."
                    )
            if block is None:
                return
            yield block


def _of_block(block: Block) -> list[dict[str, str]]:
    return [described(batch) for chunk in block.chunks for batch in chunk.values()]


def _short(found: list[dict[str, str]] | None) -> str:
    return "no more data" if found is None else f"{found!r:.150}"
