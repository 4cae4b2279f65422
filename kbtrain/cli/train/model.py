"""From the sections model, loss, metrics and callbacks to objects of Keras and kbtrain."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kbtrain.cli.train.data import Data
from kbtrain.cli.train.presets import from_preset
from kbtrain.cli.train.settings import Place, Settings
from kbtrain.errors import first_lines
from kbtrain.utils.layers import ends_in
from kbtrain.utils.packages.tensorflow_import import not_imported

_SOURCES = ("layers", "file", "function", "application", "preset")


def check_model(settings: Settings) -> str:
    """The one setting of section model that says what the model is.

    Raises:
        ConfigurationError: There is none, or several, or one that is for other data.
    """
    given = [name for name in _SOURCES if getattr(settings.model, name) is not None]
    if len(given) != 1:
        listed = ", ".join(_SOURCES)
        received = ", ".join(given) or "none"
        raise settings.error(("model",), f"takes one of {listed}. Received: {received}.")
    if settings.model.arguments and given[0] in ("layers", "file"):
        raise settings.error(("model", "arguments"), f"is not for model.{given[0]}.")
    return given[0]


def image_preparation(settings: Settings) -> Callable[[Any], Any]:
    """What the model wants to be done with pixels from 0 to 255."""
    if settings.model.application is None:
        return lambda pixels: pixels
    module = getattr(keras.applications, _application_module(settings))
    return lambda pixels: module.preprocess_input(np.array(pixels))


def make_model(settings: Settings, data: Data) -> keras.Model:
    """Build the model; data for a preset are replaced by what its preprocessor makes of them.

    Raises:
        ConfigurationError: It cannot be built, or its outputs do not fit the data.
    """
    source = check_model(settings)
    model = {
        "layers": _from_layers,
        "file": _from_file,
        "function": _from_function,
        "application": _from_application,
        "preset": from_preset,
    }[source](settings, data)
    if not isinstance(model, keras.Model):
        received = f"Received: {type(model).__name__}."
        raise settings.error(("model", source), f"must give a keras.Model. {received}")
    if settings.data.standardize:
        x = data.sets["train"][0].astype("float64")
        mean, variance = x.mean(axis=0), x.var(axis=0)
        variance = np.where(variance == 0, 1.0, variance)
        scaled = keras.layers.Normalization(mean=mean, variance=variance)
        data.standardized = {"mean": mean.tolist(), "variance": variance.tolist()}
        model = keras.Sequential([keras.Input(data.shape), scaled, model])
    shape = getattr(model, "output_shape", None)
    outputs = shape[-1] if isinstance(shape, tuple) else data.outputs
    if settings.get("loss") is None and outputs != data.outputs:
        is_number = data.task == "classification" and type((data.classes or [""])[0]) is int
        other = ", or write data.task: regression" if is_number else ""
        what = "classes" if data.task == "classification" else "values to predict"
        raise settings.error(
            ("model", source),
            f"the model has {outputs} outputs, and there are {data.outputs} {what}. Give "
            f"its last layer as many{other}, or set loss.",
        )
    return model


def make_loss(settings: Settings, data: Data, model: keras.Model) -> Any:
    """The loss that is set, or that of the task.

    A cross-entropy takes the model's outputs for logits unless the model ends in a softmax or a
    sigmoid, or its ``from_logits`` is set.
    """
    given = settings.get("loss")
    if given is not None:
        loss = _made(settings, ("loss",), _with_logits(given, model), keras.losses)
        is_binary = isinstance(loss, keras.losses.BinaryCrossentropy)
        if is_binary and data.task == "classification" and data.outputs != 2:
            raise settings.error(
                ("loss",), f"{loss.name} is for two classes, and there are {data.outputs}."
            )
        return loss
    if data.task == "regression":
        return keras.losses.MeanSquaredError()
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not ends_in(model, "softmax"))


def make_list(
    settings: Settings,
    name: str,
    modules: Sequence[Any],
    default: list[Any],
    adapt: Callable[[Place, Any], Any] = lambda place, given: given,
) -> Any:
    """The metrics or callbacks that are set.

    Args:
        settings: The settings.
        name: ``"metrics"`` or ``"callbacks"``.
        modules: Where names are looked up.
        default: What there is if nothing is set.
        adapt: Called with the place and the setting of each before it is made.

    Raises:
        ConfigurationError: It is not a list, or one of them is not known.
    """
    given = settings.get(name)
    if given is None:
        return default
    if not isinstance(given, list):
        raise settings.error((name,), f"must be a list, [a, b]. Received: {given!r}.")
    places = [((name, n), one) for n, one in enumerate(given)]
    made = [_made(settings, place, adapt(place, one), *modules) for place, one in places]
    return [one() if isinstance(one, type) else one for one in made]


def _with_logits(given: Any, model: keras.Model) -> Any:
    """A cross-entropy of Keras with its ``from_logits``, which is False there unless it is set."""
    name, arguments, kind = given, None, None
    if isinstance(given, dict) and len(given) == 1:
        ((name, arguments),) = given.items()
    if isinstance(name, str):
        with contextlib.suppress(ValueError):  # it is told where the loss is made
            kind = keras.losses.get(name)
    if inspect.isroutine(kind):  # sparse_categorical_crossentropy -> that class
        kind = getattr(keras.losses, kind.__name__.title().replace("_", ""), None)
    elif isinstance(kind, keras.losses.Loss):
        kind = type(kind)
    if not inspect.isclass(kind) or not isinstance(arguments, dict | None):
        return given
    if "from_logits" not in inspect.signature(kind).parameters:
        return given
    last = "sigmoid" if kind.__name__.startswith("Binary") else "softmax"
    return {kind.__name__: {"from_logits": not ends_in(model, last)} | (arguments or {})}


def _made(settings: Settings, place: Place, given: Any, *modules: Any) -> Any:
    """An object from ``Name: {arguments}``, or from a name, which may stay a name."""
    if isinstance(given, str) and ":" not in given:
        if modules[0] in (keras.losses, keras.metrics):
            return given  # the Trainer knows what it means for the model's outputs
        given = {given: {}}
    elif isinstance(given, str):
        return _imported(settings, place, given)
    if not isinstance(given, dict) or len(given) != 1:
        raise settings.error(place, f"must be a name, or Name: {{...}}. Received: {given!r}.")
    ((name, arguments),) = given.items()
    if ":" in name:
        made = _imported(settings, place, name)
    else:
        made = next((getattr(m, name) for m in modules if name in dir(m)), None)
    if made is None or not callable(made):
        known = [n for m in modules for n in dir(m) if n[0].isupper()]
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        listed = " or ".join(m.__name__ for m in modules)
        raise settings.error(place, f"there is no {name!r} in {listed}.{meant}")
    if arguments is not None and not isinstance(arguments, dict):
        raise settings.error(place, f"{name} takes a mapping, {{name: value}}: {arguments!r}.")
    return _called(settings, place, name, made, arguments or {})


def _called(
    settings: Settings, place: Place, name: str, made: Any, arguments: dict[str, Any]
) -> Any:
    try:
        return made(**arguments)
    except (TypeError, ValueError) as problem:  # as Keras refuses arguments
        why = _misspelt(made, arguments) or first_lines(problem)
        raise settings.error(place, f"{name} cannot be made: {why}") from None


def _misspelt(made: Any, arguments: dict[str, Any]) -> str | None:
    """What an argument that is not there seems to mean."""
    try:
        known = list(inspect.signature(made).parameters)
    except (TypeError, ValueError):
        return None
    for name in arguments:
        if name not in known and (close := difflib.get_close_matches(name, known, n=1)):
            return f"it has no argument {name!r}. Did you mean {close[0]}?"
    return None


def _imported(settings: Settings, place: Place, written: str) -> Any:
    """What ``package.module:name`` or ``file.py:name`` names."""
    module, _, name = written.rpartition(":")
    try:
        if not module.endswith(".py"):
            return getattr(importlib.import_module(module), name)
        path = Path(module).expanduser()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return getattr(loaded, name)
    except (ImportError, FileNotFoundError, AttributeError, ValueError) as problem:
        raise settings.error(place, f"{written!r} cannot be imported: {problem}") from None


def _from_layers(settings: Settings, data: Data) -> keras.Model:
    listed = settings.model.layers or []
    layers = [
        _made(settings, ("model", "layers", number), one, keras.layers)
        for number, one in enumerate(listed)
    ]
    for number, layer in enumerate(layers):
        # A token beyond the table is an error on one backend, and another token on the others.
        if isinstance(layer, keras.layers.Embedding) and layer.input_dim < data.tokens:
            raise settings.error(
                ("model", "layers", number),
                f"Embedding has input_dim {layer.input_dim}, and there are {data.tokens} tokens.",
            )
    dtype = "int32" if data.kind == "tokens" else "float32"
    model = keras.Sequential([keras.Input(data.shape, dtype=dtype)])
    for number, layer in enumerate(layers):
        try:
            model.add(layer)
        except (ValueError, TypeError) as problem:
            place = ("model", "layers", number)
            shape = model.output_shape[1:] if number else data.shape
            raise settings.error(
                place, f"does not fit on samples of shape {shape}: {first_lines(problem)}"
            ) from None
    return model


def _from_file(settings: Settings, data: Data) -> Any:
    path = Path(str(settings.model.file)).expanduser()
    try:
        with not_imported():
            if path.suffix == ".json":
                return keras.models.model_from_json(path.read_text(encoding="utf-8"))
            return keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, TypeError) as problem:
        raise settings.error(("model", "file"), f"{path}: {first_lines(problem)}") from None


def _from_function(settings: Settings, data: Data) -> Any:
    written = str(settings.model.function)
    if ":" not in written:
        raise settings.error(
            ("model", "function"),
            f"must be package.module:function or file.py:function. Received: {written!r}.",
        )
    function = _imported(settings, ("model", "function"), written)
    if not inspect.isroutine(function) and not inspect.isclass(function):
        raise settings.error(("model", "function"), f"{written!r} is not a function.")
    takes = inspect.signature(function).parameters
    values = {"input_shape": data.shape, "num_outputs": data.outputs}
    values["vocabulary_size"] = data.tokens
    arguments = {name: value for name, value in values.items() if name in takes}
    arguments |= settings.model.arguments or {}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as problem:
        raise settings.error(("model", "arguments"), f"{written}: {problem}.") from None
    return function(**arguments)  # what it raises is the user's own, and shown as it is


def _application(settings: Settings) -> Any:
    name = str(settings.model.application)
    kind = getattr(keras.applications, name, None)
    if not inspect.isfunction(kind):
        known = sorted(n for n in dir(keras.applications) if n[0].isupper())
        raise settings.error(
            ("model", "application"),
            f"keras.applications has no {name!r}. It has: {', '.join(known)}.",
        )
    return kind


def _application_module(settings: Settings) -> str:
    """The module of ``keras.applications`` with the preprocessing of an application."""
    return str(_application(settings).__module__).rpartition(".")[2]


def _from_application(settings: Settings, data: Data) -> Any:
    place = ("model", "application")
    if data.kind != "images":
        raise settings.error(place, "is for images: data.train is a folder of them.")
    arguments = {"weights": None, "input_shape": data.shape} | (settings.model.arguments or {})
    if arguments["weights"] is None:
        arguments = {"classes": data.outputs, "classifier_activation": None} | arguments
    else:  # the weights are of other classes
        arguments |= {"include_top": False, "pooling": "avg"}
    model = _called(
        settings, place, str(settings.model.application), _application(settings), arguments
    )
    data.prepared_by = f"keras.applications.{_application_module(settings)}.preprocess_input"
    if arguments["weights"] is None:
        return model
    return keras.Model(model.input, keras.layers.Dense(data.outputs)(model.output))
