"""What arms' tables would cost on hundreds of GPUs: the plan of TorchRec's planner, and bytes that cross the network in a step.

    python benchmarks/sharding_plan.py --items 1000000000 --hosts 64 --gpus 8

No GPU is needed: the planner reckons with a topology that is described to it. Bytes are of one training step of all GPUs,
counted from the plan: the all-to-all of ids and of embeddings there and of gradients back, and the all-reduce of what is
replicated, as a ring sends it. SIDE has no table, so that nothing of an item crosses the network but its SID in the batch.
"""

import argparse
import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

GIB = 1 << 30
ID_BYTES, FLOAT_BYTES = 8, 4
DENSE = 2_000_000  # parameters of a ranker besides its tables, about


@dataclass(frozen=True)
class Tables:
    """What an arm looks up, in tables of as many rows each.

    Args:
        arm: its name.
        rows: of each table.
        count: how many tables.
        lookups: rows that an event looks up in each.
    """

    arm: str
    rows: int = 0
    count: int = 0
    lookups: int = 1


def arms(items: int) -> list[Tables]:
    """Arms as they are by default; tables that hash are as large as a corpus of this size would want them."""
    return [
        Tables("id", items, 1),
        Tables("hashed-id, a tenth of the rows", items // 10, 1),
        Tables("prefix-ngram, two SIDs of 3 digits", items // 10, 2, lookups=3),
        Tables("hybrid, 4,096 rows", 4_096, 1),
        Tables("side", 0, 0),
    ]


class ByRows(EmbeddingCollectionSharder):
    """The choices that suit a narrow table: whole on each GPU, whole on one, or cut by rows."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in (ShardingType.DATA_PARALLEL, ShardingType.TABLE_WISE, ShardingType.ROW_WISE)]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        is_whole = sharding_type == ShardingType.DATA_PARALLEL.value
        return [(EmbeddingComputeKernel.DENSE if is_whole else EmbeddingComputeKernel.FUSED).value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10**9)
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--gpus", type=int, default=8, help="of a host")
    parser.add_argument("--hbm", type=float, default=80.0, help="GiB of a GPU")
    parser.add_argument("--dim", type=int, default=64, help="floats of a row")
    parser.add_argument("--events", type=int, default=65_536, help="of a GPU's batch, histories included")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # of the planner, about topologies that are not of this machine
    warnings.simplefilter("ignore", FutureWarning)
    rows = [plan(tables, arguments) for tables in arms(arguments.items)]
    show(rows, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def plan(tables: Tables, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the planner does with an arm's tables, and what a step then sends."""
    world_size = arguments.hosts * arguments.gpus
    floats = tables.rows * tables.count * arguments.dim
    kind = sharding(tables, arguments) if tables.count else "nothing to shard"
    is_sharded = kind not in ("nothing to shard", "data_parallel")
    # of the rows that a GPU looks up, those that another one has
    lookups = tables.count * tables.lookups * arguments.events * (world_size - 1) if is_sharded else 0
    there_and_back = ID_BYTES + 2 * arguments.dim * FLOAT_BYTES  # an id, its vector, and the vector's gradient
    replicated = DENSE + (0 if is_sharded else floats)
    return {
        "arm": tables.arm,
        "plan": kind,
        "tables_gib": floats * FLOAT_BYTES / GIB,
        "share_gib": floats * FLOAT_BYTES / GIB / (world_size if is_sharded else 1),
        "all_to_all_gb": lookups * there_and_back / 1e9,
        "all_reduce_gb": 2 * (world_size - 1) * replicated * FLOAT_BYTES / 1e9,  # a ring's
    }


def sharding(tables: Tables, arguments: argparse.Namespace) -> str:
    """How TorchRec's planner cuts the tables."""
    configs = [
        EmbeddingConfig(
            name=f"table_{t}",
            embedding_dim=arguments.dim,
            num_embeddings=tables.rows,
            feature_names=[f"feature_{t}_{i}" for i in range(tables.lookups)],
        )
        for t in range(tables.count)
    ]
    model = nn.Sequential(EmbeddingCollection(tables=configs, device=torch.device("meta")))
    topology = Topology(
        world_size=arguments.hosts * arguments.gpus,
        local_world_size=arguments.gpus,
        compute_device="cuda",
        hbm_cap=int(arguments.hbm * GIB),
    )
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=arguments.events, debug=False)
    try:
        plans = planner.plan(model, [ByRows()]).plan.values()
    except PlannerError:
        return "does not fit"
    return ", ".join(sorted({str(table.sharding_type) for plan in plans for table in plan.values()}))


def show(rows: list[dict], arguments: argparse.Namespace) -> None:
    world_size = arguments.hosts * arguments.gpus
    table = Table(title=f"{arguments.items:,} items, {world_size} GPUs, {arguments.events:,} events a GPU and step")
    for heading in (
        "arm",
        "plan",
        "tables, GiB",
        "a GPU's share, GiB",
        "all-to-all, GB a step",
        "all-reduce, GB a step",
    ):
        table.add_column(heading, justify="left" if heading in ("arm", "plan") else "right")
    for row in rows:
        figures = [f"{row[name]:,.3f}" for name in ("tables_gib", "share_gib", "all_to_all_gb", "all_reduce_gb")]
        table.add_row(row["arm"], row["plan"], *figures)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(f"python {' '.join(sys.argv)}; torchrec's planner, no GPU was used", highlight=False)


if __name__ == "__main__":
    main()
