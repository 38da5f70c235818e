"""Two hashes of an item, against their definition in unbounded integers, and the rows they add up."""

import numpy as np
import pytest
import torch
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from sidrec_torchrec.data.ids import split_mix
from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, ArmInputs

ROWS = 1_000
CONFIG = ArmConfig(table_dim=8, ngram_rows=ROWS)


def reference(seed: int, count: int) -> list[int]:
    state, out = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        out.append(z ^ z >> 31)
    return out


def test_hashes_are_those_of_splitmix64():
    assert reference(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # as published
    item_N = np.array([0, 1, 77, 2**31 - 1], np.int32)
    assert split_mix(item_N, 2).tolist() == [reference(int(item), 2) for item in item_N]


def test_two_items_seldom_share_both_rows():
    arm = ARMS["hashed-id"](ArmInputs(num_items=3_000), CONFIG)
    rows_NH = arm.values(np.arange(3_000, dtype=np.int32))["hashed_id"]
    assert rows_NH.min() >= 0 and rows_NH.max() < ROWS
    counts = torch.bincount(rows_NH.flatten(), minlength=ROWS)
    assert counts.max() < 25  # 6 on average
    pairs = {tuple(sorted(rows)) for rows in rows_NH.tolist()}
    assert len(pairs) > 2_970  # 9 pairs of items on average share both


def test_vectors_are_sums_of_two_rows_and_a_log_keeps_the_item():
    arm = ARMS["hashed-id"](ArmInputs(num_items=50), CONFIG)
    module = arm.module(torch.device("cpu")).eval()
    (table,) = module.parameters()
    torch.nn.init.normal_(table)
    item_N = np.array([3, 49, 3, 0], np.int32)
    rows_NH = arm.values(item_N)["hashed_id"]
    assert rows_NH.tolist() == [[x % ROWS for x in reference(int(item), 2)] for item in item_N]
    batch = KeyedJaggedTensor(keys=["hashed_id"], values=rows_NH.flatten(), lengths=torch.tensor([2, 6]))
    torch.testing.assert_close(module(batch), table[rows_NH].sum(1))
    stored = arm.stored(item_N)
    assert list(stored) == ["item_id"] and stored["item_id"].to_pylist() == [3, 49, 3, 0]


def test_why_it_is_not_torchrecs_hash_zch():
    """Fails once fbgemm can enter ids on CPU: the arm's docstring is then out of date."""
    zch = HashZchManagedCollisionModule(zch_size=16, device=torch.device("cpu"), total_num_buckets=1)
    ids = {"item": JaggedTensor(values=torch.tensor([5, 900]), lengths=torch.ones(2, dtype=torch.int64))}
    assert zch.eval()(ids)["item"].values().shape == (2,)
    with pytest.raises(RuntimeError, match="Expected readonly to be true, but got false"):
        zch.train()(ids)
