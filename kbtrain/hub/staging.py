"""The files of a push, set aside so that the run can keep writing its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath

from kbtrain.errors import ConfigurationError
from kbtrain.report.record import FILE_NAME as RECORD
from kbtrain.report.sources import ARGUMENTS
from kbtrain.utils.files.filesystem import parse_checkpoint_name

FOLDER = ".hub"
"""The folder within ``output_dir`` for files of pushes in flight."""

LAST_CHECKPOINT = "last-checkpoint"
"""The folder of a repository with the newest checkpoint, as in Transformers."""

_LARGE = 16 << 20


def files_of_run(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of ``output_dir`` that belong into the repository.

    These are all but checkpoints, hidden files, those that begin with an underscore, and the record
    of the run, which knows the names of this machine and its folders.

    Args:
        folder: ``output_dir``.

    Yields:
        Path in the repository, and the file.
    """
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(_is_left_out(part) for part in inside.parts):
            yield inside.as_posix(), path


def _is_left_out(name: str) -> bool:
    if name in (LAST_CHECKPOINT, RECORD) or parse_checkpoint_name(name) is not None:
        return True
    return name.startswith((".", "_"))


def set_aside(source: Path, target: Path, unchanging: bool = False) -> None:
    """Give a file a second name, or copy it if it may still be written to.

    Args:
        source: The file.
        target: Its other name; folders are created.
        unchanging: Whether nobody changes the contents, only the name. (A large file is not copied
            in any case. If it changes, the push of it fails.)
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if unchanging or source.stat().st_size > _LARGE:
        try:
            os.link(source, target)
        except OSError:  # the file system has no hard links
            pass
        else:
            return
    shutil.copyfile(source, target)


def set_aside_run(folder: Path, stage: Path) -> None:
    """Set the files of ``output_dir`` aside; those that are already there stay as they are."""
    for name, path in files_of_run(folder):
        if not (stage / name).exists():
            set_aside(path, stage / name)
    hide_folders(stage)


def hide_folders(stage: Path) -> None:
    """Keep only the last part of the paths in ``training_args.json``: they are of this machine."""
    path = stage / ARGUMENTS
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # none, or a file of the user's
        return
    for name in ("output_dir", "resume_from_checkpoint"):
        if isinstance(values, dict) and isinstance(values.get(name), str):
            values[name] = PurePath(values[name]).name
    path.unlink()  # it may be a second name of the run's own file
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def check_folder(folder: Path) -> None:
    """Check that a push, which takes all files of a folder, would take those of a run only.

    Args:
        folder: ``output_dir``.

    Raises:
        ConfigurationError: It is the folder of a project.
    """
    if (folder / ".git").exists():
        found = "is a Git repository"
    elif Path.cwd().is_relative_to(folder.resolve()):
        found = f"holds the folder that this program runs in, {Path.cwd()}"
    else:
        return
    raise ConfigurationError(
        f"A push takes all files of output_dir, and {folder} {found}. Give the run a folder of its "
        "own, such as output_dir='runs/digits'."
    )


def set_aside_checkpoint(checkpoint: Path, stage: Path) -> None:
    """Set the files of a checkpoint aside, so that its deletion does not matter."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            set_aside(path, stage / path.relative_to(checkpoint), unchanging=True)


def staged(stage: Path) -> dict[str, Path]:
    """The files of a push by their paths in the repository."""
    found = (path for path in sorted(stage.rglob("*")) if path.is_file())
    return {path.relative_to(stage).as_posix(): path for path in found}
