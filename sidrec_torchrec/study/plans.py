"""What a study compares: variants, each a way of feeding items, with the tokenizers that make its SIDs."""

from dataclasses import dataclass, field, replace

from sidrec_torchrec.errors import check_once, check_share
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
        digit_dropout: share of an item's digits that this ranker does without; None: as the job has it.
        seed: of all this; added to that of the study.

    Raises:
        ValueError: on columns named twice, a share out of range, or one of a tokenizer that is not tuned.
    """

    name: str
    quantizer: QuantizerConfig
    sources: tuple[str, ...]
    targets: tuple[str, ...] = ()
    collaborative: bool = False
    tuned: bool = False
    digit_dropout: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_once(self, "sources", "targets")
        if self.digit_dropout is not None:
            check_share(self, "digit_dropout")
            if not self.tuned:
                raise ValueError(f"{self.name}: digits are dropped while a tokenizer is tuned, and this one is not")

    @property
    def folder(self) -> str:
        """Where it is, among its kind; the last part is its name."""
        return self._at_seed(self.name)

    @property
    def trained_folder(self) -> str:
        """Where it is before it is tuned; plans that differ in that alone share it."""
        return self._at_seed(self.name.rpartition(_TUNED)[0] if self.tuned and _TUNED in self.name else self.name)

    @property
    def tuned_folder(self) -> str:
        """Where it is when it is tuned."""
        return self.folder if _TUNED in self.name else self.folder + _TUNED

    def _at_seed(self, name: str) -> str:
        return f"seed-{self.seed}/{name}" if self.seed else name


_TUNED = "-tuned"  # a plan's name may say that it is, and then how


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
