"""Arms: the ways of feeding items to the ranker that a comparison swaps, everything else being equal."""

from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs, Needs, SIDArray, Tokenizers
from sidrec_torchrec.ranker.arms.content import NoneArm, RawArm
from sidrec_torchrec.ranker.arms.hashed import HashedIdArm
from sidrec_torchrec.ranker.arms.ids import IdArm
from sidrec_torchrec.ranker.arms.ngram import AllNgramArm, PrefixNgramArm
from sidrec_torchrec.ranker.arms.open import open_arm
from sidrec_torchrec.ranker.arms.pieces import PiecesArm, SidePiecesArm
from sidrec_torchrec.ranker.arms.product_quantized import ProductQuantizedArm
from sidrec_torchrec.ranker.arms.projected import ProjectedArm
from sidrec_torchrec.ranker.arms.side import HybridArm, LearnedSideArm, SideArm

__all__ = [
    "ARMS",
    "AllNgramArm",
    "Arm",
    "ArmConfig",
    "ArmInputs",
    "HashedIdArm",
    "HybridArm",
    "IdArm",
    "LearnedSideArm",
    "Needs",
    "NoneArm",
    "PiecesArm",
    "PrefixNgramArm",
    "ProductQuantizedArm",
    "ProjectedArm",
    "RawArm",
    "SIDArray",
    "SideArm",
    "SidePiecesArm",
    "Tokenizers",
    "open_arm",
]
