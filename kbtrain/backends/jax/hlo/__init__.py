"""What a compiled XLA program does, read from its text: ``Program``.

Only the text of a scheduled module (``compiled.as_text()``) is read, so that programs for devices
that are not there can be read, too.
"""

from kbtrain.backends.jax.hlo.collective import Collective
from kbtrain.backends.jax.hlo.groups import UnknownGroupsError
from kbtrain.backends.jax.hlo.program import Program

__all__ = ["Collective", "Program", "UnknownGroupsError"]
