"""NE per byte: every way of feeding items, tuned alike, over several seeds.

    python benchmarks/ne_per_byte/run.py --data DATA --out OUT --source A --source B --target C \
        [--seeds 5] [--settings 6] [--epochs 5] [--train-fraction 0.3] [--only VARIANT]

Tokenizers are trained on the items that occur in training; *collaborative* ones also predict what users do with items, by
``sidrec collaborative-vectors`` on the training sequences; *tuned* ones are then trained on with a ranker. Each variant is
tuned on validation NE over the same number of settings (with a seed of its own), and trained with every seed at the best; with
``--tuned results.json`` at the setting that another study, say on fewer users, found best for it. ``--sids FOLDER`` takes
tokenizers and SIDs of another study of the same items and protocol, say of shorter histories. Writes ``OUT/results.json``, ``OUT/table.md``, ``OUT/gains.png``,
``OUT/per_byte.png`` and ``OUT/curves.png``, and prints the table. Variants that ``OUT/results.json`` has with as many seeds are not run again: call it
again to go on, with other ``--only`` variants to add them, or with more seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from analysis import markdown, plot_curves, plot_gains, plot_per_byte, print_table, summarize
from study import SETTINGS, TokenizerPlan, Variant, variants

from sidrec_torchrec.data.format import open_items
from sidrec_torchrec.data.prepare import PrepareConfig, open_prepared
from sidrec_torchrec.environment import versions_and_hardware
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import write_json
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.jobs import (
    collaborative_vectors,
    encode_corpus,
    prepare,
    train_ranker,
    train_tokenizer,
    tune_tokenizer,
)
from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, Needs
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.sharding import OptimizerConfig

TUNING_SEED = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", action="append", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=5)
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
    study = Study(arguments)
    for variant in variants(tuple(arguments.source)):
        wanted = arguments.only is None or variant.name in arguments.only
        if wanted and not study.has(variant):
            study.run(variant)
            study.write()
    summary = summarize(study.results)
    print_table(summary)
    (arguments.out / "table.md").write_text(markdown(summary))
    plot_gains(summary, arguments.out / "gains.png")
    plot_per_byte(summary, arguments.out / "per_byte.png")
    plot_curves(study.results, arguments.out / "curves.png")


class Study:
    """One data set's results, on disk after every variant."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.data: Path = arguments.data
        self.out: Path = arguments.out
        self.made: Path = arguments.sids or self.out  # where tokenizers and SIDs are
        self.path = self.out / "results.json"
        self.results: dict[str, Any] = json.loads(self.path.read_text())["variants"] if self.path.exists() else {}
        self.found_elsewhere = json.loads(arguments.tuned.read_text())["variants"] if arguments.tuned else {}
        self.sequences = self.out / "prepared" / "sequences"
        protocol = PrepareConfig(
            train_fraction=arguments.train_fraction,
            cold_fraction=arguments.cold_fraction,
            max_history=arguments.max_history,
        )
        prepare.main(prepare.PrepareJobConfig(data=self.data, out=self.out / "prepared", protocol=protocol))
        self.unseen = self.made / "unseen_items.parquet"  # tokenizers must not know them either
        item_ids = open_items(self.data, sources=(), targets=()).ids()
        unseen = pa.table({"item_id": item_ids[~open_prepared(self.sequences).seen()]})
        if arguments.sids is None:
            pq.write_table(unseen, self.unseen)
        elif not pq.read_table(self.unseen).equals(unseen):
            raise DataError(f"{self.unseen}: items that occur in this study's training; take SIDs of the same protocol")
        self.with_vectors = self.made / "collaborative"
        collaborative_vectors.main(
            collaborative_vectors.CollaborativeVectorsConfig(
                data=self.data, prepared=self.made / "prepared" / "sequences", out=self.with_vectors
            )
        )

    def has(self, variant: Variant) -> bool:
        """Whether the variant has been run with all seeds."""
        return variant.name in self.results and len(self.results[variant.name]["ne_warm"]) >= self.arguments.seeds

    def run(self, variant: Variant) -> None:
        """Tunes and trains a variant; an interrupted run goes on."""
        sids = tuple(self._sids(plan) for plan in variant.tokenizers)
        setting, scores = self._best_setting(variant, sids)
        runs = [self._rank(variant, sids, seed, setting) for seed in range(self.arguments.seeds)]
        self.results[variant.name] = {
            "family": variant.family,
            "setting": setting,
            "tuning": scores,
            **{f"ne_{part}": [run["test"][f"ne_{part}"] for run in runs] for part in ("warm", "cold", "all")},
            **{name: runs[0][name] for name in ("bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes")},
            "validation": [[epoch["ne_all"] for epoch in run["validation"]] for run in runs],
            "train_events_per_s": [run["train_events_per_s"] for run in runs],
        }

    def _best_setting(self, variant: Variant, sids: tuple[Path, ...]) -> tuple[dict[str, float], list[float]]:
        """The best setting, and validation NE by setting."""
        settings = SETTINGS[: self.arguments.settings]
        if variant.name in self.found_elsewhere:
            found = self.found_elsewhere[variant.name]
            return found["setting"], found["tuning"]
        if len(settings) == 1:
            return settings[0], []
        scores = []
        for setting in settings:
            validation = self._rank(variant, sids, TUNING_SEED, setting)["validation"]
            scores.append(min(epoch["ne_all"] for epoch in validation))
        return settings[scores.index(min(scores))], scores

    def write(self) -> None:
        """Writes what there is."""
        arguments = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(self.arguments).items()
        }
        write_json(self.path, {"arguments": arguments, "variants": self.results, **versions_and_hardware()})

    def _sids(self, plan: TokenizerPlan) -> Path:
        """The SIDs of every item by a tokenizer."""
        train = train_tokenizer.TrainTokenizerConfig(
            data=self.with_vectors if plan.collaborative else self.data,
            out=self.made / "tokenizers" / plan.name.removesuffix("-tuned"),
            source=tuple(self.arguments.source) if plan.source is None else (plan.source,),
            predict=("collaborative",) if plan.collaborative else (),
            target=tuple(self.arguments.target) if plan.with_targets else (),
            epochs=self.arguments.tokenizer_epochs,
            quantizer=QuantizerConfig(kind=plan.kind, stages=plan.stages),
            exclude=self.unseen,
        )
        train_tokenizer.main(train)
        tokenizer = self._tuned_tokenizer(plan, train) if plan.tuned else train.out
        out = self.made / "sids" / plan.name
        encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=self.data, tokenizer=tokenizer, out=out))
        return out

    def _tuned_tokenizer(self, plan: TokenizerPlan, trained: train_tokenizer.TrainTokenizerConfig) -> Path:
        """The tokenizer, tuned through a ranker of another seed than those it is compared with."""
        job = tune_tokenizer.TuneTokenizerConfig(
            data=self.data,
            prepared=self.made / "prepared" / "sequences",
            tokenizer=trained.out,
            out=self.made / "tokenizers" / plan.name,
            content=trained.data,
            epochs=self.arguments.epochs,
            seed=TUNING_SEED,
        )
        tune_tokenizer.main(job)
        return job.out

    def _rank(self, variant: Variant, sids: tuple[Path, ...], seed: int, setting: dict[str, float]) -> dict[str, Any]:
        """A trained ranker's metrics."""
        name = f"setting-{SETTINGS.index(setting)}-seed-{seed}"
        return train_ranker.main(
            train_ranker.TrainRankerConfig(
                data=self.data,
                prepared=self.sequences,
                out=self.out / "rankers" / variant.name.replace(" ", "-").replace(",", "") / name,
                arm=variant.arm,
                source=tuple(self.arguments.source) if ARMS[variant.arm].needs is Needs.VECTORS else (),
                sids=sids,
                epochs=self.arguments.epochs,
                seed=seed,
                model=RankerConfig(dropout=setting["dropout"], **variant.model_options),
                arms=ArmConfig(
                    table_dropout=setting["table_dropout"],
                    digit_dropout=setting["digit_dropout"],
                    **variant.arm_options,
                ),
                optimizer=OptimizerConfig(
                    learning_rate=setting["learning_rate"], table_learning_rate=setting["table_learning_rate"]
                ),
            )
        )


if __name__ == "__main__":
    main()
