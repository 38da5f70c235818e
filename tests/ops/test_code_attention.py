"""code_attention against attention over decoded vectors, and the kernels against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ops.code_attention import (
    GAP_BUCKETS,
    code_attention,
    code_attention_backward,
    gap_bucket,
    reference,
    reference_backward,
)
from sidrec_torchrec.ops.layout import CodeLayout

STAGES = ["ternary", "ternary*25", "onehot:256,ternary*20", "onehot:300,ternary*50", "onehot:4*7"]
SCALED = pytest.mark.parametrize("scaled", [None, 1, 9], ids=["", "first word scaled", "scaled"])
TIMES = pytest.mark.parametrize("times", [False, True], ids=["", "times"])
SOFTMAX = pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "silu"])


class Case:
    """Random events, queries over ranges of them that overlap, are empty or alike, and scores."""

    def __init__(
        self,
        stages,
        heads=4,
        events=700,
        queries=9,
        times=False,
        seed=0,
        dtype=torch.float32,
        scale=1.0,
        scaled=None,  # of the digits: those of how many words; None for no scale
    ):
        generator = torch.Generator().manual_seed(seed)
        self.spec = SIDSpec(parse_stages(stages), "test")
        self.layout = self.spec.layout
        columns = [torch.randint(r, (events,), generator=generator) for r in self.spec.radices]
        self.digits_NL = torch.stack(columns, dim=1)
        self.words_NW = self.spec.pack(self.digits_NL)
        ends = torch.randint(events + 1, (queries, 2), generator=generator).sort(1).values
        ends[0] = torch.tensor([0, events])
        if queries > 2:
            ends[1] = ends[0]
            ends[2, 1] = ends[2, 0]  # reads nothing
        self.begin_M, self.end_M = ends[:, 0].contiguous(), ends[:, 1].contiguous()
        V = self.layout.num_values + GAP_BUCKETS * times
        self.scores_MVH = torch.randn(queries, V, heads, generator=generator, dtype=dtype) * scale
        self.scaled_digits, self.scale_N = 0, None
        if scaled is not None:
            self.scaled_digits = sum(word < scaled for word in self.layout.words)
            self.scale_N = torch.rand(events, generator=generator, dtype=dtype) + 0.5
        self.event_time_N = self.query_time_M = None
        if times:
            self.event_time_N = torch.randint(1 << 33, (events,), generator=generator)
            self.query_time_M = torch.randint(1 << 33, (queries,), generator=generator)

    @property
    def tensors(self):
        times = self.event_time_N, self.query_time_M
        return self.words_NW, self.begin_M, self.end_M, self.scores_MVH, *times, self.scale_N

    @property
    def digits(self):
        return list(self.layout.radices), list(self.layout.words), self.scaled_digits

    def run(self, softmax):
        return code_attention(*self.tensors, *self.digits, softmax)

    @property
    def doubles(self):
        """The tensors in float64."""
        words, begin, end, scores, *times, scale = self.tensors
        return words, begin, end, scores.double(), *times, None if scale is None else scale.double()

    def reference(self, softmax):
        return reference(*self.doubles, *self.digits, softmax)

    def by_hand(self, softmax):
        """One query after another, from unpacked digits."""
        masses, lses = [], []
        for m in range(len(self.begin_M)):
            events = slice(int(self.begin_M[m]), int(self.end_M[m]))
            tables = list(
                self.scores_MVH[m]
                .double()
                .split(
                    [*self.layout.radices, GAP_BUCKETS][:None]
                    if self.event_time_N is not None
                    else list(self.layout.radices)
                )
            )
            columns = list(self.digits_NL[events].T)
            if self.event_time_N is not None:
                gaps = [max(0, int(self.query_time_M[m] - t)) for t in self.event_time_N[events]]
                columns.append(torch.tensor([min((gap + 1).bit_length() - 1, GAP_BUCKETS - 1) for gap in gaps]).long())
            scale_T1 = torch.ones(len(columns[0]), 1).double()
            if self.scale_N is not None:
                scale_T1 = self.scale_N[events].double().unsqueeze(1)
            factors = [scale_T1 if j < self.scaled_digits else torch.ones_like(scale_T1) for j in range(len(columns))]
            score_TH = sum(f * table[column] for f, table, column in zip(factors, tables, columns, strict=True))
            weight_TH = score_TH.softmax(0) if softmax else torch.nn.functional.silu(score_TH)
            mass = [
                torch.zeros_like(table).index_add_(0, column, f * weight_TH)
                for f, table, column in zip(factors, tables, columns, strict=True)
            ]
            masses.append(torch.cat(mass))
            lses.append(score_TH.logsumexp(0) if softmax else score_TH.new_zeros(score_TH.shape[1]))
        return torch.stack(masses), torch.stack(lses)


def assert_equal(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        scale = e[e.isfinite()].abs().max().clamp_min(1e-30) if e.isfinite().any() else 1.0
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=float(tolerance * scale))


@pytest.mark.parametrize("stages", STAGES)
@SCALED
@TIMES
@SOFTMAX
def test_equals_attention_by_hand(stages, scaled, times, softmax):
    case = Case(stages, times=times, scaled=scaled)
    assert_equal(case.reference(softmax), case.by_hand(softmax), 1e-12)
    assert_equal(case.run(softmax), case.by_hand(softmax))


@pytest.mark.parametrize("heads", [1, 3, 4, 5, 8, 13])
@SOFTMAX
def test_any_number_of_heads(heads, softmax):
    case = Case("ternary*25", heads=heads, times=True)
    assert_equal(case.run(softmax), case.reference(softmax))


@settings(max_examples=30, deadline=None)
@given(
    stages=st.sampled_from(STAGES),
    events=st.integers(1, 400),
    queries=st.integers(1, 40),
    times=st.booleans(),
    scaled=st.sampled_from([None, 0, 1, 9]),
    softmax=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_ranges(stages, events, queries, times, scaled, softmax, seed):
    case = Case(stages, 2, events, queries, times, seed, scaled=scaled)
    assert_equal(case.run(softmax), case.reference(softmax))


def test_large_scores_do_not_overflow():
    case = Case("ternary*25", scale=60.0, events=2000)
    mass, lse = case.run(True)
    assert mass.isfinite().all()
    assert_equal((mass, lse), case.reference(True), 1e-4)  # scores of 1,000 have no more digits in float32


@TIMES
def test_no_queries_and_no_events(times):
    case = Case("ternary*25", times=times)
    words, begin, end, scores, event_time, query_time, _ = case.tensors
    layout = None, *case.digits, True
    of_queries = None if query_time is None else query_time[:0]
    none = code_attention(words, begin[:0], end[:0], scores[:0], event_time, of_queries, *layout)
    assert [tuple(x.shape) for x in none] == [(0, *scores.shape[1:]), (0, 4)]
    zero = torch.zeros(9, dtype=torch.int64)
    of_events = None if event_time is None else event_time[:0]
    mass, lse = code_attention(words[:0], zero, zero, scores, of_events, query_time, *layout)
    assert not mass.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("stages", STAGES)
@SCALED
@TIMES
@SOFTMAX
def test_gradient_in_kernels_equals_the_reference(stages, scaled, times, softmax):
    case = Case(stages, times=times, scaled=scaled)
    mass, lse = case.reference(softmax)
    generator = torch.Generator().manual_seed(1)
    grad_mass, shift = (torch.randn(x.shape, generator=generator) for x in (mass, lse))
    actual = code_attention_backward(*case.tensors, grad_mass, lse.float(), shift, *case.digits, softmax)
    gradients = grad_mass.double(), lse, shift.double()
    assert_equal(actual, reference_backward(*case.doubles, *gradients, *case.digits, softmax))


@SCALED
@TIMES
@SOFTMAX
def test_gradient_of_scores_and_scale(scaled, times, softmax):
    case = Case("onehot:5,ternary*2", heads=2, events=12, queries=4, dtype=torch.float64, scaled=scaled, times=times)
    case.words_NW = torch.cat([case.words_NW, torch.randint(3, (12, 1))], dim=1)  # one more word, of one digit
    case.layout = CodeLayout((5, 3, 3, 3), (0, 0, 0, 1))
    case.scaled_digits = {None: 0, 1: 3, 9: 4}[scaled]
    case.scores_MVH = torch.randn(4, 14 + GAP_BUCKETS * times, 2, dtype=torch.float64)
    if times:
        case.query_time_M = case.event_time_N[:4] + torch.tensor([0, 5, 100, 9000])
    words, begin, end, scores, *times, scale = case.tensors

    def run(scores, scale):
        mass, lse = code_attention(words, begin, end, scores, *times, scale, *case.digits, softmax)
        return (mass, lse.masked_fill(end.unsqueeze(1) == begin.unsqueeze(1), 0.0)) if softmax else mass

    inputs = scores.requires_grad_(), None if scale is None else scale.requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)


@SCALED
@TIMES
def test_is_a_proper_operator(times, scaled):
    case = Case("onehot:300,ternary*50", events=30, queries=4, times=times, scaled=scaled)
    case.scores_MVH.requires_grad_()
    if scaled is not None:
        case.scale_N.requires_grad_()
    torch.library.opcheck(code_attention, (*case.tensors, *case.digits, True))


def test_compiles_in_one_graph():
    case = Case("ternary*25", events=50)
    gradients = []
    for run in (case.run, torch.compile(case.run, backend="aot_eager", fullgraph=True)):
        case.scores_MVH = case.scores_MVH.detach().requires_grad_()
        mass, _ = run(True)
        mass.square().sum().backward()
        gradients.append(case.scores_MVH.grad)
    torch.testing.assert_close(*gradients)


def test_threads_and_shares_of_queries_do_not_change_a_bit():
    case = Case("ternary*25", queries=64, times=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.cat([x.flatten() for x in case.run(True)]))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("heads", [4, 12])
@TIMES
@SOFTMAX
def test_long_histories_of_few_queries(heads, times, softmax):
    """They are read in pieces, which must add up: also where a query's history is short, or empty."""
    case = Case("ternary*25", events=12_001, queries=3, heads=heads, times=times, scaled=1)
    case.begin_M, case.end_M = torch.tensor([0, 5, 700]), torch.tensor([12_001, 5, 703])
    expected = case.reference(softmax)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_equal(case.run(softmax), expected, 1e-4)  # float32 sums of 12,000 numbers
    finally:
        torch.set_num_threads(before)


