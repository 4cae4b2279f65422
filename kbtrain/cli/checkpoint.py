"""``kbtrain checkpoint ls|verify|show|export``: list, verify, inspect, export."""

from __future__ import annotations

import argparse
import datetime
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.checkpoint.export import ENDINGS, export
from kbtrain.checkpoint.storage.faults import exists, reading
from kbtrain.checkpoint.storage.folder_reader import find_problems
from kbtrain.checkpoint.storage.manifest import MANIFEST_NAME
from kbtrain.checkpoint.storage.outline import CheckpointOutline, read_outline
from kbtrain.checkpoint.store import CheckpointStore
from kbtrain.cli.parser import command_parser
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointUnreadableError,
)
from kbtrain.utils.files.addresses import check_address, scheme_of
from kbtrain.utils.files.filesystem import checkpoint_name

if TYPE_CHECKING:
    from kbtrain.checkpoint.remote.inspection import RemoteCheckpoints


def run(words: Sequence[str]) -> int:
    """Run ``kbtrain checkpoint`` with the words after it.

    Returns:
        0; for ``verify`` 1 if a checkpoint is damaged, 2 if one could not be read.
    """
    parser = command_parser("checkpoint", "List, verify, inspect and export checkpoints.")
    endings = ", ".join(dict.fromkeys(e for known in ENDINGS.values() for e in known))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, does: Callable[[argparse.Namespace], int], help: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument(
            "path",
            help="a run's folder, or one checkpoint; or the address of one (s3://...)",
        )
        added.set_defaults(does=does, shown=None)
        return added

    command("ls", ls, "List the checkpoints of a run: step, size, date, obvious problems.")
    command(
        "verify",
        verify,
        "Read all files and compare their checksums; exit code 1 if damaged, 2 if not readable.",
    )
    command("show", show, "Show step, best metric, versions, and all arrays with shape and dtype.")
    added = command(
        "export",
        export_model,
        "Write the model for Keras, safetensors, ONNX and others: of a run, that of the best "
        "checkpoint if there is one, else of the last.",
    )
    added.add_argument("target", type=Path, help=f"file ({endings}), or folder with --format")
    added.add_argument("--format", choices=ENDINGS, help="by default that of the target's ending")
    added.add_argument("--step", type=int, metavar="N", help="the run's checkpoint of update N")
    added.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE",
        help="import a module first that registers the model's own classes",
    )  # fmt: skip
    arguments = parser.parse_args(words)
    check_address("path", arguments.path)
    if scheme_of(arguments.path) is None:
        arguments.path = Path(arguments.path)
        return int(arguments.does(arguments))
    with tempfile.TemporaryDirectory(prefix="kbtrain-") as folder:
        return _at_address(arguments, arguments.path, Path(folder))


def _at_address(arguments: argparse.Namespace, address: str, folder: Path) -> int:
    """Do a command for an address: with outlines of all checkpoints, or a copy of one."""
    from kbtrain.checkpoint.remote.inspection import RemoteCheckpoints

    there = RemoteCheckpoints(address)
    if arguments.does is verify:
        return _verify_copies(there, folder)
    there.outline(folder)
    arguments.path = folder
    if arguments.does is ls:
        return int(ls(arguments))
    if arguments.does is show:
        chosen, why = _checkpoints(folder)[-1], ""
    else:
        chosen, why = _to_export(folder, arguments.step, address)
    copy = folder / "copy" / chosen.name
    copy.mkdir(parents=True)
    there.download(int(chosen.name.rpartition("-")[2]), copy)
    arguments.path, arguments.step = copy, None
    if arguments.does is show:
        address = address.rstrip("/")
        is_one = address.endswith(f"/{chosen.name}")
        arguments.shown = address if is_one else f"{address}/{chosen.name}"
        return int(show(arguments))
    export(copy, arguments.target, arguments.format, modules=arguments.modules)
    print(f"Wrote {arguments.target} from {chosen.name} of {address}{why}.")
    return 0


def _verify_copies(there: RemoteCheckpoints, folder: Path) -> int:
    """Download one checkpoint after the other and compare it with its manifest."""
    status = 0
    for step in there.steps:
        copy = folder / checkpoint_name(step)
        copy.mkdir()
        try:
            there.download(step, copy)
            print(f"{copy.name}: intact")
        except CheckpointError as error:
            damaged = isinstance(error, CheckpointDamagedError)
            status = max(status, 1 if damaged else 2)
            print(f"{copy.name}: {_state_of(error)}\n  {error}")
        shutil.rmtree(copy)
    return status


