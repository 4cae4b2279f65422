"""``kbtrain report RUN...``: the report of a run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kbtrain.cli.parser import command_parser


def run(words: Sequence[str]) -> int:
    """Write a report and print its path."""
    parser = command_parser(
        "report",
        "Write the report of a run as one HTML page that loads nothing: curves, "
        "settings, time, checkpoints, how to go on. Of several runs: their curves in the same "
        "pictures, the settings that differ, and the first update at which they differ by more "
        "than rounding.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, one of its checkpoints, its report.html, run.json or "
        "log.jsonl, or a trainer_state.json",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PAGE",
        help="the page; by default report.html in the run's folder, or here for several runs",
    )
    arguments = parser.parse_args(words)
    from kbtrain.report.write import report_of_folders  # it loads Keras, which --help need not

    print(report_of_folders(arguments.runs, arguments.output))
    return 0
