"""Training VQ Fusion on a stream of items: what the training loop needs to know of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from sidrec_torchrec.errors import DataError, SidrecError, check_at_least
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import ItemTensors, Standardize, VQFusion
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.loop import LoopConfig, Step, Trainee, Values
from sidrec_torchrec.training.progress import Stage
from sidrec_torchrec.training.schedule import rate_factor

# mean squared lengths of sources: their variances must be more than ``Standardize`` takes for none
_SQUARES = (1e-11, 1e37)
_WARMUP = 0.1
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """How a tokenizer is trained.

    Args:
        epochs: passes over the training items.
        batch_size: items in a batch over all processes.
        learning_rate: peak rate of AdamW; it rises over a tenth of the steps and falls to 0 along a cosine.
        weight_decay: of AdamW.
        patience: epochs without improvement after which training stops. The first epochs lose some of what the closed form
            had found, so leave it room.
        seed: of weights, dropout and shuffling.
    """

    epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, 0, "epochs", "learning_rate", "weight_decay", "seed")
        check_at_least(self, 1, "batch_size", "patience")

    def loop(self) -> LoopConfig:
        """What of it the training loop sees to."""
        return LoopConfig(epochs=self.epochs, patience=self.patience)


class TokenizerTraining(Trainee):
    """VQ Fusion in training; its start, in closed form or at another tokenizer, is epoch 0, which training must beat.

    Args:
        config: how to train.
        model: on the process's device.
        train: items to train on.
        validation: items that choose the epoch; where there are none, those trained on do.
        processes: the group; each process takes its share of every batch.
        take: called after the closed-form start, to put weights of another tokenizer into the model; None to start there.

    Attributes:
        validation: items that choose the epoch.

    Raises:
        DataError: if no item is left to train on, or a source is missing in all of them, or is too large or small for
            float32.
    """

    model: VQFusion
    optimizer: "_Optimizer"
    starts_trained = True

    def __init__(
        self,
        config: TokenizerTrainingConfig,
        model: VQFusion,
        train: ItemStream,
        validation: ItemStream,
        processes: Processes,
        take: Callable[[VQFusion], None] | None = None,
    ) -> None:
        self.name = f"tokenizer {model.config.quantizer.stages} of {'+'.join(model.config.read_sources)}"
        self.model = model
        self.losses = model.config.tasks
        self._config = config
        self._processes = processes
        self._train = train
        self._take = take
        self.validation = validation if next(validation.again(), None) is not None else train
        num_items = standardize(model, train, processes.device)
        self.epoch_size = -(-num_items // config.batch_size)
        self.optimizer = _Optimizer(model, config, steps=self.epoch_size * config.epochs)
        self._parallel: DistributedDataParallel | None = None

    def begin(self) -> None:
        """Starts the model in closed form, from a sample that is the same on every process; or where it is told to."""
        self.model.start(self._train.sample(self._config.seed).to(self._processes.device))
        if self._take is not None:
            self._take(self.model)

    def seed(self, epoch: int, batch: int) -> None:
        """Anew for each epoch."""
        if batch == 0:
            seed = self._config.seed * 100_003 + epoch + 1
            torch.manual_seed(seed * self._processes.world_size + self._processes.rank)

    def steps(self, epoch: int, first: int, before_step: Callable[[], None]) -> Iterator[Step]:
        """See ``Trainee``.

        Raises:
            SidrecError: if training diverges, before a weight is spoilt.
        """
        if first:
            raise ValueError("items are shuffled as they are read: an epoch begins at its first batch")
        self._parallel = self._parallel or DistributedDataParallel(self.model)
        rank, world_size = self._processes.rank, self._processes.world_size
        seed = self._config.seed * 100_003 + epoch + 1
        batches = self._train.shuffled(self._config.batch_size, seed)
        for batch, kept in zip_longest(batches, self._only_kept(seed)):
            before_step()
            share = batch.select(slice(rank, None, world_size)).to(self._processes.device)
            kept_share = kept and kept.select(slice(rank, None, world_size)).to(self._processes.device)
            try:
                loss, losses_K, _ = self._parallel(share, kept_share)
            except SidrecError:
                raise
            except ValueError as error:  # the quantizer's, which refuses latents that are not finite
                raise SidrecError(f"training diverged in epoch {epoch + 1} ({error}); lower learning_rate") from error
            self.optimizer.step(loss, epoch)
            yield Step(1, losses_K, torch.ones_like(losses_K))

    def _only_kept(self, seed: int) -> Iterator[ItemTensors]:
        """Validation items, for each of an epoch's steps some: what is published of them is kept, and nothing else learned."""
        if self.model.keep is None or self.validation is self._train:
            return iter(())
        count = sum(len(block) for block in self.validation.again())
        return self.validation.shuffled(-(-count // int(self.epoch_size)), seed)

    @torch.no_grad()
    def validate(self, progress: Stage) -> Values:
        """Losses by task over the validation items, and their weighed sum, ``total``.

        With SIDs to be kept also ``moved``, what is pulled at (see ``VQFusion.moved_rows``), which is part of the total.
        """
        tasks = self.model.config.tasks
        sums_K, counts_K = torch.zeros(len(tasks), dtype=torch.float64), torch.zeros(len(tasks), dtype=torch.float64)
        moved = torch.zeros(2, dtype=torch.float64)
        for block in self.validation.again():
            items = block.to(self._processes.device)
            if self.model.keep is not None:
                moved_M = self.model.moved_rows(items)
                moved += torch.tensor([float(moved_M.double().sum()), len(moved_M)])
            z_ND = self.model.quantizer(self.model.latent(items)).z_q_ND
            for k, (loss_N, has_N) in enumerate(self.model.task_losses(z_ND, items).values()):
                sums_K[k] += loss_N.double().sum().cpu()
                counts_K[k] += has_N.sum().cpu()
        losses = dict(zip(tasks, (sums_K / counts_K.clamp_min(1)).tolist(), strict=True))
        total = self.total(losses)
        if self.model.keep is not None:
            losses["moved"] = float(moved[0] / moved[1].clamp_min(1))
            total += self.model.keep.weight * losses["moved"]
        progress.advance(0, ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
        return losses | {"total": total}

    def score(self, values: Values) -> float | None:
        return values["total"]

    def total(self, losses: dict[str, float]) -> float:
        """The weighed sum."""
        weights = self.model.config.task_weights
        return sum(weights[task] * loss for task, loss in losses.items())


class _Optimizer:
    """AdamW with clipped gradients; a step's rate is that of its end."""

    def __init__(self, model: VQFusion, config: TokenizerTrainingConfig, *, steps: int) -> None:
        self._model = model
        self._config = config
        self._steps = steps
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adam = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)

    def set_progress(self, progress: float) -> None:
        factor = rate_factor(progress + 1 / self._steps, warmup=_WARMUP, decay_from=0.0)
        for group in self._adam.param_groups:
            group["lr"] = self._config.learning_rate * factor

    def step(self, loss: Tensor, epoch: int) -> None:
        """Raises SidrecError on a gradient that is not finite: the same on every process, and no weight is spoilt yet."""
        self._adam.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(self._model.parameters(), _LARGEST_GRADIENT)
        if not norm.isfinite():
            raise SidrecError(f"training diverged in epoch {epoch + 1} (gradient norm {norm}); lower learning_rate")
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self._model, self._adam)

    def state_to_load(self) -> dict[str, Any]:
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self._model, self._adam, state)


