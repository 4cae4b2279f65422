"""What two or three processes send each other; started on any backend.

Each writes what it received to a file, for tests/distributed/test_collectives.py.
"""

import json
import sys
from pathlib import Path

from kbtrain.distributed import initialize

group = initialize()

import keras  # noqa: E402 - after the processes have joined
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402

from kbtrain import backends  # noqa: E402

backend = backends.load()
rank, size = group.rank, group.size
SHAPES = [(), (3,), (0,), (2, 2)]


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


def exchange():
    messages = [
        b"",
        bytes([rank]),
        b"x" * (1019 + rank),  # the border between short and long messages on TensorFlow
        b"x" * (1020 + rank),
        bytes(range(256)) * (8 * rank),
        b"%d" % rank * (5000 + 2 * rank),
    ]
    return [[part.hex() for part in backend.exchange(message)] for message in messages]


def eagerly_and_in_a_step(function, dtype):
    tensors = [own(shape, dtype) for shape in SHAPES]
    step = backend.compile_step(function, [])
    return [as_lists(function(tensors)), as_lists(step(tensors))]


def mixed():
    tensors = [own((2,), d) for d in ("float32", "int32", "float16", "float32", "int64")]
    total = backend.all_sum(tensors)
    return [keras.backend.standardize_dtype(t.dtype) for t in total], as_lists(total)


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
    block = ops.convert_to_tensor(np.arange(6, dtype="float32").reshape(3, 2) + rank)
    return [[x[:count].tolist() for x in numbers(run(block, count))] for count in (3, 1, 2)]


def rows():
    found = []
    for total in (5, 2, 1):
        x = np.arange(2 * total, dtype="float32").reshape(total, 2)
        block = backend.to_device({"x": x[None], "y": np.arange(total)[None]})
        with backend.local_rows(keras.tree.map_structure(lambda t: t[0], block)) as taken:
            place = [taken.total, taken.start, taken.stop, taken.rows]
            found.append(place + as_lists([taken.batch["x"], taken.batch["y"]]))
    return found


def copies():
    signed, whole = ([-0.0, 3.5, 7.0], [0, 3, 7]) if rank == 0 else ([1.0, 2.0, 9.0], [1, 2, 9])
    given = {"float32": signed, "bfloat16": signed, "int32": whole, "uint32": whole}
    given |= {"bool": [not rank and v > 0 for v in whole], "float64": signed}
    variables = [
        keras.Variable(ops.convert_to_tensor(np.array(values), dtype), dtype=dtype, trainable=False)
        for dtype, values in given.items()
    ]
    backend.copy_from_first(variables)
    return [repr(x.tolist()) for x in numbers([ops.cast(v, "float64") for v in variables])]


found = {
    "group": [rank, size],
    "joined": backend.joined_processes(),
    "shards": backend.shards(),
    "devices": backend.devices(),
    "exchange": exchange(),
}
if backend.shards() > 1:
    floats = ["float32", "float64", "float16", "bfloat16"]
    found["sums"] = {
        d: eagerly_and_in_a_step(backend.all_sum, d) for d in (*floats, "int32", "int64")
    }
    found["gathers"] = {
        d: eagerly_and_in_a_step(backend.all_gather, d) for d in (*floats, "int32", "uint8")
    }
    found |= {f.__name__: f() for f in (mixed, truth, gradient, several, rows, copies)}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
