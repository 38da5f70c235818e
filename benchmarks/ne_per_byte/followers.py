"""A corpus of users who follow embeddings, to try defaults on that nobody tuned there.

    python benchmarks/ne_per_byte/followers.py --vectors ITEMS.parquet --column COLUMN --out DATA [--items 10000] [--users 20000]

Items are a draw of the vectors in a Parquet file. Each has two sources: ``text_emb``, the vector as it is, and ``view_emb``, the vector
turned by a random rotation, and as much noise. A user has a few anchors among the items and takes items near one of them: with
a = the anchor of an event, drawn anew each time, the next item is drawn from softmax_i(sharpness * cos(v_i, v_a) + popularity_i), popularity
normal with standard deviation 1. With ``--facets K`` users look at K of the first 128 principal components, drawn at random and
brought to the same variance: most of what content says is beside the point. All events are positives, as on a shop's log: prepare
samples the negatives.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EVENTS_PER_USER = 10
ANCHORS = 3  # of a user
_COMPONENTS = 128
_BLOCK_USERS = 1_000  # bounds memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--column", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--facets", type=int, default=0)
    parser.add_argument("--sharpness", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vectors_VD = read(arguments.vectors, arguments.column)
    most = num_components(arguments.items, vectors_VD.shape[1])
    if not 2 <= arguments.items <= len(vectors_VD):
        parser.error(
            f"--items must lie between 2 and {len(vectors_VD):,}, the vectors that there are and that are not zero"
        )
    if not 0 <= arguments.facets <= most:
        parser.error(
            f"--facets must lie between 0 and {most}, the principal components of {arguments.items:,} such vectors"
        )
    if arguments.users < 1:
        parser.error("--users must be at least 1")
    if arguments.out.exists():
        parser.error(f"--out: {arguments.out} is there already")
    rng = np.random.default_rng(arguments.seed)
    vectors_ID = vectors_VD[rng.choice(len(vectors_VD), arguments.items, replace=False)]
    arguments.out.mkdir(parents=True)
    pq.write_table(items_table(vectors_ID, rng), arguments.out / "items.parquet")
    pq.write_table(events_table(vectors_ID, arguments, rng), arguments.out / "events.parquet")


def read(path: Path, column: str) -> np.ndarray:
    """The vectors that are there, float32 [V, D]: neither null nor zeros."""
    present = pq.read_table(path, columns=[column])[column].combine_chunks().drop_null()
    vectors_VD = present.flatten().to_numpy().astype(np.float32).reshape(len(present), -1)
    return vectors_VD[vectors_VD.any(1)]


def items_table(vectors_ID: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """Items and their sources."""
    dim = vectors_ID.shape[1]
    rotation_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    noise_ID = vectors_ID.std() * rng.standard_normal(vectors_ID.shape).astype(np.float32)
    sources = {"text_emb": vectors_ID, "view_emb": vectors_ID @ rotation_DD + noise_ID}
    columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), dim) for name, v in sources.items()}
    return pa.table({"item_id": np.arange(len(vectors_ID)), **columns})


def num_components(num_items: int, dim: int) -> int:
    """How many principal components facets are drawn from: no more than there are."""
    return min(_COMPONENTS, dim, num_items - 1)


def facets(vectors_ID: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """What users look at: a few of the principal components, each of variance 1, float32 [I, count]."""
    centred_ID = vectors_ID - vectors_ID.mean(0)
    variance_D, directions_DD = np.linalg.eigh(centred_ID.T @ centred_ID / len(centred_ID))
    drawn = -1 - rng.choice(num_components(*vectors_ID.shape), count, replace=False)  # the last are the largest
    return centred_ID @ directions_DD[:, drawn] / np.sqrt(variance_D[drawn])


def events_table(vectors_ID: np.ndarray, arguments: argparse.Namespace, rng: np.random.Generator) -> pa.Table:
    """What users took, each in order."""
    seen_ID = facets(vectors_ID, arguments.facets, rng) if arguments.facets else vectors_ID
    unit_ID = seen_ID / np.linalg.norm(seen_ID, axis=1, keepdims=True)
    popularity_I = rng.standard_normal(len(unit_ID)).astype(np.float32)
    taken = []
    for start in range(0, arguments.users, _BLOCK_USERS):
        count = min(_BLOCK_USERS, arguments.users - start)
        anchor_UA = rng.integers(len(unit_ID), size=(count, ANCHORS))
        for _ in range(EVENTS_PER_USER):
            anchor_U = anchor_UA[np.arange(count), rng.integers(ANCHORS, size=count)]
            logit_UI = arguments.sharpness * unit_ID[anchor_U] @ unit_ID.T + popularity_I
            taken.append((logit_UI + rng.gumbel(size=logit_UI.shape).astype(np.float32)).argmax(1))
    blocks = [np.stack(taken[at : at + EVENTS_PER_USER], axis=1) for at in range(0, len(taken), EVENTS_PER_USER)]
    item_N = np.concatenate(blocks).ravel()
    user_N = np.repeat(np.arange(arguments.users), EVENTS_PER_USER)
    time_N = np.tile(np.arange(EVENTS_PER_USER), arguments.users) * 86_400 + user_N % 86_400
    return pa.table({"user_id": user_N, "item_id": item_N, "timestamp": time_N})


if __name__ == "__main__":
    main()
