"""Quantizers of vector-quantize-pytorch behind our interface, to stand inside VQ Fusion in DPCA's place."""

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ

from sidrec_torchrec.codec.quantizer import QuantizerOutput


class FSQ3(nn.Module):
    """Finite scalar quantization of ``num_digits`` coordinates to 3 levels (Mentzer et al. 2023).

    Its linear maps from and to the latent start at the latent's principal components, as DPCA's basis does, for else it
    would have to find in training what the others start from.
    """

    def __init__(self, dim: int, num_digits: int) -> None:
        super().__init__()
        self.radices = [3] * num_digits
        # 3^25 indices overflow its int32; digits are read off the rounded coordinates
        self.fsq = FSQ(levels=self.radices, dim=dim, return_indices=False)

    @torch.no_grad()
    def initialize(self, z_ND: Tensor) -> None:
        _start_at_principal_axes(self.fsq.project_in, self.fsq.project_out, z_ND, 1.0)

    def forward(self, z_ND: Tensor) -> QuantizerOutput:
        out_ND, _ = self.fsq(z_ND.unsqueeze(0))
        with torch.no_grad():
            codes_NL = self.fsq.quantize(self.fsq.project_in(z_ND).unsqueeze(1)).squeeze(1)
        return QuantizerOutput(out_ND.squeeze(0), (codes_NL + 1).round().to(torch.int16), z_ND.new_zeros(()))


class LFQ4(nn.Module):
    """Lookup-free quantization (Yu et al. 2023): codebooks of ``bits_each`` signs, with its entropy and commitment losses."""

    def __init__(self, dim: int, num_codebooks: int, bits_each: int) -> None:
        super().__init__()
        self.radices = [2] * (num_codebooks * bits_each)
        self.bits_each = bits_each
        self.lfq = LFQ(dim=dim, codebook_size=2**bits_each, num_codebooks=num_codebooks, commitment_loss_weight=0.25)

    @torch.no_grad()
    def initialize(self, z_ND: Tensor) -> None:
        # a sign stands for the mean size of a normal number
        _start_at_principal_axes(self.lfq.project_in, self.lfq.project_out, z_ND, (2 / torch.pi) ** 0.5)

    def forward(self, z_ND: Tensor) -> QuantizerOutput:
        out_1ND, indices_1NC, loss = self.lfq(z_ND.unsqueeze(0))
        shifts = torch.arange(self.bits_each)
        digits_NL = (indices_1NC[0].unsqueeze(2) >> shifts & 1).flatten(1)
        return QuantizerOutput(out_1ND[0], digits_NL.to(torch.int16), loss)


def _start_at_principal_axes(project_in: nn.Linear, project_out: nn.Linear, z_ND: Tensor, size: float) -> None:
    """To the latent's first principal coordinates at standard deviation 1, and back from levels of ``size``."""
    mean_D = z_ND.mean(0)
    _, values_D, axes_DD = torch.linalg.svd(z_ND - mean_D, full_matrices=False)
    axes_LD = axes_DD[: project_in.out_features]
    scale_L = values_D[: project_in.out_features] / len(z_ND) ** 0.5
    project_in.weight.copy_(axes_LD / scale_L.unsqueeze(1))
    project_in.bias.copy_(-(mean_D @ axes_LD.T) / scale_L)
    project_out.weight.copy_((axes_LD * scale_L.unsqueeze(1)).T * size)
    project_out.bias.copy_(mean_D)
