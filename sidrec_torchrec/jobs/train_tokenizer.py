"""Trains VQ Fusion on a corpus of items."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from sidrec_torchrec.data.format import Vocabulary, open_items, scan_vocabularies
from sidrec_torchrec.errors import DataError, SidrecError, check_at_least, check_once, check_share
from sidrec_torchrec.fusion.config import QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import VQFusion
from sidrec_torchrec.fusion.report import TokenizerReport
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.training.checkpoints import LAST, Checkpoints
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run

TOKENIZER_FOLDER = "tokenizer"
# mean squared lengths of sources: their variances must be more than ``Standardize`` takes for none
_SQUARES = (1e-11, 1e37)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """What to learn from, and how.

    Args:
        data: folder of ``items.parquet``.
        out: folder for the tokenizer, checkpoints, curves and ``metrics.json``.
        source: sources to fuse; none named means all that are not predicted.
        predict: vector columns to predict as well, without reading them, say co-visitation vectors: items without them, such
            as new ones, are encoded like any other.
        target: categorical columns to predict as well; none named means none.
        exclude: Parquet file with a column ``item_id`` of items to leave out, say those kept to test unseen items.
        epochs: passes over the training items.
        checkpoint_epochs: epochs between two checkpoints.
        batch_size: items in a batch over all processes.
        learning_rate: peak rate of AdamW; it rises over a tenth of the steps and falls to 0 along a cosine.
        weight_decay: of AdamW.
        validation_fraction: share of the items that chooses the best epoch; drawn by a hash of their id.
        patience: epochs without improvement after which training stops; at first, it loses some of what the closed form
            had found, so do not be short of it.
        seed: of weights, dropout and shuffling.
        latent_dim: width of the fused latent.
        hidden_dim: hidden width of encoders and decoders; 0 leaves them linear.
        dropout: share of hidden units dropped in training; None: the fewer the items, the more (0.5 up to 4,000, then
            2,000 / items).
        prefix_share: share of the items of a batch decoded from a random prefix of their digits, so that every prefix of
            a SID is a coarser SID.
        weighting: ``fixed`` weights of the tasks, or learned by ``uncertainty``.
        weights: fixed weight by source or target, predicted ones too; where not named, 1 for a source and 0.5 for a target.
        quantizer: the digits and how they are learned.
    """

    data: Path
    out: Path
    source: tuple[str, ...] = ()
    predict: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    exclude: Path | None = None
    epochs: int = 40
    checkpoint_epochs: int = 5
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    validation_fraction: float = 0.1
    patience: int = 20
    seed: int = 0
    latent_dim: int = 64
    hidden_dim: int = 256
    dropout: float | None = None
    prefix_share: float = 0.25
    weighting: str = "fixed"
    weights: dict[str, float] = field(default_factory=dict)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        check_at_least(self, 0, "epochs", "learning_rate", "weight_decay", "seed", "hidden_dim")
        check_at_least(self, 1, "checkpoint_epochs", "batch_size", "patience", "latent_dim")
        if both := set(self.source) & set(self.predict):
            raise ValueError(f"{sorted(both)} are both sources to fuse and to predict; name each once")
        check_once(self, "source", "predict", "target")
        check_share(self, "validation_fraction", *([] if self.dropout is None else ["dropout"]))
        if not 0 <= self.prefix_share <= 1:
            raise ValueError(f"prefix_share must lie in [0, 1], got {self.prefix_share}")


def main(config: TrainTokenizerConfig) -> dict[str, Any]:
    """Trains, keeps the epoch that is best on validation, saves it as ``out/tokenizer``.

    A finished run is read back, an interrupted one goes on after its last checkpoint.

    Returns:
        The content of ``metrics.json``: the course of training, and a report on the validation items (see
        ``TokenizerReport.result``).

    Raises:
        DataError: on bad items; names file, column and row.
        SidrecError: if training diverges.
        RunMismatchError: if ``out`` holds a run of another configuration.
    """
    with process_group() as processes, open_run(config.out, config) as run:
        return run.result or run.finish(_train(config, processes))


def _train(config: TrainTokenizerConfig, processes: Processes) -> dict[str, Any]:
    items = open_items(config.data, targets=config.target)
    vocabularies = scan_vocabularies(items, config.target)
    sources = config.source or tuple(name for name in items.source_dims if name not in config.predict)
    if not sources:
        besides = f" besides those to predict, {', '.join(config.predict)}" if config.predict else ""
        raise DataError(f"{items.path}: no column of float lists to fuse{besides}; docs/data.md describes sources")
    train, validation = (
        ItemStream.open(
            config.data,
            (*sources, *config.predict),
            vocabularies,
            exclude=config.exclude,
            validation_fraction=config.validation_fraction,
            part=part,
        )
        for part in ("train", "validation")
    )
    torch.manual_seed(config.seed)
    model = VQFusion(_model_config(config, train, vocabularies)).to(processes.device)
    training = _Training(config, processes, model, train, validation)
    training.run()
    tokenizer = Tokenizer(model.cpu(), vocabularies)
    report = TokenizerReport(tokenizer)
    for block in (validation if training.has_validation else train).again():
        report.update(block, tokenizer.encode(block))
    if processes.is_main:
        tokenizer.save(config.out / TOKENIZER_FOLDER)
    fingerprint = tokenizer.codec.spec.fingerprint
    return {"fingerprint": fingerprint, "course": training.course, "validation": report.result()}


def _model_config(
    config: TrainTokenizerConfig, train: ItemStream, vocabularies: dict[str, Vocabulary]
) -> VQFusionConfig:
    targets = {
        name: TargetConfig(num_classes=len(vocabulary), multi_label=vocabulary.multi_label)
        for name, vocabulary in vocabularies.items()
    }
    return VQFusionConfig(
        sources=train.items.source_dims,
        predicted=config.predict,
        targets=targets,
        latent_dim=config.latent_dim,
        hidden_dim=config.hidden_dim,
        dropout=min(0.5, 2000 / train.items.num_items) if config.dropout is None else config.dropout,
        prefix_share=config.prefix_share,
        weighting=config.weighting,
        weights=config.weights,
        quantizer=config.quantizer,
    )


class _Training:
    """One run's state."""

    def __init__(
        self,
        config: TrainTokenizerConfig,
        processes: Processes,
        model: VQFusion,
        train: ItemStream,
        validation: ItemStream,
    ) -> None:
        self.config = config
        self.processes = processes
        self.model = model
        self.train, self.validation = train, validation
        self.num_items = self._standardize()
        self.has_validation = next(validation.again(), None) is not None
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.checkpoints = Checkpoints(config.out / "checkpoints")
        self.curves = SummaryWriter(config.out / "tensorboard") if processes.is_main else None
        self.course: list[dict[str, float]] = []
        self.best = model.state_dict()

    def run(self) -> None:
        """Trains to the end and leaves the best weights in the model."""
        if self.checkpoints.has(LAST):
            self._resume()
        else:
            self.model.start(self.train.sample(self.config.seed).to(self.processes.device))
            self._end_epoch(self._validate())  # what the closed-form start is worth: training must beat it
        parallel = DistributedDataParallel(self.model)
        title = f"tokenizer {self.model.config.quantizer.stages} of {'+'.join(self.model.config.read_sources)}"
        with stage(title, self.config.epochs, show=self.processes.is_main) as progress:
            progress.advance(len(self.course) - 1)
            while not self._is_over():
                self._end_epoch(self._epoch(parallel, len(self.course)))
                progress.advance(1, ", ".join(f"{name} {value:.3f}" for name, value in self.course[-1].items()))
            best = self._best()
            progress.advance(0, f"best epoch {best}: " + _shown(self.course[best]))
        self.model.load_state_dict(self.best)
        if self.curves is not None:
            self.curves.close()

    def _epoch(self, parallel: nn.Module, epoch: int) -> dict[str, float]:
        """Trains for one epoch and validates; losses of both.

        Raises:
            SidrecError: if training diverges; the last checkpoint stays as it is.
        """
        try:
            return self._train_epoch(parallel, epoch) | self._validate()
        except SidrecError:
            raise
        except ValueError as error:  # the quantizer's, which refuses latents that are not finite
            raise SidrecError(f"training diverged in epoch {epoch} ({error}); lower learning_rate") from error

    def _train_epoch(self, parallel: nn.Module, epoch: int) -> dict[str, float]:
        """One pass; returns mean losses by task."""
        self.model.train()
        rank, world_size = self.processes.rank, self.processes.world_size
        seed = self.config.seed * 100_003 + epoch
        torch.manual_seed(seed * world_size + rank)  # anew each epoch, so that an interrupted run ends as a whole one
        batches = -(-self.num_items // self.config.batch_size)
        sums_K = torch.zeros(len(self.model.config.tasks), device=self.processes.device)
        for step, batch in enumerate(self.train.shuffled(self.config.batch_size, seed)):
            done = (epoch - 1 + (step + 1) / batches) / self.config.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * _schedule(done)
            share = batch.select(slice(rank, None, world_size)).to(self.processes.device)
            loss, losses_K, _ = parallel(share)
            self.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if not norm.isfinite():  # the same on every process, and no weight is spoilt yet
                raise SidrecError(f"training diverged in epoch {epoch} (gradient norm {norm}); lower learning_rate")
            self.optimizer.step()
            sums_K += losses_K
        dist.all_reduce(sums_K)
        means_K = (sums_K / world_size / batches).tolist()
        return {f"train {task}": value for task, value in zip(self.model.config.tasks, means_K, strict=True)}

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Losses by task over the validation items, the same on every process; their weighed sum chooses the epoch."""
        self.model.eval()
        tasks, weights = self.model.config.tasks, self.model.config.task_weights
        sums_K, counts_K = torch.zeros(len(tasks), dtype=torch.float64), torch.zeros(len(tasks), dtype=torch.float64)
        for block in (self.validation if self.has_validation else self.train).again():
            items = block.to(self.processes.device)
            z_ND = self.model.quantizer(self.model.latent(items)).z_q_ND
            for k, (loss_N, has_N) in enumerate(self.model.task_losses(z_ND, items).values()):
                sums_K[k] += loss_N.double().sum().cpu()
                counts_K[k] += has_N.sum().cpu()
        losses = dict(zip(tasks, (sums_K / counts_K.clamp_min(1)).tolist(), strict=True))
        return losses | {"total": sum(weights[task] * loss for task, loss in losses.items())}

    def _end_epoch(self, values: dict[str, float]) -> None:
        epoch = len(self.course)
        self.course.append(values)
        if self.curves is not None:
            for name, value in values.items():
                self.curves.add_scalar(name if name.startswith("train") else f"validation {name}", value, epoch)
            self.curves.flush()
        if self._best() == epoch:
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
        if epoch % self.config.checkpoint_epochs == 0 or self._is_over():
            # as text: a list would be taken apart
            self.checkpoints.save(LAST, self._state() | {"course": json.dumps(self.course)})

    def _best(self) -> int:
        totals = [values["total"] for values in self.course]
        return totals.index(min(totals))

    def _is_over(self) -> bool:
        epoch = len(self.course) - 1
        return epoch >= self.config.epochs or epoch - self._best() >= self.config.patience

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return {
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def _resume(self) -> None:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
        state = self._state() | {"course": ""}
        self.checkpoints.load(LAST, state)
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.course = json.loads(state["course"])

    @torch.no_grad()
    def _standardize(self) -> int:
        """Sets means and scales from one pass over the training items; returns their number."""
        sums = {name: torch.zeros(dim, dtype=torch.float64) for name, dim in self.model.config.sources.items()}
        squares, counts, num_items = dict.fromkeys(sums, 0.0), dict.fromkeys(sums, 0), 0
        for block in self.train.again():
            num_items += len(block)
            for name in sums:
                x_ND = block.sources[name][block.present[name]].double()
                sums[name] += x_ND.sum(0)
                squares[name] += float(x_ND.square().sum())
                counts[name] += len(x_ND)
        if not num_items:
            raise DataError(f"{self.train.items.path}: no item is left to train on; exclude or hold back fewer")
        for name, sum_D in sums.items():
            if not counts[name]:
                raise DataError(f"{self.train.items.path}: column '{name}': missing in every training item; drop it")
            mean_D, square = sum_D / counts[name], squares[name] / counts[name]
            if not _SQUARES[0] <= square <= _SQUARES[1]:
                raise DataError(
                    f"{self.train.items.path}: column '{name}': its vectors have length {square**0.5:.1e} (root mean "
                    "square), of which float32 would make nothing; scale them to about 1"
                )
            variance = torch.tensor(square - float(mean_D.square().sum()))
            self.model.standardize[name].set(mean_D.to(self.processes.device), variance.to(self.processes.device))
        return num_items


def _schedule(done: float) -> float:
    """Factor of the learning rate where a share ``done`` of the steps is done."""
    return min(done / 0.1, 0.5 * (1 + math.cos(math.pi * done)))


def _shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items() if not name.startswith("train"))
