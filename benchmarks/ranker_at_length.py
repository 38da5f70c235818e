"""The whole ranker at length: training steps that attend to codes against steps that attend to vectors.

    python benchmarks/ranker_at_length.py [--threads 2] [--json FILE] [--plot FILE]

A step is forward, backward and AdamW, on B rows of T events whose last 32 are targets; SIDs of 25 trits, mode digits. Both
readers are the ranker's own (``RankerConfig.attention``), so the peer is the dense path with tables that fit cache: SIDE's.
Every configuration runs in a process of its own, whose peak memory is above what an empty ranker takes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from comparison import Comparisons
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import Ternary
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.readers import PackedSIDs
from sidrec_torchrec.side.collection import SIDECollection
from sidrec_torchrec.side.expansion import SIDEConfig

ATTENTIONS = ("vectors", "codes")
TARGETS = 32
STEPS = 5
AXES = ("T", "B", "D")
MEANING = {"T": "events in a history", "B": "histories in a step", "D": "width"}
SHAPES = [
    *((T, 8, 64) for T in (1_000, 4_000, 10_000)),
    *((10_000, B, 64) for B in (2, 32)),
    *((10_000, 8, D) for D in (128, 256)),
]
VARIED = {"T": {"B": 8, "D": 64}, "B": {"T": 10_000, "D": 64}, "D": {"T": 10_000, "B": 8}}


class Vectors(torch.nn.Module):
    """SIDE's vectors of the batch's events."""

    def __init__(self, events: SIDEConfig) -> None:
        super().__init__()
        self.side = SIDECollection([events])

    def forward(self, items: KeyedJaggedTensor) -> torch.Tensor:
        return self.side(items)["sid"].values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one is not None:
        print(json.dumps(measure(*arguments.one)))
        return
    comparisons = Comparisons("training steps of the ranker, attention to codes against attention to vectors")
    measured = {}
    for T, B, D in SHAPES:
        for attention in ATTENTIONS:
            command = [sys.executable, __file__, "--one", json.dumps([attention, T, B, D])]
            command += ["--threads", str(arguments.threads)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            measured[T, B, D, attention] = json.loads(output.splitlines()[-1])
        ours, peer = measured[T, B, D, "codes"], measured[T, B, D, "vectors"]
        case = f"T={T}/B={B}/D={D}"
        comparisons.add(case, "events/s", ours["events_per_s"], "vectors", peer["events_per_s"])
        comparisons.add(case, "MiB", ours["mib"], "vectors", peer["mib"], lower_is_better=True)
    comparisons.finish(arguments.json)
    if arguments.plot is not None:
        plot(measured, arguments.plot)


def measure(attention: str, T: int, B: int, D: int) -> dict[str, float]:
    """Median speed of a step, and the memory the steps added to the process's peak."""
    torch.manual_seed(0)
    spec = SIDSpec((Ternary(),) * 25, "")
    codec = Codec(spec, torch.zeros(D), tuple(torch.randn(3, D) for _ in spec.stages))
    events = SIDEConfig(name="item", feature_names=["sid"], codec=codec)
    cpu = torch.device("cpu")
    config = RankerConfig(dim=D, attention=attention)
    items = PackedSIDs(events, cpu) if config.reader(events).reads_codes else Vectors(events)
    model = Ranker(config, items, events.embedding_dim, events, {}, cpu)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    step(model, optimizer, make_batch(100, 1))  # builds operators, allocates optimizer state
    batch, before, times = make_batch(T, B), peak_mib(), []
    for _ in range(STEPS):
        start = time.perf_counter()
        step(model, optimizer, batch)
        times.append(time.perf_counter() - start)
    return {"events_per_s": T * B / median(times), "mib": max(peak_mib() - before, 0.1)}


def step(model: Ranker, optimizer: torch.optim.Optimizer, batch: RankBatch) -> None:
    optimizer.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    optimizer.step()


def make_batch(T: int, B: int) -> RankBatch:
    """B rows of T events, all visible, one a minute."""
    N = B * T
    place_N = torch.arange(T).repeat(B)
    return RankBatch(
        items=KeyedJaggedTensor(keys=["sid"], values=torch.randint(3**25, (N,)), lengths=torch.full((B,), T), stride=B),
        users=KeyedJaggedTensor(keys=[], values=torch.zeros(0), lengths=torch.zeros(0, dtype=torch.int64), stride=B),
        user_B=torch.arange(B),
        lengths_B=torch.full((B,), T),
        num_targets_B=torch.full((B,), TARGETS),
        weight_B=torch.ones(B),
        action_N=torch.randint(2, (N,)),
        weight_N=torch.ones(N),
        values_NR=torch.zeros(N, 0),
        features_NF=torch.zeros(N, 0, dtype=torch.int64),
        timestamp_N=place_N * 60,
        order_N=place_N,
        visible_N=torch.ones(N, dtype=torch.bool),
        item_N=torch.zeros(N, dtype=torch.int32),
        global_targets=torch.tensor(float(B * TARGETS)),
        global_labels_K=torch.tensor([float(B * TARGETS)]),
    )


def peak_mib() -> float:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def plot(measured: dict[tuple, dict[str, float]], path: Path) -> None:
    """Speed and memory against T, B and D, the other two fixed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    rows = figure.subplots(2, 3, sharex="col", sharey="row")
    for column, (axis, fixed) in enumerate(VARIED.items()):
        place = AXES.index(axis)
        shapes = sorted(shape for shape in SHAPES if all(shape[AXES.index(name)] == v for name, v in fixed.items()))
        values = [shape[place] for shape in shapes]
        for axes, name in zip(rows[:, column], ("events_per_s", "mib"), strict=True):
            for attention in ATTENTIONS:
                axes.plot(
                    values, [measured[(*shape, attention)][name] for shape in shapes], marker="o", label=attention
                )
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        rows[0, column].set_title(", ".join(f"{name} = {value:,}" for name, value in fixed.items()), fontsize=10)
        rows[1, column].set_xlabel(f"{axis}, {MEANING[axis]}")
    rows[0, 0].set_ylabel("events a second")
    rows[1, 0].set_ylabel("MiB above an empty ranker")
    rows[0, 0].legend(title="attention to")
    figure.suptitle(f"Training steps of the ranker, {TARGETS} targets a history")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