def ls(arguments: argparse.Namespace) -> int:
    """Print one line per checkpoint, by step; reads manifests and states only."""
    rows = [("checkpoint", "size", "saved", "backend", "")]
    found = _checkpoints(arguments.path)
    newest = _newest_state(found)
    for path in found:
        try:
            outline = read_outline(path, arrays=False)
            with reading(path / MANIFEST_NAME, MANIFEST_NAME):
                written = (path / MANIFEST_NAME).stat().st_mtime
        except CheckpointError as error:
            rows.append((path.name, "?", "?", "?", f"{_state_of(error)}: {error}"))
            continue
        saved = f"{datetime.datetime.fromtimestamp(written):%Y-%m-%d %H:%M:%S}"
        best = newest.get("best_global_step") == outline.step
        rows.append(
            (
                path.name,
                f"{outline.size / 1e6:.1f} MB",
                saved if written else "?",
                str(outline.info.get("backend", "?")),
                f"best ({newest.get('best_metric')})" if best else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row[:4], widths, strict=True)]
        print("  ".join([*cells, row[4]]).rstrip())
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare every byte of every file with the manifest."""
    status = 0
    for path in _checkpoints(arguments.path):
        try:
            problems = find_problems(path)
            state = "DAMAGED" if problems else "intact"
            status = max(status, 1 if problems else 0)
        except CheckpointError as error:
            problems, state, status = [str(error)], _state_of(error), 2
        print(f"{path.name}: {state}")
        for problem in problems:
            print(f"  {problem}")
    return status


def _state_of(error: CheckpointError) -> str:
    """The state of a checkpoint that an error implies."""
    if isinstance(error, CheckpointUnreadableError):
        return "UNREADABLE"
    return "NOT READ BY THIS KBTRAIN" if isinstance(error, CheckpointFormatError) else "DAMAGED"


def show(arguments: argparse.Namespace) -> int:
    """Print the contents of a checkpoint, or of the newest one of a run."""
    path = _checkpoints(arguments.path)[-1]
    outline = read_outline(path)
    print(f"{arguments.shown or path}\n")
    for name, value in _facts(outline).items():
        print(f"{name + ':':<18}{value}")
    for group, arrays in outline.arrays.items():
        total = sum(array.size for array in arrays)
        blocks = outline.blocks.get(group, {})
        divided = f", {len(blocks)} of them in blocks of several processes" if blocks else ""
        print(f"\n{group}: {len(arrays)} arrays, {total:,} bytes{divided}")
        width = max((len(array.name) for array in arrays), default=0)
        for array in arrays:
            count = f"  blocks: {blocks[array.name]}" if array.name in blocks else ""
            print(f"  {array.name:<{width}}  {array.dtype:<10} {array.shape}{count}")
    if outline.other_files:
        total = sum(outline.other_files.values())
        print(f"\nother files: {len(outline.other_files)}, {total:,} bytes")
        for name in outline.other_files:
            print(f"  {name}")
    return 0


def export_model(arguments: argparse.Namespace) -> int:
    """Export the model of a checkpoint, or of one of a run's."""
    path, why = _to_export(arguments.path, arguments.step, arguments.path)
    export(path, arguments.target, arguments.format, modules=arguments.modules)
    print(f"Wrote {arguments.target} from {path}{why}.")
    return 0


def _to_export(path: Path, step: int | None, shown: Path | str) -> tuple[Path, str]:
    """The checkpoint to export, and why that one if there are several.

    Args:
        path: The folder with the checkpoints, or one.
        step: The one that is asked for.
        shown: What the folder is called in a message.
    """
    found = _checkpoints(path)
    if step is not None:
        named = [folder for folder in found if folder.name == f"checkpoint-{step}"]
        if not named:
            listed = ", ".join(folder.name for folder in found)
            raise CheckpointNotFoundError(f"{shown} has no checkpoint of step {step}: {listed}.")
        return named[0], ""
    if found == [path]:
        return path, ""
    if state := _newest_state(found):
        # An evaluation may have been better still, without a checkpoint of that update.
        saved = Path(str(state.get("best_model_checkpoint") or "")).name
        best = f"checkpoint-{state.get('best_global_step')}"
        for candidate in found:
            if candidate.name == (saved or best):
                value = f" ({state.get('best_metric')})" if candidate.name == best else ""
                return candidate, f", the best{value}"
    return found[-1], ", the last"


def _newest_state(found: Sequence[Path]) -> Mapping[str, Any]:
    """The state of the newest checkpoint, which knows which is the best, unless it is damaged."""
    for folder in reversed(found):
        try:
            return read_outline(folder, arrays=False).state
        except CheckpointError:
            continue
    return {}


def _facts(outline: CheckpointOutline) -> dict[str, Any]:
    state, progress = outline.state, outline.progress
    parameters = sum(math.prod(array.shape) for array in outline.arrays.get("model", []))
    facts = {
        "step": f"{outline.step} of {state.get('max_steps') or '?'}",
        "epoch": state.get("epoch", "?"),
        "position": f"batch {progress['batch']} of epoch {progress['epoch']}" if progress else "-",
        "best": "-",
        "last log": (state.get("log_history") or ["-"])[-1],
        "model": f"{parameters:,} values",
        "size": f"{outline.size:,} bytes",
        "format version": outline.format_version,
        **{key: value for key, value in outline.info.items() if key != "versions"},
        "versions": ", ".join(f"{k} {v}" for k, v in outline.info.get("versions", {}).items()),
    }
    if state.get("best_global_step") is not None:
        facts["best"] = f"{state.get('best_metric')} at step {state['best_global_step']}"
    return facts


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint at ``path``, or those of the run at ``path``, by ascending step."""
    if exists(path / MANIFEST_NAME):
        return [path]
    found = [folder for _, folder in CheckpointStore(path).list()]
    if found:
        return found
    if exists(path):
        raise CheckpointError(
            f"{path} is not a checkpoint and contains none. Expected a folder checkpoint-{{step}} "
            f"with a {MANIFEST_NAME}, or the folder of a run with such folders."
        )
    raise CheckpointNotFoundError(f"There is no {path}.")
