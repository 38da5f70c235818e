"""Trains the ranker with one arm, keeps the best epoch and tests it."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed.train_pipeline import TrainPipeline, TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule

from sidrec_torchrec.data.batches import RankBatch, SequenceBatches
from sidrec_torchrec.data.prepare import Prepared, open_prepared
from sidrec_torchrec.errors import SidrecError, check_at_least
from sidrec_torchrec.files import read_json
from sidrec_torchrec.ranker.arms import Arm, ArmConfig, open_arm
from sidrec_torchrec.ranker.bytes import bytes_per_event, table_bytes
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.metrics import RankingMetrics
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.sharding import OptimizerConfig, RankerOptimizer, shard
from sidrec_torchrec.training.checkpoints import BEST, LAST, Checkpoints
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import CONFIG_FILE, config_from_json, open_run

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TrainRankerConfig:
    """What to train on, and how.

    Args:
        data: folder of ``items.parquet``.
        prepared: folder the prepare job wrote.
        out: folder for checkpoints, curves and ``metrics.json``.
        arm: its name in ``ARMS``: ``none``, ``raw``, ``prefix-ngram``, ``all-ngram``, ``side``, ``learned-side``, ``hybrid``,
            ``id``, or another package's.
        source: sources the raw arm uses; none named means all.
        sids: folders encode-corpus wrote, for the arms that read SIDs: of one fused tokenizer, or one per source.
        epochs: passes over the training sequences.
        batch_events: events in a batch over all processes, padding included; 0 for a fiftieth of the training events,
            but 512 at least and 8,192 at most.
        checkpoint_batches: batches between two checkpoints; one is also made after each epoch.
        seed: of weights, dropout and shuffling.
        model: sizes of the ranker.
        arms: choices within the arm.
        optimizer: rates and schedule.
    """

    data: Path
    prepared: Path
    out: Path
    arm: str = "side"
    source: tuple[str, ...] = ()
    sids: tuple[Path, ...] = ()
    epochs: int = 5
    batch_events: int = 0
    checkpoint_batches: int = 1000
    seed: int = 0
    model: RankerConfig = field(default_factory=RankerConfig)
    arms: ArmConfig = field(default_factory=ArmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "checkpoint_batches")
        check_at_least(self, 0, "batch_events", "seed")


def main(config: TrainRankerConfig) -> dict[str, Any]:
    """Trains; a finished run is read back, an interrupted one goes on from its last checkpoint.

    Returns:
        The content of ``metrics.json``: test metrics, bytes, speed, the course of validation.

    Raises:
        RunMismatchError: if ``out`` holds a run of another configuration.
    """
    with process_group() as processes, open_run(config.out, config) as run:
        return run.result or run.finish(_train_and_test(config, processes))


def open_trained(folder: Path) -> tuple[TrainRankerConfig, Checkpoints]:
    """A run with its best epoch; call on every process of the group.

    Raises:
        SidrecError: if ``folder`` has none.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise SidrecError(f"{path}: not found; name a folder train-ranker wrote")
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    if not checkpoints.has(BEST):
        raise SidrecError(f"{folder}: no trained epoch yet; run train-ranker to its end")
    return config_from_json(TrainRankerConfig, read_json(path) | {"out": str(folder)}), checkpoints


def load_arm(config: TrainRankerConfig, prepared: Prepared) -> Arm:
    """The run's arm; lays out its inputs where they are not yet."""
    return open_arm(
        config.arm, config.arms, data=config.data, prepared=prepared, sources=config.source, sids=config.sids
    )


def build_ranker(config: TrainRankerConfig, prepared: Prepared, arm: Arm, processes: Processes) -> nn.Module:
    """The run's ranker with fresh weights, sharded over the processes."""
    torch.manual_seed(config.seed)
    return shard(unsharded_ranker(config, prepared, arm, processes.device), config.optimizer, processes.device)


def unsharded_ranker(config: TrainRankerConfig, prepared: Prepared, arm: Arm, device: torch.device) -> Ranker:
    """The run's ranker, whole."""
    reader = config.model.reader
    reader.check_arm(config.arm)
    items, sid = reader.items(arm, device), next(iter(arm.sids), None)
    return Ranker(config.model, items, arm.dim, sid, prepared.user_features, device, len(prepared.tasks))


