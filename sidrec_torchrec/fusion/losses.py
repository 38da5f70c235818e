"""Losses of VQ Fusion's tasks, masked where a source or label is missing, and how they are weighed."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def reconstruction_loss(x_hat_ND: Tensor, x_ND: Tensor) -> Tensor:
    """Squared error of standardized vectors by row, float [N]; 1 is what predicting the mean gives on average."""
    return (x_hat_ND - x_ND).square().sum(1)


def target_loss(logits_NC: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy by row, float [N], in nats.

    Args:
        logits_NC: float [N, C].
        labels: int64 [N] of one class each (-1 where missing: 0 is returned), or float [N, C] of zeros and ones for
            several; then the mean over classes of the binary cross entropy.
    """
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits_NC, labels, reduction="none").mean(1)
    return F.cross_entropy(logits_NC, labels, ignore_index=-1, reduction="none")


def global_means(sums_K: Tensor, counts_K: Tensor) -> Tensor:
    """Means over all processes' rows, as each process's share: averaging the shares over processes gives the means.

    Args:
        sums_K: this process's sums of K losses, float.
        counts_K: this process's numbers of rows, float.

    Returns:
        float [K]; 0 where no process has a row.
    """
    if not dist.is_initialized():
        return sums_K / counts_K.clamp_min(1)
    counts_K = counts_K.clone()
    dist.all_reduce(counts_K)
    return sums_K * dist.get_world_size() / counts_K.clamp_min(1)


class TaskWeights(nn.Module):
    """Weighs tasks: by fixed weights, or by learned homoscedastic uncertainty (Kendall et al. 2018, equation 10).

    Learned: a reconstruction counts L / (2 s^2) + log s, a classification L / s^2 + log s, with s learned per task.

    Args:
        fixed: weight by task.
        is_regression: by task, in the same order.
        learned: whether to learn.
    """

    fixed_K: Tensor
    factor_K: Tensor

    def __init__(self, fixed: dict[str, float], is_regression: dict[str, bool], learned: bool) -> None:
        super().__init__()
        self.register_buffer("fixed_K", torch.tensor(list(fixed.values())))
        self.register_buffer("factor_K", torch.tensor([0.5 if is_regression[t] else 1.0 for t in fixed]))
        self.log_variance_K = nn.Parameter(torch.zeros(len(fixed))) if learned else None

    def forward(self, losses_K: Tensor) -> Tensor:
        """The total of losses [K], a scalar."""
        if self.log_variance_K is None:
            return (self.fixed_K * losses_K).sum()
        weighed_K = self.factor_K * torch.exp(-self.log_variance_K) * losses_K + 0.5 * self.log_variance_K
        return (self.fixed_K * weighed_K).sum()
