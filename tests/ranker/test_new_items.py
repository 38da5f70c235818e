"""Arms that were trained on some items and are given others: rows go by id, and what training never had says nothing."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.data.ids import split_mix
from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, ArmInputs

OWN = ArmInputs(num_items=3)
NEW = ArmInputs(num_items=5, trained_on=OWN, own_rows=np.array([2, -1, 0, -1, 1]))
CONFIG = ArmConfig(table_dim=4, ngram_rows=50)
ITEMS = np.array([0, 1, 2, 3, 4, 0, -1], np.int32)  # the last is missing


def keyed(values):
    lengths = torch.tensor([len(value) // len(ITEMS) for value in values.values()]).repeat_interleave(len(ITEMS))
    return KeyedJaggedTensor(keys=list(values), values=torch.cat([*values.values()]), lengths=lengths)


def test_a_row_of_the_table_is_its_items_wherever_it_stands():
    arm, trained = ARMS["id"](NEW, CONFIG), ARMS["id"](OWN, CONFIG)
    module, was = arm.module(torch.device("cpu")), trained.module(torch.device("cpu"))
    was.load_state_dict({name: torch.arange(12.0).view(3, 4) + 1 for name in was.state_dict()})
    module.load_state_dict(was.state_dict())  # names and shapes are those it was trained with
    row_N = torch.arange(12.0).view(3, 4) + 1
    expected = torch.stack([row_N[2], torch.zeros(4), row_N[0], torch.zeros(4), row_N[1], row_N[2], torch.zeros(4)])
    assert module.eval()(keyed(arm.values(ITEMS))).equal(expected)


def test_hashes_are_those_of_the_old_rows_and_new_items_have_their_own():
    arm = ARMS["hashed-id"](NEW, CONFIG)
    numbers = np.array([2, 3, 0, 4, 1, 2, 0])
    assert (
        arm.values(ITEMS)["hashed_id"].numpy().tolist() == (split_mix(numbers, 2) % np.uint64(50)).astype(int).tolist()
    )


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_of_this_package_takes_new_items(arm):
    kind = ARMS[arm]
    reads_content_alone = kind.needs.name != "NOTHING" and not kind.counts_events
    assert kind.takes_new_items or (kind.takes_new_items is None and reads_content_alone)
