"""What the command line says of itself: help, and the words a shell completes."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_args

from sidrec_torchrec.flags import Flag, goes_by_its_last_name, is_config

_COLUMN = 30  # where help begins
_OF_EVERY_COMMAND = {
    "config FILE": "YAML file of flags; those on the command line take precedence",
    "dry-run": "say what would run and what is done already; run nothing",
    "quiet": "say nothing but results, warnings and errors",
    "verbose": "say more: every epoch, and where a log is not a terminal, how far long steps are",
    "log text|json": "how it says what is not its result: lines for people, or a JSON object each; under torchrun, SIDREC_LOG=json",
    "help": "this",
}
_SHELLS = {
    "bash": """_sidrec() {
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(sidrec completion words "${COMP_WORDS[@]:1:COMP_CWORD-1}" 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _sidrec sidrec""",
    "fish": "complete -c sidrec -a '(sidrec completion words (commandline -opc)[2..])'",
}
_SHELLS["zsh"] = "autoload -U +X bashcompinit && bashcompinit\n" + _SHELLS["bash"]


def commands_help(commands: Mapping[str, str]) -> str:
    """The list of commands.

    Args:
        commands: what each does.
    """
    width = max(map(len, commands)) + 3
    lines = ["usage: sidrec COMMAND [--flag value ...]", "       sidrec COMMAND --help", ""]
    lines += [f"  {name:<{width}}{text}" for name, text in commands.items()]
    return "\n".join([*lines, "", 'Tab completion: eval "$(sidrec completion bash)", or zsh, or fish'])


def command_help(name: str, text: str, flags: dict[str, Flag]) -> str:
    """A command's flags, those that have to be given first, those of each config it holds together.

    Args:
        name: of the command.
        text: what it does.
        flags: as ``flags_of`` gives them.
    """
    required = [flag for flag in flags.values() if flag.default is MISSING]
    given = " ".join(flag.usage for flag in required)
    lines = [f"usage: sidrec {name} {given} [--flag value ...]", "", *_wrapped(_sentence(text)), ""]
    groups: dict[str, list[Flag]] = {"": []}
    for flag in flags.values():
        if flag.is_config:
            groups[flag.path] = []
        else:
            groups.setdefault(flag.path.rpartition(".")[0], []).append(flag)
    for path, group in groups.items():
        if path:
            lines += [*_wrapped(f"{flags[path].name}: {_sentence(flags[path].help)}"), ""]
        for flag in sorted(group, key=lambda flag: flag.default is not MISSING):
            lines += _entry(flag.usage, flag.help + _default(flag))
        lines.append("")
    nested = next((f for f in flags.values() if not f.is_config and goes_by_its_last_name(f, flags)), None)
    if nested is not None:
        note = (
            f"A flag of a config within, such as --{nested.name}, also goes by its last name where no other has it; "
            f"--{nested.name.rpartition('.')[0]} FILE reads them all from a YAML or JSON file."
        )
        lines += [*_wrapped(note), ""]
    if any(Path in (flag.kind, *get_args(flag.kind)) for flag in flags.values()):
        lines += [*_wrapped("A PATH may be a URL, such as s3://bucket/folder; docs/storage.md says how."), ""]
    lines += ["of every command:", ""]
    for flag_name, help_text in _OF_EVERY_COMMAND.items():
        lines += _entry(f"--{flag_name}", help_text)
    return "\n".join(lines)


def completion_script(shell: str) -> str | None:
    """What a shell evaluates to complete ``sidrec``; None for one we do not know."""
    return _SHELLS.get(shell)


def completion_words(commands: Iterable[str], words: list[str], flags: Mapping[str, Flag] | None) -> list[str]:
    """What may follow ``words``.

    Args:
        commands: all there are.
        words: what is typed already, whole words.
        flags: of the command that ``words`` begin with, if they do.
    """
    if flags is None:
        rest = [name.split()[len(words) :] for name in commands if name.split()[: len(words)] == words]
        return sorted({names[0] for names in rest if names})
    last = words[-1] if words else ""
    before = last.removeprefix("--").replace("-", "_") if last.startswith("--") else ""
    if before in flags and flags[before].choices:
        return list(flags[before].choices)
    if before in flags and flags[before].kind is not bool:
        return []  # files, say; the shell knows those
    ours = [name.partition(" ")[0] for name in _OF_EVERY_COMMAND]
    return sorted(f"--{name}" for name in [*(f.name for f in flags.values() if not f.is_config), *ours])


def _default(flag: Flag) -> str:
    value = flag.default
    if value is MISSING:
        return " (to be given)"
    if value is None or value in ("", (), {}) or is_config(type(value)):
        return ""
    return f" [{_plain(value)}]"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _entry(flag: str, text: str) -> list[str]:
    indent = " " * _COLUMN
    lines = textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent) or [indent]
    start = f"  {flag.rstrip()}"
    if len(start) + 2 > _COLUMN:
        return [start, *lines]
    return [start.ljust(_COLUMN) + lines[0][_COLUMN:], *lines[1:]]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 60), 110)
