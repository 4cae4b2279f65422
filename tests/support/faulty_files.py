"""A file system of fsspec in memory that fails as networks and object stores do."""

from __future__ import annotations

import contextlib

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
    """The process is dead: nothing after it may reach the file system."""


class FaultyFiles(MemoryFileSystem):
    """``faulty://``: the calls from ``first`` to ``last`` fail in the way of ``kind``.

    "error" raises before anything happens, "late" after it has happened, "truncate" writes half
    and says nothing, "killed" raises ``Killed`` after half a write, in all calls from then on.
    """

    protocol = "faulty"
    cachable = False
    store: dict = {}
    pseudo_dirs = [""]
    calls: list[str] = []
    kind, first, last, error = "", 0, 0, OSError

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))

    @classmethod
    def reset(cls, kind="", first=0, last=None, error=TimeoutError):
        cls.kind, cls.first, cls.last, cls.error = kind, first, last or first, error
        cls.calls.clear()

    @classmethod
    def wipe(cls):
        cls.reset()
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]

    def _call(self, name, path, act, half=None):
        cls = type(self)
        cls.calls.append(f"{name} {path}")
        number = len(cls.calls)
        fails = cls.first <= number <= cls.last or (cls.kind == "killed" and number > cls.first)
        if not (cls.first and fails):
            return act()
        if cls.kind == "truncate" and half is not None:
            return half()
        if cls.kind == "truncate":
            return act()
        if cls.kind == "killed":
            if number == cls.first and half is not None:
                half()
            raise Killed
        if cls.kind == "late":
            with contextlib.suppress(FileNotFoundError):
                act()
        raise cls.error(f"injected into call {number}, {name}")

    def ls(self, path, detail=True, **kwargs):
        # Only as the program calls it: the other methods call `ls` of the base class.
        if kwargs.pop("inner", False):
            return super().ls(path, detail)
        return self._call("ls", path, lambda: MemoryFileSystem.ls(self, path, detail))

    def put_file(self, lpath, rpath, **kwargs):
        with open(lpath, "rb") as file:
            data = file.read()
        self._write("put", rpath, data)

    def pipe_file(self, path, value, **kwargs):
        self._write("pipe", path, value)

    def _write(self, name, path, data):
        def write(data=data):
            MemoryFileSystem.pipe_file(self, path, data)

        self._call(name, path, write, lambda: write(data[: len(data) // 2]))

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self._call("cat", path, lambda: self.store[self._found(path)].getvalue())

    def get_file(self, rpath, lpath, **kwargs):
        def get(part=1):
            data = self.store[self._found(rpath)].getvalue()
            with open(lpath, "wb") as file:
                file.write(data[: len(data) // part])

        self._call("get", rpath, get, lambda: get(2))

    def rm_file(self, path):
        self._call("rm", path, lambda: self.store.pop(self._found(path)))

    def rm(self, path, recursive=False, maxdepth=None):
        inside = [name for name in sorted(self.store) if name.startswith(path.rstrip("/") + "/")]
        for name in inside:  # one by one: a process may die between two of them
            self.rm_file(name)

    def _found(self, path):
        path = self._strip_protocol(path)
        if path not in self.store:
            raise FileNotFoundError(path)
        return path


fsspec.register_implementation("faulty", FaultyFiles, clobber=True)
