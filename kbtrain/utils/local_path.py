"""Paths are of this machine: an address of object storage would become a folder of that name."""

from __future__ import annotations

import os
import re
from typing import Any

from kbtrain.errors import ConfigurationError

# `Path` makes "s3:/b" of "s3://b"; one letter is a drive of Windows.
_ADDRESS = re.compile(r"\s*(?:[A-Za-z0-9]+::)*([A-Za-z][A-Za-z0-9+.-]+):/")


def check_local(name: str, path: Any) -> None:
    """Refuse an address like ``s3://bucket/run`` where a path is wanted.

    Args:
        name: The argument, for the message.
        path: What was given for it; anything but a text or a path is left to others.

    Raises:
        ConfigurationError: It is an address.
    """
    try:
        text = os.fsdecode(os.fspath(path))
    except TypeError:
        return
    if match := _ADDRESS.match(text):
        scheme = match[1].lower()
        instead = (
            "Write the path alone, without the scheme."
            if scheme == "file"
            else "Give a folder of this machine, or the path under which that storage is mounted "
            "(s3fs, gcsfuse, rclone mount, ...), and copy the results there."
        )
        raise ConfigurationError(
            f"`{name}` must be a path in the file system: kbtrain does not read or write "
            f"{scheme}:// addresses. {instead} Received: {name}={text!r}"
        )
