"""The export job: what a fresh process loads, without TorchRec, predicts what the trained ranker did."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import export, train_ranker
from sidrec_torchrec.jobs.export import ExportConfig, check_predictions
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import requests_of
from sidrec_torchrec.training.group import process_group
from tests.jobs.test_train_ranker import SMALL, make_config

CODES = dataclasses.replace(SMALL, attention="codes", learned_queries=2)

LOAD = """
import sys, torch
from sidrec_torchrec.ranker.scorer import Scorer
inputs = torch.load(sys.argv[2])
torch.save(Scorer(sys.argv[1])(**inputs), sys.argv[3])
assert "torchrec" not in sys.modules and "fbgemm_gpu" not in sys.modules
"""


@pytest.fixture(scope="module")
def trained(corpus, prepared, sids, tmp_path_factory):
    """A ranker, and its test batches with what it predicts of them."""
    out = tmp_path_factory.mktemp("ranker") / "codes"
    options = ArmConfig(side_mode="decoded")
    config = make_config(corpus, prepared, sids, out, "learned-side", model=CODES, arm_options=options)
    train_ranker.main(config)
    with process_group() as processes:
        parts = config.open()
        model = parts.sharded(processes).eval()
        TrainedRanker.open(out).load(model)
        pairs = []
        for batch in parts.batches("test", processes):
            words_NW = batch.items["sid"].values().unsqueeze(1)
            with torch.no_grad():
                pairs.append((requests_of(batch, words_NW), model(batch)[1].prediction[:, 0]))
    return config, pairs


def test_a_program_predicts_what_the_sharded_ranker_does(trained, tmp_path):
    config, pairs = trained
    file = tmp_path / "ranker.pt2"
    metadata = export.main(ExportConfig(ranker=config.out, out=file, compiled=False))
    scorer = Scorer(file)
    assert scorer.metadata == metadata
    assert len(pairs) > 1
    for inputs, expected in pairs:
        torch.testing.assert_close(scorer(**inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@pytest.mark.timeout(900)  # a minute of compiling, where nothing else runs
def test_a_compiled_package_loads_without_torchrec(trained, tmp_path):
    config, pairs = trained
    file = tmp_path / "ranker.pt2"
    export.main(ExportConfig(ranker=config.out, out=file))
    inputs, expected = pairs[0]
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", LOAD, file, tmp_path / "inputs.pt", tmp_path / "output.pt"]
    subprocess.run(command, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected, rtol=0, atol=1e-5)
    scorer = Scorer(file)
    none = {name: value[:0] for name, value in inputs.items()} | {"offsets_B1": torch.zeros(1, dtype=torch.int64)}
    assert scorer(**none).shape == (0,)
    no_candidates = inputs | {name: inputs[name][:0] for name in ("candidate_MW", "request_M")}
    assert scorer(**no_candidates).shape == (0,)
    one = torch.tensor([int(inputs["offsets_B1"].diff().argmin())])  # the shortest history, without its events
    no_events = {name: inputs[name][:0] for name in ("history_NW", "action_N", "time_N")}
    no_events |= {name: inputs[name][one] for name in ("candidate_MW", "request_time_B", "num_events_B", "user_BF")}
    probability = scorer(**no_events, offsets_B1=torch.tensor([0, 0]), request_M=torch.tensor([0]))
    assert probability.shape == (1,) and 0 < float(probability) < 1


def test_other_predictions_are_refused(trained):
    config, _ = trained
    with process_group() as processes:
        parts = config.open()
        batch = next(iter(parts.batches("test", processes)))
    ranker = parts.whole(torch.device("cpu")).eval()
    with pytest.raises(SidrecError, match="predictions differ by .* from the trained one's"):
        check_predictions(ranker, batch, lambda **inputs: torch.zeros(len(inputs["request_M"])))


def test_what_cannot_be_exported_is_refused(corpus, prepared, sids, tmp_path, monkeypatch):
    out = tmp_path / "ranker.pt2"
    with pytest.raises(SidrecError, match="ends in .pt2"):
        export.main(ExportConfig(ranker=tmp_path, out=tmp_path / "ranker.bin"))
    with pytest.raises(SidrecError, match="not found; name a folder train-ranker wrote"):
        export.main(ExportConfig(ranker=tmp_path, out=out))
    config = make_config(corpus, prepared, sids, tmp_path / "raw", "raw", epochs=1)
    train_ranker.main(config)
    with pytest.raises(SidrecError, match="train one with --arm side --model.attention codes"):
        export.main(ExportConfig(ranker=config.out, out=out))
    shutil.rmtree(config.out / "checkpoints" / "best")
    with pytest.raises(SidrecError, match="no trained epoch yet"):
        export.main(ExportConfig(ranker=config.out, out=out))
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(SidrecError, match="no C\\+\\+ compiler '/no/compiler'.* --compiled false"):
        export.main(ExportConfig(ranker=config.out, out=out))
    assert not out.exists()
