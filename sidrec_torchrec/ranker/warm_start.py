"""Starting a ranker in training from a trained one: its weights in place of random ones, if each would mean the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.prepared import Prepared, open_prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ranker.arms import ARMS
from sidrec_torchrec.ranker.arms.base import Needs
from sidrec_torchrec.ranker.recipe import RankerRecipe, TrainedRanker, as_kept
from sidrec_torchrec.training.checkpoints import BEST, Checkpoints
from sidrec_torchrec.training.loop import CHECKPOINTS


def weight_files(ranker: Path) -> list[Path]:
    """The files of the weights that ``start_from`` takes."""
    return sorted(path for path in (Path(ranker) / CHECKPOINTS / BEST).rglob("*") if path.is_file())


def start_from(ranker: Path, model: nn.Module, recipe: RankerRecipe) -> None:
    """Fills a model, whole or sharded, with the weights of a trained ranker's best epoch. Call on every process.

    Args:
        ranker: folder train-ranker wrote.
        model: about to be trained.
        recipe: what it is made of.

    Raises:
        CodecMismatchError: if the trained one's SIDs have been encoded anew, by another codec.
        SidrecError: if a row would be taken for that of another item, value or code, or a weight is missing or of another shape;
            says which.
    """
    trained = TrainedRanker.open(ranker)
    for difference in _differences(recipe, trained.recipe):
        raise SidrecError(
            f"{ranker}: cannot start from this ranker: {difference}; train anew, or give what it was trained with"
        )
    shapes = Checkpoints(trained.folder / CHECKPOINTS).shapes(BEST)
    left = {name for name in shapes if name.startswith("model.")}
    for name, value in model.state_dict().items():
        kept, _ = as_kept(name, value, set(shapes))
        left.discard(f"model.{kept}")
        there, here = shapes.get(f"model.{kept}"), _shape(value)
        if there != here:
            found = "is none of its weights" if there is None else f"is {list(there)} in it"
            raise SidrecError(
                f"{ranker}: cannot start from this ranker: '{name}' is {list(here)} here and {found}; train anew, or with the sizes "
                "and tasks it was trained with"
            )
    for name in sorted(left):
        raise SidrecError(
            f"{ranker}: cannot start from this ranker: it has '{name.removeprefix('model.')}', which is nothing here; train anew, or "
            "with the sizes it was trained with"
        )
    trained.load(model)


def _differences(own: RankerRecipe, its: RankerRecipe) -> Iterator[str]:
    """What would make weights of equal shape mean something else, in words."""
    if own.arm != its.arm:
        yield f"its arm is '{its.arm}', not '{own.arm}'"
    here, there = open_prepared(own.prepared), open_prepared(its.prepared)
    if own.model.histories_by != its.model.histories_by:
        yield f"its histories are by '{its.model.histories_by}', not by '{own.model.histories_by}'"
    if here.named_tasks != there.named_tasks or here.tasks != there.tasks:
        tasks = (", ".join(p.named_tasks or p.tasks) for p in (there, here))
        yield "it predicts {}, not {}".format(*tasks)
    for name, values in here.vocabularies.items():
        if values != there.vocabularies.get(name):
            yield f"its user feature '{name}' has other values"
    if here.features != there.features:
        yield "features of its events have other codes"
    kind = ARMS[own.arm]
    if kind.needs is Needs.SIDS and _fingerprints(own) != _fingerprints(its):
        yield f"its SIDs are of codec {', '.join(_fingerprints(its))}, not {', '.join(_fingerprints(own))}"
    if kind.needs is Needs.NOTHING and not kind.is_base and here.data["items"] != there.data["items"]:
        yield f"rows of the arm '{own.arm}' belong to items, and its items are others"
    if kind.needs is Needs.VECTORS and own.source != its.source:
        yield f"it reads the sources {', '.join(its.source) or 'of its items'}, not {', '.join(own.source) or 'of these'}"
    if kind.counts_events and not _same_events(here, there):
        yield f"rows of the arm '{own.arm}' follow from what training events it was opened with, and its are others"


def _fingerprints(recipe: RankerRecipe) -> list[str]:
    return [Codec.load(folder).spec.fingerprint for folder in recipe.sids]


def _same_events(here: Prepared, there: Prepared) -> bool:
    return np.array_equal(here.training_events(), there.training_events())


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.size()) if hasattr(value, "size") else ()
