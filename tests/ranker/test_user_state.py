"""State that is kept: however a history is cut, what new events are added to is what the whole history gives."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.tasks import num_actions
from sidrec_torchrec.errors import CodecMismatchError, DataError, SidrecError
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.serving import ServingRanker
from sidrec_torchrec.ranker.stateful import StatefulServingRanker, UserStateUpdater, export_stateful, export_updater
from sidrec_torchrec.ranker.user_state import DTYPES, UserStates
from sidrec_torchrec.side.expansion import SIDEConfig
from tests.ranker.test_serving import make_inputs, make_model
from tests.ranker.test_targets import DIM, make_events

CPU = torch.device("cpu")
EVENTS = ("history_NW", "action_N", "time_N")


def make(tasks: int, fingerprint: str = "test", seed: int = 0) -> ServingRanker:
    """With two learned queries."""
    torch.manual_seed(seed)
    codec = make_events().codec
    codec = Codec(SIDSpec(codec.spec.stages, fingerprint), codec.offset_D, codec.digit_tables)
    events = SIDEConfig(name="item", feature_names=["sid"], codec=codec)
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), attention="codes", learned_queries=2)
    ranker = Ranker(config, torch.nn.Identity(), events.embedding_dim, events, {"age": 3}, CPU, tasks)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.3)
    return ServingRanker(ranker, {"item": codec.spec})


MODELS = {tasks: make(tasks) for tasks in (1, 3)}


def make_request(model: ServingRanker, lengths: list[int], candidates: list[int]) -> dict[str, Tensor]:
    """Every user's events are all that are sent, and their times rise."""
    inputs = make_inputs(model, lengths, candidates)
    generator = torch.Generator().manual_seed(sum(lengths))
    inputs["num_events_B"] = inputs["offsets_B1"].diff()
    inputs["time_N"] = inputs["time_N"].sort().values
    actions = num_actions(model.num_tasks)
    inputs["action_N"] = torch.randint(actions, inputs["action_N"].shape, generator=generator)
    return inputs


def part_of(inputs: dict[str, Tensor], begin_B: Tensor, end_B: Tensor) -> dict[str, Tensor]:
    """Events begin .. end - 1 of each user, as ``append`` takes them."""
    places = [torch.arange(begin, end) for begin, end in zip(begin_B.tolist(), end_B.tolist(), strict=True)]
    place_N = torch.cat([*places, torch.zeros(0, dtype=torch.int64)])
    offsets_B1 = torch.tensor([0, *(len(place) for place in places)]).cumsum(0)
    return {name: inputs[name][place_N] for name in EVENTS} | {"offsets_B1": offsets_B1}


def whole(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in (*EVENTS, "offsets_B1")}


def asked(inputs: dict[str, Tensor], **others: Tensor) -> dict[str, Tensor]:
    return {name: value for name, value in (inputs | others).items() if name != "num_events_B"}


def assert_same(actual: UserStates, expected: UserStates) -> None:
    for name in DTYPES:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    tasks=st.sampled_from([1, 3]),
    lengths=st.lists(st.integers(0, 60), min_size=0, max_size=4),
    cuts=st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), max_size=5),
)
@torch.no_grad()
def test_however_it_is_cut_the_states_are_those_of_the_whole_history(tasks, lengths, cuts):
    model = MODELS[tasks]
    updater, stateful = UserStateUpdater(model), StatefulServingRanker(model)
    inputs = make_request(model, lengths, [2] * len(lengths))
    begin_B, length_B = inputs["offsets_B1"][:-1], inputs["offsets_B1"].diff()
    shares = torch.tensor([[0.0] * 4, *cuts, [1.0] * 4])[:, : len(lengths)].sort(dim=0).values
    states = updater.new(len(lengths))
    for before_B, share_B in itertools.pairwise(begin_B + (shares * length_B).long()):
        states = updater.append(states, **part_of(inputs, before_B, share_B))
    expected = updater.append(updater.new(len(lengths)), **whole(inputs))
    assert_same(states, expected)
    served = model(**inputs)
    torch.testing.assert_close(stateful.score(states, **asked(inputs)), served, rtol=0, atol=1e-5)
    again = UserStates.from_rows(states.to_rows(), updater.layout)
    assert all(a.equal(b) for a, b in zip(again.tensors, states.tensors, strict=True))


