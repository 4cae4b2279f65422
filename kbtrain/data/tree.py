"""Nested structures of NumPy arrays: traversal, and conversion of user data.

A *structure* is an array, ``None``, or a dict, list or tuple (named tuples included) of structures.
This is the small part of ``keras.tree`` that data needs, without importing Keras, so that data can
be prepared and tested before a backend is chosen.
"""

from __future__ import annotations

import contextlib
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kbtrain.errors import DataError

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
_KIND_NAMES = {"M": "dates", "m": "time differences"}
_STRING_KINDS = "USaT"  # unicode, bytes, and NumPy 2's variable-width strings


def map_structure(function: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Apply ``function`` to the matching leaves of structures of the same form.

    Args:
        function: Called with one leaf of each structure.
        first: The structure that gives the result its form; a dict keeps its order of keys.
        *rest: More structures of the same form.

    Returns:
        A structure like ``first`` that holds the results. ``None`` stays ``None``.
    """
    if isinstance(first, Mapping):
        return {
            key: map_structure(function, value, *[other[key] for other in rest])
            for key, value in first.items()
        }
    if isinstance(first, (tuple, list)):
        return rebuild_sequence(
            first, [map_structure(function, *items) for items in zip(first, *rest, strict=True)]
        )
    return None if first is None else function(first, *rest)


def without_none(structure: Any) -> Any:
    """Replace ``None`` by ``()``, which no tree library treats as a leaf."""
    if isinstance(structure, Mapping):
        return {key: without_none(value) for key, value in structure.items()}
    if isinstance(structure, (tuple, list)):
        return rebuild_sequence(structure, [without_none(item) for item in structure])
    return () if structure is None else structure


def with_none(structure: Any) -> Any:
    """Undo ``without_none``."""
    if isinstance(structure, Mapping):
        return {key: with_none(value) for key, value in structure.items()}
    if isinstance(structure, (tuple, list)):
        if type(structure) is tuple and not structure:
            return None
        return rebuild_sequence(structure, [with_none(item) for item in structure])
    return structure


def rebuild_sequence(like: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    """Put ``items`` into a list, tuple or named tuple of the type of ``like``."""
    if isinstance(like, list):
        return items
    if is_named_tuple(like):
        return type(like)(*items)
    return tuple(items)


def is_named_tuple(value: Any) -> bool:
    """Whether ``value`` is an instance of a ``NamedTuple`` class."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def leaves_with_paths(structure: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf, with the path written as Python indexing.

    Args:
        structure: The structure to traverse.
        path: Prefix of the paths.

    Yields:
        Pairs such as ``("x['tokens'][0]", array)``.
    """
    if isinstance(structure, Mapping):
        for key, value in structure.items():
            yield from leaves_with_paths(value, f"{path}[{key!r}]")
    elif isinstance(structure, (tuple, list)):
        for position, value in enumerate(structure):
            yield from leaves_with_paths(value, f"{path}[{position}]")
    elif structure is not None:
        yield path, structure


def to_numpy(value: Any, name: str = "batch") -> Any:
    """Convert everything in a structure to NumPy arrays of dtypes that models accept.

    Python numbers, (nested) lists of numbers and objects with ``__array__`` become arrays. float64
    becomes float32, as everywhere in Keras, unless ``keras.config.floatx()`` is float64; all other
    numeric dtypes are kept.

    Args:
        value: A structure of arrays, tensors, numbers and lists of numbers.
        name: Name of ``value`` in error messages.

    Returns:
        The same structure with a ``numpy.ndarray`` at every leaf.

    Raises:
        DataError: A leaf holds strings, objects or ragged lists, or is not an array.
    """
    return map_raw(lambda leaf, path: cast(as_array(leaf, path)), value, name)


def map_raw(function: Callable[[Any, str], Any], value: Any, name: str) -> Any:
    """Apply ``function(leaf, path)`` to raw data, in which a list of numbers is one leaf."""
    if type(value) is np.ndarray:
        return function(value, name)
    if isinstance(value, Mapping):
        return {key: map_raw(function, item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not is_list_of_numbers(value):
        items = [map_raw(function, item, f"{name}[{i}]") for i, item in enumerate(value)]
        return rebuild_sequence(value, items)
    return None if value is None else function(value, name)


def is_list_of_numbers(value: Any, *, of_arrays: bool = True) -> bool:
    """Whether a (nested) list or tuple represents one array rather than several.

    The first element decides, so the cost does not grow with the data. Strings count as numbers
    here, because the error for an array of strings is clearer than one for each string.

    Args:
        value: Anything.
        of_arrays: Whether 0-d ndarrays count as numbers. They do in the output of a collator, where
            ``[y for _, y in samples]`` is a column. They do not in a sample, where they are the
            fields of several arrays (see ``columns.rows``).
    """
    while isinstance(value, (list, tuple)) and not is_named_tuple(value):
        if not value:
            return True
        value = value[0]
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return True
    is_scalar = getattr(value, "shape", None) == ()  # NumPy scalars and 0-d tensors
    return is_scalar and (of_arrays or not isinstance(value, np.ndarray))


def as_array(value: Any, name: str, strings: bool = False) -> np.ndarray:
    """View ``value`` as a plain ndarray of a usable dtype, without a copy if possible.

    Args:
        value: An array, tensor, number, or (nested) sequence of numbers.
        name: Its name in error messages.
        strings: Whether it may hold strings, which models on TensorFlow accept; they become an
            array of objects, whatever their lengths.

    Returns:
        The array; float64 is not converted here (see ``cast``), so that a memory map stays on disk.

    Raises:
        DataError: ``value`` is not an array, or holds strings or objects.
    """
    if strings and isinstance(value, (str, bytes)):
        return np.array(value, object)
    array = value if type(value) is np.ndarray else _convert(value, name)
    is_object = array.dtype.kind == "O"
    if array.dtype.kind in _STRING_KINDS or (is_object and _holds_strings(array)):
        if not strings:
            raise _no_strings(array.dtype, name)
        return array if is_object else array.astype(object)
    if is_object:
        array = _numbers_of(array)
    check_dtype(array.dtype, name)
    return array


def _numbers_of(array: np.ndarray) -> np.ndarray:
    """Convert an object array of numbers to a numeric dtype; return other arrays unchanged.

    Such arrays come from pandas and ``np.array(numbers, dtype=object)``. Integers that only a float
    could represent are not converted, because they would lose digits.
    """
    if not array.size or not all(isinstance(value, numbers.Number) for value in array.flat):
        return array
    found = np.array(array.tolist())
    exact = found.dtype.kind not in "fc" or not all(
        isinstance(value, numbers.Integral) for value in array.flat
    )
    return found if exact and found.shape == array.shape else array


def _holds_strings(array: np.ndarray) -> bool:
    """Whether the first element of an object array is a string."""
    return array.size > 0 and isinstance(array.flat[0], str | bytes)


def cast(array: np.ndarray) -> np.ndarray:
    """Convert float64 (and wider) to float32 and other byte orders to native; keep the rest.

    If Keras computes in float64 by default (``keras.config.floatx()``), float64 is kept.
    """
    dtype = array.dtype
    if dtype is _FLOAT32:
        return array
    if dtype.kind == "f" and dtype.itemsize >= _FLOAT64.itemsize:
        return array.astype(np.float64 if keeps_float64() else np.float32, copy=False)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def keeps_float64() -> bool:
    """Whether float64 data is kept: by Keras' ``floatx`` here, or as set in a worker process."""
    if "float64" in _KEEP_FLOAT64:
        return _KEEP_FLOAT64["float64"]
    keras = sys.modules.get("keras")
    return keras is not None and keras.config.floatx() == "float64"


@contextlib.contextmanager
def keeping_float64(keep: bool) -> Iterator[None]:
    """Set ``keeps_float64`` inside, because Keras in a worker process has default settings."""
    _KEEP_FLOAT64["float64"] = keep
    try:
        yield
    finally:
        del _KEEP_FLOAT64["float64"]


_KEEP_FLOAT64: dict[str, bool] = {}


def has_array(value: Any) -> bool:
    """Whether NumPy can convert ``value``; looked up on its type, as in NumPy."""
    return hasattr(type(value), "__array__")


def is_sparse_matrix(value: Any) -> bool:
    """Whether ``value`` is a sparse matrix or array of SciPy."""
    return type(value).__module__.startswith("scipy.sparse") and hasattr(value, "tocsr")


def check_dtype(dtype: np.dtype, name: str) -> None:
    """Raise a ``DataError`` if models do not accept values of ``dtype``."""
    kind = dtype.kind
    if kind in "fiubc":
        return
    if kind == "V" and dtype.type is not np.void:
        return  # bfloat16 and the 8-bit floats of ml_dtypes have the kind of void
    if kind in _STRING_KINDS:
        raise _no_strings(dtype, name)
    if kind == "O":
        raise DataError(
            f"{name} holds Python objects, not numbers: usually rows of different lengths, missing "
            "values (None), or a pandas column of mixed types. Pad them, or convert them to one "
            f"numeric dtype first. Received: dtype={dtype}"
        )
    what = _KIND_NAMES.get(kind, "structured records")
    raise DataError(
        f"{name} holds {what}, but a model needs numbers. Convert them to a numeric dtype first. "
        f"Received: dtype={dtype}"
    )


def _no_strings(dtype: np.dtype, name: str) -> DataError:
    return DataError(
        f"{name} holds strings, but a model needs numbers. Tokenize or encode them first, or "
        "remove the column. Text layers (TextVectorization, StringLookup) belong in the "
        f"data_collator or the data set, not in the model. Received: dtype={dtype}"
    )


def _convert(value: Any, name: str) -> np.ndarray:
    """Convert anything but a plain ndarray to one."""
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(
            f"{name} is a masked array, whose mask would be lost. Fill it (`.filled(...)`) and "
            "pass the mask as an input or as sample_weight."
        )
    if isinstance(value, (str, bytes)):
        raise DataError(
            f"{name} is a string, but a model needs numbers. Tokenize or encode it first, or "
            f"remove the column. Received: {_shorten(value)}"
        )
    if is_sparse_matrix(value):
        result: np.ndarray = value.toarray()
        return result
    if isinstance(value, bool):
        return np.asarray(value)
    if isinstance(value, int):
        return _integer(value, name)
    if type(value).__name__ == "RaggedTensor":
        raise DataError(
            f"{name} is a RaggedTensor, but the rows of a batch must have the same length. Pad it, "
            "with x.to_tensor() or in a data_collator, and pass lengths or a mask as an input. "
            "(Models on TensorFlow accept ragged inputs.)"
        )
    if not has_array(value) and not isinstance(value, (float, complex, Sequence)):
        raise DataError(
            f"{name} cannot be read as an array. Expected a NumPy array, a tensor, a number or a "
            f"list of numbers. Received: a value of type {type(value).__name__}"
        )
    try:
        array = np.asarray(_to_cpu(value))
        return _of_pandas(value) if array.dtype.kind == "O" and _is_pandas(value) else array
    except MemoryError:
        raise
    except Exception as error:
        ragged = "inhomogeneous" in str(error)
        reason = "its rows have different lengths; pad them" if ragged else error
        raise DataError(f"{name} cannot be converted to a NumPy array: {reason}.") from error


def _is_pandas(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "to_numpy")


def _of_pandas(value: Any) -> np.ndarray:
    """Convert a frame with several numeric dtypes, or with pandas' own dtypes, to one array.

    Raises:
        ValueError, TypeError: It has missing or non-numeric values.
    """
    types = value.dtypes.tolist() if value.ndim == 2 else [value.dtype]
    if not all(getattr(dtype, "kind", "O") in "fiub" for dtype in types):
        return np.asarray(value)
    whole = all(dtype.kind in "iu" for dtype in types)
    result: np.ndarray = value.to_numpy(dtype=np.int64 if whole else np.float64)
    return result


def _integer(value: int, name: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.int64)
    except OverflowError as error:
        raise DataError(f"{name} does not fit into int64. Received: {value}") from error


def _to_cpu(value: Any) -> Any:
    """Detach a tensor and move it to the CPU, because ``__array__`` requires both."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        return value.detach().cpu()
    return value


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
