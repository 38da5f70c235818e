"""Items encoded by a tokenizer in training: content by row, vectors as SIDs decode, gradients to what makes the SIDs."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.data.format import open_items, scan_vocabularies
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.fusion.config import QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.item_store import ItemStore
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.ranker.tuning import ItemRows, TokenizedItems

ITEMS = 150


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> ItemStream:
    folder = tmp_path_factory.mktemp("items")
    config = SyntheticConfig(items=ITEMS, users=2, categories=4, text_dim=12, image_dim=8, missing=0.2)
    write_synthetic(config, folder)
    targets = ("category", "tags")
    return ItemStream.open(folder, ("text_emb", "image_emb"), scan_vocabularies(open_items(folder), targets))


@pytest.fixture(scope="module")
def store(stream, tmp_path_factory) -> ItemStore:
    folder = tmp_path_factory.mktemp("store") / "items"
    ItemStore.write(stream, folder)
    return ItemStore.open(folder)


def all_items(stream: ItemStream) -> ItemTensors:
    return next(block for _, block in stream.blocks())


def assert_equal(one: ItemTensors, other: ItemTensors) -> None:
    for part in ("sources", "present", "labels", "labelled"):
        assert getattr(one, part).keys() == getattr(other, part).keys()
        for name, value in getattr(one, part).items():
            torch.testing.assert_close(getattr(other, part)[name], value, rtol=0, atol=0)


def test_the_store_gives_items_by_row(stream, store):
    rows = torch.tensor([149, 3, 3, 0])
    assert_equal(all_items(stream).select(rows), store.select(rows))
    assert not store.select(torch.arange(ITEMS)).present["text_emb"].all()  # some lack it


def test_a_store_appears_whole_or_not_at_all(stream, tmp_path, monkeypatch):
    blocks = ItemStream.blocks

    def breaks(self, *args):
        yield from blocks(self, 50)
        raise OSError("no space left")

    monkeypatch.setattr(ItemStream, "blocks", breaks)
    with pytest.raises(OSError, match="no space"):
        ItemStore.write(stream, tmp_path / "items")
    assert not list(tmp_path.iterdir())


def make_model(stream: ItemStream, kind: str, stages: str) -> VQFusion:
    torch.manual_seed(0)
    targets = {
        name: TargetConfig(num_classes=len(v), multi_label=v.multi_label) for name, v in stream.vocabularies.items()
    }
    config = VQFusionConfig(
        sources={"text_emb": 12, "image_emb": 8},
        targets=targets,
        latent_dim=8,
        hidden_dim=16,
        dropout=0.0,
        prefix_share=0.0,
        quantizer=QuantizerConfig(kind=kind, stages=stages),
    )
    model = VQFusion(config)
    model.start(all_items(stream))
    return model


def kjt(rows: list[int]) -> KeyedJaggedTensor:
    values = ItemRows().values(np.array(rows, np.int32))["item"]
    return KeyedJaggedTensor(keys=["item"], values=values, lengths=torch.tensor([len(rows)]))


@pytest.mark.parametrize(
    ("kind", "stages"), [("dpca", "ternary*6"), ("dpca", "onehot:4,ternary*3"), ("rq", "onehot:8*2")]
)
def test_vectors_are_what_the_sids_decode_to(stream, store, kind, stages):
    model = make_model(stream, kind, stages)
    items = TokenizedItems(model, store, own_weight=1.0).eval()
    rows = [5, 149, 5, 0, 77]
    with torch.no_grad():
        vectors_ND, own_loss = items(kjt(rows))
    tokenizer = Tokenizer(model, stream.vocabularies)
    decoded_ND = tokenizer.codec.decode(tokenizer.encode(all_items(stream).select(torch.tensor(rows))))
    torch.testing.assert_close(vectors_ND, decoded_ND * 8**0.5, rtol=1e-4, atol=1e-5)
    assert own_loss == 0


def test_a_missing_item_is_a_zero_vector_and_has_no_loss_of_its_own(stream, store):
    items = TokenizedItems(make_model(stream, "dpca", "ternary*6"), store, own_weight=0.5).train()
    vectors_ND, own_loss = items(kjt([7, -1, 30, -1]))
    expected_ND, expected_loss = items(kjt([7, 30]))
    assert vectors_ND[[0, 2]].equal(expected_ND) and not vectors_ND[[1, 3]].any()
    torch.testing.assert_close(own_loss, expected_loss)


def test_gradients_reach_what_makes_the_sids(stream, store):
    """Of labels alone, without the tokenizer's own loss: encoders and basis; decoders and heads have no part in it."""
    items = TokenizedItems(make_model(stream, "dpca", "ternary*6"), store, own_weight=0.0).train()
    vectors_ND, _ = items(kjt(list(range(100))))
    (vectors_ND * torch.randn(vectors_ND.shape)).sum().backward()
    moved = {name for name, p in items.tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("encoders.text_emb", "encoders.image_emb", "absent", "fuse", "quantizer"):
        assert any(name.startswith(part) for name in moved), part
    assert not any(name.startswith(("decoders", "heads")) for name in moved)


def test_its_own_loss_is_the_tokenizers_over_the_batchs_items(stream, store):
    """Each item once, however often it is met."""
    items = TokenizedItems(make_model(stream, "dpca", "ternary*6"), store, own_weight=0.5).train()
    expected, _, _ = items.tokenizer(store.select(torch.tensor([1, 7, 30])))
    torch.testing.assert_close(items(kjt([7, 30, 7, 7, 1]))[1], 0.5 * expected)


def test_some_digits_are_left_out_of_vectors_in_training_alone(stream, store):
    model = make_model(stream, "dpca", "ternary*6")
    rows = list(range(100))
    of_all, _ = TokenizedItems(model, store, own_weight=1.0).train()(kjt(rows))
    items = TokenizedItems(model, store, own_weight=1.0, digit_dropout=0.5).train()
    of_some, own_loss = items(kjt(rows * 2))
    assert of_some[:100].equal(of_some[100:])  # item by item, not event by event
    # each of the 2^6 ways of leaving digits out gives a vector; one of them is what came
    tables = torch.stack([t[d.long()] for t, d in zip(model.quantizer.digit_tables(), digits_of(model, store, rows).T)])
    is_off_SL = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    ways_SND = of_all - torch.einsum("sl,lnd->snd", is_off_SL, tables) * 8**0.5
    distance_SN = (ways_SND - of_some[:100]).norm(dim=2)
    assert distance_SN.min(0).values.max() < 1e-4
    assert distance_SN[0].max() > 0.1  # digits have been left out
    torch.testing.assert_close(own_loss, TokenizedItems(model, store, own_weight=1.0).train()(kjt(rows))[1])
    assert items.eval()(kjt(rows))[0].equal(of_all.detach())


def digits_of(model: VQFusion, store: ItemStore, rows: list[int]) -> torch.Tensor:
    return model.quantizer.encode(model.latent(store.select(torch.tensor(rows))))