@torch.no_grad()
def test_thousands_of_single_events_do_not_drift():
    updater = UserStateUpdater(MODELS[1])
    inputs = make_request(MODELS[1], [2000], [1])
    states = updater.new(1)
    for n in range(2000):
        states = updater.append(states, **part_of(inputs, torch.tensor([n]), torch.tensor([n + 1])))
    assert_same(states, updater.append(updater.new(1), **whole(inputs)))


@torch.no_grad()
def test_candidates_may_read_the_newest_events_alone():
    """What is kept stays that of all: with weights that make the candidate's own attention blind, nothing changes."""
    model = make(1)
    model.reader.attention.sink_H.fill_(100.0)
    updater, stateful = UserStateUpdater(model), StatefulServingRanker(model)
    inputs = make_request(model, [50, 0, 9], [2, 1, 3])
    states = updater.append(updater.new(3), **whole(inputs))
    end_B = inputs["offsets_B1"][1:]
    newest = part_of(inputs, torch.maximum(end_B - 5, inputs["offsets_B1"][:-1]), end_B)
    torch.testing.assert_close(stateful.score(states, **asked(inputs, **newest)), model(**inputs), rtol=0, atol=1e-5)
    cut = model(**(inputs | newest))
    assert (cut - model(**inputs)).abs().max() > 1e-3  # which loses the counts


@pytest.mark.parametrize("tasks", MODELS)
@torch.no_grad()
def test_exported_programs_equal_the_modules(tasks):
    model = MODELS[tasks]
    updater, stateful = UserStateUpdater(model), StatefulServingRanker(model)
    update, score = export_updater(updater).module(), export_stateful(stateful).module()
    for lengths in ([], [0], [1], [30, 0, 7]):
        inputs = make_request(model, lengths, [2] * len(lengths))
        states = updater.new(len(lengths))
        for _ in range(2):  # into nothing, into something
            expected = updater.append(states, **whole(inputs))
            states = UserStates(updater.layout, *update(*states.tensors, *whole(inputs).values()))
            assert_same(states, expected)
        probability_M = score(*states.tensors, *asked(inputs).values())
        torch.testing.assert_close(probability_M, stateful.score(states, **asked(inputs)), rtol=0, atol=1e-6)


def some_states(updater: UserStateUpdater) -> UserStates:
    return updater.append(updater.new(2), **whole(make_request(MODELS[updater.num_tasks], [5, 0], [1, 1])))


@pytest.mark.parametrize("tasks", MODELS)
def test_a_dict_or_rows_give_the_states_back(tasks):
    updater = UserStateUpdater(MODELS[tasks])
    states = some_states(updater)
    layout = updater.layout
    V = sum(make_events().codec.spec.radices) + num_actions(tasks)
    assert layout.num_bytes == 40 + 4 * V * 2 * 2 + 8 * 2 * 2 + 8 + 8 * 2 * tasks + 8
    rows = states.to_rows()
    assert rows.shape == (2, layout.num_bytes)
    for again in (
        UserStates.from_dict(states.to_dict(), layout),
        UserStates.from_rows([row.tobytes() for row in rows], type(layout)(**vars(layout))),
    ):
        assert again.layout == layout
        assert all(a.equal(b) for a, b in zip(again.tensors, states.tensors, strict=True))
    alone = UserStates.from_rows(rows[1:], layout)
    assert alone.count_B.tolist() == [0]
    assert updater.new(0).to_rows().shape == (0, layout.num_bytes)
    assert len(UserStates.from_rows([], layout)) == 0


