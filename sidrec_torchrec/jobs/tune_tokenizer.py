"""Tunes a tokenizer through a ranker: SIDs that tell what users' choices turn on."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sidrec_torchrec.data.format import DataConfig, DataFolder, open_items
from sidrec_torchrec.data.ids import same_ids
from sidrec_torchrec.data.prepared import Prepared, open_prepared
from sidrec_torchrec.data.sids import sid_files
from sidrec_torchrec.errors import DataError, check_at_least, check_share
from sidrec_torchrec.fusion.config import Keep
from sidrec_torchrec.fusion.item_store import ItemStore
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.published import Published
from sidrec_torchrec.fusion.report import kept
from sidrec_torchrec.fusion.tokenizer import TOKENIZER_FOLDER, Tokenizer, tokenizer_files
from sidrec_torchrec.processes import made_once
from sidrec_torchrec.ranker.sharding import shard
from sidrec_torchrec.ranker.training import RankerTraining, RankerTrainingConfig
from sidrec_torchrec.ranker.tuning import ItemRows, TokenizedItems, TuningRanker
from sidrec_torchrec.storage.urls import is_made_beside, made_beside
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.loop import Loop
from sidrec_torchrec.training.runs import CONFIG_FILE, open_run
from sidrec_torchrec.training.trackers import Trackers, open_trackers


@dataclass(frozen=True, kw_only=True)
class TuneTokenizerConfig(RankerTrainingConfig, DataConfig):
    """What to tune, on what, and through which ranker, which is not kept.

    Args:
        data: folder of ``items.parquet``, as prepared.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        prepared: folder the prepare job wrote.
        tokenizer: folder train-tokenizer wrote: where tuning starts.
        out: folder for the tuned tokenizer, checkpoints, curves and ``metrics.json``.
        content: folder of ``items.parquet`` with the same items and all that the tokenizer reads and predicts, say what
            collaborative-vectors wrote; none given: ``data``.
        epochs: passes over the training sequences.
        own_weight: of the tokenizer's own loss, beside the ranker's.
        digit_dropout: share of an item's digits that the ranker does without in training.
        tokenizer_dropout: share of the tokenizer's hidden units, if it has any, that are dropped in training, whatever it was
            trained with: a ranker's labels lead it to items that have events, over and over.
        keep: folder of SIDs that encode-corpus wrote with this tokenizer, or with one of the same codec: the codec is kept as
            it is, and the encoders are asked not to change digits of these items. None given: all is tuned.
        keep_weight: of an item's digits that change, beside losses of which 1 is a source's whole variance.
        keep_margin: how far from where a digit changes an item is to stay, of the way to another digit; below 0.5.
    """

    prepared: Path
    tokenizer: Path
    out: Path
    content: Path | None = None
    epochs: int = 4
    own_weight: float = 1.0
    digit_dropout: float = 0.1
    tokenizer_dropout: float = 0.5
    keep: Path | None = None
    keep_weight: float = 1.0
    keep_margin: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig.__post_init__(self)
        check_at_least(self, 0, "own_weight")
        check_share(self, "digit_dropout", "tokenizer_dropout")
        Keep(weight=self.keep_weight, margin=self.keep_margin)
        if self.model.reader(None).reads_codes:
            raise ValueError("codes have no gradient: tune with attention to vectors, which is the same mathematics")

    def files(self) -> list[Path]:
        """The files it is tuned from."""
        folders = [self.folder] if self.content is None else [self.folder, DataFolder.of(self.content)]
        items = {file for folder in folders for file in folder.files("items")}
        kept = [] if self.keep is None else sid_files([self.keep])
        return [*sorted(items), *open_prepared(self.prepared).files(), *tokenizer_files(self.tokenizer), *kept]


def main(config: TuneTokenizerConfig) -> dict[str, Any]:
    """Trains tokenizer and ranker together, and saves the tokenizer of the best epoch as ``out/tokenizer``.

    Its SIDs are others than those of the tokenizer it started from: encode the corpus again. With ``keep`` they are of the same
    codec, so that whatever reads that one's SIDs reads these. Only items that occur in training are learned from. A finished run is read back, an interrupted one goes on from its last checkpoint.

    Returns:
        The content of ``metrics.json``: fingerprints ``before`` and after, and the course of training; with ``keep`` also what
        became of the published SIDs, ``kept``.

    Raises:
        DataError: on bad items (names file, column and row), other items than those prepared, or columns that the
            tokenizer was trained with and ``content`` lacks.
        RunMismatchError: if ``out`` holds a run of another configuration, or of inputs that have changed.
    """
    with process_group() as processes, open_run(config.out, config, inputs=config.files()) as run:
        if run.result is not None:
            return run.result
        with open_trackers(config.tracker, config.out, processes) as trackers:
            return run.finish(_tune(config, processes, trackers))


def _tune(config: TuneTokenizerConfig, processes: Processes, trackers: Trackers) -> dict[str, Any]:
    prepared = open_prepared(config.prepared)
    prepared.lay_out_item_codes(config.folder)
    tokenizer = Tokenizer.load(config.tokenizer)
    before = tokenizer.codec.spec.fingerprint
    store = made_beside(config.out, CONFIG_FILE) / "items"
    stream = _open_items(config, tokenizer, prepared)
    made_once(store, partial(ItemStore.write, stream))
    content = ItemStore.open(store)
    if config.keep is not None:
        tokenizer.model.hold(Keep(weight=config.keep_weight, margin=config.keep_margin))
    encoder = tokenizer.model.to(processes.device)
    encoder.drop(config.tokenizer_dropout)
    items = TokenizedItems(encoder, content, config.own_weight, digit_dropout=config.digit_dropout)
    torch.manual_seed(config.seed)
    dim, features = tokenizer.model.config.latent_dim, prepared.user_features
    sizes = (
        features,
        processes.device,
        len(prepared.tasks),
        prepared.features,
        prepared.user_lists,
        prepared.regressions,
    )
    ranker = TuningRanker(config.model, items, dim, None, *sizes)
    model = shard(ranker, config.optimizer, processes.device)
    training = RankerTraining("tuning", config, model, prepared, ItemRows(), processes)
    course = Loop(training, config.loop(), config.out, processes, trackers).run()
    codec = None if config.keep is None else tokenizer.codec
    tuned = Tokenizer(tokenizer.model.cpu(), tokenizer.vocabularies, codec=codec)
    share = {"rank": processes.rank, "world_size": processes.world_size}
    refreshed = {} if config.keep is None else {"kept": kept(tuned, stream, **share)}
    if processes.is_main:
        tuned.save(config.out / TOKENIZER_FOLDER)
    if processes.is_main or is_made_beside(store):  # of this machine alone
        shutil.rmtree(store, ignore_errors=True)
    fingerprints = {"fingerprint": tuned.codec.spec.fingerprint, "encoding": tuned.encoding, "before": before}
    return fingerprints | refreshed | training.result(course)


def _open_items(config: TuneTokenizerConfig, tokenizer: Tokenizer, prepared: Prepared) -> ItemStream:
    """All that the tokenizer reads and predicts of the items, and their SIDs to be kept."""
    prepared.check_items(config.folder)
    content = config.folder if config.content is None else DataFolder.of(config.content)
    published = None if config.keep is None else Published.open(config.keep, tokenizer.codec)
    sources = tuple(tokenizer.model.config.sources)
    stream = ItemStream.open(content, sources, tokenizer.vocabularies, published=published)
    items = open_items(config.folder, sources=(), targets=())
    if not same_ids(stream.items.ids(), items.ids()):
        raise DataError(f"{stream.items.path}: other items than {items.path}, or in another order")
    return stream
