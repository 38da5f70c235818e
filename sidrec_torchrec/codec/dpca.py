"""DPCA: a vector as a sum of basis rows weighted by a few discrete codes.

A stage with a ternary alphabet adds -u, 0 or u; one with a one-hot alphabet adds one of its K codewords. With ternary
stages alone this is a semi-discrete decomposition (Kolda & O'Leary 1998), with one-hot stages alone residual quantization,
with levels on the identity FSQ's rounding, with real stages principal component analysis (``alphabet.py``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot, Ternary
from sidrec_torchrec.codec.dpca_fit import FitOptions, fit
from sidrec_torchrec.codec.quantizer import (
    QUANTIZERS,
    Quantizer,
    QuantizerOutput,
    add_tables,
    check_width,
    squared_distance,
)
from sidrec_torchrec.codec.search import Search, codes, encode
from sidrec_torchrec.errors import check_at_least
from sidrec_torchrec.processes import is_first_process


@dataclass(frozen=True, kw_only=True)
class DPCAConfig:
    """What to learn.

    Args:
        dim: width of the vectors.
        stages: alphabets in coding order, e.g. ``(OneHot(256), *[Ternary()] * 20)``.
        iterations: rounds of encoding and least squares in ``fit``.
        commitment: weight, in training, of the pull of vectors towards their decoded digits.
        beam: candidates kept while encoding, and in the last rounds of ``fit``; 1 is greedy.
        seed: of the k-means start of one-hot stages.

    Raises:
        ValueError: on values out of range.
    """

    dim: int
    stages: tuple[Alphabet, ...] = (Ternary(),) * 39
    iterations: int = 20
    commitment: float = 0.25
    beam: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("DPCA needs at least one stage")
        check_at_least(self, 1, "dim", "beam")
        check_at_least(self, 0, "iterations", "commitment")


@QUANTIZERS.register("dpca")
class DPCA(Quantizer):
    """Discrete PCA, learned in closed form (``fit``) and, from there, by gradient.

    The basis is one parameter ``basis_RD`` whose rows are, stage after stage, the row of a ternary stage or the codewords
    of a one-hot one.

    Args:
        config: digits and how to learn them.

    Example::

        dpca = DPCA(DPCAConfig(dim=384))
        errors = dpca.fit(x_ND)
        digits_NL = dpca.encode(x_ND)
        x_hat_ND = dpca.decode(digits_NL)
    """

    mean_D: Tensor

    def __init__(self, config: DPCAConfig) -> None:
        super().__init__(config.stages, config.dim)
        self.config = config
        self._widths = [stage.width for stage in config.stages]
        self.basis_RD = nn.Parameter(torch.randn(sum(self._widths), config.dim) / config.dim**0.5)
        self.register_buffer("mean_D", torch.zeros(config.dim))

    @classmethod
    def build(cls, dim: int, stages: tuple[Alphabet, ...], *, commitment: float) -> "DPCA":
        return cls(DPCAConfig(dim=dim, stages=stages, commitment=commitment))

    @property
    def offset(self) -> Tensor:
        return self.mean_D

    def digit_tables(self) -> list[Tensor]:
        tables = []
        for stage, rows in zip(self.stages, self.basis_RD.split(self._widths), strict=True):
            tables.append(rows if isinstance(stage, OneHot) else stage.values().to(rows) @ rows)
        return tables

    @torch.no_grad()
    def initialize(self, z_ND: Tensor) -> None:
        self.fit(z_ND if is_first_process() else z_ND[:0])  # all hold the same sample: it counts once

    @torch.no_grad()
    def encode(self, z_ND: Tensor, *, beam: int | None = None) -> Tensor:
        """Digits of each row, coarse to fine, in bounded memory; they depend on nothing but the row. See ``search.encode``.

        Args:
            z_ND: float [N, dim].
            beam: candidates kept after each choice; None for the config's.

        Returns:
            int16 [N, L].

        Raises:
            ValueError: as every quantizer, on a beam below 1, and on real stages, which have no digits.
        """
        return encode(z_ND, self.basis_RD, self.stages, offset_D=self.mean_D, beam=self._checked(z_ND, beam))

    def search(self) -> Search:
        basis_RD, mean_D = self.basis_RD.detach(), self.mean_D
        return Search(basis_RD, self.stages, offset_D=mean_D, beam=self.config.beam)

    @torch.no_grad()
    def codes(self, z_ND: Tensor, *, beam: int | None = None) -> Tensor:
        """What each row weighs the basis with: its vector is near ``offset + codes @ basis_RD``.

        These are ``encode``'s digits in other words, and numbers where a stage is real; arguments and errors as there,
        but a real stage takes no beam.

        Returns:
            Float [N, R], as the basis.
        """
        beam = self._checked(z_ND, beam)
        return codes(z_ND, self.basis_RD, self.stages, offset_D=self.mean_D, beam=beam).to(self.basis_RD)

    def _checked(self, z_ND: Tensor, beam: int | None) -> int:
        """The beam, after a look at the arguments."""
        beam = self.config.beam if beam is None else beam
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        check_width(z_ND, self.dim)
        return beam

    def forward(self, z_ND: Tensor) -> QuantizerOutput:
        """Straight through: the input gets the gradient of its decoded digits, and so does the basis."""
        digits_NL = self.encode(z_ND.detach())
        decoded_ND = add_tables(self.offset, self.digit_tables(), digits_NL)
        # per row: the basis follows the vectors, the vectors commit to the basis
        codebook = squared_distance(decoded_ND, z_ND.detach())
        commitment = squared_distance(z_ND, decoded_ND.detach())
        z_q_ND = decoded_ND + (z_ND - z_ND.detach())
        return QuantizerOutput(z_q_ND, digits_NL, codebook + self.config.commitment * commitment)

    @torch.no_grad()
    def fit(self, x: Tensor | Iterable[Tensor], *, checkpoint: Path | None = None) -> list[float]:
        """Learns mean and basis by alternating encoding and least squares over all stages jointly; see ``dpca_fit``.

        In a process group, every process calls this with vectors of its own, and all end with the same basis, that of
        all vectors together (up to rounding; the basis is started from process 0's first 16,384 rows).

        Args:
            x: vectors, float [N, dim], or a collection of such chunks: a list, or anything that can be gone through
                again, for each round reads it once.
            checkpoint: file to keep the state in, written whole after every round. If it is there already, ``fit`` goes
                on from it, to the very result it would have had uninterrupted; the vectors must be the same.

        Returns:
            Relative squared error ``|x - x_hat|^2 / |x - mean|^2`` of the start and after each round. The last basis is
            kept, not that of the least error: rows are shrunk ever better, which helps on vectors not seen. Fewer rounds
            than asked for where there are fewer codes than digits to tell apart, in vectors of a few tight clusters say:
            the first basis that greedy search can make nothing of ends the fit, and the one before is kept.

        Raises:
            ValueError: without vectors, on a wrong width, or on a value that is not finite; names the first bad row.
            RunMismatchError: if the checkpoint is of a fit with other options.
            TypeError: on an iterator, which could be read only once.
        """
        chunks = [x] if isinstance(x, Tensor) else x
        if iter(chunks) is chunks:
            raise TypeError("fit reads its chunks once per round: give a list or another collection, not an iterator")
        config = self.config
        options = FitOptions(self.stages, self.dim, config.iterations, config.beam, config.seed)
        fitted = fit(chunks, options, device=self.basis_RD.device, checkpoint=checkpoint)
        self.mean_D.copy_(fitted.mean_D)
        self.basis_RD.copy_(fitted.basis_RD)
        return fitted.errors
