"""docs/errors.md's table, made of the list of kinds.

    python -m tests.bad_input.table    # writes it anew

Run where the repository is; ``--check`` in place of writing says which kinds fall, with what is said.
"""

import sys
import tempfile
from pathlib import Path

from tests.bad_input import cases_columns, cases_data, cases_flags, cases_folders, cases_machine, cases_scorer
from tests.bad_input.kinds import Kind, Whole, try_out

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "errors.md"
BEGIN, END = "<!-- the table: python -m tests.bad_input.table -->", "<!-- end of the table -->"
CASES = {
    "Files of a data folder": cases_data.CASES,
    "Its columns": cases_columns.CASES,
    "Commands and flags": cases_flags.CASES,
    "Folders that jobs wrote, and requests": cases_folders.CASES,
    "What a server gives to a Scorer": cases_scorer.CASES,
    "Disks, locks, the machine": cases_machine.CASES,
}
KINDS = [kind for kinds in CASES.values() for kind in kinds]


def table() -> str:
    """Markdown of all kinds."""
    parts = []
    for title, kinds in CASES.items():
        rows = [f"| {_cell(kind.name)} | `{_cell(_short(kind))}` | {_cell(kind.says)} |" for kind in kinds]
        parts.append("\n".join([f"### {title}", "", "| kind | tried with | says |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def written(text: str) -> str:
    """The document with the table in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def _short(kind: Kind) -> str:
    """The command without the folders that every kind names, or the call."""
    words = kind.command.replace("{}/", "").split()
    text = "sidrec " + " ".join(word if len(word) < 40 else word[:12] + "..." for word in words)
    return kind.command if kind.call else text.strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


def _check() -> int:
    fallen = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "whole").mkdir()
        whole = Whole(path / "whole")
        for number, kind in enumerate(KINDS):
            said, wrong = try_out(kind, whole, path / str(number))
            if wrong:
                fallen += 1
                print(f"{kind.name}: {'; '.join(wrong)} ({said})")
    print(f"{len(KINDS)} kinds, {fallen} fell")
    return 1 if fallen else 0


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(_check())
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
