"""The CUDA operators against the reference: on a GPU where there is one, else interpreted on the CPU."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ops import code_attention, cuda, side_decode, top_events
from sidrec_torchrec.ops.kernels import kernel_runs
from tests.ops.test_code_attention import SOFTMAX, TIMES, Case, assert_equal
from tests.ops.test_missing import without_some
from tests.ops.test_side_decode import arguments, make_inputs
from tests.ops.test_top_events import TopCase, assert_same

OPERATORS = (side_decode.side_decode, code_attention.code_attention)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGES = ["ternary*14", "onehot:300,ternary*36", "onehot:4*7"]


@pytest.fixture
def triton():
    """Triton; tests are skipped where there is none, or where it cannot interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if DEVICE == "cpu" and version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"without a GPU: the interpreter of triton {triton.__version__} needs numpy below 2.4")
    return triton


class TestSideDecode:
    @pytest.mark.parametrize("stages", STAGES)
    @pytest.mark.parametrize("rows", [0, 1, 130])
    @pytest.mark.parametrize("dim", [25, 64])
    def test_equals_the_reference(self, triton, stages, rows, dim):
        words_NW, table_RD, chunks = decode_inputs(stages, rows, dim)
        assert_equal(
            [run_decode(words_NW, table_RD, chunks)],
            [side_decode.reference(words_NW, table_RD, *chunks)],
        )
        grad_ND = torch.randn(rows, dim)
        actual_RD = run_decode_backward(words_NW, grad_ND, chunks)
        assert_equal([actual_RD], [side_decode.reference_backward(words_NW, grad_ND.double(), *chunks)])

    @pytest.mark.parametrize("limit", [3, 100])
    def test_any_chunks(self, triton, limit):
        words_NW, table_RD, chunks = decode_inputs("onehot:5,ternary*30", 70, 9, limit)
        assert_equal(
            [run_decode(words_NW, table_RD, chunks)],
            [side_decode.reference(words_NW, table_RD, *chunks)],
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_summed_in_float32(self, triton, dtype):
        words_NW, table_RD, chunks = decode_inputs("ternary*25", 200, 40)
        table_RD, grad_ND = table_RD.to(dtype), torch.randn(200, 40).to(dtype)
        decoded_ND = run_decode(words_NW, table_RD, chunks)
        grad_RD = run_decode_backward(words_NW, grad_ND, chunks)
        assert decoded_ND.dtype == grad_RD.dtype == dtype
        tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
        expected_ND = side_decode.reference(words_NW, table_RD.double(), *chunks)
        torch.testing.assert_close(decoded_ND.double(), expected_ND, **tolerance)
        expected_RD = side_decode.reference_backward(words_NW, grad_ND.double(), *chunks)
        torch.testing.assert_close(grad_RD.double(), expected_RD, **tolerance)

    @pytest.mark.parametrize("stages", STAGES)
    def test_missing_sids_choose_no_rows(self, triton, stages):
        words_NW, table_RD, chunks = decode_inputs(stages, 130, 25)
        words_NW = without_some(words_NW)
        assert_equal([run_decode(words_NW, table_RD, chunks)], [side_decode.reference(words_NW, table_RD, *chunks)])
        grad_ND = torch.randn(130, 25)
        expected_RD = side_decode.reference_backward(words_NW, grad_ND.double(), *chunks)
        assert_equal([run_decode_backward(words_NW, grad_ND, chunks)], [expected_RD])

    def test_words_out_of_range_read_rows_of_the_right_chunks(self, triton):
        radices = [100, 243, 7, 300, 9]
        chunks = radices, [0, 0, 0, 1, 1]
        numbers = [-1, 1 << 62, torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, 1 << 31]
        words_NW = torch.tensor([[a, b] for a in numbers for b in numbers])
        # one column per chunk: a row of another chunk, or of none, would not give a one in each
        table_RF = torch.repeat_interleave(torch.eye(5), torch.tensor(radices), dim=0)
        expected_NF = (words_NW >= 0)[:, chunks[1]].float()  # a negative word has none
        assert run_decode(words_NW, table_RF, chunks).equal(expected_NF)


class TestTopEvents:
    @pytest.mark.parametrize("stages", STAGES)
    @pytest.mark.parametrize("times", [False, True])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_equals_the_reference_to_the_last_bit(self, triton, stages, times, scaled):
        check_top_events(TopCase(stages, events=300, queries=5, times=times, scaled=scaled))

    @pytest.mark.parametrize("stages", STAGES)
    def test_missing_sids_score_nothing(self, triton, stages):
        case = TopCase(stages, events=300, queries=5, times=True, scaled=True)
        case.tensors = without_some(case.tensors[0]), *case.tensors[1:]
        check_top_events(case)

    @pytest.mark.parametrize("heads", [1, 3, 13])
    def test_any_number_of_heads(self, triton, heads):
        check_top_events(TopCase("ternary*6", heads=heads, events=130, queries=4))

    def test_equal_scores_and_places_left_over(self, triton):
        check_top_events(TopCase("onehot:4*3", events=200, queries=6, k=250, whole=True))

    def test_queries_that_do_not_fit_at_once(self, triton, monkeypatch):
        monkeypatch.setattr("sidrec_torchrec.ops.triton.top_events._BYTES", 20_000)
        check_top_events(TopCase("ternary*6", events=200, queries=17, times=True, scaled=True))

    def test_nan_infinities_and_zeros(self, triton):
        case = TopCase("ternary*3", heads=1, events=200, k=200)
        case.tensors[3][:, :5, 0] = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0])
        check_top_events(case)

    def test_words_out_of_range_read_rows_of_the_right_chunks(self, triton):
        numbers = [-1, 1 << 62, torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, 1 << 31]
        words_NW = torch.tensor([[a, b] for a in numbers for b in numbers])
        radices, digit_words = [100, 243, 7, 300, 9], [0, 0, 0, 1, 1]
        # a power of 16 per digit: a row of another, or of none, would not give 1 + 16 + 256 + 4096 + 65536
        powers_VH = (16.0 ** torch.arange(5)).repeat_interleave(torch.tensor(radices)).view(1, -1, 1)
        tensors = words_NW, torch.tensor([0]), torch.tensor([25]), powers_VH, None, None, None
        event, score = cuda.top_events(*move(tensors), radices, digit_words, 0, 25)
        # a negative word has none
        expected_N = ((words_NW[:, 0] >= 0) * 0x111 + (words_NW[:, 1] >= 0) * 0x11000).float()
        best_N = expected_N.argsort(descending=True, stable=True)
        assert event.flatten().tolist() == best_N.tolist()
        assert score.flatten().tolist() == expected_N[best_N].tolist()

    def test_no_queries_and_no_events(self, triton):
        case = TopCase("ternary*25", queries=3)
        words, begin, end, scores, *others = move(case.tensors)
        event, score = cuda.top_events(words, begin[:0], end[:0], scores[:0], *others, *case.layout)
        assert event.shape == score.shape == (0, 20, 2)
        zero = torch.zeros_like(begin)
        event, score = cuda.top_events(words[:0], zero, zero, scores, *others, *case.layout)
        assert (event == -1).all() and (score == -torch.inf).all()

    def test_runs_where_results_must_be_deterministic(self, triton):
        torch.use_deterministic_algorithms(True)
        try:
            assert kernel_runs(top_events.top_events, "cuda", torch.float32)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_events_that_are_not_there_are_refused(self, triton):
        words, begin, end, *others = move(TopCase("ternary*25").tensors)
        with pytest.raises(RuntimeError, match="reads events that are not there"):
            cuda.top_events(words, begin, end + 1, *others, [3] * 25, [0] * 25, 25, 5)