def test_gap_buckets_are_exact():
    gaps = [-5, 0, 1, 2, 3, 6, 7, 2**25 - 2, 2**25 - 1, 2**31 - 2, 2**31 - 1, 2**62]
    expected = [min(31, max(0, gap) + 1 and (max(0, gap) + 1).bit_length() - 1) for gap in gaps]
    assert gap_bucket(torch.tensor(gaps)).tolist() == expected


def test_bad_input_is_refused():
    case = Case("ternary*25")
    layout = None, *case.digits
    words, begin, end, scores, *_ = case.tensors
    with pytest.raises(ValueError, match=r"scores have shape \(9, 74, 4\), expected \[queries, 75, heads\]"):
        code_attention(words, begin, end, scores[:, 1:], None, None, *layout, True)
    with pytest.raises(ValueError, match="scores are torch.bfloat16; give them in float32"):
        code_attention(words, begin, end, scores.bfloat16(), None, None, *layout, True)
    with pytest.raises(ValueError, match="times of both"):
        code_attention(words, begin, end, scores, words[:, 0], None, *layout, True)
    for end_ in (end + 1, begin - 1):
        with pytest.raises(RuntimeError, match="reads events"):
            code_attention(words, begin, end_, scores, None, None, *layout, True)
        with pytest.raises(RuntimeError, match="reads events"):
            code_attention(words, begin, end_, scores.double(), None, None, *layout, True)
    with pytest.raises(
        ValueError, match=r"the scale is torch.float32 of shape \(699,\), expected torch.float32, one per"
    ):
        code_attention(words, begin, end, scores, None, None, torch.ones(699), *case.digits, True)
    with pytest.raises(ValueError, match="the first 7 of 25 digits do not end where a chunk of them does"):
        code_attention(words, begin, end, scores, None, None, torch.ones(700), *layout[1:3], 7, True)


