"""The notebooks of docs/notebooks run, and show what their saved outputs show.

Each names a backend in its first cell and runs with that one.
"""

import importlib.util
import re

import keras
import pytest
from paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbclient, ipykernel, nbconvert")
for package in ("nbclient", "ipykernel"):
    pytest.importorskip(package, reason="needs nbclient, ipykernel, nbconvert")

BOOKS = {
    path.stem: nbformat.read(path, as_version=4)
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
}


def backend(book):
    return re.search(r'\["KERAS_BACKEND"\] = "(\w+)"', book.cells[1].source)[1]


MINE = [name for name, book in BOOKS.items() if backend(book) == keras.backend.backend()]


def shown(book):
    """What each cell shows: where, what kinds of content, its text without the numbers."""
    found = []
    for number, cell in enumerate(book.cells):
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                continue  # some packages say what else is not installed
            kinds = sorted(output.get("data", [output.get("name")]))
            text = output.get("text") or output["data"].get("text/plain", "")
            # What depends on the weights, or on the version of Python.
            first = "" if "varies" in cell.metadata.get("tags", ()) else text.partition("\n")[0]
            found.append((number, output.output_type, kinds, re.sub(r"[\d.,]+", "0", first)))
    return found


def columns(text):
    """The columns of a table of evaluations."""
    head, *rows = (line.split() for line in text.splitlines())
    return dict(zip(head, zip(*(row[: len(head)] for row in rows), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MINE)
def test_a_notebook_shows_what_is_saved_in_it(name):
    path = ROOT / "docs" / "reference" / "run_notebooks.py"
    spec = importlib.util.spec_from_file_location("run_notebooks", path)
    run_notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_notebooks)
    book = run_notebooks.run(ROOT / "docs" / "notebooks" / f"{name}.ipynb")
    assert shown(book) == shown(BOOKS[name])
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs]
    tables = [columns(text) for text in texts if text.startswith("step ")]
    assert tables
    for table in tables:
        losses = [float(loss) for loss in table["eval_loss"]]
        assert min(losses[1:]) < losses[0]


@pytest.mark.neutral
def test_notebooks_are_small_and_were_run_without_a_warning():
    assert {backend(book) for book in BOOKS.values()} == {"jax", "tensorflow", "torch"}
    for name, book in BOOKS.items():
        assert (ROOT / "docs" / "notebooks" / f"{name}.ipynb").stat().st_size < 60_000, name
        assert re.match(r"# .*\n", book.cells[0].source), name
        programs = [cell for cell in book.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in programs), name
        outputs = [output for cell in programs for output in cell.outputs]
        assert "error" not in {output.output_type for output in outputs}, name
        for output in outputs:
            assert "Warning" not in output.get("text", ""), name
