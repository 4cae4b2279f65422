"""A model repository of the Hugging Face Hub, through the package ``huggingface_hub``."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kbtrain.errors import ConfigurationError, HubError, first_lines
from kbtrain.hub.staging import staged
from kbtrain.utils.packages.optional_imports import require

T = TypeVar("T")

WAITS = (1.0, 5.0)
"""Seconds before a request that failed is made again, unless the server asks for more."""

LONGEST_WAIT = 60.0
"""Seconds that a server may ask for."""

_REFUSED = (400, 401, 403, 404, 409, 422)


class Repository:
    """A repository, which is created when it is first needed.

    Args:
        name: "user/name", or "name" for a repository of the token's owner.
        token: A token with write access; None means that of the environment or of a login.
        private: Whether to create it as a private one; None means its owner's default.
        revision: The branch; None means the main one.

    Raises:
        ConfigurationError: ``huggingface_hub`` is missing, the name is invalid, or there is no
            token.
    """

    def __init__(
        self,
        name: str,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
    ) -> None:
        self._hub = require("huggingface_hub", "hub", "push_to_hub=True")
        self._utils = require("huggingface_hub.utils", "hub", "push_to_hub=True")
        try:
            self._utils.validate_repo_id(name)
        except ValueError as problem:
            raise ConfigurationError(
                f"hub_model_id must be 'user/name', or 'name' (by default the name of output_dir), "
                f"of letters, digits, '-', '_' and '.'. Received: {name!r}. {first_lines(problem)}"
            ) from None
        token = token if token is not None else self._hub.get_token()
        if token is None:
            raise ConfigurationError(
                f"Pushing to {name} needs a token with write access, and there is none: run "
                "`hf auth login`, set the environment variable HF_TOKEN, or pass hub_token=..."
            )
        self._token = token
        self._api = self._hub.HfApi(token=token, library_name="kbtrain")
        self.name = name
        self.private = private
        self.revision = revision
        self.created = False

    def create(self) -> None:
        """Create the repository and its branch, unless they exist.

        Raises:
            ConfigurationError: The Hub refuses: the token, the name or the branch is wrong.
            HubError: The Hub cannot be reached, or fails.
        """
        if self.created:
            return
        try:
            made = self._repeated(
                lambda: self._api.create_repo(self.name, private=self.private, exist_ok=True)
            )
            self.name = made.repo_id  # with the user's name
            if self.revision not in (None, "main"):
                self._repeated(
                    lambda: self._api.create_branch(self.name, branch=self.revision, exist_ok=True)
                )
        except Exception as error:
            if _status(error) in _REFUSED:
                raise ConfigurationError(
                    f"The Hub refuses to push to {self.name}: {self._described(error)} "
                    "Correct hub_model_id, hub_revision or the token, which needs write access."
                ) from None
            raise self._explained("reach", error) from error
        self.created = True

    def commit(self, stage: Path, message: str, replacing: Sequence[str] = ()) -> Any:
        """Add the files of a folder in one commit, which others see completely or not at all.

        Args:
            stage: The folder.
            message: The commit message.
            replacing: Folders of the repository whose other files are deleted.

        Returns:
            The ``CommitInfo`` of ``huggingface_hub``.

        Raises:
            ConfigurationError, HubError: It failed.
        """
        self.create()
        hub, files = self._hub, staged(stage)

        def commit() -> Any:
            old = self._files_in(replacing) if replacing else ()
            operations = [
                *(hub.CommitOperationAdd(name, str(path)) for name, path in files.items()),
                *(hub.CommitOperationDelete(name) for name in old if name not in files),
            ]
            return self._api.create_commit(
                self.name, operations, commit_message=message, revision=self.revision
            )

        try:
            with self._without_progress_bars():
                return self._repeated(commit)
        except Exception as error:
            raise self._explained("push to", error) from error

    def download(self, folder: str, target: Path) -> Path:
        """Download a folder of the repository, replacing ``target``.

        Args:
            folder: Path of the folder in the repository.
            target: Where to put it; the parent gets a hidden folder meanwhile.

        Returns:
            ``target``.

        Raises:
            HubError: The Hub cannot be reached, or has no such folder.
        """
        beside = target.parent / f".{target.name}-download"
        try:
            with self._without_progress_bars():
                self._name_in_full()
                self._repeated(
                    lambda: self._api.snapshot_download(
                        self.name,
                        revision=self.revision,
                        allow_patterns=f"{folder}/*",
                        local_dir=str(beside),
                    )
                )
        except Exception as error:
            raise self._explained(f"download {folder} from", error) from error
        if not (beside / folder).is_dir():
            shutil.rmtree(beside, ignore_errors=True)
            raise HubError(
                f"{self.name} on the Hub has no folder {folder}: hub_strategy='checkpoint' makes "
                "one. Resume from a checkpoint of output_dir, or start a new run."
            )
        if target.exists():
            shutil.rmtree(target)
        (beside / folder).rename(target)
        shutil.rmtree(beside, ignore_errors=True)
        return target

    def _name_in_full(self) -> None:
        if "/" not in self.name:
            self.name = f"{self._repeated(self._api.whoami)['name']}/{self.name}"

    def _files_in(self, folders: Sequence[str]) -> list[str]:
        listed = self._api.list_repo_files(self.name, revision=self.revision)
        return [name for name in listed if name.partition("/")[0] in folders]

    def _repeated(self, request: Callable[[], T]) -> T:
        """Make a request again after a failure that may pass; ``huggingface_hub`` repeats some."""
        for seconds in WAITS:
            try:
                return request()
            except Exception as error:
                if _status(error) in _REFUSED or not _may_pass(error):
                    raise
                time.sleep(min(max(seconds, _wished_wait(error)), LONGEST_WAIT))
        return request()

    @contextlib.contextmanager
    def _without_progress_bars(self) -> Iterator[None]:
        """Context in which the package shows none: they would break the display of the run."""
        utils = self._utils
        if utils.are_progress_bars_disabled():
            yield
            return
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.enable_progress_bars()

    def _explained(self, what: str, error: Exception) -> HubError:
        if isinstance(error, ConfigurationError):
            return HubError(str(error))
        advice = ""
        if _status(error) is None and _is_connection(error):
            advice = " Check the network, or the address in HF_ENDPOINT, then try again."
        return HubError(
            f"Could not {what} {self.name} on the Hub: {self._described(error)}{advice}"
        )

    def _described(self, error: BaseException) -> str:
        """What happened, without the token, which a server may have repeated."""
        text = ""
        for one in _chain(error):
            if (more := first_lines(one).rstrip(" .")) not in text:
                text += f"{'; ' if text else ''}{type(one).__name__}: {more}"
        return f"{text or type(error).__name__}.".replace(self._token, "<HUB_TOKEN>")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error is about, if it is about one."""
    for one in _chain(error):
        if (response := getattr(one, "response", None)) is not None:
            return int(response.status_code)
    return None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: connections, time-outs, an overloaded server."""
    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 425, 429)
    return _is_connection(error)


def _is_connection(error: BaseException) -> bool:
    """Whether the server was not reached, or did not answer in time."""
    kinds = {base.__name__ for one in _chain(error) for base in type(one).__mro__}
    offline = "OfflineModeIsEnabled" in kinds
    return not offline and bool(kinds & {"TransportError", "ConnectionError", "TimeoutError"})


def _wished_wait(error: BaseException) -> float:
    """Seconds that the server asks to wait."""
    for one in _chain(error):
        if (response := getattr(one, "response", None)) is not None:
            value = response.headers.get("retry-after", "")
            return float(value) if value.isdigit() else 0.0
    return 0.0
