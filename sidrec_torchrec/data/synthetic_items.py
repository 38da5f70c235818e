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
    distance_IC = ((latent_ID[:, None] - centers_CD) ** 2).sum(-1)
    membership_IC = np.exp((distance_IC.min(1, keepdims=True) - distance_IC) / 6.0)
    membership_IC /= membership_IC.sum(1, keepdims=True)
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


def items_table(config: SyntheticConfig, world: World) -> pa.Table:
    rng = np.random.default_rng([config.seed, 1])
    half = _LATENT_DIM - _PRIVATE
    idle_IX = np.random.default_rng([config.seed, 4]).normal(size=(config.items, config.idle_dims))
    sources = {
        "text_emb": _view(rng, np.c_[world.latent_ID[:, :half], idle_IX], config.text_dim, config),
        "image_emb": _view(rng, np.c_[world.latent_ID[:, -half:], idle_IX], config.image_dim, config),
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
    return vector_lists(x_ID.astype(np.float16), np.greater_equal(rng.random(num_items), config.missing))