class TestCodeAttention:
    @pytest.mark.parametrize(
        ("stages", "times", "scaled", "softmax"),
        [
            *[("ternary*14", times, None, softmax) for times in (False, True) for softmax in (True, False)],
            *[("onehot:9,ternary*39", times, 1, softmax) for times in (False, True) for softmax in (True, False)],
            ("onehot:300,ternary*36", True, 9, True),
            ("onehot:4*7", False, None, False),
        ],
    )
    def test_equals_the_reference(self, triton, stages, times, scaled, softmax):
        check_attention(Case(stages, heads=3, events=300, queries=4, times=times, scaled=scaled), softmax)

    @SOFTMAX
    @pytest.mark.parametrize(
        ("stages", "scaled"), [("ternary*14", None), ("onehot:9,ternary*39", 1), ("onehot:4*7", 9)]
    )
    def test_missing_sids_add_nothing(self, triton, stages, scaled, softmax):
        case = Case(stages, heads=3, events=300, queries=4, times=True, scaled=scaled)
        case.words_NW = without_some(case.words_NW)
        check_attention(case, softmax)

    @pytest.mark.parametrize("heads", [1, 3, 13])
    def test_any_number_of_heads(self, triton, heads):
        check_attention(Case("ternary*6", heads=heads, events=70, queries=4), True)

    def test_large_scores_do_not_overflow(self, triton):
        case = Case("ternary*25", heads=2, scale=60.0, events=600, queries=1)
        mass, lse = run_attention(case, True)
        assert mass.isfinite().all()
        assert_equal((mass, lse), case.reference(True), 1e-4)  # scores of 1,000 have no more digits in float32

    def test_events_may_be_masked_by_minus_infinity(self, triton):
        case = Case("onehot:4*3", heads=1, events=300, queries=1)
        case.scores_MVH[0, 1] = -torch.inf
        mass, lse = run_attention(case, True)
        assert mass[0, 1] == 0
        assert_equal((mass, lse), case.reference(True))

    def test_time_gaps_are_exact(self, triton):
        gaps = [-5, 0, 1, 2, 3, 6, 7, 2**25 - 2, 2**25 - 1, 2**31 - 2, 2**31 - 1, 2**32 - 2, 2**32 - 1, 2**62]
        case = Case("ternary", heads=1, events=len(gaps), queries=1, times=True)
        case.query_time_M, case.event_time_N = torch.tensor([2**62]), 2**62 - torch.tensor(gaps)
        case.scores_MVH[:] = 0.0
        mass, _ = run_attention(case, True)
        buckets = torch.bincount(code_attention.gap_bucket(torch.tensor(gaps)), minlength=code_attention.GAP_BUCKETS)
        torch.testing.assert_close(mass[0, 3:, 0] * len(gaps), buckets.float())

    def test_no_queries_and_no_events(self, triton):
        case = Case("ternary*25", queries=3)
        words, begin, end, scores, *_ = move(case.tensors)
        layout = None, *case.digits
        none = cuda.code_attention(words, begin[:0], end[:0], scores[:0], None, None, *layout, True)
        assert [tuple(x.shape) for x in none] == [(0, 75, 4), (0, 4)]
        zero = torch.zeros_like(begin)
        mass, lse = cuda.code_attention(words[:0], zero, zero, scores, None, None, *layout, True)
        assert not mass.any() and (lse == -torch.inf).all()

    @pytest.mark.skipif(DEVICE == "cuda", reason="a device assertion would end the process's use of the GPU")
    def test_events_that_are_not_there_are_refused(self, triton):
        case = Case("ternary*25", queries=3)
        case.end_M = case.end_M + 1
        with pytest.raises(RuntimeError, match="reads events that are not there"):
            run_attention(case, True)


