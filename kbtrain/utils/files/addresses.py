"""Addresses like ``s3://bucket/run``, and the local folder where the files of a run there begin."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from kbtrain.errors import ConfigurationError

_SECRET = re.compile(r"(?P<user>:/+[^\s/:@]*(?:@[^\s/:@]+)*):[^\s]*@|\?.*", re.DOTALL)
# `Path` turns "s3://b" into "s3:/b"; a single letter is a Windows drive.
_ADDRESS = re.compile(r"\s*(?:[A-Za-z0-9]+::)*([A-Za-z][A-Za-z0-9+.-]+):/")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s:]", re.ASCII)

_SAME = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}
"""Schemes that are other names of one."""


def scheme_of(path: Any) -> str | None:
    """The scheme of an address, in lower case; None for a path.

    Example:
        >>> scheme_of("gs://bucket/run"), scheme_of("C:/run")
        ('gs', None)
    """
    try:
        match = _ADDRESS.match(os.fsdecode(os.fspath(path)))
    except TypeError:
        return None
    return match[1].lower() if match else None


def without_credentials(text: str) -> str:
    """An address, or an option with one, without a password and a query, as it may be shown.

    Example:
        >>> without_credentials("--data=sftp://ada:secret@host/run?key=secret")
        '--data=sftp://ada:<PASSWORD>@host/run?<QUERY>'
        >>> without_credentials("is it a:b@c?")
        'is it a:b@c?'
    """
    if ":/" not in text:
        return text
    return _SECRET.sub(
        lambda found: f"{found['user']}:<PASSWORD>@" if found["user"] else "?<QUERY>", text
    )


def check_local(name: str, path: Any) -> None:
    """Reject an address where only a local path is possible.

    Args:
        name: Name of the argument, for the message.
        path: Its value; anything but a string or a path is ignored here.

    Raises:
        ConfigurationError: The value is an address.
    """
    if (scheme := scheme_of(path)) is not None:
        instead = (
            "Write the path alone, without the scheme."
            if scheme == "file"
            else "Give a local folder, and copy from or to it. TrainingArguments takes addresses, "
            "as output_dir and resume_from_checkpoint."
        )
        raise ConfigurationError(
            f"`{name}` must be a path in the file system, not an address of {scheme}://. {instead} "
            f"Received: {name}={without_credentials(os.fsdecode(os.fspath(path)))!r}"
        )


def check_address(name: str, path: Any) -> None:
    """Reject an address that is not of the form ``scheme://place``; a path is accepted.

    Args:
        name: Name of the argument, for the message.
        path: Its value.

    Raises:
        ConfigurationError: It is a chain (``simplecache::s3://...``), or lacks a slash, as after
            ``Path("s3://bucket/run")``; or it has a password or a query, which would be saved with
            the arguments, in checkpoints and in reports.
    """
    scheme = scheme_of(path)
    if scheme is None:
        return
    text = os.fsdecode(os.fspath(path))
    if (shown := without_credentials(text)) != text:
        raise ConfigurationError(
            f"`{name}` must not hold a password or a query (?...), as it is saved with the run. "
            f"Give credentials in the environment, as FSSPEC_{scheme.upper()}_PASSWORD, or in "
            f"fsspec's configuration. Received: {name}={shown!r}"
        )
    if not _PLAIN.match(text):
        raise ConfigurationError(
            f"`{name}` must be a path, or an address like s3://bucket/run as text: with two "
            "slashes (pathlib.Path takes one away), and with one scheme. "
            f"Received: {name}={without_credentials(os.fsdecode(os.fspath(path)))!r}"
        )


def normalised(address: str) -> str:
    """An address with its scheme in lower case and single slashes, without one at the end.

    Example:
        >>> normalised("S3://bucket//run/"), normalised("file:///run")
        ('s3://bucket/run', 'file:///run')
    """
    scheme, _, place = address.strip().partition("://")
    return f"{scheme.lower()}://{re.sub('/+', '/', place).rstrip('/')}"


def local_folder(output_dir: str) -> Path:
    """The folder of a run on this machine.

    Args:
        output_dir: Its path, which is the folder; or an address. Then it is a folder in
            ``$XDG_CACHE_HOME/kbtrain/runs`` (by default ``~/.cache/kbtrain/runs``) named after it,
            the same one however the address is written, as a lock in it keeps out other runs.

    Example:
        >>> local_folder("s3://bucket/digits").name
        'digits-cfb654f387'
        >>> str(local_folder("runs/digits"))
        'runs/digits'
    """
    if scheme_of(output_dir) is None:
        return Path(output_dir)
    scheme, _, place = normalised(output_dir).partition("://")
    address = f"{_SAME.get(scheme, scheme)}://{place}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", address.rpartition("/")[2]).lstrip(".")[:60]
    digest = hashlib.sha256(address.encode()).hexdigest()[:10]
    return cache / "kbtrain" / "runs" / f"{name}-{digest}"


def beneath(output_dir: str, name: str) -> str:
    """A path or address of something in a run's folder.

    Example:
        >>> beneath("s3://bucket/run/", "run-0")
        's3://bucket/run/run-0'
    """
    if scheme_of(output_dir) is None:
        return str(Path(output_dir) / name)
    return f"{output_dir.rstrip('/')}/{name}"
