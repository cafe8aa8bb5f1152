import math

import torch
from accelerate import Accelerator

from trl_dmpo.trainer.metrics import MeanMetrics, ranking_metrics


def test_ranking_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-2.0, -2.0, -1.0], [-5.0, -6.0, 0.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])
    # ranks: first; second; third, since a tie counts against the chosen one; first, nothing stands in the last column
    metrics = ranking_metrics(logps, mask, [1, 2])
    assert metrics["ranking/hit_rate@1"].tolist() == [1, 0, 0, 1]
    assert metrics["ranking/hit_rate@2"].tolist() == [1, 1, 0, 1]
    torch.testing.assert_close(metrics["ranking/ndcg@2"], torch.tensor([1, 1 / math.log2(3), 0, 1]))
    torch.testing.assert_close(metrics["ranking/mrr"], torch.tensor([1, 1 / 2, 1 / 3, 1]))


def test_means_of_sums_and_counts():
    metrics = MeanMetrics()
    metrics.add("all", torch.tensor([1.0, 2.0, 6.0]))
    metrics.add("some", torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True]))
    metrics.add("none", torch.tensor([1.0]), torch.tensor([False]))
    metrics.add("flags", torch.tensor([True, False]))
    assert metrics.reduce(Accelerator(cpu=True)) == {"all": 3.0, "some": 3.5, "none": 0.0, "flags": 0.5}


def test_values_outside_the_mask_may_be_anything():
    metrics = MeanMetrics()
    metrics.add("some", torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    assert metrics.reduce(Accelerator(cpu=True)) == {"some": 1.0}
