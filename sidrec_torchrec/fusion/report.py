"""What a tokenizer keeps of its items: by prefix depth, reconstruction and target accuracy; and how it uses its digits."""

from typing import Any

import numpy as np
import torch

from sidrec_torchrec.codec.report import DigitUse, PrefixGroups, shared_sids
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import DIGITS, ItemTensors
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.processes import sum_over_processes


class TokenizerReport:
    """Accumulates counts and sums over batches of items and their digits.

    Args:
        tokenizer: whose digits.
        depths: numbers of first digits to decode; None for about ten, evenly spread; none given, nothing is decoded, and
            the report is short.
    """

    def __init__(self, tokenizer: Tokenizer, depths: tuple[int, ...] | None = None) -> None:
        self.tokenizer = tokenizer
        spec = tokenizer.codec.spec
        every = max(1, -(-spec.num_digits // 10))
        evenly = tuple(sorted({0, *range(every, spec.num_digits, every), spec.num_digits}))
        self.depths = evenly if depths is None else depths
        tasks = tokenizer.model.config.tasks
        self._errors = {task: np.zeros(len(self.depths)) for task in tasks}
        self._hits = {target: np.zeros((len(self.depths), 3)) for target in tokenizer.vocabularies}
        self._counts = dict.fromkeys(tasks, 0)
        self._use = DigitUse(spec)

    def to_json(self) -> dict[str, Any]:
        """All counts and sums, for ``merge``: nothing that grows with the items."""
        return {
            "errors": {task: sums.tolist() for task, sums in self._errors.items()},
            "hits": {target: sums.tolist() for target, sums in self._hits.items()},
            "counts": dict(self._counts),
            "use": [counts.tolist() for counts in self._use.counts],
        }

    def merge(self, other: dict[str, Any]) -> None:
        """Adds what ``to_json`` gave of other items, of the same tokenizer and depths."""
        self._errors = {name: own + np.reshape(other["errors"][name], own.shape) for name, own in self._errors.items()}
        self._hits = {name: own + np.reshape(other["hits"][name], own.shape) for name, own in self._hits.items()}
        self._counts = {name: own + other["counts"][name] for name, own in self._counts.items()}
        for own, its in zip(self._use.counts, other["use"], strict=True):
            own += np.array(its)

    @torch.no_grad()
    def update(self, items: ItemTensors, digits_NL: torch.Tensor) -> None:
        """Takes a batch of items and their digits, int16 [N, L]."""
        self._use.update(digits_NL.numpy())
        if not self.depths:
            return
        model, codec = self.tokenizer.model, self.tokenizer.codec
        items = items.to(self.tokenizer.device)
        for task, has_N in (items.present | items.labelled).items():
            self._counts[task] += int(has_N.sum())
        for place, depth in enumerate(self.depths):
            z_ND = codec.decode_digits(digits_NL, num_digits=depth).to(self.tokenizer.device)
            for task, (loss_N, _) in model.task_losses(z_ND, items).items():
                self._errors[task][place] += float(loss_N.double().sum())
            for target in items.labelled:
                self._hits[target][place] += _hits(
                    model.heads[target](z_ND), items.labels[target], items.labelled[target]
                )

    def result(self, words_NW: np.ndarray) -> dict[str, Any]:
        """The report as a JSON value.

        ``items``, ``bits`` of a SID; ``digits``: entropy in bits and unused values of each digit, and which digits are ``idle``;
        ``collisions``: items that share their SID with another one, and the most that share one. With depths, also:

        ``reconstruction``: by source, relative squared error (1: as bad as the training items' mean) by depth.
        ``accuracy``: by target, top-1 accuracy, or micro-averaged F1 at probability 0.5 where multi-label, by depth.
        ``target_loss``: by target, by depth. ``counts``: items that had a value, by source and target. ``prefixes``: entropy in bits and number of distinct prefixes by depth. Sources
        and targets of which no item had a value are left out.

        Args:
            words_NW: packed SIDs of all the items, int64.
        """
        config, spec = self.tokenizer.model.config, self.tokenizer.codec.spec
        shared, largest = shared_sids(words_NW)
        short = {
            "items": len(words_NW),
            "bits": spec.bits,
            "digits": {"entropy": self._use.entropy(), "unused": self._use.unused(), "idle": self._use.idle()},
            "collisions": {"items": shared, "largest": largest},
        }
        if not self.depths:
            return short
        groups = PrefixGroups.of(spec, words_NW)
        prefixes = [groups.use(depth) for depth in self.depths]
        mean = {task: (e / self._counts[task]).tolist() for task, e in self._errors.items() if self._counts[task]}
        return short | {
            "depths": list(self.depths),
            "reconstruction": {source: mean[source] for source in config.sources if source in mean},
            "target_loss": {target: mean[target] for target in config.targets if target in mean},
            "accuracy": {
                target: _score(hits, config.targets[target].multi_label)
                for target, hits in self._hits.items()
                if target in mean
            },
            "counts": {task: count for task, count in self._counts.items() if count},
            "prefixes": {"entropy": [p.entropy for p in prefixes], "distinct": [p.distinct for p in prefixes]},
        }


def kept(tokenizer: Tokenizer, stream: ItemStream, *, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """What became of the stream's published SIDs; the same on every process.

    Args:
        tokenizer: that has been asked to keep them.
        stream: opened with ``published``.
        rank, world_size: this process, which encodes its stretch of the items.

    Returns:
        ``items``: how many have a published SID; ``changed``: the share of them of which some digit is another one now.
    """
    counts = torch.zeros(2, dtype=torch.float64)
    for _, block in stream.blocks(share=(rank, world_size)):
        published_NL = block.published[DIGITS]
        is_here_N = published_NL[:, 0] >= 0
        is_other_N = (tokenizer.digits(block) != published_NL).any(1)
        counts += torch.stack([is_here_N.sum(), (is_other_N & is_here_N).sum()])
    sum_over_processes(counts)
    items, changed = counts.tolist()
    return {"items": int(items), "changed": changed / max(items, 1)}


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
