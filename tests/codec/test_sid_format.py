"""The page on the SID format tells the truth: its worked example runs as written."""

import doctest
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sid_format.md"


def test_worked_example(tmp_path):
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, globs={"folder": tmp_path})
    assert (failed, tried >= 12) == (0, True)
