"""evaluate: counts by hand, ends, errors."""

import math

import pytest
import torch

from vitlab import evaluate


class Images:
    """A split whose 'images' are the logits themselves: the model under test is the identity."""

    def __init__(self, logits, labels):
        self.logits, self.labels = torch.tensor(logits), torch.tensor(labels)

    def __len__(self):
        return len(self.labels)

    def batches(self, batch_size, *, device):
        yield from zip(self.logits.split(batch_size), self.labels.split(batch_size), strict=True)


class Identity(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_counts_by_hand_do_not_depend_on_the_batches(batch_size):
    logits = [[3.0, 0, 0, 0, 0, 0, 0], [0, 3.0, 0, 0, 0, 0, 0], [3.0, 2, 1, 0, -1, -2, -3], [5.0, 4, 3, 2, 1, 0, -1]]
    result = evaluate.accuracy(Identity(), Images(logits, [0, 1, 1, 6]), batch_size=batch_size)
    assert (result.correct, result.total, result.top1, result.top5) == (2, 4, 50.0, 75.0)
    assert result.per_class[:2] == (100.0, 50.0) and result.per_class[6] == 0.0 and math.isnan(result.per_class[3])
    assert result.mean_per_class == pytest.approx(50.0)  # classes 0, 1, 6: (100 + 50 + 0) / 3
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor([0, 1, 1, 6]))
    assert result.loss == pytest.approx(expected.item())


def test_the_mode_of_the_model_is_restored():
    model = Identity().train()
    evaluate.accuracy(model, Images([[1.0, 0.0]], [0]))
    assert model.training


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="empty split"):
        evaluate.accuracy(Identity(), Images([], []))
    with pytest.raises(ValueError, match="not finite"):
        evaluate.accuracy(Identity(), Images([[float("nan"), 0.0]], [0]))
    with pytest.raises(ValueError, match="precision must be"):
        evaluate.autocast("cpu", "fp16")
