"""From a request's JSON to the arrays that a ``Scorer`` takes; and of many requests to those of one call."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sidrec_torchrec.codec.packing import NO_SID
from sidrec_torchrec.data.features import Feature, Features
from sidrec_torchrec.data.sid_index import SIDLookup
from sidrec_torchrec.data.tasks import UNKNOWN, action_of
from sidrec_torchrec.errors import CodecMismatchError
from sidrec_torchrec.server.limits import Limits, Refused
from sidrec_torchrec.server.schema import History, Items, parse, place


@dataclass(frozen=True)
class Asked:
    """One request of N events and M candidates; all int64.

    Args:
        history_NW, action_N, time_N, feature_NF: of its events.
        candidate_MW, known_MF: of its candidates.
        request_time, num_events, user_F: of itself.
    """

    history_NW: np.ndarray
    action_N: np.ndarray
    time_N: np.ndarray
    feature_NF: np.ndarray
    candidate_MW: np.ndarray
    known_MF: np.ndarray
    request_time: np.ndarray
    num_events: np.ndarray
    user_F: np.ndarray

    @property
    def num_events_sent(self) -> int:
        """N."""
        return len(self.action_N)

    @property
    def num_candidates(self) -> int:
        """M."""
        return len(self.candidate_MW)


def together(asked: Sequence[Asked], names: Iterable[str]) -> dict[str, Tensor]:
    """A scorer's inputs for requests that are scored in one call.

    Args:
        asked: B requests.
        names: of the inputs, as a package's metadata has them.
    """
    joined = {
        field.name: np.concatenate([getattr(one, field.name) for one in asked])
        for field in fields(Asked)
        if field.name not in ("request_time", "num_events", "user_F")
    }
    lengths = np.array([one.num_events_sent for one in asked])
    joined["offsets_B1"] = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    joined["request_M"] = np.repeat(np.arange(len(asked)), [one.num_candidates for one in asked])
    joined["request_time_B"] = np.stack([one.request_time for one in asked])
    joined["num_events_B"] = np.stack([one.num_events for one in asked])
    joined["user_BF"] = np.stack([one.user_F for one in asked])
    return {name: torch.from_numpy(joined[name]) for name in names}


def open_lookups(folders: Sequence[Path], sids: Sequence[Mapping[str, Any]]) -> list[SIDLookup]:
    """The index of each of a package's SIDs, in its order.

    Args:
        folders: of SIDs, in any order; none, or one for each.
        sids: as a package's metadata has them.

    Raises:
        CodecMismatchError: on SIDs of a codec that the package does not read, or a missing folder.
        DataError: as ``SIDLookup.open``.
    """
    found = {}
    wanted = ", ".join(f"'{sid['name']}' of codec {sid['fingerprint']}" for sid in sids)
    for folder in folders:
        lookup = SIDLookup.open(folder)
        if lookup.spec.fingerprint not in {sid["fingerprint"] for sid in sids}:
            raise CodecMismatchError(
                f"{folder}: SIDs of codec {lookup.spec.fingerprint}, but the package reads {wanted}"
            )
        found[lookup.spec.fingerprint] = lookup
    if folders and len(found) < len({sid["fingerprint"] for sid in sids}):
        raise CodecMismatchError(f"the package reads {wanted}: name with --sids a folder of each")
    return [found[sid["fingerprint"]] for sid in sids] if folders else []


class RequestReader:
    """Reads requests for one package. Threads may share it.

    Args:
        metadata: of the package; see ``Scorer``.
        lookups: the index of each of its SIDs, in its order; empty, if requests bring words.
        limits: of one request.
    """

    def __init__(self, metadata: Mapping[str, Any], lookups: Sequence[SIDLookup], limits: Limits) -> None:
        self.limits = limits
        self._fingerprints = {sid["name"]: sid["fingerprint"] for sid in metadata["sids"]}
        self._lookups = lookups
        self._last_word_W = np.array(metadata["last_words"], np.int64)
        self._tasks: list[str] = metadata["tasks"]
        features = Features.from_json(metadata.get("features", {}))
        coders = [_Coder(feature) for feature in features.all]
        self._of_events = dict(zip(features.sizes, coders, strict=True))
        self._of_candidates = dict(zip([*features.sizes][: len(features.known)], coders, strict=False))
        users = metadata["user_features"]
        self._of_users = {name: _Coder(Feature.of_codes(name, kept)) for name, kept in users.items()}

    def __call__(self, body: bytes) -> Asked:
        """Reads one request.

        Raises:
            Refused: 422 on what cannot be read, naming the field; 409 on SIDs of another codec.
        """
        request = parse(body)
        self._check_fingerprints(request.fingerprints)
        history = request.history or History()
        N, M = self._count("history", history, self.limits.events), self._count("candidates", request.candidates)
        time_N = np.array(history.time, np.int64)
        self._check_times(time_N, request.time, N)
        num_events = N if request.num_events is None else request.num_events
        if num_events < N:
            raise Refused(422, f"num_events: is {num_events}, but {N} events are sent")
        return Asked(
            history_NW=self._words("history", history, N, may_be_missing=True),
            action_N=self._actions(history.labels, N),
            time_N=time_N,
            feature_NF=_features("history.features", history.features if N else None, self._of_events, N),
            candidate_MW=self._words("candidates", request.candidates, M, may_be_missing=False),
            known_MF=_features("candidates.features", request.candidates.features, self._of_candidates, M),
            request_time=np.array(request.time, np.int64),
            num_events=np.array(num_events, np.int64),
            user_F=self._user(request.user),
        )

    def _check_fingerprints(self, given: Mapping[str, str]) -> None:
        for name, fingerprint in given.items():
            expected = self._fingerprints.get(name)
            if expected is None:
                known = ", ".join(self._fingerprints)
                raise Refused(422, f"{place('fingerprints', name)}: the ranker reads no such SID, but {known}")
            if fingerprint != expected:
                raise Refused(
                    409,
                    f"{place('fingerprints', name)}: these are SIDs of codec {fingerprint}, the ranker reads those of {expected}",
                )

    def _count(self, where: str, items: Items, most: int | None = None) -> int:
        """How many items there are, which are given in one way."""
        most = most or self.limits.candidates
        if items.words is not None and items.items is not None:
            raise Refused(422, f"{where}: has both words and items; send one of them")
        given = items.words if items.words is not None else items.items
        if given is None and not isinstance(items, History):
            raise Refused(422, f"{where}: has neither words nor items; send one of them")
        count = len(given or ())
        if count > most:
            raise Refused(422, f"{where}: has {count:,} items, at most {most:,} are taken")
        return count

    def _check_times(self, time_N: np.ndarray, now: int, N: int) -> None:
        _check_length("history.time", len(time_N), N)
        back = np.flatnonzero(np.diff(time_N) < 0)
        if len(back):
            raise Refused(422, f"history.time[{back[0] + 1}]: is before the event before it; send the oldest first")
        if N and time_N[-1] > now:
            raise Refused(422, f"history.time[{N - 1}]: is {time_N[-1]}, after the request's time, {now}")

    def _words(self, where: str, items: Items, N: int, *, may_be_missing: bool) -> np.ndarray:
        """int64 [N, W]."""
        W = len(self._last_word_W)
        if items.words is None:
            return self._found(where, items.items or [], may_be_missing=may_be_missing)
        for n, words in enumerate(items.words):
            if len(words) != W:
                raise Refused(422, f"{where}.words[{n}]: has {len(words)} words, a SID of this ranker has {W}")
        words_NW = np.array(items.words, np.int64).reshape(N, W)
        is_missing_N1 = (words_NW == NO_SID).all(1, keepdims=True) & may_be_missing
        wrong_NW = ((words_NW < 0) | (words_NW > self._last_word_W)) & ~is_missing_N1
        if wrong_NW.any():
            n, w = map(int, np.argwhere(wrong_NW)[0])
            raise Refused(422, f"{where}.words[{n}][{w}]: is {words_NW[n, w]}, expected 0 to {self._last_word_W[w]}")
        return words_NW

    def _found(self, where: str, ids: list[Any], *, may_be_missing: bool) -> np.ndarray:
        """The words of items, int64 [N, W]."""
        if not ids:
            return np.zeros((0, len(self._last_word_W)), np.int64)
        if not self._lookups:
            raise Refused(422, f"{where}.items: this server knows no items: send words, or start it with --sids")
        found_N, words = np.ones(len(ids), bool), []
        for lookup in self._lookups:
            words_NW, known_N = lookup.lookup(_ids(where, ids, lookup.id_type))
            words.append(words_NW)
            found_N &= known_N
        if not may_be_missing and not found_N.all():
            n = int(np.argmin(found_N))
            raise Refused(422, f"{where}.items[{n}]: item {_shown(ids[n])} has no SID here; leave it out")
        return np.where(found_N[:, None], np.concatenate(words, axis=1), NO_SID)

    def _actions(self, labels: Mapping[str, list[int | None]], N: int) -> np.ndarray:
        """int64 [N]."""
        if not N and not labels:
            return np.zeros(0, np.int64)
        _check_names("history.labels", labels, self._tasks)
        columns = []
        for task in self._tasks:
            where = place("history", "labels", task)
            _check_length(where, len(labels[task]), N)
            if len(self._tasks) == 1 and None in labels[task]:
                raise Refused(
                    422, f"{where}[{labels[task].index(None)}]: is null, the label of a single task is 0 or 1"
                )
            columns.append([UNKNOWN if label is None else label for label in labels[task]])
        return action_of(np.array(columns, np.int8).T).astype(np.int64)

    def _user(self, given: Mapping[str, Any]) -> np.ndarray:
        """int64 [F]; 0 for what is missing."""
        unknown = next((name for name in given if name not in self._of_users), None)
        if unknown is not None:
            known = ", ".join(self._of_users) or "none"
            raise Refused(422, f"{place('user', unknown)}: the ranker has no such user feature; it has {known}")
        codes = [coder([given.get(name)], place("user", name))[0] for name, coder in self._of_users.items()]
        return np.array(codes, np.int64)


class _Coder:
    """Codes of a feature's JSON values."""

    def __init__(self, feature: Feature) -> None:
        self._feature = feature
        self._codes = {value: code for code, value in enumerate(feature.values, start=1)}
        self._is_text = any(isinstance(value, str) for value in feature.values)

    def __call__(self, values: Sequence[Any], where: str) -> np.ndarray:
        """int64 [N]; 0 for null and for a value that training did not have.

        Raises:
            Refused: 422 on a value of another type.
        """
        if self._feature.bounds is not None:
            self._check(values, where, (int, float), "a number")
            numbers = np.array([math.nan if value is None else float(value) for value in values])
            return self._feature.bucket(numbers).astype(np.int64)
        self._check(values, where, str if self._is_text else int, "text" if self._is_text else "an integer")
        return np.array([self._codes.get(_signed(value), 0) for value in values], np.int64)

    def _check(self, values: Sequence[Any], where: str, kind: type | tuple[type, ...], said: str) -> None:
        for n, value in enumerate(values):
            is_fit = isinstance(value, kind) and not (isinstance(value, bool) and self._feature.bounds is not None)
            if value is not None and not (is_fit and _is_finite(value)):
                at = f"{where}[{n}]" if len(values) > 1 else where
                raise Refused(422, f"{at}: is {_shown(value)}, expected {said} or null")


