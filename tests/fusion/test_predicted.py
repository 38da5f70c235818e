"""Predicted sources: SIDs learn to tell them, and never read them."""

import pytest
import torch

from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionConfig
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
from sidrec_torchrec.fusion.tokenizer import Tokenizer


def make_model() -> VQFusion:
    torch.manual_seed(0)
    config = VQFusionConfig(
        sources={"text": 8, "tastes": 3},
        predicted=("tastes",),
        latent_dim=4,
        hidden_dim=16,
        quantizer=QuantizerConfig(stages="ternary*6"),
    )
    model = VQFusion(config)
    model.start(make_items())
    return model.eval()


def make_items(n: int = 64) -> ItemTensors:
    """Tastes are a function of the text."""
    text_ND = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    every_N = torch.ones(n, dtype=torch.bool)
    return ItemTensors({"text": text_ND, "tastes": 3 * text_ND[:, :3]}, {"text": every_N, "tastes": every_N})


def without_tastes(items: ItemTensors) -> ItemTensors:
    return ItemTensors({"text": items.sources["text"]}, {"text": items.present["text"]})


def test_sids_do_not_need_them(tmp_path):
    items, tokenizer = make_items(), Tokenizer(make_model(), {})
    words_NW = tokenizer.encode(items)
    assert torch.equal(tokenizer.encode(without_tastes(items)), words_NW)
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.model.config == tokenizer.model.config
    assert torch.equal(loaded.encode(without_tastes(items)), words_NW)
    assert loaded.decode(words_NW).sources["tastes"].shape == (64, 3)


def test_their_scale_is_not_part_of_the_codec():
    model = make_model()
    fingerprint = Tokenizer(model, {}).codec.spec.fingerprint
    model.standardize["tastes"].set(torch.ones(3), torch.tensor(5.0))
    assert Tokenizer(model, {}).codec.spec.fingerprint == fingerprint
    model.standardize["text"].set(torch.ones(8), torch.tensor(5.0))
    assert Tokenizer(model, {}).codec.spec.fingerprint != fingerprint


def test_they_shape_the_latent():
    """What is predicted draws the encoder towards it, though it is not read."""
    model, items = make_model(), make_items()
    latent_ND = model.latent(items)
    loss_N, _ = model.task_losses(latent_ND, items)["tastes"]
    assert loss_N.mean().item() == pytest.approx(items.sources["tastes"].square().sum(1).mean().item())  # starts at 0
    with torch.no_grad():
        model.decoders["tastes"].linear.weight.normal_()
    loss_N, _ = model.task_losses(model.latent(items), items)["tastes"]
    loss_N.sum().backward()
    assert model.encoders["text"].linear.weight.grad.abs().sum() > 0
    assert "tastes" not in model.encoders and "tastes" not in model.absent


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="predicted source 'y' is not a source; there are x"):
        VQFusionConfig(sources={"x": 3}, predicted=("y",))
    with pytest.raises(ValueError, match="at least one source to read"):
        VQFusionConfig(sources={"x": 3}, predicted=("x",))
