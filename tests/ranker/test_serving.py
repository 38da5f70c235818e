"""The served ranker, eager, exported and compiled: requests are scored alike, whatever their number and sizes."""

import pytest
import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.readers import PackedSIDs
from sidrec_torchrec.ranker.scorer import METADATA, Scorer
from sidrec_torchrec.ranker.serving import ServingRanker, export
from sidrec_torchrec.ranker.stateful import StatefulServingRanker, UserStateUpdater, export_stateful
from sidrec_torchrec.ranker.user_state import STATE_INPUTS
from sidrec_torchrec.side.code_attention import CodeAttention
from sidrec_torchrec.side.expansion import SIDEConfig

CPU = torch.device("cpu")
USERS = {"age": ("18", "25", "35"), "gender": ("F", "M")}
SIZES = {  # events and candidates of each request
    "one of each": ([1], [1]),
    "an empty history": ([0, 5], [3, 1]),
    "all histories empty": ([0, 0], [1, 1]),
    "no candidates": ([4, 9], [0, 0]),
    "no requests": ([], []),
    "many": ([300, 0, 700], [5, 6, 70]),
}


def make_model(
    stages: str = "onehot:40,ternary*50",
    learned: bool = False,
    users: dict = USERS,
    learned_queries: int = 0,
    lists: dict | None = None,
) -> ServingRanker:
    torch.manual_seed(0)
    spec = SIDSpec(parse_stages(stages), "some-codec")
    codec = Codec(spec, torch.randn(9), tuple(torch.randn(radix, 9) for radix in spec.radices))
    events = SIDEConfig(name="item", feature_names=["sid"], codec=codec, mode="decoded", learned=learned)
    config = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8), attention="codes", learned_queries=learned_queries)
    sizes = {name: len(values) + 1 for name, values in (users | (lists or {})).items()}
    items = PackedSIDs(events, CPU)
    ranker = Ranker(config, items, events.embedding_dim, events, sizes, CPU, user_lists=tuple(lists or {}))
    with torch.no_grad():  # tables, biases and terms start at zero
        for parameter in ranker.parameters():
            if not parameter.any():
                parameter.normal_()
    return ServingRanker(ranker, {"item": spec})


