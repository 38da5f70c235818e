"""Code-space attention: candidates read a history of packed SIDs that is never decoded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.alphabet import MAX_RADIX
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, code_attention
from sidrec_torchrec.ops.layout import CodeLayout
from sidrec_torchrec.ops.shared_attention import shared_code_attention
from sidrec_torchrec.ops.top_events import top_events
from sidrec_torchrec.side.expansion import SIDEConfig, build_side, can_look_at
from sidrec_torchrec.side.layer_norm_map import LayerNormMap
from sidrec_torchrec.side.mapped_rows import HoldsRows, MappedRows


class CodeAttention(HoldsRows):
    """Multi-head attention of candidates over events that are packed SIDs with side information.

    It equals attention over decoded events: keys and values are linear maps of SIDE's vectors, or of what a ``LayerNormMap``
    makes of them; a score is the scaled product of query and key plus a learned bias per head and bucket of each kind of
    side information, and a value has a learned term per bucket. But keys, values and vectors of events are never made: see
    ``ops.code_attention``. So the cost per event does not depend on ``dim`` (but for the norms a LayerNorm needs), and an
    event takes the bytes of its packed words.

    Softmax attention has a learned sink per head with a zero value, which takes the weight when no event matters; pointwise
    attention (HSTU; Zhai et al. 2024, section 3.2) takes the mean of silu(score) times value. Nothing to read gives
    the output's bias.

    Args:
        events: codec and mode of the events' SIDs, and whether their map is learned; its features are not looked at.
        dim: width D of queries and output.
        num_heads: H; divides ``dim``.
        side_information: number of buckets of each kind, such as ``{"action": 3, "position": 64}``.
        time_gaps: whether scores also depend on the time from event to query, in GAP_BUCKETS powers of two.
        pointwise: silu instead of softmax.
        vectors: what events are read through, from SIDE's vectors to ``dim``; None for SIDE's vectors as they are. Becomes
            a submodule: candidates often go through it, too.
        device: where to build it; not meta.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``, or on a number of buckets that is not possible.

    Example::

        attention = CodeAttention(SIDEConfig(name="item", feature_names=["history"], codec=codec), dim=64, num_heads=4)
        history = attention.events.read(features, "history")
        begin_B, end_B = history.offsets()[:-1], history.offsets()[1:]
        pooled_BD = attention(candidates_BD, history.values(), begin_B, end_B)
    """

    def __init__(
        self,
        events: SIDEConfig,
        dim: int,
        num_heads: int,
        *,
        side_information: Mapping[str, int] | None = None,
        time_gaps: bool = False,
        pointwise: bool = False,
        vectors: LayerNormMap | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.time_gaps = time_gaps
        self.pointwise = pointwise
        self.events = build_side(events, device)
        self.query = nn.Linear(dim, dim, device=device)
        self.vectors = vectors
        event_dim = events.embedding_dim if vectors is None else dim
        self.key = nn.Linear(event_dim, dim, bias=False, device=device)
        self.value = nn.Linear(event_dim, dim, bias=False, device=device)
        self.output = nn.Linear(dim, dim, device=device)
        self.sink_H = None if pointwise else nn.Parameter(torch.zeros(num_heads, device=device))
        self.side_information = dict(side_information or {})
        sizes = list(self.side_information.values())
        if not all(1 <= size <= MAX_RADIX for size in sizes) or math.prod(sizes) > 1 << 63:
            raise ValueError(
                f"side_information {self.side_information}: 1 to {MAX_RADIX} buckets are possible, and 2^63 combinations"
            )
        self.bias_UH, self.bucket_value_AD = bucket_terms(sum(sizes), time_gaps, num_heads, dim, device)
        self._sizes = sizes
        self._divisors = list(CodeLayout(tuple(sizes), (0,) * len(sizes)).divisors)
        # side information travels as one more word of digits, behind the SID's
        side_word = events.codec.spec.num_words
        self._radices = [*self.events.layout.radices, *sizes]
        self._words = [*self.events.layout.words, *[side_word] * len(sizes)]

    def forward(
        self,
        query: Tensor,
        words_NW: Tensor,
        begin_M: Tensor,
        end_M: Tensor,
        buckets_NK: Tensor | None = None,
        event_time_N: Tensor | None = None,
        query_time_M: Tensor | None = None,
        timeless: int = 0,
    ) -> Tensor:
        """Pools each query's events.

        Args:
            query: float [M, D], a candidate each; or [M, P, D], of which the P queries of a candidate read the same
                events together, as more heads: cheaper than as more candidates.
            words_NW: packed SIDs of all events, int64, as ``events.read`` has checked them. Of an event whose SID is missing
                the key and value are those of its side information and time alone.
            begin_M, end_M: candidate m reads events begin_m .. end_m - 1, integers. Candidates of one request name the same
                events, which are then read from memory once.
            buckets_NK: integers, the bucket of each kind of side information, in the order of ``side_information``.
            event_time_N, query_time_M: integers, if there are time gaps.
            timeless: how many of a candidate's P queries, the last ones, do not look at time gaps.

        Returns:
            float, of the shape of ``query``.

        Raises:
            DataError: on CPU, on a bucket out of range; names its kind and event. Elsewhere an assertion fails.
            ValueError: if side information or times are missing, or given where there are none.
        """
        self._check(event_time_N, query_time_M)
        query_MPD = query if query.ndim == 3 else query.unsqueeze(1)
        masses = self.masses(query_MPD, words_NW, begin_M, end_M, buckets_NK, event_time_N, query_time_M, timeless)
        return self.pool(masses).view_as(query)

    def masses(
        self,
        query_MPD: Tensor,
        words_NW: Tensor,
        begin_M: Tensor,
        end_M: Tensor,
        buckets_NK: Tensor | None = None,
        event_time_N: Tensor | None = None,
        query_time_M: Tensor | None = None,
        timeless: int = 0,
    ) -> "Masses":
        """What ``pool`` needs of the events; arguments as ``forward``'s. Without times all queries are timeless."""
        rows = self.mapped_rows
        words_NW, scale_N = self._read(words_NW, buckets_NK, rows)
        scores_MUPH = self._scores(query_MPD, rows, event_time_N is not None, timeless)
        mass_MVG, lse_MG = code_attention(  # G: heads of all P queries
            words_NW,
            begin_M,
            end_M,
            scores_MUPH.flatten(2),
            event_time_N,
            query_time_M,
            scale_N,
            self._radices,
            self._words,
            len(self.events.layout.radices),
            not self.pointwise,
        )
        per_query = scores_MUPH.shape[2:]
        return Masses(mass_MVG.unflatten(2, per_query), lse_MG.unflatten(1, per_query), end_M - begin_M)

    def pool(self, masses: "Masses") -> Tensor:
        """The output, float [M, P, D]."""
        if self.sink_H is not None:
            share_MPH = (masses.lse_MPH - self.sink_H).sigmoid()  # of the events, against the sink
        else:
            share_MPH = (1.0 / masses.count_M.clamp_min(1))[:, None, None].expand_as(masses.lse_MPH)
        v_XHd = self.mapped_rows.value_XHd
        # time gaps, whose masses come last, if there are any, have no values
        v_VHd = nn.functional.pad(v_XHd, (0, 0, 0, 0, 0, masses.mass_MVPH.shape[1] - v_XHd.shape[0]))
        pooled_MPHd = torch.einsum("mvph,vhd->mphd", masses.mass_MVPH.to(v_VHd.dtype), v_VHd)
        pooled_MPHd = pooled_MPHd * share_MPH.unsqueeze(3).to(v_VHd.dtype)
        return self.output(pooled_MPHd.flatten(2))

    def shared(
        self,
        query_MD: Tensor,
        words_NW: Tensor,
        begin_M: Tensor,
        end_M: Tensor,
        buckets_NK: Tensor | None = None,
        event_time_N: Tensor | None = None,
        query_time_M: Tensor | None = None,
    ) -> Tensor:
        """As ``forward``, float [M, D], without gradients, and at the least cost: see ``ops.shared_attention``.

        Many neighbouring candidates that read the same events at the same time make it cheaper to decode each event once.

        Raises:
            ValueError: as ``forward``, and where attention is pointwise.
        """
        if self.sink_H is None:
            raise ValueError("attention that is pointwise cannot be shared")
        self._check(event_time_N, query_time_M)
        rows = self.mapped_rows
        words_NW, scale_N = self._read(words_NW, buckets_NK, rows)
        tables = (rows.key_VHd, rows.value_XHd, self.bias_UH, self.sink_H)
        pooled_MHd = shared_code_attention(
            _in_float32(self._scaled(query_MD)).detach(),
            words_NW,
            begin_M,
            end_M,
            *(_in_float32(x).detach() for x in tables),
            event_time_N,
            query_time_M,
            None if scale_N is None else scale_N.detach(),
            self._radices,
            self._words,
            len(self.events.layout.radices),
        )
        return self.output(pooled_MHd.flatten(1).to(query_MD.dtype))

    def top_events(
        self,
        query_MD: Tensor,
        words_NW: Tensor,
        begin_M: Tensor,
        end_M: Tensor,
        buckets_NK: Tensor | None = None,
        event_time_N: Tensor | None = None,
        query_time_M: Tensor | None = None,
        *,
        k: int,
    ) -> Tensor:
        """The K events that each candidate gives the highest scores, summed over heads; no gradient goes through the choice.

        The sum is what all heads agree on: without the denominators, the logarithm of the product of their weights. It is
        one number per digit as each head's is, and learned with them.

        Args:
            k: places per candidate, 1 or more. Other arguments as ``forward``'s.

        Returns:
            int64 [M, K], indices into ``words_NW``, the highest first; -1 where a candidate reads fewer than K events.
            See ``ops.top_events``.

        Raises:
            DataError, ValueError: as ``forward``.
        """
        self._check(event_time_N, query_time_M)
        rows = self.mapped_rows
        words_NW, scale_N = self._read(words_NW, buckets_NK, rows)
        scores_MUPH = self._scores(query_MD.unsqueeze(1), rows, event_time_N is not None)
        event_MKH, _ = top_events(
            words_NW,
            begin_M,
            end_M,
            scores_MUPH.sum(3).detach(),
            event_time_N,
            query_time_M,
            None if scale_N is None else scale_N.detach(),
            self._radices,
            self._words,
            len(self.events.layout.radices),
            k,
        )
        return event_MKH.squeeze(2)

    def event_vectors(self, words_NW: Tensor) -> Tensor:
        """Vectors of SIDs as attention reads them, float [N, D], zeros if missing; say of candidates, to make queries of."""
        vectors_NE = self.events(words_NW)
        return vectors_NE if self.vectors is None else self.vectors(vectors_NE, words_NW[:, 0] >= 0)

    def map_rows(self) -> MappedRows:
        """What the parameters alone make of the SIDs' rows."""
        rows_VE, norm_RK = self.events.rows_VE, None
        if self.vectors is not None:
            rows_VE = self.vectors.rows(rows_VE, self.events.layout)
            norm_RK = self.vectors.norm_rows(rows_VE, self.events.layout, self.events.factors)
        value_XD = torch.cat([self.value(rows_VE), self.bucket_value_AD])
        return MappedRows(self._heads(self.key(rows_VE)), self._heads(value_XD), norm_RK)

    def _read(self, words_NW: Tensor, buckets_NK: Tensor | None, rows: MappedRows) -> tuple[Tensor, Tensor | None]:
        """Events with their side information, int64 [N, W], and their scale, [N], if any."""
        scale_N = None
        if self.vectors is not None and rows.norm_RK is not None:
            scale_N = self.vectors.scale(words_NW, rows.norm_RK, self.events.layout)
        kinds = list(self.side_information)
        if (0 if buckets_NK is None else buckets_NK.shape[1]) != len(kinds):
            raise ValueError(f"buckets_NK must have a column for each of {kinds}; got {_shape(buckets_NK)}")
        if buckets_NK is not None:
            words_NW = torch.cat([words_NW, self._side_words(buckets_NK)], dim=1)
        return words_NW, scale_N

    def _scores(self, query_MPD: Tensor, rows: MappedRows, timed: bool, timeless: int = 0) -> Tensor:
        """What each row and bucket adds to an event's score, at least float32 [M, U, P, H]."""
        M, P = query_MPD.shape[:2]  # not len(), which an export would take for a constant
        scores_MVPH = torch.einsum("mphd,vhd->mvph", self._scaled(query_MPD), rows.key_VHd)
        bias_UPH = self.bias_UH.unsqueeze(1).expand(-1, P, -1)
        A = self.bucket_value_AD.shape[0]
        if not timed:
            bias_UPH = bias_UPH[:A]
        elif timeless:
            has_time_P1 = (torch.arange(P, device=query_MPD.device) < P - timeless).unsqueeze(1)
            bias_UPH = torch.cat([bias_UPH[:A], bias_UPH[A:] * has_time_P1])
        return _in_float32(torch.cat([scores_MVPH, bias_UPH.expand(M, -1, -1, -1)], dim=1))

    def _scaled(self, query: Tensor) -> Tensor:
        """Queries of each head, float [..., H, d], whose products with keys are scores."""
        q = self._heads(self.query(query))
        return q * q.shape[-1] ** -0.5

    def _heads(self, x: Tensor) -> Tensor:
        """float [..., H, d]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _check(self, event_time_N: Tensor | None, query_time_M: Tensor | None) -> None:
        for name, times in (("event_time_N", event_time_N), ("query_time_M", query_time_M)):
            if (times is not None) != self.time_gaps:
                raise ValueError(f"{name} must be given if time_gaps, and only then; time_gaps is {self.time_gaps}")

    def _side_words(self, buckets_NK: Tensor) -> Tensor:
        """Side information as one packed word, int64 [N, 1]."""
        wrong_NK = (buckets_NK < 0) | (buckets_NK >= torch.tensor(self._sizes, device=buckets_NK.device))
        if can_look_at(wrong_NK):
            if wrong_NK.any():
                event, kind = wrong_NK.nonzero()[0].tolist()
                name, size = list(self.side_information.items())[kind]
                raise DataError(f"{name} of event {event} is {int(buckets_NK[event, kind])}, expected 0 to {size - 1}")
        else:
            torch._assert_async(~wrong_NK.any(), f"side information {self.side_information}: a bucket is out of range")
        return (buckets_NK * torch.tensor(self._divisors, device=buckets_NK.device)).sum(1, keepdim=True)


@dataclass(frozen=True)
class Masses:
    """How much weight queries give to each value of each digit, and of side information: all that ``pool`` needs of events.

    Those of more events can be merged into it, so that what does not depend on the time of asking can be kept per user.

    Args:
        mass_MVPH: float, of P queries of each of M candidates.
        lse_MPH: float, the logarithm of the softmax's denominator; -inf where there are no events.
        count_M: integers, events.
    """

    mass_MVPH: Tensor
    lse_MPH: Tensor
    count_M: Tensor

    def merge(self, others: "Masses") -> "Masses":
        """Those of both, as if their events had been read together by softmax."""
        lse_MPH = torch.logaddexp(self.lse_MPH, others.lse_MPH)
        mass_MVPH = torch.zeros_like(self.mass_MVPH)
        for masses in (self, others):
            share_MPH = (masses.lse_MPH - lse_MPH).exp().nan_to_num(0.0)  # of nothing in nothing: none
            mass_MVPH = mass_MVPH + masses.mass_MVPH * share_MPH.unsqueeze(1)
        return Masses(mass_MVPH, lse_MPH, self.count_M + others.count_M)


def _in_float32(x: Tensor) -> Tensor:
    """At least: in a half-precision model too, thousands of weights are summed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bucket_terms(
    buckets: int, time_gaps: bool, num_heads: int, dim: int, device: torch.device | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """What side information adds to scores and to values, at the start.

    Scores start without it. Values start with as much of it as of a vector of unit variance (whose map starts uniform,
    of variance 1 / (3 dim)), so that what is pooled tells a like from a dislike from the first step; started at zero, training
    of a few hundred steps ends behind.

    Returns:
        The biases, [buckets, then GAP_BUCKETS of time gaps if there are any, num_heads]; the terms of values, [buckets, dim].
    """
    bias_UH = torch.zeros(buckets + GAP_BUCKETS * time_gaps, num_heads, device=device)
    return nn.Parameter(bias_UH), nn.Parameter(torch.randn(buckets, dim, device=device) * 3**-0.5)


def request_ranges(offsets_B1: Tensor, candidates_B: Tensor) -> tuple[Tensor, Tensor]:
    """What each candidate reads when those of request b, one after another, read the events of history b.

    Args:
        offsets_B1: integers [B + 1], where histories begin and end, as a JaggedTensor has them.
        candidates_B: integers, candidates of each request.

    Returns:
        begin_M and end_M, int64, for ``CodeAttention``.
    """
    return (
        torch.repeat_interleave(offsets_B1[:-1].long(), candidates_B),
        torch.repeat_interleave(offsets_B1[1:].long(), candidates_B),
    )


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"shape {tuple(tensor.shape)}"
