"""VQ Fusion: several sources of an item -> one latent -> quantizer -> every source and target back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.keep import moved
from sidrec_torchrec.codec.quantizer import Quantizer, QuantizerOutput
from sidrec_torchrec.fusion.config import Keep, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.losses import TaskWeights, global_means, reconstruction_loss, target_loss
from sidrec_torchrec.names import ModulesByName, escape

DIGITS = "digits"


@dataclass(frozen=True)
class ItemTensors:
    """N items.

    Args:
        sources: float32 [N, d] by source; any value where missing.
        present: bool [N] by source.
        labels: by target, int64 [N] or float32 [N, C]; see ``target_loss``. Encoding needs none.
        labelled: bool [N] by target.
        published: ``DIGITS``, int16 [N, L], the SIDs to keep, -1 in items that have none; empty where nothing is to be kept.
    """

    sources: dict[str, Tensor]
    present: dict[str, Tensor]
    labels: dict[str, Tensor] = field(default_factory=dict)
    labelled: dict[str, Tensor] = field(default_factory=dict)
    published: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(sources: Mapping[str, np.ndarray | Tensor]) -> "ItemTensors":
        """Items from their vectors alone, which is all that encoding needs.

        Args:
            sources: float [N, d] by source. As in ``items.parquet``, a vector of zeros means that the item has none.

        Example::

            sids = tokenizer.encode(ItemTensors.of({"text_emb": text_ND, "image_emb": image_NE}))
        """
        tensors = {name: torch.as_tensor(x_ND).float() for name, x_ND in sources.items()}
        return ItemTensors(tensors, {name: x_ND.any(1) for name, x_ND in tensors.items()})

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    def select(self, rows: Tensor | slice) -> "ItemTensors":
        """Some of the items."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device) -> "ItemTensors":
        """The same items on ``device``."""
        return self._map(lambda value: value.to(device))

    def followed_by(self, other: "ItemTensors") -> "ItemTensors":
        """These items, then the others."""
        parts = zip(self._parts(), other._parts(), strict=True)
        return ItemTensors(*({name: torch.cat([x, b[name]]) for name, x in a.items()} for a, b in parts))

    def _parts(self) -> tuple[dict[str, Tensor], ...]:
        return self.sources, self.present, self.labels, self.labelled, self.published

    def _map(self, change: Callable[[Tensor], Tensor]) -> "ItemTensors":
        return ItemTensors(*({name: change(value) for name, value in part.items()} for part in self._parts()))


