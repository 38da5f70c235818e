"""``code_attention``: attention over packed SIDs that never decodes them.

A key is a linear map of an event's digits, so a query's score of an event is a sum of one number per digit: the query's
product with that digit value's row, computed once per query. A value is a linear map of the digits too, so the sum of
weighted values needs of the events only how much weight fell on each value of each digit, their *mass*. Between the two
stands an operator on codes alone, whose cost does not depend on the width of keys and values.

Source: asymmetric distance computation (Jegou et al. 2011, section III) for the scores; the masses are its adjoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidrec_torchrec.ops.kernels import define
from sidrec_torchrec.ops.layout import CodeLayout, Joined, with_no_row

GAP_BUCKETS = 32  # powers of two of the time unit: up to 136 years of seconds


def reference(
    words_NW: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    scores_MVH: Tensor,
    event_time_N: Tensor | None,
    query_time_M: Tensor | None,
    scale_N: Tensor | None,
    radices: Sequence[int],
    digit_words: Sequence[int],
    scaled_digits: int,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """How much weight each query gives to each value of each digit of the events it reads.

    In plain PyTorch: memory for a score per pair of query and event, which kernels never hold.

    The score of event t for query m is ``sum_j scores_MVH[m, first_j + digit_tj]``, where ``first_j`` is the sum of the
    radices before digit j, plus, with times, ``scores_MVH[m, V - GAP_BUCKETS + gap_bucket(query_time - event_time)]``.
    With a scale, the terms of the first ``scaled_digits`` digits, and what the event adds to their masses, are multiplied by
    it: so that keys and values may be linear maps of an event's vector divided by its norm, as by a LayerNorm.

    Args:
        words_NW: packed SIDs of all events, integers. Not checked: a word out of range is read as some other SID; but
            the digits of a negative word, as a missing SID's, add nothing to scores and masses, and what is left counts:
            digits of other words, time gaps, and that there is an event.
        begin_M, end_M: query m reads events begin_m .. end_m - 1, integers; queries may share events, or read none.
        scores_MVH: per query, row and head: a row per digit and value, then, with times, one per time-gap bucket;
            float32 or float64.
        event_time_N, query_time_M: integers, or both None.
        scale_N: of each event, in the dtype of the scores; None for 1.
        radices, digit_words: the digits, as ``CodeLayout`` has them.
        scaled_digits: how many of them the scale is for; the others stand in other words.
        softmax: weights are the softmax of a query's scores; else silu(score), not normalized (HSTU's pointwise
            attention; Zhai et al. 2024, section 3.2).

    Returns:
        The masses, [M, V, H]: per query and head, the sum of the weights of the events whose digit has that value (of
        scaled digits, of weight times scale); and the logarithm of the softmax's denominator, [M, H], -inf where a query reads nothing; zeros without softmax.

    Raises:
        ValueError: if scores or scale have another shape or dtype, only one time is given, or scaled digits share a word with
            others.
        RuntimeError: if a query reads events that are not there (on CUDA, a device assertion).
    """
    inputs = words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N
    check(*inputs, radices, digit_words, scaled_digits, softmax)
    joined = CodeLayout(tuple(radices), tuple(digit_words)).join()
    pairs = _Pairs.of(words_NW, begin_M, end_M, event_time_N, query_time_M, scale_N, joined, scaled_digits)
    score_PH = pairs.scores(expand(scores_MVH, joined))
    M, _, H = scores_MVH.shape
    if not softmax:
        weight_PH = torch.nn.functional.silu(score_PH)
        return pairs.masses(weight_PH, M, joined), scores_MVH.new_zeros(M, H)
    index_PH = pairs.query_P.unsqueeze(1).expand(-1, H)
    most_MH = scores_MVH.new_full((M, H), -torch.inf).scatter_reduce(0, index_PH, score_PH, "amax")
    weight_PH = (score_PH - most_MH[pairs.query_P]).exp()
    sum_MH = scores_MVH.new_zeros(M, H).index_add(0, pairs.query_P, weight_PH)
    mass_MVH = pairs.masses(weight_PH / sum_MH[pairs.query_P], M, joined)
    return mass_MVH, most_MH + sum_MH.log()


code_attention = define("code_attention", reference)


@code_attention.register_fake
def _(words_NW, begin_M, end_M, scores_MVH, *others):
    M, _, H = scores_MVH.shape
    return torch.empty_like(scores_MVH, memory_format=torch.contiguous_format), scores_MVH.new_empty(M, H)


def reference_backward(
    words_NW: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    scores_MVH: Tensor,
    event_time_N: Tensor | None,
    query_time_M: Tensor | None,
    scale_N: Tensor | None,
    grad_mass_MVH: Tensor,
    lse_MH: Tensor,
    shift_MH: Tensor,
    radices: Sequence[int],
    digit_words: Sequence[int],
    scaled_digits: int,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``code_attention``'s scores, [M, V, H], and scale, [N], or [0] without one.

    An event's weight has the gradient g, the sum of its digits' rows of ``grad_mass_MVH``; its score, with softmax,
    ``weight * (g + shift)``, where the shift (less the weighted mean of g, plus the gradient of the logarithm) is the
    same for all events of a query and needs no pass over them. The scale of an event has that of its score times the scaled
    terms of the score, plus its weight times the scaled terms of g, over all queries and heads.
    """
    inputs = words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N
    check(*inputs, radices, digit_words, scaled_digits, softmax)
    joined = CodeLayout(tuple(radices), tuple(digit_words)).join()
    pairs = _Pairs.of(words_NW, begin_M, end_M, event_time_N, query_time_M, scale_N, joined, scaled_digits)
    table_MRH, grad_MRH = expand(scores_MVH, joined), expand(grad_mass_MVH, joined)
    score_PH, grad_PH = pairs.scores(table_MRH), pairs.scores(grad_MRH)
    if softmax:
        weight_PH = (score_PH - lse_MH[pairs.query_P]).exp()
        grad_PH = weight_PH * (grad_PH + shift_MH[pairs.query_P])
    else:
        sigmoid_PH = score_PH.sigmoid()
        weight_PH = score_PH * sigmoid_PH
        grad_PH = grad_PH * sigmoid_PH * (1 + score_PH * (1 - sigmoid_PH))
    grad_scores_MVH = pairs.masses(grad_PH, len(scores_MVH), joined)
    if scale_N is None:
        return grad_scores_MVH, scores_MVH.new_zeros(0)
    of_scale_PH = grad_PH * pairs.scaled_terms(table_MRH) + weight_PH * pairs.scaled_terms(grad_MRH)
    return grad_scores_MVH, torch.zeros_like(scale_N).index_add(0, pairs.event_P, of_scale_PH.sum(1))


