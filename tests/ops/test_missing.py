"""Missing SIDs in every operator, against dense sums in which they are rows of zeros; kernels and references alike."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, code_attention, gap_bucket
from sidrec_torchrec.ops.layout import CodeLayout
from sidrec_torchrec.ops.shared_attention import decoding_pays, shared_code_attention
from sidrec_torchrec.ops.side_decode import scaled_decode, side_decode
from sidrec_torchrec.ops.side_energy import side_energy
from sidrec_torchrec.ops.top_events import top_events
from tests.ops.test_code_attention import SOFTMAX, TIMES, Case
from tests.ops.test_top_events import TopCase

STAGES = ["ternary*25", "onehot:300,ternary*50", "onehot:4*7"]
EVENTS, DIM = 300, 13


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def way(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("SIDREC_OPS", "reference")


def without_some(words_NW: Tensor) -> Tensor:
    """Some SIDs missing whole, and of some the first word alone, as where side information stands in other words."""
    words_NW = words_NW.clone()
    words_NW[::3] = NO_SID
    words_NW[1::5, 0] = NO_SID
    words_NW[2::70] = torch.iinfo(torch.int64).min
    return words_NW


def one_hot(words_NW: Tensor, layout: CodeLayout) -> Tensor:
    """Which rows of digits' values each SID sums, float64 [N, V]; computed digit by digit from Python's integers."""
    rows_NV = torch.zeros(len(words_NW), layout.num_values, dtype=torch.float64)
    for n, words in enumerate(words_NW.tolist()):
        rest, first = list(words), layout.num_values
        for radix, word in reversed(list(zip(layout.radices, layout.words, strict=True))):
            first -= radix
            if words[word] >= 0:
                rest[word], value = divmod(rest[word], radix)
                rows_NV[n, first + value] = 1
    return rows_NV


def make_sids(stages: str) -> tuple[SIDSpec, Tensor, Tensor]:
    """The spec, words of which some are missing, and the rows they sum."""
    spec, generator = SIDSpec(parse_stages(stages), "test"), torch.Generator().manual_seed(0)
    digits_NL = torch.stack([torch.randint(r, (EVENTS,), generator=generator) for r in spec.radices], dim=1)
    words_NW = without_some(spec.pack(digits_NL))
    return spec, words_NW, one_hot(words_NW, spec.layout)


def make_tables(spec: SIDSpec, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Equal tables of digits' values, [V, DIM], of which gradients are asked: as given, and in float64."""
    table_VD = torch.randn(spec.layout.num_values, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    return table_VD.requires_grad_(), table_VD.detach().double().requires_grad_()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("stages", STAGES)
def test_side_decode(stages):
    spec, words_NW, rows_NV = make_sids(stages)
    (table_VD, double_VD), joined = make_tables(spec), spec.layout.join()
    chunks = list(joined.chunks.radices), list(joined.chunks.words)
    decoded_ND = side_decode(words_NW, joined.expand(table_VD), *chunks)
    expected_ND = rows_NV @ double_VD
    assert_close(decoded_ND, expected_ND)
    assert decoded_ND[::3].eq(0).all()
    grad_ND = torch.randn(EVENTS, DIM)
    decoded_ND.backward(grad_ND)
    expected_ND.backward(grad_ND.double())
    assert_close(table_VD.grad, double_VD.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_side_decode_in_other_dtypes(dtype):
    spec, words_NW, _ = make_sids("onehot:300,ternary*50")
    joined = spec.layout.join()
    table_RD = joined.expand(make_tables(spec)[0].detach()).to(dtype)
    decoded_ND = side_decode(words_NW, table_RD, list(joined.chunks.radices), list(joined.chunks.words))
    assert decoded_ND.dtype == dtype
    expected_ND = one_hot(words_NW, joined.chunks) @ table_RD.double()
    torch.testing.assert_close(decoded_ND.double(), expected_ND, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("stages", STAGES)
def test_scaled_decode(stages):
    spec, words_NW, rows_NV = make_sids(stages)
    joined, (table_VD, double_VD) = spec.layout.join(), make_tables(spec)
    scale_N = torch.rand(EVENTS) + 0.5
    scaled = sum(word == 0 for word in joined.chunks.words)
    factor_NV = torch.ones_like(rows_NV)
    factor_NV[:, : sum(joined.digits.radices[: joined.digits.words.count(0)])] = scale_N.double().unsqueeze(1)
    chunks = list(joined.chunks.radices), list(joined.chunks.words), scaled
    with torch.no_grad():
        table_RD = joined.expand(table_VD)
        assert_close(scaled_decode(words_NW, table_RD, scale_N, *chunks), (rows_NV * factor_NV) @ double_VD)


@pytest.mark.parametrize("stages", STAGES)
def test_side_energy(stages):
    spec, words_NW, rows_NV = make_sids(stages)
    (table_VD, double_VD), joined = make_tables(spec), spec.layout.join()
    chunks = list(joined.chunks.radices), list(joined.chunks.words)
    energy_N = side_energy(words_NW, joined.expand(table_VD), *chunks)
    expected_N = (rows_NV @ double_VD).square().sum(1)
    assert_close(energy_N, expected_N)
    assert energy_N[::3].eq(0).all()
    grad_N = torch.randn(EVENTS)
    energy_N.backward(grad_N)
    expected_N.backward(grad_N.double())
    assert_close(table_VD.grad, double_VD.grad)


def dense_scores(case, words_NW: Tensor, scores_MVH: Tensor, scale_N: Tensor | None, scaled_digits: int):
    """Of every query and event, float64 [M, N, H]; and the rows each event adds its weight to, [M, N, V]."""
    radices, digit_words = case.layout.radices, case.layout.words
    rows_NV = one_hot(words_NW, CodeLayout(radices, digit_words))
    if scale_N is not None:
        is_scaled_V = torch.arange(rows_NV.shape[1]) < sum(radices[:scaled_digits])
        rows_NV = torch.where(is_scaled_V, rows_NV * scale_N.unsqueeze(1), rows_NV)
    rows_MNV = rows_NV.expand(len(scores_MVH), -1, -1)
    if case.event_time_N is not None:
        gap_MN = gap_bucket(case.query_time_M.unsqueeze(1) - case.event_time_N)
        rows_MNV = torch.cat([rows_MNV, functional.one_hot(gap_MN.long(), GAP_BUCKETS)], dim=2)
    return rows_MNV @ scores_MVH, rows_MNV


def dense_attention(case, words_NW, scores_MVH, scale_N, scaled_digits, softmax):
    score_MNH, rows_MNV = dense_scores(case, words_NW, scores_MVH, scale_N, scaled_digits)
    place_N = torch.arange(len(words_NW))
    reads_MN1 = ((place_N >= case.begin_M.unsqueeze(1)) & (place_N < case.end_M.unsqueeze(1))).unsqueeze(2)
    if softmax:
        lse_MH = score_MNH.masked_fill(~reads_MN1, -torch.inf).logsumexp(1)
        weight_MNH = (score_MNH - lse_MH.nan_to_num(neginf=0.0).unsqueeze(1)).exp() * reads_MN1
    else:
        lse_MH, weight_MNH = torch.zeros_like(scores_MVH[:, 0]), functional.silu(score_MNH) * reads_MN1
    return torch.einsum("mnv,mnh->mvh", rows_MNV, weight_MNH), lse_MH


@SOFTMAX
@TIMES
@pytest.mark.parametrize("scaled", [None, 1, 9])
@pytest.mark.parametrize(("stages", "heads"), [("onehot:300,ternary*50", 4), ("ternary*25", 8), ("onehot:4*7", 1)])
def test_code_attention(stages, heads, scaled, times, softmax):
    case = Case(stages, heads=heads, events=200, queries=5, times=times, scale=0.5, scaled=scaled)
    case.words_NW = without_some(case.words_NW)
    results = []
    for dtype in (torch.float32, torch.float64):
        scores_MVH = case.scores_MVH.detach().clone().to(dtype).requires_grad_()
        scale_N = None if case.scale_N is None else case.scale_N.detach().clone().to(dtype).requires_grad_()
        if dtype == torch.float32:
            tensors = (*case.tensors[:3], scores_MVH, case.event_time_N, case.query_time_M, scale_N)
            mass_MVH, lse_MH = code_attention(*tensors, *case.digits, softmax)
        else:
            mass_MVH, lse_MH = dense_attention(case, case.words_NW, scores_MVH, scale_N, case.scaled_digits, softmax)
        generator = torch.Generator().manual_seed(1)
        grad_MVH, grad_MH = (torch.randn(x.shape, generator=generator) for x in (mass_MVH, lse_MH))
        reads_M1 = (case.end_M > case.begin_M).unsqueeze(1)
        lse_MH = lse_MH.where(reads_M1, 0.0)
        ((mass_MVH * grad_MVH).sum() + (lse_MH * grad_MH).sum()).backward()
        results.append([mass_MVH, lse_MH, scores_MVH.grad, *([] if scale_N is None else [scale_N.grad])])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_they_are_proper_operators():
    spec, words_NW, _ = make_sids("onehot:4,ternary*3")
    joined = spec.layout.join()
    table_RD = joined.expand(make_tables(spec)[0]).detach().requires_grad_()
    chunks = list(joined.chunks.radices), list(joined.chunks.words)
    torch.library.opcheck(side_decode, (words_NW[:9], table_RD, *chunks))
    torch.library.opcheck(side_energy, (words_NW[:9], table_RD, *chunks))
    torch.library.opcheck(scaled_decode, (words_NW[:9], table_RD.detach(), torch.rand(9), *chunks, 1))
    case = Case("onehot:4,ternary*3", heads=2, events=12, queries=3, times=True, scaled=9)
    tensors = without_some(case.words_NW), *case.tensors[1:]
    torch.library.opcheck(code_attention, (*tensors, *case.digits, True))
    torch.library.opcheck(top_events, (*tensors, *case.digits, 3))


@pytest.mark.parametrize(("queries", "events"), [(2, 300), (200, 900)])
@pytest.mark.parametrize("scaled", [None, 1])
def test_shared_code_attention(queries, events, scaled):
    case = Case("onehot:300,ternary*50", heads=3, events=events, queries=queries, times=True, scaled=scaled)
    words_NW = case.words_NW.clone()
    words_NW[::3, 0] = NO_SID  # the SID's only word; the other is side information
    sid_digits = case.layout.words.count(0)
    V = sum(case.layout.radices[:sid_digits])
    begin_M, end_M = torch.full((queries,), 7), torch.full((queries,), events - 3)
    case.begin_M, case.end_M, case.query_time_M = begin_M, end_M, case.query_time_M[:1].expand(queries)
    assert decoding_pays(queries, events) == (queries == 200)
    query_MHd, key_VHd = torch.randn(queries, 3, 5), torch.randn(V, 3, 5)
    value_XHd, sink_H = torch.randn(case.layout.num_values, 3, 5), torch.randn(3)
    bias_UH = torch.randn(case.layout.num_values - V + GAP_BUCKETS, 3)
    pooled_MHd = shared_code_attention(
        query_MHd, words_NW, begin_M, end_M, key_VHd, value_XHd, bias_UH, sink_H,
        case.event_time_N, case.query_time_M, case.scale_N, *map(list, (case.layout.radices, case.layout.words)), sid_digits,
    )  # fmt: skip

    scores_MVH = torch.einsum("mhd,vhd->mvh", query_MHd.double(), key_VHd.double())
    scores_MVH = torch.cat([scores_MVH, bias_UH.double().expand(queries, -1, -1)], dim=1)
    scale_N = None if case.scale_N is None else case.scale_N.double()
    mass_MVH, lse_MH = dense_attention(case, words_NW, scores_MVH, scale_N, sid_digits, softmax=True)
    share_MH1 = (lse_MH - sink_H.double()).sigmoid().unsqueeze(2)
    values_XHd = value_XHd.double()
    expected_MHd = torch.einsum("mvh,vhd->mhd", mass_MVH[:, : len(values_XHd)], values_XHd) * share_MH1
    assert_close(pooled_MHd, expected_MHd)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_top_events(stages, times, scaled):
    case = TopCase(stages, heads=2, events=200, queries=5, k=30, times=times, scaled=scaled, whole=True)
    words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N = case.tensors
    words_NW = without_some(words_NW)
    radices, digit_words, scaled_digits, k = case.layout
    event_MKH, score_MKH = top_events(words_NW, *case.tensors[1:], *case.layout)

    class Layout:
        layout = CodeLayout(tuple(radices), tuple(digit_words))

    Layout.event_time_N, Layout.query_time_M = event_time_N, query_time_M
    doubles = scores_MVH.double(), None if scale_N is None else scale_N.double()
    score_MNH, _ = dense_scores(Layout, words_NW, *doubles, scaled_digits)
    for m in range(len(begin_M)):
        for h in range(2):
            reads = range(int(begin_M[m]), int(end_M[m]))
            best = sorted(reads, key=lambda n: (-float(score_MNH[m, n, h]), n))[:k]
            expected = best + [-1] * (k - len(best))
            assert event_MKH[m, :, h].tolist() == expected
            assert score_MKH[m, : len(best), h].tolist() == [float(score_MNH[m, n, h]) for n in best]


def test_kernel_and_reference_choose_alike_to_the_last_bit(monkeypatch):
    case = TopCase("onehot:300,ternary*50", times=True, scaled=True)
    tensors = without_some(case.tensors[0]), *case.tensors[1:]
    chosen = top_events(*tensors, *case.layout)
    monkeypatch.setenv("SIDREC_OPS", "reference")
    for actual, expected in zip(chosen, top_events(*tensors, *case.layout), strict=True):
        assert actual.equal(expected)
