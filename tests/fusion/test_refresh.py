"""A tokenizer that refreshes another: the codec stays, digits are pulled back, weights are taken as they are."""

import copy
import dataclasses

import pytest
import torch

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.keep import moved
from sidrec_torchrec.data.format import Vocabulary
from sidrec_torchrec.errors import CodecMismatchError, DataError, SidrecError
from sidrec_torchrec.fusion.config import Keep, QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.model import DIGITS, ItemTensors, VQFusion
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.fusion.warm_start import take_weights

N = 80
DPCA, RQ = QuantizerConfig(stages="ternary*6"), QuantizerConfig(kind="rq", stages="onehot:8*2")
COLORS = Vocabulary("color", ("blue", "green", "red"), False)


def make_items(num_classes: int = 3, seed: int = 0) -> ItemTensors:
    generator = torch.Generator().manual_seed(seed)
    present = {"a": torch.rand(N, generator=generator) > 0.2, "b": torch.ones(N, dtype=torch.bool)}
    return ItemTensors(
        sources={"a": torch.randn(N, 5, generator=generator), "b": torch.randn(N, 4, generator=generator)},
        present=present,
        labels={"color": torch.randint(num_classes, (N,), generator=generator)},
        labelled={"color": torch.ones(N, dtype=torch.bool)},
    )


def make_model(seed: int = 0, num_classes: int = 3, **changes) -> VQFusion:
    torch.manual_seed(seed)
    values = {
        "sources": {"a": 5, "b": 4},
        "targets": {"color": TargetConfig(num_classes=num_classes, multi_label=False)},
        "latent_dim": 8,
        "hidden_dim": 8,
        "quantizer": DPCA,
    }
    model = VQFusion(VQFusionConfig(**values | changes))
    for name, standardize in model.standardize.items():
        standardize.set(torch.full((model.config.sources[name],), 0.1 * seed), torch.tensor(4.0))
    return model


