"""Learning DPCA's basis in closed form: encode, then solve for all basis rows jointly, and again.

With codes A [N, R] held fixed, the best basis depends on A^T A and A^T X alone: that is all a round needs of the data, so
vectors are read in chunks, on any number of processes, and only R^2 + R D sums are kept. The same alternation as the
codebook update of additive quantization (Babenko & Lempitsky 2014) and LSQ (Martinez et al. 2016).

Rows are shrunk by what the data itself says is noise (``shrinkage.py``). So the error on the vectors fitted may rise where
that on others falls, and the last basis is the one to keep.

But least squares trusts the codes to stay. Where there are fewer codes than digits to tell apart (vectors in tight clusters,
fewer vectors than digits) many bases fit them equally well, and from most of those a greedy search finds other codes, with far
greater error. So a basis that does not keep the promise of its least squares is dropped, and the one before is kept.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot, format_stages
from sidrec_torchrec.codec.dpca_start import start
from sidrec_torchrec.codec.quantizer import check_finite, check_width
from sidrec_torchrec.codec.search import codes, encode, weights
from sidrec_torchrec.codec.shrinkage import bands, shrunk_rows
from sidrec_torchrec.codec.tensor_file import save_tensors
from sidrec_torchrec.errors import DataError, RunMismatchError
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.processes import (
    copy_from_first_process,
    is_first_process,
    on_first_process,
    sum_over_processes,
)

_SAMPLE_ROWS = 1 << 14  # of process 0, from which the basis is started
_BLOCK_ROWS = 1 << 13
_SEARCHED_ROUNDS = 4  # the last ones, which encode with the whole beam; before, greedy digits do as well
_BROKEN = 1.25  # a basis is dropped if its error is this many times both what was promised and what was before
_ROUNDING = 1e-9  # of the vectors' energy
_TINY = 1e-30


class FitOptions(NamedTuple):
    """How to fit; see ``DPCAConfig``."""

    stages: tuple[Alphabet, ...]
    dim: int
    rounds: int
    beam: int
    seed: int

    def __str__(self) -> str:
        values = self._asdict() | {"stages": format_stages(self.stages)}
        return ", ".join(f"{name}={value}" for name, value in values.items())


class Fitted(NamedTuple):
    """What ``fit`` has learned after a round.

    Args:
        mean_D: float64 [D].
        basis_RD: float64 [R, D].
        errors: relative squared error of the start and after each round.
    """

    mean_D: Tensor
    basis_RD: Tensor
    errors: list[float]


class _Survey(NamedTuple):
    """What is known of the vectors before the first round: mean [D], number, principal axes (columns) and energy."""

    mean_D: Tensor
    num_rows: int
    axes_DD: Tensor
    energy_D: Tensor


class _State(NamedTuple):
    """Where fitting stands.

    Args:
        survey: of the vectors.
        basis_RD: of the next round; of a fit that is over, the one to keep.
        weight_SB: its ridge, [S, bands].
        errors: so far.
        promised: the error it has with the codes it was fitted to.
        before_RD: the basis of the round before, to which the last of the errors belongs.
        is_over: whether there is no use in going on.
    """

    survey: _Survey
    basis_RD: Tensor
    weight_SB: Tensor
    errors: list[float]
    promised: float
    before_RD: Tensor
    is_over: bool


def fit(chunks: Iterable[Tensor], options: FitOptions, *, device: torch.device, checkpoint: Path | None) -> Fitted:
    """See ``DPCA.fit``."""
    state = _load(checkpoint, options, device) or _begin(chunks, options, device)
    while len(state.errors) <= options.rounds and not state.is_over:
        state = _round(chunks, options, state)
        _save(checkpoint, options, state)
    return Fitted(state.survey.mean_D, state.basis_RD, state.errors)


def _begin(chunks: Iterable[Tensor], options: FitOptions, device: torch.device) -> _State:
    survey, sample = _look(chunks, options.dim, device)
    num_rows = sum(stage.width for stage in options.stages)
    basis_RD = torch.zeros(num_rows, options.dim, dtype=torch.float64, device=device)
    if is_first_process():
        basis_RD = start(torch.cat(sample) - survey.mean_D, options.stages, options.seed)
    copy_from_first_process(basis_RD)
    weight_SB = basis_RD.new_ones(len(options.stages), len(bands(options.dim)))
    return _State(survey, basis_RD, weight_SB, [], math.inf, basis_RD, is_over=False)


def _round(chunks: Iterable[Tensor], options: FitOptions, state: _State) -> _State:
    """Encodes with the basis, measures its error, and, unless this was the last round, finds the next basis."""
    survey, basis_RD = state.survey, state.basis_RD
    round_ = len(state.errors)
    beam = options.beam if options.rounds - round_ < _SEARCHED_ROUNDS else 1
    gram_RR, cross_RD = _sums(chunks, survey.mean_D, basis_RD, options.stages, beam)
    error = _error(basis_RD, gram_RR, cross_RD, survey)
    if round_ and error > _BROKEN * max(state.promised, state.errors[-1]) + _ROUNDING:
        return state._replace(basis_RD=state.before_RD, is_over=True)
    state = state._replace(errors=[*state.errors, error], before_RD=basis_RD)
    if round_ == options.rounds:
        return state
    basis_RD, weight_SB, promised = _improve(gram_RR, cross_RD, state.weight_SB, survey, options.stages)
    return state._replace(basis_RD=basis_RD, weight_SB=weight_SB, promised=promised)


def _error(basis_RD: Tensor, gram_RR: Tensor, cross_RD: Tensor, survey: _Survey) -> float:
    """Relative squared error |X - A U|^2 / |X|^2 of codes given by their sums."""
    # |X - A U|^2 = |X|^2 - 2 <A^T X, U> + <U, A^T A U>
    total = float(survey.energy_D.sum())
    left = max(0.0, total + float((basis_RD * (gram_RR @ basis_RD - 2 * cross_RD)).sum()))
    return left / max(total, _TINY)


def _improve(
    gram_RR: Tensor, cross_RD: Tensor, weight_SB: Tensor, survey: _Survey, stages: tuple[Alphabet, ...]
) -> tuple[Tensor, Tensor, float]:
    """The next round's basis [R, D], ridge weights [S, bands], and the error with the codes as they are."""
    widths = [stage.width for stage in stages]
    along_RD, weight_SB = shrunk_rows(
        gram_RR, cross_RD @ survey.axes_DD, survey.energy_D, weight_SB, widths, survey.num_rows
    )
    basis_RD = along_RD @ survey.axes_DD.T
    order_S, order_R = _by_energy(basis_RD, gram_RR.diagonal(), stages)
    return basis_RD[order_R], weight_SB[order_S], _error(basis_RD, gram_RR, cross_RD, survey)


