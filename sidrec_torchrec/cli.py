"""``sidrec COMMAND --flag value ...``: parses, and calls what does the work.

A command's flags are the fields of the config dataclass that its function takes (``flags.py``). To list and to parse them its
module is not imported: see ``config_source.py``.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import signal
import sys
import time
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sidrec_torchrec.config_source import config_skeleton, first_line_of
from sidrec_torchrec.data.converters import CONVERTERS
from sidrec_torchrec.environment import check_environment, check_if_installed, doctor
from sidrec_torchrec.errors import LostPeerError, SidrecError, out_of_memory
from sidrec_torchrec.files import write_json
from sidrec_torchrec.flags import UsageError, check_numbers, flags_of, is_config, missing, normalize, one_line
from sidrec_torchrec.jobs import HELP, JOBS, WITHOUT_TORCHREC
from sidrec_torchrec.output import Amount, Output, output, say, say_error, show, speaking
from sidrec_torchrec.usage import command_help, commands_help, completion_script, completion_words

_DOCTOR, _COMPLETION = "doctor", "completion"
_CONVERT = "data "  # a converter's command is this and its name
_OWN = {
    _DOCTOR: "say what is installed, whether the versions match, and how to fix it if they do not",
    _COMPLETION: "print what completes commands and flags in bash, zsh or fish",
}
_ASKS = ("-h", "--help")


def run() -> None:
    """Entry point of the ``sidrec`` command."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Runs one command.

    Args:
        arguments: of the command line, without the program's name.

    Returns:
        Exit code: 0; 1 if ``doctor`` found a mismatch; after an error a user can act on, whose message alone is
        printed (set ``SIDREC_DEBUG=1`` for the traceback), 2, 3 if training diverged, 4 if another process of the job has
        ended; 130 when interrupted; 143 after SIGTERM, 129 after SIGHUP.
    """
    try:
        how, is_dry, arguments = _own_options(arguments)
    except UsageError as error:
        return _print_error(error)
    name, rest = _split_name(arguments)
    with speaking(dataclasses.replace(how, job=name)):
        try:
            if (name in ("", *_ASKS, "help") or _is_group(name)) and {*rest} <= {*_ASKS}:
                return _list_commands(is_asked=bool(name))
            if name == "--version":
                return _print_version()
            if name == _COMPLETION:
                return _complete(rest)
            if name == _DOCTOR:
                return doctor()
            return call(name, rest, is_dry=is_dry)
        except BrokenPipeError:  # whoever read what we print has seen enough: `sidrec --help | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (SidrecError, OSError) as error:  # OSError: no permission, no space, a file where a folder should be
            if os.environ.get("SIDREC_DEBUG") == "1":
                raise
            return _print_error(error)
        except ImportError as error:
            if os.environ.get("SIDREC_DEBUG") == "1" or (error.name or "").startswith(__package__):
                raise
            return _print_error(error)
        except (MemoryError, RuntimeError) as error:
            if os.environ.get("SIDREC_DEBUG") == "1" or (known := out_of_memory(error)) is None:
                raise
            return _print_error(known)
        except KeyboardInterrupt:
            _print_error("interrupted")
            return 130


def commands() -> dict[str, str]:
    """What each command does, by name; imports none of them."""
    others = {name: "of another package" for name in JOBS if name not in HELP}
    return HELP | others | {f"{_CONVERT}{name}": f"convert {name} to our format" for name in CONVERTERS} | _OWN


def call(name: str, arguments: list[str], *, is_dry: bool = False) -> int:
    """Parses a command's flags into its config and calls its function.

    Args:
        name: of the command.
        arguments: flags. ``--a_b`` is ``--a-b``; a flag of several values may be repeated, or hold a comma list.
        is_dry: whether to say what would be done instead.

    Raises:
        UsageError: on a command, flag or value that there is not.
    """
    registry, entry = _where(name)
    source = registry.source(entry)
    declared = None if source is None else config_skeleton(source)
    declared = declared or _config_class(registry[entry])
    if not {*arguments}.isdisjoint(_ASKS):
        line = first_line_of(source) if source is not None else (registry[entry].__doc__ or "").partition("\n")[0]
        print(command_help(name, HELP.get(name, line), flags_of(declared)))
        return 0
    values = parse_config(declared, arguments, prog=f"sidrec {name}")
    # before torch is imported: each process would warn of what ``fixed_buckets`` asks for
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    (check_if_installed if name in WITHOUT_TORCHREC else check_environment)()
    from sidrec_torchrec.training.progress import stage  # a tenth of a second

    function = registry[entry]
    config = _checked(_config_class(function), values)
    if is_dry:
        from sidrec_torchrec.dry_run import print_plan  # imports torch

        print_plan(name, function, config)
        return 0
    start = time.monotonic()
    if registry is CONVERTERS:
        with stage(name, None, show=True, line=False):
            result = function(config)
        show(json.dumps(result, indent=2))
    else:
        function(config)
    out = getattr(config, "out", None)
    say(f"{name}: done in {time.monotonic() - start:.0f} s" + (f"; see {out}" if out is not None else ""))
    return 0


def parse_config(config_class: type, arguments: list[str], *, prog: str) -> Any:
    """A config dataclass from flags and, under ``--config``, a YAML file; flags take precedence over the file.

    Raises:
        UsageError: on a bad flag or value.
    """
    flags = flags_of(config_class)
    arguments = normalize(arguments, flags)
    if absent := missing(arguments, flags):
        raise UsageError(f"{prog} needs {', '.join(absent)}; {prog} --help lists all flags")
    from jsonargparse import ArgumentParser  # half a second, which `--help` need not spend

    class Parser(ArgumentParser):
        def error(self, message: str, *_: Any) -> typing.NoReturn:
            raise UsageError(one_line(message))

    parser = Parser(prog=prog, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, as_group=False, fail_untyped=True)
    try:
        values = parser.instantiate(parser.parse_args(arguments))
        config = config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
        check_numbers(config, flags)
        return config
    except SidrecError:
        raise
    except UnicodeDecodeError as error:
        parser.error(f"the file of --config is not text in UTF-8: {error}")
    except ValueError as error:
        raise UsageError(str(error)) from error


def _checked(config_class: type, values: Any) -> Any:
    """The config itself, from its skeleton, or from what is one already.

    Raises:
        UsageError: on a value it refuses.
    """
    if isinstance(values, config_class):
        return values
    hints = typing.get_type_hints(config_class)
    fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(config_class)}
    made = {name: _checked(hints[name], value) if is_config(hints[name]) else value for name, value in fields.items()}
    try:
        return config_class(**made)
    except SidrecError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _config_class(function: Callable[..., Any]) -> type:
    hints = typing.get_type_hints(function)
    return next(kind for name, kind in hints.items() if name != "return")


def _own_options(arguments: list[str]) -> tuple[Output, bool, list[str]]:
    """What every command has: how it speaks, whether it only says what it would do; and the other arguments."""
    rest, amount, kind, is_dry = [], output().amount, os.environ.get("SIDREC_LOG", "text"), False
    words = iter(arguments)
    for word in words:
        if word in ("--quiet", "--verbose"):
            amount = Amount.QUIET if word == "--quiet" else Amount.VERBOSE
        elif word == "--dry-run":
            is_dry = True
        elif word.partition("=")[0] == "--log":
            kind = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    if kind not in ("text", "json"):
        raise UsageError(f"--log is text or json, got '{kind}'")
    return Output(is_json=kind == "json", amount=amount), is_dry, rest


def _split_name(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and the rest."""
    first = arguments[0] if arguments else ""
    is_pair = len(arguments) > 1 and not arguments[1].startswith("-") and _is_group(first)
    return " ".join(arguments[: 1 + is_pair]), arguments[1 + is_pair :]


