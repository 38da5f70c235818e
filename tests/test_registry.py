"""Classes by name: registered, offered by other packages, and asked for; and nobody but they themselves says the names."""

import ast
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

import sidrec_torchrec
from sidrec_torchrec import registry
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ranker.arms import ARMS
from sidrec_torchrec.ranker.readers import READERS
from sidrec_torchrec.registry import Registry

PACKAGE = Path(sidrec_torchrec.__file__).parent
OTHER_WORDS = {"none"}  # a reduction of torch's, and nothing at all
ALLOWED = {  # the fused tokenizer has the name of the arm; digits are read by it, and compared with embeddings
    "jobs/codec_digits.py": {"raw", "side"},
    "jobs/pipeline.py": {"side"},
}


class Red: ...


class Blue: ...


def colours() -> Registry[type]:
    made: Registry[type] = Registry("colour")
    made.register("red")(Red)
    made.register("blue")(Blue)
    return made


@pytest.fixture
def offered(monkeypatch):
    """A package's module, and the entry points of colours, which a test fills in."""
    module = ModuleType("another_package")
    module.Green = type("Green", (), {})
    monkeypatch.setitem(sys.modules, "another_package", module)
    points: dict[str, str] = {}

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "sidrec_torchrec.colours"
        return [EntryPoint(name, value, group) for name, value in points.items()]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return module, points


def test_what_is_registered_is_there_in_order(offered):
    assert list(colours()) == ["red", "blue"]
    assert "red" in colours() and "green" not in colours()
    assert colours()["blue"] is Blue


def test_a_decorated_class_stays_what_it_is(offered):
    made = colours()

    @made.register("green")
    class Green: ...

    assert made["green"] is Green


def test_unknown_names_are_answered_with_those_there_are(offered):
    _, points = offered
    points["green"] = "another_package:Green"
    with pytest.raises(SidrecError, match="unknown colour 'rot'; there are red, blue, green"):
        colours()["rot"]


def test_a_name_is_given_once(offered):
    made = colours()
    made.register("red")(Red)  # the same again, as by a module that is run twice
    with pytest.raises(ValueError, match="there is a colour 'red' already: .*Red.*; take another name"):
        made.register("red")(Blue)


def test_entry_points_load_when_asked_for(offered):
    module, points = offered
    points.update(green="another_package:Green", grey="no_such_package:Grey")
    made = colours()
    assert list(made) == ["red", "blue", "green", "grey"] and "grey" in made
    assert made["green"] is module.Green
    with pytest.raises(SidrecError, match="the colour 'grey' cannot be loaded from no_such_package:Grey: No module"):
        made["grey"]
    assert list(made) == ["red", "blue", "green", "grey"]


def test_an_entry_points_module_may_register_by_itself(offered):
    module, points = offered
    made = colours()
    made.register("green")(module.Green)
    points["green"] = "another_package:Green"
    assert made["green"] is module.Green and list(made) == ["red", "blue", "green"]


def test_our_own_names_cannot_be_taken(offered):
    _, points = offered
    points.update(red="another_package:Green", grey="another_package:Green")
    made: Registry[type] = Registry("colour", {"grey": f"{__name__}:Blue"})
    made.register("red")(Red)
    assert made["red"] is Red
    assert made["grey"].__name__ == "Blue"


def names_in(tree: ast.Module) -> set[str]:
    """String constants of a module, but for what it registers and defaults of configs."""
    registered = {d for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for d in node.decorator_list}
    defaults = {
        statement.value
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation)
    }
    left_out = {part for node in registered | defaults - {None} for part in ast.walk(node)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in left_out)
    return {node.value for node in constants if isinstance(node.value, str)}


def test_nobody_but_their_classes_names_arms_and_readers():
    known = {*ARMS, *READERS} - OTHER_WORDS
    assert {"side", "prefix-ngram", "vectors"} <= known
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        named = known & names_in(ast.parse(path.read_text())) - ALLOWED.get(file, set())
        assert not named, f"{file} names {sorted(named)}: ask the class in ARMS or READERS instead"
