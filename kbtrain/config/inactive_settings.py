"""Settings of Transformers that kbtrain does not have, with a value that leaves them inactive.

Scripts and configuration files often spell them out: ``deepspeed=None``, ``local_rank=-1``. Such
a value is accepted, since it changes nothing; any other value is an error that names the
alternative.
"""

from __future__ import annotations

from typing import Any

from kbtrain.config.converters import plain
from kbtrain.config.migration import DROPPED, RENAMED
from kbtrain.utils.machine.processes import current

_NOTHING: tuple[Any, ...] = (None, False, "", [], (), {})
_SPLITTING = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
}

# Other inactive values: defaults of Transformers, and what it writes for them into its JSON.
_ALSO: dict[str, tuple[Any, ...]] = {
    "accelerator_config": (_SPLITTING,),
    "dataloader_in_order": (True,),
    "ddp_broadcast_buffers": (True,),
    "ddp_find_unused_parameters": (True,),
    "ddp_static_graph": (True,),
    "eval_use_gather_object": (0,),
    "fsdp_min_num_params": (0,),
    "local_rank": (-1, 0),
    "past_index": (-1,),
    "ray_scope": ("last",),
    "tpu_num_cores": (0,),
}  # fmt: skip

# For renamed settings, False may have an effect; only these values do not.
_OF_RENAMED: dict[str, tuple[Any, ...]] = {
    "adafactor": (False,),
    "evaluate_during_training": (False,),
    "evaluation_strategy": ("no",),
    "fp16_backend": ("auto", ""),
    "fp16_opt_level": ("O1", ""),
    "group_by_length": (False,),
    "half_precision_backend": ("auto", ""),
    "include_inputs_for_metrics": (False,),
    "include_tokens_per_second": (False, "no"),
    "jit_mode_eval": (False,),
    # True, the default of Transformers, hides NaN in the logs. Here on_nonfinite decides about the
    # update, and a NaN that is allowed is logged as NaN, as with False.
    "logging_nan_inf_filter": (True, False),
    "no_cuda": (False,),
    "push_to_hub_model_id": ("",),
    "push_to_hub_organization": ("",),
    "push_to_hub_token": ("<PUSH_TO_HUB_TOKEN>", ""),
    "sortish_sampler": (False,),
    "torch_compile": (False,),
    "torchdynamo": (False, ""),
    "use_mps_device": (False,),
    "warmup_ratio": (0.0, 0),
}

_BY_DEFAULT = {
    "dataloader_in_order": True,
    "local_rank": -1,
    "past_index": -1,
    "ray_scope": "last",
    **dict.fromkeys(
        [
            *("eval_use_gather_object", "use_cache"),
            *("use_liger_kernel", "overwrite_output_dir", "save_safetensors", "tpu_metrics_debug"),
            *("use_ipex", "use_legacy_prediction_loop"),
        ],
        False,
    ),
}

NEUTRAL: dict[str, Any] = {name: _BY_DEFAULT.get(name) for name in DROPPED}
"""The inactive value of each setting that kbtrain does not have, which ``args.NAME`` returns."""


def is_inactive(name: str, value: Any) -> bool:
    """Whether a setting that kbtrain does not have has no effect with this value.

    Args:
        name: A name that is not a field.
        value: The given value.
    """
    if name in DROPPED:
        usual = (None,) if name == "dataloader_in_order" else _NOTHING
        accepted = (*usual, *_ALSO.get(name, ()))
    elif name in RENAMED:
        accepted = (None, *_OF_RENAMED.get(name, ()))
    else:
        return False
    value = plain(value)
    if name == "local_rank" and value == current().local_rank:
        return True  # as some launchers pass it to a script
    # By type as well: 1 is not True, and comparing an array does not give a bool.
    return any(type(value) is type(one) and value == one for one in accepted)
