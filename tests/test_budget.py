"""budget: the plan meets its target, predicts its own cost, and says its floor."""

import pytest
import torch

from vitlab import budget, cost, models, scores, shrink


def fisher(model, batch):
    return scores.units(model, [batch], criteria=["fisher"])["fisher"]


@pytest.mark.parametrize("macs", [0.9, 0.7])
@pytest.mark.parametrize("kinds", [["heads", "neurons"], ["neurons"]])
def test_the_plan_costs_what_it_says_and_meets_the_target(model, batch, macs, kinds):
    try:
        plan = budget.plan(model, fisher(model, batch), macs=macs, kinds=kinds)
    except ValueError as error:
        assert "cannot reach" in str(error) and (macs == 0.7 or kinds == ["neurons"])  # half of a toy is its stem
        return
    small = shrink.remove(model, plan.drop)
    assert cost.macs(small) / cost.macs(model) == pytest.approx(plan.share, abs=1e-12) and plan.share <= macs
    largest = plan.table.macs_saved.sum() / cost.macs(model)
    assert largest == pytest.approx(1 - plan.share, abs=1e-6)
    dropped = {key: len(indices) for key, indices in plan.drop.items()}
    for block, kind, units, gone, _, _ in plan.table.itertuples(index=False):
        assert dropped.get((block, kind), 0) == gone < units
        assert kind in kinds and (kind == "heads" or (units - gone) % 8 == 0)


@pytest.mark.parametrize("macs", [0.8, 0.3])
def test_kinds_that_share_their_costs_are_counted_as_they_fall(any_model, macs):
    """Random scores for every kind there is: widths, heads and their dimensions multiply in what they save."""
    normed = models.view(any_model).blocks[0].normalises_queries
    kinds = [kind for kind in budget.FLOORS if kind != "qk" or not normed]
    generator = torch.Generator().manual_seed(0)
    counts = models.view(any_model).units(kinds)
    unit_scores = {key: torch.rand(count, generator=generator) for key, count in counts.items()}
    plan = budget.plan(any_model, unit_scores, macs=macs, kinds=kinds, multiple=4)
    small = shrink.remove(any_model, plan.drop)
    assert cost.macs(small) / cost.macs(any_model) == pytest.approx(plan.share, abs=1e-9) and plan.share <= macs
    assert plan.table.macs_saved.sum() / cost.macs(any_model) == pytest.approx(1 - plan.share, abs=1e-9)
    for key, left in models.view(small).units(kinds).items():
        block = models.view(small).block(key[0]) if key[1] in ("qk", "v") else None
        assert left >= budget.FLOORS[key[1]] * (block.num_heads if block else 1)
        assert (counts[key] - left) % 4 == 0 or key[1] not in ("neurons", "width", "filters")


def test_dimensions_of_heads_go_one_from_each(model):
    counts = models.view(model).units(["qk", "v"])
    generator = torch.Generator().manual_seed(0)
    unit_scores = {key: torch.rand(count, generator=generator) for key, count in counts.items()}
    plan = budget.plan(model, unit_scores, macs=0.97, kinds=["qk", "v"])
    assert {kind for _, kind in plan.drop} == {"qk", "v"}
    small = shrink.remove(model, plan.drop)
    assert cost.macs(small) / cost.macs(model) == pytest.approx(plan.share, abs=1e-9) and plan.share <= 0.97
    for (name, kind), gone in plan.drop.items():
        heads = models.view(model).block(name).num_heads
        each = torch.tensor(gone).div(counts[name, kind] // heads, rounding_mode="floor").bincount(minlength=heads)
        assert len(set(each.tolist())) == 1


def test_the_cheapest_loss_per_mac_goes_first_by_hand(vit):
    view = models.view(vit)
    unit_scores = {key: torch.ones(count) for key, count in view.units().items()}
    unit_scores["blocks.1", "neurons"][8:16] = 0  # a group of eight that costs nothing to lose
    plan = budget.plan(vit, unit_scores, macs=0.999, kinds=["neurons"])
    assert plan.drop == {("blocks.1", "neurons"): list(range(8, 16))}
    assert plan.table.predicted.sum() == 0


def test_a_share_out_of_reach_names_the_floor(vit, batch):
    units = fisher(vit, batch)
    with pytest.raises(ValueError, match=r"neurons alone cannot reach 0.05 x MACs: 0\.\d+ stays"):
        budget.plan(vit, units, macs=0.05, kinds=["neurons"])
    with pytest.raises(ValueError, match="share to keep"):
        budget.plan(vit, units, macs=50)
    with pytest.raises(ValueError, match=r"no scores for \['width'\]"):
        budget.plan(vit, units, macs=0.5, kinds=["neurons", "width"])
    with pytest.raises(ValueError, match="unknown kinds"):
        budget.plan(vit, units, macs=0.5, kinds=["blocks"])
