"""Why some names of the Hugging Face Trainer are not offered, and what to use instead.

The names are entry points of the group ``kbtrain.optimizers.refused``; each loads one of these
texts, which goes into the error message. So `kbtrain`, which does not import this package, gives
the same reason as `optim.get`.
"""

from __future__ import annotations

_PAGED = (
    "paging optimizer state between a GPU and the host is a feature of bitsandbytes' CUDA memory. "
)
_FUSED_BACKWARD = (
    "LOMO fuses the update into PyTorch's backward pass, which has no counterpart elsewhere and "
    "rules out clipping by the global norm. "
)

PAGED_ADAMW = _PAGED + "Use 'adamw', or 'adamw_8bit' to save memory."
PAGED_ADAMW_8BIT = _PAGED + "Use 'adamw_8bit'."
PAGED_ADEMAMIX = _PAGED + "Use 'ademamix', or 'ademamix_8bit' to save memory."
PAGED_ADEMAMIX_8BIT = _PAGED + "Use 'ademamix_8bit'."
PAGED_LION = _PAGED + "Use 'lion', or 'lion_8bit' to save memory."
PAGED_LION_8BIT = _PAGED + "Use 'lion_8bit'."
ADAMW_4BIT = "there is no 4-bit state. Use 'adamw_8bit'."
NPU = "Keras has no backend for Ascend NPUs. Use 'adamw'."
APEX = "apex's fused AdamW is superseded. Use 'adamw', which is fused on every backend."
ADAMW_HF = "Transformers has removed its own AdamW. Use 'adamw', which corrects the bias."
LOMO = _FUSED_BACKWARD + "Use 'adafactor' for little state, or 'sgd' for none."
LOW_RANK = (
    "low-rank state is there for AdamW with float32 moments, and with one update of all layers. "
    "Use 'galore_adamw' or 'apollo_adamw', or 'adamw_8bit' for 8-bit state."
)
SOPHIA = (
    "Sophia needs an estimate of the Hessian, which no call of `apply(gradients)` can have. "
    "Use 'adamw', or 'muon' for an update that conditions whole matrices."
)
