"""Write the data of the configurations in this folder, without a download.

Run it with ``python examples/configs/make_data.py``, then ``kbtrain train
examples/configs/digits.yaml``, or one of the others. It needs the extra ``examples``. The files go
into ``data``: handwritten digits of scikit-learn as a table and as images, docstrings of Python's
own packages, and the text of Python's documentation.
"""

from __future__ import annotations

import ast
import json
import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

import matplotlib.image
import numpy as np
from sklearn.datasets import load_digits

PACKAGES = ("asyncio", "email", "http", "multiprocessing", "unittest", "xml")


def write_digits(folder: Path, images: int = 600) -> None:
    """The 1,797 digits as ``digits.csv``, and some as images in a folder for each of the ten."""
    digits = load_digits(as_frame=True)
    digits.frame.rename(columns={"target": "digit"}).to_csv(folder / "digits.csv", index=False)
    for number in range(images):
        image, digit = digits.images[number], digits.target[number]
        path = folder / "digits" / str(digit) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.repeat((image[..., None] * 255 / 16).astype("uint8"), 3, axis=-1)
        matplotlib.image.imsave(path, pixels)


def write_docstrings(folder: Path) -> None:
    """The docstrings of six packages, each with the name of its package."""
    lines = []
    for package in PACKAGES:
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if len(text) > 40:
                        lines.append(json.dumps({"text": text, "package": package}))
    (folder / "docstrings.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(folder: Path, images: int = 600) -> None:
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_digits(folder, images)
    write_docstrings(folder)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    (folder / "topics.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["data"]))
