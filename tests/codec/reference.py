"""What the quantizers are checked against: greedy coding as its definition tells it, on the vectors themselves."""

import numpy as np
import torch

from sidrec_torchrec.codec.quantizer import Quantizer


def vectors(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Correlated vectors off the origin, float32 [n, dim]."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((dim, dim)) * np.linspace(2, 0.2, dim)[:, None]
    return torch.from_numpy(rng.standard_normal((n, dim)) @ mix + 3.0).float()


def greedy_digits(quantizer: Quantizer, x_ND: torch.Tensor) -> np.ndarray:
    """Of each digit in turn, the value whose row leaves the least residual; int64 [N, L]."""
    tables = [table.detach().double().numpy() for table in quantizer.digit_tables()]
    digits = []
    for x in x_ND.double().numpy() - quantizer.offset.double().numpy():
        row = []
        for table in tables:
            row.append(int(((x - table) ** 2).sum(1).argmin()))
            x = x - table[row[-1]]
        digits.append(row)
    return np.array(digits)


def faiss_codes_agree(codes: np.ndarray, digits: np.ndarray, codebooks: np.ndarray, x: np.ndarray) -> float:
    """Share of rows with equal codes; asserts that every other row first differs at a tie in float32.

    Args:
        codes: faiss's codes, [N, L].
        digits: ours, [N, L].
        codebooks: [L, K, D].
        x: the vectors, [N, D].
    """
    equal = (codes == digits).all(1)
    for n in np.flatnonzero(~equal):
        residual, stage = x[n].astype(np.float64), int((codes[n] != digits[n]).argmax())
        for j in range(stage):
            residual = residual - codebooks[j, digits[n, j]]
        theirs, ours = (((residual - codebooks[stage, c[n, stage]]) ** 2).sum() for c in (codes, digits))
        assert ours <= theirs <= ours + 1e-4 * (residual**2).sum()
    return float(equal.mean())
