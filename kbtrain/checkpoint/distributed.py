"""What the processes of a run do together with its checkpoints: save, and find one to resume from.

They tell each other in messages on the host (``Peers``), never by collective operations: saving
happens in a background thread. A problem of one process is raised on all of them.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain import errors
from kbtrain.checkpoint.resuming import Log
from kbtrain.checkpoint.storage.array_index import ArrayOutline
from kbtrain.checkpoint.storage.block_index import ArrayEntry, entry_to_json, parse_arrays
from kbtrain.checkpoint.storage.blocks import Part, write_blocks
from kbtrain.checkpoint.storage.faults import is_folder
from kbtrain.checkpoint.storage.folder_reader import (
    Checkpoint,
    everything,
    read_back,
    read_checkpoint,
    verify_blocks,
)
from kbtrain.checkpoint.storage.folder_writer import Contents, write_files
from kbtrain.checkpoint.storage.manifest import (
    SHARDED_FORMAT_VERSION,
    Manifest,
    write_manifest,
)
from kbtrain.checkpoint.store import CheckpointStore
from kbtrain.distributed.control.peers import Peers
from kbtrain.errors import CheckpointError, CheckpointNotFoundError, DistributedError
from kbtrain.utils.array_blocks import OwnedBlocks
from kbtrain.utils.files import filesystem

Groups = Mapping[str, Mapping[str, Any]]

KERAS_LAYOUT = "keras_layout"
"""The document that says where Keras looks for arrays that are in blocks."""


def is_divided(arrays: Groups) -> bool:
    """Whether any array is divided among processes."""
    return any(isinstance(v, OwnedBlocks) for values in arrays.values() for v in values.values())


# --- agreement ----------------------------------------------------------------------------------


def agree(peers: Peers, key: str, problem: Exception | None = None) -> None:
    """Wait for all processes; raise the first problem of any of them on all.

    Args:
        peers: The processes.
        key: What they agree on.
        problem: The problem of this process, if it has one.

    Raises:
        Exception: ``problem``, or the error of another process.
        DistributedError: A process has failed.
    """
    reports = peers.gather(f"{key}/reports", _pack(peers, problem))
    first = next((report for report in reports if b"error" in report), b"{}")
    answer = peers.announce(f"{key}/result", first)
    if problem is not None:
        raise problem
    _unpack(answer)


def _pack(peers: Peers, problem: Exception | None = None, **values: Any) -> bytes:
    """A message: values, or a problem of this process."""
    if problem is None:
        return json.dumps(values).encode()
    own = isinstance(problem, CheckpointError | errors.ConfigurationError)
    kind = type(problem).__name__ if own else "CheckpointError"
    text = str(problem) if own else f"{type(problem).__name__}: {problem}"
    number = problem.__cause__.errno if isinstance(problem.__cause__, OSError) else None
    report = {"error": kind, "text": text, "errno": number, "rank": peers.rank}
    return json.dumps(report).encode()


def _unpack(message: bytes) -> dict[str, Any]:
    """The values of a message; raises the problem that it reports.

    Raises:
        CheckpointError, ConfigurationError: The problem of another process, of the same class, and
            with an ``OSError`` as its cause if it had one.
    """
    values: dict[str, Any] = json.loads(message)
    if "error" not in values:
        return values
    error: Exception = getattr(errors, values["error"])(
        f"Process {values['rank']}: {values['text']}"
    )
    if (number := values["errno"]) is not None:
        raise error from OSError(number, os.strerror(number))
    raise error


# --- resuming -----------------------------------------------------------------------------------


def resolve(
    store: CheckpointStore,
    resume: bool | str | os.PathLike[str] | None,
    peers: Peers,
    key: str,
    lazy: bool = False,
    log: Log | None = None,
) -> Checkpoint | None:
    """Find the checkpoint to resume from; process 0 decides, so that all use the same one.

    Each process verifies a share of the files that hold blocks. A damaged checkpoint is skipped by
    all.

    Args:
        store: The run's folder, on a disk that all processes share.
        resume: As for ``CheckpointStore.resolve``, on process 0.
        peers: The processes.
        key: A new key for their messages.
        lazy: Whether to leave the arrays on the disk, for variables that are divided.
        log: As for ``CheckpointStore.resolve``.

    Raises:
        CheckpointError, ConfigurationError: As for ``CheckpointStore.resolve``, on all processes;
            or a process cannot see the checkpoint.
    """

    def is_mine(index: int) -> bool:
        return index % peers.size == peers.rank

    if peers.rank:
        for number in itertools.count():
            told = _unpack(peers.announce(f"{key}/{number}"))
            if "chosen" in told:
                return store.follow(told["chosen"], lazy)
            problem = _problem_with(store, told["verify"], is_mine)
            peers.gather(f"{key}/{number}/verified", _pack(peers, problem))

    numbers = itertools.count()

    def read(path: Path) -> Checkpoint:
        number = next(numbers)
        peers.announce(f"{key}/{number}", _pack(peers, verify=_place(store, path)))
        checkpoint, problem = None, None
        try:
            checkpoint = read_checkpoint(path, lazy, is_mine if lazy else everything)
        except Exception as error:
            problem = error
        reports = peers.gather(f"{key}/{number}/verified", _pack(peers))
        if problem is not None:
            raise problem
        for report in reports[1:]:
            _unpack(report)
        assert checkpoint is not None
        return checkpoint

    try:
        checkpoint = store.resolve(resume, log, lazy, read)
    except Exception as error:
        peers.announce(f"{key}/{next(numbers)}", _pack(peers, error))
        raise
    path = None if checkpoint is None else _place(store, checkpoint.path)
    peers.announce(f"{key}/{next(numbers)}", _pack(peers, chosen=path))
    return checkpoint


def _place(store: CheckpointStore, path: Path) -> str:
    """A path as the other processes find it: the run may be elsewhere in the tree of their host."""
    path = path.absolute()
    return path.name if path.parent == store.directory.absolute() else str(path)


def _problem_with(
    store: CheckpointStore, place: str, is_mine: Callable[[int], bool]
) -> Exception | None:
    """What is wrong with this process's share of a checkpoint that process 0 has found."""
    path = store.directory / place
    try:
        store.bring(place)
        verify_blocks(path, is_mine)
    except CheckpointNotFoundError:
        # Not the class: process 0 would take an older one instead.
        return CheckpointError(
            f"There is no {path} here, from which process 0 resumes. All processes read the "
            "checkpoint: put output_dir on storage that every machine sees, or copy "
            f"{path.name} to each."
        )
    except Exception as error:
        return error
    return None


