import math

import torch
from accelerate import Accelerator

from trl_dmpo.losses import Scores
from trl_dmpo.trainer.metrics import MeanMetrics, preference_metrics, ranking_metrics


def test_ranking_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-2.0, -2.0, -1.0], [-5.0, -6.0, 0.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])
    # ranks: first; second; third, since a tie counts against the chosen one; first, nothing stands in the last column
    metrics = ranking_metrics(logps, mask, [1, 2])
    assert metrics["ranking/hit_rate@1"].tolist() == [1, 0, 0, 1]
    assert metrics["ranking/hit_rate@2"].tolist() == [1, 1, 0, 1]
    torch.testing.assert_close(metrics["ranking/ndcg@2"], torch.tensor([1, 1 / math.log2(3), 0, 1]))
    torch.testing.assert_close(metrics["ranking/mrr"], torch.tensor([1, 1 / 2, 1 / 3, 1]))
    torch.testing.assert_close(metrics["negatives/violations"], torch.tensor([0, 1 / 2, 1, 0]))


def test_preferences_by_hand():
    """r_w = 1 against r = (-7, -9, nothing), and r_w = -2 against r = (3,); beta = 0.5."""
    scores = Scores(
        chosen_logps=torch.tensor([-4.0, -9.0]),
        rejected_logps=torch.tensor([[-13.0, -16.0, 9.0], [-4.0, 99.0, 99.0]]),
        ref_chosen_logps=torch.tensor([-5.0, -7.0]),
        ref_rejected_logps=torch.tensor([[-6.0, -7.0, -9.0], [-7.0, 0.0, 0.0]]),
        chosen_lengths=torch.tensor([2, 2]),
        rejected_lengths=torch.tensor([[2, 3, 0], [2, 0, 0]]),
        rejected_mask=torch.tensor([[True, True, False], [True, False, False]]),
        chosen_nll=torch.tensor(2.0),
    )
    expected = {
        "rewards/chosen": [0.5, -1.0],
        "rewards/rejected": [-4.0, 1.5],
        "rewards/accuracies": [1.0, 0.0],
        "rewards/margins": [4.5, -2.5],
        "rewards/hardest_margin": [4.0, -2.5],
        "logps/chosen": [-4.0, -9.0],
        "logps/rejected": [-14.5, -4.0],
        "logps/chosen_change": [1.0, -2.0],
        # The sigmoid of -4 is 1.8%, that of -5 is 0.7%
        "negatives/active": [0.5, 1.0],
    }
    metrics = preference_metrics(scores, beta=0.5)
    assert {name: values.tolist() for name, values in metrics.items()} == expected


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