@torch.no_grad()
def standardize(model: VQFusion, train: ItemStream, device: torch.device) -> int:
    """Sets the sources' means and scales from one pass over the training items; returns their number.

    Raises:
        DataError: if there are none, or a source is missing in all of them, or float32 could make nothing of it.
    """
    sums = {name: torch.zeros(dim, dtype=torch.float64) for name, dim in model.config.sources.items()}
    squares, counts, num_items = dict.fromkeys(sums, 0.0), dict.fromkeys(sums, 0), 0
    for block in train.again():
        num_items += len(block)
        for name in sums:
            x_ND = block.sources[name][block.present[name]].double()
            sums[name] += x_ND.sum(0)
            squares[name] += float(x_ND.square().sum())
            counts[name] += len(x_ND)
    if not num_items:
        raise DataError(f"{train.items.path}: no item is left to train on; exclude or hold back fewer")
    for name, sum_D in sums.items():
        if not counts[name]:
            raise DataError(f"{train.items.path}: column '{name}': missing in every training item; drop it")
        mean_D, square = sum_D / counts[name], squares[name] / counts[name]
        if not _SQUARES[0] <= square <= _SQUARES[1]:
            raise DataError(
                f"{train.items.path}: column '{name}': its vectors have length {square**0.5:.1e} (root mean "
                "square), of which float32 would make nothing; scale them to about 1"
            )
        variance = torch.tensor(square - float(mean_D.square().sum()))
        cast(Standardize, model.standardize[name]).set(mean_D.to(device), variance.to(device))
    return num_items
