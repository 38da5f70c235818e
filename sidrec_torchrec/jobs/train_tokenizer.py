"""Trains VQ Fusion on a corpus of items."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidrec_torchrec.data.format import DataConfig, Vocabulary, open_items, scan_vocabularies
from sidrec_torchrec.data.sids import sid_files
from sidrec_torchrec.data.unread import in_words, unread_items
from sidrec_torchrec.errors import DataError, check_once, check_share
from sidrec_torchrec.fusion.config import Keep, TargetConfig, VQFusionConfig, VQFusionOptions
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
from sidrec_torchrec.fusion.published import Published
from sidrec_torchrec.fusion.report import TokenizerReport, kept
from sidrec_torchrec.fusion.tokenizer import TOKENIZER_FOLDER, Tokenizer, tokenizer_files
from sidrec_torchrec.fusion.told import share_told
from sidrec_torchrec.fusion.training import TokenizerTraining, TokenizerTrainingConfig
from sidrec_torchrec.fusion.warm_start import take_weights
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.loop import Loop
from sidrec_torchrec.training.progress import say
from sidrec_torchrec.training.runs import open_run
from sidrec_torchrec.training.trackers import Trackers, open_trackers


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(TokenizerTrainingConfig, DataConfig):
    """What to learn from, and how.

    Args:
        data: folder of ``items.parquet``.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        out: folder for the tokenizer, checkpoints, curves and ``metrics.json``.
        source: sources to fuse; none named means all that are not predicted.
        predict: vector columns to predict as well, without reading them, say co-visitation vectors: items without them, such
            as new ones, are encoded like any other.
        target: categorical columns to predict as well; none named means none.
        exclude: Parquet file with a column ``item_id`` of items to leave out, say those kept to test unseen items.
        validation_fraction: share of the items that chooses the best epoch; drawn by a hash of their id.
        model: the tokenizer's model.
        init: folder of a trained tokenizer of the same sources to read, sizes and quantizer, to start from.
        keep: folder of SIDs that encode-corpus wrote with the codec of ``init``: the codec is kept as it is, and training is asked
            not to change digits of these items. None given: the codec is trained too, and is another one.
        keep_weight: of an item's digits that change, beside losses of which 1 is a source's whole variance.
        keep_margin: how far from where a digit changes an item is to stay, of the way to another digit; below 0.5.
    """

    out: Path
    source: tuple[str, ...] = ()
    predict: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    exclude: Path | None = None
    validation_fraction: float = 0.1
    model: VQFusionOptions = field(default_factory=VQFusionOptions)
    init: Path | None = None
    keep: Path | None = None
    keep_weight: float = 1.0
    keep_margin: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig.__post_init__(self)
        if both := set(self.source) & set(self.predict):
            raise ValueError(f"{sorted(both)} are both sources to fuse and to predict; name each once")
        check_once(self, "source", "predict", "target")
        check_share(self, "validation_fraction")
        Keep(weight=self.keep_weight, margin=self.keep_margin)
        if self.keep is not None and self.init is None:
            raise ValueError("keep needs init, a tokenizer of the codec that the SIDs to be kept were made with")

    def files(self) -> list[Path]:
        """The files it is trained on."""
        others = [] if self.init is None else tokenizer_files(self.init)
        kept = [] if self.keep is None else sid_files([self.keep])
        return [*self.folder.files("items"), *([] if self.exclude is None else [self.exclude]), *others, *kept]


def main(config: TrainTokenizerConfig) -> dict[str, Any]:
    """Trains, keeps the epoch that is best on validation, saves it as ``out/tokenizer``.

    A finished run is read back, an interrupted one goes on after its last checkpoint.

    Returns:
        The content of ``metrics.json``: the course of training, and a report on the validation items (see
        ``TokenizerReport.result``); ``told``, how much of each predicted source content tells; with ``keep`` also what became of the
        published SIDs, ``kept``.

    Raises:
        DataError: on bad items; names file, column and row.
        SidrecError: if training diverges.
        RunMismatchError: if ``out`` holds a run of another configuration, or of inputs that have changed.
    """
    with process_group() as processes, open_run(config.out, config, inputs=config.files()) as run:
        if run.result is not None:
            return run.result
        with open_trackers(config.tracker, config.out, processes) as trackers:
            return run.finish(_train(config, processes, trackers))


def _train(config: TrainTokenizerConfig, processes: Processes, trackers: Trackers) -> dict[str, Any]:
    old = None if config.init is None else Tokenizer.load(config.init)
    codec = None if old is None or config.keep is None else old.codec
    published = None if codec is None or config.keep is None else Published.open(config.keep, codec)
    items = open_items(config.folder, targets=config.target)
    vocabularies = scan_vocabularies(items, config.target)
    sources = config.source or tuple(name for name in items.source_dims if name not in config.predict)
    if not sources:
        besides = f" besides those to predict, {', '.join(config.predict)}" if config.predict else ""
        raise DataError(f"{items.path}: no column of float lists to fuse{besides}; docs/data.md describes sources")
    if processes.is_main and (unread := unread_items(items, (*sources, *config.predict, *config.target))):
        say(f"{items.path}: {in_words(unread)}")
    stream = partial(
        ItemStream.open,
        config.folder,
        vocabularies=vocabularies,
        exclude=config.exclude,
        validation_fraction=config.validation_fraction,
        published=published,
    )
    told = _told(stream((*sources, *config.predict), part="train"), config)
    predict = tuple(name for name in config.predict if told[name] >= config.least_told)
    if processes.is_main:
        _tell_of_chance(config, told)
    train, validation = (stream((*sources, *predict), part=part) for part in ("train", "validation"))
    torch.manual_seed(config.seed)
    model = VQFusion(_model_config(config, train, vocabularies, predict)).to(processes.device)
    if published is not None:
        model.hold(Keep(weight=config.keep_weight, margin=config.keep_margin))
    take = None if old is None else partial(take_weights, vocabularies=vocabularies, old=old)
    training = TokenizerTraining(config, model, train, validation, processes, take)
    course = Loop(training, config.loop(), config.out, processes, trackers).run()
    tokenizer = Tokenizer(model.cpu(), vocabularies, codec=codec)
    report = TokenizerReport(tokenizer)
    words = []
    for block in training.validation.again():
        digits_NL = tokenizer.digits(block)
        report.update(block, digits_NL)
        words.append(tokenizer.codec.spec.pack(digits_NL).numpy())
    whole = replace(train, part="all")
    share = {"rank": processes.rank, "world_size": processes.world_size}
    refreshed = {} if published is None else {"kept": kept(tokenizer, whole, **share)}
    if processes.is_main:
        tokenizer.save(config.out / TOKENIZER_FOLDER)
    fingerprints = {"fingerprint": tokenizer.codec.spec.fingerprint, "encoding": tokenizer.encoding}
    return {
        **fingerprints,
        "course": course.epochs,
        "validation": report.result(np.concatenate(words)),
        **({"told": told} if told else {}),
        **refreshed,
    }


def _told(train: ItemStream, config: TrainTokenizerConfig) -> dict[str, float]:
    """How much of each predicted source the others tell."""
    if not config.predict:
        return {}
    sample = train.sample(config.seed)
    read = {name: x for name, x in sample.sources.items() if name not in config.predict}
    return {
        name: share_told(ItemTensors({**read, name: sample.sources[name]}, sample.present), name)
        for name in config.predict
    }


def _tell_of_chance(config: TrainTokenizerConfig, told: dict[str, float]) -> None:
    for name, share in told.items():
        if share < config.least_told:
            say(
                f"{config.folder.path}: '{name}' is not predicted: content tells {share:.1%} of it, on items held out, less than "
                f"{config.least_told:.1%}; the rest would be learned by heart (--least-told 0 predicts it all the same)"
            )


def _model_config(
    config: TrainTokenizerConfig, train: ItemStream, vocabularies: dict[str, Vocabulary], predict: tuple[str, ...]
) -> VQFusionConfig:
    return VQFusionConfig.of(
        config.model,
        num_items=train.items.num_items,
        sources=train.items.source_dims,
        predicted=predict,
        targets={
            name: TargetConfig(num_classes=len(vocabulary), multi_label=vocabulary.multi_label)
            for name, vocabulary in vocabularies.items()
        },
    )
