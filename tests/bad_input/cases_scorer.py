"""What a server gives to a ``Scorer``, and the package it loads."""

from functools import lru_cache

import torch

from sidrec_torchrec.ranker.scorer import Scorer
from tests.bad_input.kinds import Folder, Kind
from tests.bad_input.spoils import Spoil, cut, written

PACKAGE = "package/ranker.pt2"
LOAD, CALL = "Scorer(path)", "scorer(...)"


@lru_cache(maxsize=1)
def _scorer(path: str) -> Scorer:
    return Scorer(path)


def good(scorer: Scorer) -> dict[str, torch.Tensor]:
    """Two requests of three events and three candidates in all."""
    sizes = {"events": 3, "requests": 2, "requests + 1": 3, "candidates": 3}
    inputs = {
        name: torch.zeros([sizes.get(size, size) for size in shape], dtype=torch.int64)
        for name, shape in scorer.metadata["inputs"].items()
    }
    return inputs | {"offsets_B1": torch.tensor([0, 2, 3]), "request_M": torch.tensor([0, 0, 1])}


def given(**changes):
    """A call in which all is well but these inputs: a tensor, a function of the good one, or None for none."""

    def call(folder: Folder) -> None:
        scorer = _scorer(str(folder.whole.package / "ranker.pt2"))
        inputs = good(scorer)
        assert scorer(**inputs).shape[0] == 3
        for name, change in changes.items():
            inputs[name] = change(inputs[name]) if callable(change) else change
        scorer(**{name: value for name, value in inputs.items() if value is not None})

    return call


def filled(value: int):
    return lambda tensor: torch.full_like(tensor, value)


def load(folder: Folder) -> None:
    Scorer(folder.path / PACKAGE)


def package(name: str, says: str, spoil: Spoil) -> Kind:
    return Kind(name, LOAD, says, spoil, load)


CASES = [
    package("no package", "ranker.pt2", lambda folder: None),
    package("an empty package", "not a ranker that `sidrec export` wrote, or cut short", written(PACKAGE, b"")),
    package("half of a package", "not a ranker that `sidrec export` wrote, or cut short", cut(PACKAGE, 0.5)),
    package("a package of text", "not a ranker that `sidrec export` wrote, or cut short", written(PACKAGE, b"hello")),
    Kind(
        "a package of another digest",
        "Scorer(path, sha256=...)",
        "not the package that was asked for",
        lambda folder: folder / PACKAGE,
        lambda folder: Scorer(folder.path / PACKAGE, sha256="0" * 64),
    ),
    Kind(
        "no threads to score",
        "Scorer(path, parallel=0)",
        "parallel must be at least 1, got 0",
        lambda folder: folder / PACKAGE,
        lambda folder: Scorer(folder.path / PACKAGE, parallel=0),
    ),
    *(
        Kind(name, CALL, says, None, given(**changes))
        for name, says, changes in (
            ("an input left out", "missing or unknown inputs: action_N", {"action_N": None}),
            ("an input that is not known", "missing or unknown inputs: more_N", {"more_N": torch.zeros(1)}),
            ("float in place of int64", "history_NW is torch.float32", {"history_NW": lambda x: x.float()}),
            ("int32 in place of int64", "candidate_MW is torch.int32", {"candidate_MW": lambda x: x.int()}),
            ("booleans in place of int64", "action_N is torch.bool", {"action_N": lambda x: x.bool()}),
            (
                "SIDs of more words",
                "history_NW is torch.int64 of shape (3, 2)",
                {"history_NW": lambda x: x.repeat(1, 2)},
            ),
            ("candidates of more words", "candidate_MW is torch.int64", {"candidate_MW": lambda x: x.repeat(1, 3)}),
            ("fewer actions than events", "history_NW is torch.int64", {"action_N": lambda x: x[1:]}),
            (
                "a number in place of a vector",
                "history_NW is torch.int64 of shape (3, 1), expected int64 of shape (0, 1)",
                {"action_N": torch.tensor(0)},
            ),
            ("a list in place of a tensor", "action_N is list, expected a tensor of int64", {"action_N": [0, 0, 0]}),
            (
                "an array in place of a tensor",
                "action_N is ndarray, expected a tensor of int64",
                {"action_N": lambda x: x.numpy()},
            ),
            ("a SID below 0", "history_NW[0, 0] is -5", {"history_NW": filled(-5)}),
            ("a SID beyond the codec's last", "history_NW[0, 0] is", {"history_NW": filled(2**62)}),
            ("a candidate without a SID", "candidate_MW[0, 0] is -1", {"candidate_MW": filled(-1)}),
            ("an action that no label has", "action_N[0] is 9", {"action_N": filled(9)}),
            ("a candidate of no request", "request_M[0] is 2", {"request_M": filled(2)}),
            ("a user code out of range", "user_BF[0, 0] is", {"user_BF": filled(10**6)}),
            ("offsets that do not begin at 0", "offsets_B1 must rise from 0", {"offsets_B1": torch.tensor([1, 2, 3])}),
            ("offsets that fall", "offsets_B1 must rise from 0", {"offsets_B1": torch.tensor([0, 4, 3])}),
            ("offsets that end too soon", "offsets_B1 must rise from 0", {"offsets_B1": torch.tensor([0, 1, 2])}),
        )
    ),
]
