"""Config dataclasses of jobs: paths that may be given as text or as URLs, and JSON, as run folders keep it."""

import dataclasses
import os
import types
import typing
from pathlib import Path
from typing import Any, ClassVar

from sidrec_torchrec.storage.mirror import bring, local
from sidrec_torchrec.storage.urls import absolute, is_url, relative

POSITIONAL = {
    "is_positional": True
}  # metadata of a field of several values that need no flag before them on the command line
_PATH = "path"  # a path is {"path": relative to the run's folder, "was": absolute}
_WAS = "was"


class JobConfig:
    """Base of dataclasses with fields that are paths, which may be given as text, or as URLs.

    Of a URL the field holds the mirror, which shows what is there, if it is to be read; see ``storage``.

    Attributes:
        writes: fields that name what is written.
    """

    writes: ClassVar[tuple[str, ...]] = ("out", "json")

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value, is_output = getattr(self, name), name in self.writes
            if isinstance(value, str | Path) and Path in (hint, *typing.get_args(hint)):
                object.__setattr__(self, name, local(value, is_output=is_output))
            elif isinstance(value, tuple | list) and typing.get_args(hint) == (Path, ...):
                object.__setattr__(self, name, tuple(local(path, is_output=is_output) for path in value))


def config_json(config: Any, folder: Path) -> dict[str, Any]:
    """A config dataclass as a JSON value.

    Args:
        config: its fields are numbers, text, paths, configs, and tuples and dicts of them.
        folder: that paths are written relative to.
    """
    return {field.name: _plain(getattr(config, field.name), folder) for field in dataclasses.fields(config)}


def config_from_json(kind: type, value: dict[str, Any], folder: Path) -> Any:
    """The config dataclass ``config_json`` wrote.

    Args:
        kind: its class.
        value: what ``config_json`` gave.
        folder: where it is kept now: a path is what lies there relative to it; if nothing does, what lay there once.

    Raises:
        KeyError: on a field that ``kind`` has not.
        TypeError: if a field without a default is missing.
    """
    hints = typing.get_type_hints(kind)
    return kind(**{name: _typed(hints[name], value[name], folder) for name in value})


def without_paths(value: Any) -> Any:
    """The JSON value with no word on where paths lead, only on how many there are."""
    if isinstance(value, dict):
        return "a path" if _is_path(value) else {k: without_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(v) for v in value]
    return value


def plain_fields(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The JSON value of a config as one flat dict: fields of configs within as ``model.dim``, paths as text."""
    flat: dict[str, Any] = {}
    for name, field in value.items():
        is_config = isinstance(field, dict) and not _is_path(field)
        flat |= plain_fields(field, f"{prefix}{name}.") if is_config else {prefix + name: _shown(field)}
    return flat


def without(value: Any, names: tuple[str, ...]) -> Any:
    """The JSON value without fields of these names, at any depth."""
    if isinstance(value, dict):
        return {k: without(v, names) for k, v in value.items() if k not in names}
    return [without(v, names) for v in value] if isinstance(value, list) else value


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return ",".join(str(_shown(v)) for v in value)
    return value[_WAS] if _is_path(value) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_PATH, _WAS}


def _typed(hint: Any, value: Any, folder: Path) -> Any:
    if value is None:
        return None
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return config_from_json(hint, value, folder)
    origin, options = typing.get_origin(hint), [o for o in typing.get_args(hint) if o is not types.NoneType]
    if origin is typing.Literal:
        return value
    if origin is tuple:
        return tuple(_typed(options[0], v, folder) for v in value)
    if origin is dict:
        return {k: _typed(options[1], v, folder) for k, v in value.items()}
    if options:  # Optional
        return _typed(options[0], value, folder)
    if hint is Path:
        return located(value, folder)
    return hint(value)


def located(value: dict[str, str] | str, folder: Path) -> Path:
    """A path as ``config_json`` wrote it; see ``config_from_json``. What is at a URL is brought."""
    if isinstance(value, str):  # of an earlier version
        return Path(value)
    if is_url(value[_PATH]):
        return local(value[_PATH])
    path = Path(os.path.normpath(folder.resolve() / value[_PATH]))
    bring(path)
    return path if path.exists() or not is_url(value[_WAS]) and not Path(value[_WAS]).exists() else local(value[_WAS])


def _plain(value: Any, folder: Path) -> Any:
    if dataclasses.is_dataclass(value):
        return config_json(value, folder)
    if isinstance(value, Path):
        return {_PATH: relative(value, folder), _WAS: absolute(value)}
    if isinstance(value, list | tuple):
        return [_plain(v, folder) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v, folder) for k, v in value.items()}
    return value
