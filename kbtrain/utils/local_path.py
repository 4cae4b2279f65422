"""Rejects URLs as paths: the address of an object store would become a local folder."""

from __future__ import annotations

import os
import re
from typing import Any

from kbtrain.errors import ConfigurationError

# `Path` turns "s3://b" into "s3:/b"; a single letter is a Windows drive.
_ADDRESS = re.compile(r"\s*(?:[A-Za-z0-9]+::)*([A-Za-z][A-Za-z0-9+.-]+):/")


def check_local(name: str, path: Any) -> None:
    """Reject an address like ``s3://bucket/run`` where a local path is expected.

    Args:
        name: Name of the argument, for the message.
        path: Its value; anything but a string or a path is ignored here.

    Raises:
        ConfigurationError: The value is an address.
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
            else "Use a local folder and copy the results there afterwards, or mount that storage "
            "(s3fs, gcsfuse, rclone mount, ...) and use the path of the mount."
        )
        raise ConfigurationError(
            f"`{name}` must be a path in the file system: kbtrain does not read or write "
            f"{scheme}:// addresses. {instead} Received: {name}={text!r}"
        )
