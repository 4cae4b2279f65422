"""Optional dependencies: imported when used, with an error that names the missing package."""

from __future__ import annotations

import importlib
from typing import Any

from kbtrain.errors import ConfigurationError


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Dotted name of the module.
        extra: The extra of kbtrain that installs its package.
        purpose: What needs it, as the subject of a sentence.

    Returns:
        The module.

    Raises:
        ConfigurationError: The package is not installed, or fails to import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"{purpose} needs the package {module.partition('.')[0]!r}, which cannot be imported "
            f"({error}). Install it with: pip install 'kbtrain[{extra}]'."
        ) from None
