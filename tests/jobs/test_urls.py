"""Jobs that read and write at URLs: what they make is what they make in local folders, wherever they are killed and go on, and whatever
the server does."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sidrec_torchrec.cli import main as cli
from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.jobs import encode_corpus, evaluate, export, predict, train_ranker, train_tokenizer
from sidrec_torchrec.jobs import prepare as prepare_job
from sidrec_torchrec.part_files import PartFiles, open_parquet
from sidrec_torchrec.ranker.arms import ARMS, ArmInputs
from sidrec_torchrec.ranker.arms.base import ArmConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.training import RankerTraining
from sidrec_torchrec.storage import remote
from sidrec_torchrec.storage.mirror import local, open_input, publish
from sidrec_torchrec.training.checkpoints import LAST, Checkpoints
from tests.s3 import S3

PROTOCOL = PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2)
SMALL = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8))
SAME = (  # by content; the rest names its own place, or tells of seconds
    "prepared/sequences",
    "tokenizer/tokenizer/codec",
    "tokenizer/checkpoints/best",
    "sids/sids.parquet",
    "ranker/checkpoints/best",
    "ranker/trained_on",
    "test.json",
)


def chain(place: str, data: str) -> dict[str, Any]:
    """All jobs, one after another; what they give."""

    def at(name: str) -> Path:
        return f"{place}/{name}"  # type: ignore[return-value]

    job = prepare_job.PrepareJobConfig(data=data, out=at("prepared"), protocol=PROTOCOL)
    results = {"prepare": prepare_job.main(job)}
    options = VQFusionOptions(quantizer=QuantizerConfig(stages="ternary*12"))
    job = train_tokenizer.TrainTokenizerConfig(data=data, out=at("tokenizer"), epochs=2, model=options)
    results["train-tokenizer"] = train_tokenizer.main(job)
    job = encode_corpus.EncodeCorpusConfig(data=data, tokenizer=at("tokenizer"), out=at("sids"))
    results["encode-corpus"] = encode_corpus.main(job)
    results["train-ranker"] = train_ranker.main(ranker_config(place, data))
    results["evaluate"] = evaluate.main(evaluate.EvaluateConfig(ranker=at("ranker"), out=at("test.json")))
    job = predict.PredictConfig(ranker=at("ranker"), newest=2, out=at("predicted.parquet"))
    results["predict"] = predict.main(job)
    results["export"] = export.main(export.ExportConfig(ranker=at("ranker"), out=at("ranker.pt2"), compiled=False))
    return results


def ranker_config(place: str, data: str, **options: Any) -> train_ranker.TrainRankerConfig:
    folders = {"prepared": f"{place}/prepared", "sids": (f"{place}/sids",), "out": f"{place}/ranker"}
    return train_ranker.TrainRankerConfig(
        data=data, **{**folders, "arm": "side", "epochs": 2, "batch_events": 512, "model": SMALL, **options}
    )


def put(folder: Path, url: str) -> str:
    """Copies a folder to a URL."""
    mirror = local(url, is_output=True)
    shutil.copytree(folder, mirror, ignore=shutil.ignore_patterns("arrays"))
    publish(mirror)
    return url


def contents(place: str | Path, *names: str) -> dict[str, bytes]:
    """By path, of files and folders of a local folder, or what a URL has, read anew."""
    top = local(str(place)) if "://" in str(place) else Path(place)
    files = [file for name in names for file in ((top / name).rglob("*") if (top / name).is_dir() else [top / name])]
    return {
        file.relative_to(top).as_posix(): read(file) for file in files if file.is_file() and "arrays" not in file.parts
    }


def read(file: Path) -> bytes:
    with open_input(file) as content:
        return content.read()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k and not k.endswith("_per_s")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def by_hand(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The chain in local folders."""
    folder = tmp_path_factory.mktemp("local")
    return folder, chain(str(folder), str(corpus))


def test_all_jobs_at_urls_make_what_they_make_in_folders(s3: S3, corpus: Path, by_hand):
    """A tenth of the requests fails; docs/storage.md has the numbers of a half."""
    folder, expected = by_hand
    put(corpus, f"{s3.url}/data")
    s3.fails(0.1, seed=1)
    found = chain(f"{s3.url}/runs", f"{s3.url}/data")
    s3.fails(0)
    assert json.loads(json.dumps(without_times(found))) == json.loads(json.dumps(without_times(expected)))
    assert contents(f"{s3.url}/runs", *SAME) == contents(folder, *SAME)
    predicted = local(f"{s3.url}/runs/predicted.parquet")
    with open_parquet(predicted) as theirs, open_parquet(folder / "predicted.parquet") as ours:
        assert theirs.read().equals(ours.read())
    assert {request["status"][:3] for request in s3.log()} >= {"200", "500", "503", "dro"}


