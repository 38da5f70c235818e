"""CodeAttention against attention over decoded events, written with torch's own modules."""

import itertools

import pytest
import torch
from torch.nn.functional import silu
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.errors import CodecMismatchError, DataError
from sidrec_torchrec.ops import shared_attention
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, gap_bucket
from sidrec_torchrec.side.code_attention import CodeAttention, request_ranges
from sidrec_torchrec.side.expansion import SIDEConfig
from sidrec_torchrec.side.layer_norm_map import LayerNormMap

DIM, HEADS = 16, 4
LENGTHS, CANDIDATES = [5, 0, 300, 17], [2, 3, 0, 4]
KINDS = {"action": 3, "position": 40}


def make_codec(stages="onehot:40,ternary*50", dim=9, fingerprint="test"):
    generator = torch.Generator().manual_seed(0)
    spec = SIDSpec(parse_stages(stages), fingerprint)
    tables = tuple(torch.randn(radix, dim, generator=generator) * 0.3 for radix in spec.radices)
    return Codec(spec, torch.randn(dim, generator=generator), tables)


def random_words(codec, N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return codec.spec.pack(torch.stack([torch.randint(r, (N,), generator=generator) for r in codec.spec.radices], 1))


def make(mode="decoded", codec=None, learned=False, mapped=False, **options):
    torch.manual_seed(2)
    config = SIDEConfig(name="item", feature_names=["history"], codec=codec or make_codec(), mode=mode, learned=learned)
    vectors = LayerNormMap(config.embedding_dim, DIM) if mapped else None
    attention = CodeAttention(config, DIM, HEADS, vectors=vectors, **options)
    with torch.no_grad():  # biases, terms and sink start at zero
        for parameter in (attention.bias_UH, attention.bucket_value_AD, attention.sink_H):
            if parameter is not None:
                parameter.normal_()
    return attention


def inputs(codec, options):
    generator = torch.Generator().manual_seed(3)
    N, M = sum(LENGTHS), sum(CANDIDATES)
    offsets_B1 = torch.tensor([0, *LENGTHS]).cumsum(0)
    begin_M, end_M = request_ranges(offsets_B1, torch.tensor(CANDIDATES))
    arguments = [torch.randn(M, DIM, generator=generator), random_words(codec, N), begin_M, end_M, None, None, None]
    if options.get("side_information"):
        arguments[4] = torch.stack([torch.randint(n, (N,), generator=generator) for n in KINDS.values()], 1)
    if options.get("time_gaps"):
        arguments[5] = torch.randint(10**9, (N,), generator=generator)
        arguments[6] = torch.randint(10**9, (M,), generator=generator)
    return arguments


def decode_then_attend(attention, codec, mode, query_MD, words_NW, begin_M, end_M, buckets_NK, event_time, query_time):
    """One query after another: vectors of events, keys and values from them, torch's softmax."""
    if mode == "decoded":
        vectors_NE = codec.decode(words_NW)
    else:
        digits_NL = codec.spec.unpack(words_NW).long()
        vectors_NE = sum(table[digits_NL[:, j]] for j, table in enumerate(codec.value_tables()))
    if attention.vectors is not None:
        vectors_NE = attention.vectors(vectors_NE)
    pooled = []
    for m, query_D in enumerate(query_MD):
        events = slice(int(begin_M[m]), int(end_M[m]))
        key_TD, value_TD = attention.key(vectors_NE[events]), attention.value(vectors_NE[events])
        q_Hd = attention.query(query_D).view(HEADS, -1)
        score_TH = torch.einsum("hd,thd->th", q_Hd, key_TD.unflatten(1, (HEADS, -1))) / (DIM // HEADS) ** 0.5
        rows = []
        if buckets_NK is not None:
            rows += [buckets_NK[events, 0], KINDS["action"] + buckets_NK[events, 1]]
            value_TD = value_TD + sum(attention.bucket_value_AD[row_T] for row_T in rows)
        if event_time is not None:
            first = sum(KINDS.values()) if buckets_NK is not None else 0
            rows.append(first + gap_bucket(query_time[m] - event_time[events]))
        for row_T in rows:
            score_TH = score_TH + attention.bias_UH[row_T]
        if attention.pointwise:
            weight_TH = silu(score_TH) / max(1, len(score_TH))
        else:
            weight_TH = torch.cat([score_TH, attention.sink_H.unsqueeze(0)]).softmax(0)[:-1]
        pooled.append(torch.einsum("th,thd->hd", weight_TH, value_TD.unflatten(1, (HEADS, -1))).flatten())
    return attention.output(torch.stack(pooled))


OPTIONS = [
    {},
    {"side_information": KINDS},
    {"time_gaps": True},
    {"side_information": KINDS, "time_gaps": True},
    {"side_information": KINDS, "time_gaps": True, "pointwise": True},
    {"mapped": True},
    {"side_information": KINDS, "time_gaps": True, "mapped": True},
    {"time_gaps": True, "pointwise": True, "mapped": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["digits", "decoded"])
@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_equals_decode_then_attend_with_gradients(options, mode, learned):
    codec = make_codec()
    attention = make(mode, codec, learned, **options)
    arguments = inputs(codec, options)
    results = []
    for run in (attention, lambda *a: decode_then_attend(attention, codec, mode, *a)):
        query_MD = arguments[0].clone().requires_grad_()
        attention.zero_grad()
        output_MD = run(query_MD, *arguments[1:])
        output_MD.square().sum().backward()
        # the reference decodes with the codec itself, so learned rows get no gradient there
        names = {n: p.grad for n, p in attention.named_parameters() if n != "events.rows" and p.numel()}
        results.append([output_MD.detach(), query_MD.grad, *names.values()])
    for actual, expected in zip(*results, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("pointwise", [False, True])
def test_queries_that_read_together_pool_what_each_does_alone(pointwise):
    options = {"side_information": KINDS, "time_gaps": True, "pointwise": pointwise}
    attention, (query_MD, *others) = make(**options), inputs(make_codec(), options)
    query_MPD = torch.stack([query_MD, query_MD.roll(1, 0), -query_MD], dim=1)
    expected_MPD = torch.stack([attention(query_MPD[:, p], *others) for p in range(3)], dim=1)
    torch.testing.assert_close(attention(query_MPD, *others), expected_MPD, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_timeless_queries_are_blind_to_time_alone():
    options = {"side_information": KINDS, "time_gaps": True, "mapped": True}
    attention, (query_MD, *others) = make(**options), inputs(make_codec(), options)
    query_MPD = torch.stack([query_MD, query_MD, query_MD], dim=1)
    pooled_MPD = attention(query_MPD, *others, timeless=2)
    torch.testing.assert_close(pooled_MPD[:, 0], attention(query_MD, *others), rtol=1e-4, atol=1e-5)
    attention.bias_UH[-GAP_BUCKETS:] = 0.0
    for p in (1, 2):
        torch.testing.assert_close(pooled_MPD[:, p], attention(query_MD, *others), rtol=1e-4, atol=1e-5)
    masses = attention.masses(query_MPD, *others[:4])  # without times
    torch.testing.assert_close(attention.pool(masses)[:, 1], pooled_MPD[:, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[0], [3], [0, 0, 5, 200], list(range(0, 300, 7))])
@torch.no_grad()
def test_masses_of_parts_merge_into_those_of_all(cuts):
    options = {"side_information": KINDS, "time_gaps": True, "mapped": True}
    attention, (query_MD, words_NW, begin_M, end_M, buckets_NK, *_) = make(**options), inputs(make_codec(), options)
    query_MPD = torch.stack([query_MD, -query_MD], dim=1)
    borders = [begin_M, *(torch.minimum(begin_M + cut, end_M) for cut in cuts), end_M]
    parts = [
        attention.masses(query_MPD, words_NW, begin, end, buckets_NK) for begin, end in itertools.pairwise(borders)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = attention.masses(query_MPD, words_NW, begin_M, end_M, buckets_NK)
    assert merged.count_M.equal(whole.count_M)
    torch.testing.assert_close(merged.lse_MPH, whole.lse_MPH, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention.pool(merged), attention.pool(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pays", [True, False, None], ids=["decoded", "by code", "the cheaper way"])
@pytest.mark.parametrize("options", [o for o in OPTIONS if not o.get("pointwise")])
@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
@torch.no_grad()
def test_shared_equals_each_alone(options, learned, pays, monkeypatch):
    codec = make_codec()
    attention, arguments = make(codec=codec, learned=learned, **options), inputs(codec, options)
    expected_MD = attention(*arguments)
    if pays is not None:
        monkeypatch.setattr(shared_attention, "decoding_pays", lambda queries, events: pays)
    torch.testing.assert_close(attention.shared(*arguments), expected_MD, rtol=1e-4, atol=1e-5)
    assert attention.shared(*arguments).std() > 0.01


def test_attention_that_is_pointwise_is_not_shared():
    with pytest.raises(ValueError, match="pointwise cannot be shared"):
        make(pointwise=True).shared(*inputs(make_codec(), {}))


@pytest.mark.parametrize("mapped", [False, True])
def test_learned_rows_are_trained(mapped):
    codec = make_codec("ternary*8")
    attention = make("digits", codec, learned=True, mapped=mapped)
    arguments = inputs(codec, {})
    rows_VE = attention.events.rows_VE
    attention(*arguments).square().sum().backward()
    gradient = rows_VE.grad.clone()
    step, loss = 1e-2, []
    for sign in (1, -1):  # a central difference along the gradient
        with torch.no_grad():
            rows_VE += sign * step * gradient / gradient.norm()
            loss.append(attention(*arguments).double().square().sum())
            rows_VE -= sign * step * gradient / gradient.norm()
    assert float(loss[0] - loss[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=1e-2)


@pytest.mark.parametrize("how", ["module", "autocast"])
def test_half_precision(how):
    options = {"side_information": KINDS, "time_gaps": True}
    attention, arguments = make(**options), inputs(make_codec(), options)
    expected_MD = attention(*arguments).detach()
    if how == "module":
        attention = attention.bfloat16()
        arguments[0] = arguments[0].bfloat16()
        output_MD = attention(*arguments)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            output_MD = attention(*arguments)
    assert output_MD.dtype == torch.bfloat16
    output_MD.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
    torch.testing.assert_close(output_MD.float(), expected_MD, rtol=0.1, atol=0.1 * float(expected_MD.abs().max()))


def test_nothing_to_read_gives_the_bias():
    codec = make_codec()
    for pointwise in (False, True):
        attention = make(codec=codec, pointwise=pointwise)
        zero = torch.zeros(2, dtype=torch.int64)
        output_MD = attention(torch.randn(2, DIM), random_words(codec, 5), zero, zero)
        torch.testing.assert_close(output_MD, attention.output.bias.expand(2, -1))


def test_reads_a_keyed_jagged_tensor():
    codec = make_codec()
    attention = make(codec=codec)
    words_NW = random_words(codec, sum(LENGTHS))
    features = KeyedJaggedTensor(
        keys=["history_0", "history_1"],
        values=words_NW.T.reshape(-1),
        lengths=torch.tensor(LENGTHS * 2),
    )
    history = attention.events.read(features, "history")
    assert history.values().equal(words_NW)
    output = attention(torch.randn(4, DIM), history.values(), history.offsets()[:-1], history.offsets()[1:])
    assert output.shape == (4, DIM)


def test_a_checkpoint_of_another_codec_is_refused():
    attention, other = make(), make(codec=make_codec(fingerprint="other"))
    make().load_state_dict(attention.state_dict())
    with pytest.raises(CodecMismatchError, match="other"):
        attention.load_state_dict(other.state_dict())


def test_bad_input_is_refused():
    codec = make_codec()
    options = {"side_information": KINDS, "time_gaps": True}
    attention, arguments = make(codec=codec, **options), inputs(codec, options)
    arguments[4][7, 1] = 40
    with pytest.raises(DataError, match="position of event 7 is 40, expected 0 to 39"):
        attention(*arguments)
    with pytest.raises(ValueError, match=r"a column for each of \['action', 'position'\]; got none"):
        attention(*arguments[:4], None, *arguments[5:])
    with pytest.raises(ValueError, match="query_time_M must be given"):
        make(codec=codec, time_gaps=True)(*arguments[:4], None, arguments[5])
    with pytest.raises(ValueError, match="event_time_N must be given if time_gaps, and only then"):
        make(codec=codec)(*arguments[:4], None, *arguments[5:])
    for wrong in ({"side_information": {"a": 0}}, {"side_information": {str(i): 30_000 for i in range(5)}}):
        with pytest.raises(ValueError, match="buckets are possible"):
            make(**wrong)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        CodeAttention(attention_config(codec), 10, 4)
    with pytest.raises(ValueError, match="meta"):
        CodeAttention(attention_config(codec), 16, 4, device=torch.device("meta"))


def attention_config(codec):
    return SIDEConfig(name="item", feature_names=["history"], codec=codec)
