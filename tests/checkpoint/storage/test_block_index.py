"""Blocks make up their array exactly, or what is missing or double is named."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.checkpoint.storage.array_index import ArrayOutline
from kbtrain.checkpoint.storage.block_index import (
    ArrayEntry,
    StoredBlock,
    entry_to_json,
    find_misfit,
    parse_arrays,
)
from kbtrain.utils.files.filesystem import FileEntry

QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)
FILES = {
    "model-p00000.h5": FileEntry(1000, "0" * 64, "model"),
    "model-p00001.h5": FileEntry(1000, "0" * 64, "model"),
    "other-p00000.h5": FileEntry(1000, "0" * 64, "other"),
}


def counted(shape, blocks):
    """How many blocks hold each element."""
    held = np.zeros(shape, int)
    for start, extent in blocks:
        held[tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))] += 1
    return held


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))

    def box():
        start = tuple(draw(st.integers(0, n - 1)) for n in shape)
        return start, tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, start, strict=True))

    return shape, [box() for _ in range(draw(st.integers(0, 5)))]


@given(boxes())
@QUICK
def test_the_first_element_that_is_missing_or_double_is_named(case):
    shape, blocks = case
    held = counted(shape, blocks)
    problem = find_misfit(shape, blocks)
    if (held == 1).all():
        assert problem is None
    else:
        first = min(map(tuple, np.argwhere(held != 1).tolist()))
        state = "no block holds" if held[first] == 0 else "two blocks hold"
        assert problem == f"{state} its element {list(first)}"


def pieces(length, parts):
    edges = np.linspace(0, length, parts + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("parts", [(1, 1, 1), (4, 1, 1), (2, 3, 1), (3, 5, 2)])
def test_grids_are_accepted_and_each_of_their_blocks_is_needed(parts):
    shape = (7, 6, 2)
    cells = itertools.product(*(pieces(n, p) for n, p in zip(shape, parts, strict=True)))
    blocks = [
        (tuple(first for first, _ in cell), tuple(last - first for first, last in cell))
        for cell in cells
    ]
    assert find_misfit(shape, blocks) is None
    for i in range(len(blocks)):
        missing, start = blocks[:i] + blocks[i + 1 :], list(blocks[i][0])
        assert find_misfit(shape, missing) == f"no block holds its element {start}"
        twice = [*blocks, blocks[i]]
        assert find_misfit(shape, twice) == f"two blocks hold its element {start}"


def test_a_pinwheel_that_no_cut_divides():
    blocks = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1))]
    assert find_misfit((3, 3), blocks) == "no block holds its element [1, 1]"
    assert find_misfit((3, 3), [*blocks, ((1, 1), (1, 1))]) is None


def test_arrays_without_elements_need_no_block():
    assert find_misfit((0, 3), []) is None
    assert find_misfit((0, 3), [((0, 0), (0, 3)), ((0, 0), (0, 3))]) is None
    assert find_misfit((), [((), ())]) is None
    assert "no block" in find_misfit((), [])


def test_a_hundred_thousand_blocks_take_no_time():
    blocks = [((i, 0), (1, 8)) for i in range(100_000)]
    assert find_misfit((100_000, 8), blocks) is None
    assert find_misfit((100_000, 8), blocks[1:]) == "no block holds its element [0, 0]"


def test_too_many_axes_are_refused():
    half = ((0,) * 9, (1,) * 9)
    assert "divided along 9 axes" in find_misfit((2,) * 9, [half])


def entry(**changes):
    blocks = changes.pop("blocks", None) or [
        ["model-p00000.h5", [0, 0], [2, 3], 100, 7],
        ["model-p00001.h5", [2, 0], [2, 3], 200, 8],
    ]
    return {"name": "w", "dtype": "float32", "shape": [4, 3], "blocks": blocks} | changes


def block(**changes):
    value = {"file": "model-p00000.h5", "start": [0, 0], "shape": [4, 3], "offset": 0, "crc": 1}
    return list((value | changes).values())


def test_a_list_comes_back():
    whole = {"name": "b", "dtype": "bfloat16", "shape": []}
    arrays = parse_arrays({"model": [whole, entry()], "other": []}, FILES)
    assert arrays == {
        "model": [
            ArrayEntry(ArrayOutline("b", "bfloat16", ())),
            ArrayEntry(
                ArrayOutline("w", "float32", (4, 3)),
                (
                    StoredBlock("model-p00000.h5", (0, 0), (2, 3), 100, 7),
                    StoredBlock("model-p00001.h5", (2, 0), (2, 3), 200, 8),
                ),
            ),
        ],
        "other": [],
    }
    assert [entry_to_json(one) for one in arrays["model"]] == [whole, entry()]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "not a mapping"),
        ({"model": {}}, "not a list"),
        ({"model": [3]}, "not a mapping"),
        ({"model": [entry(), entry()]}, "does not hold|listed twice"),
        ({"model": [{**entry(), "blocks": None}] * 2}, "listed twice"),
        ({"model": [entry(name=3)]}, "it lists 3"),
        ({"model": [entry(dtype="float31")]}, "float31"),
        ({"model": [entry(dtype=["float32"])]}, "float32"),
        ({"model": [entry(shape=[4, -3])]}, "cannot have the shape"),
        ({"model": [entry(shape=[2**40, 2**40])]}, "cannot have the shape"),
        ({"model": [entry(shape="43")]}, "cannot have the shape"),
        ({"model": [entry(shape=[1] * 33)]}, "cannot have the shape"),
        ({"model": [entry(blocks={"a": 1})]}, "are not a list"),
        ({"model": [entry(blocks=[3])]}, "is not valid"),
        ({"model": [entry(blocks=[block(file="x.h5")])]}, "is not valid"),
        ({"model": [entry(blocks=[block(file="other-p00000.h5")])]}, "is not valid"),
        ({"model": [entry(blocks=[block(file=["model-p00000.h5"])])]}, "is not valid"),
        ({"model": [entry(blocks=[block(start=[0])])]}, "is not valid"),
        ({"model": [entry(blocks=[block(start=[0, -1])])]}, "is not valid"),
        ({"model": [entry(blocks=[block(start=[1, 0])])]}, "is not valid"),
        ({"model": [entry(blocks=[block(offset=1.0)])]}, "is not valid"),
        ({"model": [entry(blocks=[block(crc=None)])]}, "is not valid"),
        ({"model": [entry(blocks=[block(offset=953)])]}, "does not hold the block"),
        ({"model": [entry(blocks=[block(shape=[3, 3])])]}, r"no block holds its element \[3, 0\]"),
        ({"model": [entry(shape=[40, 3], blocks=[block()] * 21)]}, "does not hold the block"),
    ],
)  # fmt: skip
def test_a_list_that_kbtrain_did_not_write_is_refused(value, said):
    with pytest.raises(ValueError, match=said):
        parse_arrays(value, FILES)