def test_what_people_read_names_urls_and_not_where_they_are_kept(by_hand, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "mirrors"))
    sids, data, made = f"file://{by_hand[0]}/sids", f"file://{corpus}", f"file://{tmp_path}/made"
    commands = {
        f"data synthetic --items 300 --users 20 --median-events 20 --out {made}": f"{made}: ",
        f"data schema --data {made}": f"{made}/schema.json: ",
        f"data validate --data {data}": f"{data}: ",
        f"codec collisions --sids {sids} --json {made}.json": f"{sids}/sids.parquet: ",
        f"codec drift --old {sids} --new {sids} --json {made}.drift": f"old: {sids}/sids.parquet: ",
    }
    monkeypatch.setenv("COLUMNS", "300")  # of tables, whose titles would be broken
    for command, begins in commands.items():
        assert cli(command.split()) == 0
        said = capsys.readouterr()
        assert said.out.startswith(begins) and "%3A" not in said.out + said.err
    for file in (tmp_path / "made.json", tmp_path / "made.drift"):
        assert f"{sids}/sids.parquet" in file.read_text() and "%3A" not in file.read_text()


def killed(work: Callable[..., Any], *arguments: Any) -> None:
    """Calls it in a process of its own, which kills itself."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_then_die(place: str, data: str) -> None:
    """Is killed when its third checkpoint's tensors have been put, and the index has not."""
    put_file, indices = remote.Store.put, []

    def put(self: remote.Store, path: Path, to: Any) -> Any:
        indices.extend([path] * (path.name == "checkpoint.json" and path.parent.name == LAST))
        if len(indices) == 3:
            die()
        return put_file(self, path, to)

    remote.Store.put = put  # type: ignore[method-assign]
    train_ranker.main(ranker_config(place, data, checkpoint_batches=1))


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From now on this is another machine, which has nothing yet."""
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "elsewhere"))


def test_a_ranker_that_is_killed_goes_on_from_its_checkpoint_on_another_machine(
    s3: S3, corpus: Path, by_hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, expected = by_hand
    for name in ("prepared", "sids"):
        put(folder / name, f"{s3.url}/{name}")
    killed(train_then_die, s3.url, str(corpus))
    elsewhere(monkeypatch, tmp_path)
    steps, trained = RankerTraining.steps, []

    def noted(self: RankerTraining, *arguments: Any) -> Any:
        for step in steps(self, *arguments):
            trained.append(step)
            yield step

    monkeypatch.setattr(RankerTraining, "steps", noted)
    found = train_ranker.main(ranker_config(s3.url, str(corpus), checkpoint_batches=1))
    assert without_times(found) == without_times(expected["train-ranker"])
    assert contents(s3.url, "ranker/checkpoints/best") == contents(folder, "ranker/checkpoints/best")
    batches = len(trained)
    monkeypatch.setattr(RankerTraining, "steps", noted)
    train_ranker.main(ranker_config(str(folder), str(corpus), out=tmp_path / "whole"))
    assert len(trained) - batches == batches + 2  # those of the first two checkpoints were not trained on again


def encode_then_die(tokenizer: str, data: str, out: str) -> None:
    """Is killed when it has finished its first part."""
    finish = PartFiles.finish
    PartFiles.finish = lambda *arguments: (finish(*arguments), die())  # type: ignore[method-assign,assignment]
    encode_corpus._PART_ITEMS = 60
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=tokenizer, out=out))


def test_encoding_that_is_killed_goes_on_from_its_parts_on_another_machine(
    s3: S3, corpus: Path, by_hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = by_hand
    put(folder / "tokenizer", f"{s3.url}/tokenizer")
    put(corpus, f"{s3.url}/data")
    killed(encode_then_die, f"{s3.url}/tokenizer", f"{s3.url}/data", f"{s3.url}/sids")
    elsewhere(monkeypatch, tmp_path)
    monkeypatch.setattr(encode_corpus, "_PART_ITEMS", 60)
    write, written = encode_corpus.write_sids, []
    monkeypatch.setattr(
        encode_corpus, "write_sids", lambda path, *rest: (written.append(path.name), write(path, *rest))
    )
    config = {"data": f"{s3.url}/data", "tokenizer": f"{s3.url}/tokenizer"}
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(**config, out=f"{s3.url}/sids"))
    assert written == ["part-00001.parquet"]
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(**config, out=tmp_path / "sids"))
    assert contents(s3.url, "sids/sids.parquet") == contents(tmp_path, "sids/sids.parquet")
    assert sorted(path.name for path in local(f"{s3.url}/sids").iterdir()) == [
        "codec",
        "manifest.json",
        "metrics.json",
        "run.json",
        "sids.parquet",
    ]


def on_this_machine(mirrors: str) -> None:
    """Each process has its own disk."""
    os.environ["SIDREC_STORAGE"] = f"{mirrors}-{dist.get_rank()}"


def train_sharded(place: str, data: str, dies: bool = False) -> tuple[dict[str, Any], int]:
    """What it comes to, and batches trained on; if it dies, after its second checkpoint."""
    save, steps, saves, trained = Checkpoints.save, RankerTraining.steps, [], []

    def save_then_die(self: Checkpoints, name: str, state: dict[str, Any]) -> None:
        save(self, name, state)
        saves.append(name)
        if dies and saves.count(LAST) == 2:
            raise InterruptedError

    def noted(self: RankerTraining, *arguments: Any) -> Any:
        for step in steps(self, *arguments):
            trained.append(step.amount)
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_then_die)
        patch.setattr(RankerTraining, "steps", noted)
        config = ranker_config(place, data, arm="hybrid", checkpoint_batches=1)
        try:
            return train_ranker.main(config), len(trained)
        except InterruptedError:
            return {}, len(trained)


def begin_on_two_machines(place: str, data: str, folder: str, corpus: str, mirrors: str) -> list[tuple[dict, int]]:
    on_this_machine(mirrors)
    return [train_sharded(folder, corpus), train_sharded(place, data, dies=True)]


def go_on_on_two_others(place: str, data: str, mirrors: str) -> tuple[dict, int, dict]:
    on_this_machine(mirrors)
    encode_corpus._PART_ITEMS = 60
    config = {"data": data, "tokenizer": f"{place}/tokenizer", "out": f"{place}/encoded"}
    return (*train_sharded(place, data), encode_corpus.main(encode_corpus.EncodeCorpusConfig(**config)))


def test_two_machines_that_share_nothing_but_a_url(
    s3: S3, corpus: Path, by_hand, tmp_path: Path, run_distributed, monkeypatch
):
    """Each puts its own shards and parts, and reads what it needs of the other's; two others go on where they ended."""
    folder, _ = by_hand
    data, own = put(corpus, f"{s3.url}/data"), tmp_path / "local"
    for name in ("prepared", "sids", "tokenizer"):
        put(folder / name, f"{s3.url}/{name}")
        shutil.copytree(folder / name, own / name)
    places = (str(own), str(corpus), str(tmp_path / "one"))
    ((expected, batches), (_, first)), _ = run_distributed(begin_on_two_machines, 2, s3.url, data, *places)
    assert len([*local(f"{s3.url}/ranker/checkpoints/last").glob("process-*.safetensors")]) == 2
    (found, then, encoded), others = run_distributed(go_on_on_two_others, 2, s3.url, data, str(tmp_path / "two"))
    assert first + then == batches and first == 2
    assert without_times(found) == without_times(others[0]) == without_times(expected)
    assert contents(s3.url, "ranker/checkpoints/best") == contents(own, "ranker/checkpoints/best")
    monkeypatch.setattr(encode_corpus, "_PART_ITEMS", 60)
    config = {"data": corpus, "tokenizer": folder / "tokenizer", "out": own / "encoded"}
    assert encoded == others[2] == encode_corpus.main(encode_corpus.EncodeCorpusConfig(**config))
    assert contents(s3.url, "encoded/sids.parquet") == contents(own, "encoded/sids.parquet")


