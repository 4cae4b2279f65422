"""HDF5 through Python file objects, without letting exceptions or references into libhdf5.

libhdf5 calls the methods of a file object from C. Two things cause a segmentation fault there, at
once or when the process exits:

- An exception in the middle of an operation: on a full disk libhdf5 still flushes its metadata when
  it closes the file. So a failure is kept back, libhdf5 sees a success, and the error is raised
  once libhdf5 is done (``raise_deferred``).
- A property list of libhdf5 that outlives the interpreter: it holds the file object, which libhdf5
  releases at process exit, after Python has shut down. The frames of an error of ``h5py.File`` hold
  that list, and whoever keeps the error keeps its frames. So those frames are cleared.
"""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import h5py


@contextmanager
def open_for_reading(file: IO[bytes] | io.RawIOBase) -> Iterator[h5py.File]:
    """Open HDF5 data in a Python file object; all HDF5 objects are closed at the end.

    Args:
        file: A seekable file, open for reading; it is not closed.

    Raises:
        Exception: The error that ``file`` itself raised, at the end and in place of any error that
            libhdf5 raised because it got zeros instead. So values must not be used before this
            context has ended.
    """
    reader = DeferredErrorReader(file)
    try:
        with _open_hdf5(reader, "r") as h5:
            yield h5
    finally:
        reader.raise_deferred()


@contextmanager
def open_for_writing(file: DeferredErrorFile) -> Iterator[h5py.File]:
    """Create an HDF5 file; call ``file.raise_deferred()`` after it is closed."""
    with _open_hdf5(file, "w") as h5:
        yield h5


def _open_hdf5(file: io.RawIOBase, mode: Literal["r", "w"]) -> h5py.File:
    try:
        return h5py.File(file, mode)
    except BaseException as error:
        _clear_frames(error)
        raise


def _clear_frames(error: BaseException | None) -> None:
    """Release the references in the frames of an error and of its causes."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)  # skips frames that are still running
        error = error.__cause__ or error.__context__


class DeferredErrorReader(io.RawIOBase):
    """Reads a file for libhdf5; the first error is kept back, and missing data reads as zeros.

    Args:
        file: The file, open for reading; it is not closed.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._deferred: BaseException | None = None

    def raise_deferred(self) -> None:
        """Raise the first error that was kept back, if there was one."""
        if self._deferred is not None:
            raise self._deferred

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` completely, because libhdf5 ignores the number of bytes returned.

        One system call reads at most 2 GiB, and a file may end early.
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and (count := self._attempt(self._file.readinto, view[done:])):
            done += count
        for start in range(done, len(view), len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            piece[:] = _ZEROS[: len(piece)]
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        return self._attempt(self._file.seek, offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._attempt(self._file.tell)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def _attempt(self, call: Callable[..., int | None], *args: Any) -> int:
        """Call unless an earlier call has failed; 0 if it fails."""
        if self._deferred is None:
            try:
                return call(*args) or 0
            except BaseException as error:  # KeyboardInterrupt too: it must not unwind through C
                # Without its frames, which hold the buffer that libhdf5 will free.
                self._deferred = error.with_traceback(None)
        return 0


_ZEROS = memoryview(bytes(2**16))


class DeferredErrorFile(DeferredErrorReader):
    """A new file for libhdf5 to write; the first error is kept back, later writes do nothing.

    Args:
        path: The file to create; it must not exist.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("xb+", buffering=0))

    def sync(self) -> None:
        """Flush the file to the disk; raises a deferred error or an error of the flush."""
        self.raise_deferred()
        os.fsync(self._file.fileno())

    def write(self, data: Any) -> int:
        """Write all of ``data``; returns its length even after a failure (see the class)."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and (count := self._attempt(self._file.write, view[done:])):
            done += count
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Truncate or extend the file; an error is deferred."""
        return self._attempt(self._file.truncate, size)

    def writable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
