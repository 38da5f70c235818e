"""What a refreshed tokenizer is worth to the ranker that reads its SIDs already, and to one that is trained anew.

    python benchmarks/refresh.py --data ml-1m --out OUT --source plot_emb --source description_emb --target genres \\
        --train-fraction 0.3 [--seed 0] [--weight 1] [--json FILE]

The items are cut in three: old ones, on which a tokenizer and a ranker are trained; new ones, a quarter of all that are known
when the tokenizer is refreshed; and a fifth of all that neither meets in training (cold). Then, by seed (of items, users and all
training):

- no refresh: the old tokenizer encodes the new items;
- today: the old tokenizer tuned on, its codec with it; and a tokenizer trained anew. The old ranker is given their digits as if they
  were of its own codec, those of the latter also matched with the old ones by the best signed permutation (needs scipy);
- refreshed: ``tune-tokenizer --keep``, by weight; 0: only the codec is kept.

Printed: old items of which any digit changed, and their changed digits; the tokenizer's loss over all items; and NE of warm and of
cold test targets, by the old ranker as it is, and by one that is trained anew, on sequences that have the new items' events. For the
first weight also by the old ranker after one more epoch (``train-ranker --init``).

Steps that are done are read back: seeds may run side by side, and a last call with all of them prints the table.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from sidrec_torchrec.codec.codec import CODEC_FOLDER, Codec
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.prepared import COLD_ITEMS_FILE, SEQUENCES
from sidrec_torchrec.data.sids import SIDS_FILE, read_sids, write_sids
from sidrec_torchrec.environment import versions_and_hardware
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.jobs import collaborative_vectors, encode_corpus, train_ranker, tune_tokenizer
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.training import RankerTrainingConfig, evaluate
from sidrec_torchrec.study.plans import TokenizerPlan, Variant
from sidrec_torchrec.study.workspace import COLLABORATIVE, StudyProtocol, Workspace
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import stage

COLD, NEW = 0.2, 0.2  # of all items; the new ones are a quarter of those that are known after the refresh
NO_REFRESH, TUNED_ON, ANEW, ALIGNED = "no refresh", "tuned on, codec and all", "trained anew", "trained anew, aligned"


@dataclass(frozen=True)
class Bench:
    """A seed's folders and steps; what is done is read back."""

    arguments: argparse.Namespace
    seed: int

    @property
    def out(self) -> Path:
        return self.arguments.out / f"seed-{self.seed}"

    @cached_property
    def before(self) -> Workspace:
        return self._workspace("before", COLD + NEW, self.seed)

    @cached_property
    def after(self) -> Workspace:
        return self._workspace("after", COLD, self.seed + 1000)

    def _workspace(self, name: str, cold: float, training_seed: int) -> Workspace:
        arguments = self.arguments
        study = StudyProtocol(
            protocol=PrepareConfig(train_fraction=arguments.train_fraction, cold_fraction=cold, seed=self.seed),
            tokenizer=TokenizerTrainingConfig(epochs=arguments.tokenizer_epochs, seed=training_seed, least_told=0.0),
            tuning=RankerTrainingConfig(epochs=arguments.epochs, seed=training_seed),
        )
        workspace = Workspace(self.out / name, arguments.data, study)
        workspace.prepare()
        return workspace

    @cached_property
    def variant(self) -> Variant:
        plan = TokenizerPlan(
            name="trits-tuned",
            quantizer=QuantizerConfig(stages="ternary*25"),
            sources=tuple(self.arguments.source),
            targets=tuple(self.arguments.target),
            collaborative=True,
            tuned=True,
        )
        training = RankerTrainingConfig(epochs=self.arguments.epochs, model=RankerConfig())
        return Variant(name="side", arm="side", tokenizers=(plan,), arm_options=ArmConfig(), training=training)

    @cached_property
    def content(self) -> Path:
        """Items with what users do with them by now."""
        job = collaborative_vectors.CollaborativeVectorsConfig(
            data=self.arguments.data,
            prepared=self.after.out / "prepared" / SEQUENCES,
            out=self.after.out / "collaborative",
            column=COLLABORATIVE,
        )
        collaborative_vectors.main(job)
        return job.out

    def run(self, processes: Any) -> dict[str, Any]:
        """All rows by name."""
        (plan,) = self.variant.tokenizers
        self.before.train_tokenizer(plan)
        self.before.rank(self._encoded_before(plan), self.seed)
        rows = {NO_REFRESH: self._row(NO_REFRESH, self._encode(self.old_tokenizer, "no-refresh"), processes)}
        first, *others = self.arguments.weight
        rows |= self._refreshed(first, processes)
        if self.arguments.anew:
            longer = self._rank("one-epoch-more", self.out / "sids" / f"keep-{first:g}", init=self.old_ranker, epochs=1)
            rows[_named(first)] |= {f"more_{part}": longer[f"ne_{part}"] for part in ("warm", "cold")}
        if self.arguments.peers:
            self.after.train_tokenizer(plan)
            anew = self._encode(self.after.out / "tokenizers" / plan.name, "anew")
            rows[ANEW] = self._row(ANEW, anew, processes)
            rows[ALIGNED] = self._row(ALIGNED, self._aligned(anew), processes, anew=False)
        for weight in others:
            rows |= self._refreshed(weight, processes)
        if self.arguments.peers:
            tuned_on = self._encode(self._tune("tuned-on"), "tuned-on")
            rows[TUNED_ON] = self._row(TUNED_ON, tuned_on, processes, anew=False)
        return rows

    def _refreshed(self, weight: float, processes: Any) -> dict[str, Any]:
        tokenizer = self._tune(f"keep-{weight:g}", keep=self.published, keep_weight=weight)
        sids = self._encode(tokenizer, f"keep-{weight:g}")
        return {_named(weight): self._row(_named(weight), sids, processes)}

    def _encoded_before(self, plan: TokenizerPlan) -> Variant:
        self.before.encode(plan)
        return self.variant

    @property
    def old_tokenizer(self) -> Path:
        return self.before.out / "tokenizers" / self.variant.tokenizers[0].name

    @property
    def old_sids(self) -> Path:
        return self.before.sids(self.variant.tokenizers[0])

    @property
    def old_ranker(self) -> Path:
        return self.before.out / "rankers" / "side" / f"seed-{self.seed}"

    @cached_property
    def old_items(self) -> np.ndarray:
        """Which items, in the order of the file, the old tokenizer was trained on."""
        ids, _ = read_sids(self.old_sids, Codec.load(self.old_sids))
        held_out = pq.read_table(self.before.out / "prepared" / SEQUENCES / COLD_ITEMS_FILE)["item_id"].to_numpy()
        return ~np.isin(ids, held_out)

    @cached_property
    def published(self) -> Path:
        """A folder of the old items' SIDs."""
        codec = Codec.load(self.old_sids)
        ids, words_NW = read_sids(self.old_sids, codec)
        return _write(self.out / "published", codec, ids[self.old_items], words_NW[self.old_items])

    def _tune(self, name: str, **keep: Any) -> Path:
        job = tune_tokenizer.TuneTokenizerConfig(
            data=self.arguments.data,
            prepared=self.after.out / "prepared" / SEQUENCES,
            tokenizer=self.old_tokenizer,
            out=self.out / "tokenizers" / name,
            content=self.content,
            **_fields(self.after.study.tuning),
            **keep,
        )
        tune_tokenizer.main(job)
        return job.out

    def _encode(self, tokenizer: Path, name: str) -> Path:
        job = encode_corpus.EncodeCorpusConfig(
            data=self.content, tokenizer=tokenizer, out=self.out / "sids" / name, report="full"
        )
        encode_corpus.main(job)
        return job.out

    def _rank(self, name: str, sids: Path, **changes: Any) -> dict[str, float]:
        """Test metrics of a ranker trained on the sequences that have the new items' events."""
        job = train_ranker.TrainRankerConfig(
            data=self.arguments.data,
            prepared=self.after.out / "prepared" / SEQUENCES,
            out=self.out / "rankers" / name,
            arm=self.variant.arm,
            sids=(sids,),
            arm_options=self.variant.arm_options,
            **_fields(self.variant.training) | {"seed": self.seed} | changes,
        )
        return train_ranker.main(job)["test"]

    def _row(self, name: str, sids: Path, processes: Any, *, anew: bool = True) -> dict[str, Any]:
        """Of SIDs in a folder: how they differ from the old ones, and how they are read."""
        path = self.out / "rows" / f"{sids.name}.json"
        row = read_json(path) if path.exists() else self._of_old(sids, processes)
        if anew and self.arguments.anew and "anew_warm" not in row:
            test = self._rank(sids.name, sids)
            row |= {f"anew_{part}": test[f"ne_{part}"] for part in ("warm", "cold")}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, row)
        print(f"seed {self.seed}, {name}: {json.dumps(row)}", flush=True)
        return row

    def _of_old(self, sids: Path, processes: Any) -> dict[str, Any]:
        """Without a ranker that is trained anew."""
        old, new = (self._digits(folder) for folder in (self.old_sids, sids))
        changed_NL = (old != new)[self.old_items]
        row = {
            "changed_items": float(changed_NL.any(1).mean()),
            "changed_digits": float(changed_NL.mean()),
            "same_codec": Codec.load(sids).spec.fingerprint == Codec.load(self.old_sids).spec.fingerprint,
        }
        if (sids / "metrics.json").exists():
            report = read_json(sids / "metrics.json")
            losses = [values[-1] for values in report["reconstruction"].values()]
            row["loss"] = sum(losses) + 0.5 * sum(values[-1] for values in report["target_loss"].values())
        return row | {f"old_{part}": value for part, value in self._read_by_old(sids, processes).items()}

    def _digits(self, sids: Path) -> np.ndarray:
        codec = Codec.load(sids)
        return codec.spec.unpack(torch.from_numpy(read_sids(sids, codec)[1])).numpy()

    def _read_by_old(self, sids: Path, processes: Any) -> dict[str, float]:
        """NE of the old ranker; digits of another codec are given to it as if they were its own's."""
        old, its = Codec.load(self.old_sids), Codec.load(sids)
        if its.spec.fingerprint != old.spec.fingerprint:
            ids, words_NW = read_sids(sids, its)
            sids = _write(self.out / "misread" / sids.name, old, ids, words_NW)
        trained = TrainedRanker.open(self.old_ranker)
        parts = replace(trained.recipe, sids=(sids,)).open(self.after.out / "prepared" / SEQUENCES)
        model = parts.sharded(processes)
        trained.load(model)
        with stage("old ranker", 1, show=False) as progress:
            values = evaluate(model, parts.batches("test", processes), processes, progress)
        return {part: values[f"ne_{part}"] for part in ("warm", "cold")}

    def _aligned(self, sids: Path) -> Path:
        """The same SIDs, their digits exchanged and mirrored so that most are as they were in old items; of the old codec."""
        from scipy.optimize import linear_sum_assignment

        old = Codec.load(self.old_sids)
        a_NL, b_NL = (self._digits(folder).astype(np.int64) - 1 for folder in (self.old_sids, sids))  # trits
        pairs = [(a_NL[self.old_items][:, :, None] == sign * b_NL[self.old_items][:, None]).mean(0) for sign in (1, -1)]
        _, place_L = linear_sum_assignment(-np.maximum(*pairs))
        own_L = np.arange(len(place_L))
        sign_L = np.where(pairs[0][own_L, place_L] >= pairs[1][own_L, place_L], 1, -1)
        words_NW = old.spec.pack(torch.from_numpy(b_NL[:, place_L] * sign_L + 1)).numpy()
        return _write(self.out / "sids" / "aligned", old, read_sids(sids, Codec.load(sids))[0], words_NW)


