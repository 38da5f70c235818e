"""Training VQ Fusion on a stream of items: what the training loop needs to know of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice, zip_longest
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from sidrec_torchrec.errors import DataError, SidrecError, check_at_least
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.lengths import Lengths
from sidrec_torchrec.fusion.model import ItemTensors, Standardize, VQFusion
from sidrec_torchrec.processes import is_first_process
from sidrec_torchrec.training.group import Processes, fixed_buckets
from sidrec_torchrec.training.loop import LoopConfig
from sidrec_torchrec.training.profiler import profiled
from sidrec_torchrec.training.progress import Stage, say
from sidrec_torchrec.training.schedule import rate_factor
from sidrec_torchrec.training.trackers import check_trackers
from sidrec_torchrec.training.trainee import NotFiniteError, Step, Trainee, Values

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
        least_told: predicted sources of which content tells less than this share, on items it has not met, are left out: what is
            chance would be learned by heart, at the cost of content. See ``fusion.told``.
        patience: epochs without improvement after which training stops. The first epochs lose some of what the closed form
            had found, so leave it room.
        checkpoint_minutes: minutes between two checkpoints; one is also made after each epoch. 0 makes one after every batch.
        keep_epochs: of how many of the last epochs the states are kept, too, to go back to.
        profile: first and last batch to trace, such as ``10:20``, counted from 1 where the process begins; none given: none.
        tracker: where losses and measures go: ``tensorboard``, ``mlflow``, ``wandb``.
        seed: of weights, dropout and shuffling.
    """

    epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    least_told: float = 0.05
    patience: int = 20
    checkpoint_minutes: float = 10.0
    keep_epochs: int = 0
    profile: str = ""
    tracker: tuple[str, ...] = ("tensorboard",)
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, 0, "epochs", "learning_rate", "weight_decay", "checkpoint_minutes", "keep_epochs", "seed")
        check_at_least(self, 1, "batch_size", "patience")
        profiled(self.profile)
        check_trackers(self.tracker)

    def loop(self) -> LoopConfig:
        """What of it the training loop sees to."""
        return LoopConfig(
            epochs=self.epochs,
            checkpoint_minutes=self.checkpoint_minutes,
            keep_epochs=self.keep_epochs,
            patience=self.patience,
            profile=self.profile,
        )


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
            torch.manual_seed(self._order(epoch) * self._processes.world_size + self._processes.rank)

    def steps(self, epoch: int, first: int, before_step: Callable[[], None]) -> Iterator[Step]:
        """See ``Trainee``. Items are shuffled as they are read: those of the first batches are read again."""
        self._parallel = self._parallel or DistributedDataParallel(self.model, **fixed_buckets())
        rank, world_size = self._processes.rank, self._processes.world_size
        batches = zip_longest(self._batches(epoch), self._only_kept(self._order(epoch)))
        for batch, kept in self.waits.timed(islice(batches, first, None)):
            before_step()
            share = batch.select(slice(rank, None, world_size)).to(self._processes.device)
            kept_share = kept and kept.select(slice(rank, None, world_size)).to(self._processes.device)
            try:
                loss, losses_K, _ = self._parallel(share, kept_share)
            except SidrecError:
                raise
            except ValueError as error:  # the quantizer's, which refuses latents that are not finite
                raise NotFiniteError(str(error)) from error
            self.optimizer.step(loss)
            yield Step(1, losses_K, torch.ones_like(losses_K))

    def _order(self, epoch: int) -> int:
        """Seed of an epoch's order."""
        return self._config.seed * 100_003 + epoch + 1

    def _batches(self, epoch: int) -> Iterator[ItemTensors]:
        return self._train.shuffled(self._config.batch_size, self._order(epoch))

    def batch(self, epoch: int, number: int) -> dict[str, np.ndarray]:
        """See ``Trainee``; names as in ``ItemTensors``."""
        batch = next(islice(self._batches(epoch), number, None))
        share = batch.select(slice(self._processes.rank, None, self._processes.world_size))
        parts = {field.name: getattr(share, field.name) for field in fields(share)}
        return {f"{part}.{name}": value.numpy() for part, values in parts.items() for name, value in values.items()}

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
            progress.advance(0)
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
        self._norm = torch.zeros(())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adam = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)

    def set_progress(self, progress: float) -> None:
        factor = rate_factor(progress + 1 / self._steps, warmup=_WARMUP, decay_from=0.0)
        for group in self._adam.param_groups:
            group["lr"] = self._config.learning_rate * factor

    def step(self, loss: Tensor) -> None:
        """Raises NotFiniteError on a gradient that is not finite: the same on every process, and no weight is spoilt yet."""
        self._adam.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(self._model.parameters(), _LARGEST_GRADIENT)
        if not norm.isfinite():
            raise NotFiniteError(f"the norm of the gradients is {float(norm)}")
        self._norm = norm
        self._adam.step()

    def measures(self) -> dict[str, float]:
        return {"gradient_norm": float(self._norm), "learning_rate": self._adam.param_groups[0]["lr"]}

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self._model, self._adam)

    def state_to_load(self) -> dict[str, Any]:
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self._model, self._adam, state)


@torch.no_grad()
def standardize(model: VQFusion, train: ItemStream, device: torch.device) -> int:
    """Sets the sources' means and scales from one pass over the training items; returns their number.

    Says where few vectors are so long that the others are lost beside them.

    Raises:
        DataError: if there are none, or a source is missing in all of them, or float32 could make nothing of it.
    """
    sums = {name: torch.zeros(dim, dtype=torch.float64) for name, dim in model.config.sources.items()}
    lengths, num_items = {name: Lengths() for name in sums}, 0
    for block in train.again():
        num_items += len(block)
        for name in sums:
            x_ND = block.sources[name][block.present[name]].double()
            sums[name] += x_ND.sum(0)
            lengths[name].update(x_ND)
    if not num_items:
        raise DataError(f"{train.items.path}: no item is left to train on; exclude or hold back fewer")
    for name, sum_D in sums.items():
        count, squares = lengths[name].count, lengths[name].squares
        if not count:
            raise DataError(f"{train.items.path}: column '{name}': missing in every training item; drop it")
        mean_D, square = sum_D / count, squares / count
        if not _SQUARES[0] <= square <= _SQUARES[1]:
            raise DataError(
                f"{train.items.path}: column '{name}': its vectors have length {square**0.5:.1e} (root mean "
                "square), of which float32 would make nothing; scale them to about 1"
            )
        if lengths[name].are_uneven:
            _tell_of_the_longest(train, name, lengths[name])
        variance = torch.tensor(square - float(mean_D.square().sum()))
        cast(Standardize, model.standardize[name]).set(mean_D.to(device), variance.to(device))
    return num_items


def _tell_of_the_longest(train: ItemStream, name: str, lengths: Lengths) -> None:
    if not is_first_process():
        return
    for item_ids, block in train.blocks():
        length_N = block.sources[name].double().square().sum(1).sqrt() * block.present[name]
        if length_N.max() >= lengths.longest * (1 - 1e-9):
            mean = (lengths.total - lengths.longest) / max(lengths.count - 1, 1)
            say(
                f"{train.items.path}: column '{name}': item {item_ids[int(length_N.argmax())]}'s vector has length "
                f"{lengths.longest:.3g}, the others have {mean:.3g} on the mean: SIDs will tell the longest vectors from the "
                "rest, and little else. Mend or drop them, or scale all to one length"
            )
            return
