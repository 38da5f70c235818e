"""``sidrec COMMAND --flag value ...``: parses, and calls what does the work.

A command's flags are the fields of the config dataclass that its function takes; their help is its docstring.
"""

import dataclasses
import importlib
import json
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sidrec_torchrec.data.converters import CONVERTERS
from sidrec_torchrec.environment import check_environment, doctor
from sidrec_torchrec.errors import SidrecError


@dataclass(frozen=True)
class Command:
    """What the command line offers under one name.

    Args:
        function: it takes one config dataclass; as ``module:function`` it is imported only when called.
        help: what it does.
        print_result: whether to print what the function returns.
    """

    function: str | Callable[..., Any]
    help: str
    print_result: bool = False


_JOBS, _DATA = "sidrec_torchrec.jobs", "sidrec_torchrec.data"

COMMANDS = {
    "pipeline": Command(f"{_JOBS}.pipeline:main", "everything: tokenizers, SIDs, a ranker per arm, and the report"),
    "prepare": Command(f"{_JOBS}.prepare:main", "cut event logs into training, validation and test sequences"),
    "collaborative-vectors": Command(
        f"{_JOBS}.collaborative_vectors:main", "add a vector of what users do with it to every item, for SIDs to tell"
    ),
    "train-tokenizer": Command(f"{_JOBS}.train_tokenizer:main", "learn to fuse an item's content into one SID"),
    "tune-tokenizer": Command(
        f"{_JOBS}.tune_tokenizer:main", "turn a tokenizer towards what users choose, through a ranker trained with it"
    ),
    "encode-corpus": Command(f"{_JOBS}.encode_corpus:main", "write the SID of every item"),
    "decode-sids": Command(f"{_JOBS}.decode_sids:main", "write what SIDs keep of each item"),
    "train-ranker": Command(f"{_JOBS}.train_ranker:main", "train the long-sequence ranker with one arm"),
    "evaluate": Command(f"{_JOBS}.evaluate:main", "test a trained ranker on warm and on cold items"),
    "export": Command(f"{_JOBS}.export_ranker:main", "write a trained ranker as one file that a server loads"),
    "codec collisions": Command(f"{_JOBS}.codec_collisions:main", "say which items share a SID"),
    "codec design": Command(f"{_JOBS}.codec_design:main", "weigh lists of DPCA stages on a source, and name one"),
    "codec disambiguate": Command(
        f"{_JOBS}.codec_disambiguate:main", "add a digit that makes every item's SID its own"
    ),
    "codec drift": Command(f"{_JOBS}.codec_drift:main", "say how SIDs moved between two codecs or two corpora"),
    "data synthetic": Command(f"{_JOBS}.make_synthetic:main", "make a corpus whose structure is known"),
    "data validate": Command(f"{_DATA}.validate:print_validation", "check a data folder, and say what is in it"),
}
_GROUPS = {name.split()[0] for name in COMMANDS if " " in name}
_DOCTOR = "doctor"


def run() -> None:
    """Entry point of the ``sidrec`` command."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Runs one command.

    Args:
        arguments: of the command line, without the program's name.

    Returns:
        Exit code: 0; 1 if ``doctor`` found a mismatch; 2 after an error a user can act on, whose message alone is
        printed (set ``SIDREC_DEBUG=1`` for the traceback); 130 when interrupted.
    """
    name, rest = _split_name(arguments)
    if name == _DOCTOR:
        return doctor()
    if name not in COMMANDS and name not in _converters():
        return _print_usage(name)
    try:
        check_environment()
    except ImportError as error:
        return _print_error(error)
    try:
        return call(_command(name), rest, prog=f"sidrec {name}")
    except (SidrecError, OSError) as error:  # OSError: no permission, no space, a file where a folder should be
        if os.environ.get("SIDREC_DEBUG") == "1":
            raise
        return _print_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def call(command: Command, arguments: list[str], *, prog: str) -> int:
    """Parses a command's flags into its config and calls its function.

    Args:
        command: what to call.
        arguments: flags. ``--a-b`` is ``--a_b``; a flag of several values may be repeated, or hold a comma list.
        prog: the command as the user typed it.
    """
    function = command.function
    if isinstance(function, str):
        module, _, attribute = function.partition(":")
        function = getattr(importlib.import_module(module), attribute)
    result = function(parse_config(_config_class(function), arguments, prog=prog, description=command.help))
    if command.print_result:
        print(json.dumps(result, indent=2))
    return 0


def parse_config(config_class: type, arguments: list[str], *, prog: str, description: str = "") -> Any:
    """A config dataclass from flags and, under ``--config``, a YAML file; flags outdo the file.

    Exits with code 2 and a usage line on a bad flag or value.
    """
    from jsonargparse import ArgumentParser  # half a second, which `doctor` and `--help` need not spend

    parser = ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of flags; flags given here outdo it")
    parser.add_class_arguments(config_class, as_group=False, fail_untyped=True)
    namespace = parser.parse_args(_normalize(arguments, _list_flags(config_class)))
    try:
        values = parser.instantiate(namespace)
        return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
    except SidrecError:
        raise
    except ValueError as error:
        parser.error(str(error))


def _normalize(arguments: list[str], list_flags: set[str]) -> list[str]:
    """Kebab case to snake case; each list flag's values, repeated or in comma lists, to one JSON list."""
    plain: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        if flag not in list_flags:
            plain.append(flag + equals + value)
            continue
        value = value if equals else next(rest, None)
        if value is None:
            plain.append(flag)
        else:
            lists.setdefault(flag, []).extend(part for part in value.split(",") if part)
    return plain + [f"{flag}={json.dumps(values)}" for flag, values in lists.items()]


def _list_flags(config_class: type, prefix: str = "--") -> set[str]:
    """Flags of fields such as ``tuple[str, ...]``, those of nested configs (``--model.hidden``) too."""
    flags = set()
    for name, kind in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            flags |= _list_flags(kind, f"{prefix}{name}.")
        elif typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,):
            flags.add(prefix + name)
    return flags


def _config_class(function: Callable[..., Any]) -> type:
    hints = typing.get_type_hints(function)
    return next(kind for name, kind in hints.items() if name != "return")


def _converters() -> dict[str, str]:
    """By command, the name of the converter that it calls."""
    return {f"data {name}": name for name in CONVERTERS}


def _command(name: str) -> Command:
    """What there is under this name; a converter is loaded."""
    if name in COMMANDS:
        return COMMANDS[name]
    function = CONVERTERS[_converters()[name]]
    return Command(function, (function.__doc__ or "").partition("\n")[0], print_result=True)


def _split_name(arguments: list[str]) -> tuple[str, list[str]]:
    words = 2 if arguments and arguments[0] in _GROUPS else 1
    return " ".join(arguments[:words]), arguments[words:]


def _print_usage(name: str) -> int:
    lines = ["usage: sidrec COMMAND [--flag value ...]", "       sidrec COMMAND --help", ""]
    lines += [f"  {name:<22}{command.help}" for name, command in COMMANDS.items()]
    lines += [f"  {command:<22}convert {converter} to our format" for command, converter in _converters().items()]
    lines += [f"  {_DOCTOR:<22}say what is installed, whether it matches, and what to type if it does not"]
    asked = bool(name) and {*name.split()} <= {*_GROUPS, "-h", "--help", "help"}
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    if not asked:
        return _print_error(f"unknown command '{name}'" if name else "no command")
    return 0


def _print_error(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
