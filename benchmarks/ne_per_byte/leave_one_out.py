"""Which settings of SIDE travel: chosen on all corpora but one, reported on that one.

    python benchmarks/ne_per_byte/leave_one_out.py benchmarks/ne_per_byte/results/settings/*.json

Each file is a ``summary.json`` that run.py wrote, called after its corpus. A setting says how many digits there are, how SIDs are tuned, and
whether the tokenizer is told what users do: never, always, or where content tells at least 5% of it. Those that all corpora have are
compared. Chosen is the one of least mean log NE over the other corpora, warm and cold alike. Prints two tables for a page: what each
choice keeps of raw's gain, and all settings on all corpora.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import PARTS, WHOLE
from study import BASE

from sidrec_torchrec.fusion.training import TokenizerTrainingConfig

LEAST_TOLD = TokenizerTrainingConfig.least_told
Corpora = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """How SIDs are made.

    Args:
        trits: digits.
        told: "never", "always" or "by rule".
        tuning: as a variant's name says it; empty for none.
    """

    trits: int
    told: str
    tuning: str

    def variant(self, corpus: dict[str, Any]) -> str | None:
        """Name of the variant that the setting is on a corpus; None if it was not run there, or its rule cannot be followed."""
        names = {told: f"SIDE, {self.trits} trits{', collaborative' * told}{self.tuning}" for told in (False, True)}
        if self.told == "by rule":
            share = corpus.get(names[True], {}).get("told")
            return None if share is None else self._there(names[share >= LEAST_TOLD], corpus)
        return self._there(names[self.told == "always"], corpus)

    def _there(self, name: str, corpus: dict[str, Any]) -> str | None:
        return name if name in corpus else None

    def __str__(self) -> str:
        told = {"never": "", "always": ", told", "by rule": f", told from {LEAST_TOLD:.0%}"}[self.told]
        return f"{self.trits} trits{told}{self.tuning}"


SETTINGS = [
    Setting(trits, told, tuning)
    for trits in (25, 39)
    for tuning in ("", ", tuned", ", tuned without a tenth")
    for told in ("never", "by rule", "always")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    corpora = {path.stem: json.loads(path.read_text())["variants"] for path in arguments.results}
    if len(corpora) < 2 or len(corpora) < len(arguments.results):
        parser.error("give results of two corpora or more, of different names")
    for name, corpus in corpora.items():
        if not corpus.keys() >= {BASE, WHOLE}:
            parser.error(f"{name} lacks the variant {BASE} or {WHOLE}, of which what is kept is a share")
    settings = [s for s in SETTINGS if all(s.variant(corpus) for corpus in corpora.values())]
    if not settings:
        parser.error("the corpora have no setting of SIDE in common")
    print(choices(settings, corpora))
    print(everything(settings, corpora))


def log_ne(setting: Setting, corpus: dict[str, Any]) -> float:
    """Mean over warm and cold test events."""
    row = corpus[setting.variant(corpus)]
    return sum(math.log(row[f"ne_{part}"][0]) for part in PARTS) / len(PARTS)


def best(settings: list[Setting], corpora: Corpora) -> Setting:
    """Of least mean log NE over the corpora; of settings that are the same variants, the first."""
    return min(settings, key=lambda setting: sum(log_ne(setting, corpus) for corpus in corpora.values()))


def choices(settings: list[Setting], corpora: Corpora) -> str:
    """By corpus: what is chosen on the others, what that keeps, and what the corpus' own best keeps."""
    rows = [("corpus", "chosen on the others", "NE", "kept, %", "its own best", "kept, %")]
    for name, corpus in corpora.items():
        chosen = best(settings, {other: rows for other, rows in corpora.items() if other != name})
        own = best(settings, {name: corpus})
        rows.append(
            (name, str(chosen), _ne(chosen, corpus), _kept(chosen, corpus, ends=True), str(own), _kept(own, corpus))
        )
    return _markdown(rows)


def everything(settings: list[Setting], corpora: Corpora) -> str:
    """Kept by each setting on each corpus."""
    rows = [("kept, %", *corpora)]
    rows += [(str(setting), *(_kept(setting, corpus) for corpus in corpora.values())) for setting in settings]
    return _markdown(rows)


def _ne(setting: Setting, corpus: dict[str, Any]) -> str:
    return " / ".join(f"{corpus[setting.variant(corpus)][f'ne_{part}'][0]:.4f}" for part in PARTS)


def _kept(setting: Setting, corpus: dict[str, Any], *, ends: bool = False) -> str:
    """Of raw's gain, warm / cold, with 95% intervals over users if asked for."""
    cells = []
    for part in PARTS:
        value, low, high = corpus[setting.variant(corpus)][f"kept_{part}"]
        interval = f" [{100 * low:.0f}, {100 * high:.0f}]" if ends and low is not None else ""
        cells.append(f"{100 * value:.0f}{interval}")
    return " / ".join(cells)


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
