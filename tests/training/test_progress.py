"""A stage says what it did, unless it is asked not to."""

import json
import subprocess
import sys
import warnings

import pytest

from sidrec_torchrec.output import Amount, Output, speaking, warn
from sidrec_torchrec.training import progress as progress_module
from sidrec_torchrec.training.progress import quiet, say, stage


def work(title: str) -> None:
    with stage(title, 3, show=True) as progress:
        progress.advance(3, "loss 0.5")


def test_one_line_where_there_is_no_terminal(capsys):
    work("epoch 1")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("epoch 1: loss 0.5 (")


def test_quiet_until_its_end(capsys):
    with pytest.raises(ZeroDivisionError), quiet():
        work("epoch 1")
        1 / 0  # noqa: B018
    work("epoch 2")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("epoch 2")


def test_long_stages_tell_where_more_is_asked_for(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    for how in (Output(), Output(amount=Amount.VERBOSE), Output(is_json=True, job="train")):
        with speaking(how), stage("epoch 1", 1000, show=True, line=False) as progress:
            for _ in range(5):
                now += 6
                progress.advance(100, "loss 0.5", {"loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["epoch 1: 200 of 1,000 loss 0.5", "epoch 1: 400 of 1,000 loss 0.5", "epoch 1: loss 0.5 (30 s)"]
    first, _, last = map(json.loads, lines[3:])
    assert first["message"] == lines[0] and first["step"] == 200 and first["numbers"] == {"loss": 0.5}
    assert last["step"] == 500 and last["numbers"] == {"loss": 0.5, "seconds": 30}


def test_warnings_are_said_even_if_nothing_else_is(capsys):
    with quiet():
        say("nothing")
        warn("all labels are the same")
    assert capsys.readouterr().err == "warning: all labels are the same\n"
    with speaking(Output(is_json=True)):
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert json.loads(capsys.readouterr().err)["message"] == "UserWarning: of a library"


def test_one_process_speaks_for_all(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work("epoch 1")
    say("a line")
    warn("of something")
    assert capsys.readouterr().err == ""


def test_the_report_leaves_the_plots_of_its_caller_alone():
    code = (
        "import matplotlib; matplotlib.use('svg'); import sidrec_torchrec.jobs.pipeline; "
        "assert matplotlib.get_backend() == 'svg'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
