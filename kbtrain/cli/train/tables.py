"""Files of ``kbtrain train`` as tables and lists of images, read by the libraries for them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from kbtrain.cli.train.settings import Settings
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.utils.packages.optional_imports import require

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
TABLES = ("table", "dataset")
"""The kinds that are read as a table."""
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def kind_of(settings: Settings, name: str) -> str:
    """What a path of the section data holds: "table", "images", "dataset" or "text".

    Args:
        settings: The settings.
        name: ``train``, ``eval`` or ``test``.

    Raises:
        ConfigurationError: There is no such file, or it has another format.
    """
    written = getattr(settings.data, name)
    path = Path(written).expanduser()
    place = ("data", name)
    if not path.exists():
        raise settings.error(place, f"there is no {written!r} here, in {Path.cwd()}.")
    if path.is_file() and path.suffix.lower() in _SUFFIXES:
        return "table"
    if path.is_file() and path.suffix.lower() in (".txt", ".md"):
        return "text"
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = ", ".join(str(path / p.name) for p in sorted(path.iterdir()) if p.is_dir())
            raise settings.error(place, f"{written} holds several sets. Name one: {splits}.")
        if (path / "state.json").exists():
            return "dataset"
        if any(p.is_dir() for p in path.iterdir()):
            return "images"
    raise settings.error(
        place,
        f"{written} is none of: a table ({', '.join(_SUFFIXES)}), a text (.txt), a folder with a "
        "folder of images for each class, a data set saved to disk by the package datasets.",
    )


def read_table(settings: Settings, name: str) -> tuple[Any, list[str] | None]:
    """A table as a data frame, and the names of its classes if the file has them.

    Raises:
        ConfigurationError: It cannot be read, or a package is missing.
    """
    path = Path(getattr(settings.data, name)).expanduser()
    pandas = require("pandas", "train", "A table")
    if kind_of(settings, name) == "dataset":
        data = require("datasets", "datasets", "A data set on disk").load_from_disk(str(path))
        column = data.features.get(settings.data.label)
        return _with_rows(settings, name, data.to_pandas()), getattr(column, "names", None)
    try:
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            table = pandas.read_json(path, lines=True)
        elif suffix == ".parquet":
            require("pyarrow", "train", "A Parquet file")
            table = pandas.read_parquet(path)
        else:
            table = pandas.read_csv(path, sep="\t" if suffix == ".tsv" else ",")
    except ConfigurationError:
        raise
    except (ValueError, OSError) as problem:  # of pandas and pyarrow alike
        raise settings.error(("data", name), f"{path} cannot be read: {problem}") from None
    if len(table.columns) == 1 and ";" in (only := str(table.columns[0])):
        raise settings.error(
            ("data", name),
            f"{path} has one column, {only[:20]!r}...: it is separated by semicolons. Write it "
            "with commas, or as a .tsv with tabs.",
        )
    return _with_rows(settings, name, table), None


def _with_rows(settings: Settings, name: str, table: Any) -> Any:
    if not len(table):
        path = getattr(settings.data, name)
        raise settings.error(("data", name), f"{path} has no rows.")
    return table


def column(settings: Settings, name: str, table: Any, wanted: str, place: str) -> Any:
    """A column of a table.

    Raises:
        ConfigurationError: There is none of that name, or it has gaps.
    """
    if wanted not in table.columns:
        names = list(map(str, table.columns))
        close = difflib.get_close_matches(wanted, names, n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        path = getattr(settings.data, name)
        raise settings.error(
            ("data", place), f"{path} has no column {wanted!r}. {meant}It has: {listed}."
        )
    found = table[wanted]
    if gaps := int(found.isna().sum()):
        raise settings.error(
            ("data", name),
            f"column {wanted!r} has no value in {gaps} of {len(found)} rows. Fill them, or leave "
            "the rows out.",
        )
    return found


class ImageFolder:
    """Images in a folder for each class, read one at a time.

    Args:
        files: Path and label of each image.
        size: Height and width that they are resized to.
        prepare: What is done with the array of an image.
    """

    def __init__(self, files: list[tuple[Path, int]], size: list[int], prepare: Any) -> None:
        self.files, self.size, self.prepare = files, size, prepare

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Image and label: pixels from 0 to 255, before ``prepare``."""
        import keras
        import numpy as np

        path, label = self.files[index]
        try:
            image = keras.utils.load_img(path, target_size=tuple(self.size))
        except OSError as problem:
            raise DataError(f"{path} cannot be read as an image: {problem}") from None
        return self.prepare(keras.utils.img_to_array(image)), np.int32(label)


def image_files(settings: Settings, name: str) -> tuple[list[tuple[Path, str]], list[str]]:
    """The images of a folder with their classes, and the names of all classes.

    Raises:
        ConfigurationError: There is none.
    """
    require("PIL", "train", "Reading images")
    root = Path(getattr(settings.data, name)).expanduser()
    files = [
        (path, folder)
        for folder in sorted(p.name for p in root.iterdir() if p.is_dir())
        for path in sorted((root / folder).rglob("*"))
        if path.suffix.lower() in IMAGES
    ]
    if not files:
        raise settings.error(
            ("data", name), f"{root} has no images ({', '.join(IMAGES)}) in its folders."
        )
    return files, sorted({folder for _, folder in files})  # an empty folder is no class
