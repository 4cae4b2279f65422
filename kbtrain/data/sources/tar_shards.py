"""Samples in tar files, laid out as WebDataset does, read by index."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain.errors import DataError, first_lines
from kbtrain.utils.packages.optional_imports import require

Decoder = Callable[[bytes], Any]


def _image(data: bytes) -> np.ndarray:
    image = require("PIL.Image", "images", "Decoding an image of a tar shard")
    return np.array(image.open(io.BytesIO(data)).convert("RGB"))


def _array(data: bytes) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


DECODERS: Mapping[str, Decoder] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp"), _image),
    **dict.fromkeys(("cls", "cls2", "index"), int),
    **dict.fromkeys(("id", "txt", "text", "transcript"), bytes.decode),
    "json": json.loads,
    "npy": _array,
}
"""What the files of a sample become, by the last part of their extension: images are RGB uint8.

Unlike in WebDataset, ``id`` is text: not all are numbers, and zeros in front count.
"""


class TarShards:
    """Tar files in the layout of WebDataset, as a data set with a length and an index.

    Files in a row whose names differ only after the first dot are a sample: ``0001.jpg`` and
    ``0001.cls`` become ``{"jpg": array, "cls": 3}``. The headers of all files are read once, at
    the start. After that a sample is one read at a known place, so the order is shuffled over all
    shards (not within a buffer), a resumed run continues without reading what came before, and
    worker processes (``dataloader_num_workers``) share the work of decoding.

    Args:
        paths: The files: a list, a glob pattern (``"train-*.tar"``), or numbers in braces
            (``"train-{0000..0099}.tar"``).
        transform: Makes a sample of the dict of a sample's decoded files; by default that is the
            sample. It runs in the workers.
        decoders: Extension -> function of the bytes, beside or in place of ``DECODERS``. What has
            no decoder stays bytes.

    Raises:
        DataError: There is no such file, one is compressed, no tar file or not laid out like this,
            or there are no samples. When a sample is read: a file was changed since, or cannot be
            decoded.

    Example:
        >>> import io, tarfile, tempfile
        >>> path = tempfile.mktemp(suffix=".tar")
        >>> with tarfile.open(path, "w") as tar:
        ...     for name, content in (("7.txt", b"seven"), ("7.cls", b"7"), ("8.cls", b"8")):
        ...         entry = tarfile.TarInfo(name)
        ...         entry.size = len(content)
        ...         tar.addfile(entry, io.BytesIO(content))
        >>> shards = TarShards(path)
        >>> len(shards), shards[0], shards[1]
        (2, {'txt': 'seven', 'cls': 7}, {'cls': 8})
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        transform: Callable[[dict[str, Any]], Any] | None = None,
        decoders: Mapping[str, Decoder] | None = None,
    ) -> None:
        self.paths = _expanded(paths)
        self._transform = transform
        self._decoders = {**DECODERS, **(decoders or {})}
        self._extensions: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._open: dict[int, int] = {}
        self._read_headers()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Any:
        """Return a sample, decoded."""
        index = range(len(self))[index]
        sample = {}
        for place in range(self._starts[index], self._starts[index + 1]):
            shard, kind, offset, size = (int(value) for value in self._files[place])
            data = os.pread(self._descriptor(shard), size, offset)
            name = self._extensions[kind]
            if len(data) < size:
                raise DataError(f"{self.paths[shard]} is shorter than it was: cannot read .{name}.")
            try:
                sample[name] = self._decoded(name, data)
            except Exception as error:  # a decoder may raise anything
                member = _member_at(self.paths[shard], offset) or f".{name}"
                raise DataError(
                    f"{self.paths[shard]}: {member} cannot be decoded "
                    f"({type(error).__name__}: {first_lines(error)}). What else the files .{name} "
                    f"are to become: decoders={{{name!r}: function}}."
                ) from error
        return sample if self._transform is None else self._transform(sample)

    def _decoded(self, name: str, data: bytes) -> Any:
        decoder = self._decoders.get(name) or self._decoders.get(name.rpartition(".")[2].lower())
        return data if decoder is None else decoder(data)

    def _read_headers(self) -> None:
        """Find the place of every file: rows of (shard, extension, offset, size)."""
        kinds: dict[str, int] = {}
        files, starts = [], [0]
        for shard, path in enumerate(self.paths):
            former, seen, extensions = None, set[tuple[str, str]](), set[str]()
            for name, offset, size in _members(path):
                folder, _, base = name.rpartition("/")
                key, dot, extension = base.partition(".")
                if not dot or not key:
                    continue  # as in WebDataset: a hidden file, or one without an extension
                if former != (sample := (folder, key)):
                    if sample in seen:
                        raise DataError(
                            f"{path}: {name} comes after files of another sample. The files of a "
                            "sample must be next to each other: tar --sort=name."
                        )
                    if former is not None:
                        starts.append(len(files))
                    former, extensions = sample, set()
                    seen.add(sample)
                if extension in extensions:
                    raise DataError(
                        f"{path}: there are two files {name}. A sample has one of each extension."
                    )
                extensions.add(extension)
                files.append((shard, kinds.setdefault(extension, len(kinds)), offset, size))
            if former is not None:
                starts.append(len(files))
            self._sizes.append(_size_and_time(os.stat(path)))
        if not files:
            raise DataError(
                "There is no sample: none of the files has a member with a name such as 0001.jpg. "
                f"Received: {[str(path) for path in self.paths]}"
            )
        self._extensions = list(kinds)
        self._files = np.array(files, np.int64)
        self._starts = np.array(starts, np.int64)

    def _descriptor(self, shard: int) -> int:
        """The open file of a shard; reading at a place moves no position, so threads may share."""
        path = self.paths[shard]
        try:
            if shard not in self._open:
                self._open[shard] = os.open(path, os.O_RDONLY)
            status = os.fstat(self._open[shard])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        if _size_and_time(status) != self._sizes[shard]:
            raise DataError(
                f"{path} was changed since its headers were read. Create TarShards again."
            )
        return self._open[shard]

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process, which opens the files itself."""
        return {**self.__dict__, "_open": {}}


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    """What a file has that changes when it is written or replaced."""
    return status.st_size, status.st_mtime_ns


def _member_at(path: Path, offset: int) -> str | None:
    """The name of the file at a place of a tar file, for a message."""
    found = (name for name, at, _ in _members(path) if at == offset)
    try:
        return next(found, None)
    except DataError:
        return None


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the regular files in a tar file.

    Raises:
        DataError: It cannot be read, or is no tar file.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.isfile() and not entry.issparse():
                    yield entry.name, entry.offset_data, entry.size
            # tarfile takes a header that is damaged for the end.
            if any(os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)):
                raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except tarfile.TarError as error:
        raise DataError(
            f"{path} is no tar file that can be read by index ({error}). A compressed one has to "
            "be unpacked: gunzip shard.tar.gz."
        ) from error


def _expanded(paths: Any) -> list[Path]:
    """The files of a list, a glob pattern, or a pattern with numbers in braces.

    Raises:
        DataError: There is none.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise DataError(f"TarShards needs at least one file. Received: {paths!r}")
    found: list[Path] = []
    for one in given:
        for pattern in _braces(os.fspath(one)):
            exists = os.path.exists(pattern)
            matches = [pattern] if exists else sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise DataError(f"There is no file {pattern}. Received: {paths!r}")
            found += map(Path, matches)
    return [path.absolute() for path in found]


def _braces(pattern: str) -> Iterable[str]:
    """``a-{008..010}`` as ``a-008``, ``a-009``, ``a-010``, as in a shell."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [rest for number in numbers for rest in _braces(f"{before}{number}{after}")]
