"""Whether data are prepared as those that a checkpoint was trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kbtrain.errors import CheckpointMismatchError

if TYPE_CHECKING:
    from kbtrain.cli.train.data import Data

PREPROCESSING, TOKENIZER = "preprocessing.json", "tokenizer.json"
DIGEST = "preset_tokenizer"
"""The entry with the digest of a preset's tokenizer."""

_WORDS = {
    "task": "task was",
    "kind": "kind of data was",
    "shape": "shape of a sample was",
    "classes": "classes were",
    "features": "features were",
    "prepared_by": "preparation of images was",
}


def check_alike(data: Data, folder: Path) -> None:
    """Check that a checkpoint's preprocessing is that of these data.

    Args:
        data: The data to continue with.
        folder: The checkpoint's folder.

    Raises:
        CheckpointMismatchError: They differ; the message says in what.
    """
    try:
        saved = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))
    except FileNotFoundError:  # of a run that was not one of `kbtrain train`
        return
    # What an older version did not write is not compared.
    now = {name: value for name, value in data.known().items() if name in saved}
    for name, words in _WORDS.items():
        if name in now and saved[name] != now[name]:
            verb = words.rpartition(" ")[2].replace("were", "are").replace("was", "is")
            raise _refusal(
                folder, f"the {words} {_shown(saved[name])}, and {verb} now {_shown(now[name])}"
            )
    if "standardized" in now and not _same_numbers(saved["standardized"], now["standardized"]):
        raise _refusal(
            folder,
            "the mean and variance that data.standardize scales the features with are others: "
            "the rows to train on have changed, or the setting",
        )
    if DIGEST in now and saved[DIGEST] != now[DIGEST]:
        raise _refusal(
            folder, "the preset's tokenizer is another: its vocabulary or its settings have changed"
        )
    if data.tokenizer is not None and (folder / TOKENIZER).exists():
        before = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        if before["model"]["vocab"] != data.tokenizer.get_vocab():
            raise _refusal(
                folder,
                "the tokens learned from the texts are others: the texts to train on have changed, "
                "or data.vocabulary",
            )


def tokenizer_digest(preprocessor: Any) -> str | None:
    """A digest of what the tokens of a preset depend on: vocabulary, merges and settings.

    Args:
        preprocessor: That of a preset, or None.
    """
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is None:
        return None
    settings = {
        name: value
        for name, value in tokenizer.get_config().items()
        if name not in ("name", "dtype") and isinstance(value, bool | int | str)
    }
    parts = [*tokenizer.get_vocabulary(), *(getattr(tokenizer, "merges", None) or ()), settings]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _refusal(folder: Path, problem: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{folder} cannot be resumed with these data: {problem}. Use another args.output_dir for "
        "a new run, or go back to the former data."
    )


def _same_numbers(before: Any, now: Any) -> bool:
    if before is None or now is None:
        return before is now
    return all(
        np.shape(before[name]) == np.shape(now[name]) and np.allclose(before[name], now[name])
        for name in now
    )


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    more = f", ... ({len(value)})" if len(value) > 12 else ""
    return ", ".join(map(str, value[:12])) + more
