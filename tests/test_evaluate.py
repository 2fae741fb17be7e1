"""Tests of evaluate: counts by hand, extreme cases, errors."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from vitlab.evaluation import evaluate
from vitlab.studies import runs


class Images:
    """Stand for a split whose images are the logits themselves, for the identity as model."""

    def __init__(self, logits, labels):
        self.logits, self.labels = torch.tensor(logits), torch.tensor(labels)

    def __len__(self):
        return len(self.labels)

    def batches(self, batch_size, *, device):
        yield from zip(self.logits.split(batch_size), self.labels.split(batch_size), strict=True)


class Identity(torch.nn.Module):
    """Return the input times a factor, its classes in another order, and count the images."""

    def __init__(self, factor=1.0, order=slice(None)):
        super().__init__()
        self.weight, self.order = torch.nn.Parameter(torch.tensor(factor)), order
        self.images_run = 0

    def forward(self, x):
        self.images_run += len(x)
        return (x * self.weight)[:, self.order]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_counts_by_hand_do_not_depend_on_the_batches(batch_size):
    logits = [
        [3.0, 0, 0, 0, 0, 0, 0],
        [0, 3.0, 0, 0, 0, 0, 0],
        [3.0, 2, 1, 0, -1, -2, -3],
        [5.0, 4, 3, 2, 1, 0, -1],
    ]
    result = evaluate.accuracy(Identity(), Images(logits, [0, 1, 1, 6]), batch_size=batch_size)
    assert (result.correct, result.total, result.top1, result.top5) == (2, 4, 50.0, 75.0)
    assert (
        result.per_class[:2] == (100.0, 50.0)
        and result.per_class[6] == 0.0
        and math.isnan(result.per_class[3])
    )
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
    with pytest.raises(ValueError, match="unknown precision 'fp16'"):
        evaluate.autocast("cpu", "fp16")


# -- calibration


def calibration_error_by_bins(probabilities, labels, bins):
    """Compute equation 3 of Guo et al. 2017 bin by bin."""
    total = 0.0
    for i in range(bins):
        in_bin = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
            if i / bins < max(row) <= (i + 1) / bins
        ]
        total += abs(
            sum(right for _, right in in_bin) - sum(confidence for confidence, _ in in_bin)
        )
    return total / len(labels)


@pytest.mark.parametrize("count", [1, 2, 50, 1000])
@pytest.mark.parametrize("classes", [1, 2, 10])
@pytest.mark.parametrize("bins", [1, 2, 15])
def test_calibration_error_is_that_of_its_definition(count, classes, bins):
    generator = torch.Generator().manual_seed(count)
    probabilities = (
        4 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    ).softmax(1)
    labels = torch.randint(classes, (count,), generator=generator)
    error = evaluate._expected_calibration_error(probabilities, labels, bins=bins)
    assert (
        error == pytest.approx(calibration_error_by_bins(probabilities, labels, bins), abs=1e-12)
        and 0 <= error <= 1
    )


def test_calibration_error_by_hand():
    # two of three at 0.9 are right, the one at 0.6 is wrong: (|2 - 2.7| + |0 - 0.6|) / 4
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 0])
    assert evaluate._expected_calibration_error(probabilities, labels) == pytest.approx(1.3 / 4)
    labels = torch.tensor(
        [0, 1, 1, 1]
    )  # the one at 0.6 is right: too sure here, not sure enough there
    assert evaluate._expected_calibration_error(probabilities, labels) == pytest.approx(
        (0.7 + 0.4) / 4
    )
    # in one bin both make up for each other in part: |3 - 3.3| / 4
    assert evaluate._expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(
        0.3 / 4
    )


def test_calibration_error_ends():
    sure = torch.eye(3)
    assert evaluate._expected_calibration_error(sure, torch.arange(3)) == 0
    assert evaluate._expected_calibration_error(sure, torch.tensor([1, 2, 0])) == 1
    undecided = torch.full((4, 4), 0.25)  # says a quarter, and is right in a quarter
    assert evaluate._expected_calibration_error(undecided, torch.arange(4)) == 0
    result = evaluate.accuracy(Identity(), Images([[100.0, 0.0], [100.0, 0.0]], [0, 1]))
    assert result.ece == pytest.approx(0.5)


def test_columns_of_a_result_are_columns_of_a_row():
    columns = evaluate.accuracy(Identity(), Images([[1.0, 0.0]], [0]))._asdict()
    assert set(columns) - {"top5", "per_class"} <= set(runs._COLUMNS) and "ece" in columns
    assert runs._COLUMNS.index("ece") == runs._COLUMNS.index("loss") + 1


# -- what changed


def random_images(count, classes=4):
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(classes, (count,), generator=generator).tolist()
    return Images((3 * torch.randn(count, classes, generator=generator)).tolist(), labels)


@pytest.mark.parametrize("count", [1, 5, 200])
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_changes_are_those_of_two_accuracies(count, most):
    images, before, after = random_images(count), Identity(), Identity(0.5, [1, 0, 2, 3])
    changes = evaluate.compare(before, after, images, classes=range(4), most=most)
    assert before.images_run == after.images_run == count  # one pass of each
    first, second = evaluate.accuracy(before, images), evaluate.accuracy(after, images)
    table = changes.classes
    assert table["class"].tolist() == [0, 1, 2, 3] and table.images.sum() == count
    torch.testing.assert_close(
        torch.tensor(table.before), torch.tensor(first.per_class).double(), equal_nan=True
    )
    torch.testing.assert_close(
        torch.tensor(table.after), torch.tensor(second.per_class).double(), equal_nan=True
    )
    assert (table.images * table.change).sum() / count == pytest.approx(second.top1 - first.top1)

    moved = changes.images
    assert len(moved) == min(most, count) and moved.divergence.is_monotonic_decreasing
    p, q = (model(images.logits).detach().double().softmax(1) for model in (before, after))
    mean = ((p + q) / 2).log()  # torch's own Kullback-Leibler divergences to the mean of both
    known = sum(kl_div(mean, of, reduction="none").sum(1) for of in (p, q)) / 2
    torch.testing.assert_close(
        torch.tensor(moved.divergence), known.sort(descending=True).values[:most]
    )
    assert moved.divergence.min() >= 0 and moved.divergence.max() <= math.log(2)
    assert moved.label.tolist() == images.labels[moved.image.tolist()].tolist()
    for row in moved.itertuples():
        assert [row.p_before, row.p_after] == pytest.approx(
            [of[row.image, row.label].item() for of in (p, q)]
        )
        assert (row.before, row.after) == (p[row.image].argmax(), q[row.image].argmax())


def test_changes_by_hand():
    images = Images([[9.0, 9.0, 0.0], [100.0, 0.0, 0.0], [0.0, 0.0, 100.0]], [0, 0, 2])
    changes = evaluate.compare(
        Identity(), Identity(order=[1, 0, 2]), images, classes=["ant", "bee", "cat"], most=2
    )
    assert changes.classes["class"].tolist() == [
        "ant",
        "bee",
        "cat",
    ] and changes.classes.images.tolist() == [2, 0, 1]
    assert changes.classes.change.tolist()[::2] == [
        -50.0,
        0.0,
    ]  # the first is a tie that stays with ant
    assert math.isnan(changes.classes.change[1])  # no image of a bee
    furthest, second = changes.images.to_dict("records")
    assert furthest["divergence"] == pytest.approx(math.log(2)) and furthest["image"] == 1
    assert [furthest[name] for name in ("label", "before", "after")] == ["ant", "ant", "bee"]
    assert (furthest["p_before"], furthest["p_after"]) == pytest.approx((1, 0))
    assert (second["image"], second["divergence"]) == (
        0,
        0,
    )  # of those that did not move, the first


def test_nothing_changes_between_a_model_and_itself():
    changes = evaluate.compare(Identity(), Identity(), random_images(9), classes=range(4))
    assert (changes.images.divergence == 0).all() and changes.images.image.tolist() == list(
        range(9)
    )
    assert (changes.classes.change.dropna() == 0).all()


def test_what_cannot_be_compared_is_an_error():
    images = random_images(3)
    with pytest.raises(ValueError, match=r"models of \[4, 2\] classes by 4 names"):
        evaluate.compare(Identity(), Identity(order=[0, 1]), images, classes=range(4))
    with pytest.raises(ValueError, match=r"models of \[4, 4\] classes by 1 names"):
        evaluate.compare(Identity(), Identity(), images, classes=["ant"])
