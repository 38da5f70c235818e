"""Probabilities from a pandas frame: a trained ranker asked about a user's candidates, as a notebook would.

    python examples/score_a_frame.py [RUN]

RUN is a folder train-ranker wrote, of any arm; without one a small ranker is trained on a synthetic corpus first.
"""

import sys
import tempfile
from pathlib import Path

import pandas as pd

from sidrec_torchrec import Predictor, RankerConfig
from sidrec_torchrec.data.prepare import prepare
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.jobs import train_ranker
from sidrec_torchrec.jobs.prepare import PrepareConfig


def train(folder: Path) -> Path:
    write_synthetic(SyntheticConfig(items=300, users=200, median_events=60), folder / "data")
    prepare(folder / "data", folder / "sequences", PrepareConfig())
    config = {"data": folder / "data", "prepared": folder / "sequences", "out": folder / "run", "arm": "raw"}
    train_ranker.main(train_ranker.TrainRankerConfig(**config, epochs=4, model=RankerConfig(dim=32)))
    return folder / "run"


with tempfile.TemporaryDirectory() as folder:
    predictor = Predictor.open(sys.argv[1] if len(sys.argv) > 1 else train(Path(folder)))
    data = predictor.trained.recipe.data
    events, items = pd.read_parquet(data / "events.parquet"), pd.read_parquet(data / "items.parquet")
    user = events.user_id.iloc[0]
    frame = pd.DataFrame({"user_id": user, "item_id": items.item_id, "timestamp": events.timestamp.max() + 1})
    frame["probability"] = predictor.predict(frame)  # with all that the user has done
    frame["unknown"] = predictor.predict(frame, events=events[:0])  # as if nothing were known of him
    print(frame.nlargest(5, "probability").to_string(index=False))
