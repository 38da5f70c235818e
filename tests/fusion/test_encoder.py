"""The float32 filter changes no digit, whatever the network and the batches; and its bound holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.fusion import encoder as module
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionConfig
from sidrec_torchrec.fusion.encoder import Encoder, _Bound, encoding_part
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
from sidrec_torchrec.fusion.tokenizer import Tokenizer

STAGES = ("ternary*25", "onehot:16,ternary*10", "onehot:32*3")


def make_model(stages: str, hidden: int, scale: float, seed: int) -> VQFusion:
    """A started model, its perceptrons with weights of this size."""
    torch.manual_seed(seed)
    quantizer = QuantizerConfig(kind="rq" if stages == "onehot:32*3" else "dpca", stages=stages)
    sizes = {"latent_dim": 16, "hidden_dim": hidden, "quantizer": quantizer}
    model = VQFusion(VQFusionConfig(sources={"a": 24, "b": 40}, **sizes)).eval()
    items = make_items(600, seed)
    for name, x_ND in items.sources.items():
        model.standardize[name].set(x_ND.mean(0), x_ND.var(0, correction=0).sum())
    model.start(items)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".output." in name or ".hidden." in name:
                parameter.normal_(0, scale / parameter.shape[-1] ** 0.5)
        model.quantizer.initialize(model.latent(items))
    return model


def make_items(count: int, seed: int, spread: float = 1.0) -> ItemTensors:
    generator = torch.Generator().manual_seed(seed)
    sources = {n: spread * torch.randn(count, d, generator=generator) + 0.3 for n, d in (("a", 24), ("b", 40))}
    present = {name: torch.rand(count, generator=generator) < 0.9 for name in sources}
    return ItemTensors(sources, present)


def exactly(model: VQFusion, items: ItemTensors) -> torch.Tensor:
    exact = encoding_part(model).double()
    return exact.quantizer.encode(exact.latent(items))


@settings(max_examples=12, deadline=None)
@given(
    stages=st.sampled_from(STAGES),
    hidden=st.sampled_from([0, 32, 128]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    spread=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_digits_are_those_of_float64_and_the_bound_holds(stages, hidden, scale, spread, seed):
    model, items = make_model(stages, hidden, scale, seed), make_items(3000, seed + 1, spread)
    encoder = Encoder(model)
    expected_NL = exactly(model, items)
    assert torch.equal(encoder.digits(items), expected_NL)
    parts = [encoder.digits(items.select(slice(i, i + 700))) for i in range(0, 3000, 700)]
    assert torch.equal(torch.cat(parts), expected_NL)
    latent_ND, error_N = _Bound.of(encoder._fast).latent(encoder._fast, items)
    torch.testing.assert_close(latent_ND, encoder._fast.latent(items))
    off_N = (latent_ND.double() - encoder._exact.latent(items)).norm(dim=1)
    assert (off_N <= 0.2 * error_N).all()


def test_items_at_thresholds_are_decided_in_float64():
    """Items whose latent stands half-way between two digits, but for less than float32 tells."""
    model = make_model("ternary*25", 0, 1.0, 0)
    items = make_items(2000, 1)
    encoder = Encoder(model)
    exact = encoder._exact
    z_ND = exact.latent(items)
    digits_NL = exact.quantizer.encode(z_ND)
    step_D = exact.quantizer.basis_RD[0]  # the first digit's threshold is half a step from its levels
    along_N = ((z_ND - exact.quantizer.mean_D) @ step_D) / step_D.square().sum()
    nudge_ND = (along_N.round() + 0.5 - along_N).unsqueeze(1) * step_D
    moved = {"a": items.sources["a"].double() + (nudge_ND @ torch.linalg.pinv(exact.encoders["a"].linear.weight).T)
             / exact.standardize["a"].scale, "b": items.sources["b"]}  # fmt: skip
    near = ItemTensors({n: x.float() for n, x in moved.items()}, {n: torch.ones(2000, dtype=torch.bool) for n in moved})
    assert torch.equal(encoder.digits(near), exactly(model, near))
    assert not torch.equal(encoder.digits(near), digits_NL)


def test_few_items_and_reduced_precision_are_encoded_in_float64_alone(monkeypatch):
    model, items = make_model("ternary*25", 32, 1.0, 0), make_items(1000, 1)
    encoder = Encoder(model)
    expected_NL = exactly(model, items)
    assert torch.equal(encoder.digits(items.select(slice(0, 5))), expected_NL[:5])
    monkeypatch.setattr(module, "float32_is_ieee", lambda: False)
    assert not encoder._filters(encoder._search, 1000)
    assert torch.equal(encoder.digits(items), expected_NL)


def test_the_encoder_carries_no_decoders():
    encoder = Encoder(make_model("ternary*25", 32, 1.0, 0))
    for part in (encoder._exact, encoder._fast):
        assert not part.decoders and not part.heads
    assert {p.dtype for p in encoder._exact.parameters()} == {torch.float64}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_its_row(value):
    model, items = make_model("ternary*25", 32, 1.0, 0), make_items(1000, 1)
    items.present["a"][700] = True
    items.sources["a"][700, 3] = value
    with pytest.raises(ValueError, match="row 700 holds a value that is not finite"):
        Tokenizer(model, {}).encode(items)
