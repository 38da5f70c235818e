"""Intervals over users against resamplings drawn by numpy, their coverage of what is true, and how they pair two rankers."""

import json
from math import exp, factorial

import numpy as np
import pytest
import torch

from sidrec_torchrec.data.ids import seed_of
from sidrec_torchrec.data.regression import Regression
from sidrec_torchrec.ranker.bootstrap import RESAMPLINGS, UserBootstrap, times_drawn
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.target_sums import TargetSums

CPU = torch.device("cpu")


def simulate(rng: np.random.Generator, users: int) -> dict[str, np.ndarray]:
    """Targets of users who differ, in what they like and in how well the ranker knows it."""
    count_U = rng.integers(1, 40, users)
    user_S = np.repeat(np.arange(users), count_U)
    logit_S = np.repeat(rng.normal(0, 1, users), count_U) + rng.normal(0, 1, len(user_S))
    error_S = np.repeat(rng.normal(0, 2, users), count_U)
    return {
        "user": user_S + 1_000_000 * int(rng.integers(1 << 40)),
        "p": 1 / (1 + np.exp(-logit_S - error_S)),
        "label": (rng.random(len(user_S)) < 1 / (1 + np.exp(-logit_S))).astype(np.float64),
        "seen": rng.random(len(user_S)) < 0.7,
    }


def output_of(p_SK, label_SK) -> RankerOutput:
    p_SK, label_SK = (torch.from_numpy(np.asarray(x, np.float64)).view(len(x), -1) for x in (p_SK, label_SK))
    return RankerOutput(p_SK, label_SK, torch.ones_like(p_SK), torch.zeros(()), torch.zeros(()))


def bootstrap(
    targets: dict[str, np.ndarray],
    *,
    p: str = "p",
    batch: int = 97,
    first: int = 0,
    step: int = 1,
    resamplings: int = 500,
) -> dict:
    """Of every ``step``-th batch, from the ``first`` on."""
    own = UserBootstrap(TargetSums(CPU, ("label",)), CPU, resamplings)
    starts = range(first * batch, len(targets["p"]), step * batch)
    for rows in (slice(start, start + batch) for start in starts):
        own.update(output_of(targets[p][rows], targets["label"][rows]), targets["user"][rows], targets["seen"][rows])
    return own.compute()


def ne(p: np.ndarray, label: np.ndarray) -> float:
    rate = label.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return -np.where(label == 1, np.log(p), np.log(1 - p)).mean() / entropy


def test_draws_are_poisson_and_a_users_own():
    user_U = np.array([seed_of(f"user-{u}") for u in range(5000)])
    times_UB = times_drawn(user_U, 60)
    share = [(times_UB == k).mean() for k in range(6)]
    assert share == pytest.approx([exp(-1) / factorial(k) for k in range(6)], abs=4 * (0.25 / times_UB.size) ** 0.5)
    for axis in (0, 1):  # neither users nor resamplings go together
        other = np.roll(times_UB, 1, axis=axis)
        assert abs(np.corrcoef(times_UB.ravel(), other.ravel())[0, 1]) < 4 / times_UB.size**0.5
    np.testing.assert_array_equal(times_drawn(user_U[::-3], 60), times_UB[::-3])
    np.testing.assert_array_equal(times_drawn(user_U, 20), times_UB[:, :20])


def test_a_replicate_is_ne_of_the_events_drawn():
    targets = simulate(np.random.default_rng(0), 80)
    found = bootstrap(targets)
    user_U, place_S = np.unique(targets["user"], return_inverse=True)
    times_UB = times_drawn(user_U, RESAMPLINGS)
    for part, inside_S in (("all", True), ("warm", targets["seen"]), ("cold", ~targets["seen"])):
        expected = []
        for b in range(RESAMPLINGS):
            row_S = np.repeat(np.arange(len(place_S)), times_UB[place_S, b] * inside_S)
            expected.append(ne(targets["p"][row_S], targets["label"][row_S]))
        own = found[f"ne_{part}"]
        assert own["replicates"] == pytest.approx(expected, rel=1e-6)
        assert own["interval"] == pytest.approx(np.quantile(expected, [0.025, 0.975]), rel=1e-6)


