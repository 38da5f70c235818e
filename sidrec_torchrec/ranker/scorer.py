"""What a server loads: a ranker that ``sidrec export`` wrote. Needs torch and our operators, not TorchRec."""

import json
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sidrec_torchrec.ops.code_attention
import sidrec_torchrec.ops.shared_attention
import sidrec_torchrec.ops.side_decode
import sidrec_torchrec.ops.side_energy
import sidrec_torchrec.ops.top_events  # noqa: F401  they register the operators a package calls
from sidrec_torchrec.codec.packing import NO_SID
from sidrec_torchrec.data.tasks import DEFAULT_TASKS, num_actions
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.files import sha256_of
from sidrec_torchrec.native import build
from sidrec_torchrec.storage.mirror import local

METADATA = "sidrec.json"
FEATURE_NAMES = {"feature_NF", "known_MF"}
FORMAT = 2


class Scorer:
    """An exported ranker: scores the candidates of any number of requests.

    Args:
        path: a package that ``sidrec export`` wrote. It holds code that is run: load only what you trust.
        parallel: how many threads may score at the same time; more wait for one to end.
        sha256: of the package, in hexadecimal, as ``sidrec export`` printed it: another file is refused before any of it is
            loaded.

    Attributes:
        metadata: ``sids``, the SIDs whose words, side by side, an item is: ``name``, ``fingerprint``, ``stages`` and number of
            ``words`` of each; ``inputs``, the shape of each, where a name stands
            for a size that may differ from call to call; ``user_features``, by name the values whose codes are 1, 2, ...
            (0 stands for any other), or the ``bounds`` where codes 2, 3, ... begin, in the order of ``user_BF``'s columns; ``user_lists``,
            if any feature of users is a list: by name the values whose codes are 1, 2, ..., in the order of ``user_lengths_BL``'s columns; ``tasks``, names of the labels, in the order of
            an action's digits and of the predictions' columns, which are probabilities; ``regressions``, if there are any: names of the columns after those, whose
            predictions are values as the log has them; ``features``, if its events have any: those known of a target
            (``event``), then those of the history alone (``history``), in the order of ``feature_NF``'s columns, of each its
            ``name`` and the ``values`` whose codes are 1, 2, ..., or the ``bounds`` where codes 2, 3, ... begin (0 stands for a
            missing or unknown one; ``data.features.Features.from_json`` encodes); ``torch``, the version that wrote it.

    Raises:
        SidrecError: if it is no such package, or one of a later format.
        DataError: if it has another digest than ``sha256``.

    Example::

        scorer = Scorer("ranker.pt2")
        probability_M = scorer(history_NW=..., action_N=..., ...)
    """

    def __init__(self, path: str | Path, *, parallel: int = 1, sha256: str | None = None) -> None:
        if parallel < 1:
            raise DataError(f"parallel must be at least 1, got {parallel}")
        path = local(path)
        if sha256 is not None and (actual := sha256_of(path)) != sha256.lower():
            raise DataError(f"{path}: not the package that was asked for: its sha256 is {actual}, expected {sha256}")
        self._program, metadata = _load(path, parallel)
        if metadata is None:
            raise SidrecError(f"{path}: not a ranker that `sidrec export` wrote")
        self.metadata: dict[str, Any] = json.loads(metadata)
        if self.metadata["format"] != FORMAT:
            raise SidrecError(
                f"{path}: of format {self.metadata['format']}, this version reads {FORMAT}; export it again"
            )
        self._shapes = {name: tuple(shape) for name, shape in self.metadata["inputs"].items()}
        self._last_action = torch.tensor(num_actions(len(self.metadata.setdefault("tasks", DEFAULT_TASKS))) - 1)
        self._last_word_W = torch.tensor(self.metadata["last_words"])
        features = [feature for kind in self.metadata.get("features", {}).values() for feature in kind]
        last = [len(feature["values"]) if "values" in feature else len(feature["bounds"]) + 1 for feature in features]
        self._last_feature_F = torch.tensor(last, dtype=torch.int64)
        lists = self.metadata.get("user_lists", {}).values()
        self._last_value_L = torch.tensor([len(values) for values in lists], dtype=torch.int64)
        users = self.metadata["user_features"].values()
        last = [len(kept) if isinstance(kept, list) else len(kept["bounds"]) + 1 for kept in users]
        self._last_code_F = torch.tensor(last, dtype=torch.int64)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Probability of a positive for each candidate, or the value of a regression, float32 [M]; with several tasks [M, K].

        Args:
            inputs: those of ``ServingRanker.forward``, by name; int64, on the CPU. Of an event whose item is missing all words
                are ``NO_SID``; a candidate must have its SID.

        Raises:
            DataError: on a missing or unknown input, another dtype or shape, a word that is no SID, a code or place out of
                range; names the input, and the entry.
        """
        self._check_shapes(inputs)
        self._check_values(**inputs)
        with torch.inference_mode():
            return self._program(*[inputs[name].contiguous() for name in self.metadata["inputs"]])

    def _check_shapes(self, inputs: dict[str, Tensor]) -> None:
        shapes = self._shapes
        if inputs.keys() != shapes.keys():
            wrong = sorted(inputs.keys() ^ shapes.keys())
            raise DataError(f"missing or unknown inputs: {', '.join(wrong)}; the inputs are {', '.join(shapes)}")
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise DataError(f"{name} is {type(value).__name__}, expected a tensor of int64")
        sizes: dict[Any, int] = {
            "events": _length(inputs["action_N"]),
            "requests": _length(inputs["request_time_B"]),
            "candidates": _length(inputs["request_M"]),
        }
        if "user_values_V" in inputs:
            sizes["user values"] = _length(inputs["user_values_V"])
        sizes["requests + 1"] = sizes["requests"] + 1
        for name, shape in shapes.items():
            expected = tuple([sizes.get(size, size) for size in shape])
            value = inputs[name]
            if value.dtype != torch.int64 or value.shape != expected:
                raise DataError(
                    f"{name} is {value.dtype} of shape {tuple(value.shape)}, expected int64 of shape {expected}: {[*shape]}"
                )

    def _check_values(
        self, *, history_NW: Tensor, action_N: Tensor, offsets_B1: Tensor, candidate_MW: Tensor, request_M: Tensor,
        user_BF: Tensor, **others: Tensor,
    ) -> None:  # fmt: skip
        N, B = len(action_N), len(user_BF)
        offsets = offsets_B1.tolist()
        if offsets[0] != 0 or offsets[-1] != N or offsets != sorted(offsets):
            raise DataError(f"offsets_B1 must rise from 0 to the number of events, {N}; got {offsets}")
        bounded = {
            "history_NW": (history_NW, self._last_word_W),
            "candidate_MW": (candidate_MW, self._last_word_W),
            "action_N": (action_N, self._last_action),
            "request_M": (request_M, torch.tensor(B - 1)),
            "user_BF": (user_BF, self._last_code_F),
        }
        for name in FEATURE_NAMES & others.keys():
            bounded[name] = others[name], self._last_feature_F[: others[name].shape[1]]
        if not _are_in_range(bounded):
            for name, (values, last) in bounded.items():
                _check_range(name, values, last, may_miss=name == "history_NW")
        if "user_values_V" in others:
            self._check_lists(others["user_values_V"], others["user_lengths_BL"])

    def _check_lists(self, value_V: Tensor, length_BL: Tensor) -> None:
        _check_range("user_lengths_BL", length_BL, torch.tensor(len(value_V)))
        if length_BL.sum() != len(value_V):
            raise DataError(
                f"user_lengths_BL add up to {int(length_BL.sum())}, user_values_V has {len(value_V)} values"
            )
        list_V = torch.repeat_interleave(length_BL.flatten())
        _check_range("user_values_V", value_V, self._last_value_L[list_V % length_BL.shape[1]], least=1)
        value_list_V2 = torch.stack([list_V, value_V], dim=1)
        if len(value_list_V2.unique(dim=0)) < len(value_V):
            raise DataError("user_values_V has a value twice in one list; send each once")


def _load(path: Path, parallel: int) -> tuple[Callable[..., Tensor], str | None]:
    """The program, and our metadata if it has some."""
    try:
        with zipfile.ZipFile(path) as archive:
            compiled = any("/aotinductor/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        raise SidrecError(f"{path}: not a ranker that `sidrec export` wrote, or cut short") from None
    if compiled:
        return _load_compiled(path, parallel)
    extra = {METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    return _in_turns(program.module(), parallel), extra[METADATA] or None


def _load_compiled(path: Path, parallel: int) -> tuple[Callable[..., Tensor], str | None]:
    if build.is_available():
        package = torch.classes.sidrec_native.Package(str(path), parallel)
        return lambda *inputs: package.run(list(inputs))[0], package.metadata(METADATA) or None
    from torch._inductor.package import load_package  # the public function has one runner; and it takes a second

    model = load_package(str(path), num_runners=parallel)
    # who waits for a runner holds the interpreter's lock, for which the operators of others wait, as they are in Python
    return _in_turns(model, parallel), model.get_metadata().get(METADATA)


def _in_turns(program: Callable[..., Tensor], parallel: int) -> Callable[..., Tensor]:
    """The program, for so many threads at a time."""
    turns = threading.BoundedSemaphore(parallel)

    def run(*inputs: Tensor) -> Tensor:
        with turns:
            return program(*inputs)

    return run


def _length(values: Tensor) -> int:
    return values.shape[0] if values.ndim else 0


def _are_in_range(bounded: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Whether a look in C++ finds all values in range; the first may miss SIDs. Few requests take as long as Python's checks."""
    if not build.is_available():
        return False
    values, last = zip(*bounded.values(), strict=True)
    return torch.ops.sidrec_native.in_range(values, last, 1)


def _check_range(name: str, values: Tensor, last: Tensor, *, least: int = 0, may_miss: bool = False) -> None:
    """Refuses values out of range; ``may_miss``: rows of ``NO_SID`` alone are not."""
    wrong = (values < least) | (values > last)
    if may_miss:
        wrong &= (values != NO_SID).any(1, keepdim=True)
    if wrong.any():
        place = wrong.nonzero()[0]
        most = last.expand_as(values)[tuple(place)]
        raise DataError(f"{name}{place.tolist()} is {int(values[tuple(place)])}, expected {least} to {int(most)}")
