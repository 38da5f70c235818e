"""Trackers: what they are sent, by whom, and that none of them ends training, whatever becomes of its server."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidrec_torchrec import cli
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import train_tokenizer
from sidrec_torchrec.training import trackers as module
from sidrec_torchrec.training.group import current_processes, process_group
from sidrec_torchrec.training.loop import Loop, LoopConfig
from sidrec_torchrec.training.trackers import TRACKERS, Tracker, check_trackers, open_trackers
from tests.training.test_loop import Counting


class Noting(Tracker):
    """Writes down what it is told, in a file beside the run."""

    def __init__(self, folder: Path, config, id) -> None:
        self.path = folder.parent / f"{folder.name}.notes"
        self.id = id or "first"
        self.note("opened", id, dict(config))

    def note(self, *words) -> None:
        with self.path.open("a") as file:
            print(json.dumps(words), file=file)

    def log(self, values, step) -> None:
        self.note("log", dict(values), step)

    def artifact(self, path: Path) -> None:
        self.note("artifact", path.name, path.read_text())

    def flush(self) -> None:
        self.note("flush")

    def close(self, *, finished) -> None:
        self.note("close", finished)


class Failing(Noting):
    """Its server goes away after a while; ``allowed`` calls are answered."""

    allowed = 0

    def note(self, *words) -> None:
        if type(self).allowed == 0:
            raise ConnectionError("no route to host\nand so on")
        type(self).allowed -= 1
        super().note(*words)


def notes(folder: Path) -> list[list]:
    return [json.loads(line) for line in (folder.parent / f"{folder.name}.notes").read_text().splitlines()]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(TRACKERS, "_entries", {**TRACKERS._entries, "noting": Noting, "failing": Failing})


def train(folder: Path, *names: str, **changes) -> Counting:
    trainee = Counting([0.5, 0.3])
    with process_group() as processes, open_trackers(names, folder, processes) as trackers:
        Loop(trainee, LoopConfig(epochs=2, **changes), folder, processes, trackers).run()
    return trainee


def test_losses_by_batch_and_values_by_epoch(registered, tmp_path):
    train(tmp_path / "run", "noting")
    told = notes(tmp_path / "run")
    assert told[0] == ["opened", None, {}] and told[-1] == ["close", True]
    logged = [(values, step) for what, *rest in told if what == "log" for values, step in [rest]]
    assert [(v["train/loss"], step) for v, step in logged if "train/loss" in v] == [
        (float(batch), 4 * epoch + batch + 1) for epoch in range(2) for batch in range(4)
    ]
    by_epoch = [(v, step) for v, step in logged if "epoch/loss" in v]
    assert by_epoch == [
        ({"epoch/loss": 1.5, "validation/score": 0.5}, 4),
        ({"epoch/loss": 1.5, "validation/score": 0.3}, 8),
    ]
    assert [what for what, *_ in told].count("flush") == 2


def test_tensorboard_is_one_of_them(registered, tmp_path):
    train(tmp_path / "run", "noting", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(s.step, s.value) for s in events.Scalars("validation/score")] == [(4, 0.5), (8, pytest.approx(0.3))]


@pytest.mark.parametrize("allowed", [0, 1, 4])
def test_one_that_fails_is_said_once_and_the_others_go_on(allowed, registered, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Failing, "allowed", allowed)
    assert int(train(tmp_path / "run", "failing", "tensorboard").model.weight) == 8
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["warning: tracker failing: no route to host; nothing more is sent to it, and training goes on"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_an_interrupted_run_goes_on_as_the_same(registered, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Counting, "validate", lambda self, progress: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", "noting", checkpoint_batches=2)
    assert notes(tmp_path / "run")[-1] == ["close", False]
    train(tmp_path / "run", "noting", checkpoint_batches=2)
    assert [rest[0] for what, *rest in notes(tmp_path / "run") if what == "opened"] == [None, "first"]


def test_the_main_process_alone_sends(run_distributed, tmp_path):
    assert run_distributed(_train_on_two, 2, tmp_path) == [True, True]
    assert [what for what, *_ in notes(tmp_path / "run")].count("opened") == 1


def _train_on_two(folder: Path) -> bool:
    TRACKERS._entries["noting"] = Noting
    train(folder / "run", "noting")
    processes = current_processes()
    TRACKERS._late = {"gone": "no_such_package:Tracker"}
    message = "the tracker 'gone' cannot be loaded.*; pip install 'sidrec-torchrec.gone.'"
    with pytest.raises(SidrecError, match=message), open_trackers(("gone",), folder, processes):
        pass
    return dist.get_world_size() == 2  # and neither is left waiting


def test_names_are_checked_before_anything_runs(registered):
    check_trackers(("tensorboard", "mlflow", "wandb"))
    with pytest.raises(
        ValueError, match="unknown tracker 'mlfow'; there are tensorboard, noting, failing, mlflow, wandb"
    ):
        check_trackers(("mlfow",))
    with pytest.raises(ValueError, match="'tensorboard' is named twice"):
        check_trackers(("tensorboard", "tensorboard"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(SyntheticConfig(items=120, users=20), folder)
    return folder


def config(data: Path, out: Path, *trackers: str) -> train_tokenizer.TrainTokenizerConfig:
    return train_tokenizer.TrainTokenizerConfig(data=data, out=out, epochs=1, tracker=trackers)


def test_a_job_sends_its_config_and_its_result(registered, data, tmp_path, capsys):
    flags = ["--data", str(data), "--epochs", "1", "--out", str(tmp_path / "run"), "--model.dropout", "0.25"]
    assert cli.main(["train-tokenizer", *flags, "--tracker", "noting"]) == 0
    told = notes(tmp_path / "run")
    given = told[0][2]
    assert given["model.dropout"] == 0.25 and given["data"] == str(data.resolve()) and given["epochs"] == 1
    assert {what: text for kind, *rest in told if kind == "artifact" for what, text in [rest]} == {
        name: (tmp_path / "run" / name).read_text() for name in ("run.json", "metrics.json")
    }
    # with other trackers it is the same run, which is finished
    assert cli.main(["train-tokenizer", *flags]) == 0
    assert "finished before" in capsys.readouterr().err


def test_the_tests_metrics_are_sent(registered, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text('{"test": {"ne": 0.75, "by_age": {"a": 1.0}, "targets": 9}}')
    with process_group() as processes, open_trackers(("noting",), tmp_path / "run", processes) as trackers:
        trackers.log({"train/loss": 1.0}, 7)
    assert ["log", {"test/ne": 0.75}, 7] in notes(tmp_path / "run")


def test_mlflow(data, tmp_path, monkeypatch):
    """In its store of files, without a server."""
    pytest.importorskip("mlflow", reason="mlflow is not installed; pip install '.[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    result = train_tokenizer.main(config(data, tmp_path / "run", "mlflow"))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("sidrec")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (f"{tmp_path.name}/run", "FINISHED")
    assert run.data.params["epochs"] == "1" and run.data.params["model.quantizer.kind"] == "dpca"
    total = [metric.value for metric in client.get_metric_history(run.info.run_id, "validation/total")]
    assert total == [epoch["total"] for epoch in result["course"]]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"run.json", "metrics.json"}


def test_mlflow_goes_on_with_an_interrupted_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed; pip install '.[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    with process_group() as processes:
        for finished in (False, True):
            try:
                with open_trackers(("mlflow",), tmp_path / "run", processes) as trackers:
                    trackers.log({"train/loss: a/b": 1.0}, 3)  # a name that MLflow would refuse
                    if not finished:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                client = MlflowClient()
                (run,) = client.search_runs([client.get_experiment_by_name("sidrec").experiment_id])
                assert run.info.status == "KILLED"
    (again,) = client.search_runs([run.info.experiment_id])
    assert again.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss_ a/b")) == 2


def test_wandb_offline(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed; pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_tokenizer.main(config(data, tmp_path / "run", "wandb"))
    ids = json.loads((tmp_path / "run" / "trackers.json").read_text())
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (kept,) = folder.glob("*.wandb")
    assert kept.stem == f"run-{ids['wandb']}"
    for word in (b"train/loss", b"validation/total", b"model.quantizer.kind", b"metrics.json"):
        assert word in kept.read_bytes()


def test_a_tracker_of_another_package_is_found_by_its_entry_point(monkeypatch):
    assert TRACKERS._group == "sidrec_torchrec.trackers"
    assert module.TRACKERS["tensorboard"] is module.TensorBoard
