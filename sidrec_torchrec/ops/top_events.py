"""``top_events``: the events that matter most to a query, found from their codes alone.

Every event is scored, by the same sum of one number per digit that ``code_attention`` weighs it by, so the choice is exact:
there is no index, and nothing is approximated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sidrec_torchrec.ops.code_attention import check_ranges, check_scores, expand, gap_bucket, pairs_of
from sidrec_torchrec.ops.kernels import define
from sidrec_torchrec.ops.layout import CodeLayout


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
    k: int,
) -> tuple[Tensor, Tensor]:
    """The K events with the highest scores among those each query reads.

    In plain PyTorch: memory for a score per pair of query and event.

    The score of event t for query m is ``scale_t * sum_j scores_MVH[m, first_j + digit_tj]`` over the first
    ``scaled_digits`` digits, plus the same sum, without a scale, over the others, where ``first_j`` is the sum of the
    radices before digit j; plus, with times, ``scores_MVH[m, V - GAP_BUCKETS + gap_bucket(query_time - event_time)]``.

    All kernels add in one order, that of the chunks of ``CodeLayout.join()``, and round alike. So every device chooses the
    same events, and gives their scores to the last bit.

    Args:
        words_NW: packed SIDs of all events, integers. Not checked: a word out of range is read as some other SID; but the
            digits of a negative word, as a missing SID's, add nothing.
        begin_M, end_M: query m reads events begin_m .. end_m - 1, integers; queries may share events, or read none.
        scores_MVH: per query, row and head: a row per digit and value, then, with times, one per time-gap bucket;
            float32 or float64. No gradient goes through the choice, nor into the scores returned: to have one, compute
            the scores of the events chosen anew.
        event_time_N, query_time_M: integers, or both None.
        scale_N: of each event, floats; None for 1, whatever ``scaled_digits`` is.
        radices, digit_words: the digits, as ``CodeLayout`` has them.
        scaled_digits: how many digits, from the first, are scaled; they fill whole words.
        k: places per query and head, 1 or more.

    Returns:
        Events, int64 [M, K, H], as indices into ``words_NW``, and their scores, [M, K, H]: the highest first, and of equal
        ones the event that comes first. NaN counts as less than -inf. Where a query reads fewer than K events, the
        places left have event -1 and score -inf.

    Raises:
        ValueError: if a tensor has another shape or dtype, only one time is given, the digits scaled end within a word, or
            k is below 1.
        RuntimeError: if a query reads events that are not there.
    """
    check(
        words_NW,
        begin_M,
        end_M,
        scores_MVH,
        event_time_N,
        query_time_M,
        scale_N,
        radices,
        digit_words,
        scaled_digits,
        k,
    )
    check_ranges(words_NW, begin_M, end_M)
    query_P, event_P = pairs_of(begin_M, end_M)
    joined = CodeLayout(tuple(radices), tuple(digit_words)).join()
    rows_PC, scale_P = joined.chunks.rows(words_NW)[event_P], None if scale_N is None else scale_N[event_P]
    if event_time_N is not None and query_time_M is not None:
        gap_P = gap_bucket(query_time_M.long()[query_P] - event_time_N.long()[event_P])
        rows_PC = torch.cat([rows_PC, (joined.chunks.num_values + 1 + gap_P).unsqueeze(1)], dim=1)
    scaled = 0 if scale_N is None else joined.chunks_of_first(scaled_digits)
    score_PH = _scores(expand(scores_MVH, joined), query_P, rows_PC, scale_P, scaled)

    # stable sorts keep the order of events; ascending, NaN comes last
    by_score_PH = torch.where(score_PH.isnan(), torch.nan, -score_PH).argsort(dim=0, stable=True)
    by_query_PH = by_score_PH.gather(0, query_P[by_score_PH].argsort(dim=0, stable=True))
    length_M = end_M.long() - begin_M.long()
    before_M = length_M.cumsum(0) - length_M
    place_K = torch.arange(k, device=begin_M.device)
    there_MK = place_K < length_M.unsqueeze(1)
    M, _, H = scores_MVH.shape
    event_MKH = event_P.new_full((M, k, H), -1)
    score_MKH = scores_MVH.new_full((M, k, H), -torch.inf)
    chosen_XH = by_query_PH[(before_M.unsqueeze(1) + place_K)[there_MK]]
    event_MKH[there_MK] = event_P[chosen_XH]
    score_MKH[there_MK] = score_PH.gather(0, chosen_XH)
    return event_MKH, score_MKH


top_events = define("top_events", reference)


@top_events.register_fake
def _(words, begin, end, scores_MVH, event_time, query_time, scale, radices, digit_words, scaled_digits, k):
    M, _, H = scores_MVH.shape
    return scores_MVH.new_empty(M, k, H, dtype=torch.int64), scores_MVH.new_empty(M, k, H)


def _scores(table_MRH: Tensor, query_P: Tensor, rows_PC: Tensor, scale_P: Tensor | None, scaled: int) -> Tensor:
    """[P, H]: the score of each pair, chunk after chunk, as kernels add it."""
    rows_XH, first_P = table_MRH.flatten(0, 1), query_P * table_MRH.shape[1]
    score_PH = table_MRH.new_zeros(len(query_P), table_MRH.shape[2])
    for column, row_P in enumerate(rows_PC.T, start=1):
        score_PH = score_PH + rows_XH[first_P + row_P]
        if scale_P is not None and column == scaled:
            score_PH = score_PH * scale_P.to(score_PH).unsqueeze(1)
    return score_PH + 0.0  # no -0.0, which sorts by its bits on some devices


def check(
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
    k: int,
) -> None:
    """Refuses what ``top_events`` does, before a kernel runs; all but what tensors of integers hold."""
    if k < 1:
        raise ValueError(f"k is {k}, expected 1 or more")
    check_scores(scores_MVH, event_time_N, query_time_M, radices)
    N, M = len(words_NW), len(scores_MVH)
    sizes = {"begin": (begin_M, M), "end": (end_M, M), "query_time": (query_time_M, M)}
    sizes |= {"event_time": (event_time_N, N), "scale": (scale_N, N)}
    for name, (tensor, size) in sizes.items():
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{size}]")
    if scale_N is None:
        return
    if not scale_N.is_floating_point():
        raise ValueError(f"scale is {scale_N.dtype}; give it in floats")
    CodeLayout(tuple(radices), tuple(digit_words)).join().chunks_of_first(scaled_digits)