class VQFusion(nn.Module):
    """The tokenizer's model, a multi-task VQ-VAE.

    Linear maps started at the principal components of all sources side by side, with perceptrons beside them that start
    at zero: training begins at linear PCA with a closed-form quantizer, and improves on it.

    Args:
        config: sources, targets, sizes.
    """

    quantizer: Quantizer
    standardize: nn.ModuleDict
    config: VQFusionConfig
    keep: Keep | None

    def __init__(self, config: VQFusionConfig) -> None:
        super().__init__()
        self.config = config
        self.keep = None
        d = config.latent_dim
        self.standardize = ModulesByName({name: Standardize(width) for name, width in config.sources.items()})
        self.encoders = ModulesByName({n: Residual(w, d, config) for n, w in config.read_sources.items()})
        self.absent = nn.ParameterDict({escape(n): nn.Parameter(torch.zeros(d)) for n in config.read_sources})
        self.fuse = Perceptron(d, d, config) if config.hidden_dim else None
        self.quantizer = config.quantizer.build(d)
        self.decoders = ModulesByName({n: Residual(d, w, config) for n, w in config.sources.items()})
        # classes turn on directions that carry little of the latent's variance: give each weight an input of size 1
        heads = {n: Residual(d, t.num_classes, config, gain=d**0.5) for n, t in config.targets.items()}
        self.heads = ModulesByName(heads)
        self.weights = TaskWeights(
            config.task_weights,
            {task: task in config.sources for task in config.tasks},
            learned=config.weighting == "uncertainty",
        )

    def latent(self, items: ItemTensors) -> Tensor:
        """The fused latent before quantization, float32 [N, latent_dim]; missing sources count as learned vectors."""
        total_ND = torch.zeros(())
        for name in self.config.read_sources:
            z_ND = self.encoders[name](self.standardized(items, name))
            total_ND = total_ND + torch.where(items.present[name].unsqueeze(1), z_ND, self.absent[escape(name)])
        return total_ND if self.fuse is None else total_ND + self.fuse(total_ND)

    def forward(self, items: ItemTensors, kept: ItemTensors | None = None) -> tuple[Tensor, Tensor, QuantizerOutput]:
        """Encodes a batch, and takes the ``losses`` of what its digits decode to.

        Args:
            items: N items to learn from.
            kept: others whose published SIDs are to be kept, too.

        Returns:
            The total loss, scalar; the losses of ``config.tasks``, float [K], detached; the quantizer's output.
        """
        quantized = self.quantizer(self.latent(items))
        loss, losses_K = self.losses(quantized, items)
        return loss + self.keep_loss(items if kept is None else items.followed_by(kept)), losses_K, quantized

    def losses(self, quantized: QuantizerOutput, items: ItemTensors) -> tuple[Tensor, Tensor]:
        """Losses of encoded items; in training, some are decoded from a prefix of their digits (``prefix_share``).

        Returns:
            The total loss, scalar, and the losses of ``config.tasks``, float [K], detached: means over all processes' rows
            that have the source or label, as this process's share (see ``global_means``).
        """
        z_ND = self._cut(quantized) if self.training and self.config.prefix_share else quantized.z_q_ND
        rows = self.task_losses(z_ND, items).values()
        sums = [loss_N.sum() for loss_N, _ in rows] + [quantized.loss * len(items)]
        counts = [has_N.sum() for _, has_N in rows] + [torch.tensor(len(items), device=z_ND.device)]
        means = global_means(torch.stack(sums), torch.stack(counts).float())
        losses_K, quantizer_loss = means[:-1], means[-1]
        return self.weights(losses_K) + quantizer_loss, losses_K.detach()

    def task_losses(self, z_ND: Tensor, items: ItemTensors) -> dict[str, tuple[Tensor, Tensor]]:
        """By task the items hold values for: the loss by row (float [N], 0 where missing) and whether the row has one."""
        losses = {}
        for name in self.config.sources:
            if name in items.present:
                loss_N = reconstruction_loss(self.decoders[name](z_ND), self.standardized(items, name))
                losses[name] = torch.where(items.present[name], loss_N, 0.0), items.present[name]
        for name in self.config.targets:
            if name in items.labelled:
                loss_N = target_loss(self.heads[name](z_ND), items.labels[name])
                losses[name] = torch.where(items.labelled[name], loss_N, 0.0), items.labelled[name]
        return losses

    def hold(self, keep: Keep) -> None:
        """From here on training keeps the codec as it is, and pulls at changed digits of ``ItemTensors.published``."""
        self.keep = keep
        self.quantizer.freeze()

    def drop(self, share: float) -> None:
        """From here on training drops this share of the hidden units, whatever ``config`` says."""
        for dropout in _dropouts(self):
            dropout.p = share

    def keep_loss(self, items: ItemTensors) -> Tensor:
        """The weight times the mean of ``moved_rows`` over published items, as this process's share; 0 without ``hold``."""
        if self.keep is None or not items.published:
            return torch.zeros(())
        moved_M = self.moved_rows(items)
        count = torch.tensor([float(len(moved_M))], device=moved_M.device)
        return self.keep.weight * global_means(moved_M.sum().unsqueeze(0), count).squeeze(0)

    def moved_rows(self, items: ItemTensors) -> Tensor:
        """Of the M items that have a published SID, how far each is beyond keeping it, float [M]; see ``codec.keep.moved``.

        Without dropout: what counts is the SID that an item will get.
        """
        assert self.keep is not None
        held = items.select((items.published[DIGITS] >= 0).all(1))
        quantizer = self.quantizer
        with _without_dropout(self):
            z_MD = self.latent(held)
        return moved(z_MD, quantizer.offset, quantizer.digit_tables(), held.published[DIGITS], margin=self.keep.margin)

    @torch.no_grad()
    def start(self, items: ItemTensors) -> None:
        """Starts from a sample: linear maps at the principal components of the sources read, then the quantizer.

        Predicted sources and targets start at their means.

        ``standardize`` must be set before. Give every process the same sample.
        """
        names = self.config.read_sources
        parts = [self.standardized(items, name) for name in names]
        x_NE = torch.cat(parts, dim=1).double()  # a missing source counts as its mean
        directions_ED = torch.linalg.eigh(x_NE.T @ x_NE).eigenvectors.flip(1)[:, : self.config.latent_dim]
        for name in self.config.predicted:
            linear = _linear(self.decoders, name)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for name, part_ED in zip(names, directions_ED.float().split([p.shape[1] for p in parts]), strict=True):
            for linear, weight in ((_linear(self.encoders, name), part_ED.T), (_linear(self.decoders, name), part_ED)):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
                linear.weight[: weight.shape[0], : weight.shape[1]] = weight
        for name, target in self.config.targets.items():
            linear = _linear(self.heads, name)
            nn.init.zeros_(linear.weight)
            linear.bias.copy_(_log_odds(items.labels[name][items.labelled[name]], target))
        was_training = self.training
        self.eval()
        self.quantizer.initialize(self.latent(items))
        self.train(was_training)

    def standardized(self, items: ItemTensors, name: str) -> Tensor:
        """A source's standardized vectors, [N, d]; zeros, the mean, where missing, whatever the input holds there."""
        return torch.where(items.present[name].unsqueeze(1), self.standardize[name](items.sources[name]), 0.0)

    def without(self, quantized: QuantizerOutput, is_off_NL: Tensor) -> Tensor:
        """Decoded digits [N, latent_dim], but for those that are off, bool [N, L]; the offset stays."""
        z_ND = quantized.z_q_ND
        for j, table in enumerate(self.quantizer.digit_tables()):
            z_ND = z_ND - is_off_NL[:, j : j + 1] * table[quantized.digits_NL[:, j].long()]
        return z_ND

    def _cut(self, quantized: QuantizerOutput) -> Tensor:
        """Decoded digits [N, latent_dim], for a share of the items those of a prefix of random length alone.

        Source: nested dropout (Rippel et al. 2014), so that every prefix of a SID is a coarser SID.
        """
        digits_NL = quantized.digits_NL
        num_items, num_digits = digits_NL.shape
        length_N1 = torch.randint(1, num_digits + 1, (num_items, 1), device=digits_NL.device)
        is_cut_N1 = torch.rand(num_items, 1, device=digits_NL.device) < self.config.prefix_share
        return self.without(quantized, is_cut_N1 & (length_N1 <= torch.arange(num_digits, device=digits_NL.device)))


