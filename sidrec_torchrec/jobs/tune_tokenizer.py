"""Tunes a tokenizer through a ranker: SIDs that tell what users' choices turn on."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sidrec_torchrec.data.format import DataConfig, DataFolder, open_items
from sidrec_torchrec.data.ids import same_ids
from sidrec_torchrec.data.prepare import Prepared, open_prepared
from sidrec_torchrec.errors import DataError, check_at_least
from sidrec_torchrec.fusion.item_store import ItemStore
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.tokenizer import TOKENIZER_FOLDER, Tokenizer, tokenizer_files
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.ranker.sharding import shard
from sidrec_torchrec.ranker.training import RankerTraining, RankerTrainingConfig
from sidrec_torchrec.ranker.tuning import ItemRows, TokenizedItems, TuningRanker
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.loop import Loop
from sidrec_torchrec.training.runs import open_run


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
    """

    prepared: Path
    tokenizer: Path
    out: Path
    content: Path | None = None
    epochs: int = 4
    own_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig.__post_init__(self)
        check_at_least(self, 0, "own_weight")
        if self.model.reader(None).reads_codes:
            raise ValueError("codes have no gradient: tune with attention to vectors, which is the same mathematics")

    def files(self) -> list[Path]:
        """The files it is tuned from."""
        folders = [self.folder] if self.content is None else [self.folder, DataFolder.of(self.content)]
        items = {file for folder in folders for file in folder.files("items")}
        return [*sorted(items), *open_prepared(self.prepared).files(), *tokenizer_files(self.tokenizer)]


def main(config: TuneTokenizerConfig) -> dict[str, Any]:
    """Trains tokenizer and ranker together, and saves the tokenizer of the best epoch as ``out/tokenizer``.

    Its SIDs are others than those of the tokenizer it started from: encode the corpus again. Only items that occur in
    training are learned from. A finished run is read back, an interrupted one goes on from its last checkpoint.

    Returns:
        The content of ``metrics.json``: fingerprints ``before`` and after, and the course of training.

    Raises:
        DataError: on bad items (names file, column and row), other items than those prepared, or columns that the
            tokenizer was trained with and ``content`` lacks.
        RunMismatchError: if ``out`` holds a run of another configuration, or of inputs that have changed.
    """
    with process_group() as processes, open_run(config.out, config, inputs=config.files()) as run:
        return run.result or run.finish(_tune(config, processes))


def _tune(config: TuneTokenizerConfig, processes: Processes) -> dict[str, Any]:
    prepared = open_prepared(config.prepared)
    tokenizer = Tokenizer.load(config.tokenizer)
    before = tokenizer.codec.spec.fingerprint
    store = config.out / "items"
    content = _open_store(config, tokenizer, prepared, store)
    items = TokenizedItems(tokenizer.model.to(processes.device), content, config.own_weight)
    torch.manual_seed(config.seed)
    dim, features = tokenizer.model.config.latent_dim, prepared.user_features
    ranker = TuningRanker(config.model, items, dim, None, features, processes.device, len(prepared.tasks))
    model = shard(ranker, config.optimizer, processes.device)
    training = RankerTraining("tuning", config, model, prepared, ItemRows(), processes)
    course = Loop(training, config.loop(), config.out, processes).run()
    tuned = Tokenizer(tokenizer.model.cpu(), tokenizer.vocabularies)
    if processes.is_main:
        tuned.save(config.out / TOKENIZER_FOLDER)
        shutil.rmtree(store)
    return {"fingerprint": tuned.codec.spec.fingerprint, "before": before, **training.result(course)}


def _open_store(config: TuneTokenizerConfig, tokenizer: Tokenizer, prepared: Prepared, store: Path) -> ItemStore:
    """The items' content by row; laid out by the main process where an interrupted run has not left it."""
    prepared.check_items(config.folder)
    content = config.folder if config.content is None else DataFolder.of(config.content)
    stream = ItemStream.open(content, tuple(tokenizer.model.config.sources), tokenizer.vocabularies)
    items = open_items(config.folder, sources=(), targets=())
    if not same_ids(stream.items.ids(), items.ids()):
        raise DataError(f"{stream.items.path}: other items than {items.path}, or in another order")
    on_first_process(lambda: None if store.exists() else ItemStore.write(stream, store))
    return ItemStore.open(store)
