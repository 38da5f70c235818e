"""The example notebooks run from top to bottom, and what is committed of them is fit to be read by others."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; pip install '.[test]'")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
_PLACES = re.compile(
    r"(?<![\w.:/<)])/(?:home|root|Users|tmp|var|opt|usr|mnt|private)/|[A-Z]:\\\\|https?://(?:localhost|127\.)"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "a_week",
        "first_sids",
        "launch_and_serve",
        "long_histories",
        "side_in_a_ranker",
    ]


@pytest.mark.timeout(900)  # a minute on two cores; more where they are busy, or the C++ is built first
@each_notebook
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; pip install '.[test]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed; pip install '.[test]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook's own files go
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = _read(path)
    committed = [_kinds(cell) for cell in notebook.cells]
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=800, kernel_name="python3", resources=where).execute()
    # no picture is missing; a machine without a compiler, say, may be warned on stderr
    assert [_kinds(cell) - {"stderr"} for cell in notebook.cells] == committed


@each_notebook
def test_was_run_in_order_without_errors(path: Path):
    cells = [cell for cell in _read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not _kinds(cell) & {"error", "stderr"}, cell.source


@each_notebook
def test_names_no_place_of_a_machine(path: Path):
    text = _text(path)
    assert not _PLACES.findall(text)
    assert not [place for place in (ROOT, Path.home(), sys.prefix) if f"{place}/" in text]


@pytest.mark.parametrize(
    "text", ["see /tmp/tmpab12/sids", "'/root/x'", "/home/me/data", "C:\\\\Users", "http://localhost:8888"]
)
def test_places_are_recognized(text):
    assert _PLACES.search(text)


@each_notebook
def test_links_lead_somewhere(path: Path):
    links = re.findall(r"\]\(([^)#]+)\)", "\n".join(c.source for c in _read(path).cells if c.cell_type == "markdown"))
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@each_notebook
def test_is_small(path: Path):
    assert path.stat().st_size < 300_000


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def _kinds(cell: Any) -> set[str]:
    """What a cell put out: streams by name, pictures as such, other things by their type."""
    outputs = cell.get("outputs", [])
    return {"picture" if "image/png" in o.get("data", {}) else o.get("name", o.output_type) for o in outputs}


def _text(path: Path) -> str:
    """All but the pictures."""
    notebook = _read(path)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    return nbformat.writes(notebook)
