"""What VQ Fusion is made of."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import sidrec_torchrec.codec.dpca
import sidrec_torchrec.codec.residual_vq  # noqa: F401  both register their quantizers
from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.quantizer import QUANTIZERS, Quantizer
from sidrec_torchrec.errors import DataError, check_at_least, check_share

WEIGHTINGS = ("fixed", "uncertainty")


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The quantizer of the fused latent.

    Args:
        kind: its name in ``QUANTIZERS``: ``dpca``, ``rq`` for residual VQ, or another package's.
        stages: digits, e.g. ``ternary*39`` or ``onehot:256*3``; residual VQ takes one-hot digits of one size.
        commitment: weight of the pull of latents towards their decoded digits.

    Raises:
        SidrecError: on an unknown kind.
        ValueError: on stages it cannot have.
    """

    kind: str = "dpca"
    stages: str = "ternary*39"
    commitment: float = 0.25

    def __post_init__(self) -> None:
        check_at_least(self, 0, "commitment")
        QUANTIZERS[self.kind].check_stages(parse_stages(self.stages))

    def build(self, dim: int) -> Quantizer:
        """An untrained quantizer of vectors of width ``dim``."""
        return QUANTIZERS[self.kind].build(dim, parse_stages(self.stages), commitment=self.commitment)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """A categorical prediction.

    Args:
        num_classes: number of classes.
        multi_label: whether an item can have several.
    """

    num_classes: int
    multi_label: bool


@dataclass(frozen=True, kw_only=True)
class VQFusionOptions:
    """Choices within the tokenizer's model, whatever the items.

    Args:
        latent_dim: width of the fused latent.
        hidden_dim: hidden width of the perceptrons of encoders and decoders; 0 leaves them linear.
        dropout: share of hidden units dropped in training; None: the fewer the items, the more (0.5 up to 4,000, then
            2,000 / items).
        prefix_share: share of the items of a batch decoded from a random prefix of their digits, so that every prefix of
            a SID is a coarser SID.
        weighting: ``fixed`` takes ``weights``, ``uncertainty`` learns the tasks' weights (Kendall et al. 2018).
        weights: by source or target, predicted ones too; where not named, 1 for a source and 0.5 for a target.
        quantizer: the digits and how they are learned.

    Raises:
        ValueError: on values out of range, or an unknown weighting.
    """

    latent_dim: int = 64
    hidden_dim: int = 256
    dropout: float | None = None
    prefix_share: float = 0.25
    weighting: str = "fixed"
    weights: dict[str, float] = field(default_factory=dict)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        check_at_least(self, 0, "hidden_dim")
        check_at_least(self, 1, "latent_dim")
        if self.dropout is not None:
            check_share(self, "dropout")
        if not 0 <= self.prefix_share <= 1:
            raise ValueError(f"prefix_share must lie in [0, 1], got {self.prefix_share}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got '{self.weighting}'")


@dataclass(frozen=True, kw_only=True)
class VQFusionConfig(VQFusionOptions):
    """The tokenizer's model.

    Args:
        sources: width by source.
        predicted: sources that are decoded but not read, say co-visitation vectors: a SID learns to tell them from the
            other sources, so that an item without them, such as a new one, is encoded like any other.
        targets: by target.

    Raises:
        ValueError: without a source to read, or on an unknown task or predicted source, or a negative weight.
    """

    sources: dict[str, int]
    predicted: tuple[str, ...] = ()
    targets: dict[str, TargetConfig] = field(default_factory=dict)
    dropout: float = 0.5

    @staticmethod
    def of(options: VQFusionOptions, *, num_items: int, **columns: Any) -> "VQFusionConfig":
        """The model for some items.

        Args:
            options: choices.
            num_items: trained on.
            columns: ``sources``, ``predicted`` and ``targets``.
        """
        chosen = {f.name: getattr(options, f.name) for f in fields(VQFusionOptions)}
        if options.dropout is None:
            chosen["dropout"] = min(0.5, 2000 / num_items)
        return VQFusionConfig(**chosen, **columns)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.predicted:
            if name not in self.sources:
                raise ValueError(f"predicted source '{name}' is not a source; there are {', '.join(self.sources)}")
        if not self.read_sources:
            raise ValueError("VQ Fusion needs at least one source to read")
        for name in self.weights:
            if name not in self.tasks:
                raise DataError(f"weight of unknown task '{name}'; there are {', '.join(self.tasks)}")
            if not 0 <= self.weights[name] < math.inf:  # below 0 training would make the task worse
                raise DataError(f"the weight of '{name}' must be at least 0 and finite, got {self.weights[name]}")
        if overlap := self.sources.keys() & self.targets:
            raise ValueError(f"{sorted(overlap)} are both sources and targets")

    @property
    def read_sources(self) -> dict[str, int]:
        """Width by source that SIDs are made of."""
        return {name: width for name, width in self.sources.items() if name not in self.predicted}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every source's reconstruction and every target's prediction."""
        return (*self.sources, *self.targets)

    @property
    def task_weights(self) -> dict[str, float]:
        """The fixed weight of every task."""
        return {task: self.weights.get(task, 1.0 if task in self.sources else 0.5) for task in self.tasks}


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How hard training holds on to published SIDs.

    Args:
        weight: of what an item's latent is beyond keeping its digits, beside losses of which 1 is a source's whole variance.
        margin: how far inside of where a digit changes a latent is to stay; 0.5 would be its middle.

    Raises:
        ValueError: on a negative weight, or a margin outside [0, 0.5).
    """

    weight: float = 1.0
    margin: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(self, 0, "weight")
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"margin must lie in [0, 0.5), got {self.margin}")
