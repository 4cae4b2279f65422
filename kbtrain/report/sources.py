"""Records of runs from their folders, also of runs that wrote none."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kbtrain.callbacks.base import evaluation_name
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError
from kbtrain.report.record import FILE_NAME, RunRecord, joined_logs, on_curves, thinned_logs
from kbtrain.report.style import DATA
from kbtrain.utils.files.addresses import check_local, local_folder, scheme_of, without_credentials
from kbtrain.utils.files.filesystem import entries, parse_checkpoint_name, process_is_alive

logger = logging.getLogger("kbtrain")

_DATA = re.compile(rf'<script type="application/json" id="{DATA}">(.*?)</script>', re.DOTALL)
STATE, ARGUMENTS, LOG = "trainer_state.json", "training_args.json", "log.jsonl"


def load_run(path: str | os.PathLike[str]) -> RunRecord:
    """The record of a run.

    Without a ``run.json`` (older versions, copied checkpoints) it is made from the newest
    checkpoint that can be read, or from ``trainer_state.json`` or ``log.jsonl``.

    Args:
        path: A run's folder, one of its checkpoints, one of these files, or the report of a run.

    Raises:
        ConfigurationError: There is no run.
    """
    if (scheme := scheme_of(path)) is not None and scheme != "file":
        address = os.fspath(path)
        raise ConfigurationError(
            "A report is made of files on this machine, not of an address. Those of a run that "
            f"was here are in {local_folder(address)}; otherwise copy the run's folder here first. "
            f"Received: {without_credentials(address)}"
        )
    check_local("path", path)
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigurationError(f"There is no run at {place}: no such file or folder.")
    record = _from_file(place) if place.is_file() else _from_folder(place)
    if record is None:
        raise ConfigurationError(
            f"{place} is no run that a report could be made of: it has no {FILE_NAME}, no "
            f"checkpoint with a readable {STATE}, and no {LOG}. Pass the output_dir of a run, or "
            "one of its checkpoints."
        )
    folder = place if place.is_dir() else place.parent
    if not record.facts:
        record.facts = {"output_dir": str(folder.absolute()), "run_name": folder.absolute().name}
    if record.live and record.facts.get("host") in (None, "", platform.node()):
        record.live = process_is_alive(record.pid)
    return record


def _from_folder(folder: Path) -> RunRecord | None:
    if (found := _try(folder / FILE_NAME)) is not None:
        return _brought_up_to_date(found, folder)
    places = [folder, *_checkpoints(folder)]
    for place in places:
        if (found := _try(place / STATE)) is not None:
            found.checkpoints = [
                {"step": parse_checkpoint_name(p.name), "name": p.name, "best": False}
                for p in reversed(places[1:])
            ]
            _mark_best(found)
            return found
    return _try(folder / LOG)


def _brought_up_to_date(record: RunRecord, folder: Path) -> RunRecord:
    """The record with what is in its folder now; of a killed run, with its newest checkpoint."""
    record.facts = {**record.facts, "output_dir": str(folder.absolute())}
    best = {c["name"] for c in record.checkpoints if c.get("best")}
    if record.ending is None:
        states = (_try(place / STATE) for place in _checkpoints(folder))
        newest = next((state for state in states if state is not None), None)
        if newest is not None and newest.steps > record.steps:
            record.logs = joined_logs(record.logs, newest.logs, newest.steps)
            record.best, best = newest.best, {newest.facts.get("best_checkpoint")}
    record.checkpoints = [
        {"step": parse_checkpoint_name(p.name), "name": p.name, "best": p.name in best}
        for p in reversed(_checkpoints(folder))
    ]
    return record


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    steps = [(parse_checkpoint_name(name), name) for name in entries(folder)]
    return [folder / name for step, name in sorted(s for s in steps if s[0] is not None)[::-1]]


def _try(path: Path) -> RunRecord | None:
    """The record in a file; None, with a warning, if it is damaged."""
    if not path.is_file():
        return None
    try:
        return _from_file(path)
    except (ConfigurationError, OSError) as error:
        logger.warning("%s", error)
        return None


def _from_file(path: Path) -> RunRecord:
    """The record in a report, ``run.json``, ``trainer_state.json`` or ``log.jsonl``, by content.

    Raises:
        ConfigurationError: It is none of these.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if (page := _DATA.search(text)) is not None:
        text = page[1]
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if isinstance(values, list) and len(values) == 1:  # the runs of a page
        (values,) = values
    if isinstance(values, dict) and isinstance(values.get("log_history"), list):
        return _from_state(path, values)
    if isinstance(values, dict) and "format" in values:
        try:
            return RunRecord.from_dict(values)
        except ValueError as error:
            raise ConfigurationError(f"{path} is damaged: {error}.") from None
    logs = list(_lines(text))
    if not logs:
        raise ConfigurationError(
            f"{path} is damaged, or not the file of a run: expected {FILE_NAME}, {STATE} or {LOG}."
        )
    return RunRecord(logs=thinned_logs(logs))


def _lines(text: str) -> Any:
    """The logs among the lines of a text; one that a crash cut short is left out."""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int | float):
            yield entry


def _from_state(path: Path, state: Mapping[str, Any]) -> RunRecord:
    """A record from ``trainer_state.json`` and what lies beside it."""
    folder = path.absolute().parent
    run = folder.parent if parse_checkpoint_name(folder.name) is not None else folder
    arguments = _json(folder / ARGUMENTS)
    info = _json(folder / "manifest.json").get("info")
    info = info if isinstance(info, dict) else {}
    logs = [e for e in state["log_history"] if isinstance(e, dict) and "step" in e and on_curves(e)]
    record = RunRecord(arguments=arguments, logs=thinned_logs(logs))
    record.facts = {
        "output_dir": str(run),
        "run_name": arguments.get("run_name") or run.name,
        "updates": state.get("max_steps"),
        "epochs": state.get("num_train_epochs"),
        "changed": changed_from_defaults(arguments),
        "backend": info.get("backend"),
        "versions": info.get("versions") or {},
    }
    metric = arguments.get("metric_for_best_model")
    if isinstance(metric, str):
        record.metric = evaluation_name(metric)
    if state.get("best_global_step") is not None:
        record.best = {"step": state["best_global_step"], "value": state.get("best_metric")}
    if isinstance(best := state.get("best_model_checkpoint"), str):
        record.facts["best_checkpoint"] = Path(best).name
    return record


def _mark_best(record: RunRecord) -> None:
    name = record.facts.get("best_checkpoint")
    for checkpoint in record.checkpoints:
        checkpoint["best"] = checkpoint["name"] == name


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def defaults() -> dict[str, Any]:
    """The defaults of all arguments, as JSON values."""
    values = TrainingArguments().to_dict()
    return {field.name: values[field.name] for field in dataclasses.fields(TrainingArguments)}


def changed_from_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, as JSON values, that differ from the defaults of this version."""
    usual = defaults()
    return {k: v for k, v in arguments.items() if k not in usual or usual[k] != v}


def load_runs(paths: Sequence[str | os.PathLike[str]]) -> list[RunRecord]:
    """Several records, with names that tell them apart."""
    records = [load_run(path) for path in paths]
    names = [record.name for record in records]
    for record, path in zip(records, paths, strict=True):
        if names.count(record.name) > 1:
            record.facts = {**record.facts, "run_name": str(path)}
    return records