# --- saving -------------------------------------------------------------------------------------


def save(
    store: CheckpointStore,
    step: int,
    contents: Contents,
    peers: Peers,
    key: str,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Write ``checkpoint-{step}``, of which each process owns blocks; complete or absent.

    Process 0 makes the hidden folder and writes what is whole; each process writes its blocks, in
    a file for each group, and reads them back; process 0 writes the manifest and renames the
    folder.

    Args:
        store: The run's folder, on a disk that all processes share.
        step: Optimizer updates done.
        contents: What to write. In place of an array that is divided there is an ``OwnedBlocks``.
            Processes other than 0 need to have those only.
        peers: The processes.
        key: A new key for their messages.
        begin: Called on process 0 before anything is written; it may raise an error.

    Raises:
        CheckpointError: It could not be written, on all processes; nothing has changed then.
        DistributedError: A process has failed.
    """
    if peers.rank:
        _contribute(store, step, contents, peers, key)
    else:
        _lead(store, step, contents, peers, key, begin)


def _contribute(
    store: CheckpointStore, step: int, contents: Contents, peers: Peers, key: str
) -> None:
    """What processes other than 0 do."""
    folder = store.directory / _unpack(peers.announce(f"{key}/folder"))["folder"]
    problem: Exception | None = None
    report = b""
    try:
        if not is_folder(folder):
            raise CheckpointError(
                f"There is no {folder}, which process 0 has made: "
                f"{'XDG_CACHE_HOME' if store.is_remote else 'output_dir'} must be on a disk that "
                "all processes share."
            )
        report = _pack_part(peers, write_blocks(folder, peers.rank, _blocks_of(contents.arrays)))
    except OSError as error:
        problem = store.explain_failure(store.path(step), error)
        problem.__cause__ = error
    except Exception as error:
        problem = error
    peers.gather(f"{key}/written", report if problem is None else _pack(peers, problem))
    answer = peers.announce(f"{key}/result")
    if problem is not None:
        raise problem
    _unpack(answer)
    store.written(store.path(step))


def _lead(
    store: CheckpointStore,
    step: int,
    contents: Contents,
    peers: Peers,
    key: str,
    begin: Callable[[], None],
) -> None:
    """What process 0 does."""
    waiting_for = "folder"  # what the other processes wait for, to be told of a problem

    def write(folder: Path, run: str) -> None:
        nonlocal waiting_for
        peers.announce(f"{key}/folder", _pack(peers, folder=folder.name))
        waiting_for = "result"
        own, problem = b"", None
        try:
            files, others = write_files(folder, whole, store.shard_bytes, blocks)
            own = _pack_part(peers, write_blocks(folder, 0, blocks))
        except Exception as error:
            problem = error
        reports = peers.gather(f"{key}/written", own)
        if problem is not None:
            raise problem
        written = set(files) | set(others)
        arrays = _merge([_unpack(report) for report in reports], contents.arrays, files)
        manifest = Manifest(step, files, whole.info, SHARDED_FORMAT_VERSION, others, run, arrays)
        write_manifest(folder, manifest)
        filesystem.fsync_directory(folder)
        read_back(folder, store.path(step), written)

    try:
        begin()
        blocks = _blocks_of(contents.arrays)
        whole = _whole(contents, blocks)
        whole.check_names()
        store.save_with(step, write)
    except DistributedError:
        raise
    except Exception as error:
        peers.announce(f"{key}/{waiting_for}", _pack(peers, error))
        raise
    peers.announce(f"{key}/result", _pack(peers))


def _blocks_of(arrays: Groups) -> dict[str, dict[str, OwnedBlocks]]:
    """The divided arrays, of groups that have any."""
    found = {
        group: {name: value for name, value in values.items() if isinstance(value, OwnedBlocks)}
        for group, values in arrays.items()
    }
    return {group: values for group, values in found.items() if values}


def _whole(contents: Contents, blocks: Groups) -> Contents:
    """What process 0 writes besides its blocks."""
    arrays = {
        group: {n: v for n, v in values.items() if not isinstance(v, OwnedBlocks)}
        for group, values in contents.arrays.items()
    }
    layout = {
        group: {
            place: name
            for place, name in contents.places[group].links.items()
            if name in blocks[group]
        }
        for group in blocks
        if group in contents.places
    }
    documents = {**contents.documents} | ({KERAS_LAYOUT: layout} if layout else {})
    return contents._replace(arrays=arrays, documents=documents)


def _pack_part(peers: Peers, part: Part) -> bytes:
    arrays = {g: [entry_to_json(entry) for entry in listed] for g, listed in part.arrays.items()}
    return _pack(peers, files=part.files, arrays=arrays)


def _merge(
    parts: list[dict[str, Any]],
    arrays: Groups,
    files: dict[str, filesystem.FileEntry],
) -> dict[str, list[ArrayEntry]]:
    """Put the reports of all processes together; their files are added to ``files``.

    Raises:
        CheckpointError: The blocks do not make up the arrays.
    """
    for part in parts:
        files.update({name: filesystem.FileEntry(*entry) for name, entry in part["files"].items()})
    merged: dict[str, list[dict[str, Any]]] = {}
    for group, entries in parts[0]["arrays"].items():
        listed = {entry["name"]: entry for entry in entries}
        for rank, part in enumerate(parts[1:], 1):
            others = {entry["name"]: entry for entry in part["arrays"].get(group, [])}
            for name in {**listed, **others}:
                here, there = listed.get(name), others.get(name)
                if here is None or there is None or _kind(here) != _kind(there):
                    raise CheckpointError(
                        f"{name!r} of {group!r} is {_kind(there)} on process {rank} and "
                        f"{_kind(here)} on process 0: the processes must train one model."
                    )
                here["blocks"] += there["blocks"]
        # In the order of the variables, by which names are matched when a checkpoint is loaded.
        merged[group] = [
            listed[name] if name in listed else _whole_entry(name, value)
            for name, value in arrays[group].items()
        ]
    try:
        return parse_arrays(merged, files)
    except ValueError as error:
        raise CheckpointError(f"The processes do not hold one state: {error}.") from None


def _kind(entry: dict[str, Any] | None) -> str:
    return "not divided" if entry is None else f"divided, {entry['dtype']} {entry['shape']}"


def _whole_entry(name: str, value: Any) -> dict[str, Any]:
    array = np.asarray(value)
    return entry_to_json(ArrayEntry(ArrayOutline(name, array.dtype.name, array.shape)))
