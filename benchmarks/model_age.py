"""NE as models age, arm by arm, where items come and go; and what a SID refresh costs and gives.

    python benchmarks/model_age.py --data DATA --out OUT --source text_emb --source image_emb --target category \\
        --day 2024-09-01 [--days-later 30] [--seeds 1] [--json FILE]

Tokenizers and rankers are made of what is known on a day: the items met until then, and the events before it. The old tokenizers then
encode the items that come later, which the rankers have never seen. Two tables:

- NE of the old models by how long ago their training ended, on all events since the day;
- on the events ``--days-later`` and after, the old models beside new ones, made of what is known by then; and for SIDE what lies
  between: a new ranker on the old tokenizer's SIDs, and the old tokenizer tuned on under its codec (``tune-tokenizer --keep``), read by
  the old ranker and by a new one. *Gain* is the share of the old model's NE that is saved, with its 95% interval over users.

Steps that are done are read back.
"""

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.prepared import SEQUENCES
from sidrec_torchrec.data.sids import read_sids
from sidrec_torchrec.environment import versions_and_hardware
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.jobs import encode_corpus, evaluate, train_ranker, tune_tokenizer
from sidrec_torchrec.ranker.arms import ARMS, Needs, Tokenizers
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.study.plans import TokenizerPlan, Variant
from sidrec_torchrec.study.resampled import gain, interval_of
from sidrec_torchrec.study.workspace import StudyProtocol, Workspace
from sidrec_torchrec.training.group import process_group

ARMS_COMPARED = ("none", "raw", "prefix-ngram", "side", "id")
PARTS = ("all", "warm", "cold")
OLD, NEW = "old", "new"
_OWN_TEST = timedelta(days=7)  # of a day's workspace, which must have a test; models are tested on all events


@dataclass(frozen=True)
class Model:
    """A trained ranker, and SIDs of all items for it to read."""

    ranker: Path
    sids: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Past:
    """What is made of the items and events that are known on a day."""

    arguments: argparse.Namespace
    day: date

    @property
    def out(self) -> Path:
        return self.arguments.out / str(self.day)

    @property
    def sequences(self) -> Path:
        return self.out / "prepared" / SEQUENCES

    @cached_property
    def workspace(self) -> Workspace:
        arguments = self.arguments
        protocol = PrepareConfig(split="time", test_from=str(self.day), max_history=arguments.max_history)
        study = StudyProtocol(
            protocol=protocol,
            tokenizer=TokenizerTrainingConfig(epochs=arguments.tokenizer_epochs),
            tuning=RankerTrainingConfig(epochs=arguments.epochs),
            tokenizer_seeds=arguments.seeds,
        )
        workspace = Workspace(self.out, self._data(), study)
        workspace.prepare()
        return workspace

    def model(self, variant: Variant, seed: int) -> Model:
        """Trained, with its tokenizers, which encode later items, too."""
        sids = []
        for plan in variant.of_seed(seed).tokenizers:
            self.workspace.train_tokenizer(plan)
            self.workspace.encode(plan)
            sids.append(encoded(self.arguments.data, self.tokenizer(plan), self.out / "all" / plan.folder))
        self.workspace.rank(variant, seed)
        return Model(self.out / "rankers" / variant.name / f"seed-{seed}", tuple(sids))

    def tokenizer(self, plan: TokenizerPlan) -> Path:
        """A trained one's folder."""
        return self.out / "tokenizers" / (f"{plan.folder}-tuned" if plan.tuned else plan.folder)

    def _data(self) -> Path:
        """A folder of the items met before the day, and of their events until a week after it."""
        folder = self.out / "data"
        if (folder / "users.parquet").exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        items, events, users = (
            pq.read_table(self.arguments.data / f"{n}.parquet") for n in ("items", "events", "users")
        )
        time_N, item_N = events["timestamp"].to_numpy(), events["item_id"].to_numpy()
        known = np.unique(item_N[time_N < _seconds(self.day)])
        is_there_N = np.isin(item_N, known) & (time_N < _seconds(self.day + _OWN_TEST))
        pq.write_table(items.filter(pa.array(np.isin(items["item_id"].to_numpy(), known))), folder / "items.parquet")
        pq.write_table(events.filter(pa.array(is_there_N)), folder / "events.parquet")
        pq.write_table(users, folder / "users.parquet")
        return folder


