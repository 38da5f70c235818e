"""NE per byte: every way of feeding items, tuned alike, over several seeds.

    python benchmarks/ne_per_byte/run.py --data DATA --out OUT --source A --source B --target C \
        [--seeds 5] [--tokenizer-seeds 3] [--settings 6] [--epochs 5] [--train-fraction 0.3] [--only VARIANT]

Steps and protocol are those of ``sidrec pipeline``; what is added is variants and tuning. *Collaborative* tokenizers also
predict what users do with items, by ``sidrec collaborative-vectors`` on the training sequences; *tuned* ones are then trained
on with a ranker. Each variant is tuned on validation NE over the same number of settings (with a seed of its own), and trained
with every seed at the best; with ``--tuned results.json`` at the setting that another study, say on fewer users, found best
for it. ``--sids FOLDER`` takes tokenizers and SIDs of another study of the same items and protocol, say of shorter histories.
Writes ``OUT/results.json``, and made of it ``OUT/summary.json``, ``OUT/table.md``, ``OUT/curves.png`` and, where ``none`` is among
the variants, ``OUT/gains.png`` and ``OUT/per_byte.png``, and prints the table. Variants that ``OUT/results.json`` has with as many seeds are not run again: call it again to go on, with other
``--only`` variants to add them, or with more seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from analysis import PARTS, as_json, markdown, plot_curves, plot_gains, plot_per_byte, print_table, summarize
from study import BASE, SETTINGS, Entries, Entry, tuned

from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.environment import versions_and_hardware
from sidrec_torchrec.files import write_json
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.study.resampled import mean_replicates
from sidrec_torchrec.study.workspace import StudyProtocol, Workspace
from sidrec_torchrec.training.group import process_group

TUNING_SEED = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", action="append", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--tokenizer-seeds", type=int, default=1, help="tokenizers of each kind, which rankers take in turn"
    )
    parser.add_argument(
        "--settings", type=int, default=len(SETTINGS), help="a variant is tuned over; 1: the first as it is"
    )
    parser.add_argument("--tuned", type=Path, help="results.json of a study to take settings from")
    parser.add_argument("--sids", type=Path, help="OUT of a study of the same items whose tokenizers to use")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--tokenizer-epochs", type=int, default=40)
    parser.add_argument("--train-fraction", type=float, default=1.0)
    parser.add_argument("--cold-fraction", type=float, default=0.25)
    parser.add_argument("--max-history", type=int, default=512)
    parser.add_argument("--only", action="append", help="a variant's name; none named means all")
    arguments = parser.parse_args()
    with process_group():
        study = Study(arguments)
        for entry in Entries(tuple(arguments.source), tuple(arguments.target)):
            wanted = arguments.only is None or entry.variant.name in arguments.only
            if wanted and not study.has(entry):
                study.run(entry)
                study.write()
    summary = summarize(study.results)
    print_table(summary)
    write_json(arguments.out / "summary.json", study.said | {"variants": as_json(summary)})
    (arguments.out / "table.md").write_text(markdown(summary))
    if BASE in summary and len(summary) > 1:
        plot_gains(summary, arguments.out / "gains.png")
        plot_per_byte(summary, arguments.out / "per_byte.png")
    plot_curves(study.results, arguments.out / "curves.png")


class Study:
    """One data set's results, on disk after every variant."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.path = arguments.out / "results.json"
        self.results: dict[str, Any] = json.loads(self.path.read_text())["variants"] if self.path.exists() else {}
        self.found_elsewhere = json.loads(arguments.tuned.read_text())["variants"] if arguments.tuned else {}
        protocol = PrepareConfig(
            train_fraction=arguments.train_fraction,
            cold_fraction=arguments.cold_fraction,
            max_history=arguments.max_history,
        )
        shared = StudyProtocol(
            protocol=protocol,
            tokenizer=TokenizerTrainingConfig(epochs=arguments.tokenizer_epochs, least_told=0.0),
            tuning=RankerTrainingConfig(epochs=arguments.epochs),
            tokenizer_seeds=arguments.tokenizer_seeds,
        )
        self.workspace = Workspace(arguments.out, arguments.data, shared, tokenizers=arguments.sids)
        self.workspace.prepare()

    def has(self, entry: Entry) -> bool:
        """Whether the variant has been run with all seeds."""
        name = entry.variant.name
        return name in self.results and len(self.results[name]["ne_warm"]) >= self.arguments.seeds

    def run(self, entry: Entry) -> None:
        """Tunes and trains a variant; an interrupted run goes on."""
        told = []
        for plan in self.workspace.tokenizers([entry.variant]):
            told += self.workspace.train_tokenizer(plan).get("told", {}).values()
            self.workspace.encode(plan)
        setting, scores = self._best_setting(entry)
        runs = [self._rank(entry, seed, setting) for seed in range(self.arguments.seeds)]
        self.results[entry.variant.name] = {
            "family": entry.family,
            "arm": entry.variant.arm,
            "setting": setting,
            "tuning": scores,
            **({"told": sum(told) / len(told)} if told else {}),
            **{f"ne_{part}": [run["test"][f"ne_{part}"] for run in runs] for part in PARTS},
            **{f"replicates_{part}": _listed(mean_replicates(runs, f"ne_{part}")) for part in PARTS},
            **{name: runs[0][name] for name in ("bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes")},
            "validation": [[epoch["ne_all"] for epoch in run["validation"]] for run in runs],
            "train_events_per_s": [run["train_events_per_s"] for run in runs],
        }

    def _best_setting(self, entry: Entry) -> tuple[dict[str, float], list[float]]:
        """The best setting, and validation NE by setting."""
        settings = SETTINGS[: self.arguments.settings]
        if entry.variant.name in self.found_elsewhere:
            found = self.found_elsewhere[entry.variant.name]
            return found["setting"], found["tuning"]
        if len(settings) == 1:
            return settings[0], []
        scores = []
        for setting in settings:
            validation = self._rank(entry, TUNING_SEED, setting)["validation"]
            scores.append(min(epoch["ne_all"] for epoch in validation))
        return settings[scores.index(min(scores))], scores

    @property
    def said(self) -> dict[str, Any]:
        """Arguments, of which folders by their names alone, versions and hardware."""
        given = {name: value for name, value in vars(self.arguments).items() if name not in ("out", "only")}
        arguments = {name: value.name if isinstance(value, Path) else value for name, value in given.items()}
        return {"arguments": arguments, **versions_and_hardware()}

    def write(self) -> None:
        """Writes what there is."""
        write_json(self.path, self.said | {"variants": self.results})

    def _rank(self, entry: Entry, seed: int, setting: dict[str, float]) -> dict[str, Any]:
        """A trained ranker's metrics."""
        variant = tuned(entry.variant, setting, self.arguments.epochs)
        return self.workspace.rank(variant, seed, name=f"setting-{SETTINGS.index(setting)}-seed-{seed}")


def _listed(value_B: np.ndarray | None) -> list[float | None]:
    """Replicates, as JSON has them."""
    assert value_B is not None
    return [None if np.isnan(value) else float(f"{value:.7g}") for value in value_B]


if __name__ == "__main__":
    main()
