"""top_events against a search by hand, and the kernels against the reference, to the last bit."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS
from sidrec_torchrec.ops.top_events import reference, top_events

STAGES = ["ternary", "ternary*25", "onehot:256,ternary*20", "onehot:300,ternary*50", "onehot:4*7"]


class TopCase:
    """Random events, of whose words the first are scaled, and queries over ranges that overlap, are empty or alike.

    With ``whole``, all numbers are small integers: no sum rounds, and many scores tie.
    """

    def __init__(self, stages, heads=2, events=700, queries=9, k=20, times=False, scaled=False, whole=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.spec = SIDSpec(parse_stages(stages), "test")
        columns = [torch.randint(r, (events,), generator=generator) for r in self.spec.radices]
        self.digits_NL = torch.stack(columns, dim=1)
        words_NW = self.spec.pack(self.digits_NL)
        ends = torch.randint(events + 1, (queries, 2), generator=generator).sort(1).values
        ends[0] = torch.tensor([0, events])
        if queries > 3:
            ends[1] = ends[2] = ends[0]
            ends[3, 1] = ends[3, 0]  # reads nothing
        radices, digit_words = list(self.spec.layout.radices), list(self.spec.layout.words)
        shape = queries, sum(radices) + GAP_BUCKETS * times, heads
        scores_MVH = torch.randint(-3, 4, shape, generator=generator).float()
        scale_N = torch.randint(1, 4, (events,), generator=generator).float() if scaled else None
        if not whole:
            scores_MVH += torch.randn(shape, generator=generator)
            scale_N = None if scale_N is None else scale_N * torch.rand(events, generator=generator)
        event_time_N = torch.randint(1 << 33, (events,), generator=generator) if times else None
        query_time_M = torch.randint(1 << 33, (queries,), generator=generator) if times else None
        self.tensors = (
            words_NW, ends[:, 0].contiguous(), ends[:, 1].contiguous(), scores_MVH, event_time_N, query_time_M, scale_N
        )  # fmt: skip
        # the first word alone, of several; else all digits
        self.layout = radices, digit_words, digit_words.count(0), k

    def run(self):
        return top_events(*self.tensors, *self.layout)

    def reference(self, dtype=torch.float32):
        return reference(
            *(x if x is None or not x.is_floating_point() else x.to(dtype) for x in self.tensors), *self.layout
        )

    def scores_by_hand(self):
        """Float64 scores of the events of each query, [T, H] each."""
        _, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N = (
            x if x is None else x.numpy() for x in self.tensors
        )
        radices, _, scaled_digits, _ = self.layout
        first_L = np.cumsum([0, *radices])
        for m in range(len(begin_M)):
            score_TH = np.zeros((end_M[m] - begin_M[m], scores_MVH.shape[2]))
            for t, event in enumerate(range(begin_M[m], end_M[m])):
                for j, digit in enumerate(self.digits_NL[event].tolist()):
                    scale = scale_N[event] if scale_N is not None and j < scaled_digits else 1
                    score_TH[t] += np.float64(scale) * scores_MVH[m, first_L[j] + digit]
                if event_time_N is not None:
                    gap = max(0, int(query_time_M[m] - event_time_N[event]))
                    score_TH[t] += scores_MVH[m, first_L[-1] + min((gap + 1).bit_length() - 1, GAP_BUCKETS - 1)]
            yield score_TH

    def by_hand(self):
        """The events and scores, as lists sort them."""
        k, (M, _, H) = self.layout[-1], self.tensors[3].shape
        event_MKH, score_MKH = np.full((M, k, H), -1), np.full((M, k, H), -np.inf)
        for m, score_TH in enumerate(self.scores_by_hand()):
            for h in range(H):
                best = sorted(range(len(score_TH)), key=lambda t, h=h: (-score_TH[t, h], t))[:k]
                event_MKH[m, : len(best), h] = int(self.tensors[1][m]) + np.array(best, dtype=int)
                score_MKH[m, : len(best), h] = score_TH[best, h]
        return torch.from_numpy(event_MKH), torch.from_numpy(score_MKH)


def assert_same(actual, expected):
    """Events and the bits of scores, which NaN has too."""
    (event, score), (expected_event, expected_score) = actual, expected
    assert event.equal(expected_event)
    torch.testing.assert_close(score, expected_score, rtol=0, atol=0, equal_nan=True)


CASES = {
    "stages": st.sampled_from(STAGES),
    "heads": st.sampled_from([1, 2, 3, 9]),
    "events": st.integers(1, 300),
    "queries": st.integers(1, 20),
    "k": st.sampled_from([1, 2, 7, 400]),
    "times": st.booleans(),
    "scaled": st.booleans(),
    "seed": st.integers(0, 99),
}


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_equals_a_search_by_hand_ties_included(**options):
    case = TopCase(**options, whole=True)
    event, score = case.by_hand()
    assert_same(case.run(), (event, score.float()))
    assert_same(case.reference(), (event, score.float()))
    assert_same(case.reference(torch.float64), (event, score))


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_kernel_equals_the_reference_to_the_last_bit(**options):
    case = TopCase(**options)
    event, score = case.run()
    assert_same((event, score), case.reference())
    torch.testing.assert_close(score.double(), case.by_hand()[1], rtol=1e-4, atol=1e-4)


def test_long_histories():
    case = TopCase("ternary*25", heads=3, events=10_000, queries=5, k=64, scaled=True)
    assert_same(case.run(), case.reference())
    # scores as the sorted words themselves: rising, each event beats all before it; falling, none does
    words_NW = case.tensors[0].sort(0).values
    number_V1 = (3.0 ** torch.arange(24, -1, -1).unsqueeze(1) * torch.arange(3)).view(-1, 1)
    for sign in (1, -1):
        scores_MVH = (sign * number_V1).expand_as(case.tensors[3])
        arguments = words_NW, *case.tensors[1:3], scores_MVH, None, None, None, *case.layout
        event, score = top_events(*arguments)
        assert_same((event, score), reference(*arguments))
        last = range(9_999, 9_935, -1)
        assert event[0, :, 0].sort().values.tolist() == (sorted(last) if sign > 0 else list(range(64)))


def one_digit(scores, k, **others):
    """The places of one query of one head, over events whose only digit chooses the score of their own index."""
    T = len(scores)
    given_ = {"scale_N": None, "scaled_digits": 0} | others
    table_MVH = torch.tensor(scores).view(1, T, 1)
    arguments = torch.arange(T).unsqueeze(1), torch.tensor([0]), torch.tensor([T]), table_MVH, None, None
    arguments = *arguments, given_["scale_N"], [T], [0], given_["scaled_digits"], k
    event, score = top_events(*arguments)
    assert_same((event, score), reference(*arguments))
    return event.flatten().tolist(), score.flatten().tolist()


def test_equal_scores_come_in_the_order_of_events():
    assert one_digit([1.0, 2.0, 1.0, 2.0, 1.0], 4) == ([1, 3, 0, 2], [2.0, 2.0, 1.0, 1.0])
    assert one_digit([0.0] * 500, 100)[0] == list(range(100))


def test_zeros_of_both_signs_are_equal():
    events, scores = one_digit([-1.0, -0.0, 0.0, -0.0], 3)
    assert events == [1, 2, 3]
    assert str(scores) == "[0.0, 0.0, 0.0]"


@pytest.mark.parametrize("k", [1, 3, 5, 8, 40])
def test_nan_comes_after_all_numbers(k):
    inf, nan = math.inf, math.nan
    scores = [nan, -inf, 3.0, -nan, inf, -inf, nan] * 4
    order = sorted(
        range(len(scores)), key=lambda t: (math.isnan(scores[t]), 0 if math.isnan(scores[t]) else -scores[t])
    )
    events, found = one_digit(scores, k)
    assert events == (order + [-1] * 40)[:k]
    assert str(found) == str(([scores[t] for t in order] + [-inf] * 40)[:k]).replace("-nan", "nan")


def test_a_scale_changes_the_order():
    scale_N = torch.tensor([1.0, -1.0, 0.5, 3.0])
    assert one_digit([2.0, -4.0, 2.0, 1.0], 3, scale_N=scale_N, scaled_digits=1) == ([1, 3, 0], [4.0, 3.0, 2.0])
    assert one_digit([2.0, -4.0, 2.0, 1.0], 2, scale_N=scale_N, scaled_digits=0) == ([0, 2], [2.0, 2.0])
    # without a scale the number of scaled digits is not looked at
    assert one_digit([2.0, -4.0, 2.0, 1.0], 2, scaled_digits=1) == ([0, 2], [2.0, 2.0])
    assert one_digit([2.0, -4.0, 2.0, 1.0], 2, scaled_digits=99) == ([0, 2], [2.0, 2.0])


@pytest.mark.parametrize("heads", [1, 3, 5, 8])
def test_scales_that_are_not_finite(heads):
    case = TopCase("onehot:4*7", heads=heads, events=300, k=100, scaled=True)
    case.tensors[-1][::7] = torch.inf
    case.tensors[-1][::5] = torch.nan
    assert_same(case.run(), case.reference())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_scale_of_another_dtype_is_read_as_the_scores_are(dtype):
    case = TopCase("onehot:300,ternary*50", scaled=True, whole=True)
    *tensors, scale_N = case.tensors
    assert_same(top_events(*tensors, scale_N.to(dtype), *case.layout), case.run())


@pytest.mark.parametrize("times", [False, True])
def test_integers_of_any_width(times):
    case = TopCase("ternary*14", times=times, scaled=True)
    tensors = [x if x is None or x.is_floating_point() else x.clamp(max=2**31 - 1) for x in case.tensors]
    narrow = [x if x is None or x.is_floating_point() else x.int() for x in tensors]
    event, score = top_events(*narrow, *case.layout)
    assert event.dtype == torch.int64
    assert_same((event, score), top_events(*tensors, *case.layout))
    assert_same((event, score), reference(*narrow, *case.layout))


def test_no_queries_and_no_events():
    case = TopCase("ternary*25")
    words, begin, end, scores, *others = case.tensors
    event, score = top_events(words, begin[:0], end[:0], scores[:0], *others, *case.layout)
    assert event.shape == score.shape == (0, 20, 2)
    zero = torch.zeros_like(begin)
    for run in (top_events, reference):
        event, score = run(words[:0], zero, zero, scores, *others, *case.layout)
        assert event.shape == score.shape == (9, 20, 2)
        assert (event == -1).all() and (score == -torch.inf).all()


def test_threads_and_other_queries_do_not_change_a_bit():
    case = TopCase("onehot:300,ternary*50", heads=1, queries=40, times=True, scaled=True)
    expected, threads = case.reference(), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert_same(case.run(), expected)
    finally:
        torch.set_num_threads(threads)
    words, begin, end, scores, event_time, query_time, scale = case.tensors
    for one in (slice(m, m + 1) for m in range(0, 40, 7)):
        tensors = words, begin[one], end[one], scores[one], event_time, query_time[one], scale
        assert_same(top_events(*tensors, *case.layout), [x[one] for x in expected])


def test_is_a_proper_operator():
    case = TopCase("onehot:300,ternary*50", events=30, queries=4, times=True, scaled=True)
    torch.library.opcheck(top_events, (*case.tensors, *case.layout))


def test_no_gradient_goes_through_the_choice():
    case = TopCase("ternary*25")
    case.tensors[3].requires_grad_()
    _, score = case.run()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        score.sum().backward()


class Newest(nn.Module):
    """The times of the events that a query chooses."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N):
        event_MKH, score_MKH = top_events(
            words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N, *self.layout
        )
        return event_time_N[event_MKH.clamp_min(0)] * (event_MKH >= 0), score_MKH


