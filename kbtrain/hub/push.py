"""``trainer.push_to_hub``, and the push that belongs to ``trainer.save_model``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kbtrain.errors import HubError, OutputError
from kbtrain.hub.pusher import HubPusher, make_repository
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")


def push_to_hub(
    trainer: Any,
    pusher: HubPusher,
    message: str,
    blocking: bool,
    card: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> Any:
    """Save the model, write its card, and push; see ``Trainer.push_to_hub``.

    Args:
        trainer: The Trainer.
        pusher: Its pusher, or one for this call.
        message: The commit message.
        blocking: Whether to wait.
        card: Arguments of ``create_model_card``.
        changes: As for ``make_repository``.
    """
    trainer.fire("on_push_begin")
    repository = pusher.repository
    if repository is not None and any(value is not None for value in changes.values()):
        repository = make_repository(trainer.args, **changes)
    former, trainer.pusher = trainer.pusher, pusher  # the card names its repository
    pusher.pushing = True  # save_model, which a subclass may override, must not push again
    try:
        trainer.save_model()
        if repository is None:
            return None
        if blocking:  # a push in the background creates it itself
            pusher.create(repository)
        if pusher.repository is not None:
            pusher.repository.name = repository.name  # in full, for the card
        trainer.create_model_card(**{"model_name": repository.name.split("/")[-1], **card})
        return pusher.push(trainer, message, repository, blocking)
    finally:
        trainer.pusher, pusher.pushing = former, False


def push_saved(trainer: Any) -> None:
    """Push after a call of ``save_model``; a failure is a warning, as the model is saved."""
    pusher = trainer.pusher
    if pusher is None or pusher.pushing:
        return
    try:
        trainer.push_to_hub("Model save", blocking=not trainer.is_in_train)
    except (HubError, OutputError) as error:
        if current().rank == 0:
            logger.warning("The model is saved, but was not pushed. %s", error)
