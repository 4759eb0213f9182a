"""JSON files in and out, and files that are replaced atomically."""

import dataclasses
import json
import os
import reprlib
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

LARGEST = 10**7  # the largest size accepted from a config file: beyond it, even the parameter names would fill memory
MOST_LAYERS = 1000


def read_json(path: Path, missing: dict | None = None) -> dict:
    """Returns the object in a JSON file, or `missing` if there is no such file.

    Raises:
        FileNotFoundError: there is no such file and no `missing`.
        ValueError: the file is not valid JSON, not an object, or larger than 100 MB.
    """
    if not path.is_file():
        if missing is None:
            raise FileNotFoundError(f"{path.parent} has no {path.name}")
        return missing
    if path.stat().st_size > 10**8:
        raise ValueError(f"{path} is over 100 MB, far too large for a file of its kind")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; is the download complete?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains a {type(value).__name__} where an object was expected")
    return value


def known_fields(cls: type, config: dict, where: str, largest: int = LARGEST) -> dict[str, Any]:
    """The entries of a config file that are fields of a dataclass. Those that are null are left to its defaults.

    Raises a ValueError for a value of the wrong type, or for a size out of range. (Ids, layer indices and Pillow's
    resampling filter are not sizes: an id may be 0, and layers may be counted from the end.)
    """
    known = {}
    for name, kind in get_type_hints(cls).items():
        value = config.get(name)
        if value is None or dataclasses.is_dataclass(kind):
            continue
        if not fits(value, kind):
            kind = getattr(kind, "__name__", kind) if get_origin(kind) is None else kind
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}, which is not of type {kind}")
        most = MOST_LAYERS if name == "num_hidden_layers" else largest
        least = -most if name.endswith(("_id", "_layer", "resample")) else 1
        sizes = value.values() if isinstance(value, dict) and name != "rope_parameters" else [value]
        if any(type(size) is int and not least <= size <= most for size in sizes):
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}; it must be between {least} and {most}")
        known[name] = value
    return known


def fits(value: object, kind: object) -> bool:
    """Whether a value from a JSON file matches a type annotation. An integer also matches float."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, args[1]) for item in value.values())
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e18  # not NaN or infinity
    return type(value) is kind


def write_json(path: Path, value: dict) -> None:
    """Writes an object to a JSON file, atomically."""
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def _umask() -> int:
    """The permissions that new files do not get. (It can only be read by setting it.)"""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path in the same folder, and renames the result once it is on disk.

    Raises an OSError with the reason if that fails; an existing file is then left unchanged.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        write(part)
        os.chmod(part, 0o666 & ~_umask())  # safetensors writes files that only their owner can read
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {getattr(error, 'strerror', None) or error}") from error