class Standardize(nn.Module):
    """Centers a source and scales it to total variance 1, by statistics of the training items."""

    mean_D: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    def set(self, mean_D: Tensor, total_variance: Tensor) -> None:
        """Takes the statistics: the mean [D], and the sum over components of the variance."""
        self.mean_D.copy_(mean_D)
        self.scale.copy_(total_variance.clamp_min(1e-12).rsqrt())

    def forward(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean_D) * self.scale

    def invert(self, x_ND: Tensor) -> Tensor:
        """Back to the source's own scale."""
        return x_ND / self.scale + self.mean_D


class Perceptron(nn.Module):
    """One hidden layer; starts as zero."""

    def __init__(self, d_in: int, d_out: int, config: VQFusionConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_in, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden_dim, d_out)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        scaled_ND = x_ND * x_ND.shape[1] ** 0.5  # from total variance 1 to variance 1 of each component
        return self.output(self.dropout(nn.functional.gelu(self.hidden(scaled_ND))))


class Residual(nn.Module):
    """A linear map, of ``gain`` times the input, plus, if the config has hidden units, a perceptron."""

    def __init__(self, d_in: int, d_out: int, config: VQFusionConfig, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.linear = nn.Linear(d_in, d_out)
        self.perceptron = Perceptron(d_in, d_out, config) if config.hidden_dim else None

    def forward(self, x_ND: Tensor) -> Tensor:
        y_ND = self.linear(x_ND * self.gain)
        return y_ND if self.perceptron is None else y_ND + self.perceptron(x_ND)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = [module for module in _dropouts(model) if module.training]
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        for module in dropouts:
            module.train()


def _dropouts(model: nn.Module) -> list[nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def _linear(maps: nn.ModuleDict, name: str) -> nn.Linear:
    """The linear part of one of some ``Residual`` maps."""
    return cast(Residual, maps[name]).linear


def _log_odds(labels: Tensor, target: TargetConfig) -> Tensor:
    """The logits [C] that predict each class as often as ``labels`` (all of them there) hold it."""
    if target.multi_label:
        return torch.logit((labels.sum(0) + 0.5) / (len(labels) + 1))
    counts_C = torch.bincount(labels, minlength=target.num_classes) + 0.5
    return torch.log(counts_C / counts_C.sum())
