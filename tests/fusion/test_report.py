"""The tokenizer's report against the same numbers from numpy."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from sidrec_torchrec.data.format import Vocabulary
from sidrec_torchrec.fusion.config import QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion
from sidrec_torchrec.fusion.report import TokenizerReport
from sidrec_torchrec.fusion.tokenizer import Tokenizer

N, DEPTHS = 90, (0, 2, 4)
VOCABULARIES = {
    "kind": Vocabulary("kind", ("a", "b", "c"), multi_label=False),
    "tags": Vocabulary("tags", ("p", "q"), multi_label=True),
}


@pytest.fixture(scope="module")
def items() -> ItemTensors:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(N, 5, generator=generator)
    has_N = torch.rand(N, generator=generator) > 0.2
    return ItemTensors(
        sources={"x": torch.where(has_N[:, None], 3 * x_ND + 1, float("nan"))},
        present={"x": has_N},
        labels={"kind": torch.where(has_N, x_ND[:, :3].argmax(1), -1), "tags": (x_ND[:, :2] > 0.3).float()},
        labelled={"kind": has_N, "tags": (x_ND[:, :2] > 0.3).any(1)},
    )


@pytest.fixture(scope="module")
def tokenizer(items: ItemTensors) -> Tokenizer:
    torch.manual_seed(0)
    targets = {name: TargetConfig(num_classes=len(v), multi_label=v.multi_label) for name, v in VOCABULARIES.items()}
    config = VQFusionConfig(
        sources={"x": 5}, targets=targets, latent_dim=4, hidden_dim=0, quantizer=QuantizerConfig(stages="ternary*4")
    )
    model = VQFusion(config)
    x_ND = items.sources["x"][items.present["x"]]
    model.standardize["x"].set(x_ND.mean(0), x_ND.var(0, correction=0).sum())
    model.start(items)
    for head in model.heads.values():
        torch.nn.init.normal_(head.linear.weight, std=0.5)
    return Tokenizer(model, VOCABULARIES)


def accumulate(tokenizer: Tokenizer, items: ItemTensors, size: int) -> TokenizerReport:
    report = TokenizerReport(tokenizer, DEPTHS)
    for first in range(0, len(items), size):
        block = items.select(slice(first, first + size))
        report.update(block, tokenizer.digits(block))
    return report


def test_against_numpy(tokenizer, items):
    result = accumulate(tokenizer, items, 40).result(tokenizer.encode(items).numpy())
    words_NW = tokenizer.encode(items)
    has_N, tagged_N = items.present["x"].numpy(), items.labelled["tags"].numpy()
    x_ND = items.sources["x"].numpy()[has_N]
    total = ((x_ND - x_ND.mean(0)) ** 2).sum()
    kinds, tags = items.labels["kind"].numpy()[has_N], items.labels["tags"].numpy()[tagged_N] == 1

    for place, depth in enumerate(DEPTHS):
        decoded = tokenizer.decode(words_NW, num_digits=depth)
        error = ((decoded.sources["x"].numpy()[has_N] - x_ND) ** 2).sum() / total
        assert result["reconstruction"]["x"][place] == pytest.approx(error, rel=1e-4)

        p_NC = decoded.probabilities["kind"].numpy()[has_N]
        assert result["accuracy"]["kind"][place] == pytest.approx((p_NC.argmax(1) == kinds).mean())
        nats = -np.log(p_NC[np.arange(len(kinds)), kinds]).mean()
        assert result["target_loss"]["kind"][place] == pytest.approx(nats, rel=1e-4)

        q_NC = decoded.probabilities["tags"].numpy()[tagged_N]
        guess = q_NC > 0.5
        precision = (guess & tags).sum() / max(guess.sum(), 1)
        recall = (guess & tags).sum() / tags.sum()
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert result["accuracy"]["tags"][place] == pytest.approx(f1)
        nats = -np.where(tags, np.log(q_NC), np.log(1 - q_NC)).mean()
        assert result["target_loss"]["tags"][place] == pytest.approx(nats, rel=1e-4)

    # no digits: the mean of what is there
    assert result["reconstruction"]["x"][0] > result["reconstruction"]["x"][-1]
    digits_NL = tokenizer.codec.spec.unpack(words_NW).numpy()
    for digit_N, entropy, unused in zip(
        digits_NL.T, result["digits"]["entropy"], result["digits"]["unused"], strict=True
    ):
        share = np.array(list(Counter(digit_N.tolist()).values())) / N
        assert entropy == pytest.approx(-(share * np.log2(share)).sum())
        assert unused == 3 - len(share)
    for depth, entropy, distinct in zip(
        DEPTHS, result["prefixes"]["entropy"], result["prefixes"]["distinct"], strict=True
    ):
        share = np.unique(digits_NL[:, :depth], axis=0, return_counts=True)[1] / N
        assert entropy == pytest.approx(-(share * np.log2(share)).sum())
        assert distinct == len(share)
    times = Counter(map(tuple, words_NW.tolist()))
    assert result["collisions"] == {"items": sum(t for t in times.values() if t > 1), "largest": max(times.values())}
    assert result["collisions"]["items"] > 0  # 81 SIDs for 90 items
    assert result["items"] == N
    assert result["bits"] == pytest.approx(4 * np.log2(3))


@pytest.mark.parametrize("size", [1, 7, N])
def test_batches_do_not_matter(size, tokenizer, items):
    assert_same(
        accumulate(tokenizer, items, size).result(tokenizer.encode(items).numpy()),
        accumulate(tokenizer, items, 40).result(tokenizer.encode(items).numpy()),
    )


def test_reports_of_several_processes_add_up(tokenizer, items):
    """As they travel: as JSON, without the model."""
    first, second, third = (
        accumulate(tokenizer, items.select(slice(a, b)), 20) for a, b in ((0, 30), (30, 75), (75, 90))
    )
    for other in (second, third):
        first.merge(json.loads(json.dumps(other.to_json())))
    assert_same(
        first.result(tokenizer.encode(items).numpy()),
        accumulate(tokenizer, items, 40).result(tokenizer.encode(items).numpy()),
    )
    assert len(json.dumps(TokenizerReport(tokenizer).to_json())) < 5_000


def test_default_depths_run_from_none_to_all(tokenizer):
    assert TokenizerReport(tokenizer).depths == (0, 1, 2, 3, 4)


def test_a_short_report_decodes_nothing(tokenizer, items):
    words_NW = tokenizer.encode(items).numpy()
    whole, short = accumulate(tokenizer, items, 40).result(words_NW), TokenizerReport(tokenizer, ())
    short.update(items, tokenizer.digits(items))
    assert short.result(words_NW) == {name: whole[name] for name in ("items", "bits", "digits", "collisions")}


def test_report_of_no_items(tokenizer):
    result = TokenizerReport(tokenizer).result(np.empty((0, 1), np.int64))
    assert result["items"] == 0
    assert result["collisions"] == {"items": 0, "largest": 0}
    assert result["digits"]["unused"] == [3] * 4


def assert_same(a, b) -> None:
    """Equal JSON values, numbers up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, str):
        assert a == b
    else:
        assert a == pytest.approx(b, rel=1e-5)
