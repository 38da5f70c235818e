"""Latency of one request: a trained ranker's shape that reads codes, against the same shape that reads looked-up vectors.

    python benchmarks/serving_latency.py [--threads 2] [--calls 30] [--compiled] [--json FILE]

Ours: ``ServingRanker`` (SIDs of 25 trits, D = 64, H = 4) eager, and as ``sidrec export`` writes it with ``--compiled false``,
or compiled. The peer has the same interaction, and attends to rows of a table of a million items: keys and values of every
event once per request, then torch's scaled_dot_product_attention for all candidates. It is spared the biases by action and
time gap that ours has. Requests are new in every call; the calls of all take turns. p50 and p99 in milliseconds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from comparison import Comparisons
from side_decode import SPEC, _kernels
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Context, Ranker
from sidrec_torchrec.ranker.readers import PackedSIDs
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import ServingRanker, export
from sidrec_torchrec.side.expansion import SIDEConfig

ROWS = 1_000_000
LENGTHS, CANDIDATES = (1_000, 4_000, 10_000), (1, 100, 500)
USERS = {"age": [str(i) for i in range(7)]}
CPU = torch.device("cpu")


class LookedUp(nn.Module):
    """The served ranker with a row per item where SIDs stood."""

    def __init__(self, ours: ServingRanker) -> None:
        super().__init__()
        self.ours = ours
        attention = ours.reader.attention
        self.heads, D = attention.num_heads, attention.query.in_features
        self.query, self.output = attention.query, attention.output
        self.key, self.value = nn.Linear(D, D), nn.Linear(D, D)
        self.table = torch.randn(ROWS, D)

    def forward(
        self,
        history_N: Tensor,
        action_N: Tensor,
        time_N: Tensor,
        offsets_B1: Tensor,
        candidate_M: Tensor,
        request_M: Tensor,
        request_time_B: Tensor,
        num_events_B: Tensor,
        user_BF: Tensor,
    ) -> Tensor:
        """As ``ServingRanker.forward`` for a single request, whose items are rows of the table."""
        q_MD, rows_ND = embedding(candidate_M, self.table), embedding(history_N, self.table)
        q, k, v = (
            x.unflatten(1, (self.heads, -1)).transpose(0, 1).unsqueeze(0)
            for x in (self.query(q_MD), self.key(rows_ND), self.value(rows_ND))
        )
        pooled_MD = self.output(scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))
        context = Context.of_ranges(
            order_S=num_events_B[request_M],
            time_S=request_time_B[request_M],
            begin_S=offsets_B1[request_M],
            end_S=offsets_B1[request_M + 1],
            time_V=time_N,
            action_V=action_N,
            num_tasks=1,
        )
        users_MD = [table(user_BF[:, f])[request_M] for f, table in enumerate(self.ours.user_tables)]
        return self.ours.interaction(q_MD, pooled_MD.unsqueeze(1), context, users_MD).sigmoid().squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--compiled", action="store_true", help="compile the exported ranker with AOTInductor")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ours = make()
    peer = LookedUp(ours)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranker.pt2"
        write(export(ours), describe(ours.sids, USERS), file, compiled=arguments.compiled)
        scorer = Scorer(file)
    how = "compiled" if arguments.compiled else "exported"
    comparisons = Comparisons(f"one request, D = 64, H = 4; kernels: {_kernels()}")
    for T in LENGTHS:
        for M in CANDIDATES:
            requests = [make_request(T, M) for _ in range(arguments.calls)]
            items = [(torch.randint(ROWS, (T,)), torch.randint(ROWS, (M,))) for _ in requests]
            with torch.inference_mode():
                eager, exported, looked_up = milliseconds(
                    arguments.calls,
                    lambda i, requests=requests: ours(**requests[i]),
                    lambda i, requests=requests: scorer(**requests[i]),
                    lambda i, requests=requests, items=items: peer(*_with(requests[i], *items[i])),
                )
            for name, taken in (("eager", eager), (how, exported)):
                for metric, share in (("p50 ms", 0.5), ("p99 ms", 0.99)):
                    figures = [float(taken_C.quantile(share)) for taken_C in (taken, looked_up)]
                    comparisons.add(
                        f"T={T}/M={M}/{name}", metric, figures[0], "lookup + sdpa", figures[1], lower_is_better=True
                    )
    comparisons.finish(arguments.json)


def make() -> ServingRanker:
    """A ranker with fresh weights; its user table is not zero."""
    tables = (row * torch.tensor([[-1.0], [0.0], [1.0]]) for row in torch.randn(len(SPEC.stages), 1, 64) / 4)
    codec = Codec(SPEC, torch.zeros(64), tuple(tables))
    events = SIDEConfig(name="item", feature_names=["sid"], codec=codec)
    users = {name: len(values) + 1 for name, values in USERS.items()}
    config = RankerConfig(attention="codes")
    return ServingRanker(
        Ranker(config, PackedSIDs(events, CPU), events.embedding_dim, events, users, CPU), {"sid": SPEC}
    )


def make_request(T: int, M: int) -> dict[str, Tensor]:
    """One request of T events, one a minute, and M candidates."""
    return {
        "history_NW": torch.randint(3**25, (T, 1)),
        "action_N": torch.randint(2, (T,)),
        "time_N": torch.arange(T) * 60,
        "offsets_B1": torch.tensor([0, T]),
        "candidate_MW": torch.randint(3**25, (M, 1)),
        "request_M": torch.zeros(M, dtype=torch.int64),
        "request_time_B": torch.tensor([T * 60]),
        "num_events_B": torch.tensor([T]),
        "user_BF": torch.tensor([[3]]),
    }


def _with(request: dict[str, Tensor], history_N: Tensor, candidate_M: Tensor) -> list[Tensor]:
    return list({**request, "history_NW": history_N, "candidate_MW": candidate_M}.values())


def milliseconds(calls: int, *runs: Callable[[int], object]) -> list[Tensor]:
    """The time of each call of each, float [calls]; the runs take turns."""
    for run in runs:
        for i in range(min(3, calls)):  # builds operators, fills caches
            run(i)
    times_RC = torch.zeros(len(runs), calls)
    for i in range(calls):
        for r, run in enumerate(runs):
            start = time.perf_counter()
            run(i)
            times_RC[r, i] = (time.perf_counter() - start) * 1000
    return list(times_RC)


if __name__ == "__main__":
    main()