class TestChoice:
    def test_without_triton_the_reference_runs_after_one_warning(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        cuda.problem.cache_clear()
        try:
            with pytest.warns(UserWarning, match="Triton cannot be imported") as warnings:
                chosen = [kernel_runs(op, "cuda", torch.float32) for op in OPERATORS]
            assert chosen == [False, False] and len(warnings) == 1
        finally:
            cuda.problem.cache_clear()

    def test_on_cuda_triton_runs_unless_results_must_be_deterministic(self, triton):
        assert kernel_runs(code_attention.code_attention, "cuda", torch.float32)
        assert not kernel_runs(code_attention.code_attention, "cuda", torch.float64)
        torch.use_deterministic_algorithms(True)
        try:
            assert not kernel_runs(code_attention.code_attention, "cuda", torch.float32)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
class TestOnGPU:
    """The operators themselves, gradients included: which needs a GPU."""

    def test_side_decode(self, triton):
        words_NW, table_RD, chunks = decode_inputs("onehot:300,ternary*50", 5000, 128)
        actual, expected = table_RD.cuda().requires_grad_(), table_RD.double().requires_grad_()
        grad_ND = torch.randn(5000, 128)
        for table, words, grad in ((actual, words_NW.cuda(), grad_ND.cuda()), (expected, words_NW, grad_ND.double())):
            side_decode.side_decode(words, table, *chunks).backward(grad)
        assert_equal([actual.grad.cpu()], [expected.grad])

    @TIMES
    @SOFTMAX
    def test_code_attention(self, triton, times, softmax):
        case = Case("onehot:256,ternary*20", heads=4, events=20_000, queries=40, times=times, scaled=1)
        grad_mass = torch.randn(case.scores_MVH.shape)
        gradients = []
        for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
            words, begin, end, scores, *moments, scale = move(case.tensors, device)
            inputs = [x.to(dtype).requires_grad_() for x in (scores, scale)]
            mass, _ = code_attention.code_attention(
                words, begin, end, inputs[0], *moments, inputs[1], *case.digits, softmax
            )
            mass.backward(grad_mass.to(device, dtype))
            gradients.append([x.grad.cpu() for x in inputs])
        assert_equal(*gradients)


def decode_inputs(stages, rows, dim, limit=256):
    spec = SIDSpec(parse_stages(stages), "test")
    words_NW, table_RD, *chunks = arguments(spec, *make_inputs(spec, dim, rows)[1:], limit)
    return words_NW, table_RD, chunks


def run_decode(words_NW, table_RD, chunks):
    return cuda.side_decode(*move((words_NW, table_RD)), *chunks).cpu()


def run_decode_backward(words_NW, grad_ND, chunks):
    return cuda.side_decode_backward(*move((words_NW, grad_ND)), *chunks).cpu()


def run_attention(case, softmax):
    return [x.cpu() for x in cuda.code_attention(*move(case.tensors), *case.digits, softmax)]


def check_attention(case, softmax):
    mass, lse = case.reference(softmax)
    assert_equal(run_attention(case, softmax), (mass, lse))
    generator = torch.Generator().manual_seed(1)
    grad_mass, shift = (torch.randn(x.shape, generator=generator) for x in (mass, lse))
    given = move((*case.tensors, grad_mass, lse.float(), shift))
    actual = [x.cpu() for x in cuda.code_attention_backward(*given, *case.digits, softmax)]
    gradients = grad_mass.double(), lse, shift.double()
    assert_equal(actual, code_attention.reference_backward(*case.doubles, *gradients, *case.digits, softmax))


def check_top_events(case):
    assert_same([x.cpu() for x in cuda.top_events(*move(case.tensors), *case.layout)], case.reference())


def move(tensors, device=DEVICE):
    return [tensor if tensor is None else tensor.to(device) for tensor in tensors]
