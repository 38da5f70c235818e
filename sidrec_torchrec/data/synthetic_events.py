"""The users of the synthetic corpus: what they meet and when, and how they take it (see ``synthetic.py``)."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.synthetic_items import DAYS, FIRST_ITEM_ID, SyntheticConfig, World

FIRST_USER_ID = 1

EPOCH = 1_700_000_000
SPAN = DAYS * 86_400
_SEGMENTS = 4
_REGIONS = 8
DEVICES = ("phone", "tablet", "tv", "web")
KINDS = ("click", "order")
_LABEL_DRAW = 8  # which of an event's draws decides its labels
_LIKE_LOGIT = -2.0  # what is added for the label ``like``

USERS_SCHEMA = pa.schema([("user_id", pa.int64()), ("segment", pa.string()), ("region", pa.string())])


def events_schema(config: SyntheticConfig) -> pa.Schema:
    names = ["label", "like"] if config.second_label else ["label"]
    ids = ("user_id", "item_id", "timestamp")
    columns = [*((name, pa.int64()) for name in ids), *((name, pa.int8()) for name in names)]
    columns += [("device", pa.string())] if config.context else []
    return pa.schema(columns + ([("kind", pa.string())] if config.orders else []))


def history_lengths(config: SyntheticConfig) -> np.ndarray:
    rng = np.random.default_rng([config.seed, 2])
    lengths_U = config.median_events * np.exp(rng.normal(size=config.users))
    return np.clip(lengths_U, config.min_events, config.max_events).astype(np.int64)


@dataclass(frozen=True)
class Block:
    events: pa.Table
    users: pa.Table
    starts_U: np.ndarray
    labels_N: np.ndarray
    probability_N: np.ndarray


@dataclass(frozen=True)
class Draws:
    """All that is random about some users, from one generator per user, so that it does not depend on the block.

    Users [U]; events of all users, one after another [N].
    """

    taste_UC: np.ndarray
    bias_U: np.ndarray
    context_U4: np.ndarray
    span_U2: np.ndarray
    uniform_NK: np.ndarray
    device_N: np.ndarray
    order_N: np.ndarray


def draw(config: SyntheticConfig, users_U: np.ndarray, lengths_U: np.ndarray) -> Draws:
    starts_U = np.cumsum(lengths_U) - lengths_U
    taste_UC = np.empty((len(users_U), config.categories))
    normal_U = np.empty(len(users_U))
    context_U4 = np.empty((len(users_U), 4))
    span_U2 = np.empty((len(users_U), 2))
    uniform_NK = np.empty((lengths_U.sum(), 9))
    device_N, order_N = np.zeros(lengths_U.sum(), np.int64), np.zeros(lengths_U.sum(), bool)
    for u, (user, start, length) in enumerate(zip(users_U, starts_U, lengths_U, strict=True)):
        rng = np.random.default_rng([config.seed, 3, user])
        taste_UC[u] = rng.normal(size=config.categories)
        normal_U[u] = rng.normal()
        context_U4[u] = rng.random(4)
        span_U2[u] = rng.random(2)
        uniform_NK[start : start + length] = rng.random((length, 9))
        # drawn last, so that all else is what it is without
        if config.context:
            device_N[start : start + length] = rng.integers(len(DEVICES), size=length)
        if config.orders:
            order_N[start : start + length] = rng.random(length) < config.orders
    return Draws(taste_UC, normal_U * config.user_weight, context_U4, span_U2, uniform_NK, device_N, order_N)


def make_events(config: SyntheticConfig, world: World, users_U: np.ndarray, lengths_U: np.ndarray) -> Block:
    draws = draw(config, users_U, lengths_U)
    starts_U = np.cumsum(lengths_U) - lengths_U
    user_N = np.repeat(np.arange(len(users_U)), lengths_U)
    time_N, session_N = _times(draws, user_N, starts_U, lengths_U)
    focus_N = _interests(draws, user_N, starts_U, session_N)
    item_N = _choose_items(config, world, draws, user_N, time_N, focus_N)
    labels_N, probability_N = _label(config, world, draws, starts_U, lengths_U, item_N, focus_N)
    columns = [users_U[user_N] + FIRST_USER_ID, item_N + FIRST_ITEM_ID, time_N + EPOCH, labels_N]
    if config.second_label:  # the same draw at a lower probability
        odds_N = probability_N / (1 - probability_N) * np.exp(_LIKE_LOGIT)
        columns.append((draws.uniform_NK[:, _LABEL_DRAW] < odds_N / (1 + odds_N)).astype(np.int8))
    if config.context:
        columns.append(pa.array(DEVICES).take(pa.array(draws.device_N)))
    if config.orders:
        columns.append(pa.array(KINDS).take(pa.array(draws.order_N.astype(np.int64))))
    events = pa.table(columns, schema=events_schema(config))
    return Block(events, _users_table(draws, users_U), starts_U, labels_N, probability_N)


def _users_table(draws: Draws, users_U: np.ndarray) -> pa.Table:
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
    return pa.table(columns, schema=USERS_SCHEMA)


def _times(
    draws: Draws, user_N: np.ndarray, starts_U: np.ndarray, lengths_U: np.ndarray
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
    first_U = draws.span_U2[:, 0] * 0.5 * SPAN
    last_U = (0.9 + 0.1 * draws.span_U2[:, 1]) * SPAN
    room_U = np.maximum(last_U - first_U - np.add.reduceat(within_N, starts_U), 0.0)
    stretch_U = room_U / np.maximum(np.add.reduceat(between_N, starts_U), 1.0)
    gap_N = (within_N + between_N * stretch_U[user_N]).astype(np.int64)
    total_N = np.cumsum(gap_N)
    offset_U = first_U.astype(np.int64) - total_N[starts_U] + gap_N[starts_U]
    return total_N + offset_U[user_N], session_N


def _interests(draws: Draws, user_N: np.ndarray, starts_U: np.ndarray, session_N: np.ndarray) -> np.ndarray:
    """The category each event's user is into, int64 [N]: a phase that lasts five sessions on average."""
    opens_N = session_N & (draws.uniform_NK[:, 2] < 1 / 5)
    opens_N[starts_U] = True
    opening_N = np.maximum.accumulate(np.where(opens_N, np.arange(len(user_N)), 0))
    # Phases are drawn evenly: what a user likes now says little about what he likes always.
    return (draws.uniform_NK[opening_N, 3] * draws.taste_UC.shape[1]).astype(np.int64)


