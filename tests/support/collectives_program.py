"""What two or three processes send each other; started by ``kbtrain launch`` on any backend.

Each writes what it received to a file, for tests/distributed/test_collectives.py.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
from keras import ops

from kbtrain import backends
from kbtrain.distributed import initialize

group = initialize()
backend = backends.load()
rank, size = group.rank, group.size


def numbers(tensors):
    """NumPy arrays of a dtype that holds the values of all others."""
    names = [keras.backend.standardize_dtype(t.dtype) for t in tensors]
    wide = ["int64" if "int" in name else "float64" for name in names]
    return [np.asarray(backend.to_host(ops.cast(t, d))) for t, d in zip(tensors, wide, strict=True)]


def as_lists(tensors):
    return [x.tolist() for x in numbers(tensors)]


def own(shape, dtype):
    """This process's tensor."""
    values = np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape) * (rank + 1)
    return ops.convert_to_tensor(values.astype("float32"), dtype)


SHAPES = [(), (3,), (0,), (2, 2)]


def exchange():
    messages = [
        b"",
        bytes([rank]),
        b"x" * (1019 + rank),  # the border between short and long messages
        bytes(range(256)) * (8 * rank),
        b"%d" % rank * (5000 + rank),
    ]
    return [[part.hex() for part in backend.exchange(message)] for message in messages]


def sums(dtype):
    step = backend.compile_step(backend.all_sum, [])
    tensors = [own(shape, dtype) for shape in SHAPES]
    return [as_lists(backend.all_sum(tensors)), as_lists(step(tensors))]


def mixed():
    dtypes = ["float32", "int32", "float16", "float32", "int64"]
    tensors = [own((2,), dtype) for dtype in dtypes]
    total = backend.all_sum(tensors)
    return [keras.backend.standardize_dtype(t.dtype) for t in total], as_lists(total)


def gathers(dtype):
    step = backend.compile_step(backend.all_gather, [])
    tensors = [own(shape, dtype) for shape in SHAPES]
    return [as_lists(backend.all_gather(tensors)), as_lists(step(tensors))]


def truth():
    flags = ops.convert_to_tensor(np.array([rank == 0, False, True]))
    (gathered,) = backend.all_gather([flags])
    return np.asarray(backend.to_host(gathered)).astype(int).tolist()


def gradient():
    weights = keras.Variable(np.array([1.0, -2.0], "float32"))
    factor = np.array([rank + 1.0, 2.0 * rank], "float32")

    def loss():
        total, other = backend.all_sum([weights * factor, ops.sum(weights)])
        return ops.sum(total * total) * (rank + 1) + other, ()

    def step(inputs):
        value, _, gradients, _ = backend.value_and_grad(loss, [weights])
        return value, gradients[0]

    return as_lists(backend.compile_step(step, [weights])(ops.zeros(1)))


def several():
    """Several operations in a step, several steps in a call, calls of different lengths."""
    state = keras.Variable(np.zeros(2, "float32"))
    counter = keras.Variable(0, dtype="int32", trainable=False)

    def step(x):
        first, last = backend.all_sum([x, x * x])
        (again,) = backend.all_sum([first + state])
        (gathered,) = backend.all_gather([last])
        (whole,) = backend.all_sum([ops.cast(counter, "int64") + rank])
        state.assign(again / 10 + ops.sum(gathered, 0))
        counter.assign(counter + 1)
        return ops.copy(state.value), whole

    run = backend.compile_steps(step, [state, counter])
    found = []
    for count in (3, 1, 2):
        block = ops.convert_to_tensor(np.arange(6, dtype="float32").reshape(3, 2) + rank)
        results, wholes = run(block, count)
        found.append([x[:count].tolist() for x in numbers([results, wholes])])
    return found


def rows():
    found = []
    for total in (5, 2, 1):
        batch = {
            "x": np.arange(2 * total, dtype="float32").reshape(total, 2),
            "y": np.arange(total),
        }
        block = backend.to_device(keras.tree.map_structure(lambda x: x[None], batch))
        one = keras.tree.map_structure(lambda t: t[0], block)
        with backend.local_rows(one) as taken:
            found.append(
                [taken.total, taken.start, taken.stop, taken.rows]
                + as_lists([taken.batch["x"], taken.batch["y"]])
            )
    return found


def copies():
    dtypes = ["float32", "bfloat16", "int32", "uint32", "bool", "float64"]
    values = [np.array([-0.0, 3.5, 7]) if rank == 0 else np.array([1, np.inf, 9]) for _ in dtypes]
    variables = [
        keras.Variable(
            ops.cast(np.abs(v) if "int" in d else v, d) if np.isfinite(v).all() else ops.ones(3, d),
            dtype=d,
            trainable=False,
        )
        for d, v in zip(dtypes, values, strict=True)
    ]
    backend.copy_from_first(variables)
    return [repr(x.tolist()) for x in numbers([ops.cast(v, "float64") for v in variables])]


if __name__ == "__main__":
    found = {
        "group": [rank, size],
        "joined": backend.joined_processes(),
        "shards": backend.shards(),
        "devices": backend.devices(),
        "exchange": exchange(),
    }
    if backend.shards() > 1:
        floats = ["float32", "float64", "float16", "bfloat16"]
        found["sums"] = {d: sums(d) for d in [*floats, "int32", "int64"]}
        found["gathers"] = {d: gathers(d) for d in [*floats, "int32", "uint8"]}
        found |= {f.__name__: f() for f in (mixed, truth, gradient, several, rows, copies)}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
