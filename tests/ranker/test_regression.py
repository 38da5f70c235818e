"""Regression: the loss, predictions on the scale of labels, metrics and serving, against their formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.data.regression import Regression
from sidrec_torchrec.data.tasks import UNKNOWN, label_of
from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.breakdown import Breakdown, Past, TargetFacts
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.metrics import RankingMetrics
from sidrec_torchrec.ranker.model import Ranker, RankerOutput
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import ServingRanker, export, requests_of
from sidrec_torchrec.ranker.stateful import StatefulServingRanker, UserStateUpdater
from sidrec_torchrec.ranker.target_sums import TargetSums
from sidrec_torchrec.ranker.targets import Targets
from tests.ranker.test_targets import DIM, LENGTHS, make_batch, make_code_reader, make_events

CPU = torch.device("cpu")
REGRESSIONS = (Regression("dwell", True, 6.0, 0.5), Regression("stars", False, 3.5, 0.8))
TASKS = {"a label besides": 1, "two labels besides": 2, "alone": 0}


def make_values_batch(num_tasks: int) -> RankBatch:
    """With values, some missing, and weights; every label of a single task is known."""
    generator, N = torch.Generator().manual_seed(3), sum(LENGTHS)
    values_NR = torch.stack([torch.rand(N, generator=generator) * 50, torch.rand(N, generator=generator) * 5], dim=1)
    values_NR[torch.rand(N, 2, generator=generator) < 0.3] = torch.nan
    action_N = torch.randint(9 if num_tasks == 2 else 2, (N,), generator=generator)
    batch = dataclasses.replace(
        make_batch(), values_NR=values_NR, action_N=action_N, weight_N=torch.rand(N, generator=generator)
    )
    event_S = Targets.of(batch).event_S
    known_SK = torch.cat(
        [*(label_of(action_N[event_S, None], k) != UNKNOWN for k in range(num_tasks)), ~values_NR[event_S].isnan()], 1
    )
    return dataclasses.replace(batch, global_labels_K=(batch.weight_N[event_S, None] * known_SK).sum(0))


def make_ranker(num_tasks: int, **changes) -> tuple[Ranker, torch.Tensor]:
    torch.manual_seed(0)
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), attention="codes", **changes)
    events, (_, words_NW) = make_events(), make_code_reader(0)
    options = {"num_tasks": num_tasks, "regressions": REGRESSIONS}
    ranker = Ranker(config, nn.Identity(), events.embedding_dim, events, {}, CPU, **options)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.3)
    return ranker.eval(), words_NW


@pytest.mark.parametrize("num_tasks", TASKS.values(), ids=TASKS)
def test_the_loss_is_the_squared_error_in_units_of_the_training_variance(num_tasks):
    weights = (0.5, 3.0, 2.0, 1.0)[: num_tasks + 2]
    batch, (ranker, words_NW) = make_values_batch(num_tasks), make_ranker(num_tasks, task_weights=weights)
    loss, output = ranker.head(batch, words_NW, None)
    event_S = Targets.of(batch).event_S
    p_SK, weight_S = output.prediction.double().numpy(), batch.weight_N[event_S].double().numpy()
    expected = 0.0
    for k, weight in enumerate(weights):
        if k < num_tasks:
            digit_S = label_of(batch.action_N[event_S], k).numpy()
            known_S, label_S = digit_S != UNKNOWN, digit_S == 1
            loss_S = -np.log(np.where(label_S, p_SK[:, k], 1 - p_SK[:, k]))
        else:
            own, label_S = REGRESSIONS[k - num_tasks], batch.values_NR[event_S, k - num_tasks].double().numpy()
            known_S = ~np.isnan(label_S)
            scale = np.log1p if own.is_log else np.asarray
            assert not own.is_log or p_SK[:, k].min() > 0  # nothing is cut off here
            loss_S = ((scale(p_SK[:, k]) - scale(label_S)) / own.deviation) ** 2
        total = (weight_S * loss_S)[known_S].sum()
        assert float(output.loss_sum[k]) == pytest.approx(total, rel=1e-4)
        expected += weight * total / weight_S[known_S].sum()
        np.testing.assert_allclose(output.weight[:, k], known_S * weight_S, rtol=1e-6)
        np.testing.assert_allclose(output.label[:, k], np.where(known_S, label_S, 0), rtol=1e-6)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_a_batch_without_values_adds_nothing():
    batch, (ranker, words_NW) = make_values_batch(1), make_ranker(1)
    batch.values_NR[:, 0] = torch.nan
    batch.global_labels_K[1] = 0
    loss, _ = ranker.head(batch, words_NW, None)
    loss.backward()
    assert loss.isfinite() and (ranker.head.interaction.logit.weight.grad.norm(dim=1) > 0).tolist() == [
        True,
        False,
        True,
    ]
    assert all(p.grad is None or p.grad.isfinite().all() for p in ranker.parameters())


@torch.no_grad()
def test_values_are_no_part_of_the_history():
    batch, (ranker, words_NW) = make_values_batch(1), make_ranker(1)
    _, before = ranker.head(batch, words_NW, None)
    batch.values_NR.add_(1)
    torch.testing.assert_close(ranker.head(batch, words_NW, None)[1].prediction, before.prediction)


@pytest.mark.parametrize("num_tasks", TASKS.values(), ids=TASKS)
@torch.no_grad()
def test_serving_predicts_values_beside_probabilities(num_tasks, tmp_path):
    batch, (ranker, words_NW) = make_values_batch(num_tasks), make_ranker(num_tasks, learned_queries=2)
    _, expected = ranker.head(batch, words_NW, None)
    model, inputs = ServingRanker(ranker, {"sid": make_events().codec.spec}), requests_of(batch, words_NW)
    torch.testing.assert_close(model(**inputs), expected.prediction, rtol=1e-6, atol=1e-6)
    file, names = tmp_path / "ranker.pt2", tuple(f"task{k}" for k in range(num_tasks))
    values = [own.name for own in REGRESSIONS]
    write(export(model), describe(model.sids, {}, names, regressions=values), file, compiled=False)
    scorer = Scorer(file)
    assert scorer.metadata["tasks"] == list(names) and scorer.metadata["regressions"] == values
    torch.testing.assert_close(scorer(**inputs), expected.prediction, rtol=1e-6, atol=1e-6)

    updater = UserStateUpdater(model)
    events = {name: inputs[name] for name in ("history_NW", "action_N", "time_N", "offsets_B1")}
    states = updater.append(updater.new(len(inputs["request_time_B"])), **events)
    (row, *_) = states.to_rows()
    assert len(row) == states.layout.num_bytes
    whole = {name: value for name, value in inputs.items() if name != "num_events_B"}
    same = inputs | {"num_events_B": inputs["offsets_B1"].diff()}
    torch.testing.assert_close(StatefulServingRanker(model).score(states, **whole), model(**same), rtol=1e-5, atol=1e-5)


def outputs(seed: int = 0, n: int = 400) -> tuple[RankerOutput, torch.Tensor, torch.Tensor]:
    """Of a label and both regressions: outputs, which targets are seen, and their histories' lengths."""
    generator = torch.Generator().manual_seed(seed)
    label_SK, prediction_SK = (torch.rand(n, 3, generator=generator) * torch.tensor([1.0, 90.0, 5.0]) for _ in range(2))
    label_SK[:, 0] = label_SK[:, 0].round()
    weight_SK = torch.rand(n, 3, generator=generator) * (torch.rand(n, 3, generator=generator) < 0.8)
    empty = torch.zeros(())
    seen_S, length_S = torch.rand(n, generator=generator) < 0.7, torch.randint(0, 300, (n,), generator=generator)
    return RankerOutput(prediction_SK, label_SK, weight_SK, empty, empty), seen_S, length_S


