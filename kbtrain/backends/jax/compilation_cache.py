"""JAX: compiled steps are kept on disk, so that the next process need not compile them again.

The cache is JAX's own, whose key has the program, its options and the versions of XLA. What is
chosen here: whether there is one, where it is, and how large it may become.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from kbtrain.backends.jax.trace import on_cpu

logger = logging.getLogger("kbtrain")

VARIABLE = "KBTRAIN_COMPILATION_CACHE"
"""Environment variable: a folder; 1 for the usual one, on CPUs too; 0 for none."""

LIMIT = 2 << 30
"""Bytes above which the programs that were not used for longest are removed."""

_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([\w.\-]+)'")


@functools.cache
def keep_programs() -> Path | None:
    """Switch the cache on, if that is wanted and JAX has none; return its folder.

    Without the variable it is on for accelerators, whose programs take longest to compile. On CPUs
    it has to be asked for: some versions of JAX print errors for each program that they read.
    """
    chosen = os.environ.get(VARIABLE, "")
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None  # as JAX's own variables and settings say
    if chosen.lower() in ("0", "false", "off", "no") or (not chosen and on_cpu()):
        return None
    usual = chosen.lower() in ("", "1", "true", "on", "yes")
    folder = (_usual_folder() if usual else Path(chosen).expanduser()) / "jax" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_own(folder):
            raise PermissionError(f"others may write to {folder}, and its files are run")
        prune(folder, LIMIT)
    except OSError as problem:
        level = logging.WARNING if chosen else logging.INFO
        logger.log(level, "Compiled steps are not kept for the next run: %s", problem)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    logger.info("Steps that take a second to compile are kept in %s (%s=0: no)", folder, VARIABLE)
    return folder


def _usual_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kbtrain"


def _machine() -> str:
    """A name for processors of this kind: programs for others may end a process."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = [next((x for x in lines if x.startswith(key)), "") for key in ("model name", "flag")]
    kind = "\n".join([platform.machine(), platform.processor(), *features])
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


def _is_own(folder: Path) -> bool:
    if os.name != "posix":
        return True
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def prune(folder: Path, limit: int) -> None:
    """Remove the files that were not used for longest, until the others take ``limit`` bytes.

    Another process may do the same at the same time.
    """
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found = path.stat()
                files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


@contextlib.contextmanager
def replacing_damaged() -> Iterator[None]:
    """Context of a compilation: an entry that JAX cannot read is removed, for a new one next time.

    JAX compiles then, as without a cache, but it would warn of that entry for ever.
    """
    folder = keep_programs()
    if folder is None:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Error reading persistent compilation cache")
        yield
    for each in caught:
        if damaged := _DAMAGED.search(str(each.message)):
            for path in folder.glob(f"{damaged[1]}-*"):
                path.unlink(missing_ok=True)
            logger.info("Damaged programs in %s were removed: %s", folder, each.message)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
