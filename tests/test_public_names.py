"""``from sidrec_torchrec import NAME`` works, late, for every public name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sidrec_torchrec


@pytest.mark.parametrize("name", sidrec_torchrec.__all__)
def test_public_names_load(name):
    value = getattr(sidrec_torchrec, name)
    assert getattr(value, "__doc__", None)
    assert name in dir(sidrec_torchrec)


def test_editors_see_the_same_names():
    tree = ast.parse(Path(sidrec_torchrec.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert seen == sidrec_torchrec._MODULE_OF


def test_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'Codek'"):
        _ = sidrec_torchrec.Codek


def test_importing_the_package_does_not_import_torch():
    code = "import sys, sidrec_torchrec; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
