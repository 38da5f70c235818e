"""DPCA inside VQ Fusion against residual VQ, FSQ with 3 levels and LFQ: same encoder, decoder, data, epochs and bits.

    python benchmarks/dpca_in_fusion.py --items DATA --source A --source B [--target C] [--seeds 3] [--json FILE]

A quarter of the items is held out of everything. Each quantizer is tuned over the same learning rates, by the loss on a tenth
of the training items with a seed of its own, then trained with every seed; the epoch of the least validation loss is kept.
Prints, on the held-out items, the relative squared error of each source and the accuracy (micro-averaged F1 where multi-label)
of each target, mean and standard deviation over seeds; and digits with a value that no item of the corpus has.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from comparison import Comparisons
from peers_in_fusion import FSQ3, LFQ4
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sidrec_torchrec.data.format import open_items, scan_vocabularies
from sidrec_torchrec.fusion.config import QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
from sidrec_torchrec.fusion.report import _hits, _score

HELD_OUT, VALIDATION = 0.25, 0.1
RATES = (1e-3, 3e-3)
TUNING_SEED = 1_000
LATENT = 64

# about 40 bits each
QUANTIZERS: dict[str, Callable[[], nn.Module | None]] = {
    "DPCA ternary*25": lambda: QuantizerConfig(stages="ternary*25").build(LATENT),
    "DPCA onehot:256,ternary*20": lambda: QuantizerConfig(stages="onehot:256,ternary*20").build(LATENT),
    "DPCA onehot:256*5": lambda: QuantizerConfig(stages="onehot:256*5").build(LATENT),
    "residual VQ 5x256": lambda: QuantizerConfig(kind="rq", stages="onehot:256*5").build(LATENT),
    "FSQ 3*25": lambda: FSQ3(LATENT, 25),
    "LFQ 4x10 signs": lambda: LFQ4(LATENT, 4, 10),
}


@dataclass(frozen=True)
class Parts:
    """The items, cut three ways.

    Args:
        config: of VQ Fusion on them.
        train, validation, held_out: the parts.
    """

    config: VQFusionConfig
    train: ItemTensors
    validation: ItemTensors
    held_out: ItemTensors


@dataclass(frozen=True)
class Result:
    """One training: held-out errors by source, accuracies by target, digits with an unused value, losses, seconds."""

    errors: dict[str, float]
    accuracies: dict[str, float]
    dead_digits: int
    validation_loss: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, required=True, help="data folder with items.parquet")
    parser.add_argument("--source", action="append", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--only", action="append", choices=list(QUANTIZERS), help="none named means all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = read(arguments.items, tuple(arguments.source), tuple(arguments.target))
    results: dict[str, list[Result]] = {}
    for name in arguments.only or QUANTIZERS:
        build = QUANTIZERS[name]
        tuned = [train(parts, build, rate, TUNING_SEED, arguments.epochs).validation_loss for rate in RATES]
        rate = RATES[tuned.index(min(tuned))]
        results[name] = [train(parts, build, rate, seed, arguments.epochs) for seed in range(arguments.seeds)]
        print(f"{name}: learning rate {rate}, {fmean(r.seconds for r in results[name]):.0f} s", flush=True)
    show(results)
    compare(arguments.items.name, results).finish(arguments.json)


def read(data: Path, sources: tuple[str, ...], targets: tuple[str, ...]) -> Parts:
    """All items in memory, cut by a fixed seed."""
    vocabularies = scan_vocabularies(open_items(data, sources=(), targets=targets), targets)
    stream = ItemStream.open(data, sources, vocabularies)
    items = next(stream.shuffled(1 << 30, seed=1))
    held_out = int(len(items) * HELD_OUT)
    validation = held_out + int((len(items) - held_out) * VALIDATION)
    config = VQFusionConfig(
        sources={name: items.sources[name].shape[1] for name in sources},
        targets={name: TargetConfig(num_classes=len(v), multi_label=v.multi_label) for name, v in vocabularies.items()},
        latent_dim=LATENT,
        dropout=min(0.5, 2_000 / len(items)),  # the job's own rule
        prefix_share=0.0,  # FSQ's and LFQ's digits have no order
    )
    cuts = slice(validation, None), slice(held_out, validation), slice(held_out)
    return Parts(config, *(items.select(cut) for cut in cuts))


def train(parts: Parts, build: Callable[[], nn.Module], rate: float, seed: int, epochs: int) -> Result:
    """Trains VQ Fusion with a quantizer; measures the epoch of least validation loss."""
    torch.manual_seed(seed)
    start = time.monotonic()
    model = VQFusion(parts.config)
    model.quantizer = build()
    for name in parts.config.sources:
        x_ND = parts.train.sources[name][parts.train.present[name]]
        model.standardize[name].set(x_ND.mean(0), x_ND.var(0, correction=0).sum())
    model.start(parts.train)
    steps = -(-len(parts.train) // 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * steps + 1, pct_start=0.1, cycle_momentum=False
    )
    best, best_state = loss_of(model, parts.validation), copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(parts.train)).split(256):
            optimizer.zero_grad()
            loss, _, _ = model(parts.train.select(rows))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        loss = loss_of(model, parts.validation)
        if loss < best:
            best, best_state = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return measure(model, parts, best, time.monotonic() - start)


@torch.no_grad()
def loss_of(model: VQFusion, items: ItemTensors) -> float:
    """The tasks' weighted loss, without the quantizer's own."""
    model.eval()
    z_ND = model.quantizer(model.latent(items)).z_q_ND
    means = [loss_N.sum() / has_N.sum().clamp_min(1) for loss_N, has_N in model.task_losses(z_ND, items).values()]
    return float(sum(model.config.task_weights[t] * m for t, m in zip(model.config.tasks, means, strict=True)))


@torch.no_grad()
def measure(model: VQFusion, parts: Parts, validation_loss: float, seconds: float) -> Result:
    """What the model does on held-out items, and which digits have a value that no item has."""
    model.eval()
    items, config = parts.held_out, model.config
    z_ND = model.quantizer(model.latent(items)).z_q_ND
    means = [
        float(loss_N.sum() / has_N.sum().clamp_min(1)) for loss_N, has_N in model.task_losses(z_ND, items).values()
    ]
    accuracies = {}
    for target, settings in config.targets.items():
        hits = _hits(model.heads[target](z_ND), items.labels[target], items.labelled[target])
        accuracies[target] = _score(hits[None], settings.multi_label)[0]
    digits_NL = torch.cat([model.quantizer(model.latent(part)).digits_NL for part in (parts.train, items)]).long()
    radices = getattr(model.quantizer, "radices", None) or [stage.radix for stage in model.quantizer.stages]
    dead = sum(int(_unused(digits_NL[:, j], radix) > 0) for j, radix in enumerate(radices))
    return Result(dict(zip(config.sources, means, strict=False)), accuracies, dead, validation_loss, seconds)


def _unused(digit_N: Tensor, radix: int) -> int:
    return radix - len(digit_N.unique())


def show(results: dict[str, list[Result]]) -> None:
    """The table of quantizers."""
    first = next(iter(results.values()))[0]
    table = Table(
        title="inside VQ Fusion, on held-out items: relative squared error, then accuracy or F1; mean ± std over seeds"
    )
    table.add_column("quantizer")
    for name in (*first.errors, *first.accuracies, "dead digits", "s"):
        table.add_column(name, justify="right")
    for name, runs in results.items():
        cells = [_spread([r.errors[s] for r in runs]) for s in first.errors]
        cells += [_spread([r.accuracies[t] for r in runs]) for t in first.accuracies]
        table.add_row(name, *cells, str(max(r.dead_digits for r in runs)), f"{fmean(r.seconds for r in runs):.0f}")
    console = Console(width=140)
    console.print(table)


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ±{stdev(values):.4f}" if len(values) > 1 else "")


def compare(data: str, results: dict[str, list[Result]]) -> Comparisons:
    """The better of DPCA's lists, by validation loss, against each peer."""
    ours = [name for name in results if name.startswith("DPCA")]
    chosen = min(ours, key=lambda name: fmean(run.validation_loss for run in results[name]))
    comparisons = Comparisons(f"{chosen} (the DPCA of least validation loss) against peers")
    for peer, runs in results.items():
        if peer == chosen:
            continue
        for part in ("errors", "accuracies"):
            for task in getattr(runs[0], part):
                own, its = (fmean(getattr(run, part)[task] for run in results[name]) for name in (chosen, peer))
                metric = "relative squared error" if part == "errors" else "accuracy"
                comparisons.add(f"{data}/{task}", metric, own, peer, its, lower_is_better=part == "errors")
    return comparisons


if __name__ == "__main__":
    main()
