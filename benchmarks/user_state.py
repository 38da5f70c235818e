"""State that is kept of a user: adding new events to it, against reading the whole history again.

    python benchmarks/user_state.py [--threads 2] [--events 10000] [--json FILE]

A ranker's shape with fresh weights (SIDs of 25 trits, D = 64, H = 4, 2 learned queries), exported as ``sidrec export
--compiled false`` would. Append: the state of a user with T events, and 1 or 16 new ones, against the state made of all of
them. Request: candidates scored given the state, against ``ServingRanker``, which has the learned queries read all T events;
the candidates themselves read all T in both, or the newest 1,000 where the state is kept. Drift: how far the state of T
events added one by one is from that of all read together.
"""

import argparse
from pathlib import Path

import torch
from comparison import Comparisons, seconds
from side_decode import SPEC, _kernels
from torch import Tensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.readers import PackedSIDs
from sidrec_torchrec.ranker.serving import ServingRanker, export
from sidrec_torchrec.ranker.stateful import StatefulServingRanker, UserStateUpdater, export_stateful, export_updater
from sidrec_torchrec.ranker.user_state import DTYPES
from sidrec_torchrec.side.expansion import SIDEConfig

CPU = torch.device("cpu")
APPENDED, CANDIDATES, NEWEST = (1, 16), (1, 100, 500), 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, T = make(), arguments.events
    updater = UserStateUpdater(model)
    print(f"{updater.layout.num_bytes:,} bytes a user")
    comparisons = Comparisons(f"state that is kept, T = {T:,}, D = 64, H = 4, 2 learned queries; kernels: {_kernels()}")
    with torch.inference_mode():
        appends(comparisons, updater, T)
        requests(comparisons, model, updater, T)
        drift(comparisons, updater, T)
    comparisons.finish(arguments.json)


def appends(comparisons: Comparisons, updater: UserStateUpdater, T: int) -> None:
    """What new events take."""
    update, none = export_updater(updater).module(), updater.new(1)
    for count in APPENDED:
        events = make_events(T)
        old, new = (part_of(events, part) for part in (slice(T - count), slice(T - count, T)))
        states = updater.append(none, **old)
        ours, peer = seconds(
            lambda states=states, new=new: update(*states.tensors, *new.values()),
            lambda events=events: update(*none.tensors, *events.values()),
        )
        comparisons.add(f"append {count}", "ms", ours * 1000, f"from {T:,} events", peer * 1000, lower_is_better=True)


def requests(comparisons: Comparisons, model: ServingRanker, updater: UserStateUpdater, T: int) -> None:
    """What a request takes."""
    stateful = export_stateful(StatefulServingRanker(model)).module()
    whole = export(model).module()
    events = make_events(T)
    states = updater.append(updater.new(1), **events)
    for M in CANDIDATES:
        asked = {
            "candidate_MW": torch.randint(3**25, (M, 1)),
            "request_M": torch.zeros(M, dtype=torch.int64),
            "request_time_B": torch.tensor([T * 60]),
        }
        without = (*asked.values(), torch.tensor([T]), torch.zeros(1, 0, dtype=torch.int64))
        given = (*asked.values(), without[-1])
        newest = part_of(events, slice(T - NEWEST, T))
        kept, cut, peer = seconds(
            lambda given=given: stateful(*states.tensors, *events.values(), *given),
            lambda given=given, newest=newest: stateful(*states.tensors, *newest.values(), *given),
            lambda without=without: whole(*events.values(), *without),
        )
        for reads, ours in ((f"read {T:,}", kept), (f"read {NEWEST:,}", cut)):
            name = f"request, {M} candidates {reads}"
            comparisons.add(name, "ms", ours * 1000, "without a state", peer * 1000, lower_is_better=True)


def drift(comparisons: Comparisons, updater: UserStateUpdater, T: int) -> None:
    """What rounding adds up to."""
    events = make_events(T)
    whole = updater.append(updater.new(1), **events)
    for count in APPENDED:
        states = updater.new(1)
        for first in range(0, T, count):
            states = updater.append(states, **part_of(events, slice(first, min(first + count, T))))
        differences = [float((getattr(states, name) - getattr(whole, name)).abs().max()) for name in DTYPES]
        comparisons.add(
            f"{T:,} events, {count} at a time", "difference", max(differences), "allowed", 1e-5, lower_is_better=True
        )


def make() -> ServingRanker:
    """A ranker with fresh weights."""
    codec = Codec(SPEC, torch.zeros(64), tuple(torch.randn(3, 64) / 5 for _ in SPEC.stages))
    events = SIDEConfig(name="item", feature_names=["sid"], codec=codec)
    config = RankerConfig(attention="codes", learned_queries=2)
    ranker = Ranker(config, PackedSIDs(events, CPU), events.embedding_dim, events, {}, CPU)
    return ServingRanker(ranker, {"sid": SPEC})


def make_events(T: int) -> dict[str, Tensor]:
    """One user's, one a minute."""
    return {
        "history_NW": torch.randint(3**25, (T, 1)),
        "action_N": torch.randint(2, (T,)),
        "time_N": torch.arange(T) * 60,
        "offsets_B1": torch.tensor([0, T]),
    }


def part_of(events: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """Some of one user's events."""
    cut = {name: events[name][part] for name in ("history_NW", "action_N", "time_N")}
    return cut | {"offsets_B1": torch.tensor([0, len(cut["time_N"])])}


if __name__ == "__main__":
    main()
