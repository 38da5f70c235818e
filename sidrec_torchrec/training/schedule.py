"""The learning rate's course: a linear rise, then a cosine down to 0."""

import math
from collections.abc import Callable


def rate_factor(
    progress: float, *, warmup: float, decay_from: float, cosine: Callable[[float], float] = math.cos
) -> float:
    """Share of the peak rate at ``progress`` in [0, 1] of training.

    Args:
        progress: how much of training is done.
        warmup: share of training in which the rate rises to its peak; 0 for none.
        decay_from: progress at which the cosine begins; it may begin while the rate still rises, and the lower one counts.
        cosine: of an angle.

    Source: linear warm-up (Goyal et al. 2017) with one cosine (Loshchilov & Hutter 2017).
    """
    rise = max(progress, 1e-3) / warmup if progress < warmup else 1.0
    done = min(max(progress - decay_from, 0.0) / (1 - decay_from), 1.0)
    return min(rise, 0.5 * (1 + cosine(math.pi * done)))
