"""A command's flags are the fields of its config dataclass; those of the configs it holds are ``--model.hidden-dims``, say."""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from dataclasses import MISSING, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from sidrec_torchrec.errors import SidrecError

CONFIG = "config"  # the flag that names a file of flags


class UsageError(SidrecError):
    """A command or flag that there is not, or a value that a flag cannot have."""


@dataclass(frozen=True)
class Flag:
    """A field that the command line can set.

    Args:
        path: as Python has it: ``model.hidden_dims``.
        kind: its type.
        help: of it, from the docstring.
        default: ``MISSING`` where one has to be given.
        is_positional: whether its values may stand by themselves, without its name; see ``training.config.POSITIONAL``.
    """

    path: str
    kind: Any
    help: str
    default: Any
    is_positional: bool = False

    @property
    def name(self) -> str:
        """As it is typed, without the dashes before it."""
        return self.path.replace("_", "-")

    @property
    def usage(self) -> str:
        """How it is given."""
        return f"{self.name.upper()} ..." if self.is_positional else f"--{self.name} {self.words}".strip()

    @property
    def last(self) -> str:
        """The last name of the path."""
        return self.path.rpartition(".")[2]

    @property
    def is_config(self) -> bool:
        """Whether it stands for the flags of a config: its value is a file of them."""
        return is_config(self.kind)

    @property
    def is_list(self) -> bool:
        """Whether it is ``tuple[str, ...]``, say."""
        return typing.get_origin(self.kind) is tuple and typing.get_args(self.kind)[1:] == (...,)

    @property
    def choices(self) -> tuple[str, ...]:
        """Its values, where they are listed."""
        options = (self.kind, *typing.get_args(self.kind))
        return next((typing.get_args(one) for one in options if typing.get_origin(one) is typing.Literal), ())

    @property
    def words(self) -> str:
        """What its value is, in a word; nothing for a switch."""
        if self.choices:
            return "|".join(choice or "''" for choice in self.choices)
        kinds = [kind for kind in typing.get_args(self.kind) or (self.kind,) if kind not in (types.NoneType, ...)]
        word = _WORDS.get(typing.get_origin(self.kind) or kinds[0], "TEXT")
        return f"{_WORDS.get(kinds[0], 'TEXT')},..." if self.is_list else word


_WORDS = {bool: "", int: "N", float: "X", Path: "PATH", dict: "JSON"}


def is_config(kind: Any) -> bool:
    """Whether a type is a config dataclass."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def flags_of(config_class: type) -> dict[str, Flag]:
    """Every field by its path, in the order of the class; a config's own fields come after it."""
    return {flag.path: flag for flag in _flags(config_class, "", None)}


