"""``sidrec COMMAND --flag value ...``: parses, and calls what does the work.

A command's flags are the fields of the config dataclass that its function takes; their help is its docstring. Fields of
the configs it holds are ``--protocol.split``, or ``--split`` where no other of them has that name.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

from sidrec_torchrec.data.converters import CONVERTERS
from sidrec_torchrec.environment import check_environment, doctor
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import HELP, JOBS

_DOCTOR = "doctor"
_CONVERT = "data "  # a converter's command is this and its name
_SHORT_NAMES = (
    "A flag of a config within another, as --{path}, may go by its last name, --{name}, where no other has it."
)


def run() -> None:
    """Entry point of the ``sidrec`` command."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Runs one command.

    Args:
        arguments: of the command line, without the program's name.

    Returns:
        Exit code: 0; 1 if ``doctor`` found a mismatch; after an error a user can act on, whose message alone is
        printed (set ``SIDREC_DEBUG=1`` for the traceback), 2, 3 if training diverged, 4 if another process of the job has ended; 130 when interrupted; 143
        after SIGTERM, 129 after SIGHUP.
    """
    name, rest = _split_name(arguments)
    if name == _DOCTOR:
        return doctor()
    if name not in commands():
        return _print_usage(name)
    try:
        check_environment()
        return call(name, rest)
    except (SidrecError, OSError) as error:  # OSError: no permission, no space, a file where a folder should be
        if os.environ.get("SIDREC_DEBUG") == "1":
            raise
        return _print_error(error)
    except ImportError as error:
        if os.environ.get("SIDREC_DEBUG") == "1" or (error.name or "").startswith(__package__):
            raise
        return _print_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def commands() -> dict[str, str]:
    """What each command does, by name; imports none of them."""
    others = {name: "of another package" for name in JOBS if name not in HELP}
    return HELP | others | {f"{_CONVERT}{name}": f"convert {name} to our format" for name in CONVERTERS}


def call(name: str, arguments: list[str]) -> int:
    """Parses a command's flags into its config and calls its function.

    Args:
        name: of the command.
        arguments: flags. ``--a-b`` is ``--a_b``; a flag of several values may be repeated, or hold a comma list.
    """
    converts = name not in JOBS
    function = CONVERTERS[name.removeprefix(_CONVERT)] if converts else JOBS[name]
    description = HELP.get(name) or (function.__doc__ or "").partition("\n")[0]
    result = function(parse_config(_config_class(function), arguments, prog=f"sidrec {name}", description=description))
    if converts:
        print(json.dumps(result, indent=2))
    return 0


def parse_config(config_class: type, arguments: list[str], *, prog: str, description: str = "") -> Any:
    """A config dataclass from flags and, under ``--config``, a YAML file; flags take precedence over the file.

    Exits with code 2 and a usage line on a bad flag or value.
    """
    from jsonargparse import ArgumentParser  # half a second, which `doctor` and `--help` need not spend

    paths = _paths(config_class)

    class Parser(ArgumentParser):
        def error(self, message: str, *rest: Any) -> typing.NoReturn:
            super().error(message + _suggestion(message, paths), *rest)

    unique = next((path for path in paths if len(_ends(_last(path), paths)) == 1 and _last(path) not in paths), None)
    notes = [_SHORT_NAMES.format(path=unique, name=_last(unique))] if unique else []
    text = ". ".join([*filter(None, [description.removesuffix(".")]), *notes])
    parser = Parser(prog=prog, description=text, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of flags; flags on the command line take precedence"
    )
    parser.add_class_arguments(config_class, as_group=False, fail_untyped=True)
    try:
        namespace = parser.parse_args(_normalize(arguments, paths))
        values = parser.instantiate(namespace)
        return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
    except SidrecError:
        raise
    except UnicodeDecodeError as error:
        parser.error(f"the file of --config is not text in UTF-8: {error}")
    except ValueError as error:
        parser.error(str(error))


def _normalize(arguments: list[str], paths: dict[str, Any]) -> list[str]:
    """Kebab case to snake case, last names to whole ones, a switch without a value to true; each list flag's values, repeated
    or in comma lists, to one JSON list.

    Raises:
        ValueError: on a last name that several fields have; names them.
    """
    plain: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = iter([*zip(arguments, [*arguments[1:], "--"], strict=False)])
    for argument, after in rest:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = "--" + _full(flag[2:].replace("-", "_"), paths)
        kind = paths.get(flag[2:])
        if not _is_list(kind):
            is_bare = kind is bool and not equals and after.startswith("--")
            plain.append(flag + equals + value + "=true" * is_bare)
            continue
        values = value if equals else next(rest, (None, ""))[0]
        if values is None:
            plain.append(flag)
        else:
            lists.setdefault(flag, []).extend(part for part in values.split(",") if part)
    return plain + [f"{flag}={json.dumps(values)}" for flag, values in lists.items()]


def _paths(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Every field, those of configs it holds as ``model.hidden``; and its type."""
    paths = {}
    for name, kind in typing.get_type_hints(config_class).items():
        paths[prefix + name] = kind
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            paths |= _paths(kind, f"{prefix}{name}.")
    return paths


def _is_list(kind: Any) -> bool:
    """Whether it is ``tuple[str, ...]``, say."""
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,)


def _full(name: str, paths: dict[str, Any]) -> str:
    """The path that ends in ``name``, if there is but one; ``name`` itself if it is a path, or none ends so.

    Raises:
        ValueError: if several do; names them.
    """
    ends = _ends(name, paths)
    if name in paths or not ends:
        return name
    if len(ends) > 1:
        raise ValueError(f"--{name} may be {' or '.join(f'--{path}' for path in ends)}; write which")
    return ends[0]


def _ends(name: str, paths: dict[str, Any]) -> list[str]:
    return [path for path in paths if path.endswith(f".{name}")]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _suggestion(message: str, paths: dict[str, Any]) -> str:
    """Flags like those the parser does not know, if there are."""
    if not message.startswith("unrecognized arguments"):
        return ""
    names = {_last(path): path for path in reversed(paths)} | {path: path for path in paths}
    found = [difflib.get_close_matches(name, names, 1, 0.75) for name in re.findall(r"--([\w.]+)", message)]
    likely = [f"--{names[match]}" for matches in found for match in matches]
    return f"; did you mean {', '.join(likely)}?" if likely else ""


def _config_class(function: Callable[..., Any]) -> type:
    hints = typing.get_type_hints(function)
    return next(kind for name, kind in hints.items() if name != "return")


def _split_name(arguments: list[str]) -> tuple[str, list[str]]:
    words = 2 if arguments and arguments[0] in _groups() else 1
    return " ".join(arguments[:words]), arguments[words:]


def _groups() -> set[str]:
    """First words of commands of two."""
    return {name.split()[0] for name in commands() if " " in name}


def _print_usage(name: str) -> int:
    lines = ["usage: sidrec COMMAND [--flag value ...]", "       sidrec COMMAND --help", ""]
    lines += [f"  {command:<23}{text}" for command, text in commands().items()]
    lines += [f"  {_DOCTOR:<23}say what is installed, whether the versions match, and how to fix it if they do not"]
    asked = bool(name) and {*name.split()} <= {*_groups(), "-h", "--help", "help"}
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    if not asked:
        return _print_error(f"unknown command '{name}'" if name else "no command")
    return 0


def _print_error(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, SidrecError) else SidrecError.exit_code


if __name__ == "__main__":
    run()
