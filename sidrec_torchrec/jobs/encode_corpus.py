"""Writes the SID of every item of a corpus, and a report on what the SIDs keep."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist

from sidrec_torchrec.codec.codec import CODEC_FOLDER
from sidrec_torchrec.data.format import ITEMS_FILE, open_items
from sidrec_torchrec.data.sids import SIDS_FILE, join_sids, open_sids, write_sids
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.report import TokenizerReport
from sidrec_torchrec.fusion.tokenizer import Tokenizer, tokenizer_files
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run

_BLOCK = 8192  # items encoded at once


@dataclass(frozen=True, kw_only=True)
class EncodeCorpusConfig(JobConfig):
    """What to encode.

    Args:
        data: folder of ``items.parquet``.
        tokenizer: folder train-tokenizer wrote.
        out: folder for ``sids.parquet``, a copy of the codec, and ``metrics.json``.
        report: ``short`` says how digits are used and how many items share a SID; ``full`` also what every prefix of the
            SIDs keeps of the items, which takes longer than encoding.
    """

    data: Path
    tokenizer: Path
    out: Path
    report: Literal["short", "full"] = "short"

    def files(self) -> list[Path]:
        """The files the SIDs are made from."""
        return [self.data / ITEMS_FILE, *tokenizer_files(self.tokenizer)]


def main(config: EncodeCorpusConfig) -> dict[str, Any]:
    """Encodes every item, in the order of the item file; each process takes a stretch of it.

    Returns:
        The content of ``metrics.json``: fingerprints of codec and encoding, and what ``TokenizerReport.result`` says.

    Raises:
        DataError: on bad items, or a tokenizer that is missing or broken.
        RunMismatchError: if ``out`` belongs to other items, another tokenizer or report.
    """
    with process_group() as processes:
        tokenizer = Tokenizer.load(config.tokenizer).to(processes.device)
        with open_run(config.out, config, inputs=config.files()) as run:
            result = run.result or run.finish(_encode(config, tokenizer, processes))
        tokenizer.codec.check(result["fingerprint"], f"{config.out} holds SIDs")
        return result


def _encode(config: EncodeCorpusConfig, tokenizer: Tokenizer, processes: Processes) -> dict[str, Any]:
    is_full = config.report == "full"
    stream = _open_items(config.data, tokenizer, is_full)
    report = TokenizerReport(tokenizer, None if is_full else ())
    parts = [config.out / "parts" / f"{rank}.parquet" for rank in range(processes.world_size)]
    total = stream.items.num_items // processes.world_size
    with stage("encode corpus", total, show=processes.is_main) as progress:

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for item_ids, items in stream.blocks(_BLOCK, share=(processes.rank, processes.world_size)):
                digits_NL = tokenizer.digits(items)
                report.update(items, digits_NL)
                yield item_ids, tokenizer.codec.spec.pack(digits_NL).numpy()
                progress.advance(len(item_ids))

        write_sids(parts[processes.rank], tokenizer.codec.spec, batches())
        counts: list[Any] = [None] * processes.world_size
        dist.all_gather_object(counts, report.counts())
        report.merge([its for rank, its in enumerate(counts) if rank != processes.rank])

        def join() -> dict[str, Any]:
            join_sids(parts, config.out / SIDS_FILE)
            tokenizer.codec.save(config.out / CODEC_FOLDER)
            shutil.rmtree(config.out / "parts")
            words_NW = np.concatenate([words for _, words in open_sids(config.out).batches()])
            fingerprints = {"fingerprint": tokenizer.codec.spec.fingerprint, "encoding": tokenizer.encoding}
            return fingerprints | report.result(words_NW)

        result = on_first_process(join)
        shared = result["collisions"]["items"]
        progress.advance(0, f"{result['items']:,} items, {shared:,} share a SID with another")
    return result


def _open_items(data: Path, tokenizer: Tokenizer, is_full: bool) -> ItemStream:
    """What the tokenizer reads of the items, and, for a full report, what it predicts and the file has.

    Raises:
        DataError: if a source is missing, or of another width than the tokenizer was trained on.
    """
    config = tokenizer.model.config
    columns = open_items(data, sources=(), targets=()).table.schema.names if is_full else []
    sources = (*config.read_sources, *(name for name in config.predicted if name in columns))
    known = {name: vocabulary for name, vocabulary in tokenizer.vocabularies.items() if name in columns}
    stream = ItemStream.open(data, sources, known)
    for name, dim in stream.items.source_dims.items():
        if dim != config.sources[name]:
            raise DataError(
                f"{stream.items.path}: source '{name}' is {dim} wide, the tokenizer was trained on {config.sources[name]}"
            )
    return stream
