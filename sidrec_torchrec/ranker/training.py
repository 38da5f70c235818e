"""Training a ranker on prepared sequences: what the training loop needs to know of it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchrec.distributed.train_pipeline import TrainPipeline, TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule

from sidrec_torchrec.data.batches import ItemFeatures, RankBatch, SequenceBatches
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.errors import check_at_least
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.evaluation import evaluate
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.sharding import OptimizerConfig, RankerOptimizer
from sidrec_torchrec.storage.mirror import is_mirrored
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.loop import Course, LoopConfig
from sidrec_torchrec.training.profiler import profiled
from sidrec_torchrec.training.progress import Stage
from sidrec_torchrec.training.trackers import check_trackers
from sidrec_torchrec.training.trainee import Step, Trainee, Values


@dataclass(frozen=True, kw_only=True)
class RankerTrainingConfig:
    """A ranker, and how it is trained.

    Args:
        epochs: passes over the training sequences.
        batch_events: events in a batch over all processes, padding included; 0 for a fiftieth of the training events,
            but 512 at least and 8,192 at most.
        checkpoint_batches: batches between two checkpoints; one is also made after each epoch.
        checkpoint_minutes: minutes between two, besides; 0 makes one after every batch.
        keep_epochs: of how many of the last epochs the states are kept, too, to go back to.
        profile: first and last batch to trace, such as ``10:20``, counted from 1 where the process begins; none given: none.
        tracker: where losses and measures go: ``tensorboard``, ``mlflow``, ``wandb``.
        seed: of weights, dropout and shuffling.
        model: sizes of the ranker.
        optimizer: rates and schedule.
    """

    epochs: int = 5
    batch_events: int = 0
    checkpoint_batches: int = 1000
    checkpoint_minutes: float = 10.0
    keep_epochs: int = 0
    profile: str = ""
    tracker: tuple[str, ...] = ("tensorboard",)
    seed: int = 0
    model: RankerConfig = field(default_factory=RankerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "checkpoint_batches")
        check_at_least(self, 0, "batch_events", "checkpoint_minutes", "keep_epochs", "seed")
        profiled(self.profile)
        check_trackers(self.tracker)

    def events_at_once(self, trained_on: Prepared) -> int:
        """Events in a batch over all processes, padding included."""
        return self.batch_events or min(max(trained_on.counts["train"]["events"] // 50, 512), 8192)

    def loop(self) -> LoopConfig:
        """What of it the training loop sees to."""
        return LoopConfig(
            epochs=self.epochs,
            checkpoint_batches=self.checkpoint_batches,
            checkpoint_minutes=self.checkpoint_minutes,
            keep_epochs=self.keep_epochs,
            profile=self.profile,
        )

    def batches(self, prepared: Prepared, features: ItemFeatures, split: str, processes: Processes) -> SequenceBatches:
        """This process's batches of a split; training ones are shuffled."""
        return SequenceBatches(
            prepared,
            split,
            features,
            batch_events=self.events_at_once(prepared),
            rank=processes.rank,
            world_size=processes.world_size,
            shuffle=split == "train",
            seed=self.seed,
        )


class RankerTraining(Trainee):
    """A sharded ranker in training.

    Args:
        name: for progress: the arm's.
        config: how to train.
        model: the sharded ranker.
        prepared: sequences to train and validate on.
        features: what travels with their events.
        processes: the group.
    """

    optimizer: RankerOptimizer

    def __init__(
        self,
        name: str,
        config: RankerTrainingConfig,
        model: nn.Module,
        prepared: Prepared,
        features: ItemFeatures,
        processes: Processes,
    ) -> None:
        self.name = name
        self.model = model
        self.losses = prepared.predicted
        self.epoch_size = prepared.counts["train"]["targets"]
        self.validation_size = prepared.counts["validation"]["targets"]
        self.optimizer = RankerOptimizer(model, config.optimizer)
        self._has_labels = bool(prepared.tasks)
        self._config = config
        self._processes = processes
        self._weights = config.model.weights(len(prepared.predicted))
        self._train = config.batches(prepared, features, "train", processes)
        self._validation = config.batches(prepared, features, "validation", processes)

    def seed(self, epoch: int, batch: int) -> None:
        """Dropout depends on the batch's place alone."""
        place = (self._config.seed, epoch, batch, self._processes.rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def steps(self, epoch: int, first: int, before_step: Callable[[], None]) -> Iterator[Step]:
        """See ``Trainee``."""
        pipeline = _pipeline(self.model, self.optimizer, self._processes.device)
        self._train.start_at(epoch, first)
        loader = self.waits.timed(_loader(self._train, self._processes.device))
        while True:
            before_step()
            try:
                output: RankerOutput = pipeline.progress(loader)
            except StopIteration:
                break
            yield Step(int(output.global_targets), output.loss_sum, output.weight.sum(0))
        if isinstance(pipeline, TrainPipelineSparseDist):
            pipeline.detach()  # gives the model its own forward back, to evaluate with

    def batch(self, epoch: int, number: int) -> dict[str, np.ndarray]:
        """See ``Trainee``; names as in ``RankBatch``."""
        self._train.start_at(epoch, number)
        return next(iter(self._train)).arrays()

    def validate(self, progress: Stage) -> Values:
        """See ``RankingMetrics.compute``; nothing where no user validates."""
        return evaluate(self.model, self._validation, self._processes, progress) if self.validation_size else {}

    def score(self, values: Values) -> float | None:
        return values.get("ne_all" if self._has_labels else "nmse_all")

    def result(self, course: Course) -> dict[str, Any]:
        """How training went, as jobs report it."""
        return {
            "validation": course.validation(),
            "train_loss": [self.total(losses) for losses in course.training()],
            "train_seconds": course.seconds,
            "best_epoch": course.best,
        }

    def total(self, losses: dict[str, float]) -> float:
        """The sum over tasks, weighted."""
        return sum(weight * loss for weight, loss in zip(self._weights, losses.values(), strict=True))


def _pipeline(model: nn.Module, optimizer: RankerOptimizer, device: torch.device) -> TrainPipeline:
    """Sends the next batch's ids to their shards while this one is computed, if the model has sharded tables."""
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        return TrainPipelineSparseDist(model, optimizer, device)
    return TrainPipelineBase(model, optimizer, device)


def _loader(data: SequenceBatches, device: torch.device) -> Iterable[RankBatch]:
    """Batches made one ahead by a worker where the device is a GPU; on CPU the cores are busy with the model."""
    if device.type == "cpu":
        return data
    start = "spawn" if is_mirrored(data.prepared.folder) else None  # a forked process cannot use a store's connections
    return DataLoader(
        data, batch_size=None, num_workers=1, pin_memory=True, prefetch_factor=4, multiprocessing_context=start
    )
