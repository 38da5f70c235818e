"""The items of the synthetic corpus: latent vectors, and the views of them an item file holds."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import vector_lists
from sidrec_torchrec.errors import DataError, check_at_least

FIRST_ITEM_ID = 1_000

DAYS = 365  # the corpus's time
_LATENT_DIM = 16
_PRIVATE = 4  # latent values only one of the two sources sees
_NUM_TAGS = 24
_BLOCK = 1 << 16
_MOST_LOGITS = 100  # that one thing adds to what a user chooses; beyond, probabilities are 0 or 1 to the last bit


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
        idle_dims: latent values both sources see too, and nothing else depends on: content that no user, category or tag
            turns on.
        noise: standard deviation of what a source adds to its view of the latent vector.
        cold: share of items that come out in the last fifth of the time; with ``lifetime_days`` all come out evenly instead.
        lifetime_days: how long an item is met after it came out; 0 for ever. Each day of the year brings new items.
        recent_events: length of the recent pool.
        recent_weight: what a match with the recent pool adds to the logit.
        distant_weight: what a match with the distant pool adds to the logit.
        quality_weight: what the item itself adds to the logit.
        user_weight: standard deviation of the user's bias.
        bias: logit when all else is 0.
        prior: weight of interest and taste against like items in a pool.
        second_label: whether events also have a label ``like``: rarer than ``label``, and 0 where that is.
        context: whether events also have a ``device``, on which it depends which categories are liked.
        context_weight: standard deviation, over devices and categories, of what a device adds to the logit.
        orders: share of events that are orders; the others are clicks, and a column ``kind`` says which. 0 without kinds.
        orders_weight: what a match with all orders so far adds to the logit, if there are orders.
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
    idle_dims: int = 0
    noise: float = 0.3
    cold: float = 0.15
    lifetime_days: float = 0.0
    recent_events: int = 32
    recent_weight: float = 1.5
    distant_weight: float = 2.0
    quality_weight: float = 1.0
    user_weight: float = 0.6
    bias: float = 0.0
    prior: float = 0.5
    second_label: bool = False
    context: bool = False
    context_weight: float = 1.0
    orders: float = 0.0
    orders_weight: float = 2.0

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
        if not 0 <= self.orders < 1:
            raise DataError(f"need 0 <= orders < 1, got {self.orders}")
        if self.idle_dims < 0:
            raise DataError(f"idle_dims must be at least 0, got {self.idle_dims}")
        if not 0 <= self.lifetime_days <= DAYS:
            raise DataError(f"lifetime_days must be 0 to {DAYS}, got {self.lifetime_days}")
        if self.items < 4 * self.categories:
            raise DataError(f"need at least 4 items a category: {4 * self.categories}, got {self.items}")
        if self.prior <= 0:
            raise DataError(f"prior must be positive, got {self.prior}")
        check_at_least(self, 0, "noise", "seed")
        for name in (
            "recent_weight",
            "distant_weight",
            "quality_weight",
            "user_weight",
            "bias",
            "context_weight",
            "orders_weight",
        ):
            if not abs(getattr(self, name)) <= _MOST_LOGITS:
                raise DataError(f"{name} must lie in [-{_MOST_LOGITS}, {_MOST_LOGITS}], got {getattr(self, name)}")


@dataclass(frozen=True)
class World:
    """The items, by place (item_id - FIRST_ITEM_ID); ``release_I`` is a share of the time, before 0 for the first items."""

    latent_ID: np.ndarray
    category_I: np.ndarray
    membership_IC: np.ndarray
    quality_I: np.ndarray
    release_I: np.ndarray
    popularity_I: np.ndarray


def make_items(config: SyntheticConfig) -> World:
    rng = np.random.default_rng([config.seed, 0])
    category_I = rng.permutation(np.arange(config.items) % config.categories)
    centers_CD = rng.normal(size=(config.categories, _LATENT_DIM))
    latent_ID = centers_CD[category_I] + rng.normal(scale=0.7, size=(config.items, _LATENT_DIM))
    membership_IC = np.concatenate([_membership(latent_ID[rows], centers_CD) for rows in _blocks(config)])
    bend_ID = np.tanh(latent_ID @ rng.normal(scale=0.35, size=(_LATENT_DIM, _LATENT_DIM)))
    quality_I = bend_ID @ rng.normal(size=_LATENT_DIM)
    quality_I = (quality_I - quality_I.mean()) / quality_I.std()
    cold_I = rng.permutation(config.items) < config.cold * config.items
    release_I = np.where(cold_I, rng.uniform(0.8, 0.98, size=config.items), 0.0)
    if config.lifetime_days:
        first = -config.lifetime_days / DAYS  # as many are about at the beginning as later
        release_I = first + (1 - first) * rng.random(config.items)
    # One Zipf law over all items: rank r is seen in proportion to 1 / (r + 10).
    popularity_I = 1.0 / (rng.permutation(config.items) + 11.0)
    return World(latent_ID, category_I, membership_IC, quality_I, release_I, popularity_I)


def _blocks(config: SyntheticConfig) -> list[slice]:
    """Places of some items at a time, so that what is only in between takes little memory."""
    return [slice(first, first + _BLOCK) for first in range(0, config.items, _BLOCK)]


def _membership(latent_ND: np.ndarray, centers_CD: np.ndarray) -> np.ndarray:
    distance_NC = ((latent_ND[:, None] - centers_CD) ** 2).sum(-1)
    membership_NC = np.exp((distance_NC.min(1, keepdims=True) - distance_NC) / 6.0)
    return membership_NC / membership_NC.sum(1, keepdims=True)


def items_table(config: SyntheticConfig, world: World) -> pa.Table:
    rng = np.random.default_rng([config.seed, 1])
    half = _LATENT_DIM - _PRIVATE
    idle_IX = np.random.default_rng([config.seed, 4]).normal(size=(config.items, config.idle_dims))
    sources = {
        "text_emb": _view(rng, world.latent_ID[:, :half], idle_IX, config.text_dim, config),
        "image_emb": _view(rng, world.latent_ID[:, -half:], idle_IX, config.image_dim, config),
    }
    tag_DT = rng.normal(size=(_LATENT_DIM, _NUM_TAGS))
    names = pa.array([f"category{c:02d}" for c in range(config.categories)])
    return pa.table(
        {
            "item_id": pa.array(np.arange(config.items) + FIRST_ITEM_ID, pa.int64()),
            "category": names.take(pa.array(world.category_I)),
            "tags": pa.chunked_array([_tags(world.latent_ID[rows] @ tag_DT) for rows in _blocks(config)]),
            **sources,
        }
    )


def _tags(score_NT: np.ndarray) -> pa.Array:
    has_NT = score_NT / _LATENT_DIM**0.5 > 1.5
    names = pa.array([f"tag{t:02d}" for t in range(_NUM_TAGS)])
    return pa.ListArray.from_arrays(
        pa.array(np.r_[0, np.cumsum(has_NT.sum(1))], pa.int32()), names.take(pa.array(np.nonzero(has_NT)[1]))
    )


def _view(
    rng: np.random.Generator, latent_ID: np.ndarray, idle_IX: np.ndarray, dim: int, config: SyntheticConfig
) -> pa.ChunkedArray:
    """A nonlinear, noisy, unit-length view of part of the latent vector, and of what is idle; null where missing."""
    width = latent_ID.shape[1] + idle_IX.shape[1]
    in_DH = rng.normal(scale=width**-0.5, size=(width, 64))
    out_HD = rng.normal(scale=1 / 8, size=(64, dim))
    x_ID = np.empty((config.items, dim), np.float16)
    for rows in _blocks(config):
        x_ND = np.tanh(np.c_[latent_ID[rows], idle_IX[rows]] @ in_DH) @ out_HD * 2
        x_ND += rng.normal(scale=config.noise, size=x_ND.shape)
        x_ID[rows] = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    present_I = np.greater_equal(rng.random(config.items), config.missing)
    return pa.chunked_array([vector_lists(x_ID[rows], present_I[rows]) for rows in _blocks(config)])
