"""What makes SIDs of items: the same digits for an item whatever its batch, process and device.

In float32 some product of a large corpus always lies at a threshold, and how items are batched moves its last bits. So float64
decides, but float32 filters, as in the search for digits (``codec/search.py``): on CPU the latent is computed in float32, with
a bound on how far rounding can have moved it, the search tells which items have no threshold within that bound, and the others
are encoded again in float64.

The bound is a probabilistic one (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 3.1): of
m roundings, independent and as often up as down, the sum grows with the root of m. Partial sums of a product w x are no larger
than |w| |x| (Cauchy-Schwarz), so that the error of W x has a mean square of at most m u^2 / 3 |W|_F^2 |x|^2, u being the unit
roundoff. Twice its root is taken, over some hundred components at once; no error above a hundredth of the bound has been seen.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.plan import float32_is_ieee
from sidrec_torchrec.codec.search import Search
from sidrec_torchrec.fusion.model import ItemTensors, Perceptron, Residual, VQFusion
from sidrec_torchrec.names import ModulesByName, escape

_U = 2.0**-24  # unit roundoff of float32
_SPREAD = 2 / 3**0.5  # roots of mean squares to be on the safe side of, by the root of a rounding's own
_GELU_SLOPE = 1.13  # its derivative's largest size, at x = sqrt(2): 1.1290
_GELU_ERROR = 16 * _U  # of its evaluation, relative to the input: erf is good to 1.5e-7
_SLACK = 1.05  # for what is of second order, and for the rounding of the bound itself
_AT_ONCE = 2048  # items whose hidden units stay in cache
_FEWEST = 256  # items: for fewer, a second pass costs more than the first one saves


class Encoder:
    """Items to digits.

    Args:
        model: a trained tokenizer's, in evaluation; its weights are copied, without the decoders, which encoding has no
            need of.
    """

    def __init__(self, model: VQFusion) -> None:
        self._exact = encoding_part(model).double()
        self._search = self._exact.quantizer.search()

    def to(self, device: torch.device) -> "Encoder":
        """Moves it to ``device``, itself."""
        self._exact.to(device)
        self._search = self._exact.quantizer.search()
        return self

    @cached_property
    def _fast(self) -> VQFusion:
        """The float32 filter's copy."""
        return copy.deepcopy(self._exact).float()

    @cached_property
    def _bound(self) -> "_Bound":
        """Made late: each of its norms takes a singular value decomposition, for which decoders and GPUs have no use."""
        return _Bound.of(self._fast)

    @property
    def device(self) -> torch.device:
        """Where items are encoded."""
        return self._exact.quantizer.offset.device

    @torch.no_grad()
    def digits(self, items: ItemTensors) -> Tensor:
        """Digits of items, int16 [N, L], where the encoder is; the items may be on any device.

        Raises:
            ValueError: on a value that is not finite; names the row.
        """
        items, search = items.to(self.device), self._search
        if search is None or not self._filters(search, len(items)):
            return self._exact.quantizer.encode(self._exact.latent(items))
        starts = range(0, len(items), _AT_ONCE)
        parts = [self._bound.latent(self._fast, items.select(slice(i, i + _AT_ONCE))) for i in starts]
        latent_ND, error_N = (torch.cat(values) for values in zip(*parts, strict=True))
        digits_NL, sure_N = search.filtered(latent_ND, error_N)
        unsure_M = (~sure_N).nonzero().squeeze(1)
        if len(unsure_M):
            exact_MD = self._exact.latent(items.select(unsure_M))
            digits_NL[unsure_M] = search.encode(exact_MD, rows=unsure_M)
        return digits_NL

    @torch.no_grad()
    def latents(self, items: ItemTensors) -> Tensor:
        """What digits are chosen to be near to, float64 [N, D], where the encoder is; the items may be on any device."""
        return self._exact.latent(items.to(self.device))

    def _filters(self, search: Search, num_items: int) -> bool:
        return num_items >= _FEWEST and self.device.type == "cpu" and search.has_filter and float32_is_ieee()


def encoding_part(model: VQFusion) -> VQFusion:
    """A copy of what a SID depends on: no decoders, no heads, no statistics of sources that are not read."""
    part = copy.copy(model)
    part._modules = dict(model._modules)
    part.decoders, part.heads = ModulesByName(), ModulesByName()
    part.standardize = ModulesByName({name: model.standardize[name] for name in model.config.read_sources})
    return copy.deepcopy(part).eval().requires_grad_(False)


