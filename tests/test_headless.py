"""A model without classifier is counted, scored, cut, reconstructed, stored and exported as others are."""

import pytest
import torch
from conftest import toy

from vitlab import models
from vitlab.evaluation import bench, cost, export
from vitlab.models import anatomy, checkpoint
from vitlab.pruning import budget, factor, ranks, recover, scores, shrink


@pytest.fixture
def headless(any_model):
    """A model whose classifier was taken off, on every architecture."""
    any_model.reset_classifier(0)
    return any_model


def test_features_are_what_the_classifier_reads(any_model, batch):
    features = anatomy.features(any_model, batch[0])
    classifiers = [any_model.get_submodule(name) for name in anatomy.classifier_names(any_model)]
    if len(classifiers) == 1:  # a distilled one has two, each of a token of its own
        torch.testing.assert_close(classifiers[0](features), any_model(batch[0]))
    any_model.reset_classifier(0)
    assert torch.equal(features, any_model(batch[0]))
    assert models.view(any_model).classifiers == []


def test_without_pooling_features_are_all_tokens(batch):
    model = toy("conv_vit", embed_dim=24, depth=1, num_heads=3, global_pool="")
    assert anatomy.features(model, batch[0]).shape == (6, 16 * 24)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(anatomy.features(model, batch[0]), model(batch[0]).flatten(1))
    small, _ = budget.reach(model, [batch], labels="none", macs=0.8)
    assert cost.macs(small) <= 0.8 * cost.macs(model)


def test_half_of_the_macs_go_without_labels(headless, batch, tmp_path):
    before = headless(batch[0])
    batches = [(batch[0], None)]
    # without labels none are needed in the batches either
    small, plan = budget.reach(headless, batches, labels="none", macs=0.6)
    assert cost.macs(small) <= 0.6 * cost.macs(headless) and plan.predicted > 0
    assert torch.equal(headless(batch[0]), before)
    checkpoint.save(small, tmp_path)
    loaded = checkpoint.load(tmp_path)
    after = small(batch[0])
    assert after.isfinite().all() and torch.equal(loaded(batch[0]), after)
    assert loaded.num_classes == 0 and "head" not in set(cost.breakdown(loaded).role)
    meters = cost.summary(loaded)
    assert meters["macs"] == meters["macs_torch"]


def test_the_pieces_of_that_call(headless, batch):
    batches = [(batch[0], None)]
    kinds = ["heads", "neurons", "ranks"]
    found = budget.candidates(headless, batches, kinds=kinds, labels="none")
    plan = budget.plan(headless, **found, kinds=kinds, macs=0.7)
    for fill in (None, "mean", "least squares"):
        small, drops = budget.cut(headless, plan, batches, compensate=fill)
        assert cost.macs(small) <= 0.7 * cost.macs(headless)
    solved = recover.reconstruct(small, headless, batches, drops=drops)
    assert 0 < scores.change(headless, solved, batches) < 1


def test_one_share_of_every_layer_is_chosen_by_what_features_change(model, batch):
    model.reset_classifier(0)
    found = ranks.uniform(model, [batch], macs=0.7)
    chosen = scores.change(model, factor.factorise(model, found), [batch])
    assert 0 < chosen < 1 and cost.macs(factor.factorise(model, found)) <= 0.7 * cost.macs(model)


def test_it_is_timed(model):
    model.reset_classifier(0)
    assert len(bench.latency({"headless": model}, batch=2, repeats=2)) == 1


@pytest.mark.parametrize("is_cut", [False, True])
def test_weights_come_from_a_model_with_a_classifier(vit, batch, tmp_path, is_cut):
    if is_cut:
        vit = shrink.remove(vit, {("blocks.0", "heads"): [1, 3]})
    checkpoint.save(vit, tmp_path)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    with pytest.warns(UserWarning, match="the head is left out$"):
        backbone = models.create(
            "conv_vit", num_classes=0, image_size=16, weights=tmp_path, **options
        )
    assert torch.equal(backbone.eval()(batch[0]), anatomy.features(vit, batch[0]))


@pytest.mark.long
def test_it_is_exported(model, tmp_path):
    model.reset_classifier(0)
    small = shrink.remove(model, {(models.view(model).blocks[0].name, "heads"): [0]})
    assert export.to_onnx(small, tmp_path / "model.onnx") < 1e-4


def test_a_loss_by_labels_is_refused_with_what_to_do(headless, batch):
    for call in (
        lambda: scores.units(headless, [batch], criteria="fisher"),
        lambda: scores.weights(headless, [batch], criteria="taylor", labels="model"),
        lambda: budget.reach(headless, [batch], macs=0.5),
        lambda: scores.loss(headless, [batch]),
    ):
        with pytest.raises(ValueError, match='no classifier, .*: take labels="none"'):
            call()