def _choose_items(
    config: SyntheticConfig, world: World, draws: Draws, user_N: np.ndarray, time_N: np.ndarray, focus_N: np.ndarray
) -> np.ndarray:
    """The item of each event: half of them of the present interest, the others by taste; popular ones first."""
    appeal_UC = np.exp(draws.taste_UC)
    cumulative_UC = np.cumsum(appeal_UC / appeal_UC.sum(1, keepdims=True), axis=1)
    by_taste_N = (draws.uniform_NK[:, 4, None] > cumulative_UC[user_N, :-1]).sum(1)
    category_N = np.where(draws.uniform_NK[:, 5] < 0.5, focus_N, by_taste_N)
    if config.lifetime_days:
        lifetime = config.lifetime_days / DAYS
        return _sample_alive(world, category_N, time_N / SPAN, lifetime, draws.uniform_NK[:, 6])
    item_N = _sample(world, category_N, draws.uniform_NK[:, 6], world.popularity_I)
    # An item that is not out yet is replaced by one that always was.
    lasting_N = _sample(world, category_N, draws.uniform_NK[:, 7], world.popularity_I * (world.release_I == 0))
    return np.where(world.release_I[item_N] * SPAN <= time_N, item_N, lasting_N)


def _sample(world: World, category_N: np.ndarray, uniform_N: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
    """An item of each category, in proportion to the weights."""
    order = np.argsort(world.category_I, kind="stable")
    cumulative_I = np.cumsum(weight_I[order])
    ends_C = np.cumsum(np.bincount(world.category_I)) - 1
    high_C = cumulative_I[ends_C]
    low_C = np.r_[0.0, high_C[:-1]]
    aim_N = low_C[category_N] + uniform_N * (high_C - low_C)[category_N]
    return order[np.searchsorted(cumulative_I, aim_N, side="right")]


def _sample_alive(
    world: World, category_N: np.ndarray, share_N: np.ndarray, lifetime: float, uniform_N: np.ndarray
) -> np.ndarray:
    """An item of each category that came out at most ``lifetime`` before, in proportion to popularity.

    Where there is none, the category's last one before, or its first.
    """
    # by category and, within it, release: the items alive are neighbours
    order = np.lexsort((world.release_I, world.category_I))
    room = 2.0 + lifetime  # more than releases are apart
    key_I = world.category_I[order] * room + world.release_I[order]
    cumulative_I1 = np.r_[0.0, np.cumsum(world.popularity_I[order])]
    now_N = category_N * room + share_N
    first_N, end_N = (np.searchsorted(key_I, key_N, side="right") for key_N in (now_N - lifetime, now_N))
    low_N, high_N = cumulative_I1[first_N], cumulative_I1[end_N]
    place_N = np.searchsorted(cumulative_I1, low_N + uniform_N * (high_N - low_N), side="right") - 1
    size_C = np.bincount(world.category_I)
    begin_C = np.cumsum(size_C) - size_C
    place_N = np.where(first_N < end_N, np.clip(place_N, first_N, end_N - 1), end_N - 1)
    return order[np.clip(place_N, begin_C[category_N], (begin_C + size_C - 1)[category_N])]


def _label(
    config: SyntheticConfig,
    world: World,
    draws: Draws,
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
    context_N = _context(config, world, draws, item_N)
    recent = _Pool(len(starts_U), config)
    distant = _Pool(len(starts_U), config)
    orders = _Pool(len(starts_U), config)

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
            + context_N[event_A]
        )
        if config.orders:
            logit_A += config.orders_weight * orders.match(phi_AC, taste_A)
        probability_N[event_A] = 1 / (1 + np.exp(-logit_A))
        labels_N[event_A] = draws.uniform_NK[event_A, _LABEL_DRAW] < probability_N[event_A]

        if config.orders:
            orders.add(phi_AC, labels_N[event_A], weight=draws.order_N[event_A])
        recent.add(phi_AC, labels_N[event_A])
        if step >= config.recent_events:
            old_A = event_A - config.recent_events
            recent.add(world.membership_IC[item_N[old_A]], labels_N[old_A], weight=-1.0)
        if step % 2:  # before the next step, events 0 .. (step + 1) / 2 - 1 are the older half
            old_A = starts_U[:active] + step // 2
            distant.add(world.membership_IC[item_N[old_A]], labels_N[old_A])
    return labels_N, probability_N


def _context(config: SyntheticConfig, world: World, draws: Draws, item_N: np.ndarray) -> np.ndarray:
    """What the device adds to each event's logit: each has categories that are liked more on it, and less."""
    if not config.context:
        return np.zeros(len(item_N))
    appeal_DC = np.random.default_rng([config.seed, 4]).normal(size=(len(DEVICES), config.categories))
    return config.context_weight * (world.membership_IC[item_N] * appeal_DC[draws.device_N]).sum(1)


class _Pool:
    """Events of many users, as sums that answer ``match`` without reading them again."""

    def __init__(self, num_users: int, config: SyntheticConfig) -> None:
        self._signed_UC = np.zeros((num_users, config.categories))
        self._count_UC = np.zeros((num_users, config.categories))
        self._prior = config.prior

    def add(self, phi_AC: np.ndarray, labels_A: np.ndarray, weight: float | np.ndarray = 1.0) -> None:
        """Adds an event of each of the first users, at a weight, or one of each."""
        active, weight_A1 = len(phi_AC), np.reshape(weight, (-1, 1))
        self._signed_UC[:active] += weight_A1 * phi_AC * (2.0 * labels_A - 1.0)[:, None]
        self._count_UC[:active] += weight_A1 * phi_AC

    def match(self, phi_AC: np.ndarray, prior_A: np.ndarray) -> np.ndarray:
        active = len(phi_AC)
        signed_AC, count_AC = self._signed_UC[:active], self._count_UC[:active]
        like_A = self._prior * prior_A + (phi_AC * signed_AC).sum(1)
        like_A /= self._prior + (phi_AC * count_AC).sum(1)
        # A row of phi sums to 1, so that of the counts to the number of events; an empty pool has mean 0.
        return like_A - signed_AC.sum(1) / np.maximum(count_AC.sum(1), 1.0)
