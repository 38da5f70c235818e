"""What docs/architecture.md promises of the folders: arrows point down only, files are short, jobs know nothing of each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sidrec_torchrec"
# Bottom to top. A module may import from its own floor and from those before it.
FLOORS = (
    ("errors", "files", "part_files", "names", "registry", "processes", "environment", "output", "storage"),
    ("engines",),
    ("native",),
    ("ops",),
    ("codec",),
    ("side",),
    ("training",),
    ("data",),
    ("fusion",),
    ("ranker",),
    ("server",),
    ("jobs",),
    ("study",),
    ("jobs.pipeline", "jobs.codec_digits", "jobs.report"),  # over a study
    ("config_source", "flags", "usage", "dry_run", "cli", "components"),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
LATE = {("environment", "native"), ("environment", "ops")}  # `sidrec doctor` says which kernels run
MOST_LINES = 400


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> int:
    parts = module.split(".")
    return FLOOR_OF[".".join(parts[:2])] if ".".join(parts[:2]) in FLOOR_OF else FLOOR_OF[parts[0]]


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it; not what type checkers alone see."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name.removeprefix("sidrec_torchrec.") for name in found if name.startswith("sidrec_torchrec.")}
    return {name for name in own if (PACKAGE / Path(*name.split("."))).with_suffix(".py").exists()
            or (PACKAGE / Path(*name.split("."))).is_dir()}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_down_only(path):
    own = name_of(path)
    upwards = {
        module
        for module in imports_of(path)
        if floor_of(module) > floor_of(own) and (own.split(".")[0], module.split(".")[0]) not in LATE
    }
    assert not upwards, f"{own} imports from floors above: {sorted(upwards)}"


def test_no_job_imports_another_but_those_over_a_study():
    for path in (PACKAGE / "jobs").glob("*.py"):
        if path.stem in ("pipeline", "codec_digits", "report", "__init__"):
            continue
        assert not {module for module in imports_of(path) if module.startswith("jobs.")}, path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_every_module_stands_on_a_floor():
    assert {name_of(path).split(".")[0] for path in MODULES} - {"requirements"} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", sorted((PACKAGE / "jobs").glob("*.py")), ids=name_of)
def test_jobs_show_what_they_print(path):
    """``output.show`` names URLs where paths are their mirrors; ``print`` would not."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