def make_inputs(model: ServingRanker, lengths: list[int], candidates: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    N, B, M = sum(lengths), len(lengths), sum(candidates)
    (spec,) = model.sids.values()

    def below(limits, rows: int) -> Tensor:
        columns = [torch.randint(limit, (rows,), generator=generator) for limit in limits]
        return torch.stack(columns, 1) if columns else torch.zeros(rows, 0, dtype=torch.int64)

    return {
        "history_NW": below(spec.word_limits, N),
        "action_N": below([2], N)[:, 0],
        "time_N": below([10**9], N)[:, 0],
        "offsets_B1": torch.tensor([0, *lengths]).cumsum(0),
        "candidate_MW": below(spec.word_limits, M),
        "request_M": torch.repeat_interleave(torch.tensor(candidates, dtype=torch.int64)),
        "request_time_B": torch.full((B,), 10**9),
        "num_events_B": torch.tensor(lengths, dtype=torch.int64) * 2,
        "user_BF": below([table.num_embeddings for table in model.user_tables], B),
    }


@pytest.fixture(scope="module", params=[0, 3], ids=["", "learned queries"])
def model(request) -> ServingRanker:
    return make_model(learned_queries=request.param)


@pytest.fixture(scope="module")
def scorer(model, tmp_path_factory) -> Scorer:
    file = tmp_path_factory.mktemp("package") / "ranker.pt2"
    write(export(model), describe(model.sids, USERS), file, compiled=False)
    return Scorer(file)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_exported_program_equals_the_module(sizes, model, scorer):
    inputs = make_inputs(model, *sizes)
    expected_M = model(*inputs.values())
    assert expected_M.shape == (sum(sizes[1]),)
    torch.testing.assert_close(scorer(**inputs), expected_M, rtol=0, atol=1e-6)


def test_what_parameters_alone_decide_is_a_constant(model):
    """A compiled request would make it anew each time; and the model holds nothing afterwards that training would outdate."""
    targets = {str(node.target) for node in export(model).graph.nodes}
    assert "sidrec.side_energy.default" in targets
    assert not [target for target in targets if "cholesky" in target]
    assert model.reader.attention.held_rows is None
    assert not [name for name in model.state_dict() if "held_rows" in name]


def test_together_as_alone(model):
    """A candidate's probability does not depend on what else is asked."""
    lengths, candidates = [300, 0, 700], [5, 6, 7]
    inputs = make_inputs(model, lengths, candidates)
    together_M = model(*inputs.values())
    for m in range(0, sum(candidates), 2):
        b = int(inputs["request_M"][m])
        events = slice(int(inputs["offsets_B1"][b]), int(inputs["offsets_B1"][b + 1]))
        alone = model(
            *(inputs[name][events] for name in ("history_NW", "action_N", "time_N")),
            torch.tensor([0, lengths[b]]),
            inputs["candidate_MW"][m : m + 1],
            torch.tensor([0]),
            *(inputs[name][b : b + 1] for name in ("request_time_B", "num_events_B", "user_BF")),
        )
        torch.testing.assert_close(together_M[m : m + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_compiles_in_one_graph(learned):
    model = make_model("ternary*25", learned, users={})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in (SIZES["many"], ([20, 30], [4, 5])):
        inputs = make_inputs(model, *sizes).values()
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=0, atol=1e-6)


def test_traces_with_jit(model, tmp_path):
    file = str(tmp_path / "traced.pt")
    torch.jit.trace(model, tuple(make_inputs(model, [20, 30], [4, 5]).values())).save(file)
    inputs = make_inputs(model, *SIZES["many"]).values()
    torch.testing.assert_close(torch.jit.load(file)(*inputs), model(*inputs), rtol=0, atol=1e-6)


def test_fx_takes_attention_for_a_leaf(model):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, CodeAttention) or super().is_leaf_module(module, name)

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model.reader.attention

        def forward(self, query_MD, words_NW, begin_M, end_M, buckets_NK, event_time_N, query_time_M):
            return self.attention(query_MD, words_NW, begin_M, end_M, buckets_NK, event_time_N, query_time_M) * 2

    reader = Reader()
    traced = torch.fx.GraphModule(reader, Tracer().trace(reader))
    inputs = make_inputs(model, [20], [1])
    times = inputs["time_N"], inputs["request_time_B"]
    ends = inputs["offsets_B1"][:1], inputs["offsets_B1"][1:]
    arguments = torch.randn(1, 16), inputs["history_NW"], *ends, inputs["action_N"].unsqueeze(1), *times
    torch.testing.assert_close(traced(*arguments), reader(*arguments))


def test_metadata_say_what_the_server_must_know(scorer):
    metadata = scorer.metadata
    expected = {"name": "item", "fingerprint": "some-codec", "stages": "onehot:40,ternary*50", "words": 2}
    assert metadata["sids"] == [metadata["sids"][0] | expected]
    assert metadata["inputs"]["history_NW"] == ["events", 2]
    assert metadata["inputs"]["user_BF"] == ["requests", 2]
    assert metadata["user_features"] == {"age": ["18", "25", "35"], "gender": ["F", "M"]}


BAD = {
    "offsets_B1 must rise from 0": ("offsets_B1", lambda x: x + 1),
    "history_NW.* expected int64 of shape": ("history_NW", lambda x: x.int()),
    r"candidate_MW is .*\(2, 1\), expected int64 of shape \(2, 2\)": ("candidate_MW", lambda x: x[:, :1]),
    r"history_NW\[0, 0\] is -2, expected 0 to": ("history_NW", lambda x: x - x[0] - 2),
    r"history_NW\[2, 1\] is -1, expected 0 to": (
        "history_NW",
        lambda x: x.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(NO_SID)),
    ),
    r"candidate_MW\[0, 0\] is -1, expected 0 to": ("candidate_MW", lambda x: x * 0 + NO_SID),
    r"action_N\[0\] is 2, expected 0 to 1": ("action_N", lambda x: x * 0 + 2),
    r"request_M\[0\] is 7, expected 0 to 1": ("request_M", lambda x: x * 0 + 7),
    r"user_BF\[1, 0\] is 4, expected 0 to 3": ("user_BF", lambda x: torch.tensor([[3, 0], [4, 0]])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message, model, scorer):
    inputs = make_inputs(model, [3, 4], [1, 1])
    name, spoil = BAD[message]
    with pytest.raises(DataError, match=message):
        scorer(**{**inputs, name: spoil(inputs[name])})


def test_missing_and_unknown_inputs_are_named(model, scorer):
    inputs = make_inputs(model, [3], [1])
    inputs["time"] = inputs.pop("time_N")
    with pytest.raises(DataError, match="missing or unknown inputs: time, time_N; the inputs are history_NW"):
        scorer(**inputs)


def test_other_files_are_refused(tmp_path, model, scorer, monkeypatch):
    file = tmp_path / "other.pt2"
    file.write_bytes(b"nothing")
    with pytest.raises(SidrecError, match="other.pt2: not a ranker"):
        Scorer(file)
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), file)
    with pytest.raises(SidrecError, match="other.pt2: not a ranker"):
        Scorer(file)
    torch.export.save(export(model), file, extra_files={METADATA: '{"format": 3}'})
    with pytest.raises(SidrecError, match="of format 3, this version reads 2"):
        Scorer(file)