def _blocks(chunks: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    for chunk_ND in chunks:
        for block_ND in chunk_ND.split(_BLOCK_ROWS):
            yield block_ND.to(device, torch.float64)


def _look(chunks: Iterable[Tensor], dim: int, device: torch.device) -> tuple[_Survey, list[Tensor]]:
    """Mean, number and principal axes over all processes; and this process's first rows."""
    sum_D = torch.zeros(dim, dtype=torch.float64, device=device)
    rows, sample = 0, []
    for block_ND in _blocks(chunks, device):
        check_width(block_ND, dim)
        check_finite(block_ND, range(rows, rows + len(block_ND)))
        if rows < _SAMPLE_ROWS:
            sample.append(block_ND[: _SAMPLE_ROWS - rows].clone())  # a view would keep its whole chunk
        rows += len(block_ND)
        sum_D += block_ND.sum(0)
    first_rows = torch.tensor([rows], device=device)
    copy_from_first_process(first_rows)
    if not first_rows:
        raise ValueError("fit needs vectors, and process 0 was given none")
    count = torch.tensor([rows], device=device)
    sum_over_processes(count, sum_D)
    mean_D = (sum_D / count).float().double()  # as it is kept, so that the basis is learned on what will be encoded
    # a pass of its own: |x|^2 - |mean|^2 would cancel where the mean is large
    moment_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for block_ND in _blocks(chunks, device):
        x_ND = block_ND - mean_D
        moment_DD += x_ND.T @ x_ND
    sum_over_processes(moment_DD)
    energy_D, axes_DD = torch.linalg.eigh(moment_DD)
    axes_DD = axes_DD.flip(1).contiguous()
    copy_from_first_process(axes_DD)  # of equal energies, machines may choose different axes
    return _Survey(mean_D, int(count), axes_DD, energy_D.flip(0).clamp_min(0)), sample


def _sums(
    chunks: Iterable[Tensor], mean_D: Tensor, basis_RD: Tensor, stages: tuple[Alphabet, ...], beam: int
) -> tuple[Tensor, Tensor]:
    """A^T A and A^T X of the codes that ``basis_RD`` gives, over all processes."""
    gram_RR = basis_RD.new_zeros(len(basis_RD), len(basis_RD))
    cross_RD = torch.zeros_like(basis_RD)
    for block_ND in _blocks(chunks, basis_RD.device):
        x_ND = block_ND - mean_D
        if all(stage.radix for stage in stages):
            digits_NL = encode(x_ND, basis_RD, stages, beam=beam).long()
            gram_RR += _codes_times(digits_NL, stages, weights(digits_NL, stages))
            cross_RD += _codes_times(digits_NL, stages, x_ND)
        else:
            codes_NR = codes(x_ND, basis_RD, stages, beam=beam)
            gram_RR += codes_NR.T @ codes_NR
            cross_RD += codes_NR.T @ x_ND
    sum_over_processes(gram_RR, cross_RD)
    return gram_RR, cross_RD


def _codes_times(digits_NL: Tensor, stages: tuple[Alphabet, ...], y_NM: Tensor) -> Tensor:
    """A^T Y, [R, M]; a one-hot stage costs N M, not N K M."""
    parts, first = [], 0
    for one_hot, run in groupby(stages, key=lambda stage: isinstance(stage, OneHot)):
        alphabets = tuple(run)
        digits_NJ = digits_NL[:, first : first + len(alphabets)]
        if one_hot:
            sizes = [alphabet.radix for alphabet in alphabets]
            parts += [
                y_NM.new_zeros(K, y_NM.shape[1]).index_add_(0, d, y_NM) for K, d in zip(sizes, digits_NJ.T, strict=True)
            ]
        else:
            parts.append(weights(digits_NJ, alphabets).T @ y_NM)
        first += len(alphabets)
    return torch.cat(parts)


def _by_energy(basis_RD: Tensor, squares_R: Tensor, stages: tuple[Alphabet, ...]) -> tuple[Tensor, Tensor]:
    """Order of stages and of their rows: neighbours of one alphabet by energy, so that every prefix decodes well."""
    energy_R = squares_R * basis_RD.square().sum(1)
    rows_R = torch.arange(len(basis_RD), device=basis_RD.device)
    order_of_stages: list[Tensor] = []
    order_of_rows: list[Tensor] = []
    first = 0
    for alphabet, run in groupby(stages):
        length = len(list(run))
        last = first + alphabet.width * length
        order = energy_R[first:last].view(length, -1).sum(1).argsort(descending=True, stable=True)
        order_of_stages.append(order + sum(len(stages) for stages in order_of_stages))
        order_of_rows.append(rows_R[first:last].view(length, -1)[order].flatten())
        first = last
    return torch.cat(order_of_stages), torch.cat(order_of_rows)


def _load(checkpoint: Path | None, options: FitOptions, device: torch.device) -> _State | None:
    """What ``_save`` wrote last, if anything, on every process."""
    held = on_first_process(lambda: _read(checkpoint, options))
    if held is None:
        return None
    mean_D, num_rows, axes_DD, energy_D = held["survey"]
    survey = _Survey(mean_D.to(device), num_rows, axes_DD.to(device), energy_D.to(device))
    basis_RD, weight_SB, before_RD = (held[name].to(device) for name in ("basis", "weight", "before"))
    return _State(survey, basis_RD, weight_SB, held["errors"], held["promised"], before_RD, held["is_over"])


def _read(checkpoint: Path | None, options: FitOptions) -> dict | None:
    if checkpoint is None or not checkpoint.exists():
        return None
    try:
        held = torch.load(checkpoint, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever torch's reader may raise of a broken one
        raise DataError(
            f"{checkpoint}: not a checkpoint of fit, or a broken one ({error}); remove it and fit again"
        ) from error
    if not isinstance(held, dict) or "digest" not in held:
        raise DataError(f"{checkpoint}: of an earlier version of sidrec_torchrec; remove it and fit again")
    if held.pop("digest") != _digest(held):
        raise DataError(f"{checkpoint}: not what was written; remove it and fit again")
    if held["options"] != str(options):
        raise RunMismatchError(
            f"{checkpoint} is of another fit: {held['options']}, this one is {options}; give another path, or remove it"
        )
    return held


def _save(checkpoint: Path | None, options: FitOptions, state: _State) -> None:
    """Writes all that the rounds to come depend on, whole or not at all."""
    if checkpoint is None or not is_first_process():
        return
    held = {
        "options": str(options),
        "survey": tuple(state.survey),
        "basis": state.basis_RD,
        "weight": state.weight_SB,
        "errors": state.errors,
        "promised": state.promised,
        "before": state.before_RD,
        "is_over": state.is_over,
    }
    with atomic_path(checkpoint) as path:
        save_tensors(held | {"digest": _digest(held)}, path)


def _digest(held: dict[str, Any]) -> str:
    """Of a checkpoint's content: torch does not look at the checksums of what it reads."""
    digest = hashlib.sha256()
    for name, value in sorted(held.items()):
        digest.update(name.encode())
        for part in value if isinstance(value, tuple) else (value,):
            is_tensor = isinstance(part, Tensor)
            digest.update(part.cpu().contiguous().numpy().tobytes() if is_tensor else repr(part).encode())
    return digest.hexdigest()
