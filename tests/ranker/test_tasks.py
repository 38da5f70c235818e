"""Several tasks: the masked loss, what the history says of each, metrics and serving, against their formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.data.tasks import UNKNOWN, label_of, num_actions
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.metrics import RankingMetrics
from sidrec_torchrec.ranker.model import Context, Ranker, RankerOutput
from sidrec_torchrec.ranker.readers import READERS
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import ServingRanker, export, requests_of
from sidrec_torchrec.ranker.targets import Targets
from tests.ranker.test_metrics import by_formula, make_predictions
from tests.ranker.test_targets import DIM, LENGTHS, by_definition, make_code_reader, make_events
from tests.ranker.test_targets import make_batch as make_batch_of_one_task

CPU = torch.device("cpu")
TASKS = ("click", "like", "long_view")
FEATURES = 5


def make_batch() -> RankBatch:
    batch = make_batch_of_one_task()
    generator = torch.Generator().manual_seed(3)
    batch = dataclasses.replace(batch, action_N=torch.randint(27, (sum(LENGTHS),), generator=generator))
    batch.weight_B[1] = 0  # a row that only fills up a process's share
    action_S = batch.action_N[Targets.of(batch).event_S]
    labels = [int((label_of(action_S, k) != UNKNOWN).sum()) for k in range(3)]
    return dataclasses.replace(batch, global_labels_K=torch.tensor(labels).float())


def make_ranker(attention: str, **changes) -> tuple[Ranker, torch.Tensor]:
    """With random weights, and the item features of ``make_batch``."""
    torch.manual_seed(0)
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), attention=attention, **changes)
    if READERS[attention].reads_codes:
        events, (_, items) = make_events(), make_code_reader(0)
        ranker = Ranker(config, nn.Identity(), events.embedding_dim, events, {}, CPU, len(TASKS))
    else:
        items = torch.randn(sum(LENGTHS), FEATURES)
        ranker = Ranker(config, nn.Identity(), FEATURES, None, {}, CPU, len(TASKS))
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.3)
    return ranker.eval(), items


@pytest.mark.parametrize("attention", list(READERS))
def test_the_loss_is_the_weighted_sum_of_masked_means(attention):
    weights = (1.0, 0.5, 3.0)
    batch, (ranker, items) = make_batch(), make_ranker(attention, task_weights=weights)
    loss, output = ranker.head(batch, items, None)
    targets = Targets.of(batch)
    p_SK = output.prediction.double().numpy()
    counts_S = batch.weight_B[targets.row_S].numpy()
    digits_S = batch.action_N[targets.event_S].numpy()
    expected = 0.0
    for k, weight in enumerate(weights):
        label_S, digits_S = digits_S % 3, digits_S // 3
        known_S = label_S < 2
        loss_S = -np.log(np.where(label_S == 1, p_SK[:, k], 1 - p_SK[:, k]))
        total = loss_S[known_S & (counts_S == 1)].sum()
        assert float(output.loss_sum[k]) == pytest.approx(total, rel=1e-5)
        expected += weight * total / known_S.sum()  # the mean of all processes: the row that fills up counts elsewhere
        np.testing.assert_array_equal(output.weight[:, k], known_S * counts_S)
        np.testing.assert_array_equal(output.label[:, k], label_S == 1)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_task_without_labels_in_a_batch_adds_nothing():
    batch, (ranker, items) = make_batch(), make_ranker("vectors")
    event_S = Targets.of(batch).event_S
    batch.action_N[event_S] += 9 * (2 - label_of(batch.action_N[event_S], 2))
    batch.global_labels_K[2] = 0
    ranker.head(batch, items, None)[0].backward()
    assert (ranker.head.interaction.logit.weight.grad.norm(dim=1) > 0).tolist() == [True, True, False]


def test_history_says_how_positive_it_is_by_task():
    batch = make_batch()
    context = Context.of(batch, Targets.of(batch), num_tasks=3)
    for s, (_, _, reads) in enumerate(by_definition(batch)):
        for k in range(3):
            labels = label_of(batch.action_N[reads], k).tolist()
            odds = (labels.count(1) + 1) / (labels.count(0) + 1)
            assert float(context.log_odds_SK[s, k].exp()) == pytest.approx(odds)


@torch.no_grad()
def test_attention_to_codes_knows_every_action():
    """Against attention to decoded events, with a bias and a value of its own for each of the 27 actions."""
    batch, (ranker, words_NW) = make_batch(), make_ranker("codes")
    reader, targets = ranker.head.reader, Targets.of(batch)
    attention = reader.attention
    q_SD, pooled_S1D = reader(batch, words_NW, targets)
    x_ND = attention.vectors(attention.events(words_NW))
    actions = num_actions(3)
    for s, (_, event, reads) in enumerate(by_definition(batch)):
        gap_T = gap_bucket(batch.timestamp_N[event] - batch.timestamp_N[reads])
        heads = lambda x: x.unflatten(-1, (attention.num_heads, -1))
        q_Hd, k_THd = heads(attention.query(q_SD[s])), heads(attention.key(x_ND[reads]))
        scores_TH = (k_THd * q_Hd).sum(-1) * q_Hd.shape[-1] ** -0.5
        scores_TH += attention.bias_UH[batch.action_N[reads]] + attention.bias_UH[actions + gap_T]
        weights_TH = torch.cat([scores_TH, attention.sink_H.unsqueeze(0)]).softmax(0)[:-1]
        v_THd = heads(attention.value(x_ND[reads]) + attention.bucket_value_AD[batch.action_N[reads]])
        expected_D = attention.output((weights_TH.unsqueeze(-1) * v_THd).sum(0).flatten())
        torch.testing.assert_close(pooled_S1D[s, 0], expected_D, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_serving_predicts_every_task(tmp_path):
    batch, (ranker, words_NW) = make_batch(), make_ranker("codes", learned_queries=2)
    _, expected = ranker.head(batch, words_NW, None)
    model, inputs = ServingRanker(ranker, {"sid": make_events().codec.spec}), requests_of(batch, words_NW)
    inputs["user_BF"] = inputs["user_BF"].long()
    assert expected.prediction.std(0).min() > 0.01
    torch.testing.assert_close(model(**inputs), expected.prediction, rtol=0, atol=1e-6)
    file = tmp_path / "ranker.pt2"
    write(export(model), describe(model.sids, {}, TASKS), file, compiled=False)
    scorer = Scorer(file)
    assert scorer.metadata["tasks"] == list(TASKS)
    torch.testing.assert_close(scorer(**inputs), expected.prediction, rtol=0, atol=1e-6)
    with pytest.raises(DataError, match=r"action_N\[0\] is 27, expected 0 to 26"):
        scorer(**inputs | {"action_N": inputs["action_N"] * 0 + 27})


def make_output() -> tuple[RankerOutput, torch.Tensor]:
    """Two tasks, the second with labels that are missing; and rows that only fill up. And which items training has."""
    p, label, seen, weight = make_predictions()
    other, known = 1 - p**2, np.arange(len(p)) % 3 > 0
    columns = [(p, other), (label, label * known), (weight, weight * known)]
    tensors = [torch.from_numpy(np.stack(pair, 1)).float() for pair in columns]
    return RankerOutput(*tensors, torch.zeros(2), torch.zeros(())), torch.from_numpy(seen)


def compute_on_this_rank(rank: int | None = None, world_size: int = 1):
    if rank is None:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    metrics, (output, seen_S) = RankingMetrics(rank, world_size, CPU, ("click", "like")), make_output()
    for batch in np.split(np.arange(400), 4):
        share = batch[rank::world_size]
        fields = {name: getattr(output, name)[share] for name in ("prediction", "label", "weight")}
        metrics.update(dataclasses.replace(output, **fields), seen_S[share])
    return metrics.compute()


def check_metrics(values):
    output, seen_S = make_output()
    seen = seen_S.numpy()
    for part, inside in (("all", seen | True), ("warm", seen), ("cold", ~seen)):
        for k, task in enumerate(("click", "like")):
            p, label, weight = (x[:, k].double().numpy() for x in (output.prediction, output.label, output.weight))
            got = [values[f"{kind}_{part}_{task}"] for kind in ("ne", "auc", "calibration")]
            assert got == pytest.approx(by_formula(p, label, weight * inside), rel=1e-5)
            assert values[f"targets_{part}_{task}"] == (weight * inside).sum()
        for kind in ("ne", "auc"):
            mean = (values[f"{kind}_{part}_click"] + values[f"{kind}_{part}_like"]) / 2
            assert values[f"{kind}_{part}"] == pytest.approx(mean)
    assert "calibration_all" not in values and "targets_all" not in values


def test_metrics_of_each_task_equal_the_formulas():
    check_metrics(compute_on_this_rank(0))


def test_two_processes_agree_on_the_metrics(run_distributed):
    first, second = run_distributed(compute_on_this_rank, 2)
    assert first == second
    check_metrics(first)


def test_the_mean_is_not_defined_where_a_task_is_not():
    metrics, (output, seen_S) = RankingMetrics(0, 1, CPU, ("click", "like")), make_output()
    output.weight[:, 1] *= seen_S  # no cold target has a `like`
    metrics.update(output, seen_S)
    values = metrics.compute()
    assert values["ne_cold_click"] is not None and values["targets_cold_like"] == 0
    assert values["ne_cold_like"] is values["ne_cold"] is None and values["ne_warm"] is not None


def test_weights_are_one_per_task():
    assert RankerConfig().weights(2) == (1.0, 1.0)
    with pytest.raises(SidrecError, match=r"task_weights must name 3, one per task, or none; got \(1.0, 2.0\)"):
        make_ranker("vectors", task_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="task_weights must be above 0, got"):
        RankerConfig(task_weights=(1.0, 0.0))
