"""Fields about the Hugging Face Hub: what is pushed to it, when, and to which repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kbtrain.config import converters
from kbtrain.config.construction import Immutable
from kbtrain.config.fields.option import HARMLESS, option


def _text_or_nothing(value: Any) -> str | None:
    """A string; None, or an empty one as from a configuration file, for nothing."""
    return None if value is None or converters.plain(value) == "" else converters.text(value)


def _token(value: Any) -> str | None:
    """A token; what is written in its place when arguments are saved means none."""
    value = converters.plain(value)
    if value == "<HUB_TOKEN>":
        return None
    try:
        return _text_or_nothing(value)
    except converters.InvalidValue:
        raise converters.InvalidValue("a token (a string), or None") from None


@dataclass(kw_only=True)
class HubFields(Immutable):
    """The Hugging Face Hub."""

    # Hub
    push_to_hub: bool = option(
        False,
        converters.flag,
        "Push the model to the Hugging Face Hub: hub_strategy says when. Needs the extra 'hub'.",
        on_resume=HARMLESS,
    )
    hub_model_id: str | None = option(
        None,
        _text_or_nothing,
        "Repository to push to: 'user/name', or 'name' for one of your own. None means the name of "
        "output_dir. 'hf://user/name' and 'kaggle://user/model/keras/variation' push a KerasHub "
        "model as a preset, to the Hugging Face Hub or to Kaggle.",
        on_resume=HARMLESS,
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save",
        converters.choice("end", "every_save", "checkpoint", "all_checkpoints"),
        "When to push: at the end of fit ('end'), also when a checkpoint is saved ('every_save'), "
        "then with the checkpoint as folder last-checkpoint ('checkpoint'), or with all of them "
        "as folders checkpoint-N ('all_checkpoints').",
        on_resume=HARMLESS,
    )
    hub_token: str | None = option(
        None,
        _token,
        "Token with write access, which is never saved. None means that of HF_TOKEN or of "
        "`hf auth login`.",
        on_resume=HARMLESS,
        secret=True,
    )
    hub_private_repo: bool | None = option(
        None,
        converters.optional(converters.flag),
        "Whether a repository that push_to_hub creates is private. None means the default of its "
        "owner.",
        on_resume=HARMLESS,
    )
    hub_always_push: bool = option(
        False,
        converters.flag,
        "Push every checkpoint that is saved; False skips one while an earlier push is still "
        "running.",
        on_resume=HARMLESS,
    )
    hub_revision: str | None = option(
        None,
        _text_or_nothing,
        "Branch to push to, which is created if it does not exist. None means the main branch.",
        on_resume=HARMLESS,
    )
