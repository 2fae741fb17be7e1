"""sensitivity measures the loss of the model that was really cut, and leaves it unchanged."""

import copy

import pandas as pd
import pytest
import torch

from vitlab import models
from vitlab.pruning import masks, prune, scores, sensitivity, shrink


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_curves_measure_each_layer_alone_and_restore_it_bit_equal(model, batch):
    before, saliency = state(model), scores.weights(model, [batch], criteria=["taylor"])["taylor"]
    table = sensitivity.curves(model, saliency, [batch], ratios=[0.5, 0.9])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(table) == 2 * len(models.view(model).linears())
    row = table.iloc[3]
    name = f"{row.layer}.weight"
    prune.apply(model, {name: masks.keep_largest(saliency[name], sparsity=row.ratio)})
    assert scores.loss(model, [batch]) == pytest.approx(row.loss, rel=1e-6)


def test_curves_of_a_role_cut_all_its_layers_together(model, batch):
    before, saliency = state(model), scores.weights(model, [batch], criteria=["taylor"])["taylor"]
    view = models.view(model)
    table = sensitivity.curves(model, saliency, [batch], ratios=[0.5, 0.9], per="role")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    roles = list(dict.fromkeys(view.role(name) for name in view.linears()))
    assert table.role.tolist() == [role for role in roles for _ in range(2)]
    assert {*table.layer, *table.block} == {"all"}
    layers = sensitivity.curves(model, saliency, [batch], ratios=[0.5, 0.9])
    assert list(table) == list(layers) and not {"all"} & {*layers.layer, *layers.block}
    for row in table[table.ratio == 0.9].itertuples():
        of_role = {
            f"{name}.weight": saliency[f"{name}.weight"] for name in view.linears([row.role])
        }
        cut = copy.deepcopy(model)
        prune.apply(cut, masks.keep_largest(of_role, sparsity=0.9, per="layer"))
        assert scores.loss(cut, [batch]) == pytest.approx(row.loss, rel=1e-6)
        if len(of_role) == 1:  # a role of one layer is that layer
            assert row.loss == layers[(layers.role == row.role) & (layers.ratio == 0.9)].loss.item()


def test_a_measurement_that_fails_leaves_the_model_whole(vit, batch, monkeypatch):
    before, saliency = state(vit), scores.weights(vit, criteria=["magnitude"])["magnitude"]
    losses = iter([1.0])  # of the uncut model, and no more
    monkeypatch.setattr(scores, "loss", lambda *_: next(losses))
    with pytest.raises(StopIteration):
        sensitivity.curves(vit, saliency, [batch], ratios=[0.5])
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())


def test_ablation_equals_removal(model, batch):
    dense, before = scores.loss(model, [batch]), state(model)
    table = sensitivity.ablations(model, [batch], per_block=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for row in table[table.block == models.view(model).blocks[-1].name].itertuples():
        small = shrink.remove(model, {(row.block, row.kind): [row.unit]})
        assert scores.loss(small, [batch]) - dense == pytest.approx(row.increase, abs=1e-5)


def test_a_perfect_score_agrees_and_a_reversed_one_disagrees(vit, batch):
    measured = sensitivity.ablations(vit, [batch], per_block=64)
    perfect = {key: torch.zeros(count) for key, count in models.view(vit).units().items()}
    for row in measured.itertuples():
        perfect[row.block, row.kind][row.unit] = row.increase
    table = sensitivity.agreement(
        {"right": perfect, "wrong": {k: -v for k, v in perfect.items()}}, measured
    )
    assert table[table.criterion == "right"].spearman.values == pytest.approx(1)
    assert table[table.criterion == "wrong"].spearman.values == pytest.approx(-1)
    assert table.units.tolist() == [8, 128, 8, 128]


def test_all_heads_go_one_by_one_and_some_neurons(model, batch):
    table = sensitivity.ablations(model, [batch], per_block=2)
    for (name, kind), part in table.groupby(["block", "kind"]):
        assert len(part) == (models.view(model).block(name).num_heads if kind == "heads" else 2)
        assert part.unit.is_unique


def test_layers_are_ranked_by_what_a_cut_takes_from_them(model, batch):
    saliency = scores.weights(model, [batch], criteria=["taylor"])["taylor"]
    table = sensitivity.curves(model, saliency, [batch], ratios=[0.5, 0.75])
    half = table[table.ratio == 0.5].set_index("layer").increase
    size = {name: score.numel() for name, score in saliency.items()}
    right = {
        n: torch.full_like(s, half[n.removesuffix(".weight")] / size[n])
        for n, s in saliency.items()
    }
    weight_scores = {"right": right, "wrong": {n: -s for n, s in right.items()}, "taylor": saliency}
    ranked = sensitivity.layer_agreement(weight_scores, saliency, table[table.ratio == 0.5])
    assert list(ranked) == ["criterion", "kind", "spearman", "units"] and set(ranked.kind) == {
        "weights"
    }
    assert (
        ranked.spearman[:2].tolist() == pytest.approx([1, -1]) and (ranked.units == len(half)).all()
    )
    lost = []
    for score in saliency.values():  # by hand: the sum of what goes
        lost.append(score.flatten().sort().values[: round(0.5 * score.numel())].sum().item())
    expected = pd.Series(lost).rank().corr(half.reset_index(drop=True).rank())
    assert ranked.spearman[2] == pytest.approx(expected)
    both = sensitivity.layer_agreement(weight_scores, saliency, table)
    alone = [
        sensitivity.layer_agreement(weight_scores, saliency, part).spearman
        for _, part in table.groupby("ratio")
    ]
    assert both.spearman.tolist() == pytest.approx(((alone[0] + alone[1]) / 2).tolist())


def test_curves_refuse_what_is_no_share_and_no_way_to_cut(vit, batch):
    with pytest.raises(ValueError, match="sparsity is a share"):
        sensitivity.curves(
            vit, scores.weights(vit, criteria=["magnitude"])["magnitude"], [batch], ratios=[50]
        )
    with pytest.raises(ValueError, match="unknown way to cut .per. 'block'"):
        sensitivity.curves(vit, {}, [batch], ratios=[0.5], per="block")