def test_compiles_in_one_graph():
    case = TopCase("onehot:300,ternary*50", events=50, times=True, scaled=True)
    module = Newest(case.layout)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*case.tensors), module(*case.tensors))


def test_exports_with_any_number_of_events_and_queries():
    case, other = (
        TopCase("onehot:300,ternary*50", events=n, queries=m, times=True, scaled=True) for n, m in ((50, 6), (400, 11))
    )
    module = Newest(case.layout)
    N, M = torch.export.Dim("N"), torch.export.Dim("M")
    shapes = [{0: N}, {0: M}, {0: M}, {0: M}, {0: N}, {0: M}, {0: N}]
    program = torch.export.export(module, case.tensors, dynamic_shapes=shapes)
    assert_same(program.module()(*other.tensors), module(*other.tensors))


def test_bad_input_is_refused():
    case = TopCase("onehot:300,ternary*50", times=True, scaled=True)
    names = [name.rstrip("NWMVH").rstrip("_") for name in inspect.signature(reference).parameters]
    good = dict(zip(names, (*case.tensors, *case.layout), strict=True))

    def refuses(error, message, **bad):
        for run in (top_events, reference):
            with pytest.raises(error, match=message):
                run(*(good | bad).values())

    refuses(ValueError, "k is 0, expected 1 or more", k=0)
    refuses(
        ValueError, r"scores have shape \(9, 481, 2\), expected \[queries, 482, heads\]", scores=good["scores"][:, 1:]
    )
    refuses(ValueError, "scores are torch.bfloat16; give them in float32", scores=good["scores"].bfloat16())
    refuses(ValueError, "times of both", query_time=None)
    refuses(ValueError, r"event_time has shape \(699,\), expected \[700\]", event_time=good["event_time"][1:])
    refuses(ValueError, r"begin has shape \(8,\), expected \[9\]", begin=good["begin"][1:])
    refuses(ValueError, r"scale has shape \(700, 1\), expected \[700\]", scale=good["scale"].unsqueeze(1))
    refuses(ValueError, "scale is torch.int64; give it in floats", scale=good["event_time"])
    for digits in (52, -1, 5):
        refuses(ValueError, f"the first {digits} of 51 digits", scaled_digits=digits)
    for bad in ({"end": good["end"] + 1}, {"end": good["begin"] - 1}, {"begin": good["begin"] - 1}):
        refuses(RuntimeError, "reads events", **bad)