@dataclass(frozen=True)
class Bench:
    """Both days, and what lies between."""

    arguments: argparse.Namespace

    @cached_property
    def old(self) -> Past:
        return Past(self.arguments, self.arguments.day)

    @cached_property
    def new(self) -> Past:
        return Past(self.arguments, self.arguments.day + timedelta(days=self.arguments.days_later))

    @cached_property
    def variants(self) -> list[Variant]:
        sources = tuple(self.arguments.source)
        plan = TokenizerPlan(
            name="side",
            quantizer=QuantizerConfig(),
            sources=sources,
            targets=tuple(self.arguments.target),
            tuned=True,
        )
        residual = QuantizerConfig(kind="rq", stages="onehot:256*3")
        plans = {
            Tokenizers.FUSED: (plan,),
            Tokenizers.PER_SOURCE: tuple(
                TokenizerPlan(name=f"rq-{source}", quantizer=residual, sources=(source,)) for source in sources
            ),
        }
        return [
            Variant(
                name=name,
                arm=name,
                sources=sources if ARMS[name].needs is Needs.VECTORS else (),
                tokenizers=plans[ARMS[name].tokenizers] if ARMS[name].needs is Needs.SIDS else (),
                training=RankerTrainingConfig(epochs=self.arguments.epochs),
            )
            for name in ARMS_COMPARED
        ]

    def models(self, seed: int) -> Iterator[tuple[str, str, Model]]:
        """By arm and row of the second table."""
        for variant in self.variants:
            old = self.old.model(variant, seed)
            yield variant.name, OLD, old
            if variant.arm == "side":
                yield from self._between(variant, old, seed)
            yield variant.name, NEW, self.new.model(variant, seed)

    def _between(self, variant: Variant, old: Model, seed: int) -> Iterator[tuple[str, str, Model]]:
        """Of SIDE: one of ranker and tokenizer new, or the tokenizer refreshed."""
        (plan,) = variant.of_seed(seed).tokenizers
        refreshed = encoded(self.arguments.data, self._refresh(plan, seed), self.between(seed) / "sids" / plan.name)
        old_sids = old.sids[0]
        yield (
            variant.name,
            "new ranker on old SIDs",
            Model(self._train(variant, old_sids, seed, "old-sids"), (old_sids,)),
        )
        yield variant.name, "old ranker on refreshed SIDs", Model(old.ranker, (refreshed,))
        yield (
            variant.name,
            "new ranker on refreshed SIDs",
            Model(self._train(variant, refreshed, seed, "refreshed"), (refreshed,)),
        )

    def between(self, seed: int) -> Path:
        return self.arguments.out / "between" / f"seed-{seed}"

    def refresh_cost(self, seed: int) -> dict[str, float]:
        """Seconds, and of the old items the share that changed any digit, and of their digits."""
        variant = next(variant for variant in self.variants if variant.arm == "side")
        (plan,) = variant.of_seed(seed).tokenizers
        old, new = (
            _digits(folder) for folder in (self.old.out / "all" / plan.folder, self.between(seed) / "sids" / plan.name)
        )
        known = pq.read_table(self.old.out / "data" / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
        changed_NL = np.array([old[item] != new[item] for item in known])
        seconds = read_json(self.between(seed) / "seconds.json")["refresh"]
        return {"seconds": seconds, "changed_items": changed_NL.any(1).mean(), "changed_digits": changed_NL.mean()}

    def _refresh(self, plan: TokenizerPlan, seed: int) -> Path:
        job = tune_tokenizer.TuneTokenizerConfig(
            data=self.new.workspace.data.path,
            prepared=self.new.sequences,
            tokenizer=self.old.tokenizer(plan),
            out=self.between(seed) / "tokenizer",
            keep=self.old.workspace.sids(plan),
            epochs=self.arguments.epochs,
            seed=seed,
        )
        start = time.monotonic()
        tune_tokenizer.main(job)
        if not (self.between(seed) / "seconds.json").exists():
            write_json(self.between(seed) / "seconds.json", {"refresh": time.monotonic() - start})
        return job.out

    def _train(self, variant: Variant, sids: Path, seed: int, name: str) -> Path:
        job = train_ranker.TrainRankerConfig(
            data=self.new.workspace.data.path,
            prepared=self.new.sequences,
            out=self.between(seed) / "rankers" / name,
            arm=variant.arm,
            sids=(sids,),
            epochs=self.arguments.epochs,
            seed=seed,
        )
        train_ranker.main(job)
        return job.out

    def test(self, model: Model, since: date, name: str) -> dict[str, Any]:
        """Its metrics on all events since a day, new items among them, as ``metrics.json`` of a run has them."""
        out = self.arguments.out / "tests" / str(since) / name.replace(" ", "-")
        job = evaluate.EvaluateConfig(
            ranker=model.ranker, data=self.arguments.data, sids=model.sids, test_from=str(since), out=out
        )
        with redirect_stdout(io.StringIO()):  # the tables say it all
            return {"test": evaluate.main(job)}


def encoded(data: Path, tokenizer: Path, out: Path) -> Path:
    """Where the SIDs of all items are."""
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=tokenizer, out=out))
    return out


