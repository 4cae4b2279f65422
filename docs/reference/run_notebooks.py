"""Run the notebooks of docs/notebooks, each in a kernel of its own, and keep what they show.

    PYTHONPATH=$PWD python docs/reference/run_notebooks.py [NAME ...]

A notebook names its backend in its first cell. It needs nbclient and ipykernel.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).parents[1] / "notebooks"
NOT_FOR_KERNELS = {"KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL"}


def environment() -> dict[str, str]:
    """That of a kernel: without this terminal's choice of a backend and of messages."""
    kept = {name: os.environ[name] for name in os.environ.keys() - NOT_FOR_KERNELS}
    return kept | {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm's, without ipywidgets


def sockets(folder: str) -> Config:
    """Settings of a kernel that talks through files in a folder, where the system can do that.

    Another program could take a port between its choice here and its use by the kernel.
    """
    if os.name != "posix":
        return Config()
    return Config({"KernelManager": {"transport": "ipc", "ip": os.path.join(folder, "kernel")}})


def run(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in an empty folder.

    Args:
        path: The file, which stays as it is.

    Returns:
        The notebook with its outputs and without what differs in every run.
    """
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as own:
        NotebookClient(
            book,
            config=sockets(own),
            timeout=300,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute(env=environment())
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            output.pop("transient", None)
    book.metadata.pop("widgets", None)
    return book


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            start = time.perf_counter()
            nbformat.write(run(path), path)
            print(f"{path.stem}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