@dataclass(frozen=True)
class _Affine:
    """How far a map's output can be off, ``length * by_length + error * by_error + always``, and how long it can be.

    Args:
        by_length, by_error, always: given the input's length, and by how much the input is off already.
        reach, least: the output is at most ``length * reach + least`` long.
    """

    by_length: float
    by_error: float
    always: float
    reach: float
    least: float

    @staticmethod
    def linear(linear: nn.Linear) -> "_Affine":
        weight, bias = linear.weight.double(), linear.bias.double()
        gamma = _SPREAD * (2 * weight.shape[1] + 2) ** 0.5 * _U  # products, sums, and the bias
        norm, length = float(torch.linalg.matrix_norm(weight, 2)), float(bias.norm())
        return _Affine(gamma * float(weight.norm()), norm, gamma * length, norm, length)

    @staticmethod
    def perceptron(perceptron: Perceptron) -> "_Affine":
        """Scaling, a linear map, GELU, which is never longer than its input, and a linear map."""
        hidden, output = _Affine.linear(perceptron.hidden), _Affine.linear(perceptron.output)
        scale = perceptron.hidden.in_features**0.5
        # of the hidden units, before and after GELU, per length and error of the input, and always
        by_length = scale * (hidden.by_length + 2 * _U * hidden.by_error)
        by_error, always = scale * hidden.by_error, hidden.always
        reach, least = scale * hidden.reach, hidden.least
        by_length = _GELU_SLOPE * by_length + _GELU_ERROR * reach
        by_error, always = _GELU_SLOPE * by_error, _GELU_SLOPE * always + _GELU_ERROR * least
        return _Affine(
            by_length=output.by_error * by_length + output.by_length * reach,
            by_error=output.by_error * by_error,
            always=output.by_error * always + output.by_length * least + output.always,
            reach=output.reach * reach,
            least=output.reach * least + output.least,
        )

    def plus(self, other: "_Affine") -> "_Affine":
        """Of the sum of both outputs, itself rounded."""
        reach, least = self.reach + other.reach, self.least + other.least
        return _Affine(
            self.by_length + other.by_length + _U * reach,
            self.by_error + other.by_error,
            self.always + other.always + _U * least,
            reach,
            least,
        )


@dataclass(frozen=True)
class _Bound:
    """A bound on the length of a float32 latent's error."""

    sources: dict[str, _Affine]
    fuse: _Affine | None

    @staticmethod
    def of(model: VQFusion) -> "_Bound":
        sources = {name: _Bound._residual(cast(Residual, encoder)) for name, encoder in model.encoders.items()}
        return _Bound(sources, None if model.fuse is None else _Affine.perceptron(model.fuse))

    @staticmethod
    def _residual(encoder: Residual) -> _Affine:
        bound = _Affine.linear(encoder.linear)
        return bound if encoder.perceptron is None else bound.plus(_Affine.perceptron(encoder.perceptron))

    def latent(self, model: VQFusion, items: ItemTensors) -> tuple[Tensor, Tensor]:
        """``model.latent``, float32 [N, latent_dim], and how far each may be off, float32 [N]; not finite where items are not."""
        total_ND, error_N, length_N = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for name, bound in self.sources.items():
            x_ND, has_N = model.standardized(items, name), items.present[name]
            own_ND = torch.where(has_N.unsqueeze(1), model.encoders[name](x_ND), model.absent[escape(name)])
            total_ND = total_ND + own_ND
            error_N = error_N + length(x_ND) * (bound.by_length + 3 * _U * bound.by_error) + bound.always
            length_N = length_N + length(own_ND)
        error_N = error_N + len(self.sources) * _U * length_N
        if model.fuse is None or self.fuse is None:
            return total_ND, _SLACK * error_N
        fused_ND = model.fuse(total_ND)
        own_N = length(total_ND) * self.fuse.by_length + error_N * self.fuse.by_error + self.fuse.always
        z_ND = total_ND + fused_ND
        return z_ND, _SLACK * (error_N + own_N + _U * length(z_ND))


def length(x_ND: Tensor) -> Tensor:
    """Of each row, [N]."""
    return torch.linalg.vector_norm(x_ND, dim=1)
