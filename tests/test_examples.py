"""The examples run, and the documentation's site builds; ``test_docs`` runs the code in its pages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run(*command: str, cwd: Path = ROOT) -> str:
    result = subprocess.run(
        [sys.executable, *command], check=False, cwd=cwd, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_example(name: str) -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
    return run("-c", f"{code}runpy.run_path('examples/{name}.py', run_name='__main__')").splitlines()


def test_dlrm_plugin():
    lines = run_example("dlrm_plugin")
    losses = {line.split()[0]: [float(x) for x in re.findall(r"items (\d\.\d+)", line)] for line in lines}
    assert losses["SIDE"][1] < losses["table"][1] - 0.02  # new items: SIDE knows their content
    assert "learned     4,992 bytes" in lines[1]  # 39 digits to 32 numbers, for any number of items


def test_site_builds(tmp_path, monkeypatch):
    """Every link and anchor of the documentation leads somewhere, and every name of the reference exists: warnings are errors."""
    pytest.importorskip("mkdocs")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    run("-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site"))
    assert "replace_tables" in (tmp_path / "site" / "reference" / "index.html").read_text()


def test_score_a_frame():
    pytest.importorskip("pandas")
    heading, *lines = run_example("score_a_frame")
    assert heading.split() == ["user_id", "item_id", "timestamp", "probability", "unknown"]
    rows = [[float(value) for value in line.split()] for line in lines]
    assert len(rows) == 5 and len({row[0] for row in rows}) == 1
    known, unknown = ([row[place] for row in rows] for place in (3, 4))
    assert known == sorted(known, reverse=True) and 0 < known[-1] < known[0] < 1
    assert known != unknown
