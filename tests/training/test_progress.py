"""A stage says what it did, unless it is asked not to."""

import subprocess
import sys

import pytest

from sidrec_torchrec.training.progress import quiet, stage


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


def test_the_report_leaves_the_plots_of_its_caller_alone():
    code = (
        "import matplotlib; matplotlib.use('svg'); import sidrec_torchrec.jobs.pipeline; "
        "assert matplotlib.get_backend() == 'svg'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
