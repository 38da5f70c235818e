"""A seeded corpus whose structure is known: content pays, and so does reading recent AND distant events by content.

Items have a latent vector; two sources, a category and tags are views of it. A user likes an item, says the model, by

    logit = bias + recent_weight * match(recent) + distant_weight * match(distant) + quality(item) + user bias

    match(pool) of item c
        = (prior * m_c + sum_{j in pool} k_cj s_j) / (prior + sum_{j in pool} k_cj) - mean_{j in pool} s_j

where s_j = +1 or -1 is how the user took event j, and k_cj = phi_c . phi_j is the likeness of two items by content
(phi: soft membership in the categories): what he made of like items, against what he made of all. The recent pool is
the user's last ``recent_events`` events, the distant pool the older half of his history. m_c is what a pool says before
it holds like items: his present interest (recent), his lasting taste (distant). In a corpus with orders, those so far are a third
pool, as the distant one is. But for the priors and the user's bias,
the true probability is a function of what a ranker may read; ``synthetic.json`` states the normalized entropy it gives.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, USERS_FILE
from sidrec_torchrec.data.synthetic_events import USERS_SCHEMA, Block, events_schema, history_lengths, make_events
from sidrec_torchrec.data.synthetic_items import SyntheticConfig, items_table, make_items
from sidrec_torchrec.files import atomic_path, write_json
from sidrec_torchrec.training.progress import stage

__all__ = ["SUMMARY_FILE", "SyntheticConfig", "write_synthetic"]

SUMMARY_FILE = "synthetic.json"

_BLOCK_EVENTS = 500_000  # bounds memory; the corpus does not depend on it


def write_synthetic(config: SyntheticConfig, folder: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Writes ``items.parquet``, ``events.parquet``, ``users.parquet`` and ``synthetic.json`` into ``folder``.

    Works through blocks of users, so memory does not grow with the number of events.

    Args:
        config: what to make.
        folder: where; made if missing, files of the same names are replaced.
        progress: show a progress bar.

    Returns:
        What ``synthetic.json`` says: the ``config``; ``events``; ``label_rate``; normalized entropies (cross entropy
        over that of the label rate) ``ne_user`` of each user's own label rate, the best that can be had without
        content or order, and ``ne_oracle`` of the true probabilities, the best that can be had at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = make_items(config)
    _write_table(folder / ITEMS_FILE, items_table(config, world))
    lengths_U = history_lengths(config)
    blocks = _blocks(lengths_U)
    entropy = _Entropy()
    with (
        atomic_path(folder / EVENTS_FILE) as events_path,
        atomic_path(folder / USERS_FILE) as users_path,
        pq.ParquetWriter(
            events_path, events_schema(config), compression="zstd", write_page_checksum=True
        ) as events_writer,
        pq.ParquetWriter(users_path, USERS_SCHEMA, compression="zstd", write_page_checksum=True) as users_writer,
        stage("synthetic events", len(blocks), show=progress, line=False) as shown,
    ):
        for users in blocks:
            block = make_events(config, world, users, lengths_U[users])
            events_writer.write_table(block.events)
            users_writer.write_table(block.users)
            entropy.add(block)
            shown.advance()
    summary = {"config": asdict(config)} | entropy.summary()
    write_json(folder / SUMMARY_FILE, summary, sealed=True)
    return summary


def _blocks(lengths_U: np.ndarray) -> list[np.ndarray]:
    """Consecutive users, about ``_BLOCK_EVENTS`` events at a time."""
    block_U = np.cumsum(lengths_U) // _BLOCK_EVENTS
    return np.split(np.arange(len(lengths_U)), np.flatnonzero(np.diff(block_U)) + 1)


class _Entropy:
    """Sums of which the normalized entropies are made."""

    def __init__(self) -> None:
        self._events = self._positives = 0
        self._oracle = self._user = 0.0

    def add(self, block: Block) -> None:
        labels_N = block.labels_N.astype(np.float64)
        self._events += len(labels_N)
        self._positives += int(labels_N.sum())
        p_N = block.probability_N
        self._oracle -= float((labels_N * np.log(p_N) + (1 - labels_N) * np.log1p(-p_N)).sum())
        length_U = np.diff(np.r_[block.starts_U, len(labels_N)])
        rate_U = np.add.reduceat(labels_N, block.starts_U) / length_U
        self._user += float((length_U * _binary_entropy(rate_U)).sum())

    def summary(self) -> dict[str, float]:
        rate = self._positives / self._events
        base = self._events * float(_binary_entropy(np.array(rate)))
        return {
            "events": self._events,
            "label_rate": rate,
            "ne_user": self._user / base,
            "ne_oracle": self._oracle / base,
        }


def _binary_entropy(p: np.ndarray) -> np.ndarray:
    q = np.clip(p, 1e-12, 1 - 1e-12)
    return -(q * np.log(q) + (1 - q) * np.log1p(-q))


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
