"""What a ranker is made of and trained on; and the folder of a trained one, from which it is made again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidrec_torchrec.codec.codec import CODEC_FILES, CODEC_FOLDER
from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.format import DataConfig, DataFolder
from sidrec_torchrec.data.prepared import Prepared, open_prepared
from sidrec_torchrec.data.seen_by import check_alike, seen_by
from sidrec_torchrec.data.sids import sid_files
from sidrec_torchrec.errors import CodecMismatchError, SidrecError
from sidrec_torchrec.files import read_object
from sidrec_torchrec.ranker.arms import ARMS, Arm, ArmConfig, ArmInputs, Needs
from sidrec_torchrec.ranker.arms.open import arm_inputs, named
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.sharding import shard
from sidrec_torchrec.ranker.trained_on import TrainedOn
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.storage.mirror import local
from sidrec_torchrec.training.checkpoints import BEST, Checkpoints
from sidrec_torchrec.training.config import config_from_json
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.loop import CHECKPOINTS
from sidrec_torchrec.training.runs import CONFIG_FILE, INPUTS, changed_inputs


@dataclass(frozen=True, kw_only=True)
class RankerRecipe(RankerTrainingConfig, DataConfig):
    """A ranker: what it reads, by which arm, and how it is trained.

    Args:
        data: folder of ``items.parquet``.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        prepared: folder the prepare job wrote.
        arm: how items are fed to it, by its name in ``ARMS``; see docs/ranker.md.
        source: sources whose vectors the arm reads, if it reads any; none named means all.
        sids: folders encode-corpus wrote, for the arms that read SIDs: of one fused tokenizer, or one per source.
        arm_options: choices within the arm.
    """

    prepared: Path
    arm: str = "side"
    source: tuple[str, ...] = ()
    sids: tuple[Path, ...] = ()
    arm_options: ArmConfig = field(default_factory=ArmConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig.__post_init__(self)

    def files(self) -> list[Path]:
        """The files a ranker depends on."""
        return [*self.folder.files("items"), *open_prepared(self.prepared).files(), *sid_files(self.sids)]

    def open(self) -> "RankerParts":
        """Its sequences and arm; lays out the arm's inputs where they are not yet. Call on every process."""
        prepared = open_prepared(self.prepared)
        inputs = arm_inputs(self.arm, data=self.folder, prepared=prepared, sources=self.source, sids=named(self.sids))
        prepared.lay_out_item_codes(self.folder)
        return RankerParts(self, prepared, ARMS[self.arm](inputs, self.arm_options), inputs)


@dataclass(frozen=True)
class RankerParts:
    """An opened recipe.

    Args:
        recipe: whose.
        prepared: its sequences.
        arm: its arm.
        inputs: what the arm is made of.
    """

    recipe: RankerRecipe
    prepared: Prepared
    arm: Arm
    inputs: ArmInputs

    def sharded(self, processes: Processes) -> nn.Module:
        """The ranker with fresh weights, sharded over the processes."""
        torch.manual_seed(self.recipe.seed)
        return shard(self.whole(processes.device), self.recipe.optimizer, processes.device)

    def whole(self, device: torch.device) -> Ranker:
        """The ranker, whole."""
        config, arm = self.recipe.model, self.arm
        sid = arm.sids[0] if len(arm.sids) == 1 else None
        reader = config.reader(sid)
        reader.check_arm(self.recipe.arm)
        items = reader.items(arm, device)
        prepared = self.prepared
        sizes = (
            prepared.user_features,
            device,
            len(prepared.tasks),
            prepared.features,
            prepared.user_lists,
            prepared.regressions,
        )
        return Ranker(config, items, arm.dim, sid, *sizes)

    def batches(self, split: str, processes: Processes) -> SequenceBatches:
        """This process's batches of a split; training ones are shuffled."""
        return self.recipe.batches(self.prepared, self.arm, split, processes)


