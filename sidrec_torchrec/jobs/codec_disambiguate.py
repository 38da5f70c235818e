"""Gives every item a SID of its own by one more digit, or no SID to more items than a capacity, by moving the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.codec.alphabet import OneHot
from sidrec_torchrec.codec.capacity import Moves, within_capacity
from sidrec_torchrec.codec.codec import CODEC_FOLDER, Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.report import PrefixGroups
from sidrec_torchrec.data.ids import shown
from sidrec_torchrec.data.items import open_items
from sidrec_torchrec.data.sid_manifest import Generation, Manifest, generation_file, remove_unpublished
from sidrec_torchrec.data.sids import SIDs, open_sids, published, sid_files, write_sids
from sidrec_torchrec.errors import DataError, RunMismatchError, check_at_least
from sidrec_torchrec.fusion.moved_items import MovedItems
from sidrec_torchrec.fusion.tokenizer import Tokenizer, tokenizer_files
from sidrec_torchrec.output import show
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import say, stage
from sidrec_torchrec.training.runs import open_run

_BLOCK = 1 << 16  # SIDs packed again at once


@dataclass(frozen=True, kw_only=True)
class CodecDisambiguateConfig(JobConfig):
    """What to make unique.

    Args:
        sids: folder encode-corpus wrote.
        out: folder for the new SIDs and their codec.
        radix: values of the added digit: the most items that may ever share a SID. Part of the new codec's identity, so
            leave room for items to come. Not read with ``capacity``.
        capacity: most items of a SID: no digit is added, and what is beyond moves to the nearest SID that has room. 0: a digit.
        items: data folder of the same items, or its ``items.parquet``: with ``tokenizer``, nearest is to the item's own vector,
            and not to the vector of the SID that it leaves.
        tokenizer: folder train-tokenizer wrote; the one that made the SIDs.
        append: go on with the generations that ``out`` does not have; what it has stays as it is.

    Raises:
        ValueError: on a radix that no digit can have, a negative capacity, or ``items`` without ``tokenizer``.
    """

    sids: Path
    out: Path
    radix: int = 256
    capacity: int = 0
    items: Path | None = None
    tokenizer: Path | None = None
    append: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        OneHot(self.radix)
        check_at_least(self, 0, "capacity")
        if (self.items is None) != (self.tokenizer is None):
            raise ValueError("items and tokenizer make an item's own vector together; give both, or neither")
        if self.items is not None and not self.capacity:
            raise ValueError("items are read to move them; give a capacity too")

    def files(self) -> list[Path]:
        """The files that the new SIDs are made from."""
        files = sid_files([self.sids])
        if self.items is not None and self.tokenizer is not None:
            files += [*(part.path for part in open_items(self.items).table.parts), *tokenizer_files(self.tokenizer)]
        return files


def main(config: CodecDisambiguateConfig) -> dict[str, Any]:
    """Writes SIDs and their codec, as encode-corpus does, generation by generation.

    By a digit: it is the number of earlier items with the same SID, in the order they were published. By a capacity: in each
    generation items choose in the order of their ids; see ``within_capacity``. Either way no later item changes the SID of an
    earlier one. One process works; memory as in codec_collisions, and the moved items' vectors.

    Returns:
        The content of ``metrics.json``: ``fingerprint``, and of the last generation ``items`` and either ``largest``, the most items
        that shared a SID, or ``moved``, ``error_before`` and ``error_after``: mean squared distances of the moved items' vectors
        from the SID they left and the one they went to, by those from the codec's offset; with ``tokenizer`` also
        ``moved_sources``: by source, the relative squared error of the moved items, ``before`` and ``after``.

    Raises:
        DataError: on files that are missing or broken, more than ``radix`` items of one SID (names some), or no SID with room.
        CodecMismatchError: if the codec beside the SIDs, or the tokenizer's, is not theirs.
        RunMismatchError: if ``out`` belongs to something else; or to other SIDs, unless they are those it has and more, and
            ``append``.
    """
    with (
        process_group(),
        open_run(
            config.out,
            config,
            inputs=config.files(),
            ignore=("out", "append"),
            grows=config.append,
            free=("items", "tokenizer") if config.append else (),
            remedy="give another folder, or add the generations it does not have with --append",
        ) as run,
    ):
        if run.result is not None and not config.append:
            return run.result
        manifest = on_first_process(lambda: _Work.of(config).go(Manifest.read(config.out)))
        result = {"fingerprint": manifest.spec.fingerprint} | manifest.generations[-1].report
        return result if run.result == result else run.finish(result)


@dataclass(frozen=True)
class _Work:
    """One call, on the process that does it.

    Args:
        config: the job's.
        sids: to work on.
        codec: theirs.
        moved: what is known of moved items; None for nothing but their SIDs.
    """

    config: CodecDisambiguateConfig
    sids: SIDs
    codec: Codec
    moved: MovedItems | None

    @staticmethod
    def of(config: CodecDisambiguateConfig) -> "_Work":
        codec, sids = Codec.load(config.sids / CODEC_FOLDER), open_sids(config.sids)
        codec.check(sids.spec.fingerprint, str(sids.path))
        moved = None
        if config.items is not None and config.tokenizer is not None:
            tokenizer = Tokenizer.load(config.tokenizer)
            tokenizer.codec.check(sids.spec.fingerprint, str(sids.path))
            moved = MovedItems(config.items, tokenizer)
        return _Work(config, sids, codec, moved)

    def go(self, before: Manifest | None) -> Manifest:
        """Publishes the generations that are not there yet."""
        out, source = self.config.out, published(self.config.sids)
        codec = self.codec if self.config.capacity else self.codec.with_serial_digit(self.config.radix)
        done = before.generations if before else ()
        self._check_done(done, source)
        if before is not None:
            remove_unpublished(out, before)
        manifest = before
        for number in range(len(done), len(source.generations)):
            path = out / generation_file(number)
            with stage(f"generation {number}", None, show=True, line=False):
                item_ids, words_NW, report = self._moved(number) if self.config.capacity else self._numbered(number)
            if manifest is None:
                codec.save(out / CODEC_FOLDER)
            write_sids(path, codec.spec, _blocks(item_ids, words_NW), self.sids.id_type)
            generation = Generation.of(path, made_of=source.generations[number].sha256, report=report)
            earlier = manifest.generations if manifest else ()
            manifest = Manifest(codec.spec, (*earlier, generation), self.config.capacity)
            manifest.write(out)
            show(f"{out}: {_summary(report)}")
        if manifest is before:
            say(f"{out}: nothing new: it has all {len(done)} generations of {self.config.sids}")
        assert manifest is not None  # SIDs have a generation at least
        return manifest

    def _check_done(self, done: tuple[Generation, ...], source: Manifest) -> None:
        made_of = [generation.made_of for generation in done]
        if made_of != [generation.sha256 for generation in source.generations[: len(done)]]:
            raise RunMismatchError(
                f"{self.config.out}: was made of other SIDs than {self.config.sids} holds now; give another folder, or remove this one"
            )

    def _numbered(self, number: int) -> tuple[pa.Array, np.ndarray, dict[str, Any]]:
        """Ids and longer SIDs of a generation, and the report."""
        item_ids, words_NW = self.sids.generations[number].read()
        earlier_NW = self._words(range(number))
        rank_N = PrefixGroups.of(self.codec.spec, np.concatenate([earlier_NW, words_NW])).ranks()[len(earlier_NW) :]
        radix = self.config.radix
        if rank_N.max() >= radix:
            self._refuse(words_NW[int(rank_N.argmax())], number)
        longer = self.codec.with_serial_digit(radix).spec
        words = [_longer(self.codec.spec, longer, words_NW[s], rank_N[s]) for s in _slices(len(words_NW))]
        return item_ids, np.concatenate(words), {"items": len(item_ids), "largest": int(rank_N.max()) + 1}

    def _refuse(self, words_W: np.ndarray, number: int) -> None:
        found = [
            item_ids.filter(pa.array((words_NW == words_W).all(1)))
            for file in self.sids.generations[: number + 1]
            for item_ids, words_NW in file.batches()
        ]
        same, radix = pa.concat_arrays(found), self.config.radix
        some = ", ".join(shown(same, place) for place in range(min(3, len(same))))
        raise DataError(
            f"{self.sids.path}: {len(same):,} items share a SID (item_id {some}, ...), but a digit of radix {radix} tells {radix} "
            "apart; raise the radix, or encode with more digits"
        )

    def _moved(self, number: int) -> tuple[pa.Array, np.ndarray, dict[str, Any]]:
        """Ids and SIDs of a generation, none of them of too many items, and the report."""
        item_ids, words_NW = self.sids.generations[number].read()
        settled = open_sids(self.config.out) if number else None
        published_PW = np.concatenate([words for _, words in settled.batches()]) if settled else None
        order_N = pc.sort_indices(item_ids).to_numpy()
        known = None if self.moved is None else self.moved.of(item_ids.take(pa.array(order_N)), words_NW[order_N])
        moves = within_capacity(
            self.codec,
            words_NW[order_N],
            self.config.capacity,
            published_PW=published_PW,
            vectors=None if known is None else known.vectors,
        )
        report = _report(moves)
        if known is not None and len(moves.rows_M):
            report["moved_sources"] = known.errors(moves.rows_M, moves.words_NW)
        settled_NW = np.empty_like(words_NW)
        settled_NW[order_N] = moves.words_NW
        return item_ids, settled_NW, report

    def _words(self, numbers: range) -> np.ndarray:
        none_NW = np.empty((0, self.codec.spec.num_words), np.int64)
        return np.concatenate([none_NW, *(words for n in numbers for _, words in self.sids.generations[n].batches())])


def _report(moves: Moves) -> dict[str, Any]:
    scale = max(float(moves.scale_M.sum()), np.finfo(np.float64).tiny)
    return {
        "items": len(moves.words_NW),
        "moved": len(moves.rows_M),
        "error_before": float(moves.before_M.sum()) / scale,
        "error_after": float(moves.after_M.sum()) / scale,
    }


def _summary(report: dict[str, Any]) -> str:
    if "largest" in report:
        return f"{report['items']:,} items, each with a SID of its own; the most that shared one: {report['largest']}"
    text = f"{report['items']:,} items, {report['moved']:,} moved"
    if not report["moved"]:
        return text
    text += f"; error of their vectors {report['error_before']:.4f} before, {report['error_after']:.4f} after"
    for source, errors in report.get("moved_sources", {}).items():
        text += f"; of {source} {errors['before']:.4f} and {errors['after']:.4f}"
    return text


def _longer(spec: SIDSpec, longer: SIDSpec, words_NW: np.ndarray, rank_N: np.ndarray) -> np.ndarray:
    return longer.pack(np.column_stack([spec.unpack(words_NW), rank_N]))


def _blocks(item_ids: pa.Array, words_NW: np.ndarray) -> list[tuple[pa.Array, np.ndarray]]:
    return [(item_ids[block], words_NW[block]) for block in _slices(len(item_ids))]


def _slices(count: int) -> list[slice]:
    return [slice(first, first + _BLOCK) for first in range(0, count, _BLOCK)]