def test_a_process_fetches_its_share_of_the_sequences(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = SyntheticConfig(
        items=200, users=1000, median_events=60, max_events=200, categories=4, text_dim=4, image_dim=4
    )
    write_synthetic(log, tmp_path / "data")
    prepare(tmp_path / "data", tmp_path / "prepared", PROTOCOL)
    prepared = open_prepared(put(tmp_path / "prepared", f"{s3.url}/prepared"))
    features = ARMS["none"](ArmInputs(num_items=prepared.num_items), ArmConfig())
    fetched = {}
    for world_size in (1, 2, 4):
        monkeypatch.setenv("SIDREC_VERIFY", "off")  # which reads each part once more, by one of the processes
        events = []
        for rank in range(world_size):
            s3.log()
            batches = SequenceBatches(
                prepared, "train", features, batch_events=2048, rank=rank, world_size=world_size, shuffle=True
            )
            events.append(sum(len(batch.item_N) * float(batch.weight_B[0]) for batch in batches))
            fetched[world_size, rank] = sum(request["bytes"] for request in s3.log())
        assert sum(events) == prepared.counts["train"]["events"]
    assert max(fetched[2, rank] for rank in range(2)) < 0.65 * fetched[1, 0]
    assert max(fetched[4, rank] for rank in range(4)) < 0.4 * fetched[1, 0]
