"""Attention of many queries that read the same events, as the candidates of a request do; forward only, to serve.

``shared_attention`` reads vectors, with a bias per event; ``shared_code_attention`` packed SIDs, by the cheaper of two ways:
scores by code for few queries, or every event decoded once for many. Both are softmax attention with a sink.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, code_attention, gap_bucket
from sidrec_torchrec.ops.layout import CodeLayout
from sidrec_torchrec.ops.side_decode import scaled_decode

# Nanoseconds on one core of an AMD EPYC, 25 trits, 4 heads of 16. Only their ratios matter, which differ less elsewhere.
_DECODE, _DECODE_AN_EVENT, _PAIR_DECODED = 350_000, 210, 6
_QUERY_BY_CODE, _PAIR_BY_CODE = 5_500, 11


def reference(
    query_MHd: Tensor,
    key_NHd: Tensor,
    value_NHd: Tensor,
    bias_NH: Tensor,
    sink_H: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
) -> Tensor:
    """What each query pools of the values of the events it reads.

    Args:
        query_MHd: float; a score is its product with the key, not scaled, plus the event's bias.
        key_NHd, value_NHd, bias_NH: of each event.
        sink_H: score of one more event, whose value is zero.
        begin_M, end_M: query m reads events begin_m .. end_m - 1, integers. Neighbours that read the same share the work.

    Returns:
        float [M, H, d]; zeros where a query reads nothing.
    """
    pooled_MHd = torch.zeros_like(query_MHd, memory_format=torch.contiguous_format)
    for run in _runs(begin_M, end_M):
        events = slice(run.begin, run.end)
        pooled_MHd[run.queries] = _attend(
            query_MHd[run.queries], key_NHd[events], value_NHd[events], bias_NH[events], sink_H
        )
    return pooled_MHd


shared_attention = torch.library.custom_op("sidrec::shared_attention", reference, mutates_args=())


@shared_attention.register_fake
def _(query_MHd, *others):
    return torch.empty_like(query_MHd, memory_format=torch.contiguous_format)


def code_reference(
    query_MHd: Tensor,
    words_NW: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    key_VHd: Tensor,
    value_VHd: Tensor,
    side_value_AHd: Tensor,
    bias_UH: Tensor,
    sink_H: Tensor,
    event_time_N: Tensor | None,
    query_time_M: Tensor | None,
    scale_N: Tensor | None,
    radices: Sequence[int],
    digit_words: Sequence[int],
    scaled_digits: int,
) -> Tensor:
    """What each query pools of events that are packed SIDs, followed by side information.

    Args:
        query_MHd: float; see ``reference``.
        words_NW, begin_M, end_M, event_time_N, query_time_M, scale_N: as ``code_attention`` takes them.
        key_VHd, value_VHd: rows of each value of the first ``scaled_digits`` digits, whose sums, times the scale, are the
            keys and values of events.
        side_value_AHd: rows of each value of the other digits, which values also have.
        bias_UH: what scores also have: a row of each value of the other digits, then, with times, of time gaps.
        sink_H: see ``reference``.
        radices, digit_words, scaled_digits: the digits; the first are the SID's, the others side information.

    Returns:
        float [M, H, d].
    """
    events = _Events(
        words_NW, begin_M, end_M, key_VHd, value_VHd, side_value_AHd, bias_UH, sink_H, event_time_N, query_time_M,
        scale_N, list(radices), list(digit_words), scaled_digits,
    )  # fmt: skip
    pooled_MHd = torch.zeros_like(query_MHd, memory_format=torch.contiguous_format)
    by_code: list[Tensor] = []
    for run in _runs(begin_M, end_M, query_time_M):
        if decoding_pays(run.count, run.end - run.begin):
            pooled_MHd[run.queries] = events.decode_and_attend(query_MHd[run.queries], run)
        else:
            by_code.append(torch.arange(run.queries.start, run.queries.stop, device=query_MHd.device))
    if by_code:
        query_Q = torch.cat(by_code)
        pooled_MHd[query_Q] = events.attend_by_code(query_MHd[query_Q], query_Q)
    return pooled_MHd


shared_code_attention = torch.library.custom_op("sidrec::shared_code_attention", code_reference, mutates_args=())


@shared_code_attention.register_fake
def _(query_MHd, *others):
    return torch.empty_like(query_MHd, memory_format=torch.contiguous_format)


def decoding_pays(queries: int, events: int) -> bool:
    """Whether so many queries of the same events cost less when each event is decoded than when it is scored by code."""
    decoded = _DECODE + events * (_DECODE_AN_EVENT + queries * _PAIR_DECODED)
    return decoded < queries * (_QUERY_BY_CODE + events * _PAIR_BY_CODE)


@dataclass(frozen=True)
class _Run:
    """Neighbouring queries that read the same events at the same time."""

    queries: slice
    begin: int
    end: int

    @property
    def count(self) -> int:
        return self.queries.stop - self.queries.start


def _runs(begin_M: Tensor, end_M: Tensor, *same: Tensor | None) -> Iterator[_Run]:
    """The runs that read something."""
    columns = [x for x in (begin_M, end_M, *same) if x is not None]
    _, count_R = torch.unique_consecutive(torch.stack(columns, dim=1), dim=0, return_counts=True)
    stop_R = count_R.cumsum(0)
    last_R = stop_R - 1
    first = 0
    ranges = zip(stop_R.tolist(), begin_M[last_R].tolist(), end_M[last_R].tolist(), strict=True)
    for stop, begin, end in ranges:
        if begin < end:
            yield _Run(slice(first, stop), begin, end)
        first = stop


def _attend(query_QHd: Tensor, key_THd: Tensor, value_THd: Tensor, bias_TH: Tensor, sink_H: Tensor) -> Tensor:
    """float [Q, H, d]. The bias is one more component of keys, and the sink one more event: a mask would cost more."""
    key_THe = torch.cat([key_THd, bias_TH.unsqueeze(2)], dim=2)
    key_SHe = torch.cat([key_THe, pad(sink_H[None, :, None], (key_THd.shape[2], 0))])
    return _attend_with_bias(query_QHd, key_SHe, pad(value_THd, (0, 1, 0, 0, 0, 1)))


def _attend_with_bias(query_QHd: Tensor, key_SHe: Tensor, value_SHe: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (pad(query_QHd, (0, 1), value=1.0), key_SHe, value_SHe))
    return scaled_dot_product_attention(q, k, v, scale=1.0)[0, ..., :-1].transpose(0, 1)


@dataclass(frozen=True)
class _Events:
    """The arguments of ``shared_code_attention``, and the two ways."""

    words_NW: Tensor
    begin_M: Tensor
    end_M: Tensor
    key_VHd: Tensor
    value_VHd: Tensor
    side_value_AHd: Tensor
    bias_UH: Tensor
    sink_H: Tensor
    event_time_N: Tensor | None
    query_time_M: Tensor | None
    scale_N: Tensor | None
    radices: list[int]
    digit_words: list[int]
    scaled_digits: int

    def attend_by_code(self, query_QHd: Tensor, query_Q: Tensor) -> Tensor:
        """float [Q, H, d], of the queries at places ``query_Q``."""
        scores_QVH = torch.einsum("qhd,vhd->qvh", query_QHd, self.key_VHd)
        bias_QUH = self.bias_UH.expand(query_QHd.shape[0], -1, -1)
        mass_QVH, lse_QH = code_attention(
            self.words_NW,
            self.begin_M[query_Q],
            self.end_M[query_Q],
            torch.cat([scores_QVH, bias_QUH], dim=1),
            self.event_time_N,
            None if self.query_time_M is None else self.query_time_M[query_Q],
            self.scale_N,
            self.radices,
            self.digit_words,
            self.scaled_digits,
            True,
        )
        value_XHd = torch.cat([self.value_VHd, self.side_value_AHd])
        pooled_QHd = torch.einsum("qvh,vhd->qhd", mass_QVH[:, : value_XHd.shape[0]], value_XHd)
        return pooled_QHd * (lse_QH - self.sink_H).sigmoid().unsqueeze(2)  # the share of events, against the sink

    def decode_and_attend(self, query_QHd: Tensor, run: _Run) -> Tensor:
        """float [Q, H, d], of the run's queries.

        One sum of rows per event makes its keys, with the bias as one more component, and its values. The last digit is the
        time gap; of one more event, the sink, that it is the sink.
        """
        words_TW = self.words_NW[run.begin : run.end]
        T, heads = words_TW.shape[0], self.key_VHd.shape[1]
        last_T = words_TW.new_zeros(T)
        if self.event_time_N is not None and self.query_time_M is not None:
            last_T = gap_bucket(self.query_time_M[run.queries.start] - self.event_time_N[run.begin : run.end]).long()
        words_SX = torch.cat([pad(words_TW, (0, 0, 0, 1)), pad(last_T, (0, 1), value=GAP_BUCKETS).unsqueeze(1)], dim=1)
        scale_T = self.key_VHd.new_ones(T) if self.scale_N is None else self.scale_N[run.begin : run.end]
        digits = CodeLayout((*self.radices, GAP_BUCKETS + 1), (*self.digit_words, words_TW.shape[1])).join()
        decoded_SX = scaled_decode(
            words_SX,
            digits.expand(self._rows),
            pad(scale_T, (0, 1)),
            list(digits.chunks.radices),
            list(digits.chunks.words),
            digits.chunks_of_first(self.scaled_digits),
        )
        key_SHe, value_SHe = decoded_SX.unflatten(1, (2, heads, -1)).unbind(1)
        return _attend_with_bias(query_QHd, key_SHe, value_SHe)

    @cached_property
    def _rows(self) -> Tensor:
        """Of each value of each digit, the last included, a row of keys and values with biases, [V, 2 * H * (d + 1)]."""
        A, U = self.side_value_AHd.shape[0], self.bias_UH.shape[0]
        gap_GH = self.bias_UH[A:] if U > A else self.bias_UH.new_zeros(GAP_BUCKETS, self.bias_UH.shape[1])
        # all that the sink would have besides: the first value of each kind of side information
        firsts = list(itertools.accumulate(self.radices[self.scaled_digits : -1], initial=0)) if A else []
        sink_1H = (self.sink_H - self.bias_UH[firsts].sum(0)).unsqueeze(0)
        biases = (self.bias_UH[:A], gap_GH, sink_1H)
        keys = [pad(self.key_VHd, (0, 1)), *(pad(x.unsqueeze(2), (self.key_VHd.shape[2], 0)) for x in biases)]
        gap_value_GHd = self.side_value_AHd.new_zeros(GAP_BUCKETS, *self.side_value_AHd.shape[1:])
        sink_value_1Hd = -self.side_value_AHd[firsts].sum(0).unsqueeze(0)
        values_VHd = torch.cat([self.value_VHd, self.side_value_AHd, gap_value_GHd, sink_value_1Hd])
        return torch.cat([torch.cat(keys), pad(values_VHd, (0, 1))], dim=1).flatten(1)
