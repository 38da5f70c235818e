"""Starting a tokenizer in training from another one: its weights in place of the closed form."""

import json
from typing import Any

import torch
from torch import Tensor

from sidrec_torchrec.data.format import Vocabulary
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.fusion.config import VQFusionConfig
from sidrec_torchrec.fusion.model import VQFusion
from sidrec_torchrec.fusion.tokenizer import Tokenizer

_PER_CLASS = ("linear.", "perceptron.output.")  # of a head: what has a row per class


@torch.no_grad()
def take_weights(model: VQFusion, vocabularies: dict[str, Vocabulary], old: Tokenizer) -> None:
    """Makes the model encode as the old tokenizer does, and decode what both have as it does.

    All that encoding depends on is taken, standardization too, so that every item has the SID it had. Decoders of sources that
    both predict are taken; of targets, what belongs to classes that both have. What is new starts as ``VQFusion.start`` left it.

    Args:
        model: started, on the CPU.
        vocabularies: its classes by target.
        old: a tokenizer of the same sources to read, sizes and quantizer.

    Raises:
        SidrecError: if they differ in what encodes; says in what.
    """
    _check(model.config, old.model.config)
    state, theirs = model.state_dict(), old.model.state_dict()
    for name, value in state.items():
        part, _, rest = name.partition(".")
        owner = rest.partition(".")[0]
        if part == "heads" and owner in old.vocabularies and rest.partition(".")[2].startswith(_PER_CLASS):
            _take_classes(value, theirs[name], vocabularies[owner], old.vocabularies[owner])
        elif name in theirs and theirs[name].shape == value.shape and not _is_measured_anew(name, model.config):
            value.copy_(theirs[name])


def _take_classes(value: Tensor, its: Tensor, own: Vocabulary, other: Vocabulary) -> None:
    """Rows of the classes that both have."""
    places = {label: place for place, label in enumerate(other.values)}
    for row, label in enumerate(own.values):
        if label in places:
            value[row] = its[places[label]]


def _is_measured_anew(name: str, config: VQFusionConfig) -> bool:
    """Standardization of what is only predicted: it takes no part in encoding, and the column may be another one now."""
    return any(name.startswith(f"standardize.{source}.") for source in config.predicted)


def _check(own: VQFusionConfig, its: VQFusionConfig) -> None:
    def described(config: VQFusionConfig) -> dict[str, Any]:
        return {
            "sources": json.dumps(config.read_sources, sort_keys=True),
            "latent_dim": config.latent_dim,
            "hidden_dim": config.hidden_dim,
            "quantizer": f"{config.quantizer.kind} {config.quantizer.stages}",
        }

    here, there = described(own), described(its)
    if differences := [f"{name} is {here[name]}, was {there[name]}" for name in here if here[name] != there[name]]:
        raise SidrecError(
            f"--init: a tokenizer of another architecture ({'; '.join(differences)}); train it anew, or name what it has"
        )