code_attention_backward = define("code_attention_backward", reference_backward)


@code_attention_backward.register_fake
def _(words, begin, end, scores_MVH, event_time, query_time, scale_N, *others):
    grad_scores_MVH = torch.empty_like(scores_MVH, memory_format=torch.contiguous_format)
    return grad_scores_MVH, scores_MVH.new_empty(0 if scale_N is None else scale_N.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.radices, ctx.digit_words, ctx.scaled_digits, ctx.softmax = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_mass_MVH: Tensor, grad_lse_MH: Tensor) -> tuple:
    *inputs, mass_MVH, lse_MH = ctx.saved_tensors
    # mass times gradient, summed over all digits, is the sum of weight times g
    shift_MH = grad_lse_MH - (mass_MVH * grad_mass_MVH).sum(1)
    layout = ctx.radices, ctx.digit_words, ctx.scaled_digits, ctx.softmax
    grad_MVH, grad_N = code_attention_backward(*inputs, grad_mass_MVH, lse_MH, shift_MH, *layout)
    return None, None, None, grad_MVH, None, None, None if inputs[-1] is None else grad_N, None, None, None, None


code_attention.register_autograd(_backward, setup_context=_setup_context)


def gap_bucket(gap: Tensor) -> Tensor:
    """Logarithmic bucket of a time gap: floor(log2(gap + 1)), exact, int32 in [0, GAP_BUCKETS); negative gaps count as 0.

    Args:
        gap: integers of any dtype, of any shape.
    """
    first_K = (
        1 << torch.arange(1, GAP_BUCKETS, device=gap.device)
    ) - 1  # the smallest gap of each bucket but the first
    return torch.bucketize(gap.long(), first_K, right=True, out_int32=True)