def _write(folder: Path, codec: Codec, ids: np.ndarray, words_NW: np.ndarray) -> Path:
    """A folder of SIDs as encode-corpus writes one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_sids(folder / SIDS_FILE, codec.spec, [(ids, words_NW)])
    codec.save(folder / CODEC_FOLDER)
    return folder


def _named(weight: float) -> str:
    return f"refreshed, weight {weight:g}"


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


_COLUMNS = (
    "changed_items",
    "changed_digits",
    "loss",
    "old_warm",
    "old_cold",
    "anew_warm",
    "anew_cold",
    "more_warm",
    "more_cold",
)


def table(seeds: list[dict[str, Any]]) -> str:
    """Means over the seeds that have a row, as Markdown."""
    lines = ["| | seeds | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 2) + "|"]
    for name in dict.fromkeys(name for rows in seeds for name in rows):
        rows = [rows[name] for rows in seeds if name in rows]
        cells = []
        for column in _COLUMNS:
            values = [row[column] for row in rows if column in row]
            digits = ".1%" if column.startswith("changed") else ".4f"
            cells.append(f"{mean(values):{digits}}" if values else "")
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", action="append", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--train-fraction", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=4, help="of rankers, and of tuning")
    parser.add_argument("--tokenizer-epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; none named: 0")
    parser.add_argument("--weight", type=float, action="append", help="of --keep; may be repeated; none named: 1")
    parser.add_argument("--peers", type=int, default=1, help="0: leave out what does not keep the codec")
    parser.add_argument("--anew", type=int, default=1, help="0: train no ranker but the old one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.weight = arguments.weight or [1.0]
    with process_group() as processes:
        seeds = [Bench(arguments, seed).run(processes) for seed in arguments.seed or [0]]
    print(table(seeds))
    if arguments.json is not None:
        write_json(arguments.json, {"seeds": seeds, **versions_and_hardware()})


if __name__ == "__main__":
    main()
