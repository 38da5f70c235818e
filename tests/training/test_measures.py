"""What is seen of training beside its losses: in TensorBoard, in JSON lines and in traces."""

import gzip
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidrec_torchrec.output import Output, speaking
from sidrec_torchrec.training import measures
from sidrec_torchrec.training.group import current_processes, process_group
from sidrec_torchrec.training.loop import Loop, LoopConfig
from sidrec_torchrec.training.measures import EVERY, Measures, Waits
from sidrec_torchrec.training.profiler import profiled
from sidrec_torchrec.training.trackers import Trackers, open_trackers
from sidrec_torchrec.training.trainee import Step
from tests.training.test_loop import Counting, Rate


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def thread_time(self) -> float:
        return self.cpu

    def wait(self, seconds: float) -> None:
        self.wall += seconds

    def work(self, seconds: float) -> None:
        self.wall += seconds
        self.cpu += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measures, "time", clock)
    return clock


class Slow(Counting):
    """Waits 3 seconds for each of its batches, and works on it for one; two epochs are as many as are looked at."""

    epoch_size = EVERY // 2

    def __init__(self, scores, clock):
        super().__init__(scores)
        self.clock = clock

    def steps(self, epoch, first, before_step):
        for _ in self.waits.timed(self.clock.wait(3) for _ in range(first, EVERY // 2)):
            before_step()
            self.clock.work(1)
            yield Step(1, torch.ones(1), torch.ones(1))

    def validate(self, progress):
        self.clock.work(100)
        return {"score": 1.0}


def test_waiting_is_told_from_working(clock):
    waits = Waits()
    assert list(waits.timed(clock.work(2) or number for number in range(3))) == [0, 1, 2]
    assert (waits.seconds, waits.idle) == (6, 0)
    list(waits.timed(clock.wait(2) for _ in range(3)))
    assert (waits.seconds, waits.idle) == (12, 6)


def test_tensorboard_and_json_have_what_was_seen(tmp_path, capsys, clock):
    with (
        process_group() as processes,
        speaking(Output(job="count", is_json=True)),
        open_trackers(("tensorboard",), tmp_path, processes) as trackers,
    ):
        Loop(Slow([1.0] * 4, clock), LoopConfig(epochs=4), tmp_path, processes, trackers).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    values = {tag: [scalar.value for scalar in of_tag] for tag, of_tag in scalars.items()}
    assert values["train/gradient_norm"] == [1.0, 1.0]
    assert values["train/learning_rate"] == [0.5, 0.5]
    assert values["train/data_wait"] == [0.75, 0.75]
    assert [scalar.step for scalar in scalars["train/data_wait"]] == [EVERY, 2 * EVERY]
    assert all(0.05 < gib < 100 for gib in values["memory/rss_gib"])
    assert "train/rank_skew" not in values
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    validation = next(line for line in lines if "validation 2/4" in line["message"])
    assert validation["numbers"]["score"] == 1.0
    epochs = [line for line in lines if "epoch 2/4" in line["message"]]
    assert epochs[0]["step"] == EVERY // 2
    assert epochs[0]["numbers"].items() >= {"loss": 1.0, "train/gradient_norm": 1.0, "train/data_wait": 0.75}.items()


def skew() -> list[float]:
    processes = current_processes()
    measures.time = clock = Clock()
    waits = Waits()
    looks = Measures(Rate(), waits, processes)
    looks.begin()
    seen = []
    for _ in range(3 * EVERY):
        list(waits.timed(clock.wait(processes.rank) for _ in range(1)))
        clock.work(1)
        clock.wait(5 - processes.rank)  # for the other
        seen.append(looks.after_step() or {})
    return [values["train/rank_skew"] for values in seen if "train/rank_skew" in values]


def test_the_skew_is_that_of_the_slowest(run_distributed):
    # a batch takes one process a second, the other two: one for data, one for work
    assert run_distributed(skew, 2) == [[2 / 1.5] * 2] * 2


def test_a_trace_of_some_batches(tmp_path):
    with process_group() as processes:
        whole = Loop(Counting([1.0, 2.0]), LoopConfig(epochs=2), tmp_path / "whole", processes, Trackers()).run()
        traced = Loop(
            Counting([1.0, 2.0]), LoopConfig(epochs=2, profile="3:6"), tmp_path / "traced", processes, Trackers()
        ).run()
    assert traced.epochs == whole.epochs
    (path,) = (tmp_path / "traced" / "profile").iterdir()
    assert path.name == "batches-3-6-process-0.json.gz"
    with gzip.open(path, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::rand") == 4  # each batch draws one number


def test_a_trace_that_training_ends_before(tmp_path):
    with process_group() as processes:
        Loop(Counting([1.0]), LoopConfig(epochs=1, profile="3:60"), tmp_path, processes, Trackers()).run()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["batches-3-4-process-0.json.gz"]


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b", "1:-2"])
def test_bad_names_of_batches(text):
    with pytest.raises(ValueError, match="such as 10:20"):
        profiled(text)
