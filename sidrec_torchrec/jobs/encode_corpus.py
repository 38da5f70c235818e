"""Writes the SID of every item of a corpus, or of those that came since, and a report on what the SIDs keep."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidrec_torchrec.codec.codec import CODEC_FOLDER
from sidrec_torchrec.codec.report import shared_sids
from sidrec_torchrec.data.format import DataConfig, DataFolder, open_items
from sidrec_torchrec.data.ids import IdIndex, mixed_types
from sidrec_torchrec.data.sid_manifest import Generation, Manifest, generation_file, remove_unpublished
from sidrec_torchrec.data.sids import SIDs, open_sids, published, write_sids
from sidrec_torchrec.engines.base import Engine, open_engine
from sidrec_torchrec.files import sha256_of
from sidrec_torchrec.fusion.item_tensors import ItemStream, check_widths
from sidrec_torchrec.fusion.report import TokenizerReport
from sidrec_torchrec.fusion.tokenizer import Tokenizer, tokenizer_files
from sidrec_torchrec.part_files import PartFiles
from sidrec_torchrec.processes import is_first_process, on_first_process
from sidrec_torchrec.storage.urls import as_urls
from sidrec_torchrec.training.group import own_device, process_group
from sidrec_torchrec.training.progress import say, stage
from sidrec_torchrec.training.runs import Run, open_run

_BLOCK = 8192  # items encoded at once
_PART_ITEMS = 1 << 18
_FEW_PARTS = 4  # of which no other process is started: one is done in seconds, as a process starts


@dataclass(frozen=True, kw_only=True)
class EncodeCorpusConfig(DataConfig):
    """What to encode.

    Args:
        data: folder of ``items.parquet``.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        tokenizer: folder train-tokenizer wrote.
        out: folder for ``sids.parquet`` (a folder of parts by this name, of more than 262,144 items), a copy of the codec, ``manifest.json`` and ``metrics.json``.
        report: ``short`` says how digits are used and how many items share a SID; ``full`` also what every prefix of the
            SIDs keeps of the items, which takes longer than encoding.
        append: encode only the items that ``out`` has no SID of, as a new generation; SIDs it has stay as they are, whatever
            has become of their items.
        engine: what encodes the parts: ``local``, all cores of this machine, or ``ray``, a Ray cluster that shares the folders; none
            named: ``local``, or torchrun's processes. The SIDs are the same.
    """

    tokenizer: Path
    out: Path
    report: Literal["short", "full"] = "short"
    append: bool = False
    engine: str | None = None

    def files(self) -> list[Path]:
        """The files the SIDs are made from."""
        return [*self.folder.files("items"), *tokenizer_files(self.tokenizer)]


def main(config: EncodeCorpusConfig) -> dict[str, Any]:
    """Encodes items in the order of the item file, part by part; parts that a killed run has written stay.

    Returns:
        The content of ``metrics.json``: fingerprints of codec and encoding, and what ``TokenizerReport.result`` says of the last
        generation. For any but the first also its number, ``generation``; ``gone``: SIDs of items that the item file has no more;
        and ``total``: ``items`` and ``collisions`` of all generations.

    Raises:
        DataError: on bad items, or a tokenizer that is missing or broken.
        CodecMismatchError: if SIDs of another codec are to be added to.
        RunMismatchError: if ``out`` belongs to something else; or, unless it is to be added to, to other items, another tokenizer or
            report.
    """
    with process_group(), closing(open_engine(config.engine)) as engine:
        tokenizer = Tokenizer.load(config.tokenizer)
        with open_run(
            config.out,
            config,
            inputs=config.files(),
            ignore=("out", "append"),
            grows=config.append,
            free=("report",) if config.append else (),
            remedy="give another folder, or add the items it does not have with --append",
        ) as run:
            manifest = _published(run)
            if manifest is not None:
                tokenizer.codec.check(manifest.spec.fingerprint, f"{config.out} holds SIDs")
            if manifest is None or config.append:
                manifest = _encode(config, tokenizer, engine, manifest)
            result = {"fingerprint": manifest.spec.fingerprint} | manifest.generations[-1].report
            return result if run.result == result else run.finish(result)


def _published(run: Run) -> Manifest | None:
    """What the folder holds; None if nothing has been published there."""
    manifest = Manifest.read(run.folder)
    if manifest is not None or run.result is None:
        return manifest
    first = published(run.folder)  # of an earlier version
    report = {name: value for name, value in run.result.items() if name != "fingerprint"}
    return replace(first, generations=(replace(first.generations[0], report=report),))


def _encode(config: EncodeCorpusConfig, tokenizer: Tokenizer, engine: Engine, before: Manifest | None) -> Manifest:
    """Publishes SIDs of the items that have none yet; gives what is published then."""
    is_full = config.report == "full"
    stream = _open_items(config.folder, tokenizer, is_full)
    have = None if before is None else open_sids(config.out)
    count, gone = stream.items.num_items, 0
    if have is not None:
        is_new_N, gone = _new(stream, have)
        stream, count = replace(stream, rows=is_new_N), int(is_new_N.sum())
    if before is not None and not count:
        say(f"{config.out}: nothing new: all {stream.items.num_items:,} items have SIDs")
        return before
    report = TokenizerReport(tokenizer, None if is_full else ())
    path = config.out / generation_file(len(before.generations) if before else 0)
    digests = on_first_process(lambda: [sha256_of(file) for file in config.files()])  # each file is read by one process
    made_of = [*digests, before.identity if before else "", config.report]
    parts = PartFiles.of(path, made_of)
    num_parts = max(1, min(-(-count // _PART_ITEMS), 2 * stream.items.table.num_row_groups))

    def begin() -> list[int]:
        parts.begin()
        if before is not None:
            remove_unpublished(config.out, before)
        return [part for part in range(num_parts) if parts.known(part) is None]

    todo = on_first_process(begin)
    with stage("encode corpus", num_parts, show=is_first_process()) as progress:
        progress.advance(num_parts - len(todo))
        working = engine if len(todo) >= _FEW_PARTS else engine.for_little()
        encode_part = EncodePart(tokenizer, stream, parts, num_parts, report.depths, _BLOCK)
        for _ in working.map(encode_part, todo, on_gpus=True):
            progress.advance()

        def publish() -> Manifest:
            for part in range(num_parts):
                report.merge(parts.known(part) or {})
            parts.join(num_parts)
            words_NW = _words(open_sids(path))
            result = {"encoding": tokenizer.encoding} | report.result(words_NW)
            if before is not None and have is not None:
                result |= {"generation": len(before.generations), "gone": gone, "total": _total(have, words_NW)}
            else:
                tokenizer.codec.save(config.out / CODEC_FOLDER)
            generation = Generation.of(path, tokenizer=as_urls(str(config.tokenizer)), report=result)
            spec, earlier = tokenizer.codec.spec, before.generations if before else ()
            manifest = Manifest(spec, (*earlier, generation))
            manifest.write(config.out)
            return manifest

        manifest = on_first_process(publish)
        progress.advance(0, _summary(manifest.generations[-1].report))
    return manifest


@dataclass(frozen=True)
class EncodePart:
    """Encodes a part of the items, and writes it.

    Args:
        tokenizer: that encodes, on the CPU.
        stream: the items.
        parts: where to.
        num_parts: how many there are.
        depths: what the report decodes; see ``TokenizerReport``.
        block: items encoded at once.
    """

    tokenizer: Tokenizer
    stream: ItemStream
    parts: PartFiles
    num_parts: int
    depths: tuple[int, ...]
    block: int

    def __call__(self, part: int) -> None:
        report = TokenizerReport(self._tokenizer, self.depths)
        with self.parts.writing(part) as file:
            write_sids(file, self.tokenizer.codec.spec, self._encoded(part, report), self.stream.items.ids().type)
        self.parts.finish(part, report.to_json())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.tokenizer.to(own_device())

    def _encoded(self, part: int, report: TokenizerReport) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """Ids, canonical [N], and packed SIDs, int64 [N, W], block by block; tells the report."""
        for item_ids, items in self.stream.blocks(self.block, share=(part, self.num_parts)):
            digits_NL = self._tokenizer.digits(items)
            report.update(items, digits_NL)
            yield item_ids, self.tokenizer.codec.spec.pack(digits_NL).numpy()


def _total(have: SIDs, words_NW: np.ndarray) -> dict[str, Any]:
    """Of earlier generations and this one together."""
    every_NW = np.concatenate([_words(have), words_NW])
    shared, largest = shared_sids(every_NW)
    return {"items": len(every_NW), "collisions": {"items": shared, "largest": largest}}


def _new(stream: ItemStream, have: SIDs) -> tuple[np.ndarray, int]:
    """Which rows of the item file have no SID, bool [num_items]; and how many SIDs are of items that it does not have.

    Raises:
        DataError: if ids are of one type there and of another here.
    """
    item_ids = stream.items.ids()
    if item_ids.type != have.id_type:
        raise mixed_types(stream.items.path, item_ids.type, have.path, have.id_type)
    known, _ = have.read()
    is_new_N = IdIndex(known).find(item_ids) < 0
    return is_new_N, len(known) - int((~is_new_N).sum())


def _words(sids: SIDs) -> np.ndarray:
    return np.concatenate([words_NW for _, words_NW in sids.batches()])


def _summary(report: dict[str, Any]) -> str:
    shared = report["collisions"]["items"]
    text = f"{report['items']:,} items, {shared:,} share a SID with another"
    if idle := report["digits"].get("idle"):  # reports of an earlier version do not have it
        text += f"; of {len(report['digits']['entropy'])} digits {len(idle)} say next to nothing: {', '.join(map(str, idle))}"
    if "generation" not in report:
        return text
    total = report["total"]
    return (
        f"generation {report['generation']}: {text}; {total['items']:,} in all, {total['collisions']['items']:,} share one; "
        f"{report['gone']:,} of items that are gone"
    )


def _open_items(data: DataFolder, tokenizer: Tokenizer, is_full: bool) -> ItemStream:
    """What the tokenizer reads of the items, and, for a full report, what it predicts and the file has.

    Raises:
        DataError: if a source is missing, or of another width than the tokenizer was trained on.
    """
    config = tokenizer.model.config
    columns = open_items(data, sources=(), targets=()).table.schema.names if is_full else []
    sources = (*config.read_sources, *(name for name in config.predicted if name in columns))
    known = {name: vocabulary for name, vocabulary in tokenizer.vocabularies.items() if name in columns}
    stream = ItemStream.open(data, sources, known)
    check_widths(stream.items, config.sources)
    return stream
