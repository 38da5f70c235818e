"""What a study compares: variants, each a way of feeding items, with the tokenizers that make its SIDs."""

from dataclasses import dataclass, field, replace

from sidrec_torchrec.errors import check_once
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.training import RankerTrainingConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerPlan:
    """A tokenizer to train.

    Args:
        name: of its folders.
        quantizer: its digits.
        sources: that it reads.
        targets: that it also predicts.
        collaborative: whether it also predicts what users do with its training items.
        tuned: whether it is then tuned through a ranker.
        seed: of all this; added to that of the study.
    """

    name: str
    quantizer: QuantizerConfig
    sources: tuple[str, ...]
    targets: tuple[str, ...] = ()
    collaborative: bool = False
    tuned: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_once(self, "sources", "targets")

    @property
    def folder(self) -> str:
        """Where it is, among its kind; the last part is its name."""
        return f"seed-{self.seed}/{self.name}" if self.seed else self.name


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of feeding items to the ranker.

    Args:
        name: in tables and of its folders.
        arm: the ranker's arm.
        sources: that the arm reads as they are, if it does.
        tokenizers: that make its SIDs: one, or one per source.
        arm_options: choices within the arm.
        training: the ranker, and how it is trained; the seed is the study's.
    """

    name: str
    arm: str
    sources: tuple[str, ...] = ()
    tokenizers: tuple[TokenizerPlan, ...] = ()
    arm_options: ArmConfig = field(default_factory=ArmConfig)
    training: RankerTrainingConfig = field(default_factory=RankerTrainingConfig)

    def of_seed(self, seed: int) -> "Variant":
        """With tokenizers of another seed."""
        return replace(self, tokenizers=tuple(replace(plan, seed=seed) for plan in self.tokenizers))
