"""Residual vector quantization, the traditional SID's quantizer (Zeghidour et al. 2021, arXiv 2107.03312)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot, format_stages
from sidrec_torchrec.codec.kmeans import kmeans
from sidrec_torchrec.codec.quantizer import (
    QUANTIZERS,
    Quantizer,
    QuantizerOutput,
    add_tables,
    check_finite,
    check_width,
    squared_distance,
)
from sidrec_torchrec.codec.search import Search, encode
from sidrec_torchrec.processes import copy_from_first_process, is_first_process, sum_over_processes


@dataclass(frozen=True, kw_only=True)
class ResidualVQConfig:
    """What to learn.

    Args:
        dim: width of the vectors.
        codebook_size: codewords K of each stage.
        num_stages: stages L.
        decay: of the moving averages of counts and sums that make the codewords.
        commitment: weight of the pull of vectors towards their codewords.
        dead_share: a codeword that gets less than this share of an even split is dead, and moved to a residual of the
            batch.
        seed: of k-means and of revival.

    Raises:
        ValueError: on values out of range.
    """

    dim: int
    codebook_size: int = 256
    num_stages: int = 3
    decay: float = 0.99
    commitment: float = 0.25
    dead_share: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.dim, self.num_stages) < 1 or min(self.commitment, self.dead_share) < 0 or not 0 <= self.decay < 1:
            raise ValueError(
                "dim and num_stages must be at least 1, commitment and dead_share at least 0, decay in [0, 1); "
                f"got {self}"
            )


@QUANTIZERS.register("rq")
class ResidualVQ(Quantizer):
    """Each stage quantizes what the stages before left, with K free codewords.

    Started by k-means on ``initialize``; in training, codewords are moving averages of the residuals they get, summed
    over all processes, and dead ones are revived.
    """

    codebook_LKD: Tensor
    count_LK: Tensor
    sum_LKD: Tensor
    updates: Tensor

    def __init__(self, config: ResidualVQConfig) -> None:
        super().__init__((OneHot(config.codebook_size),) * config.num_stages, config.dim)
        self.config = config
        shape = (config.num_stages, config.codebook_size)
        self.register_buffer("codebook_LKD", torch.randn(*shape, config.dim) / config.dim**0.5)
        self.register_buffer("count_LK", torch.ones(shape))
        self.register_buffer("sum_LKD", self.codebook_LKD.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @classmethod
    def check_stages(cls, stages: tuple[Alphabet, ...]) -> None:
        if len(set(stages)) > 1 or not isinstance(stages[0], OneHot):
            raise ValueError(
                f"residual VQ takes one-hot digits of one size, like 'onehot:256*3'; got '{format_stages(stages)}'"
            )

    @classmethod
    def build(cls, dim: int, stages: tuple[Alphabet, ...], *, commitment: float) -> "ResidualVQ":
        config = ResidualVQConfig(dim=dim, codebook_size=stages[0].radix, num_stages=len(stages), commitment=commitment)
        return cls(config)

    @property
    def offset(self) -> Tensor:
        return self.codebook_LKD.new_zeros(self.dim)

    def digit_tables(self) -> list[Tensor]:
        return list(self.codebook_LKD)

    @torch.no_grad()
    def initialize(self, z_ND: Tensor) -> None:
        check_width(z_ND, self.dim)
        check_finite(z_ND, range(len(z_ND)))
        if not len(z_ND):
            raise ValueError("a quantizer starts from at least one vector, got none")
        residual_ND = z_ND.double()
        for stage in range(len(self.stages)):
            codebook_KD = kmeans(residual_ND, self.config.codebook_size, seed=self.config.seed + stage)
            self.codebook_LKD[stage] = codebook_KD
            digit_N = encode(residual_ND, codebook_KD, self.stages[:1])[:, 0].long()
            counts_K = torch.bincount(digit_N, minlength=self.config.codebook_size)
            # as if the sample were one batch of average size: counts of 1 on average
            self.count_LK[stage] = counts_K * (self.config.codebook_size / len(z_ND))
            self.sum_LKD[stage] = self.codebook_LKD[stage] * self.count_LK[stage].unsqueeze(1)
            residual_ND = residual_ND - self.codebook_LKD[stage].double()[digit_N]

    @torch.no_grad()
    def encode(self, z_ND: Tensor) -> Tensor:
        """Nearest codeword of each stage's residual."""
        check_width(z_ND, self.dim)
        return encode(z_ND, self.codebook_LKD.flatten(0, 1), self.stages)

    def search(self) -> Search:
        return Search(self.codebook_LKD.flatten(0, 1), self.stages)

    def forward(self, z_ND: Tensor) -> QuantizerOutput:
        """Straight-through, with commitment loss; in training the codewords move after they were used."""
        digits_NL = self.encode(z_ND.detach())
        decoded_ND = add_tables(self.offset, self.digit_tables(), digits_NL)
        loss = self.config.commitment * squared_distance(z_ND, decoded_ND.detach())
        if self.training:
            self._update(z_ND.detach(), digits_NL.long())
        return QuantizerOutput(decoded_ND.detach() + (z_ND - z_ND.detach()), digits_NL, loss)

    @torch.no_grad()
    def _update(self, z_ND: Tensor, digits_NL: Tensor) -> None:
        """Moves every codeword towards the residuals it got on all processes; revives dead ones."""
        used = self.codebook_LKD.clone()
        residual_ND = z_ND.to(used)  # half-precision latents are counted and summed as exactly as any
        self.updates += 1
        for stage, digit_N in enumerate(digits_NL.T):
            count_K = torch.bincount(digit_N, minlength=self.config.codebook_size).to(residual_ND)
            sum_KD = torch.zeros_like(used[stage]).index_add_(0, digit_N, residual_ND)
            total = torch.tensor([float(len(z_ND))], device=z_ND.device)
            sum_over_processes(count_K, sum_KD, total)
            # relative to an even split, so that decay and dead_share mean the same for every batch size
            scale = self.config.codebook_size / total
            self.count_LK[stage].lerp_(count_K * scale, 1 - self.config.decay)
            self.sum_LKD[stage].lerp_(sum_KD * scale, 1 - self.config.decay)
            self.codebook_LKD[stage] = self.sum_LKD[stage] / self.count_LK[stage].clamp_min(1e-6).unsqueeze(1)
            self._revive(stage, residual_ND)
            residual_ND = residual_ND - used[stage][digit_N]

    def _revive(self, stage: int, residual_ND: Tensor) -> None:
        dead_K = self.count_LK[stage] < self.config.dead_share
        if not dead_K.any():
            return
        fresh_ED = self.codebook_LKD[stage, dead_K]
        if is_first_process():  # the others may have no rows
            generator = torch.Generator().manual_seed(self.config.seed + 7919 * int(self.updates) + stage)
            rows = torch.randint(len(residual_ND), (len(fresh_ED),), generator=generator)
            fresh_ED = residual_ND[rows.to(residual_ND.device)]
        copy_from_first_process(fresh_ED)
        self.codebook_LKD[stage, dead_K] = fresh_ED
        self.count_LK[stage, dead_K] = 1.0
        self.sum_LKD[stage, dead_K] = fresh_ED
