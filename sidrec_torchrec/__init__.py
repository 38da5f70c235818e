"""Semantic IDs in TorchRec: fuse an item's content into one discrete ID, and rank from it.

Public names load when first used, so that the command line starts at once, ``sidrec doctor`` runs even where torch, torchrec
and fbgemm do not match, and a server that only scores needs no TorchRec.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sidrec_torchrec.environment import check_if_installed, is_command_line

__version__ = "0.2.0"

if TYPE_CHECKING:  # for editors and type checkers; the same names as below
    from sidrec_torchrec.codec.alphabet import Levels, OneHot, Real, Signs, Ternary, format_stages, parse_stages
    from sidrec_torchrec.codec.codec import Codec
    from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
    from sidrec_torchrec.codec.packing import NO_SID, SIDSpec
    from sidrec_torchrec.codec.quantizer import Quantizer
    from sidrec_torchrec.codec.residual_vq import ResidualVQ, ResidualVQConfig
    from sidrec_torchrec.data.sid_index import SIDLookup
    from sidrec_torchrec.data.sids import open_sids, read_sids
    from sidrec_torchrec.data.vocabulary import Vocabulary
    from sidrec_torchrec.errors import SidrecError
    from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionConfig, VQFusionOptions
    from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
    from sidrec_torchrec.fusion.tokenizer import Tokenizer
    from sidrec_torchrec.ops.code_attention import code_attention
    from sidrec_torchrec.ops.side_decode import side_decode
    from sidrec_torchrec.ops.top_events import top_events
    from sidrec_torchrec.ranker.arms import Arm, ArmConfig
    from sidrec_torchrec.ranker.config import RankerConfig
    from sidrec_torchrec.ranker.model import Ranker
    from sidrec_torchrec.ranker.predictor import Predictor
    from sidrec_torchrec.ranker.recipe import RankerRecipe, TrainedRanker
    from sidrec_torchrec.ranker.scorer import Scorer
    from sidrec_torchrec.ranker.sharding import OptimizerConfig
    from sidrec_torchrec.ranker.training import RankerTrainingConfig
    from sidrec_torchrec.side.code_attention import CodeAttention
    from sidrec_torchrec.side.collection import SIDEBagCollection, SIDECollection
    from sidrec_torchrec.side.expansion import LearnedSIDE, SIDEConfig
    from sidrec_torchrec.side.hybrid import CoarseIds, HybridVectors
    from sidrec_torchrec.side.ngram import PrefixNgram
    from sidrec_torchrec.side.replace import replace_tables

_PUBLIC = {
    "codec.alphabet": ["Levels", "OneHot", "Real", "Signs", "Ternary", "format_stages", "parse_stages"],
    "codec.codec": ["Codec"],
    "codec.dpca": ["DPCA", "DPCAConfig"],
    "codec.packing": ["NO_SID", "SIDSpec"],
    "codec.quantizer": ["Quantizer"],
    "codec.residual_vq": ["ResidualVQ", "ResidualVQConfig"],
    "data.sid_index": ["SIDLookup"],
    "data.sids": ["open_sids", "read_sids"],
    "data.vocabulary": ["Vocabulary"],
    "errors": ["SidrecError"],
    "fusion.config": ["QuantizerConfig", "VQFusionConfig", "VQFusionOptions"],
    "fusion.model": ["ItemTensors", "VQFusion"],
    "fusion.tokenizer": ["Tokenizer"],
    "ops.code_attention": ["code_attention"],
    "ops.side_decode": ["side_decode"],
    "ops.top_events": ["top_events"],
    "ranker.arms": ["Arm", "ArmConfig"],
    "ranker.config": ["RankerConfig"],
    "ranker.model": ["Ranker"],
    "ranker.predictor": ["Predictor"],
    "ranker.recipe": ["RankerRecipe", "TrainedRanker"],
    "ranker.scorer": ["Scorer"],
    "ranker.sharding": ["OptimizerConfig"],
    "ranker.training": ["RankerTrainingConfig"],
    "side.code_attention": ["CodeAttention"],
    "side.collection": ["SIDEBagCollection", "SIDECollection"],
    "side.expansion": ["LearnedSIDE", "SIDEConfig"],
    "side.hybrid": ["CoarseIds", "HybridVectors"],
    "side.ngram": ["PrefixNgram"],
    "side.replace": ["replace_tables"],
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if not is_command_line():  # which says it in its own way, after `doctor` has had its chance
    check_if_installed()
