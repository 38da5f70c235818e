"""DPCA: a vector as a sum of basis rows weighted by a few discrete codes (DESIGN: x - mu ~ sum_l U_l^T a_l).

A stage with a ternary alphabet adds -u, 0 or u; one with a one-hot alphabet adds one of its K codewords. With ternary
stages alone this is a semi-discrete decomposition (Kolda & O'Leary 1998), with one-hot stages alone residual quantization.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot, Ternary
from sidrec_torchrec.codec.kmeans import kmeans
from sidrec_torchrec.codec.quantizer import Quantizer, QuantizerOutput, squared_distance

_POWER_STEPS = 12  # alternations that start one ternary row


@dataclass(frozen=True, kw_only=True)
class DPCAConfig:
    """What to learn.

    Args:
        dim: width of the vectors.
        stages: alphabets in coding order, e.g. ``(OneHot(256), *[Ternary()] * 20)``.
        iterations: rounds of encoding and least squares in ``fit``.
        ridge: weight of the previous basis in each least-squares update, as a share of the mean squared code.
        commitment: weight, in training, of the pull of vectors towards their decoded digits.
        seed: of the k-means start of one-hot stages.
    """

    dim: int
    stages: tuple[Alphabet, ...] = (Ternary(),) * 25
    iterations: int = 20
    ridge: float = 1e-4
    commitment: float = 0.25
    seed: int = 0


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

    def __init__(self, config: DPCAConfig) -> None:
        super().__init__(config.stages, config.dim)
        self.config = config
        self._widths = [stage.width for stage in config.stages]
        self.basis_RD = nn.Parameter(torch.randn(sum(self._widths), config.dim) / config.dim**0.5)
        self.register_buffer("mean_D", torch.zeros(config.dim))

    @property
    def offset(self) -> Tensor:
        return self.mean_D

    def digit_tables(self) -> list[Tensor]:
        tables = []
        for stage, rows in zip(self.stages, self.basis_RD.split(self._widths), strict=True):
            tables.append(stage.values().to(rows) @ rows if isinstance(stage, Ternary) else rows)
        return tables

    def initialize(self, z_ND: Tensor) -> None:
        self.fit(z_ND)

    @torch.no_grad()
    def encode(self, z_ND: Tensor) -> Tensor:
        """Greedy, stage by stage, from the products Z = (z - mean) U^T and the Gram matrix U U^T alone.

        Computed in float64, so that the digits do not depend on how rows are batched or on the device. O(N R (D + L)).
        """
        self._check_input(z_ND)
        basis_RD = self.basis_RD.double()
        return _encode((z_ND.double() - self.mean_D) @ basis_RD.T, basis_RD @ basis_RD.T, self.stages)

    def forward(self, z_ND: Tensor) -> QuantizerOutput:
        """Straight through: the input gets the gradient of its decoded digits, and so does the basis."""
        digits_NL = self.encode(z_ND.detach())
        decoded_ND = self.decode(digits_NL)
        # per row: the basis follows the vectors, the vectors commit to the basis
        codebook = squared_distance(decoded_ND, z_ND.detach())
        commitment = squared_distance(z_ND, decoded_ND.detach())
        z_q_ND = decoded_ND + (z_ND - z_ND.detach())
        return QuantizerOutput(z_q_ND, digits_NL, codebook + self.config.commitment * commitment)

    @torch.no_grad()
    def fit(self, x_ND: Tensor) -> list[float]:
        """Learns mean and basis by alternating encoding and ridge least squares over all stages jointly.

        Args:
            x_ND: vectors, float [N, dim].

        Returns:
            Relative squared error after each round, ``|x - x_hat|^2 / |x - mean|^2``; the basis of the best is kept.
        """
        self._check_input(x_ND)
        x_ND = x_ND.double()
        mean_D = x_ND.mean(0)
        x_ND = x_ND - mean_D
        self.mean_D.copy_(mean_D)
        total = x_ND.square().sum().clamp_min(1e-30)
        basis_RD = self._start(x_ND)
        errors, best = [], (float("inf"), basis_RD)
        for round_ in range(self.config.iterations + 1):
            digits_NL = _encode(x_ND @ basis_RD.T, basis_RD @ basis_RD.T, self.stages)
            codes_NR = self._codes(digits_NL)
            errors.append(float((x_ND - codes_NR @ basis_RD).square().sum() / total))
            if errors[-1] < best[0]:
                best = (errors[-1], basis_RD)
            if round_ < self.config.iterations:
                basis_RD = self._by_energy(_ridge(codes_NR, x_ND, basis_RD, self.config.ridge), codes_NR)
        self.basis_RD.copy_(best[1])
        return errors

    def _start(self, x_ND: Tensor) -> Tensor:
        """One stage after another on the residual of those before."""
        rows, residual_ND = [], x_ND.clone()
        for i, stage in enumerate(self.stages):
            if isinstance(stage, OneHot):
                part_KD = kmeans(residual_ND, stage.size, seed=self.config.seed + i)
                code_N = torch.cdist(residual_ND, part_KD).argmin(1)
                residual_ND = residual_ND - part_KD[code_N]
            else:
                part_KD, code_N1 = _ternary_start(residual_ND)
                residual_ND = residual_ND - code_N1 * part_KD
            rows.append(part_KD)
        return torch.cat(rows)

    def _codes(self, digits_NL: Tensor) -> Tensor:
        """Digits as the weights of the basis rows, float64 [N, R]."""
        parts = [stage.values().double()[digits_NL[:, j].long()] for j, stage in enumerate(self.stages)]
        return torch.cat(parts, dim=1)

    def _by_energy(self, basis_RD: Tensor, codes_NR: Tensor) -> Tensor:
        """Orders neighbouring ternary rows by the energy they carry, so that every prefix decodes well."""
        energy_R = codes_NR.square().sum(0) * basis_RD.square().sum(1)
        parts, first = [], 0
        for is_ternary, run in groupby(self.stages, key=lambda stage: isinstance(stage, Ternary)):
            last = first + sum(stage.width for stage in run)
            order = energy_R[first:last].argsort(descending=True) if is_ternary else torch.arange(last - first)
            parts.append(basis_RD[first:last][order])
            first = last
        return torch.cat(parts)


def _encode(z_NR: Tensor, gram_RR: Tensor, stages: tuple[Alphabet, ...]) -> Tensor:
    """Greedy digits int16 [N, L] from products with the basis and its Gram matrix; z_NR is used up."""
    digits, first = [], 0
    norm_R = gram_RR.diagonal()
    for stage in stages:
        rows = slice(first, first + stage.width)
        if isinstance(stage, Ternary):
            # round(z / |u|^2) to -1, 0, 1; written as comparisons, so that a zero row gives 0
            code_N = (2 * z_NR[:, first] > norm_R[first]).long() - (2 * z_NR[:, first] < -norm_R[first]).long()
            z_NR -= code_N.unsqueeze(1) * gram_RR[first]
            digits.append(code_N + 1)
        else:
            digit_N = (norm_R[rows] - 2 * z_NR[:, rows]).argmin(1)  # nearest codeword
            z_NR -= gram_RR[rows][digit_N]
            digits.append(digit_N)
        first += stage.width
    return torch.stack(digits, dim=1).to(torch.int16)


def _ridge(codes_NR: Tensor, x_ND: Tensor, previous_RD: Tensor, ridge: float) -> Tensor:
    """argmin_U |x - A U|^2 + lambda |U - previous|^2."""
    gram_RR = codes_NR.T @ codes_NR
    weight = ridge * gram_RR.diagonal().mean().clamp_min(1e-12)
    gram_RR.diagonal().add_(weight)
    return torch.linalg.solve(gram_RR, codes_NR.T @ x_ND + weight * previous_RD)


def _ternary_start(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """A row u [1, D] and codes [N, 1] that lower |x - a u|^2, alternating from the direction of most variance."""
    direction_D = torch.linalg.eigh(x_ND.T @ x_ND).eigenvectors[:, -1]
    along_N = x_ND @ direction_D
    u_D = direction_D * along_N.abs().mean() * 1.5
    for _ in range(_POWER_STEPS):
        norm = u_D.square().sum()
        along_N = x_ND @ u_D
        code_N = (2 * along_N > norm).double() - (2 * along_N < -norm).double()
        count = code_N.square().sum()
        if not count:
            break
        u_D = code_N @ x_ND / count
    norm, along_N = u_D.square().sum(), x_ND @ u_D
    code_N = (2 * along_N > norm).double() - (2 * along_N < -norm).double()
    return u_D.unsqueeze(0), code_N.unsqueeze(1)
