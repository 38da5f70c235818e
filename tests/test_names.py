"""Names of columns as names of files and modules."""

import copy
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sidrec_torchrec.names import ModulesByName, escape, unescape

NAMES = [
    "../../../x",
    ".",
    "..",
    "",
    "a.b",
    "a/b",
    "%",
    "%2E",
    "training",
    "keys",
    "_modules",
    "text_emb",
    "a b",
    "ü",
    "a\\b",
]


@given(st.text())
def test_a_name_comes_back(name):
    assert unescape(escape(name)) == name
    assert escape(name) and not set(escape(name)) & set("./\\\0")


def test_a_name_stays_in_its_folder_and_most_stay_as_they_are():
    for name in NAMES:
        assert (Path("/a/folder") / escape(name)).resolve().parent == Path("/a/folder")
    assert len({escape(name) for name in NAMES}) == len(NAMES)
    assert [escape(name) for name in ("text_emb", "a b", "ü", "user-id")] == ["text_emb", "a b", "ü", "user-id"]


def test_modules_have_any_name():
    modules = ModulesByName({name: nn.Linear(1, 1) for name in NAMES})
    assert list(modules) == list(modules.keys()) == NAMES and len(modules) == len(NAMES)
    assert all(name in modules for name in NAMES) and "b" not in modules
    assert dict(modules.items()) == {name: modules[name] for name in NAMES}
    assert modules.training is True
    copied = copy.deepcopy(modules)
    copied.load_state_dict(modules.state_dict())
    torch.testing.assert_close(copied["a.b"].weight, modules["a.b"].weight)
    assert "text_emb.weight" in modules.state_dict()
    del modules[""]
    assert "" not in modules
