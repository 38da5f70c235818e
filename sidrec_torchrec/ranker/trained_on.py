"""What a ranker keeps, in its own folder, of what it was trained on: enough to meet other users, days and items.

``trained_on`` is a prepared folder without its sequences: vocabularies, schema, tasks and policy, and by item whether training
had it, how often, and its id. ``arm.json`` says which codecs made the SIDs and which sources the vectors are of; for an arm that
learns from training events, ``arrays`` holds what it learned them with.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sidrec_torchrec.codec.codec import CODEC_FOLDER, Codec
from sidrec_torchrec.data.like import TRAINED_ON
from sidrec_torchrec.data.prepared import Prepared, open_prepared
from sidrec_torchrec.data.seen_by import SeenBy
from sidrec_torchrec.errors import CodecMismatchError, DataError, SidrecError
from sidrec_torchrec.files import atomic_path, list_files, read_object, write_json
from sidrec_torchrec.names import escape
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.ranker.arms import ARMS, ArmInputs, Needs, SIDArray
from sidrec_torchrec.ranker.arms.open import named, training_events_file
from sidrec_torchrec.storage.mirror import is_mirrored, open_input

ARM_FILE, _ARRAYS = "arm.json", "arrays"


@dataclass(frozen=True)
class TrainedOn:
    """What a ranker was trained on. Made by ``open``.

    Args:
        prepared: the prepared folder, maybe without its sequences.
        fingerprints: of the SIDs' codecs, by the SIDs' names; None if an earlier version trained it.
        sources: of the vectors that the arm reads, in their order; None as above.
    """

    prepared: Prepared
    fingerprints: dict[str, str] | None = None
    sources: tuple[str, ...] | None = None

    @staticmethod
    def open(ranker: Path, prepared: Path) -> "TrainedOn":
        """What the ranker's folder holds; of one of an earlier version, the sequences that it names.

        Args:
            ranker: its folder.
            prepared: of the sequences it was trained on.
        """
        folder = ranker / TRAINED_ON
        if not folder.is_dir():
            return TrainedOn(open_prepared(prepared))
        arm = read_object(folder / ARM_FILE)
        try:
            return TrainedOn(open_prepared(folder), arm["fingerprints"], tuple(arm["sources"]))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{folder / ARM_FILE}: of another version of sidrec_torchrec ({error!r}); train again"
            ) from error

    def named(self, sids: Sequence[Path]) -> dict[str, Path]:
        """Folders of SIDs by the names that the ranker's own have, whatever the folders are called.

        Args:
            sids: as many folders as the ranker reads, in any order.

        Raises:
            CodecMismatchError: if another codec made them; names both fingerprints.
            SidrecError: if there are more or fewer.
        """
        if self.fingerprints is None:
            return named(sids)
        found = {path: Codec.load(path / CODEC_FOLDER).spec.fingerprint for path in sids}
        left, by_name = dict(self.fingerprints), {}
        for path, fingerprint in found.items():
            name = next((name for name, own in left.items() if own == fingerprint and name == path.name), None)
            name = name or next((name for name, own in left.items() if own == fingerprint), None)
            if name is None:
                own = ", ".join(f"{value} ('{key}')" for key, value in self.fingerprints.items())
                raise CodecMismatchError(
                    f"{path}: SIDs of codec {fingerprint}; the ranker was trained on SIDs of codec {own}: encode these items with the "
                    "tokenizer that made those, or train again"
                )
            by_name[name] = path
            del left[name]
        if left:
            raise SidrecError(
                f"--sids: the ranker also reads SIDs of codec {', '.join(left.values())}; name their folder, too"
            )
        return {name: by_name[name] for name in self.fingerprints}

    def met(self, arm: str, given: ArmInputs, sequences: SeenBy) -> ArmInputs:
        """What the trained arm is made of where it meets other sequences, and maybe other items.

        Args:
            arm: its name.
            given: of the items at hand.
            sequences: of those items, as the ranker sees them.

        Raises:
            SidrecError: if these are other items, and the arm cannot take them.
            DataError: if it cannot be told whether they are others.
        """
        kind, own = ARMS[arm], self.prepared
        if kind.takes_new_items is None and kind.needs is not Needs.NOTHING and not kind.counts_events:
            return given
        row_I = sequences.own_rows
        is_same = len(row_I) == own.num_items and np.array_equal(row_I, np.arange(len(row_I)))
        if is_same and not kind.counts_events:
            return given
        if kind.takes_new_items and (self.sources is not None or not kind.counts_events):
            return replace(given, trained_on=self._inputs(kind.counts_events, given), own_rows=row_I)
        if is_same:
            return replace(given, training_events=training_events_file(own))
        why = (
            "does not say that it can"
            if not kind.takes_new_items
            else "was trained by an earlier version, which kept too little"
        )
        raise SidrecError(
            f"the arm '{arm}' cannot be given other items than it was trained on: it learns of items by their rows or training events, and "
            f"{why}; evaluate it on the items it was trained on, or train again"
        )

    def _inputs(self, counts_events: bool, given: ArmInputs) -> ArmInputs:
        own, arrays = self.prepared, self.prepared.folder / _ARRAYS
        if not counts_events:
            return ArmInputs(num_items=own.num_items)
        return ArmInputs(
            num_items=own.num_items,
            vectors={name: arrays / _array("source", name) for name in given.vectors},
            sids={name: SIDArray(arrays / _array("sids", name), sid.codec) for name, sid in given.sids.items()},
            training_events=training_events_file(own),
        )


def keep_trained_on(ranker: Path, prepared: Prepared, inputs: ArmInputs, arm: str) -> None:
    """Writes the ranker's ``trained_on``, if it is not there yet. Call on every process.

    Args:
        ranker: its folder.
        prepared: the sequences it is trained on.
        inputs: what its arm is made of.
        arm: the arm's name.
    """
    on_first_process(lambda: None if (ranker / TRAINED_ON).is_dir() else _keep(ranker, prepared, inputs, arm))


def _keep(ranker: Path, prepared: Prepared, inputs: ArmInputs, arm: str) -> None:
    with atomic_path(ranker / TRAINED_ON) as folder:
        folder.mkdir()
        _link(prepared.files_beside_sequences(), folder)
        fingerprints = {name: sid.codec.spec.fingerprint for name, sid in inputs.sids.items()}
        write_json(folder / ARM_FILE, {"fingerprints": fingerprints, "sources": list(inputs.vectors)}, sealed=True)
        if ARMS[arm].counts_events:
            (folder / _ARRAYS).mkdir()
            for name, path in inputs.vectors.items():
                _link_as(path, folder / _ARRAYS / _array("source", name))
            for name, sid in inputs.sids.items():
                _link_as(sid.path, folder / _ARRAYS / _array("sids", name))
        list_files(folder)


def _array(kind: str, name: str) -> str:
    return f"{escape(f'{kind}-{name}')}.npy"


def _link(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        (shutil.copyfile if path.suffix == ".json" else _link_as)(path, folder / path.name)


def _link_as(path: Path, to: Path) -> None:
    """A second name of the file, which takes no room; a copy where the disk has no such thing, or it is of a URL, or for one."""
    if is_mirrored(path) or is_mirrored(to):
        with open_input(path) as source, to.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        return
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)
