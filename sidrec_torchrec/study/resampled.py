"""How far a comparison of arms would move had other users been tested: intervals of what is made of several arms' NE.

Every run was tested under the same resamplings of users (``ranker.bootstrap``), so a gain is computed under each of them, and
differences are paired. Rankers and tokenizers stay what they are: what their seeds do is the spread over seeds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from sidrec_torchrec.ranker.bootstrap import interval
from sidrec_torchrec.ranker.evaluation import BOOTSTRAP

Runs = list[dict[str, Any]]


def gain(base: Any, own: Any) -> Any:
    """The share by which NE, or NMSE, is below that of the base."""
    return (base - own) / base


def kept(base: Any, whole: Any, own: Any) -> Any:
    """The gain over the base as a share of the gain that all content has."""
    return (base - own) / (base - whole)


def interval_of(make: Callable[..., np.ndarray], metric: str, *arms: Runs | None) -> list[float] | None:
    """The interval of what ``make`` makes of a metric of several arms.

    Args:
        make: values of the arms, float [B] each, the means over their seeds -> float [B].
        metric: its name, ``ne_warm``, say.
        arms: ``metrics.json`` of each seed, of each; None of one that was not run.

    Returns:
        Its ends; None where an arm was not run, the metric is not defined in every resampling, or an earlier version made a run, which
        has none.
    """
    means = [None if runs is None else mean_replicates(runs, metric) for runs in arms]
    return None if any(value_B is None for value_B in means) else interval(make(*means))


def mean_replicates(runs: Runs, metric: str) -> np.ndarray | None:
    """A metric under each resampling, the mean over seeds, float64 [B], NaN where not defined; None if a run has none."""
    found = [run["test"].get(BOOTSTRAP, {}) for run in runs]
    if not all(metric in own for own in found):
        return None
    return np.mean([np.array(own[metric]["replicates"], np.float64) for own in found], axis=0)
