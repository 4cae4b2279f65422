"""``kbtrain migrate SCRIPT``: what to change in a script for the Trainer of Transformers."""

from __future__ import annotations

import difflib
import shutil
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path

from kbtrain.cli.migrate.rules import migrate
from kbtrain.cli.parser import command_parser
from kbtrain.errors import ConfigurationError
from kbtrain.utils.files.output_files import writing


def run(words: Sequence[str]) -> int:
    """Print the changes as a unified diff, and on the error stream what is left to a person."""
    parser = command_parser(
        "migrate",
        "Print what to change in a script for the Trainer of Transformers, as a unified diff, and "
        "on the error stream what it cannot decide: models, methods of your own, code for torch. "
        "Formatting and comments stay as they are.",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a Python file")
    parser.add_argument(
        "--write", action="store_true", help="change the file instead of printing the diff"
    )
    options = parser.parse_args(words)
    path: Path = options.script
    text, encoding = _read(path)
    done = migrate(text, str(path))
    if options.write and done.text != text:
        with writing(path) as temporary:
            temporary.write_bytes(done.text.encode(encoding))
            shutil.copymode(path, temporary)
    elif not options.write:
        sys.stdout.writelines(_diff(text, done.text, path))
        sys.stdout.flush()
    for note in done.notes:
        line = note.new_line if options.write else note.line
        print(f"{path}:{line}: {note.text}", file=sys.stderr)
    changed = "changed" if options.write else "to change with --write"
    places = f"{done.changes} place{'s' if done.changes > 1 else ''} {changed}"
    what = places if done.changes else "nothing to change"
    open_notes = sum(not note.done for note in done.notes)
    print(f"{path}: {what}, {open_notes} to decide yourself", file=sys.stderr)
    return 0


def _read(path: Path) -> tuple[str, str]:
    """The text of a script with its line ends, and its encoding."""
    if path.is_dir():
        raise ConfigurationError(
            f"{path} is a folder. Name one script at a time: `kbtrain migrate {path / 'train.py'}`."
        )
    if not path.exists():
        raise ConfigurationError(f"There is no script {str(path)!r} in {Path.cwd()}.")
    try:
        with open(path, "rb") as file:
            encoding, _ = tokenize.detect_encoding(file.readline)
        return path.read_bytes().decode(encoding), encoding
    except (SyntaxError, UnicodeDecodeError) as problem:
        raise ConfigurationError(f"{path} is not a Python script: {problem}") from None


def _diff(old: str, new: str, path: Path) -> list[str]:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), str(path), str(path)
    )
    return [
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    ]