LISTS = {"genres": ("folk", "jazz", "pop"), "spoken.languages": ("de", "en")}


@pytest.mark.parametrize("stateful", [False, True], ids=["", "stateful"])
def test_lists_of_users_are_means_of_their_values(stateful):
    model = make_model(learned_queries=1, lists=LISTS)
    asked = StatefulServingRanker(model) if stateful else model
    program = (export_stateful if stateful else export)(asked).module()
    tables = [table.weight for table in model.list_tables.tables]
    for lengths, candidates in SIZES.values():
        inputs, generator = make_inputs(model, lengths, candidates), torch.Generator().manual_seed(2)
        B = len(lengths)
        lists = [
            [
                1 + torch.randperm(len(values), generator=generator)[: (b + f) % 3]
                for f, values in enumerate(LISTS.values())
            ]
            for b in range(B)
        ]
        flat = [own for of_user in lists for own in of_user]
        inputs["user_values_V"] = torch.cat([torch.zeros(0, dtype=torch.int64), *flat])
        inputs["user_lengths_BL"] = torch.tensor([len(own) for own in flat], dtype=torch.int64).view(B, 2)
        for f, mean_BD in enumerate(model.list_tables(inputs["user_values_V"], inputs["user_lengths_BL"])):
            expected = [tables[f][own[f]].mean(0) if len(own[f]) else torch.zeros(16) for own in lists]
            torch.testing.assert_close(mean_BD, torch.stack(expected) if B else torch.zeros(0, 16))
        expected_M = model(**inputs)
        if stateful:
            inputs["num_events_B"] = inputs["offsets_B1"].diff()
            expected_M = model(**inputs)
            del inputs["num_events_B"]
            inputs = states_of(model, inputs) | inputs
        torch.testing.assert_close(program(*inputs.values()), expected_M, rtol=0, atol=1e-6)


def states_of(model, inputs):
    updater = UserStateUpdater(model)
    events = {name: inputs[name] for name in ("history_NW", "action_N", "time_N", "offsets_B1")}
    states = updater.append(updater.new(len(inputs["request_time_B"])), **events)
    return dict(zip(STATE_INPUTS, states.tensors, strict=True))