def test_states_of_others_are_refused():
    updater = UserStateUpdater(MODELS[1])
    states = some_states(updater)
    (row, _), tensors = states.to_rows(), states.to_dict()
    others = {
        "another codec's state: of test, but this ranker reads SIDs of other": make(1, fingerprint="other"),
        "another ranker's state: of weights .* make it again from the user's events": make(1, seed=1),
    }
    for message, model in others.items():
        other = UserStateUpdater(model)
        with pytest.raises(CodecMismatchError, match=f"row 0: {message}"):
            UserStates.from_rows([row], other.layout)
        with pytest.raises(CodecMismatchError, match=message):
            UserStates.from_dict(tensors, other.layout)
        with pytest.raises(CodecMismatchError, match=message):
            other.append(states, **whole(make_request(model, [1, 1], [1, 1])))
        with pytest.raises(CodecMismatchError, match=message):
            StatefulServingRanker(model).score(states, **asked(make_request(model, [1, 1], [1, 1])))


def test_what_is_no_state_is_refused():
    layout = UserStateUpdater(MODELS[1]).layout
    states = some_states(UserStateUpdater(MODELS[1]))
    row, tensors = states.to_rows()[0].tobytes(), states.to_dict()
    for broken, message in (
        (b"", "row 1: not a user's state"),
        (row[:20], "row 1: not a user's state"),
        (b"else" + row[4:], "row 1: not a user's state"),
        (row[:-1], f"row 1 has {len(row) - 1} bytes, expected {len(row)}"),
        (row[:4] + b"\x07" + row[5:], "row 1: a state of format 7, this version reads 1"),
    ):
        with pytest.raises(DataError, match=message):
            UserStates.from_rows([row, broken], layout)
    with pytest.raises(DataError, match=r"lse_BKH is torch.float32 of shape \(2, 2, 2\), expected torch.float64"):
        UserStates.from_dict(tensors | {"lse_BKH": tensors["lse_BKH"].float()}, layout)
    with pytest.raises(DataError, match="missing or unknown tensors: count, count_B"):
        tensors["count"] = tensors.pop("count_B")
        UserStates.from_dict(tensors, layout)
    with pytest.raises(ValueError, match="a fingerprint of the codec has at most 16 bytes"):
        replace(layout, codec="x" * 17)


BAD = {
    r"offsets_B1 must be 3 numbers that rise from 0 to 5; got \[0, 6, 5\]": ("offsets_B1", lambda x: torch.tensor([0, 6, 5])),
    r"offsets_B1 must be 3 numbers .*; got \[0, 5\]": ("offsets_B1", lambda x: x[:2]),
    "action_N and time_N have shapes": ("time_N", lambda x: x[:-1]),
    "history_NW: row 0, word 0 is -2, no packed SID": ("history_NW", lambda x: x * 0 - 2),
    "action of event 0 is 2, expected 0 to 1": ("action_N", lambda x: x * 0 + 2),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_events_are_refused(message):
    updater = UserStateUpdater(MODELS[1])
    inputs = whole(make_request(MODELS[1], [5, 0], [1, 1]))
    name, spoil = BAD[message]
    with pytest.raises(DataError, match=message):
        updater.append(updater.new(2), **{**inputs, name: spoil(inputs[name])})


def test_rankers_of_which_nothing_can_be_kept_are_refused():
    for module in (UserStateUpdater, StatefulServingRanker):
        with pytest.raises(SidrecError, match="no learned queries to keep"):
            module(make_model())
        model = make_model(learned_queries=1)
        model.reader = torch.nn.Identity()
        with pytest.raises(SidrecError, match="--model.attention codes, and without --model.blocks"):
            module(model)


def test_states_are_read_and_written_without_torchrec():
    code = "import sys, sidrec_torchrec.ranker.user_state; assert 'torchrec' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