def started(**changes) -> VQFusion:
    """A model that is more than its closed form: perceptrons that do something."""
    model = make_model(**changes)
    model.start(make_items())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("quantizer"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def publish(items: ItemTensors, model: VQFusion) -> ItemTensors:
    """The items with the model's SIDs, but for the last ten, which have none."""
    digits_NL = Tokenizer(copy.deepcopy(model), {}).digits(items)
    digits_NL[-10:] = -1
    return dataclasses.replace(items, published={DIGITS: digits_NL})


@pytest.mark.parametrize("quantizer", [DPCA, RQ], ids=["dpca", "rq"])
def test_training_holds_the_codec_and_pulls_digits_back(quantizer):
    """Encoders are knocked off, then trained by the pull alone: every published SID comes back, and no codeword moves."""
    model = started(quantizer=quantizer)
    items = publish(make_items(), model)
    before = Codec.of(model.quantizer, "before")
    model.hold(Keep(weight=2.0, margin=0.1))
    with torch.no_grad():
        for parameter in model.encoders.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    rates = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    knocked_NL = Tokenizer(copy.deepcopy(model), {}).digits(items)
    assert (knocked_NL != items.published[DIGITS])[:-10].any(1).float().mean() > 0.3
    for _ in range(100):
        rates.zero_grad()
        model(items)  # its own loss: what would move codewords does not
        model.keep_loss(items).backward()
        rates.step()
    published_NL = items.published[DIGITS]
    digits_NL = Tokenizer(model, {}).digits(items)
    assert torch.equal(digits_NL[:-10], published_NL[:-10])
    assert before.decodes_as(Codec.of(model.quantizer, "after"))


def test_dropout_may_be_chosen_anew():
    model = started(dropout=0.0).train()
    before_ND = model.latent(make_items())
    model.drop(0.5)
    assert (model.latent(make_items()) != before_ND).any(1).all()
    model.drop(0.0)
    torch.testing.assert_close(model.latent(make_items()), before_ND)


def test_the_loss_of_keeping_is_the_mean_over_published_items_without_dropout():
    model = started(dropout=0.5)
    items = publish(make_items(), model)
    with torch.no_grad():
        model.encoders["b"].linear.bias.add_(0.1)
    plain, _, _ = model.eval()(items)
    model.hold(Keep(weight=3.0, margin=0.2))
    z_ND = model.latent(items)[:-10]
    quantizer = model.quantizer
    moved_N = moved(z_ND, quantizer.offset, quantizer.digit_tables(), items.published[DIGITS][:-10], margin=0.2)
    torch.testing.assert_close(model(items)[0] - plain, 3 * moved_N.mean())
    torch.testing.assert_close(model.train().keep_loss(items), 3 * moved_N.mean())
    assert model.encoders["b"].perceptron.dropout.training  # as it was


def test_a_refreshed_tokenizer_is_of_the_codec_it_refreshes(tmp_path):
    old = Tokenizer(started(), {"color": COLORS})
    model = copy.deepcopy(old.model)
    with torch.no_grad():
        model.encoders["a"].linear.weight.add_(0.1)
    refreshed = Tokenizer(model, {"color": COLORS}, codec=old.codec)
    assert old.encoding == old.codec.spec.fingerprint == refreshed.codec.spec.fingerprint != refreshed.encoding
    refreshed.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert (loaded.codec.spec.fingerprint, loaded.encoding) == (old.encoding, refreshed.encoding)
    items = make_items()
    assert torch.equal(loaded.encode(items), refreshed.encode(items))
    assert not torch.equal(loaded.encode(items), old.encode(items))

    old.codec.save(tmp_path / "old")
    loaded.codec.save(tmp_path / "new")  # readers know their codec by these files
    assert (tmp_path / "old" / "codec.json").read_bytes() == (tmp_path / "new" / "codec.json").read_bytes()

    with torch.no_grad():
        model.quantizer.basis_RD.mul_(1.01)
    with pytest.raises(CodecMismatchError, match=f"decodes digits otherwise than codec {old.encoding}"):
        Tokenizer(model, {"color": COLORS}, codec=old.codec)


def test_a_refreshed_folder_with_other_files_is_refused(tmp_path):
    old = Tokenizer(started(), {})
    model = copy.deepcopy(old.model)
    with torch.no_grad():
        model.encoders["a"].linear.weight.add_(0.1)
    Tokenizer(model, {}, codec=old.codec).save(tmp_path / "t")
    other = Tokenizer(started(seed=1), {})
    weights = torch.load(tmp_path / "t" / "tokenizer.pt", weights_only=True)
    torch.save(old.model.state_dict(), tmp_path / "t" / "tokenizer.pt")
    with pytest.raises(CodecMismatchError, match="beside the description of"):
        Tokenizer.load(tmp_path / "t")
    torch.save(weights, tmp_path / "t" / "tokenizer.pt")
    other.codec.save(tmp_path / "t" / "codec")
    with pytest.raises(CodecMismatchError, match="decodes digits otherwise"):
        Tokenizer.load(tmp_path / "t")
    (tmp_path / "t" / "codec" / "codec.pt").unlink()
    with pytest.raises(DataError):
        Tokenizer.load(tmp_path / "t")


@pytest.mark.parametrize("quantizer", [DPCA, RQ], ids=["dpca", "rq"])
def test_a_warm_start_encodes_and_decodes_as_the_old_one(quantizer):
    old = Tokenizer(started(quantizer=quantizer), {"color": COLORS})
    model = make_model(seed=1, quantizer=quantizer)
    model.start(make_items(seed=1))
    take_weights(model, {"color": COLORS}, old)
    items = make_items(seed=2)
    new = Tokenizer(model, {"color": COLORS})
    assert new.encoding == old.encoding
    assert torch.equal(new.encode(items), old.encode(items))
    own, its = (tokenizer.decode(old.encode(items)) for tokenizer in (new, old))
    for name in ("a", "b"):
        torch.testing.assert_close(own.sources[name], its.sources[name], rtol=0, atol=0)
    torch.testing.assert_close(own.probabilities["color"], its.probabilities["color"], rtol=0, atol=0)


def test_classes_are_taken_by_name():
    """A category of today stands between those of yesterday: their logits stay theirs."""
    grown = Vocabulary("color", ("blue", "cyan", "green"), False)
    old = Tokenizer(started(), {"color": COLORS})
    model = make_model(seed=1)
    model.start(make_items(seed=1))
    fresh = copy.deepcopy(model)
    take_weights(model, {"color": grown}, old)
    z_ND = torch.randn(10, 8)
    logits_NC, old_NC = model.eval().heads["color"](z_ND), old.model.heads["color"](z_ND)
    torch.testing.assert_close(logits_NC[:, [0, 2]], old_NC[:, [0, 1]])
    own, start = (head.linear.bias[1].detach() for head in (model.heads["color"], fresh.heads["color"]))
    assert float(own) == float(start)  # cyan begins where the closed form puts it


def test_what_is_only_predicted_is_measured_anew():
    """Another decomposition of other events: its scale is today's, and no part of a SID."""
    old = Tokenizer(started(predicted=("b",)), {"color": COLORS})
    model = make_model(seed=3, predicted=("b",))
    model.start(make_items(seed=1))
    take_weights(model, {"color": COLORS}, old)
    assert torch.equal(model.standardize["b"].mean_D, torch.full((4,), 0.3))
    assert torch.equal(model.standardize["a"].mean_D, old.model.standardize["a"].mean_D)
    assert Tokenizer(model, {"color": COLORS}).encoding == old.encoding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 6}, "latent_dim is 6, was 8"),
        ({"hidden_dim": 0}, "hidden_dim is 0, was 8"),
        ({"quantizer": RQ}, "quantizer is rq onehot:8\\*2, was dpca ternary\\*6"),
        ({"predicted": ("b",)}, "sources is .*, was .*b"),
    ],
)
def test_another_architecture_is_refused(changes, message):
    old = Tokenizer(started(), {"color": COLORS})
    model = make_model(**changes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SidrecError, match=message):
        take_weights(model, {"color": COLORS}, old)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"weight": -1.0}, {"margin": 0.5}, {"margin": -0.1}, {"margin": float("nan")}])
def test_bad_values(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Keep(**changes)