def by_formula(output: RankerOutput, k: int, chosen_S: np.ndarray) -> tuple[float, float]:
    """Mean squared error, and its share of that of the training mean, on the scale on which the value is learned."""
    own, scale = REGRESSIONS[k - 1], np.log1p if REGRESSIONS[k - 1].is_log else np.asarray
    w, y, p = (x[chosen_S, k].double().numpy() for x in (output.weight, output.label, output.prediction))
    mse = (w * (scale(p) - scale(y)) ** 2).sum() / w.sum()
    return mse, mse / ((w * (scale(y) - own.mean) ** 2).sum() / w.sum())


def test_metrics_are_those_of_the_formula():
    metrics = RankingMetrics(0, 1, CPU, ("click",), REGRESSIONS)
    output, seen_S, _ = outputs()
    for own in torch.arange(400).split(100):
        tensors = (x[own] for x in (output.prediction, output.label, output.weight))
        metrics.update(RankerOutput(*tensors, output.loss_sum, output.global_targets), seen_S[own])
    values = metrics.compute()
    parts = {"all": seen_S | True, "warm": seen_S, "cold": ~seen_S}
    for part, inside_S in parts.items():
        for k, own in enumerate(REGRESSIONS, start=1):
            found = values[f"mse_{part}_{own.name}"], values[f"nmse_{part}_{own.name}"]
            assert found == pytest.approx(by_formula(output, k, inside_S.numpy()), rel=1e-5)
            assert values[f"targets_{part}_{own.name}"] == pytest.approx(
                float(output.weight[inside_S, k].sum()), rel=1e-5
            )
        assert values[f"nmse_{part}"] == pytest.approx(
            np.mean([values[f"nmse_{part}_{own.name}"] for own in REGRESSIONS])
        )
        assert values[f"ne_{part}"] == values[f"ne_{part}_click"]


def test_a_regression_alone_has_metrics_without_a_name_and_none_where_nothing_is_known():
    output, seen_S, _ = outputs()
    parts = (x[:, 2:] for x in (output.prediction, output.label, output.weight * seen_S[:, None]))
    metrics = RankingMetrics(0, 1, CPU, (), REGRESSIONS[1:])
    metrics.update(RankerOutput(*parts, output.loss_sum, output.global_targets), seen_S)
    values = metrics.compute()
    assert values.keys() == {
        f"{kind}_{part}" for kind in ("mse", "nmse", "targets") for part in ("all", "warm", "cold")
    }
    assert values["nmse_cold"] is values["mse_cold"] is None and values["targets_cold"] == 0 < values["nmse_warm"]


def test_the_breakdown_has_the_share_of_squared_errors_by_bucket():
    output, _, length_S = outputs()
    breakdown = Breakdown(Past(np.ones(1, bool), None, None, None), TargetSums(CPU, ("click",), REGRESSIONS), CPU)
    breakdown.update(output, TargetFacts(*np.zeros((3, 400), np.int64), length_S.numpy()))
    tables = breakdown.compute()["history_length"]
    edges = [0, 1, 10, 50, 200, 1000, np.inf]
    for k, own in enumerate(REGRESSIONS, start=1):
        for row, low, high in zip(tables[own.name], edges, edges[1:], strict=False):
            chosen_S = ((length_S >= low) & (length_S < high)).numpy()
            assert row["targets"] == round(float(output.weight[chosen_S, k].sum()))
            if chosen_S.any():
                assert row["nmse"] == pytest.approx(by_formula(output, k, chosen_S)[1], rel=1e-5)
            else:
                assert row["nmse"] is None and row["note"] == "no targets"
    assert {"ne", "positives"} <= tables["click"][2].keys()
