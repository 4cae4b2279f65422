"""Files at an address, through fsspec: every operation is tried again after a passing error."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from kbtrain.errors import ConfigurationError
from kbtrain.utils.files.addresses import check_address, normalised, scheme_of
from kbtrain.utils.packages.optional_imports import require

logger = logging.getLogger("kbtrain")

T = TypeVar("T")

ATTEMPTS = 5
"""How often an operation is tried; between two tries the pause doubles, from a second on."""

PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "oci": "ocifs", "oss": "ossfs",
}  # fmt: skip
"""Scheme -> the package that brings its file system, for the error that names it."""

# Errors that say what is the case. All others, of whatever library, may be over in a moment.
_DEFINITE = (
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    NotImplementedError,
    TypeError,
    AttributeError,
)


class RemoteFiles:
    """The files of a run at an address. Paths are relative to it, with ``/``.

    Errors are ``OSError``s: a ``FileNotFoundError`` if something is not there, and what remained
    of any other library's error after the last try.

    Args:
        address: ``scheme://place``.

    Raises:
        ConfigurationError: fsspec does not know the scheme, a package is missing, or the address
            holds a password.

    Attributes:
        tries: How often an operation is tried.
    """

    def __init__(self, address: str) -> None:
        check_address("address", address)
        self.address = normalised(address)
        self.tries = ATTEMPTS
        self._fs, self._root = _open(self.address)

    def names(self, folder: str = "") -> dict[str, int | None]:
        """The names in a folder and the sizes of files, None for folders; empty without it."""
        path = self._path(folder)

        def ls() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()  # of listings: other machines write here as well
            return list(self._fs.ls(path, detail=True))

        try:
            listed = self._retried(ls)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        for entry in listed:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if str(entry["name"]).strip("/") != path.strip("/"):  # itself: a marker of the folder
                found[name] = None if entry["type"] == "directory" else int(entry["size"] or 0)
        return found

    def sizes(self, folder: str) -> dict[str, int]:
        """Path relative to a folder -> size, of all files in it and below; empty without it."""
        found: dict[str, int] = {}
        for name, size in self.names(folder).items():
            if size is not None:
                found[name] = size
            else:
                inside = self.sizes(f"{folder}/{name}")
                found |= {f"{name}/{path}": size for path, size in inside.items()}
        return found

    def read(self, path: str) -> bytes:
        """The content of a file."""
        return bytes(self._retried(lambda: self._fs.cat_file(self._path(path))))

    def modified(self, path: str) -> float:
        """When a file was written, in seconds since 1970; 0 where that is not known."""
        try:
            return float(self._retried(lambda: self._fs.modified(self._path(path))).timestamp())
        except (NotImplementedError, OSError):
            return 0.0

    def write(self, path: str, data: bytes) -> None:
        """Write a small file."""
        self._writing(path, lambda: self._fs.pipe_file(self._path(path), data))

    def put(self, local: Path, path: str) -> None:
        """Copy a file there."""
        self._writing(path, lambda: self._fs.put_file(str(local), self._path(path)))

    def get(self, path: str, local: Path) -> None:
        """Copy a file from there."""
        self._retried(lambda: self._fs.get_file(self._path(path), str(local)))

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self._retried(lambda: self._fs.rm_file(self._path(path)))

    def remove_folder(self, folder: str) -> None:
        """Delete a folder with all that is in it, if it is there."""
        if self.names(folder):
            with suppress(FileNotFoundError):
                self._retried(lambda: self._fs.rm(self._path(folder), recursive=True))

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _writing(self, path: str, write: Callable[[], Any]) -> None:
        try:
            self._retried(write)
        except FileNotFoundError:
            # Some file systems (file://, SFTP) want the folders first. Not `makedirs`, which on S3
            # would create a bucket.
            parts = self._path(path).split("/")[:-1]
            for count in range(2, len(parts) + 1):
                with suppress(Exception):
                    self._fs.mkdir("/".join(parts[:count]), create_parents=False)
            self._retried(write)

    def _retried(self, operation: Callable[[], T]) -> T:
        """Call until it succeeds, with growing pauses.

        Raises:
            OSError: A definite error, or the last one.
        """
        for number in range(self.tries):
            try:
                return operation()
            except _DEFINITE as error:
                if isinstance(error, OSError):
                    raise
                raise OSError(errno.ENOTSUP, f"{type(error).__name__}: {error}") from error
            except Exception as error:
                if number + 1 == self.tries:
                    text = f"{type(error).__name__}: {error}".rstrip(": ")
                    raise OSError(errno.EIO, text) from error
                logger.debug("%s: %r; trying again.", self.address, error)
                _pause(2**number * random.uniform(1, 1.25))
        raise AssertionError("no try")


_pause = time.sleep


def _open(address: str) -> tuple[Any, str]:
    """The file system of fsspec for an address, and the path in it."""
    require("fsspec", "cloud", f"output_dir={address!r}")
    from fsspec.core import url_to_fs

    scheme = str(scheme_of(address))
    try:
        files, root = url_to_fs(address)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        remedy = f"Install it: pip install {package}." if package else "Install what it names."
        raise ConfigurationError(
            f"{scheme}:// needs a package of its own besides 'kbtrain[cloud]'. {remedy} "
            f"Received: {address!r} ({error})"
        ) from None
    except ValueError as error:
        raise ConfigurationError(
            f"fsspec cannot open {address!r}: {error}. Expected s3://, gs://, hf://, az://, "
            "memory:// or another scheme of fsspec, or a path."
        ) from None
    return files, os.fspath(root).rstrip("/")
