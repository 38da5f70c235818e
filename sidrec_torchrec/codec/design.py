"""Choosing DPCA's stages at a number of bits: a few sensible lists, each fitted and measured on vectors held out."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot, Ternary, format_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig

_WORDS = (256, 64, 16)  # codebook sizes of the lists that are one-hot throughout
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class DesignConfig:
    """What to weigh.

    Args:
        bits: bits an item may have, 2 or more.
        beams: beams to measure every list of stages with; the basis is fitted with the widest.
        tolerance: share by which the error may exceed the least, for the sake of cheaper encoding.
        iterations: rounds of each fit.
        seed: of each fit.

    Raises:
        ValueError: on values out of range.
    """

    bits: float
    beams: tuple[int, ...] = (1, 8)
    tolerance: float = 0.01
    iterations: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.bits >= 2 and self.beams and min(self.beams) >= 1 and min(self.tolerance, self.iterations) >= 0):
            raise ValueError(
                f"bits must be at least 2, beams at least 1, tolerance and iterations at least 0; got {self}"
            )


@dataclass(frozen=True)
class Candidate:
    """A list of stages, encoded with one beam.

    Args:
        stages: alphabets in coding order.
        beam: candidates kept while encoding.
        bits: of a SID.
        error: relative squared error on the vectors held out; 1 is as bad as the mean.
        flops: operations that encode one vector.
        seconds: that encode a million vectors, measured on this machine.
        codebook_bytes: of the basis, in float32.
    """

    stages: tuple[Alphabet, ...]
    beam: int
    bits: float
    error: float
    flops: int
    seconds: float
    codebook_bytes: int


@dataclass(frozen=True)
class Design:
    """What was measured, and what to take.

    Args:
        candidates: least error first.
        chosen: one of them.
        reason: why, in a sentence.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reason: str


def design(
    x_train_ND: Tensor,
    x_held_out_ND: Tensor,
    config: DesignConfig,
    *,
    report: Callable[[Candidate], None] = lambda candidate: None,
) -> Design:
    """Fits every sensible list of stages, and takes the cheapest to encode of those near the least held-out error.

    Args:
        x_train_ND: float [N, D], to fit on.
        x_held_out_ND: float [M, D], to measure on.
        config: what to weigh.
        report: called with each candidate as it is measured.

    Raises:
        ValueError: without vectors in either part, or on bad ones; names the row.
    """
    if not len(x_train_ND) or not len(x_held_out_ND):
        raise ValueError(f"{len(x_train_ND)} vectors to fit on, {len(x_held_out_ND)} held out: both must have some")
    candidates = []
    for stages in stage_lists(config.bits):
        for candidate in _measure(stages, x_train_ND, x_held_out_ND, config):
            report(candidate)
            candidates.append(candidate)
    candidates.sort(key=lambda candidate: candidate.error)
    near = [c for c in candidates if c.error <= candidates[0].error * (1 + config.tolerance)]
    chosen = min(near, key=lambda candidate: (candidate.flops, candidate.error))
    return Design(tuple(candidates), chosen, _reason(chosen, candidates[0], near, config))


def stage_lists(bits: float) -> list[tuple[Alphabet, ...]]:
    """Lists of stages of at most ``bits`` bits: all ternary; one or two coarse digits, then ternary; all one-hot."""
    lists = [_then_ternary((OneHot(256),) * count, bits) for count in (0, 1, 2)]
    lists += [_all_one_hot(words, bits) for words in _WORDS]
    return list(dict.fromkeys(stages for stages in lists if stages))


def num_bits(stages: tuple[Alphabet, ...]) -> float:
    """Bits of a SID of these stages: the sum of the logarithms of their radices."""
    return sum(math.log2(stage.radix) for stage in stages)


def encode_flops(stages: tuple[Alphabet, ...], dim: int, beam: int) -> int:
    """Additions and multiplications that encode one vector: its products with the basis, and the search among them."""
    widths = [stage.width for stage in stages]
    later = [sum(widths) - end for end in accumulate(widths)]
    kept = [min(beam, math.prod(stage.radix for stage in stages[: j + 1])) for j in range(len(stages))]
    return 2 * dim * sum(widths) + sum(
        k * (stage.radix + rest) for k, stage, rest in zip(kept, stages, later, strict=True)
    )


def _then_ternary(first: tuple[Alphabet, ...], bits: float) -> tuple[Alphabet, ...]:
    left = bits - num_bits(first)
    return (*first, *[Ternary()] * int(left / math.log2(3))) if left >= 0 else ()


def _all_one_hot(words: int, bits: float) -> tuple[Alphabet, ...]:
    """Stages of ``words`` codewords, and one of fewer for the bits left."""
    per_stage = int(math.log2(words))
    count, left = divmod(int(bits), per_stage)
    return (*[OneHot(words)] * count, *([OneHot(1 << left)] if left else []))


def _measure(
    stages: tuple[Alphabet, ...], x_train_ND: Tensor, x_held_out_ND: Tensor, config: DesignConfig
) -> list[Candidate]:
    dim = x_train_ND.shape[1]
    dpca = DPCA(
        DPCAConfig(dim=dim, stages=stages, iterations=config.iterations, beam=max(config.beams), seed=config.seed)
    )
    dpca.fit(x_train_ND)
    measured = []
    for beam in config.beams:
        start = time.perf_counter()
        digits_NL = dpca.encode(x_held_out_ND, beam=beam)
        seconds = (time.perf_counter() - start) / len(x_held_out_ND) * 1e6
        measured.append(
            Candidate(
                stages=stages,
                beam=beam,
                bits=num_bits(stages),
                error=relative_error(dpca, x_held_out_ND, digits_NL),
                flops=encode_flops(stages, dim, beam),
                seconds=seconds,
                codebook_bytes=_FLOAT_BYTES * dpca.basis_RD.numel(),
            )
        )
    return measured


@torch.no_grad()
def relative_error(dpca: DPCA, x_ND: Tensor, digits_NL: Tensor) -> float:
    """``|x - x_hat|^2 / |x - mean|^2`` over all rows, with the mean the quantizer learned."""
    left = (x_ND.double() - dpca.decode(digits_NL)).square().sum()
    return float(left / (x_ND.double() - dpca.mean_D).square().sum().clamp_min(1e-30))


def _reason(chosen: Candidate, best: Candidate, near: list[Candidate], config: DesignConfig) -> str:
    name = f"{format_stages(chosen.stages)} with beam {chosen.beam}"
    if len(near) == 1:
        return f"{name} has the least held-out error, {best.error:.4f}; no other is within {config.tolerance:.0%} of it"
    if chosen is best:
        return (
            f"{name} has the least held-out error, {best.error:.4f}, and none within {config.tolerance:.0%} is cheaper"
        )
    return (
        f"{name} is the cheapest to encode of the {len(near)} within {config.tolerance:.0%} of the least held-out error: "
        f"{chosen.error:.4f} against {best.error:.4f} of {format_stages(best.stages)} with beam {best.beam}, for "
        f"{chosen.flops / best.flops:.2f} of its operations"
    )