@dataclass(frozen=True)
class _Pairs:
    """Every pair of a query and an event it reads.

    Args:
        query_P, event_P: int64.
        rows_PC: int64, the rows that the event's chunks, and its time gap, choose of a table as ``expand`` makes it.
        scaled: how many of the columns the scale is for.
        scale_P1: of the event; None for 1.
    """

    query_P: Tensor
    event_P: Tensor
    rows_PC: Tensor
    scaled: int
    scale_P1: Tensor | None

    @staticmethod
    def of(words_NW, begin_M, end_M, event_time_N, query_time_M, scale_N, joined: Joined, scaled_digits) -> "_Pairs":
        check_ranges(words_NW, begin_M, end_M)
        query_P, event_P = pairs_of(begin_M, end_M)
        rows_PC = joined.chunks.rows(words_NW)[event_P]
        if event_time_N is not None:
            gap_P = gap_bucket(query_time_M.long()[query_P] - event_time_N.long()[event_P])
            rows_PC = torch.cat([rows_PC, (joined.chunks.num_values + 1 + gap_P).unsqueeze(1)], dim=1)
        if scale_N is None:
            return _Pairs(query_P, event_P, rows_PC, 0, None)
        return _Pairs(query_P, event_P, rows_PC, joined.chunks_of_first(scaled_digits), scale_N[event_P].unsqueeze(1))

    def scores(self, table_MRH: Tensor) -> Tensor:
        """[P, H]: the sum of the rows each pair chooses of its query's table, some of them scaled."""
        others_PH = self._sum_rows(table_MRH, self.rows_PC[:, self.scaled :])
        return others_PH if self.scale_P1 is None else others_PH + self.scale_P1 * self.scaled_terms(table_MRH)

    def scaled_terms(self, table_MRH: Tensor) -> Tensor:
        """[P, H]: what the scale multiplies in ``scores``."""
        return self._sum_rows(table_MRH, self.rows_PC[:, : self.scaled])

    def masses(self, weight_PH: Tensor, M: int, joined: Joined) -> Tensor:
        """[M, V, H]: the adjoint of ``expand`` and ``scores``."""
        R = joined.chunks.num_values
        rows = R + 1 + (GAP_BUCKETS if self.rows_PC.shape[1] > len(joined.counts) else 0)
        flat = weight_PH.new_zeros(M * rows, weight_PH.shape[1])
        for column, rows_P in enumerate(self.rows_PC.T):
            own_PH = weight_PH if self.scale_P1 is None or column >= self.scaled else weight_PH * self.scale_P1
            flat.index_add_(0, self.query_P * rows + rows_P, own_PH)
        mass_MRH = flat.unflatten(0, (M, rows))
        return torch.cat([joined.sum_out(mass_MRH[:, :R]), mass_MRH[:, R + 1 :]], dim=1)

    def _sum_rows(self, table_MRH: Tensor, rows_PC: Tensor) -> Tensor:
        flat = table_MRH.flatten(0, 1)
        sum_PH = flat.new_zeros(len(rows_PC), flat.shape[1])
        for rows_P in rows_PC.T:
            sum_PH = sum_PH + flat[self.query_P * table_MRH.shape[1] + rows_P]
        return sum_PH


def pairs_of(begin_M: Tensor, end_M: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of a query and a place it reads, begin .. end - 1, query after query: int64 [P] each."""
    begin_M, length_M = begin_M.long(), end_M.long() - begin_M.long()
    query_P = torch.repeat_interleave(length_M)
    before_M = length_M.cumsum(0) - length_M
    return query_P, torch.arange(len(query_P), device=query_P.device) + (begin_M - before_M)[query_P]


def check_ranges(words_NW: Tensor, begin_M: Tensor, end_M: Tensor) -> None:
    """Refuses queries that read events that are not there."""
    if not bool(((0 <= begin_M) & (begin_M <= end_M) & (end_M <= len(words_NW))).all()):
        raise RuntimeError(f"a query reads events that are not there: there are {len(words_NW)}")


def expand(scores_MVH: Tensor, joined: Joined) -> Tensor:
    """[M, R, H]: a row per chunk and value, one of zeros for chunks without a value, and the rows of time gaps as they are."""
    V = joined.digits.num_values
    rows_MRH = torch.cat([joined.expand(scores_MVH[:, :V]), scores_MVH[:, V:]], dim=1)
    return with_no_row(rows_MRH, joined.chunks.num_values)


def check(
    words_NW: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    scores_MVH: Tensor,
    event_time_N: Tensor | None,
    query_time_M: Tensor | None,
    scale_N: Tensor | None,
    *others: Any,
) -> None:
    """Refuses what ``code_attention`` does, before a kernel runs, in the backward pass too."""
    *_, radices, digit_words, scaled_digits, _ = others
    check_scores(scores_MVH, event_time_N, query_time_M, radices)
    if scale_N is None:
        return
    if scale_N.shape != words_NW.shape[:1] or scale_N.dtype != scores_MVH.dtype:
        raise ValueError(
            f"the scale is {scale_N.dtype} of shape {tuple(scale_N.shape)}, expected {scores_MVH.dtype}, one per event"
        )
    CodeLayout(tuple(radices), tuple(digit_words)).join().chunks_of_first(scaled_digits)


def check_scores(
    scores_MVH: Tensor, event_time_N: Tensor | None, query_time_M: Tensor | None, radices: Sequence[int]
) -> None:
    """Refuses scores of another shape or dtype than queries' of these digits have, and times of one side alone."""
    if (event_time_N is None) != (query_time_M is None):
        raise ValueError("times of both events and queries are needed, or of neither")
    expected = sum(radices) + (0 if event_time_N is None else GAP_BUCKETS)
    if scores_MVH.ndim != 3 or scores_MVH.shape[1] != expected:
        raise ValueError(f"scores have shape {tuple(scores_MVH.shape)}, expected [queries, {expected}, heads]")
    # of fewer bits thousands of weights could not be summed, and thousands of events would tie
    if scores_MVH.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores are {scores_MVH.dtype}; give them in float32, or float64")
