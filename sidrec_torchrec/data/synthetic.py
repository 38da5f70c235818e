"""A seeded corpus whose structure is known: content pays, and so does reading recent AND distant events by content.

Items have a latent vector; two sources, a category and tags are views of it. A user likes an item, says the model, by

    logit = bias + recent_weight * match(recent) + distant_weight * match(distant) + quality(item) + user bias

    match(pool) of item c
        = (prior * m_c + sum_{j in pool} k_cj s_j) / (prior + sum_{j in pool} k_cj) - mean_{j in pool} s_j

where s_j = +1 or -1 is how the user took event j, and k_cj = phi_c . phi_j is the likeness of two items by content (phi:
soft membership in the categories): what he made of like items, against what he made of all. The recent pool is the user's
last ``recent_events`` events, the distant pool is the older half of his history. m_c is what a pool says before it holds
like items: his present interest (recent) or his lasting taste (distant). But for these priors and the user's bias, the true
probability is a function of what a ranker may read; ``synthetic.json`` states the normalized entropy that reaching it gives.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from sidrec_torchrec.data.events import EVENTS_FILE, USERS_FILE
from sidrec_torchrec.data.items import ITEMS_FILE
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path, write_json

SUMMARY_FILE = "synthetic.json"
FIRST_ITEM_ID = 1_000
FIRST_USER_ID = 1

_LATENT_DIM = 16
_PRIVATE = 4  # latent values only one of the two sources sees
_EPOCH = 1_700_000_000
_SPAN = 365 * 86_400
_BLOCK_EVENTS = 500_000  # bounds memory; the corpus does not depend on it
_NUM_TAGS = 24
_SEGMENTS = 4
_REGIONS = 8


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Size and structure of the corpus.

    Args:
        items: number of items.
        users: number of users.
        median_events: half of the users have fewer events; lengths are log-normal with a standard deviation of 1.
        min_events: shortest history.
        max_events: longest history.
        seed: same seed, same corpus.
        text_dim: width of the source ``text_emb``.
        image_dim: width of the source ``image_emb``.
        categories: values of the target ``category``, at least 2.
        missing: share of items without one source (for each source).
        noise: standard deviation of what a source adds to its view of the latent vector.
        cold: share of items that come out in the last fifth of the time.
        recent_events: length of the recent pool.
        recent_weight: what a match with the recent pool adds to the logit.
        distant_weight: what a match with the distant pool adds to the logit.
        quality_weight: what the item itself adds to the logit.
        user_weight: standard deviation of the user's bias.
        bias: logit when all else is 0.
        prior: weight of interest and taste against like items in a pool.
    """

    items: int = 2_000
    users: int = 600
    median_events: int = 130
    min_events: int = 10
    max_events: int = 10_000
    seed: int = 0
    text_dim: int = 64
    image_dim: int = 48
    categories: int = 16
    missing: float = 0.03
    noise: float = 0.3
    cold: float = 0.15
    recent_events: int = 32
    recent_weight: float = 1.5
    distant_weight: float = 2.0
    quality_weight: float = 1.0
    user_weight: float = 0.6
    bias: float = 0.0
    prior: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_events <= self.median_events <= self.max_events:
            raise DataError(
                "need 1 <= min_events <= median_events <= max_events, got "
                f"{self.min_events}, {self.median_events}, {self.max_events}"
            )
        if min(self.users, self.recent_events, self.text_dim, self.image_dim) < 1 or self.categories < 2:
            raise DataError("users, recent_events, text_dim and image_dim must be at least 1, categories at least 2")
        if not (0 <= self.missing < 1 and 0 <= self.cold <= 0.5):
            raise DataError(f"need 0 <= missing < 1 and 0 <= cold <= 0.5, got {self.missing} and {self.cold}")
        if self.items < 4 * self.categories:
            raise DataError(f"need at least 4 items a category: {4 * self.categories}, got {self.items}")
        if self.prior <= 0:
            raise DataError(f"prior must be positive, got {self.prior}")


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
    world = _make_items(config)
    _write_table(folder / ITEMS_FILE, _items_table(config, world))
    lengths_U = _history_lengths(config)
    blocks = _blocks(lengths_U)
    entropy = _Entropy()
    with (
        atomic_path(folder / EVENTS_FILE) as events_path,
        atomic_path(folder / USERS_FILE) as users_path,
        pq.ParquetWriter(events_path, _EVENTS_SCHEMA, compression="zstd") as events_writer,
        pq.ParquetWriter(users_path, _USERS_SCHEMA, compression="zstd") as users_writer,
    ):
        for users in track(blocks, "synthetic events", disable=not progress):
            block = _make_events(config, world, users, lengths_U[users])
            events_writer.write_table(block.events)
            users_writer.write_table(block.users)
            entropy.add(block)
    summary = {"config": asdict(config)} | entropy.summary()
    write_json(folder / SUMMARY_FILE, summary)
    return summary


