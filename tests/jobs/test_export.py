"""The export job: what a fresh process loads, without TorchRec, predicts what the trained ranker did."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.jobs import export, train_ranker
from sidrec_torchrec.jobs.export import ExportConfig, check_predictions
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import WithWords, alone, requests_of
from sidrec_torchrec.training.group import process_group
from tests.jobs.test_train_ranker import SMALL, make_config

CODES = dataclasses.replace(SMALL, attention="codes", learned_queries=2, top_events=5)

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


def test_a_program_predicts_what_the_sharded_ranker_does(trained, tmp_path, capsys):
    config, pairs = trained
    file = tmp_path / "ranker.pt2"
    metadata = export.main(ExportConfig(ranker=config.out, out=file, compiled=False))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"{file}: sha256 {digest}" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"its sha256 is {digest}, expected 00"):
        Scorer(file, sha256="00" * 32)
    scorer = Scorer(file, sha256=digest)
    assert scorer.metadata == metadata
    assert len(pairs) > 1
    for inputs, expected in pairs:
        torch.testing.assert_close(scorer(**inputs), expected, rtol=0, atol=1e-5)


BOTH = {"learned_queries": 2, "blocks": 2, "block_events": 8}
RANKERS = {  # arm, its SIDs, and sizes of the ranker
    "vectors of SIDs": ("side", ("side",), {"attention": "vectors"}),
    "several SIDs": ("side", ("side", "text"), {}),
    "learned rows": ("learned-side", ("side",), {}),
    "learned rows of several SIDs": ("learned-side", ("side", "text"), {"learned_queries": 1}),
    "a table beside them": ("hybrid", ("side",), BOTH),
    "prefixes": ("prefix-ngram", ("text",), {}),
    "runs": ("all-ngram", ("text",), {"learned_queries": 2}),
    "pieces": ("pieces", ("text",), {"blocks": 1, "block_events": 100}),
    "top events, and learned queries": ("side", ("side",), {"top_events": 5, "learned_queries": 1}),
    "top events of few": ("learned-side", ("side",), {"top_events": 1000}),
    "blocks over codes": ("side", ("side",), BOTH),
    "blocks over vectors": ("side", ("side",), {"attention": "vectors"} | BOTH),
}


@pytest.mark.parametrize("name", RANKERS)
def test_whatever_reads_sids_is_served(name, corpus, prepared, sids, tmp_path):
    arm, kinds, sizes = RANKERS[name]
    model = dataclasses.replace(SMALL, **sizes)
    config = make_config(corpus, prepared, sids, tmp_path / "run", arm, model=model, epochs=1)
    config = dataclasses.replace(config, sids=tuple(sids[kind] for kind in kinds))
    train_ranker.main(config)
    export.main(ExportConfig(ranker=config.out, out=tmp_path / "ranker.pt2", compiled=False))
    scorer = Scorer(tmp_path / "ranker.pt2")
    assert len(scorer.metadata["sids"]) == len(kinds)
    with process_group() as processes:
        parts = config.open()
        ranker = parts.whole(torch.device("cpu")).eval()
        TrainedRanker.open(config.out).load(ranker)
        features = WithWords(parts.arm)
        for batch in config.batches(parts.prepared, features, "test", processes):
            small = alone(batch, 100)
            expected = ranker(small)[1].prediction[:, 0].detach()
            assert len(expected) > 20 and expected.std() > 1e-3
            torch.testing.assert_close(scorer(**requests_of(small, features.words(small))), expected, rtol=0, atol=1e-5)


def test_targets_alone_are_predicted_as_together(trained):
    """But for blocks, which count the newest events from a row's first target."""
    config, _ = trained
    with process_group() as processes:
        parts = config.open()
        ranker = parts.whole(torch.device("cpu")).eval()
        batch = next(iter(parts.batches("test", processes)))
        torch.testing.assert_close(ranker(alone(batch, 10**6))[1].prediction, ranker(batch)[1].prediction)


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
    scorer = Scorer(file, parallel=2)
    threads_score_at_the_same_time(scorer, inputs, expected)
    none = {name: value[:0] for name, value in inputs.items()} | {"offsets_B1": torch.zeros(1, dtype=torch.int64)}
    assert scorer(**none).shape == (0,)
    no_candidates = inputs | {name: inputs[name][:0] for name in ("candidate_MW", "request_M")}
    assert scorer(**no_candidates).shape == (0,)
    one = torch.tensor([int(inputs["offsets_B1"].diff().argmin())])  # the shortest history, without its events
    no_events = {name: inputs[name][:0] for name in ("history_NW", "action_N", "time_N")}
    no_events |= {name: inputs[name][one] for name in ("candidate_MW", "request_time_B", "num_events_B", "user_BF")}
    probability = scorer(**no_events, offsets_B1=torch.tensor([0, 0]), request_M=torch.tensor([0]))
    assert probability.shape == (1,) and 0 < float(probability) < 1


def threads_score_at_the_same_time(scorer, inputs, expected):
    """Two threads in one compiled package waited for each other for ever."""
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(scorer, **inputs) for _ in range(120)]
        for call in calls:
            torch.testing.assert_close(call.result(timeout=120), expected, rtol=0, atol=1e-5)


def test_other_predictions_are_refused(trained):
    config, _ = trained
    with process_group() as processes:
        parts = config.open()
        features = WithWords(parts.arm)
        batch = next(iter(config.batches(parts.prepared, features, "test", processes)))
    ranker = parts.whole(torch.device("cpu")).eval()
    with pytest.raises(SidrecError, match="predictions differ by .* from the trained one's"):
        check_predictions(ranker, batch, features, lambda **inputs: torch.zeros(len(inputs["request_M"])))


def test_what_cannot_be_exported_is_refused(corpus, prepared, sids, tmp_path, monkeypatch):
    out = tmp_path / "ranker.pt2"
    with pytest.raises(SidrecError, match="ends in .pt2"):
        export.main(ExportConfig(ranker=tmp_path, out=tmp_path / "ranker.bin"))
    with pytest.raises(SidrecError, match="not found; name a folder train-ranker wrote"):
        export.main(ExportConfig(ranker=tmp_path, out=out))
    config = make_config(corpus, prepared, sids, tmp_path / "raw", "raw", epochs=1)
    train_ranker.main(config)
    with pytest.raises(SidrecError, match="reads no SIDs: train one with --arm side, or score with sidrec predict"):
        export.main(ExportConfig(ranker=config.out, out=out))
    shutil.rmtree(config.out / "checkpoints" / "best")
    with pytest.raises(SidrecError, match="no trained epoch yet"):
        export.main(ExportConfig(ranker=config.out, out=out))
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(SidrecError, match="no C\\+\\+ compiler '/no/compiler'.* --compiled false"):
        export.main(ExportConfig(ranker=config.out, out=out))
    assert not out.exists()
