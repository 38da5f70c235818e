"""Training starts at what linear algebra gives: PCA of all sources side by side, quantized in closed form."""

import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.fusion.config import QuantizerConfig, TargetConfig, VQFusionConfig
from sidrec_torchrec.fusion.model import ItemTensors, VQFusion

N, STAGES = 400, "onehot:4,ternary*5"


@pytest.fixture(scope="module")
def items() -> ItemTensors:
    generator = torch.Generator().manual_seed(0)
    latent_NE = torch.randn(N, 4, generator=generator)
    present = {"a": torch.rand(N, generator=generator) > 0.1, "b": torch.ones(N, dtype=torch.bool)}
    sources = {}
    for name, dim in (("a", 7), ("b", 5)):
        noise_ND = 0.3 * torch.randn(N, dim, generator=generator)
        sources[name] = 2 * latent_NE @ torch.randn(4, dim, generator=generator) + noise_ND + 5
    return ItemTensors(
        sources=sources,
        present=present,
        labels={"kind": latent_NE[:, :3].argmax(1), "tags": (latent_NE > 1).float()},
        labelled={"kind": torch.rand(N, generator=generator) > 0.3, "tags": torch.ones(N, dtype=torch.bool)},
    )


def start(items: ItemTensors, hidden_dim: int, latent_dim: int = 6, **quantizer: str) -> VQFusion:
    torch.manual_seed(0)
    config = VQFusionConfig(
        sources={"a": 7, "b": 5},
        targets={
            "kind": TargetConfig(num_classes=3, multi_label=False),
            "tags": TargetConfig(num_classes=4, multi_label=True),
        },
        latent_dim=latent_dim,
        hidden_dim=hidden_dim,
        quantizer=QuantizerConfig(**quantizer or {"stages": STAGES}),
    )
    model = VQFusion(config)
    for name, x_ND in items.sources.items():
        x_ND = x_ND[items.present[name]]
        model.standardize[name].set(x_ND.mean(0), x_ND.var(0, correction=0).sum())
    model.start(items)
    return model.eval()


def side_by_side(items: ItemTensors) -> np.ndarray:
    """All sources, centered, each of total variance 1, float64 [N, 12]; zeros where missing."""
    parts = []
    for name in ("a", "b"):
        x_ND, has_N = items.sources[name].double().numpy(), items.present[name].numpy()
        x_ND = (x_ND - x_ND[has_N].mean(0)) / np.sqrt(x_ND[has_N].var(0).sum())
        parts.append(np.where(has_N[:, None], x_ND, 0))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("hidden_dim", [0, 16])
def test_start_is_pca(hidden_dim, items):
    model = start(items, hidden_dim)
    x_NE = side_by_side(items)
    _, _, directions_EE = np.linalg.svd(x_NE, full_matrices=False)
    scores_ND = x_NE @ directions_EE[:6].T
    latent_ND = model.latent(items).detach().double().numpy()
    signs_D = np.sign((latent_ND * scores_ND).sum(0))  # a principal component's is free
    np.testing.assert_allclose(latent_ND, scores_ND * signs_D, atol=2e-5)

    decoded = [model.decoders[name](torch.from_numpy(latent_ND).float()).detach().numpy() for name in ("a", "b")]
    np.testing.assert_allclose(np.concatenate(decoded, axis=1), scores_ND @ directions_EE[:6], atol=2e-5)


def test_start_quantizes_in_closed_form(items):
    model = start(items, hidden_dim=0)
    dpca = DPCA(DPCAConfig(dim=6, stages=parse_stages(STAGES)))
    z_ND = model.latent(items).detach()
    errors = dpca.fit(z_ND)
    assert torch.equal(model.quantizer.encode(z_ND), dpca.encode(z_ND))
    error = (model.quantizer(z_ND).z_q_ND - z_ND).square().sum() / (z_ND - z_ND.mean(0)).square().sum()
    assert float(error.detach()) == pytest.approx(min(errors), rel=1e-3)


def test_start_predicts_how_often_a_class_occurs(items):
    model = start(items, hidden_dim=16)
    z_ND = torch.randn(3, 6)
    kinds = items.labels["kind"][items.labelled["kind"]]
    share_C = torch.bincount(kinds, minlength=3) / len(kinds)
    torch.testing.assert_close(model.heads["kind"](z_ND).softmax(1), share_C.expand(3, 3), atol=3e-3, rtol=0)
    torch.testing.assert_close(
        model.heads["tags"](z_ND).sigmoid(), items.labels["tags"].mean(0).expand(3, 4), atol=3e-3, rtol=0
    )


def test_latent_wider_than_all_sources_together(items):
    """More latent dimensions than there are directions: the rest stay empty, nothing is lost."""
    model = start(items, hidden_dim=0, latent_dim=20)
    z_ND = model.latent(items).detach()
    assert not z_ND[:, 12:].any()
    decoded = [model.decoders[name](z_ND).detach().numpy() for name in ("a", "b")]
    np.testing.assert_allclose(np.concatenate(decoded, axis=1), side_by_side(items), atol=2e-5)


def test_prefixes_are_decoded_in_training_alone(items):
    """Every item cut: the losses in training are those of decoding from 1 to L digits, evenly drawn."""
    model = start(items, hidden_dim=0)
    object.__setattr__(model.config, "prefix_share", 1.0)
    digits_NL = model.quantizer.encode(model.latent(items).detach())
    by_depth = []
    for depth in range(1, 7):
        z_ND = model.quantizer.decode(digits_NL, num_digits=depth).detach()
        losses = model.task_losses(z_ND, items)
        by_depth.append([float((loss_N.sum() / has_N.sum()).detach()) for loss_N, has_N in losses.values()])
    _, whole_K, _ = model(items)
    assert whole_K.tolist() == pytest.approx(by_depth[-1], rel=1e-4)
    model.train()
    with torch.no_grad():
        drawn_SK = torch.stack([model(items)[1] for _ in range(60)])
    expected = np.mean(by_depth, axis=0)
    assert expected[0] > 1.2 * by_depth[-1][0]
    np.testing.assert_allclose(drawn_SK.mean(0)[:2], expected[:2], rtol=0.03)