def _digits(sids: Path) -> dict[Any, np.ndarray]:
    codec = Codec.load(sids)
    ids, words_NW = read_sids(sids, codec)
    return dict(zip(ids.to_pylist(), codec.spec.unpack(words_NW), strict=True))


def _seconds(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=timezone.utc).timestamp())


def by_age(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By age of the model: targets, and NE by arm, the mean over seeds."""
    rows: dict[str, Any] = {}
    for arm, of_seeds in runs.items():
        for buckets in zip(*(run["test"]["breakdown"]["model_age"]["label"] for run in of_seeds), strict=True):
            if buckets[0]["ne"] is not None:
                row = rows.setdefault(buckets[0]["bucket"], {"targets": buckets[0]["targets"]})
                row[arm] = fmean(bucket["ne"] for bucket in buckets)
    return rows


def against_old(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each arm and model: NE, and what is gained over the arm's old model, over all: what is warm differs between models."""
    rows = []
    for (arm, name), own in runs.items():
        row: dict[str, Any] = {"arm": arm, "model": name}
        row |= {f"ne_{part}": _mean([run["test"][f"ne_{part}"] for run in own]) for part in PARTS}
        was = _mean([run["test"]["ne_all"] for run in runs[arm, OLD]])
        row["gain"] = None if row["ne_all"] is None or was is None else gain(was, row["ne_all"])
        row["gain_interval"] = interval_of(gain, "ne_all", runs[arm, OLD], own)
        rows.append(row)
    return rows


def markdown(ages: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Both tables."""
    lines = [f"| age | targets | {' | '.join(ARMS_COMPARED)} |", "|---" * (len(ARMS_COMPARED) + 2) + "|"]
    for age, row in ages.items():
        lines.append(f"| {age} | {row['targets']:,} | {' | '.join(f'{row[arm]:.4f}' for arm in ARMS_COMPARED)} |")
    lines += ["", "| arm | model | NE all / warm / cold | gain, % |", "|---|---|---|---|"]
    for row in rows:
        ne = " / ".join("-" if row[f"ne_{part}"] is None else f"{row[f'ne_{part}']:.4f}" for part in PARTS)
        gained = "" if row["model"] == OLD else _percent(row["gain"], row["gain_interval"])
        lines.append(f"| {row['arm']} | {row['model']} | {ne} | {gained} |")
    return "\n".join(lines)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _percent(value: float | None, ends: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" + ("" if ends is None else f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", action="append", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--day", type=date.fromisoformat, required=True, help="the old models know what was before it")
    parser.add_argument("--days-later", type=int, default=30, help="when the new ones are made")
    parser.add_argument("--seeds", type=int, default=1, help="of tokenizers and rankers")
    parser.add_argument("--epochs", type=int, default=3, help="of rankers, and of tuning")
    parser.add_argument("--tokenizer-epochs", type=int, default=10)
    parser.add_argument("--max-history", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    since_old: dict[str, list[dict[str, Any]]] = {}
    since_new: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with process_group():
        bench = Bench(arguments)
        for seed in range(arguments.seeds):
            for arm, name, model in bench.models(seed):
                place = f"{arm}/{name}-seed-{seed}"
                since_new.setdefault((arm, name), []).append(bench.test(model, bench.new.day, place))
                if name == OLD:
                    since_old.setdefault(arm, []).append(bench.test(model, bench.old.day, place))
        costs = [bench.refresh_cost(seed) for seed in range(arguments.seeds)]
    ages, rows = by_age(since_old), against_old(since_new)
    print(markdown(ages, rows))
    cost = {name: fmean(own[name] for own in costs) for name in costs[0]}
    print(
        f"a refresh: {cost['seconds']:.0f} s; {cost['changed_items']:.1%} of the old items and {cost['changed_digits']:.1%} of their "
        "digits changed"
    )
    if arguments.json is not None:
        said = {name: str(value) for name, value in vars(arguments).items()}
        write_json(
            arguments.json,
            {"arguments": said, "ages": ages, "models": rows, "refresh": cost, **versions_and_hardware()},
        )


if __name__ == "__main__":
    main()
