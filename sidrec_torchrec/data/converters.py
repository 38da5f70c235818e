"""From public data sets, as their authors publish them, to our format (docs/data.md).

A converter is a function of one config dataclass that writes a data folder and returns counts; the first line of its
docstring is its help. ``sidrec data NAME`` calls it. It loads when it is called: ``sidrec --help`` shows its name alone.
"""

from collections.abc import Callable
from typing import Any

from sidrec_torchrec.registry import Registry

CONVERTERS: Registry[Callable[[Any], dict[str, Any]]] = Registry(
    "converter",
    {
        "movielens": "sidrec_torchrec.data.movielens:convert_movielens",
        "amazon-reviews": "sidrec_torchrec.data.amazon_reviews:convert_amazon_reviews",
        "kuairand": "sidrec_torchrec.data.kuairand:convert_kuairand",
        "mind": "sidrec_torchrec.data.mind:convert_mind",
        "taobao-mm": "sidrec_torchrec.data.taobao_mm:convert_taobao_mm",
        "yambda": "sidrec_torchrec.data.yambda:convert_yambda",
    },
)
