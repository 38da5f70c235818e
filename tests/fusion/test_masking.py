"""What is missing counts for nothing; losses follow their formulas; SIDs depend on the item alone."""

import copy
import math

import pytest
import torch

from sidrec_torchrec.data.format import Vocabulary
from sidrec_torchrec.errors import CodecMismatchError, DataError
from sidrec_torchrec.fusion.config import QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.losses import TaskWeights, reconstruction_loss, target_loss
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
from sidrec_torchrec.fusion.tokenizer import Tokenizer

CONFIG = VQFusionConfig(
    sources={"text": 10, "image": 6},
    targets={
        "kind": TargetConfig(num_classes=3, multi_label=False),
        "tags": TargetConfig(num_classes=4, multi_label=True),
    },
    latent_dim=8,
    hidden_dim=16,
    quantizer=QuantizerConfig(stages="onehot:4,ternary*6"),
)
VOCABULARIES = {
    "kind": Vocabulary("kind", ("a", "b", "c"), multi_label=False),
    "tags": Vocabulary("tags", ("p", "q", "r", "s"), multi_label=True),
}


def make_items(n: int = 64, seed: int = 0) -> ItemTensors:
    """Items of a common latent; a fifth of the sources and labels missing, with rubbish in their place."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 4, generator=generator)
    mixers = {name: torch.randn(4, d, generator=torch.Generator().manual_seed(d)) for name, d in CONFIG.sources.items()}
    sources = {name: latent @ mix for name, mix in mixers.items()}
    present = {name: torch.rand(n, generator=generator) > 0.2 for name in sources}
    present["text"] |= ~present["image"]
    labelled = {name: torch.rand(n, generator=generator) > 0.2 for name in CONFIG.targets}
    kinds = torch.where(labelled["kind"], latent[:, :3].argmax(1), -1)
    return ItemTensors(
        sources={name: torch.where(present[name][:, None], x, 1e3) for name, x in sources.items()},
        present=present,
        labels={"kind": kinds, "tags": (latent > 0).float()},
        labelled=labelled,
    )


def make_model() -> VQFusion:
    torch.manual_seed(0)
    model = VQFusion(CONFIG)
    items = make_items(256)
    for name in CONFIG.sources:
        x_ND = items.sources[name][items.present[name]]
        model.standardize[name].set(x_ND.mean(0), x_ND.var(0, correction=0).sum())
    model.start(items)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model.eval()


def with_rubbish(items: ItemTensors) -> ItemTensors:
    """The same items, other values where something is missing."""
    items = copy.deepcopy(items)
    for name, x_ND in items.sources.items():
        x_ND[~items.present[name]] = -77.0
    items.labels["tags"][~items.labelled["tags"]] = 1.0
    return items


def test_missing_values_change_nothing():
    items, results = make_items(), []
    for given in (items, with_rubbish(items)):
        model = make_model()
        loss, losses_K, quantized = model(given)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), losses_K, quantized.digits_NL, *gradients))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-7)


def test_present_values_do_matter():
    model, items = make_model(), make_items()
    changed = copy.deepcopy(items)
    changed.sources["text"][items.present["text"]] += 1
    assert not torch.allclose(model.latent(items), model.latent(changed))


def test_losses_are_means_over_what_is_there():
    model, items = make_model(), make_items()
    _, losses_K, quantized = model(items)
    z_ND = quantized.z_q_ND
    for name, loss in zip(CONFIG.tasks, losses_K, strict=True):
        if name in CONFIG.sources:
            has_N = items.present[name]
            x_ND = model.standardize[name](items.sources[name][has_N])
            rows_N = (model.decoders[name](z_ND[has_N]) - x_ND).square().sum(1)
        elif name == "kind":
            has_N = items.labelled[name]
            probability_NC = model.heads[name](z_ND[has_N]).softmax(1)
            rows_N = -probability_NC[torch.arange(int(has_N.sum())), items.labels[name][has_N]].log()
        else:
            has_N = items.labelled[name]
            p_NC, y_NC = model.heads[name](z_ND[has_N]).sigmoid(), items.labels[name][has_N]
            rows_N = -(y_NC * p_NC.log() + (1 - y_NC) * (1 - p_NC).log()).mean(1)
        torch.testing.assert_close(loss, rows_N.mean().detach(), rtol=1e-4, atol=1e-5)


def test_uncertainty_weights():
    """L / (2 s^2) + log s for a reconstruction, L / s^2 + log s for a class; least at s^2 = L and s^2 = 2 L."""
    weights = TaskWeights({"x": 1.0, "y": 1.0}, {"x": True, "y": False}, learned=True)
    losses = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        weights.log_variance_K.copy_(torch.tensor([0.5, -0.4]))
    s = [math.exp(0.25), math.exp(-0.2)]
    by_hand = 0.3 / (2 * s[0] ** 2) + math.log(s[0]) + 0.7 / s[1] ** 2 + math.log(s[1])
    assert float(weights(losses).detach()) == pytest.approx(by_hand, rel=1e-5)
    with torch.no_grad():
        weights.log_variance_K.copy_(torch.tensor([math.log(0.3), math.log(1.4)]))
    weights(losses).backward()
    torch.testing.assert_close(weights.log_variance_K.grad, torch.zeros(2), atol=1e-6, rtol=0)


def test_fixed_weights():
    weights = TaskWeights({"x": 2.0, "y": 0.5}, {"x": True, "y": False}, learned=False)
    assert float(weights(torch.tensor([0.3, 0.7]))) == pytest.approx(0.95)


def test_loss_formulas():
    x_ND, y_ND = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert reconstruction_loss(x_ND, y_ND).tolist() == [5.0]
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    losses = target_loss(logits, torch.tensor([1, -1])).tolist()
    assert losses == pytest.approx([math.log(2), 0.0])
    multi = target_loss(logits[1:], torch.tensor([[1.0, 0.0]])).tolist()
    assert multi == pytest.approx([(math.log(1 + math.exp(-2)) + math.log(2)) / 2])


def test_sid_does_not_depend_on_the_batch(tmp_path):
    tokenizer, items = Tokenizer(make_model(), VOCABULARIES), make_items(100)
    whole = tokenizer.encode(items)
    for size in (1, 7):
        parts = [tokenizer.encode(items.select(slice(i, i + size))) for i in range(0, 100, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_saved_tokenizer_gives_the_same_sids(tmp_path):
    tokenizer, items = Tokenizer(make_model(), VOCABULARIES), make_items(100)
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.codec.spec == tokenizer.codec.spec and loaded.vocabularies == VOCABULARIES
    words_NW = tokenizer.encode(items)
    assert torch.equal(loaded.encode(items), words_NW)
    decoded = loaded.decode(words_NW)
    z_ND = tokenizer.codec.decode(words_NW)
    model = tokenizer.model
    expected = model.standardize["text"].invert(model.decoders["text"](z_ND))
    torch.testing.assert_close(decoded.sources["text"], expected)
    torch.testing.assert_close(decoded.probabilities["kind"].sum(1), torch.ones(100))


def test_broken_tokenizers_are_refused(tmp_path):
    tokenizer = Tokenizer(make_model(), VOCABULARIES)
    tokenizer.save(tmp_path / "t")
    with pytest.raises(DataError, match="not found"):
        Tokenizer.load(tmp_path / "nothing")
    state = torch.load(tmp_path / "t" / "tokenizer.pt")
    state["encoders.text.linear.bias"] += 1
    torch.save(state, tmp_path / "t" / "tokenizer.pt")
    with pytest.raises(CodecMismatchError, match="restore the folder, or train again"):
        Tokenizer.load(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.pt").write_bytes(b"no weights")
    with pytest.raises(DataError, match="not a tokenizer, or a broken one"):
        Tokenizer.load(tmp_path / "t")


def test_fingerprint_covers_encoding_and_nothing_else():
    model = make_model()
    before = Tokenizer(copy.deepcopy(model), VOCABULARIES).codec.spec.fingerprint
    with torch.no_grad():
        model.heads["kind"].linear.weight += 1
    assert Tokenizer(copy.deepcopy(model), VOCABULARIES).codec.spec.fingerprint == before
    with torch.no_grad():
        model.absent["image"] += 1
    assert Tokenizer(copy.deepcopy(model), VOCABULARIES).codec.spec.fingerprint != before


def test_config_is_checked():
    with pytest.raises(ValueError, match="at least one source"):
        VQFusionConfig(sources={})
    with pytest.raises(ValueError, match="unknown task 'genre'"):
        VQFusionConfig(sources={"x": 3}, weights={"genre": 1.0})
    with pytest.raises(ValueError, match="residual VQ takes one-hot digits"):
        QuantizerConfig(kind="rq", stages="ternary*3")


def test_items_of_vectors_alone():
    model = make_model()
    items = make_items()
    rows = items.present["text"] & items.present["image"]
    whole = items.select(rows)
    tokenizer = Tokenizer(model, VOCABULARIES)
    vectors = {name: x_ND.numpy() for name, x_ND in whole.sources.items()}
    assert torch.equal(tokenizer.encode(ItemTensors.of(vectors)), tokenizer.encode(whole))

    vectors["image"][3] = 0.0  # as in a file: it has none
    whole.present["image"][3] = False
    assert torch.equal(tokenizer.encode(ItemTensors.of(vectors)), tokenizer.encode(whole))
    with pytest.raises(ValueError, match="'image' is not given"):
        tokenizer.encode(ItemTensors.of({"text": vectors["text"]}))