def _flags(config_class: type, prefix: str, value: Any) -> list[Flag]:
    hints, helps = typing.get_type_hints(config_class), field_help(config_class)
    found = []
    for field in dataclasses.fields(config_class):
        kind, default = hints[field.name], field.default
        if value is not None:
            default = getattr(value, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        is_positional = field.metadata.get("is_positional", False)
        found.append(Flag(prefix + field.name, kind, helps.get(field.name, ""), default, is_positional))
        if is_config(kind):
            found += _flags(kind, f"{prefix}{field.name}.", None if default is MISSING else default)
    return found


def field_help(config_class: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field."""
    from docstring_parser import parse

    helps = {}
    for base in reversed(config_class.__mro__):
        for parameter in parse(base.__dict__.get("__doc__") or "").params:
            helps[parameter.arg_name] = " ".join((parameter.description or "").replace("``", "").split())
    return helps


def goes_by_its_last_name(flag: Flag, flags: dict[str, Flag]) -> bool:
    """Whether ``--hidden-dims`` is this flag, ``--model.hidden-dims``."""
    return "." in flag.path and flag.last not in flags and len(_ends(flag.last, flags)) == 1


def normalize(arguments: list[str], flags: dict[str, Flag]) -> list[str]:
    """Kebab case to snake case, last names to whole ones, a switch without a value to true; each list flag's values, repeated
    or in comma lists, to one JSON list; values that stand by themselves to the list they belong to.

    Raises:
        UsageError: on a flag that there is not, with those like it; on a last name that several fields have, with them; on a
            flag that needs a value and has none, or a value without a flag.
    """
    plain: list[str] = []
    lists: dict[str, list[str]] = {}
    positional = next((flag.path for flag in flags.values() if flag.is_positional), None)
    rest = iter([*zip(arguments, [*arguments[1:], "--"], strict=False)])
    for argument, after in rest:
        typed, equals, value = argument.partition("=")
        if not typed.startswith("--") and positional is not None:
            lists.setdefault(positional, []).append(argument)
            continue
        if not typed.startswith("--"):
            raise UsageError(f"'{argument}' belongs to no flag")
        path = _full(typed[2:].replace("-", "_"), flags)
        flag = flags.get(path)
        has_none = not equals and after.startswith("--")
        if flag is not None and flag.kind is bool and has_none:
            plain.append(f"--{path}=true")
            continue
        if has_none:
            raise UsageError(f"{typed} needs a value")
        value = value if equals else next(rest)[0]
        if flag is not None and flag.is_list:
            lists.setdefault(path, []).extend(part for part in value.split(",") if part)
        else:
            plain.append(f"--{path}={value}")
    return plain + [f"--{path}={json.dumps(values)}" for path, values in lists.items()]


def missing(arguments: list[str], flags: dict[str, Flag]) -> list[str]:
    """Names of flags that have to be given, and are not in normalized ``arguments``, which name no file of flags either."""
    given = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    heads = {head for path in given for head in _heads(path)}
    if CONFIG in given:
        return []
    return [
        flag.usage if flag.is_positional else f"--{flag.name}"
        for flag in flags.values()
        if flag.default is MISSING and flag.path not in heads
    ]


def _full(name: str, flags: dict[str, Flag]) -> str:
    """The path that ``name`` is, or is the end of.

    Raises:
        UsageError: if there is none, or several.
    """
    if name in flags or name == CONFIG:
        return name
    if any(typing.get_origin(flags[head].kind) is dict for head in _heads(name) if head in flags):
        return name
    ends = _ends(name, flags)
    if len(ends) > 1:
        names = " or ".join(f"--{flags[path].name}" for path in ends)
        raise UsageError(f"--{name.replace('_', '-')} may be {names}; write which")
    if not ends:
        raise UsageError(f"there is no flag --{name.replace('_', '-')}{_suggestion(name, flags)}")
    return ends[0]


def _ends(name: str, flags: dict[str, Flag]) -> list[str]:
    return [path for path in flags if path.endswith(f".{name}")]


def _heads(path: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _suggestion(name: str, flags: dict[str, Flag]) -> str:
    names = {flag.last: flag for flag in reversed(flags.values())} | flags
    likely = difflib.get_close_matches(name, names, 1, 0.7)
    return f"; did you mean --{names[likely[0]].name}?" if likely else ""


def one_line(message: str) -> str:
    """An error of jsonargparse: which flag, and why, in a line."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    found = re.search(r'[Pp]arser key "([\w.]+)":?\s*(.*)', lines[0])
    if not found:
        return " ".join(lines)
    reasons = [found[2], *lines[1:]]
    if given := re.search(
        r"Given value: (.*)", reasons[-1]
    ):  # of a flag that may be left out: the reasons of each of its types
        kinds = [
            kind for line in reasons for kind in re.findall(r"Expected an? <class '(\w+)'>", line) if kind != "NoneType"
        ]
        reasons = [f"must be {kinds[0]}, got '{given[1]}'" if kinds else f"cannot be '{given[1]}'"]
    reason = re.sub(r"Expected an? <class '(\w+)'>\. Got value: (.*)", r"must be \1, got '\2'", reasons[-1])
    reason = re.sub(r"must be float, got '(-?inf|nan)'", r"must be a finite number, got \1", reason)
    reason = re.sub(r"Expected a typing.Literal\[(.*)\]\. Got value: (.*)", r"must be one of \1, got '\2'", reason)
    return f"--{found[1].replace('_', '-')}: {reason}"


def check_numbers(config: Any, flags: dict[str, Flag]) -> None:
    """Refuses numbers that no flag can have, whatever it stands for: YAML knows NaN and infinities, Python whole numbers of any size.

    Raises:
        UsageError: on a number that is not finite, or a whole one of 2^63 or more.
    """
    for flag in flags.values():
        value = attrgetter(flag.path)(config)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{flag.name}: must be a finite number, got {number}")
            if isinstance(number, int) and abs(number) >= 1 << 63:
                raise UsageError(f"--{flag.name}: must lie below 2^63, got {number}")
