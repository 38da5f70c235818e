"""Choosing stages: the lists tried, their costs by hand, and the rule of choice."""

import math

import pytest
import torch

from sidrec_torchrec.codec.alphabet import format_stages, parse_stages
from sidrec_torchrec.codec.design import DesignConfig, design, encode_flops, num_bits, stage_lists
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from tests.codec.reference import vectors


def test_lists_at_40_bits():
    assert [format_stages(stages) for stages in stage_lists(40)] == [
        "ternary*25",
        "onehot:256,ternary*20",
        "onehot:256*2,ternary*15",
        "onehot:256*5",
        "onehot:64*6,onehot:16",
        "onehot:16*10",
    ]


@pytest.mark.parametrize("bits", [2, 3.5, 7, 8, 16, 24, 61, 62, 100])
def test_no_list_has_more_bits_than_asked_for_and_none_wastes_a_digit(bits):
    lists = stage_lists(bits)
    assert lists and len(set(lists)) == len(lists)
    for stages in lists:
        assert bits - math.log2(3) < num_bits(stages) <= bits


def test_flops_of_a_mixed_list():
    """Dim 10, one-hot 4 then two trits: 6 rows; after 4 rows 2 are left, after 5 one."""
    stages = parse_stages("onehot:4,ternary*2")
    products = 2 * 10 * 6
    assert encode_flops(stages, 10, 1) == products + (4 + 2) + (3 + 1) + 3
    # beam 3: after the first stage there are at most 4 candidates, then at most 12
    assert encode_flops(stages, 10, 3) == products + 3 * ((4 + 2) + (3 + 1) + 3)


def test_it_takes_the_cheapest_near_the_least_error():
    train, held_out = vectors(500, 8), vectors(200, 8, seed=1)
    seen = []
    loose = design(train, held_out, DesignConfig(bits=8, tolerance=1e9, iterations=3), report=seen.append)
    assert loose.chosen.flops == min(candidate.flops for candidate in loose.candidates)
    assert "cheapest to encode" in loose.reason and format_stages(loose.chosen.stages) in loose.reason
    strict = design(train, held_out, DesignConfig(bits=8, tolerance=0, iterations=3))
    assert strict.chosen is strict.candidates[0] and "least held-out error" in strict.reason
    errors = [candidate.error for candidate in strict.candidates]
    assert errors == sorted(errors) and len(errors) == len(seen) == 2 * len(stage_lists(8))

    dpca = DPCA(DPCAConfig(dim=8, stages=strict.chosen.stages, iterations=3, beam=8))
    dpca.fit(train)
    left = held_out - dpca.decode(dpca.encode(held_out, beam=strict.chosen.beam)).detach()
    expected = left.double().square().sum() / (held_out - train.mean(0)).double().square().sum()
    assert strict.chosen.error == pytest.approx(expected.item(), rel=1e-5)
    assert strict.chosen.codebook_bytes == dpca.basis_RD.numel() * 4


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": float("nan")}, {"beams": ()}, {"beams": (0,)}, {"tolerance": -1}]
)
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        DesignConfig(**{"bits": 8} | wrong)


def test_nothing_to_measure_on_is_refused():
    with pytest.raises(ValueError, match="10 vectors to fit on, 0 held out"):
        design(vectors(10, 4), torch.zeros(0, 4), DesignConfig(bits=8))
