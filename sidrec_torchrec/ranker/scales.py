"""From a ranker's outputs to predictions: probabilities of labels, and of regressions values on the scale of their labels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sidrec_torchrec.data.regression import Regression


class Scales(nn.Module):
    """What the last map's K outputs stand for: logits of T labels, then R values in units of their deviation in training.

    Args:
        num_tasks: T.
        regressions: R of them.
        device: where to build it.
    """

    mean_R: Tensor
    deviation_R: Tensor
    is_log_R: Tensor

    def __init__(self, num_tasks: int, regressions: Sequence[Regression], device: torch.device) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.num_outputs = num_tasks + len(regressions)
        for name, values in (
            ("mean_R", torch.tensor([own.mean for own in regressions], dtype=torch.float32)),
            ("deviation_R", torch.tensor([own.deviation for own in regressions], dtype=torch.float32)),
            ("is_log_R", torch.tensor([own.is_log for own in regressions], dtype=torch.bool)),
        ):
            self.register_buffer(name, values.to(device), persistent=False)

    def forward(self, output_SK: Tensor) -> Tensor:
        """Predictions, float [S, K], of outputs; a value of which the logarithm is learned is not below 0."""
        probability_ST = output_SK[:, : self.num_tasks].sigmoid()
        if self.num_outputs == self.num_tasks:
            return probability_ST
        value_SR = output_SK[:, self.num_tasks :] * self.deviation_R + self.mean_R
        return torch.cat([probability_ST, torch.where(self.is_log_R, value_SR.expm1().clamp_min(0), value_SR)], dim=1)

    def errors(self, output_SK: Tensor, value_SR: Tensor) -> Tensor:
        """Squared errors in units of the variance in training, float [S, R]; 0 where a value is missing."""
        # a NaN, masked out afterwards, would spoil gradients all the same
        learned_SR = (on_scale(value_SR.nan_to_num(), self.is_log_R) - self.mean_R) / self.deviation_R
        return (output_SK[:, self.num_tasks :] - learned_SR).square() * ~value_SR.isnan()


def on_scale(value_SR: Tensor, is_log_R: Tensor) -> Tensor:
    """Values, or log(1 + y) of those y of which it is learned."""
    return torch.where(is_log_R, value_SR.clamp_min(0).log1p(), value_SR)