def test_an_interval_is_as_wide_as_one_of_users_drawn_with_replacement():
    targets = simulate(np.random.default_rng(1), 400)
    rows = np.split(np.arange(len(targets["p"])), np.flatnonzero(np.diff(targets["user"])) + 1)
    rng, drawn = np.random.default_rng(2), []
    for _ in range(1000):
        row_S = np.concatenate([rows[u] for u in rng.integers(len(rows), size=len(rows))])
        drawn.append(ne(targets["p"][row_S], targets["label"][row_S]))
    own = bootstrap(targets)["ne_all"]
    assert np.std(own["replicates"]) == pytest.approx(np.std(drawn), rel=0.12)
    assert own["interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.4 * np.std(drawn))


def test_intervals_hold_what_is_true_as_often_as_they_say():
    everybody = simulate(np.random.default_rng(3), 50_000)
    truth = ne(everybody["p"], everybody["label"])
    rng = np.random.default_rng(4)
    corpora = [simulate(rng, 150) for _ in range(200)]
    assert 0.89 <= share_that_holds(truth, corpora) <= 0.99
    # as if every event were a user, which is why users are drawn
    alone = [targets | {"user": np.arange(len(targets["p"])) + targets["user"][0]} for targets in corpora[:50]]
    assert share_that_holds(truth, alone) < 0.75


def share_that_holds(truth: float, corpora: list[dict[str, np.ndarray]]) -> float:
    """How many of the intervals of NE hold the truth."""
    found = [bootstrap(targets, batch=10_000, resamplings=200)["ne_all"]["interval"] for targets in corpora]
    return np.mean([low <= truth <= high for low, high in found])


def test_two_rankers_meet_the_same_resamplings():
    targets = simulate(np.random.default_rng(5), 300)
    targets["better"] = 0.98 * targets["p"] + 0.02 * targets["label"]
    one, other = (np.array(bootstrap(targets, p=p)["ne_all"]["replicates"]) for p in ("p", "better"))
    assert np.std(one - other) < 0.25 * np.hypot(np.std(one), np.std(other))


def share_of_this_process() -> dict:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return bootstrap(simulate(np.random.default_rng(6), 100), first=rank, step=size)


def test_two_processes_agree(run_distributed):
    first, second = run_distributed(share_of_this_process, 2)
    assert first == second
    alone = bootstrap(simulate(np.random.default_rng(6), 100))
    for name, own in alone.items():
        assert first[name]["replicates"] == pytest.approx(own["replicates"], rel=1e-6)


def test_several_tasks_have_their_own_and_means():
    rng = np.random.default_rng(7)
    minutes = Regression("minutes", is_log=False, mean=2.0, deviation=1.0)
    p_SK, label_SK = rng.uniform(0.1, 0.9, (500, 3)), rng.integers(0, 2, (500, 3))
    own = UserBootstrap(TargetSums(CPU, ("click", "like"), (minutes,)), CPU, resamplings=10)
    own.update(output_of(p_SK, label_SK), np.repeat(np.arange(50), 10), rng.random(500) < 0.5)
    found = {name: np.array(value["replicates"]) for name, value in own.compute().items()}
    assert found["ne_warm"] == pytest.approx((found["ne_warm_click"] + found["ne_warm_like"]) / 2, rel=1e-6)
    weight_SB = np.repeat(times_drawn(np.arange(50), 10), 10, axis=0)
    error_SB, left_SB = (weight_SB * (label_SK[:, 2] - x)[:, None] ** 2 for x in (p_SK[:, 2], 2.0))
    assert found["nmse_all_minutes"] == pytest.approx(error_SB.sum(0) / left_SB.sum(0), rel=1e-6)
    assert found["nmse_all"] == pytest.approx(found["nmse_all_minutes"])


def test_too_few_users_have_no_interval():
    targets = {
        "user": np.zeros(4, np.int64),
        "p": np.full(4, 0.5),
        "label": np.array([0, 1, 0, 1]),
        "seen": np.ones(4, bool),
    }
    found = bootstrap(targets)
    assert found["ne_warm"]["interval"] is None and None in found["ne_warm"]["replicates"]
    assert found["ne_cold"] == {"interval": None, "replicates": [None] * RESAMPLINGS}
    json.dumps(found, allow_nan=False)
