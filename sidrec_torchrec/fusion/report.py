"""What a tokenizer keeps of its items: by prefix depth, reconstruction and target accuracy; and how it uses its digits."""

from typing import Any

import numpy as np
import torch

from sidrec_torchrec.codec.report import DigitUse, PrefixGroups
from sidrec_torchrec.fusion.model import ItemTensors
from sidrec_torchrec.fusion.tokenizer import Tokenizer


class TokenizerReport:
    """Accumulates over batches of items; holds the packed SIDs, to count collisions, and sums.

    Args:
        tokenizer: whose SIDs.
        depths: numbers of first digits to decode; None for about ten, evenly spread.
    """

    def __init__(self, tokenizer: Tokenizer, depths: tuple[int, ...] | None = None) -> None:
        self.tokenizer = tokenizer
        spec = tokenizer.codec.spec
        every = max(1, -(-spec.num_digits // 10))
        self.depths = depths or tuple(sorted({0, *range(every, spec.num_digits, every), spec.num_digits}))
        tasks = tokenizer.model.config.tasks
        self._errors = {task: np.zeros(len(self.depths)) for task in tasks}
        self._hits = {target: np.zeros((len(self.depths), 3)) for target in tokenizer.vocabularies}
        self._counts = dict.fromkeys(tasks, 0)
        self._use = DigitUse(spec)
        self._words = [np.empty((0, spec.num_words), np.int64)]

    def merge(self, others: list["TokenizerReport"]) -> None:
        """Adds what other processes accumulated, with the same tokenizer and depths."""
        for other in others:
            for own, its in ((self._errors, other._errors), (self._hits, other._hits), (self._counts, other._counts)):
                for name in own:
                    own[name] = own[name] + its[name]
            self._use.merge(other._use)
            self._words += other._words

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tokenizer": None}  # processes exchange counts, not models

    @torch.no_grad()
    def update(self, items: ItemTensors, words_NW: torch.Tensor) -> None:
        """Takes a batch of items and their packed SIDs, int64 [N, W]."""
        model, codec = self.tokenizer.model, self.tokenizer.codec
        items = items.to(self.tokenizer.device)
        self._words.append(words_NW.numpy())
        self._use.update(words_NW.numpy())
        for task, has_N in (items.present | items.labelled).items():
            self._counts[task] += int(has_N.sum())
        for place, depth in enumerate(self.depths):
            z_ND = codec.decode(words_NW, num_digits=depth).to(self.tokenizer.device)
            for task, (loss_N, _) in model.task_losses(z_ND, items).items():
                self._errors[task][place] += float(loss_N.double().sum())
            for target in items.labelled:
                self._hits[target][place] += _hits(
                    model.heads[target](z_ND), items.labels[target], items.labelled[target]
                )

    def result(self) -> dict[str, Any]:
        """The report as a JSON value.

        ``reconstruction``: by source, relative squared error (1: as bad as the training items' mean) by depth.
        ``accuracy``: by target, top-1 accuracy, or micro-averaged F1 at probability 0.5 where multi-label, by depth.
        ``digits``: entropy in bits and unused values of each digit. ``prefixes``: entropy in bits and number of distinct
        prefixes by depth. ``collisions``: items that share their SID with another one, and the most that share one.
        Sources and targets of which no item had a value are left out.
        """
        config, spec = self.tokenizer.model.config, self.tokenizer.codec.spec
        groups = PrefixGroups.of(spec, np.concatenate(self._words))
        prefixes, whole = [groups.use(depth) for depth in self.depths], groups.use(spec.num_digits)
        mean = {task: (e / self._counts[task]).tolist() for task, e in self._errors.items() if self._counts[task]}
        return {
            "items": len(groups.order_N),
            "bits": spec.bits,
            "depths": list(self.depths),
            "reconstruction": {source: mean[source] for source in config.sources if source in mean},
            "target_loss": {target: mean[target] for target in config.targets if target in mean},
            "accuracy": {
                target: _score(hits, config.targets[target].multi_label)
                for target, hits in self._hits.items()
                if target in mean
            },
            "digits": {"entropy": self._use.entropy(), "unused": self._use.unused()},
            "prefixes": {"entropy": [p.entropy for p in prefixes], "distinct": [p.distinct for p in prefixes]},
            "collisions": {"items": whole.shared, "largest": whole.largest},
        }


def _hits(logits_NC: torch.Tensor, labels: torch.Tensor, labelled_N: torch.Tensor) -> np.ndarray:
    """Right, predicted and true labels, of which accuracy and F1 are made."""
    logits_NC, labels = logits_NC[labelled_N], labels[labelled_N]
    if labels.is_floating_point():
        predicted_NC = logits_NC > 0
        return np.array([float((predicted_NC * labels).sum()), float(predicted_NC.sum()), float(labels.sum())])
    right = float((logits_NC.argmax(1) == labels).sum())
    return np.array([right, len(labels), len(labels)])


def _score(hits_P3: np.ndarray, multi_label: bool) -> list[float]:
    right, predicted, true = hits_P3.T
    total = (predicted + true) / 2 if multi_label else true
    return (right / np.maximum(total, 1)).tolist()
