"""Attention of many queries that read the same events, as the candidates of a request do; forward only, to serve.

``shared_attention`` reads vectors, with a bias per event; ``shared_code_attention`` packed SIDs, by the cheaper of two ways:
scores by code for few queries, or every event decoded once for many. Both are softmax attention with a sink.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, code_attention, gap_bucket
from sidrec_torchrec.ops.kernels import define
from sidrec_torchrec.ops.layout import CodeLayout, Joined
from sidrec_torchrec.ops.side_decode import scaled_decode

# Nanoseconds on one core of an AMD EPYC with AVX-512, 25 trits, 4 heads of 16. Only their ratios matter, which differ less
# elsewhere.
_DECODE, _DECODE_AN_EVENT, _PAIR_DECODED = 150_000, 200, 5
_QUERY_BY_CODE, _PAIR_BY_CODE = 3_000, 6


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
        key_SHd, value_SHd = (pad(x_NHd[events], (0, 0, 0, 0, 0, 1)) for x_NHd in (key_NHd, value_NHd))
        bias_SH = torch.cat([bias_NH[events], sink_H.unsqueeze(0)])
        pooled_MHd[run.queries] = _attend(query_MHd[run.queries], key_SHd, value_SHd, bias_SH)
    return pooled_MHd


shared_attention = define("shared_attention", reference)


@shared_attention.register_fake
def _(query_MHd, *others):
    return torch.empty_like(query_MHd, memory_format=torch.contiguous_format)


def code_reference(
    query_MHd: Tensor,
    words_NW: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    key_VHd: Tensor,
    value_XHd: Tensor,
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
        key_VHd: rows of each value of the first ``scaled_digits`` digits, whose sums, times the scale, are keys of events.
        value_XHd: such rows of values, followed by rows of each value of the other digits, which are not scaled.
        bias_UH: what scores also have: a row of each value of the other digits, then, with times, of time gaps.
        sink_H: see ``reference``.
        radices, digit_words, scaled_digits: the digits; the first are the SID's, the others side information.

    Returns:
        float [M, H, d].
    """
    tables, times = (key_VHd, value_XHd, bias_UH, sink_H), (event_time_N, query_time_M)
    events = _Events(
        words_NW, begin_M, end_M, *tables, *times, scale_N, list(radices), list(digit_words), scaled_digits
    )
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


shared_code_attention = define("shared_code_attention", code_reference)


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
    if not begin_M.shape[0]:
        return
    columns_MX = torch.stack([x for x in (begin_M, end_M, *same) if x is not None], dim=1)
    is_new_M = (columns_MX[1:] != columns_MX[:-1]).any(1)
    firsts = [0, *(is_new_M.nonzero().squeeze(1) + 1).tolist()]
    begins, ends = begin_M[firsts].tolist(), end_M[firsts].tolist()
    for first, stop, begin, end in zip(firsts, [*firsts[1:], begin_M.shape[0]], begins, ends, strict=True):
        if begin < end:
            yield _Run(slice(first, stop), begin, end)


def _attend(query_QHd: Tensor, key_THd: Tensor, value_THd: Tensor, bias_TH: Tensor) -> Tensor:
    """float [Q, H, d]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query_QHd, key_THd, value_THd))
    mask_1HQT = bias_TH.t().contiguous()[None, :, None].expand(-1, -1, query_QHd.shape[0], -1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_1HQT, scale=1.0)[0].transpose(0, 1)


@dataclass(frozen=True)
class _Events:
    """The arguments of ``shared_code_attention``, and the two ways."""

    words_NW: Tensor
    begin_M: Tensor
    end_M: Tensor
    key_VHd: Tensor
    value_XHd: Tensor
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
        pooled_QHd = torch.einsum("qvh,vhd->qhd", mass_QVH[:, : self.value_XHd.shape[0]], self.value_XHd)
        return pooled_QHd * (lse_QH - self.sink_H).sigmoid().unsqueeze(2)  # the share of events, against the sink

    def decode_and_attend(self, query_QHd: Tensor, run: _Run) -> Tensor:
        """float [Q, H, d], of the run's queries: one sum of rows an event, one event more that is the sink."""
        words_TW = self.words_NW[run.begin : run.end]
        (T, _), (H, d) = words_TW.shape, query_QHd.shape[1:]
        last_T = words_TW.new_zeros(T)
        if self.event_time_N is not None and self.query_time_M is not None:
            last_T = gap_bucket(self.query_time_M[run.queries.start] - self.event_time_N[run.begin : run.end]).long()
        # the sink has no digits but the last: all its words are negative, as a missing SID's
        words_SX = torch.cat(
            [pad(words_TW, (0, 0, 0, 1), value=-1), pad(last_T, (0, 1), value=GAP_BUCKETS).unsqueeze(1)], 1
        )
        scale_T = self.key_VHd.new_ones(T) if self.scale_N is None else self.scale_N[run.begin : run.end]
        digits = self._digits
        decoded_SY = scaled_decode(
            words_SX,
            self._decode_table,
            pad(scale_T, (0, 1)),
            list(digits.chunks.radices),
            list(digits.chunks.words),
            digits.chunks_of_first(self.scaled_digits),
        )
        key_SHd, value_SHd = (decoded_SY[:, i * H * d : (i + 1) * H * d].unflatten(1, (H, d)) for i in range(2))
        bias_SH = decoded_SY[:, 2 * H * d : 2 * H * d + H]
        return _attend(query_QHd, key_SHd, value_SHd, bias_SH)

    @cached_property
    def _digits(self) -> Joined:
        """All digits and one more: the time gap, or that an event is the sink."""
        last = self.digit_words[-1] + 1
        return CodeLayout((*self.radices, GAP_BUCKETS + 1), (*self.digit_words, last)).join()

    @cached_property
    def _decode_table(self) -> Tensor:
        """Rows whose sum is an event's keys, values and biases, float [R, 2 * H * d + H, padded to eights]."""
        key_VHd, value_XHd, bias_UH = self.key_VHd, self.value_XHd, self.bias_UH
        V, A = key_VHd.shape[0], value_XHd.shape[0] - key_VHd.shape[0]
        gap_GH = bias_UH[A:] if bias_UH.shape[0] > A else bias_UH.new_zeros(GAP_BUCKETS, bias_UH.shape[1])
        bias_YH = torch.cat([bias_UH[:A], gap_GH, self.sink_H.unsqueeze(0)])
        values_YHd = pad(value_XHd, (0, 0, 0, 0, 0, GAP_BUCKETS + 1))  # neither time gaps nor the sink have values
        keys_YX = pad(key_VHd.flatten(1), (0, 0, 0, values_YHd.shape[0] - V))
        biases_YH = pad(bias_YH, (0, -bias_YH.shape[1] % 8, V, 0))
        return self._digits.expand(torch.cat([keys_YX, values_YHd.flatten(1), biases_YH], dim=1))
