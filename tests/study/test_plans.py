"""Plans of tokenizers: which folders are theirs, and which they share."""

import pytest

from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.study.plans import TokenizerPlan


def plan(name: str, **options: object) -> TokenizerPlan:
    return TokenizerPlan(name=name, quantizer=QuantizerConfig(), sources=("text",), **options)


@pytest.mark.parametrize("seed", [0, 2])
def test_ways_of_tuning_share_what_they_tune(seed):
    plans = [
        plan("dpca", seed=seed),
        plan("dpca-tuned", tuned=True, digit_dropout=0.0, seed=seed),
        plan("dpca-tuned-dropout-0.1", tuned=True, digit_dropout=0.1, seed=seed),
    ]
    where = f"seed-{seed}/" if seed else ""
    assert {p.trained_folder for p in plans} == {f"{where}dpca"}
    assert [p.tuned_folder for p in plans[1:]] == [f"{where}dpca-tuned", f"{where}dpca-tuned-dropout-0.1"]
    assert len({p.folder for p in plans}) == 3  # of their SIDs


def test_the_name_of_a_plan_that_is_not_tuned_says_nothing():
    assert plan("fine-tuned-text").trained_folder == plan("fine-tuned-text").folder == "fine-tuned-text"
    assert plan("fine-tuned-text-tuned", tuned=True).trained_folder == "fine-tuned-text"


def test_digits_are_dropped_in_tuning_alone():
    with pytest.raises(ValueError, match="this one is not"):
        plan("dpca", digit_dropout=0.1)
    with pytest.raises(ValueError, match="digit_dropout must lie in"):
        plan("dpca-tuned", tuned=True, digit_dropout=1.0)


def test_a_plan_whose_name_does_not_say_so_is_tuned_beside_its_start():
    assert plan("side", tuned=True).trained_folder == "side"
    assert plan("side", tuned=True).tuned_folder == "side-tuned"
    assert plan("side", tuned=True).folder == "side"
