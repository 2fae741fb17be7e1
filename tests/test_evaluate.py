"""Tests of evaluate: counts by hand, extreme cases, errors."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from vitlab.evaluation import evaluate
from vitlab.models import anatomy
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


# -- features


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("classes", [0, 3])
def test_features_are_those_of_each_image_in_order(model, batch, batch_size, classes):
    model.reset_classifier(classes)
    images = Images([], [])
    images.logits, images.labels = batch[0], batch[1] + 200  # of classes that are not the model's
    found = evaluate.features(model.train(), images, batch_size=batch_size)
    assert model.training and torch.equal(found.labels, images.labels)
    expected = anatomy.features(model.eval(), batch[0]).detach()
    torch.testing.assert_close(found.features, expected)
    assert not found.features.is_inference()  # a probe may be fitted to them


def test_features_that_say_nothing_are_an_error(model, batch):
    with pytest.raises(ValueError, match="empty split"):
        evaluate.features(model, Images([], []))
    images = Images([], [])
    images.logits, images.labels = batch
    model.patch_embed.steps[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        evaluate.features(model, images)


def random_features(count, width=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + count)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[:classes] = torch.arange(min(count, classes))
    return torch.randn(count, width, generator=generator) + labels[:, None], labels


def test_neighbours_by_hand():
    # Angles to (1, 0) are 0, 60 and 90 degrees: cosines 1, 1/2 and 0, whatever the lengths.
    known = torch.tensor([[7.0, 0.0], [1.0, 3**0.5], [0.0, 2.0]])
    labels, image = torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]])
    # At temperature 1 the votes are e against e^(1/2) + 1 = 2.65: the nearest one stays ahead.
    assert evaluate.knn(
        known, labels, image, torch.tensor([0]), neighbours=(1, 2, 3), temperature=1
    ) == {1: 100, 2: 100, 3: 100}
    # At 2 they are 1.65 against 1.28 of one and 2.28 of two others.
    assert evaluate.knn(
        known, labels, image, torch.tensor([0]), neighbours=(1, 2, 3), temperature=2
    ) == {1: 100, 2: 100, 3: 0}


@pytest.mark.parametrize("count", [4, 30])
@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1.0])
def test_neighbours_equal_their_definition(count, temperature):
    (known, labels), (images, wanted) = random_features(count), random_features(50, seed=1)
    neighbours = (1, 3, count)
    right = dict.fromkeys(neighbours, 0)
    for image, label in zip(images.double(), wanted, strict=True):
        cosines = torch.cosine_similarity(known.double(), image[None], dim=1)
        for k in neighbours:
            votes = torch.zeros(4, dtype=torch.float64)
            for place in cosines.argsort(descending=True)[:k]:
                votes[labels[place]] += math.exp((cosines[place] - cosines.max()) / temperature)
            right[k] += int(votes.argmax() == label)
    expected = {k: 2.0 * count for k, count in right.items()}
    for scale in (1, 1000):  # lengths do not count
        found = evaluate.knn(
            scale * known,
            labels,
            images,
            wanted,
            neighbours=neighbours,
            temperature=temperature,
        )
        assert found == pytest.approx(expected)


def test_an_image_is_its_own_nearest_neighbour():
    known, labels = random_features(20)
    assert evaluate.knn(known, labels, known, labels, neighbours=(1,)) == {1: 100}
    with pytest.raises(ValueError, match="21 neighbours among 20 images"):
        evaluate.knn(known, labels, known, labels, neighbours=(1, 21))


@pytest.mark.parametrize("strength", [1.0, 0.1, 1e-3])
def test_a_probe_is_where_its_gradient_vanishes(strength):
    (known, labels), (val, wanted) = random_features(60), random_features(40, seed=1)
    known = 3 * known + 7
    probe = evaluate.linear_probe(known, labels, val, wanted, strengths=[strength])
    deviation = known.std(0)
    weight, bias = probe.layer.weight.clone().requires_grad_(), probe.layer.bias.clone()
    logits = known @ weight.T + bias.requires_grad_()
    ridge = strength / 2 * (weight * deviation).square().sum()
    loss = torch.nn.functional.cross_entropy(logits, labels) + ridge
    by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
    assert (by_weight / deviation).abs().max() < 2e-3 and by_bias.abs().max() < 2e-3
    assert probe.val_top1 == evaluate.top1(probe.layer(val), wanted)


def test_a_probe_does_not_depend_on_units_of_features():
    (known, labels), (val, wanted) = random_features(60), random_features(40, seed=1)
    scale, shift = torch.tensor([1e-3, 1, 10, 100, 0.5]), torch.tensor([5.0, 0, -3, 1, 100])
    first = evaluate.linear_probe(known, labels, val, wanted, strengths=[0.01])
    second = evaluate.linear_probe(
        known * scale + shift, labels, val * scale + shift, wanted, strengths=[0.01]
    )
    torch.testing.assert_close(
        second.layer(val * scale + shift), first.layer(val), rtol=0.02, atol=0.02
    )
    # one that never varies has no weight
    constant = evaluate.linear_probe(
        torch.nn.functional.pad(known, (0, 1), value=3),
        labels,
        torch.nn.functional.pad(val, (0, 1), value=3),
        wanted,
        strengths=[0.01],
    )
    assert (constant.layer.weight[:, -1] == 0).all()


def test_the_strength_is_the_best_on_val_and_of_equal_ones_the_first():
    (known, labels), (val, wanted) = random_features(60), random_features(40, seed=1)
    strengths = (100.0, 1.0, 1e-2, 1e-4)
    alone = [
        evaluate.linear_probe(known, labels, val, wanted, strengths=[each]).val_top1
        for each in strengths
    ]
    probe = evaluate.linear_probe(known, labels, val, wanted, strengths=strengths)
    assert probe.val_top1 == pytest.approx(max(alone), abs=2.6)  # one image of 40: begun elsewhere
    apart, classes = 10 * torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    probe = evaluate.linear_probe(apart, classes, apart, classes, strengths=strengths)
    assert (probe.strength, probe.val_top1) == (100.0, 100.0)


@pytest.mark.parametrize("bf16, amx", [(True, False), (False, True), (False, False)])
def test_an_older_torch_tells_bf16_in_other_words(bf16, amx, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert evaluate.gains_from_bf16(torch.device("cpu")) == (bf16 or amx)
