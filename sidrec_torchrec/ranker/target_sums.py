"""What NE, its regression's like and calibration of a set of targets are made of: five sums over it, of each task."""

import torch
from torch import Tensor
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from sidrec_torchrec.data.regression import Regression
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.scales import on_scale

ETA = 1e-12  # nearest that a probability comes to 0 and 1, as in torchrec's NEMetric
NUM_SUMS = 5


class TargetSums:
    """The five numbers of a target and task that are summed up.

    Of a label they are cross entropy, weight, and what positives, negatives and predictions weigh; of a regression squared error,
    weight, values, squared error of the training mean, and predictions.

    Args:
        device: where predictions are.
        labels: names of the predictions' columns that are probabilities.
        regressions: of the others, which come last.
    """

    def __init__(self, device: torch.device, labels: tuple[str, ...], regressions: tuple[Regression, ...] = ()) -> None:
        self.labels = labels
        self.tasks = (*labels, *(own.name for own in regressions))
        self._is_log_R = torch.tensor([own.is_log for own in regressions], dtype=torch.bool, device=device)
        self._mean_R = torch.tensor([own.mean for own in regressions], dtype=torch.float64, device=device)

    def of(self, output: RankerOutput) -> Tensor:
        """Of S targets, float64 [S, K, 5]."""
        outputs = [x.double() for x in (output.weight, output.label, output.prediction)]
        of_labels, of_values = (
            [x[:, part] for x in outputs] for part in (slice(len(self.labels)), slice(len(self.labels), None))
        )
        return torch.cat([_label_sums(*of_labels), self._value_sums(*of_values)], dim=1)

    def ratio(self, sums_5: Tensor, k: int) -> Tensor:
        """NE of task ``k``, or of a regression its NMSE; NaN where that is not defined.

        Args:
            sums_5: over sets of targets, float64 [..., 5].
            k: the task's place.

        Returns:
            float64 [...].
        """
        first, weight, positives, fourth, _ = sums_5.unbind(-1)
        if k < len(self.labels):
            defined, value = (positives > 0) & (fourth > 0), compute_ne(first, weight, positives, fourth, ETA)
        else:
            defined, value = fourth > 0, first / fourth
        return value.where(defined, torch.nan)

    def _value_sums(self, weight_SR: Tensor, label_SR: Tensor, prediction_SR: Tensor) -> Tensor:
        label_SR, prediction_SR = (on_scale(x_SR, self._is_log_R) for x_SR in (label_SR, prediction_SR))
        errors = ((label_SR - x).square() for x in (prediction_SR, self._mean_R))
        error_SR, left_SR = (weight_SR * error_SR for error_SR in errors)
        return torch.stack([error_SR, weight_SR, weight_SR * label_SR, left_SR, weight_SR * prediction_SR], dim=2)


def _label_sums(weight_ST: Tensor, label_ST: Tensor, prediction_ST: Tensor) -> Tensor:
    loss_ST = compute_cross_entropy(label_ST, prediction_ST.clone(), weight_ST, ETA)
    positive_ST = weight_ST * label_ST
    sums = [loss_ST, weight_ST, positive_ST, weight_ST - positive_ST, weight_ST * prediction_ST]
    return torch.stack(sums, dim=2)