@dataclass(frozen=True)
class _World:
    """The items, by place (item_id - FIRST_ITEM_ID)."""

    latent_ID: np.ndarray
    category_I: np.ndarray
    membership_IC: np.ndarray
    quality_I: np.ndarray
    release_I: np.ndarray
    popularity_I: np.ndarray


def _make_items(config: SyntheticConfig) -> _World:
    rng = np.random.default_rng([config.seed, 0])
    category_I = rng.permutation(np.arange(config.items) % config.categories)
    centers_CD = rng.normal(size=(config.categories, _LATENT_DIM))
    latent_ID = centers_CD[category_I] + rng.normal(scale=0.7, size=(config.items, _LATENT_DIM))
    distance_IC = ((latent_ID[:, None] - centers_CD) ** 2).sum(-1)
    membership_IC = np.exp((distance_IC.min(1, keepdims=True) - distance_IC) / 6.0)
    membership_IC /= membership_IC.sum(1, keepdims=True)
    bend_ID = np.tanh(latent_ID @ rng.normal(scale=0.35, size=(_LATENT_DIM, _LATENT_DIM)))
    quality_I = bend_ID @ rng.normal(size=_LATENT_DIM)
    quality_I = (quality_I - quality_I.mean()) / quality_I.std()
    cold_I = rng.permutation(config.items) < config.cold * config.items
    release_I = np.where(cold_I, rng.uniform(0.8, 0.98, size=config.items), 0.0)
    # One Zipf law over all items: rank r is seen in proportion to 1 / (r + 10).
    popularity_I = 1.0 / (rng.permutation(config.items) + 11.0)
    return _World(latent_ID, category_I, membership_IC, quality_I, release_I, popularity_I)


