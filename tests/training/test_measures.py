"""What is seen of training beside its losses: in TensorBoard, in JSON lines and in traces."""

import gzip
import json
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidrec_torchrec.output import Output, speaking
from sidrec_torchrec.training.group import Processes, current_processes, process_group
from sidrec_torchrec.training.loop import Loop, LoopConfig
from sidrec_torchrec.training.measures import EVERY, Measures, Waits
from sidrec_torchrec.training.profiler import profiled
from tests.training.test_loop import Counting, Rate

SECONDS = 0.05


class Slow(Counting):
    """Waits for each of its batches, of which there are as many as are looked at."""

    epoch_size = EVERY

    def steps(self, epoch, first, before_step):
        def read():
            for batch in range(first, EVERY):
                time.sleep(SECONDS)
                yield batch

        for _ in self.waits.timed(read()):
            before_step()
            yield next(super().steps(epoch, 0, lambda: None))

    def validate(self, progress):
        return {"score": 1.0}


def test_waiting_is_told_from_working():
    waits = Waits()

    def work():
        for _ in range(3):
            end = time.thread_time() + SECONDS
            while time.thread_time() < end:
                pass
            yield

    assert len(list(waits.timed(work()))) == 3
    assert waits.seconds >= 3 * SECONDS
    assert waits.idle < waits.seconds / 2  # on a busy machine it waits for its turn, too
    before = waits.idle
    list(waits.timed(time.sleep(SECONDS) for _ in range(3)))
    assert waits.idle - before > 2.9 * SECONDS


def test_tensorboard_and_json_have_what_was_seen(tmp_path, capsys):
    with process_group() as processes, speaking(Output(job="count", is_json=True)):
        Loop(Slow([1.0, 2.0]), LoopConfig(epochs=2), tmp_path, processes).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = {tag: [scalar.value for scalar in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["train/gradient_norm"] == [1.0, 1.0]
    assert values["train/learning_rate"] == [0.5, 0.5]
    assert all(0.9 < share <= 1 for share in values["train/data_wait"])
    assert all(0.05 < gib < 100 for gib in values["memory/rss_gib"])
    assert "train/rank_skew" not in values
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    epochs = [line for line in lines if "epoch 1/2" in line["message"]]
    assert epochs[0]["step"] == EVERY
    assert epochs[0]["numbers"]["train/gradient_norm"] == 1.0
    assert epochs[0]["numbers"]["seconds"] >= EVERY * SECONDS


def skew() -> list[float]:
    processes: Processes = current_processes()
    waits = Waits()
    measures = Measures(Rate(), waits, processes)
    measures.begin()
    seen = []
    for _ in range(3 * EVERY):
        list(waits.timed(time.sleep(0.004 * processes.rank) for _ in range(1)))
        seen.append(measures.after_step() or {})
    return [values["train/rank_skew"] for values in seen if "train/rank_skew" in values]


def test_the_skew_is_that_of_the_slowest(run_distributed):
    for skews in run_distributed(skew, 2):  # one process needs nearly nothing: the slowest by the mean is 2
        assert len(skews) == 2
        assert all(1.6 < value <= 2 for value in skews)


def test_a_trace_of_some_batches(tmp_path):
    with process_group() as processes:
        whole = Loop(Counting([1.0, 2.0]), LoopConfig(epochs=2), tmp_path / "whole", processes).run()
        traced = Loop(Counting([1.0, 2.0]), LoopConfig(epochs=2, profile="3:6"), tmp_path / "traced", processes).run()
    assert traced.epochs == whole.epochs
    (path,) = (tmp_path / "traced" / "profile").iterdir()
    assert path.name == "batches-3-6-process-0.json.gz"
    with gzip.open(path, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::rand") == 4  # each batch draws one number


def test_a_trace_that_training_ends_before(tmp_path):
    with process_group() as processes:
        Loop(Counting([1.0]), LoopConfig(epochs=1, profile="3:60"), tmp_path, processes).run()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["batches-3-4-process-0.json.gz"]


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b", "1:-2"])
def test_bad_names_of_batches(text):
    with pytest.raises(ValueError, match="such as 10:20"):
        profiled(text)
