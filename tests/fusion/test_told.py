"""How much of a predicted source content tells, against sources made to be told in part."""

import pytest
import torch

from sidrec_torchrec.fusion.model import ItemTensors
from sidrec_torchrec.fusion.told import share_told


def make_items(noise: float, count: int = 1500, present: float = 1.0) -> ItemTensors:
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(count, 20, generator=generator)
    y_ND = x_ND @ torch.randn(20, 8, generator=generator) / 20**0.5 + noise * torch.randn(count, 8, generator=generator)
    has_N = torch.rand(count, generator=generator) < present
    sources = {
        "text": x_ND[:, :12] * 7 + 3,
        "image": x_ND[:, 12:],
        "tastes": torch.where(has_N.unsqueeze(1), y_ND, 99.0),
    }
    everywhere = torch.ones(count, dtype=torch.bool)
    return ItemTensors(sources, {"text": everywhere, "image": everywhere, "tastes": has_N})


@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("present", [1.0, 0.6])
def test_it_is_the_share_of_the_variance_that_is_no_noise(noise, present):
    expected = 1 / (1 + noise**2)
    assert share_told(make_items(noise, present=present), "tastes") == pytest.approx(expected, abs=0.05)


def test_chance_is_not_told():
    items = make_items(0.0)
    items.sources["tastes"] = torch.randn(1500, 8, generator=torch.Generator().manual_seed(2))
    assert 0 <= share_told(items, "tastes") < 0.01  # never below: --least-told 0 leaves nothing out


@pytest.mark.parametrize("change", [lambda x: x[:3], lambda x: x * 0])
def test_nothing_to_tell(change):
    items = make_items(1.0)
    sources = {name: x[:3] if name != "tastes" else change(x)[:3] for name, x in items.sources.items()}
    assert share_told(ItemTensors(sources, {name: x[:3] for name, x in items.present.items()}), "tastes") == 0
    items.sources["tastes"] = torch.zeros(1500, 8)
    assert share_told(items, "tastes") == 0


def test_sources_that_no_item_has_tell_nothing():
    items = make_items(0.0)
    nobody = torch.zeros(1500, dtype=torch.bool)
    assert share_told(ItemTensors(items.sources, {**items.present, "text": nobody, "image": nobody}), "tastes") < 0.01