def _items_table(config: SyntheticConfig, world: _World) -> pa.Table:
    rng = np.random.default_rng([config.seed, 1])
    half = _LATENT_DIM - _PRIVATE
    sources = {
        "text_emb": _view(rng, world.latent_ID[:, :half], config.text_dim, config),
        "image_emb": _view(rng, world.latent_ID[:, -half:], config.image_dim, config),
    }
    score_IT = world.latent_ID @ rng.normal(size=(_LATENT_DIM, _NUM_TAGS)) / _LATENT_DIM**0.5
    tags = [[f"tag{t:02d}" for t in np.flatnonzero(row)] for row in score_IT > 1.5]
    return pa.table(
        {
            "item_id": pa.array(np.arange(config.items) + FIRST_ITEM_ID, pa.int64()),
            "category": pa.array([f"category{c:02d}" for c in world.category_I], pa.string()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            **sources,
        }
    )


def _view(rng: np.random.Generator, latent_ID: np.ndarray, dim: int, config: SyntheticConfig) -> pa.Array:
    """A nonlinear, noisy, unit-length view of part of the latent vector; null where missing."""
    num_items, width = latent_ID.shape
    x_IH = np.tanh(latent_ID @ rng.normal(scale=width**-0.5, size=(width, 64)))
    x_ID = x_IH @ rng.normal(scale=1 / 8, size=(64, dim)) * 2 + rng.normal(scale=config.noise, size=(num_items, dim))
    x_ID /= np.linalg.norm(x_ID, axis=1, keepdims=True)
    missing_I = rng.random(num_items) < config.missing
    flat = pa.array(x_ID.astype(np.float16).ravel(), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(missing_I))


def _history_lengths(config: SyntheticConfig) -> np.ndarray:
    rng = np.random.default_rng([config.seed, 2])
    lengths_U = config.median_events * np.exp(rng.normal(size=config.users))
    return np.clip(lengths_U, config.min_events, config.max_events).astype(np.int64)


def _blocks(lengths_U: np.ndarray) -> list[np.ndarray]:
    """Consecutive users, about ``_BLOCK_EVENTS`` events at a time."""
    block_U = np.cumsum(lengths_U) // _BLOCK_EVENTS
    return np.split(np.arange(len(lengths_U)), np.flatnonzero(np.diff(block_U)) + 1)


_EVENTS_SCHEMA = pa.schema(
    [("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64()), ("label", pa.int8())]
)
_USERS_SCHEMA = pa.schema([("user_id", pa.int64()), ("segment", pa.string()), ("region", pa.string())])


@dataclass(frozen=True)
class _Block:
    events: pa.Table
    users: pa.Table
    starts_U: np.ndarray
    labels_N: np.ndarray
    probability_N: np.ndarray


@dataclass(frozen=True)
class _Draws:
    """All that is random about some users, from one generator per user, so that it does not depend on the block.

    Users [U]; events of all users, one after another [N].
    """

    taste_UC: np.ndarray
    bias_U: np.ndarray
    context_U4: np.ndarray
    span_U2: np.ndarray
    uniform_NK: np.ndarray


def _draw(config: SyntheticConfig, users_U: np.ndarray, lengths_U: np.ndarray) -> _Draws:
    starts_U = np.cumsum(lengths_U) - lengths_U
    taste_UC = np.empty((len(users_U), config.categories))
    normal_U = np.empty(len(users_U))
    context_U4 = np.empty((len(users_U), 4))
    span_U2 = np.empty((len(users_U), 2))
    uniform_NK = np.empty((lengths_U.sum(), 9))
    for u, (user, start, length) in enumerate(zip(users_U, starts_U, lengths_U, strict=True)):
        rng = np.random.default_rng([config.seed, 3, user])
        taste_UC[u] = rng.normal(size=config.categories)
        normal_U[u] = rng.normal()
        context_U4[u] = rng.random(4)
        span_U2[u] = rng.random(2)
        uniform_NK[start : start + length] = rng.random((length, 9))
    return _Draws(taste_UC, normal_U * config.user_weight, context_U4, span_U2, uniform_NK)


def _make_events(config: SyntheticConfig, world: _World, users_U: np.ndarray, lengths_U: np.ndarray) -> _Block:
    draws = _draw(config, users_U, lengths_U)
    starts_U = np.cumsum(lengths_U) - lengths_U
    user_N = np.repeat(np.arange(len(users_U)), lengths_U)
    time_N, session_N = _times(draws, user_N, starts_U, lengths_U)
    focus_N = _interests(draws, user_N, starts_U, session_N)
    item_N = _choose_items(world, draws, user_N, time_N, focus_N)
    labels_N, probability_N = _label(config, world, draws, starts_U, lengths_U, item_N, focus_N)
    events = pa.table(
        [users_U[user_N] + FIRST_USER_ID, item_N + FIRST_ITEM_ID, time_N + _EPOCH, labels_N], schema=_EVENTS_SCHEMA
    )
    return _Block(events, _users_table(draws, users_U), starts_U, labels_N, probability_N)


def _users_table(draws: _Draws, users_U: np.ndarray) -> pa.Table:
    """Half of the users are in the segment (region) their taste (bias) puts them in, the others anywhere."""
    by_segment = np.array_split(draws.taste_UC, _SEGMENTS, axis=1)
    segment_U = np.argmax(np.stack([part.mean(axis=1) for part in by_segment]), axis=0)
    region_U = np.clip(np.floor(_REGIONS / 2 + 2 * draws.bias_U), 0, _REGIONS - 1).astype(np.int64)
    random_U4 = draws.context_U4
    segment_U = np.where(random_U4[:, 0] < 0.5, segment_U, (random_U4[:, 1] * _SEGMENTS).astype(np.int64))
    region_U = np.where(random_U4[:, 2] < 0.5, region_U, (random_U4[:, 3] * _REGIONS).astype(np.int64))
    columns = [
        users_U + FIRST_USER_ID,
        [f"segment{s}" for s in segment_U],
        [f"region{r}" for r in region_U],
    ]
    return pa.table(columns, schema=_USERS_SCHEMA)


def _times(
    draws: _Draws, user_N: np.ndarray, starts_U: np.ndarray, lengths_U: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds since the start, int64 [N], and whether an event opens a session, bool [N].

    Sessions of 8 events on average, a minute between their events; the gaps between sessions are stretched so that
    the user is active from some day of the first half of the time until (almost) its end.
    """
    session_N = draws.uniform_NK[:, 0] < 1 / 8
    session_N[starts_U] = True
    wait_N = -np.log1p(-draws.uniform_NK[:, 1])
    within_N = np.where(session_N, 0.0, wait_N * 60)
    between_N = np.where(session_N, wait_N, 0.0)
    between_N[starts_U] = 0.0
    first_U = draws.span_U2[:, 0] * 0.5 * _SPAN
    last_U = (0.9 + 0.1 * draws.span_U2[:, 1]) * _SPAN
    room_U = np.maximum(last_U - first_U - np.add.reduceat(within_N, starts_U), 0.0)
    stretch_U = room_U / np.maximum(np.add.reduceat(between_N, starts_U), 1.0)
    gap_N = (within_N + between_N * stretch_U[user_N]).astype(np.int64)
    total_N = np.cumsum(gap_N)
    offset_U = first_U.astype(np.int64) - total_N[starts_U] + gap_N[starts_U]
    return total_N + offset_U[user_N], session_N


def _interests(draws: _Draws, user_N: np.ndarray, starts_U: np.ndarray, session_N: np.ndarray) -> np.ndarray:
    """The category each event's user is into, int64 [N]: a phase that lasts five sessions on average."""
    opens_N = session_N & (draws.uniform_NK[:, 2] < 1 / 5)
    opens_N[starts_U] = True
    opening_N = np.maximum.accumulate(np.where(opens_N, np.arange(len(user_N)), 0))
    # Phases are drawn evenly: what a user likes now says little about what he likes always.
    return (draws.uniform_NK[opening_N, 3] * draws.taste_UC.shape[1]).astype(np.int64)


def _choose_items(
    world: _World, draws: _Draws, user_N: np.ndarray, time_N: np.ndarray, focus_N: np.ndarray
) -> np.ndarray:
    """The item of each event: half of them of the present interest, the others by taste; popular ones first."""
    appeal_UC = np.exp(draws.taste_UC)
    cumulative_UC = np.cumsum(appeal_UC / appeal_UC.sum(1, keepdims=True), axis=1)
    by_taste_N = (draws.uniform_NK[:, 4, None] > cumulative_UC[user_N, :-1]).sum(1)
    category_N = np.where(draws.uniform_NK[:, 5] < 0.5, focus_N, by_taste_N)
    item_N = _sample(world, category_N, draws.uniform_NK[:, 6], world.popularity_I)
    # An item that is not out yet is replaced by one that always was.
    lasting_N = _sample(world, category_N, draws.uniform_NK[:, 7], world.popularity_I * (world.release_I == 0))
    return np.where(world.release_I[item_N] * _SPAN <= time_N, item_N, lasting_N)


def _sample(world: _World, category_N: np.ndarray, uniform_N: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
    """An item of each category, in proportion to the weights."""
    order = np.argsort(world.category_I, kind="stable")
    cumulative_I = np.cumsum(weight_I[order])
    ends_C = np.cumsum(np.bincount(world.category_I)) - 1
    high_C = cumulative_I[ends_C]
    low_C = np.r_[0.0, high_C[:-1]]
    aim_N = low_C[category_N] + uniform_N * (high_C - low_C)[category_N]
    return order[np.searchsorted(cumulative_I, aim_N, side="right")]


def _label(
    config: SyntheticConfig,
    world: _World,
    draws: _Draws,
    starts_U: np.ndarray,
    lengths_U: np.ndarray,
    item_N: np.ndarray,
    focus_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, int8 [N], and their true probabilities; step t labels the t-th event of every user of the block."""
    labels_N = np.zeros(len(item_N), np.int8)
    probability_N = np.zeros(len(item_N))
    longest_first = np.argsort(-lengths_U, kind="stable")
    starts_U, lengths_U = starts_U[longest_first], lengths_U[longest_first]
    taste_UC, bias_U = np.tanh(draws.taste_UC[longest_first]), draws.bias_U[longest_first]
    recent = _Pool(len(starts_U), config)
    distant = _Pool(len(starts_U), config)

    for step in range(lengths_U[0]):
        active = int(np.searchsorted(-lengths_U, -step))  # users with more than `step` events are a prefix
        event_A = starts_U[:active] + step
        phi_AC = world.membership_IC[item_N[event_A]]
        interest_A = 2 * phi_AC[np.arange(active), focus_N[event_A]] - 1
        taste_A = (phi_AC * taste_UC[:active]).sum(1)
        logit_A = (
            config.bias
            + config.recent_weight * recent.match(phi_AC, interest_A)
            + config.distant_weight * distant.match(phi_AC, taste_A)
            + config.quality_weight * world.quality_I[item_N[event_A]]
            + bias_U[:active]
        )
        probability_N[event_A] = 1 / (1 + np.exp(-logit_A))
        labels_N[event_A] = draws.uniform_NK[event_A, 8] < probability_N[event_A]

        recent.add(phi_AC, labels_N[event_A])
        if step >= config.recent_events:
            old_A = event_A - config.recent_events
            recent.add(world.membership_IC[item_N[old_A]], labels_N[old_A], weight=-1.0)
        if step % 2:  # before the next step, events 0 .. (step + 1) / 2 - 1 are the older half
            old_A = starts_U[:active] + step // 2
            distant.add(world.membership_IC[item_N[old_A]], labels_N[old_A])
    return labels_N, probability_N


class _Pool:
    """Events of many users, as sums that answer ``match`` without reading them again."""

    def __init__(self, num_users: int, config: SyntheticConfig) -> None:
        self._signed_UC = np.zeros((num_users, config.categories))
        self._count_UC = np.zeros((num_users, config.categories))
        self._prior = config.prior

    def add(self, phi_AC: np.ndarray, labels_A: np.ndarray, weight: float = 1.0) -> None:
        active = len(phi_AC)
        self._signed_UC[:active] += weight * phi_AC * (2.0 * labels_A - 1.0)[:, None]
        self._count_UC[:active] += weight * phi_AC

    def match(self, phi_AC: np.ndarray, prior_A: np.ndarray) -> np.ndarray:
        active = len(phi_AC)
        signed_AC, count_AC = self._signed_UC[:active], self._count_UC[:active]
        like_A = self._prior * prior_A + (phi_AC * signed_AC).sum(1)
        like_A /= self._prior + (phi_AC * count_AC).sum(1)
        # A row of phi sums to 1, so that of the counts to the number of events; an empty pool has mean 0.
        return like_A - signed_AC.sum(1) / np.maximum(count_AC.sum(1), 1.0)


class _Entropy:
    """Sums of which the normalized entropies are made."""

    def __init__(self) -> None:
        self._events = self._positives = 0
        self._oracle = self._user = 0.0

    def add(self, block: _Block) -> None:
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
        pq.write_table(table, temporary, compression="zstd")
