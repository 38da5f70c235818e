"""No code of the package runs what data or a shell say; ruff's rules could be silenced in a line, this cannot."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path for folder in ("sidrec_torchrec", "torchx", "scripts", "examples") for path in (ROOT / folder).rglob("*.py")
)
ALLOWED = {
    # statements of the package's own files, as an import runs them
    ROOT / "sidrec_torchrec" / "config_source.py": ["exec"],
    # what a parent gives its own processes to do, as multiprocessing would, through a file without a name
    ROOT / "sidrec_torchrec" / "engines" / "local.py": ["return pickle.load"],
}
RUNNING = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_runs(path):
    lines = path.read_text().splitlines()
    found = [lines[line - 1].strip().partition("(")[0] for line in forbidden(path.read_text())]
    assert found == ALLOWED.get(path, [])


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "pickle.load(file)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_what_would_is_seen(line):
    assert forbidden(line) == [1]


def forbidden(code: str) -> list[int]:
    """Lines of calls that run what they are given."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _runs(call)]


def _runs(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    values = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
    if name == "torch.load":
        return values.get("weights_only") is not True
    return name in RUNNING or bool(values.get("shell")) or bool(values.get("allow_pickle"))