def batches(
    config: TrainRankerConfig, prepared: Prepared, arm: Arm, split: str, processes: Processes
) -> SequenceBatches:
    """This process's batches of a split; training ones are shuffled."""
    return SequenceBatches(
        prepared,
        split,
        arm,
        batch_events=config.batch_events or min(max(prepared.counts["train"]["events"] // 50, 512), 8192),
        rank=processes.rank,
        world_size=processes.world_size,
        shuffle=split == "train",
        seed=config.seed,
    )


@torch.no_grad()
def evaluate(model: nn.Module, data: SequenceBatches, processes: Processes, title: str) -> dict[str, float | None]:
    """Metrics of the model on a split; see ``RankingMetrics.compute``."""
    model.eval()
    metrics = RankingMetrics(processes.rank, processes.world_size, processes.device, data.prepared.tasks)
    total = data.prepared.counts[data.split]["targets"]
    with stage(title, total, show=processes.is_main) as progress:
        for batch in data:
            _, output = model(batch.to(processes.device))
            metrics.update(output)
            progress.advance(int(batch.global_targets))
        values = metrics.compute()
        # few validation targets are cold; of them only the sum is worth a look
        shown = ("warm", "cold") if data.split == "test" else ("all",)
        progress.advance(0, ", ".join(f"NE {part} {_short(values[f'ne_{part}'])}" for part in shown))
    return values


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _train_and_test(config: TrainRankerConfig, processes: Processes) -> dict[str, Any]:
    prepared = open_prepared(config.prepared)
    arm = load_arm(config, prepared)
    model = build_ranker(config, prepared, arm, processes)
    course = Training(config, prepared, arm, model, processes).run()
    checkpoints = Checkpoints(config.out / CHECKPOINTS)
    checkpoints.load(BEST, {"model": model.state_dict()})
    test = evaluate(model, batches(config, prepared, arm, "test", processes), processes, f"{config.arm} test")
    trained_events = prepared.counts["train"]["events"] * len(course["validation"])
    return {
        "arm": config.arm,
        "seed": config.seed,
        "tasks": list(prepared.tasks),
        "test": test,
        **bytes_per_event(arm, prepared),
        "table_bytes": table_bytes(model),
        "train_events_per_s": trained_events / course["train_seconds"],
        **course,
    }


class Training:
    """One run's state: model, optimizer, how far it got."""

    def __init__(
        self, config: TrainRankerConfig, prepared: Prepared, arm: Arm, model: nn.Module, processes: Processes
    ) -> None:
        self.config = config
        self.processes = processes
        self.model = model
        self.optimizer = RankerOptimizer(model, config.optimizer)
        self.train_data = batches(config, prepared, arm, "train", processes)
        self.validation_data = batches(config, prepared, arm, "validation", processes)
        self.epoch_targets = prepared.counts["train"]["targets"]
        self.has_validation = prepared.counts["validation"]["targets"] > 0
        self.checkpoints = Checkpoints(config.out / CHECKPOINTS)
        self.curves = SummaryWriter(config.out / "tensorboard") if processes.is_main else None
        self.course: dict[str, Any] = {"validation": [], "train_loss": [], "train_seconds": 0.0, "best_epoch": 0}
        self.epoch = 0
        self.batch = 0  # batches of this epoch that were trained on
        self.targets = 0  # targets of this epoch that were trained on
        self.weights = config.model.weights(len(prepared.tasks))
        self.loss_sums = [0.0] * len(self.weights)  # by task, of this process's targets of this epoch
        self.labels = [0.0] * len(self.weights)  # by task, how many of them have a label

    def run(self) -> dict[str, Any]:
        """Trains to the end; returns the course of training."""
        if self.checkpoints.has(LAST):
            self._resume()
        while self.epoch < self.config.epochs:
            self._train_epoch()
            self._end_epoch()
        return self.course

    def _train_epoch(self) -> None:
        self.model.train()
        pipeline = _pipeline(self.model, self.optimizer, self.processes.device)
        self.train_data.start_at(self.epoch, self.batch)
        loader = iter(_loader(self.train_data, self.processes.device))
        title = f"{self.config.arm} epoch {self.epoch + 1}/{self.config.epochs}"
        started, seconds_before = time.monotonic(), self.course["train_seconds"]
        with stage(title, self.epoch_targets, show=self.processes.is_main) as progress:
            progress.advance(self.targets)
            while True:
                self._seed_batch()
                self.optimizer.set_progress((self.epoch + self.targets / self.epoch_targets) / self.config.epochs)
                try:
                    output = pipeline.progress(loader)
                except StopIteration:
                    break
                targets = int(output.global_targets)
                loss_sums, labels = output.loss_sum.tolist(), output.weight.sum(0).tolist()
                self.batch += 1
                self.targets += targets
                self.loss_sums = [total + own for total, own in zip(self.loss_sums, loss_sums, strict=True)]
                self.labels = [total + own for total, own in zip(self.labels, labels, strict=True)]
                self.course["train_seconds"] = seconds_before + time.monotonic() - started
                progress.advance(targets, f"loss {self._loss(self.loss_sums, self.labels):.4f}")
                if self.curves is not None:
                    self.curves.add_scalar(
                        "train/loss",
                        self._loss(loss_sums, labels),
                        self.epoch * self.epoch_targets + self.targets,
                    )
                if self.batch % self.config.checkpoint_batches == 0:
                    self._save(LAST)
        if isinstance(pipeline, TrainPipelineSparseDist):
            pipeline.detach()  # gives the model its own forward back, to evaluate with

    def _seed_batch(self) -> None:
        """Dropout depends on the batch's place alone, so that an interrupted run ends as a whole one does."""
        place = (self.config.seed, self.epoch, self.batch, self.processes.rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _end_epoch(self) -> None:
        """Validates, keeps the model if it is the best so far, moves to the next epoch."""
        title = f"{self.config.arm} validation {self.epoch + 1}/{self.config.epochs}"
        values = evaluate(self.model, self.validation_data, self.processes, title) if self.has_validation else {}
        self.course["validation"].append(values)
        self.course["train_loss"].append(self._mean_loss())
        scores = [v.get("ne_all") for v in self.course["validation"]]
        # Without a validation score the last epoch is kept.
        best = min(range(len(scores)), key=lambda e: (scores[e], e)) if None not in scores else self.epoch
        if best == self.epoch:
            self.checkpoints.save(BEST, {"model": self.model.state_dict()})
            self.course["best_epoch"] = self.epoch
        if self.curves is not None:
            for name, value in values.items():
                if value is not None:
                    self.curves.add_scalar(f"validation/{name}", value, (self.epoch + 1) * self.epoch_targets)
            self.curves.flush()
        self.epoch, self.batch, self.targets = self.epoch + 1, 0, 0
        self.loss_sums = self.labels = [0.0] * len(self.weights)
        self._save(LAST)

    def _mean_loss(self) -> float:
        """Over the epoch's targets of all processes."""
        sums = torch.tensor([self.loss_sums, self.labels], dtype=torch.float64, device=self.processes.device)
        dist.all_reduce(sums)
        return self._loss(*sums.tolist())

    def _loss(self, loss_sums: list[float], labels: list[float]) -> float:
        """The weighted sum over tasks of the mean loss."""
        return sum(w * total / max(n, 1) for w, total, n in zip(self.weights, loss_sums, labels, strict=True))

    def _place(self) -> dict[str, Any]:
        """How far training got; in checkpoints as JSON, for they would take lists and dicts apart."""
        names = ("epoch", "batch", "targets", "loss_sums", "labels", "course")
        return {name: getattr(self, name) for name in names}

    def _save(self, name: str) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoints.save(name, state | {"place": json.dumps(self._place())})

    def _resume(self) -> None:
        optimizer = self.optimizer.state_to_load()
        state = {"model": self.model.state_dict(), "optimizer": optimizer, "place": ""}
        self.checkpoints.load(LAST, state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in json.loads(state["place"]).items():
            setattr(self, name, value)


def _pipeline(model: nn.Module, optimizer: RankerOptimizer, device: torch.device) -> TrainPipeline:
    """Sends the next batch's ids to their shards while this one is computed, if the model has sharded tables."""
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        return TrainPipelineSparseDist(model, optimizer, device)
    return TrainPipelineBase(model, optimizer, device)


def _loader(data: SequenceBatches, device: torch.device) -> Iterator[RankBatch]:
    """Batches made one ahead by a worker where the device is a GPU; on CPU the cores are busy with the model."""
    if device.type == "cpu":
        return data
    return DataLoader(data, batch_size=None, num_workers=1, pin_memory=True, prefetch_factor=4)
