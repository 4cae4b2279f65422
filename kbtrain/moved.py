"""Module paths of release 0.1: an import of one gives the module at its new place, for one release.

They were internal, and scripts import them all the same. ``sys.modules`` holds one module under
both names, so that what is replaced in it (``monkeypatch``) is replaced for kbtrain, too.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_BY_FOLDER = {
    # (old package, new package): names of modules, "old:new" where that has changed, too
    ("kbtrain", "kbtrain.callbacks"): (
        "callback_handler:handler newest:lazy_values state timed:time_triggers"
    ),
    ("kbtrain", "kbtrain.display"): ("progress:callbacks"),
    ("kbtrain.callbacks", "kbtrain.display"): ("progress_bar:callbacks"),
    ("kbtrain", "kbtrain.checkpoint"): (
        "documents:validated_json persistence:run_state processing:processing_class "
        "saving:async_checkpointer warm_start:load_weights"
    ),
    ("kbtrain", "kbtrain.config"): (
        "args_changes:diff args_documents:serialization args_kinds:converters "
        "args_process:process_properties args_renames:migration args_validation:validation "
        "parser:argument_parser yaml_text:yaml"
    ),
    ("kbtrain", "kbtrain.data"): ("pace:block_length tokens:token_count workers"),
    ("kbtrain", "kbtrain.distributed"): ("execution:placement"),
    ("kbtrain", "kbtrain.evaluation"): ("gathering:gather generation:generate"),
    ("kbtrain", "kbtrain.model"): ("bound_model building:build forward metrics"),
    ("kbtrain", "kbtrain.model.losses"): ("label_check label_smoothing loss:pairs"),
    ("kbtrain", "kbtrain.model.wrappers"): (
        "diagnosis:debug_overflow interception:layer_calls neftune recompute:gradient_checkpointing"
    ),
    ("kbtrain", "kbtrain.optimization"): (
        "evaluation_weights metric_schedule:metric_driven registry"
    ),
    ("kbtrain", "kbtrain.trainer"): (
        "reports search trainer_checks:argument_checks trainer_renames:migration"
    ),
    ("kbtrain", "kbtrain.training"): (
        "actions batch_size:auto_batch_size fitting:fit interruption:stop_signals "
        "loaders:dataloaders loop run step:train_step"
    ),
    ("kbtrain", "kbtrain.utils"): ("rng step_times:timing verbosity:logging"),
    ("kbtrain", "kbtrain.utils.files"): ("output_files"),
    ("kbtrain", "kbtrain.utils.machine"): ("memory"),
    ("kbtrain", "kbtrain.utils.packages"): (
        "extras:optional_imports lazy_tensorflow:tensorflow_import"
    ),
    ("kbtrain.backends", "kbtrain.backends"): ("scope:scopes"),
    ("kbtrain.backends", "kbtrain.backends.jax"): (
        "jax_compile:compile jax_device:device jax_state:scope jax_trace:trace"
    ),
    ("kbtrain.backends", "kbtrain.backends.tensorflow"): (
        "tensorflow_device:device tensorflow_functions:autograph tensorflow_update:optimizer"
    ),
    ("kbtrain.backends", "kbtrain.backends.torch"): ("torch_device:device torch_runner:runner"),
    ("kbtrain.backends", "kbtrain.backends.torch.capture"): (
        "torch_capture:step torch_graph:cuda_graph torch_kept:large_gradients "
        "torch_native:keras_overrides torch_program:program torch_random:random "
        "torch_record:trace torch_rewrites:simplify torch_skips:predication torch_views:views"
    ),
    ("kbtrain.checkpoint", "kbtrain.checkpoint"): ("layout:keras_layout"),
    ("kbtrain.checkpoint", "kbtrain.checkpoint.storage"): (
        "contents:folder_writer dtypes format lock manifest places:array_index "
        "reading:folder_reader writing:array_writer"
    ),
    ("kbtrain.checkpoint", "kbtrain.utils.files"): ("disk:filesystem"),
    ("kbtrain.data", "kbtrain.data"): ("epochs:fixed_epochs shapes:shape_monitor structure:tree"),
    ("kbtrain.data", "kbtrain.data.collators"): (
        "collate:default collators_lm:language_modeling padding"
    ),
    ("kbtrain.data", "kbtrain.data.sampling"): ("lengths:by_length permutation"),
    ("kbtrain.data", "kbtrain.data.sources"): (
        "columns foreign:interop recognise:infer unused:column_filter"
    ),
}

MOVED = {
    f"{old_package}.{old}": f"{new_package}.{new or old}"
    for (old_package, new_package), names in _BY_FOLDER.items()
    for old, _, new in (name.partition(":") for name in names.split())
}
"""Old module path -> new module path."""


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of ``MOVED``, after all other finders have been asked."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} has moved to {new}, and the old path will be removed in the next "
            "release. What is public is imported from kbtrain itself.",
            DeprecationWarning,
            stacklevel=2,
        )
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put that of the old path there


def install() -> None:
    """Let the old paths be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