def test_queries_that_read_the_same_are_as_others():
    """Whichever of them share events and times, and however many heads there are: each as if it were alone."""
    case = Case("onehot:300,ternary*50", events=700, queries=40, heads=3, times=True, scaled=1)
    words, _, _, scores, event_time, query_time, scale = case.tensors
    run_M = torch.arange(40) // 7
    begin_M, end_M = run_M * 20, 650 - run_M * 30
    query_time = query_time[run_M]
    layout = scale, *case.digits, True
    together = code_attention(words, begin_M, end_M, scores, event_time, query_time, *layout)
    for m in range(0, 40, 3):
        one = slice(m, m + 1)
        alone = code_attention(words, begin_M[one], end_M[one], scores[one], event_time, query_time[one], *layout)
        for actual, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(actual[one], expected, rtol=1e-4, atol=1e-6)


def test_bits_do_not_depend_on_the_number_of_threads():
    case = Case("ternary*25", events=700, queries=40, times=True, scaled=1)
    case.begin_M = torch.arange(40) // 7 * 20
    case.end_M = case.begin_M + 500
    case.query_time_M = case.query_time_M[case.begin_M // 20]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            mass, lse = case.run(True)
            gradients = code_attention_backward(*case.tensors, mass, lse, lse, *case.digits, True)
            results.append((mass, lse, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(x.equal(y) for x, y in zip(other, results[0], strict=True))