def _is_group(word: str) -> bool:
    """Whether it begins commands of two words. Other packages' names are read only where ours do not say it: that takes time."""
    names = (*HELP, _CONVERT) if word in HELP or any(n.startswith(f"{word} ") for n in HELP) else (*HELP, *JOBS)
    return bool(word) and any(name.startswith(f"{word} ") for name in names)


def _where(name: str) -> tuple[Any, str]:
    """The registry that has a command, and its name there.

    Raises:
        UsageError: if there is none; names one like it.
    """
    if name in JOBS:
        return JOBS, name
    if name.startswith(_CONVERT) and name.removeprefix(_CONVERT) in CONVERTERS:
        return CONVERTERS, name.removeprefix(_CONVERT)
    likely = difflib.get_close_matches(name, commands(), 1, 0.6)
    hint = f"did you mean '{likely[0]}'?" if likely else "sidrec --help lists all"
    raise UsageError(f"there is no command '{name}'; {hint}")


def _list_commands(*, is_asked: bool) -> int:
    if not is_asked:
        return _print_error("no command; sidrec --help lists all")
    print(commands_help(commands()))
    return 0


def _print_version() -> int:
    from sidrec_torchrec import __version__

    print(f"sidrec-torchrec {__version__}")
    return 0


def _complete(words: list[str]) -> int:
    """Prints a shell's script; or, for that script, what may follow the words."""
    shell, *words = words or [""]
    if shell == "words":
        name, rest = _split_name(words)
        flags = None
        if name in JOBS or name.removeprefix(_CONVERT) in CONVERTERS:
            registry, entry = _where(name)
            source = registry.source(entry)
            flags = flags_of((source and config_skeleton(source)) or _config_class(registry[entry]))
        print("\n".join(completion_words(commands(), rest if flags is not None else words, flags)))
        return 0
    script = completion_script(shell)
    if script is None:
        raise UsageError("name your shell: sidrec completion bash, zsh or fish")
    print(script)
    return 0


def _print_error(error: Exception | str) -> int:
    """Says it in a line, where no other process of this machine has; returns the exit code."""
    text = str(error)
    if _is_first_to_say(text):
        say_error(text)
    if not isinstance(error, LostPeerError):
        _tell_torchrun(text)
    return error.exit_code if isinstance(error, SidrecError) else SidrecError.exit_code


def _tell_torchrun(text: str) -> None:
    """Leaves the sentence where torchrun looks for it: its own report, the last that is printed, then shows it as the root cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        known = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            write_json(Path(file), {"message": {"message": text, "extraInfo": known}})


def _is_first_to_say(text: str) -> bool:
    """Whether none of this machine's processes of the same attempt of torchrun has said it: all may meet the same error."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return True
    said = Path(file).parents[1] / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}"  # one folder an attempt
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


if __name__ == "__main__":
    run()