def _signed(value: Any) -> Any:
    """An unsigned number as training reads it, by its 64 bits."""
    return value - (1 << 64) if isinstance(value, int) and 1 << 63 <= value < 1 << 64 else value


def _features(where: str, given: Mapping[str, list] | None, coders: Mapping[str, _Coder], N: int) -> np.ndarray:
    """int64 [N, F]; ``given`` is None where nothing has to be."""
    if given is None or not coders and not given:
        return np.zeros((N, len(coders)), np.int64)
    _check_names(where, given, coders)
    for name in coders:
        _check_length(f"{where}.{name}", len(given[name]), N)
    return np.stack([coder(given[name], f"{where}.{name}") for name, coder in coders.items()], axis=1)


def _ids(where: str, ids: list[Any], kind: pa.DataType) -> pa.Array:
    """Ids as the index has them."""
    wanted, said = (int, "an integer") if pa.types.is_integer(kind) else (str, "text")
    for n, value in enumerate(ids):
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise Refused(422, f"{where}.items[{n}]: is {_shown(value)}, the items' ids are {said}")
    if wanted is int:
        low, high = (0, 1 << 64) if kind == pa.uint64() else (-(1 << 63), 1 << 63)
        ids = [None if value is None or not low <= value < high else value for value in ids]  # nobody has such an id
        return pa.array(ids, kind)
    return pa.array(
        [None if value is None else value.encode(errors="surrogatepass") for value in ids], pa.large_binary()
    )


def _check_names(where: str, given: Mapping[str, Any], expected: Iterable[str]) -> None:
    expected = list(expected)
    for name in expected:
        if name not in given:
            raise Refused(422, f"{where}.{name}: is missing")
    for name in given:
        if name not in expected:
            raise Refused(422, f"{where}.{name}: the ranker has no such one; it has {', '.join(expected) or 'none'}")


def _check_length(where: str, length: int, N: int) -> None:
    if length != N:
        raise Refused(422, f"{where}: has {length:,} values for {N:,} items")


def _is_finite(value: Any) -> bool:
    """Whether it is text, or a number that fits a float."""
    try:
        return isinstance(value, str) or math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
