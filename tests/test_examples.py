"""The examples run, and the documentation's code too."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], check=False, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_dlrm_plugin():
    lines = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
        "runpy.run_path('examples/dlrm_plugin.py', run_name='__main__')",
    ).splitlines()
    losses = {line.split()[0]: [float(x) for x in re.findall(r"items (\d\.\d+)", line)] for line in lines}
    assert losses["SIDE"][1] < losses["table"][1] - 0.02  # new items: SIDE knows their content
    assert "learned     3,200 bytes" in lines[1]  # 25 digits to 32 numbers, for any number of items


@pytest.mark.parametrize("page", ["side.md", "code_attention.md"])
def test_code_in_pages(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL))
    assert code
    output = run("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    assert output.splitlines() == re.findall(r"print\(.*# (.*)", code)
