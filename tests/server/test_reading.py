"""Requests in JSON: what they become, and what is said of those that are wrong."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from sidrec_torchrec.data.sid_index import SIDLookup, write_index
from sidrec_torchrec.errors import CodecMismatchError, DataError
from sidrec_torchrec.server.limits import Limits, Refused
from sidrec_torchrec.server.reading import RequestReader, open_lookups, together
from tests.conftest import ROOT
from tests.data.test_sid_index import publish, words_of

METADATA = {
    "sids": [{"name": "item", "fingerprint": "abc"}],
    "last_words": [80, 8],
    "tasks": ["click", "like"],
    "user_features": {"age": ["18", "25"], "income": {"bounds": [10.0, 20.0]}},
    "features": {
        "event": [{"name": "device", "values": ["tv", "web"]}],
        "history": [{"name": "dwell", "bounds": [1.5]}, {"name": "hash", "values": [-2, 7]}],
    },
}
REQUEST = {
    "time": 50,
    "num_events": 9,
    "history": {
        "words": [[1, 2], [-1, -1], [80, 8]],
        "labels": {"click": [1, 0, None], "like": [None, 1, 0]},
        "time": [10, 20, 20],
        "features": {"device": ["web", "radio", None], "dwell": [1, 1.5, None], "hash": [7, 2**64 - 2, 8]},
    },
    "candidates": {"words": [[5, 6], [7, 8]], "features": {"device": ["tv", None]}},
    "user": {"income": 15},
    "fingerprints": {"item": "abc"},
}
LIMITS = Limits(events=4, candidates=3)
read = RequestReader(METADATA, [], LIMITS)


def changed(path: str, value: object) -> bytes:
    """The request with another value at a path; ``...`` takes the field away."""
    request = json.loads(json.dumps(REQUEST))
    *parents, last = path.split("/")
    part = request
    for name in parents:
        part = part[int(name) if isinstance(part, list) else name]
    if value is ...:
        del part[last]
    else:
        part[int(last) if isinstance(part, list) else last] = value
    return json.dumps(request).encode()


def test_a_request_becomes_the_scorer_s_arrays():
    asked = read(json.dumps(REQUEST).encode())
    assert asked.history_NW.tolist() == REQUEST["history"]["words"]
    assert asked.action_N.tolist() == [1 + 3 * 2, 0 + 3 * 1, 2 + 3 * 0]
    assert asked.feature_NF.tolist() == [[2, 1, 2], [0, 2, 1], [0, 0, 0]]
    assert asked.known_MF.tolist() == [[1], [0]]
    assert asked.user_F.tolist() == [0, 2]
    assert (int(asked.num_events), int(asked.request_time)) == (9, 50)


def test_the_documentation_s_request_is_one():
    page = (ROOT / "docs" / "serving.md").read_text()
    (body,) = re.findall(r"/score -d '(.*?)'", page, re.DOTALL)
    metadata = {"sids": METADATA["sids"], "last_words": [99], "tasks": ["label"], "user_features": {}}
    asked = RequestReader(metadata, [], LIMITS)(body.encode())
    assert asked.history_NW.tolist() == [[17], [4], [-1]] and asked.candidate_MW.tolist() == [[5], [6]]


def test_requests_become_one_call():
    first, last = (
        read(json.dumps(REQUEST).encode()),
        read(b'{"time": 7, "candidates": {"words": [[1, 1]], "features": {"device": ["tv"]}}}'),
    )
    names = ("offsets_B1", "request_M", "request_time_B", "num_events_B", "user_BF", "candidate_MW", "action_N")
    inputs = together([last, first, last], names)
    assert {name: value.tolist() for name, value in inputs.items()} == {
        "offsets_B1": [0, 0, 3, 3],
        "request_M": [0, 1, 1, 2],
        "request_time_B": [7, 50, 7],
        "num_events_B": [0, 9, 0],
        "user_BF": [[0, 0], [0, 2], [0, 0]],
        "candidate_MW": [[1, 1], [5, 6], [7, 8], [1, 1]],
        "action_N": [7, 3, 2],
    }
    assert all(value.dtype.is_signed and value.element_size() == 8 for value in inputs.values())


WRONG = [
    ("time", "50", "time: input should be a valid integer"),
    ("time", 2**53 + 1, "time: input should be less than or equal to 9007199254740992"),
    ("time", ..., "time: is missing"),
    ("times", 3, "times: there is no such field"),
    ("time", 15, "history.time[2]: is 20, after the request's time, 15"),
    ("num_events", 2, "num_events: is 2, but 3 events are sent"),
    ("num_events", True, "num_events: input should be a valid integer"),
    ("history/time/1", 5, "history.time[1]: is before the event before it; send the oldest first"),
    ("history/time", [1], "history.time: has 1 values for 3 items"),
    ("history/time/0", -1, "history.time[0]: input should be greater than or equal to 0"),
    ("history/words/1", [1], "history.words[1]: has 1 words, a SID of this ranker has 2"),
    ("history/words/1/0", 81, "history.words[1][0]: is 81, expected 0 to 80"),
    ("history/words/2/1", -1, "history.words[2][1]: is -1, expected 0 to 8"),
    ("history/words/2/1", 2**63, "history.words[2][1]: input should be less than 9223372036854775808"),
    ("history/words/2/1", 1.5, "history.words[2][1]: input should be a valid integer"),
    ("history/words", [[1, 1]] * 5, "history: has 5 items, at most 4 are taken"),
    ("history/items", [1], "history: has both words and items; send one of them"),
    ("history/labels/click/1", 2, "history.labels.click[1]: input should be less than or equal to 1"),
    ("history/labels/like", ..., "history.labels.like: is missing"),
    ("history/labels/buy", [1, 1, 1], "history.labels.buy: the ranker has no such one; it has click, like"),
    ("history/features/dwell", ..., "history.features.dwell: is missing"),
    ("history/features/dwell/0", "1", "history.features.dwell[0]: is '1', expected a number or null"),
    ("history/features/device/2", 3, "history.features.device[2]: is 3, expected text or null"),
    ("history/features/hash/2", 3.0, "history.features.hash[2]: is 3.0, expected an integer or null"),
    ("history/features/hash/2", 10**4000, "history.features.hash[2]: is a number of more than 64 bits, expected"),
    ("candidates/words", [[1, 1]] * 4, "candidates: has 4 items, at most 3 are taken"),
    ("candidates/words/1", [-1, -1], "candidates.words[1][0]: is -1, expected 0 to 80"),
    ("candidates/words", ..., "candidates: has neither words nor items; send one of them"),
    (
        "candidates",
        {"items": [3, 4]},
        "candidates.items: this server knows no items: send words, or start it with --sids",
    ),
    ("candidates/features/dwell", [1, 1], "candidates.features.dwell: the ranker has no such one; it has device"),
    ("user/income", True, "user.income: is True, expected a number or null"),
    ("user/height", 3, "user.height: the ranker has no such user feature; it has age, income"),
    ("fingerprints/words", "abc", "fingerprints.words: the ranker reads no such SID, but item"),
]


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=[f"{path}-{words[-12:]}" for path, _, words in WRONG])
def test_what_is_wrong_is_named(path, value, words):
    with pytest.raises(Refused) as refused:
        read(changed(path, value))
    assert refused.value.status == 422 and str(refused.value).startswith(words)


NINES = b'{"time": 1, "candidates": {"words": []}, "user": {"age": ' + b"9" * 5000 + b"}}"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"\xff", b'{"time": NaN}', b"[" * 100_000, b'{"time": 1e999}', NINES]
)
def test_what_is_no_request_is_refused(body):
    with pytest.raises(Refused) as refused:
        read(body)
    assert refused.value.status == 422 and "\n" not in str(refused.value)


def test_sids_of_another_codec_are_a_conflict():
    with pytest.raises(
        Refused, match="fingerprints.item: these are SIDs of codec xyz, the ranker reads those of abc"
    ) as refused:
        read(changed("fingerprints/item", "xyz"))
    assert refused.value.status == 409


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
PATHS = ["time", "num_events", "user", "user/age", "user/income", "fingerprints", "candidates", "candidates/words/0"]
PATHS += ["candidates/items", "history", "history/words", "history/words/1", "history/labels", "history/labels/click/1"]
PATHS += ["history/time", "history/time/1", "history/features", "history/features/dwell/1", "history/features/hash"]


@given(path=st.sampled_from(PATHS), value=ANYTHING)
@settings(max_examples=200, deadline=None)
def test_whatever_comes_is_read_or_refused_in_a_sentence(path, value):
    try:
        asked = read(changed(path, value))
    except Refused as refused:
        assert refused.status in (422, 409) and "\n" not in str(refused)
    else:
        assert all(getattr(asked, name).dtype == np.int64 for name in type(asked).__dataclass_fields__)


@pytest.fixture
def two_folders(tmp_path):
    """Of text ids, and SIDs of two codecs; item "c" is in the second alone."""
    for name, ids, numbers in (("f" * 16, ["a", "b"], [4, 5]), ("e" * 16, ["c", "b", "a"], [1, 2, 3])):
        folder = tmp_path / name
        folder.mkdir()
        publish(folder, (pa.array(ids, pa.large_string()), words_of(numbers)), fingerprint=name)
        write_index(folder)
    return tmp_path / ("f" * 16), tmp_path / ("e" * 16)


def test_items_are_looked_up_in_every_folder(two_folders):
    sids = [{"name": "x", "fingerprint": "e" * 16}, {"name": "y", "fingerprint": "f" * 16}]
    reader = RequestReader(METADATA | {"sids": sids, "last_words": [80, 80]}, open_lookups(two_folders, sids), LIMITS)

    def words(history: list, candidates: list) -> tuple[list, list]:
        request = json.loads(
            changed("candidates", {"items": candidates, "features": {"device": [None] * len(candidates)}})
        )
        del request["fingerprints"], request["history"]["words"]
        asked = reader(json.dumps(request | {"history": request["history"] | {"items": history}}).encode())
        return asked.history_NW.tolist(), asked.candidate_MW.tolist()

    assert words(["a", "c", None], ["b"]) == ([[3, 4], [-1, -1], [-1, -1]], [[2, 5]])
    with pytest.raises(Refused, match=r"candidates.items\[1\]: item 'c' has no SID here"):
        words(["a", "b", "b"], ["a", "c"])
    with pytest.raises(Refused, match=r"history.items\[0\]: is 17, the items' ids are text"):
        words([17, "b", "b"], ["a"])


def test_folders_of_other_codecs_are_refused(two_folders, tmp_path):
    one = [{"name": "x", "fingerprint": "e" * 16}]
    assert isinstance(open_lookups(two_folders[1:], one)[0], SIDLookup)
    with pytest.raises(
        CodecMismatchError, match=f"SIDs of codec {'f' * 16}, but the package reads 'x' of codec {'e' * 16}"
    ):
        open_lookups(two_folders, one)
    with pytest.raises(CodecMismatchError, match="name with --sids a folder of each"):
        open_lookups(two_folders[1:], [*one, {"name": "y", "fingerprint": "f" * 16}])
    (two_folders[1] / "sids.index").unlink()
    with pytest.raises(DataError, match="run `sidrec codec index"):
        open_lookups(two_folders[1:], one)