@dataclass(frozen=True)
class TrainedRanker:
    """A folder that train-ranker wrote. Made by ``open``.

    Args:
        folder: the folder.
        recipe: what it was made of.
    """

    folder: Path
    recipe: RankerRecipe

    @staticmethod
    def open(folder: Path) -> "TrainedRanker":
        """Call on every process of the group.

        Raises:
            SidrecError: if there is no trained ranker, or one of another version of this package.
            CodecMismatchError: if an earlier version trained it, and the SIDs it reads have been encoded anew, by another codec;
                others are checked by ``parts``.
        """
        folder = local(folder)
        path = folder / CONFIG_FILE
        if not path.exists():
            raise SidrecError(f"{path}: not found; name a folder train-ranker wrote")
        if not Checkpoints(folder / CHECKPOINTS).has(BEST):
            raise SidrecError(f"{folder}: no trained epoch yet; run train-ranker to its end")
        value = {k: v for k, v in read_object(path).items() if k not in (INPUTS, "out", "init")}
        try:
            trained = TrainedRanker(folder, config_from_json(RankerRecipe, _renamed(value), folder))
        except (KeyError, TypeError, ValueError) as error:
            raise SidrecError(f"{path}: not of a ranker this version can read ({error}); train it again") from error
        if trained.trained_on.fingerprints is None:
            trained.check_codecs()
        return trained

    @cached_property
    def trained_on(self) -> TrainedOn:
        """What it was trained on."""
        return TrainedOn.open(self.folder, self.recipe.prepared)

    def parts(
        self, prepared: Path | None = None, *, data: DataFolder | None = None, sids: Sequence[Path] = ()
    ) -> RankerParts:
        """Sequences to meet, and its arm for them. Call on every process.

        What is seen in training, and how often, is what the ranker's own training had, whatever the sequences were prepared for.

        Args:
            prepared: the sequences; None for its own.
            data: folder of their items; None for its own.
            sids: folders of those items' SIDs, of the same codecs; none given: its own.

        Raises:
            SidrecError: if the sequences have other codes of users, or the arm cannot be given their items.
            CodecMismatchError: if another codec made the SIDs.
            DataError: if they are of other items.
        """
        recipe, own = self.recipe, self.trained_on
        given = open_prepared(prepared or recipe.prepared)
        check_alike(own.prepared, given, str(self.folder))
        folders = own.named(sids or recipe.sids) if ARMS[recipe.arm].needs is Needs.SIDS else {}
        inputs = arm_inputs(
            recipe.arm, data=data or recipe.folder, prepared=given, sources=own.sources or recipe.source, sids=folders
        )
        given.lay_out_item_codes(data or recipe.folder)
        sequences = seen_by(own.prepared, given)
        arm = ARMS[recipe.arm](own.met(recipe.arm, inputs, sequences), recipe.arm_options)
        return RankerParts(replace(recipe, batch_events=recipe.events_at_once(own.prepared)), sequences, arm, inputs)

    def check_codecs(self) -> None:
        """Refuses folders of SIDs that have been encoded anew by another codec; the same codec may have encoded more items.

        For a ranker whose folder does not say which codecs it reads.

        Raises:
            CodecMismatchError: names the codec's file.
        """
        if not self.recipe.sids:
            return
        changed = changed_inputs(self.folder, self.recipe.files())
        codecs = {Path(sids) / CODEC_FOLDER / name for sids in self.recipe.sids for name in CODEC_FILES}
        for file in sorted(codecs & changed.keys()):
            raise CodecMismatchError(
                f"{self.folder}: trained on SIDs of another codec: {file} {changed[file]}; use the SIDs it was trained on, or "
                "train again"
            )

    def load(self, model: nn.Module) -> None:
        """Fills the model, whole or sharded, with the weights of the best epoch.

        Raises:
            CodecMismatchError: if it was trained on SIDs of another codec.
            SidrecError: if they are broken, or of another model.
        """
        checkpoints = Checkpoints(self.folder / CHECKPOINTS)
        names = checkpoints.names(BEST)
        state = {"model": dict(as_kept(name, value, names) for name, value in model.state_dict().items())}
        checkpoints.load(BEST, state)
        model.load_state_dict(state["model"])


def as_kept(name: str, value: Any, names: set[str]) -> tuple[str, Any]:
    """A tensor's name and place in a checkpoint, which 0.1 called otherwise, and kept the codec as text."""
    if f"model.{name}" in names:
        return name, value
    old = re.sub(r"\btables\.([^.]+\.(?:fingerprint|rows))$", r"_expansions.expansions.\1", name)
    old = re.sub(r"\brows$", "rows_VE", re.sub(r"\bfingerprint$", "_extra_state", old))
    if f"model.{old}" not in names:
        return name, value
    return old, "" if old.endswith("_extra_state") else value


def _renamed(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run, those of earlier versions under their names of today."""
    model = {("learned_queries" if k == "seeds" else k): v for k, v in value["model"].items()}
    return {("arm_options" if k == "arms" else k): v for k, v in value.items()} | {"model": model}
