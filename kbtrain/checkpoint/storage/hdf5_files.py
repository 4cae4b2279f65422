"""HDF5 through Python file objects: no exception passes through libhdf5, nothing of it outlives us.

libhdf5 calls the methods of a file object from C. Two things end the process with a segmentation
fault there, some while it works and some when it exits:

- An exception in the middle of an operation: on a full disk libhdf5 still wants to flush its
  metadata when it closes the file. So a failure is kept, libhdf5 never learns of it, and it is
  raised once libhdf5 is out of the way (``raise_deferred``).
- A property list of libhdf5's that outlives the interpreter: it holds the file object, and libhdf5
  lets go of it when the process exits, when there is no Python any more. The frames of an error of
  ``h5py.File`` hold that list, and whoever keeps the error keeps its frames. So those frames are
  cleared.
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
    """Open HDF5 data in a Python file object; all of it is closed at the end.

    Args:
        file: A seekable file, open for reading; it is not closed.

    Raises:
        Exception: What ``file`` itself raised, at the end and in place of what libhdf5 made of the
            zeros it was given instead. So nothing may be made of what was read before the end.
    """
    reader = DeferredErrorReader(file)
    try:
        with _opened(reader, "r") as h5:
            yield h5
    finally:
        reader.raise_deferred()


@contextmanager
def open_for_writing(file: DeferredErrorFile) -> Iterator[h5py.File]:
    """Begin an HDF5 file; ``file.raise_deferred()`` has to be called when it is closed."""
    with _opened(file, "w") as h5:
        yield h5


def _opened(file: io.RawIOBase, mode: Literal["r", "w"]) -> h5py.File:
    try:
        return h5py.File(file, mode)
    except BaseException as error:
        _clear_frames(error)
        raise


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, and of those that led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)  # not those that still run
        error = error.__cause__ or error.__context__


class DeferredErrorReader(io.RawIOBase):
    """Reads a file for libhdf5; the first failure is kept, and what is not read is zeros.

    Args:
        file: The file, open for reading; it is not closed.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._deferred: BaseException | None = None

    def raise_deferred(self) -> None:
        """Raise the first error that was met, if there was one."""
        if self._deferred is not None:
            raise self._deferred

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``: libhdf5 does not ask how much it got.

        One call of the system reads at most 2 GiB, and a file may end early.
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
        """Call unless something has failed before; 0 if it fails."""
        if self._deferred is None:
            try:
                return call(*args) or 0
            except BaseException as error:  # KeyboardInterrupt too: it must not unwind through C
                # Without its frames: they hold the buffer, which is libhdf5's and gone by and by.
                self._deferred = error.with_traceback(None)
        return 0


_ZEROS = memoryview(bytes(2**16))


class DeferredErrorFile(DeferredErrorReader):
    """A new file that libhdf5 writes; the first failure is kept, and later writes do nothing.

    Args:
        path: The file to create; it must not exist.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("xb+", buffering=0))

    def sync(self) -> None:
        """Flush the file to the disk; raises what was deferred and what flushing raises."""
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
        """Cut or extend the file; a failure is deferred."""
        return self._attempt(self._file.truncate, size)

    def writable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
