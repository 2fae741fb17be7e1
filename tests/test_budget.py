"""budget: the plan meets its target, predicts its own cost, and says its floor."""

import pickle
import re
from collections import Counter
from dataclasses import replace
from itertools import product

import pandas as pd
import pytest
import torch
from conftest import OTHERS, toy

from vitlab import models
from vitlab.evaluation import bench, cost
from vitlab.pruning import budget, factor, lowrank, pool, recover, scores, shrink
from vitlab.pruning.ranks import uniform
from vitlab.report import inside
from vitlab.training import _shapes, data, train

# -- one call


def test_reach_is_the_four_calls(any_model, batch):
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    batches = list(zip(*(part.split(4) for part in batch), strict=True))
    small, plan = budget.reach(any_model, batches, macs=0.6)

    kinds = ["heads", "neurons", "width", "ranks"]
    if models.view(any_model).units(["filters"]):
        kinds.insert(2, "filters")
    seen = budget.positions(any_model, batches)
    matrices = list(models.view(any_model).matrices)
    grams = scores.grams(any_model, batches, layers=matrices, affine=True, **seen)
    how = {"layers": matrices, "labels": "model"}
    gradients = scores.gradient_grams(any_model, batches, **how)
    half = batches[::2]
    how = {"kinds": kinds, "grams": grams, "gradients": gradients}
    scored = budget.candidates(any_model, half, **how)
    expected_plan = budget.plan(any_model, **scored, kinds=kinds, narrow=True, macs=0.6)
    how = {"compensate": "least squares", "grams": grams, **seen}
    expected, drops = budget.cut(any_model, expected_plan, half, **how)
    damping = "held out" if len(batches) >= 4 else 1e-3
    how = {"drops": drops, "damping": damping, "gradients": gradients, **seen}
    expected = recover.reconstruct(expected, any_model, batches, **how)
    expected = factor.narrow_heads(expected)

    assert plan.drop == expected_plan.drop and plan.ranks == expected_plan.ranks
    assert torch.equal(small(batch[0]), expected(batch[0]))
    assert cost.macs(small) <= 0.6 * cost.macs(any_model) * (1 + 1e-9)
    for name, tensor in any_model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_calibration_tells_is_measured_once_and_shared(vit, batch, monkeypatch):
    batches = list(zip(*(part.split(4) for part in batch), strict=True))
    known = budget.Calibration(vit, batches)
    small, drops = known.cut(known.plan(macs=0.6))
    small = known.reconstruct(small, drops)
    for name in ("gradient_grams", "measure", "position_weights"):
        monkeypatch.setattr(scores, name, None)  # whoever calls it now fails
    again = known.plan(macs=0.6)
    how = {"kinds": known.kinds, "narrow": True}
    assert again.drop == budget.plan(vit, **known.candidates, **how, macs=0.6).drop
    kinds = {kind for _, kind in known.plan(kinds=["heads", "neurons"], macs=0.9).drop}
    assert kinds <= {"heads", "neurons"}
    solved = known.reconstruct(known.cut(again, compensate=None)[0], drops)
    assert cost.macs(solved) == cost.macs(small)


def test_sixteen_positions_of_an_image_do_unless_images_are_few(vit):
    """Each input of the widest layer gets eight of them."""
    widest = max(layer.weight[0].numel() for layer in models.view(vit).matrices.values())
    x = torch.zeros(widest // 8, 3, 1, 1)
    for batches, tokens in ((1, 64), (2, 32), (4, 16), (8, 16)):
        found = budget.positions(vit, [(x, None)] * batches)
        assert found == {"tokens": tokens, "weights": {}}


@pytest.mark.parametrize("batches, size, used", [(8, 64, 2), (8, 32, 4), (4, 8, 4), (16, 64, 4)])
def test_gradients_are_of_a_quarter_of_the_images_or_of_128(batches, size, used):
    images = [(torch.zeros(size, 1), None)] * batches
    assert len(budget._few(images)) == used


def test_a_quarter_of_the_batches_tells_how_much_positions_count(batch):
    model = toy(**OTHERS["registers"])
    batches = list(zip(*(part.split(1) for part in batch), strict=True))
    found = budget.positions(model, batches)["weights"]
    expected = scores.position_weights(model, [batches[0], batches[4]])
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_kinds_that_a_model_lacks_are_left_out_unless_they_are_named(batch):
    """A stem of one convolution has no filters, and dimensions of normalised queries cannot go."""
    without_filters, normed = toy(**OTHERS["deit3"]), toy(**OTHERS["qk norm"])
    for model in (without_filters, normed):
        _, plan = budget.reach(model, [batch], macs=0.8)
        assert plan.share <= 0.8 and {kind for _, kind in plan.drop} <= {
            "heads",
            "neurons",
            "width",
            "filters",
        }
    for what in pool._TARGETS:
        with pytest.raises(
            pool.Unreachable, match=r"filters alone cannot reach 0.8 .*: 1.000 stays"
        ):
            budget.plan(without_filters, kinds=["filters"], **{what: 0.8})
    with pytest.raises(ValueError, match="normalises queries and keys"):
        budget.candidates(normed, [batch], kinds=["heads", "qk"])


def test_a_search_is_no_worse_on_its_images_and_predicts_by_the_scores(any_model, batch):
    model, batches = any_model, list(zip(*(part.split(2) for part in batch), strict=True))
    known = budget.Calibration(model, batches)
    first, best = known.plan(macs=0.5), known.search(8, macs=0.5)
    assert repr(known.search(0, macs=0.5)) == repr(first)
    assert (
        best.share <= 0.5 and budget.reach(model, batches, macs=0.5, trials=8)[1].drop == best.drop
    )
    few, whole = budget.Calibration(model, batches[::4]), scores.Answers(model, batches[1::2])
    missed = [whole.distance(few.reconstruct(*few.cut(plan))) for plan in (first, best)]
    assert missed[1] <= missed[0] and (missed[1] < missed[0] or best.drop == first.drop)
    # What goes is predicted to lose what its own scores say, at whatever rates it was chosen.
    scored = known.candidates["unit_scores"]
    units = best.table[best.table.kind != "ranks"]
    expected = [
        sum(scored[row.block, row.kind][best.drop.get((row.block, row.kind), [])]).item()
        if (row.block, row.kind) in best.drop
        else 0
        for row in units.itertuples()
    ]
    assert units.predicted.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    with pytest.raises(ValueError, match="give two batches"):
        budget.reach(model, [batch], macs=0.5, trials=1)


def test_a_kind_is_expected_to_lose_what_its_trial_cuts_lost(any_model, batch, monkeypatch):
    monkeypatch.setattr(budget, "_TOLD", 0)  # the model is not trained, and loses little
    model, batches = any_model, list(zip(*(part.split(4) for part in batch), strict=True))
    known = budget.Calibration(model, batches)
    before = scores.loss(model, batches[1::2])
    tried = 0
    for kind in known.kinds:
        floor = known._floor(kind)
        for share in (5 / 6, 1 / 2):
            plan = known.plan(kinds=[kind], macs=share + (1 - share) * floor)
            rise = scores.loss(known.cut(plan, compensate=None)[0], batches[1::2]) - before
            if plan.predicted > 0 and rise > 0:
                assert known.expected(plan) == pytest.approx(rise, rel=0.01)
                tried += 1
    assert tried
    # A pool is expected to lose the sum of its kinds, whatever its order.
    both = known.plan(macs=0.5)
    parts = both.table.groupby("kind").predicted.sum()
    alone = [
        known.expected(replace(both, table=both.table[both.table.kind == kind]))
        for kind in parts.index
    ]
    assert known.expected(both) == pytest.approx(sum(alone)) and sum(alone) > 0


def test_what_is_expected_by_hand(vit, batch):
    known = budget.Calibration(vit, [batch])
    known.trials["neurons"] = [(0.001, 0.005), (0.1, 0.2), (0.4, 3.2)]  # the first is noise
    table = pd.DataFrame({"kind": ["neurons"] * 2})
    for predicted, times in ((0.01, 2), (0.1, 2), (0.2, 4), (0.4, 8), (1, 8)):
        plan = pool.Plan({}, {}, table.assign(predicted=predicted / 2), 0.5)
        assert known.expected(plan) == pytest.approx(times * predicted)
    assert known.expected(pool.Plan({}, {}, table.assign(predicted=0.0), 1)) == 0
    known.trials["neurons"] = []
    assert known.expected(plan) == pytest.approx(1)
    for kind in known.kinds:  # one batch is all there is to try cuts on
        assert known.expected(known.plan(kinds=[kind], macs=0.95)) >= 0


def test_reach_says_at_once_what_is_wrong(vit, batch):
    with pytest.raises(ValueError, match="unknown target 'flops'.* macs, params, bytes, latency"):
        budget.reach(vit, [batch], flops=0.5)
    with pytest.raises(ValueError, match="no batches: give a list"):
        budget.reach(vit, [], macs=0.5)
    with pytest.raises(pool.Unreachable, match=r"cannot reach 0.01 x macs: 0\.\d+ stays"):
        budget.reach(vit, [batch], macs=0.01)


@pytest.mark.parametrize(
    "kept, share", [("*blocks.1", 0.8), ("*.attn.qkv", 0.8), ("patch_embed", 0.95)]
)
def test_layers_to_keep_keep_their_weights_and_the_target_is_met(model, batch, kept, share):
    before = model.state_dict()
    layers = pool.layers_of(model, [kept, "head"])
    own = [name for name in before if name.rpartition(".")[0] in layers]
    kinds = ["heads", "neurons", "width", "filters", "ranks"]
    found = budget.candidates(model, [batch], kinds=kinds)
    plan = budget.plan(model, **found, kinds=kinds, keep=[kept, "head"], macs=share)
    small, _ = budget.cut(model, plan, [batch])
    solved, _ = budget.reach(model, [batch], keep=[kept, "head"], macs=share)
    for cut in (small, solved):
        assert cost.macs(cut) <= share * cost.macs(model) * (1 + 1e-9)
        assert own and all(torch.equal(cut.state_dict()[name], before[name]) for name in own)


@pytest.mark.parametrize("wrong", ["images", iter(())])
def test_calibration_asks_for_a_list_of_batches(vit, wrong):
    with pytest.raises(
        TypeError, match=rf"batches are a list of pairs.*got {type(wrong).__name__}"
    ):
        budget.reach(vit, wrong, macs=0.5)


def test_layers_to_keep_are_known_by_name(vit, batch):
    with pytest.raises(ValueError, match=r"layer to keep 'block\.0', did you mean 'blocks\.0'"):
        budget.reach(vit, [batch], keep=["head", "block.0"], macs=0.5)
    with pytest.raises(pool.Unreachable, match="1.000 stays"):
        budget.reach(vit, [batch], keep=["blocks", "patch_embed", "head"], macs=0.5)


def test_a_plan_is_printed_in_a_few_lines(model, batch):
    _, plan = budget.reach(model, [batch], macs=0.6)
    printed = repr(plan)
    assert len(printed) < 960 and printed.startswith("Plan: ") and "of the macs stay" in printed
    assert f"to rise by {plan.predicted:.3g} (no promise: " in printed.splitlines()[0]
    assert all(kind in printed for _, kind in plan.drop)


# -- the plan


def fisher(model, batch):
    return scores.units(model, [batch], criteria=["fisher"])["fisher"]


@pytest.mark.parametrize(
    "macs, kinds", [(0.95, ["heads", "neurons"]), (0.9, ["heads", "neurons"]), (0.95, ["neurons"])]
)
def test_the_plan_costs_what_it_says_and_meets_the_target(model, batch, macs, kinds):
    plan = budget.plan(model, fisher(model, batch), macs=macs, kinds=kinds)
    small = shrink.remove(model, plan.drop)
    assert (
        cost.macs(small) / cost.macs(model) == pytest.approx(plan.share, abs=1e-12)
        and plan.share <= macs
    )
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
    kinds = [kind for kind in pool.FLOORS if kind != "qk" or not normed]
    generator = torch.Generator().manual_seed(0)
    counts = models.view(any_model).units(kinds)
    unit_scores = {key: torch.rand(count, generator=generator) for key, count in counts.items()}
    plan = budget.plan(any_model, unit_scores, macs=macs, kinds=kinds, multiple=4)
    small = shrink.remove(any_model, plan.drop)
    assert (
        cost.macs(small) / cost.macs(any_model) == pytest.approx(plan.share, abs=1e-9)
        and plan.share <= macs
    )
    assert plan.table.macs_saved.sum() / cost.macs(any_model) == pytest.approx(
        1 - plan.share, abs=1e-9
    )
    for key, left in models.view(small).units(kinds).items():
        block = models.view(small).block(key[0]) if key[1] in ("qk", "v") else None
        assert left >= pool.FLOORS[key[1]] * (block.num_heads if block else 1)
        assert (counts[key] - left) % 4 == 0 or key[1] not in ("neurons", "width", "filters")


def test_an_eighth_of_a_stream_stays_where_nothing_of_it_seems_to_matter():
    """128 channels of nothing and neurons that matter: 16 channels stay, though 8 would be a budget's floor."""
    vit = models.create(
        "conv_vit", num_classes=3, image_size=16, embed_dim=128, depth=2, num_heads=4, patch_size=8
    )
    counts = models.view(vit).units(["neurons", "width"])
    unit_scores = {
        key: torch.full((count,), float(key[1] == "neurons")) for key, count in counts.items()
    }
    with pytest.raises(pool.Unreachable) as floor:
        budget.plan(vit, unit_scores, kinds=["neurons", "width"], macs=0.01)
    floor = float(re.search(r"(0\.\d+) stays", str(floor.value))[1])
    plan = budget.plan(vit, unit_scores, kinds=["neurons", "width"], macs=floor + 0.001)
    assert models.view(shrink.remove(vit, plan.drop)).units(["width"]) == {
        ("stages.0", "width"): 16
    }


@pytest.mark.parametrize("what", ["params", "bytes"])
@pytest.mark.parametrize("share", [0.85, 0.7])
def test_parameters_and_bytes_are_those_of_the_smaller_model(any_model, what, share):
    counts = models.view(any_model).units(["heads", "neurons", "width"])
    generator = torch.Generator().manual_seed(0)
    unit_scores = {key: torch.rand(count, generator=generator) for key, count in counts.items()}
    plan = budget.plan(
        any_model, unit_scores, kinds=["heads", "neurons", "width"], multiple=1, **{what: share}
    )
    small = shrink.remove(any_model, plan.drop)
    kept = [sum(p.numel() for p in m.parameters()) for m in (small, any_model)]
    if what == "bytes":
        kept = [cost.bytes_memory(m) for m in (small, any_model)]
    assert plan.share == kept[0] / kept[1]
    assert 0.95 * share < plan.share <= share  # of toys: a head is a few per cent of them
    assert f"{what}_saved" in plan.table


@pytest.mark.parametrize("runtime, fixed", [("eager", 0.1), ("onnxruntime", 0.3)])
def test_latency_is_corrected_by_what_is_measured(vit, batch, monkeypatch, runtime, fixed):
    """Machines by hand: a tenth of the eager time, and three of the other, no cut can save; MACs tell the rest."""

    def latency(named, **_):
        assert {setting.runtime for setting in named.values()} == {runtime}
        dense, small = (cost.macs(setting.model) for setting in named.values())
        speedup = 1 / (fixed + (1 - fixed) * small / dense)
        return pd.DataFrame([dict.fromkeys(COLUMNS, 1.0), dict.fromkeys(COLUMNS, speedup)])

    COLUMNS = ["speedup_q1", "speedup", "speedup_q3"]

    def layer_times(model, table, **_):
        return table.macs.to_numpy(float)

    monkeypatch.setattr(budget.bench, "latency", latency)
    monkeypatch.setattr(budget.bench, "layer_times", layer_times)
    monkeypatch.setattr(budget.runtimes, "timed", bench.Setting)
    plan = budget.plan(vit, fisher(vit, batch), latency=0.93, multiple=1, runtime=runtime)
    assert plan.share == pytest.approx(0.93, rel=0.05) and "latency_saved" in plan.table
    macs = cost.macs(shrink.remove(vit, plan.drop)) / cost.macs(vit)
    assert plan.share == pytest.approx(fixed + (1 - fixed) * macs)
    with pytest.raises(ValueError, match=r"cannot reach 0.05 x latency: 0\.\d+ stays"):
        budget.plan(vit, fisher(vit, batch), latency=0.05, runtime=runtime)


def test_a_runtime_is_where_latency_is_measured(vit, batch):
    with pytest.raises(ValueError, match="where latency is measured, but the target is macs"):
        budget.plan(vit, fisher(vit, batch), macs=0.5, runtime="onnxruntime")
    with pytest.raises(ValueError, match="unknown runtime 'onxruntime', did you mean 'onnx"):
        budget.plan(vit, fisher(vit, batch), latency=0.9, runtime="onxruntime")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        budget.plan(vit, fisher(vit, batch), latency=0.9, runtime="onnxruntime int4")


def test_a_target_is_one_of_four(vit, batch):
    for target in ({}, {"macs": 0.5, "params": 0.5}, {"flops": 0.5}):
        with pytest.raises(
            ValueError,
            match="give one target of macs, params, bytes, latency|unknown target 'flops'",
        ):
            budget.plan(vit, fisher(vit, batch), **target)


def random_scores(model, kinds):
    """Return random scores of units, and of directions: losses of the last ones, which grow as more of them go."""
    generator = torch.Generator().manual_seed(0)
    counts = models.view(model).units([kind for kind in kinds if kind != "ranks"])
    units = {key: torch.rand(count, generator=generator) for key, count in counts.items()}
    directions = {}
    for name, layer in models.view(model).matrices.items():
        lost = torch.rand(min(layer.weight.flatten(1).shape) + 1, generator=generator).double()
        directions[name] = 0.05 * (lost.cumsum(0) - lost.cumsum(0)[0]).flip(0)
    return dict(unit_scores=units, directions=directions)


@pytest.mark.parametrize("macs", [0.9, 0.6, 0.35])
def test_units_ranks_and_blocks_in_one_pool_cost_what_the_plan_says(any_model, batch, macs):
    normed = models.view(any_model).blocks[0].normalises_queries
    kinds = [kind for kind in [*pool.FLOORS, "ranks"] if kind != "qk" or not normed]
    plan = budget.plan(
        any_model,
        **random_scores(any_model, kinds),
        macs=macs,
        kinds=kinds,
        multiple=4,
    )
    small, drops = budget.cut(any_model, plan, [batch])
    assert (
        cost.macs(small) / cost.macs(any_model) == pytest.approx(plan.share, abs=1e-9)
        and plan.share <= macs
    )
    assert plan.table.macs_saved.sum() / cost.macs(any_model) == pytest.approx(
        1 - plan.share, abs=1e-9
    )
    assert drops == ([plan.drop] if plan.drop else []) and small(batch[0]).isfinite().all()
    whole = shrink.remove(any_model, plan.drop) if plan.drop else any_model
    for name, rank in plan.ranks.items():  # two thin layers only where they cost less
        m, n = whole.get_submodule(name).weight.flatten(1).shape
        assert rank * (m + n) < m * n
    lines = plan.table.set_index(["block", "kind"])
    for name, rank in plan.ranks.items():
        assert lines.dropped[name, "ranks"] == lines.units[name, "ranks"] - rank
    assert plan.predicted == plan.table.predicted.sum()


def test_what_costs_nothing_to_lose_goes_first_whatever_its_kind(vit):
    kinds = ["neurons", "ranks", "block"]
    found = random_scores(vit, kinds)
    found["directions"]["blocks.1.mlp.fc1"] *= 0
    plan = budget.plan(vit, **found, macs=0.99, kinds=kinds[:2])
    assert not plan.drop and plan.ranks == {
        "blocks.1.mlp.fc1": 4
    }  # a higher one would gain nothing
    found = random_scores(vit, kinds)
    found["unit_scores"]["blocks.0", "block"] *= 0
    plan = budget.plan(vit, **found, macs=0.7, kinds=kinds)
    assert plan.drop[("blocks.0", "block")] == [0]
    assert not [key for key in plan.drop if key[0] == "blocks.0" and key[1] != "block"]
    found["unit_scores"]["blocks.1", "block"] *= 0  # but not the last one
    plan = budget.plan(vit, **found, macs=0.5, kinds=kinds)
    assert sum(kind == "block" for _, kind in plan.drop) == 1


@pytest.mark.parametrize("what", ["params", "bytes"])
def test_ranks_count_for_parameters_and_bytes(model, what):
    kinds = ["heads", "neurons", "width", "ranks"]
    plan = budget.plan(
        model,
        **random_scores(model, kinds),
        kinds=kinds,
        multiple=1,
        **{what: 0.6},
    )
    small, _ = budget.cut(model, plan)
    count = (
        cost.bytes_memory if what == "bytes" else lambda m: sum(p.numel() for p in m.parameters())
    )
    assert plan.ranks and plan.share == count(small) / count(model)
    assert 0.95 * 0.6 < plan.share <= 0.6


def test_more_is_predicted_to_be_lost_the_less_stays(vit):
    kinds = ["heads", "neurons", "ranks"]
    lost = [
        budget.plan(vit, **random_scores(vit, kinds), macs=macs, kinds=kinds).predicted
        for macs in (0.9, 0.7, 0.5)
    ]
    assert lost == sorted(lost) and lost[0] < lost[-1]


def test_a_cut_is_compensated_as_asked_for(model, batch):
    kinds = ["heads", "neurons", "width", "ranks"]
    plan = budget.plan(
        model, **budget.candidates(model, [batch], kinds=kinds), macs=0.6, kinds=kinds, multiple=4
    )
    layers = list(models.view(model).matrices)
    affine = scores.grams(model, [batch], layers=layers, affine=True)
    means = {name: gram[-1, :-1] for name, gram in affine.items()}
    grams = {name: gram[:-1, :-1] for name, gram in affine.items()}
    for way, known in (
        (None, {}),
        ("mean", dict(means=means)),
        ("least squares", dict(means=means, grams=grams)),
    ):
        small, drops = budget.cut(model, plan, [batch], compensate=way)
        expected = shrink.remove(model, plan.drop, **known)
        if plan.ranks:
            seen = scores.grams(expected, [batch], layers=list(plan.ranks), affine=True)
            seen = {name: gram[:-1, :-1] for name, gram in seen.items()}
            expected = factor.factorise(expected, plan.ranks, grams=seen)
        assert drops == [plan.drop]
        for given in ({}, {"grams": affine}):
            again, _ = budget.cut(model, plan, [batch], compensate=way, **given)
            torch.testing.assert_close(again(batch[0]), expected(batch[0]))
        torch.testing.assert_close(small(batch[0]), expected(batch[0]))
    with pytest.raises(ValueError, match="unknown compensation 'means', did you mean 'mean'"):
        budget.cut(model, plan, [batch], compensate="means")
    with pytest.raises(ValueError, match="no batches: give a list"):
        budget.cut(model, plan, compensate="least squares")


def test_what_a_plan_needs_is_asked_for(vit, batch):
    found = random_scores(vit, ["heads", "ranks"])
    with pytest.raises(ValueError, match="no directions; give scores.directions"):
        budget.plan(vit, found["unit_scores"], kinds=["heads", "ranks"], macs=0.5)
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.qkv \[96, 32\] has 32 directions; got 31 of another model"
    ):
        budget.plan(
            vit, directions={"blocks.0.attn.qkv": torch.zeros(32)}, kinds=["ranks"], macs=0.9
        )
    thin = factor.factorise(vit, {"blocks.0.mlp.fc1": 4})
    with pytest.raises(ValueError, match="blocks.0.mlp.fc1 is a FactoredLinear: take units first"):
        budget.plan(thin, found["unit_scores"], kinds=["heads"], macs=0.9)
    with pytest.raises(
        pool.Unreachable, match=r"ranks alone cannot reach 0.01 x macs: 0\.\d+ stays"
    ):
        budget.plan(vit, directions=found["directions"], kinds=["ranks"], macs=0.01)
    with pytest.raises(ValueError, match="ranks alone cannot reach 0.9 x macs: 1.000 stays"):
        budget.plan(
            vit,
            directions=found["directions"],
            kinds=["ranks"],
            macs=0.9,
            most=dict.fromkeys(found["directions"], 0),
        )


def test_dimensions_of_heads_go_one_from_each(model):
    counts = models.view(model).units(["qk", "v"])
    generator = torch.Generator().manual_seed(0)
    unit_scores = {key: torch.rand(count, generator=generator) for key, count in counts.items()}
    plan = budget.plan(model, unit_scores, macs=0.97, kinds=["qk", "v"])
    assert {kind for _, kind in plan.drop} == {"qk", "v"}
    small = shrink.remove(model, plan.drop)
    assert (
        cost.macs(small) / cost.macs(model) == pytest.approx(plan.share, abs=1e-9)
        and plan.share <= 0.97
    )
    for (name, kind), gone in plan.drop.items():
        heads = models.view(model).block(name).num_heads
        each = (
            torch.tensor(gone)
            .div(counts[name, kind] // heads, rounding_mode="floor")
            .bincount(minlength=heads)
        )
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
    words = r"neurons alone cannot reach 0.05 x macs: 0\.\d+ stays"
    with pytest.raises(pool.Unreachable, match=words) as raised:
        budget.plan(vit, units, macs=0.05, kinds=["neurons"])
    told = pickle.loads(pickle.dumps(raised.value))  # from one process to another
    assert str(told) == str(raised.value) and f"{told.floor:.3f} stays" in str(told)
    budget.plan(vit, units, macs=told.floor + 1e-9, kinds=["neurons"])
    with pytest.raises(ValueError, match="share to keep"):
        budget.plan(vit, units, macs=50)
    with pytest.raises(ValueError, match="'width'.* has 32 units and 0 scores: give scores.units"):
        budget.plan(vit, units, macs=0.5, kinds=["neurons", "width"])
    part = {key: score for key, score in units.items() if key[0] != "blocks.1"}
    with pytest.raises(ValueError, match=r"blocks.1.* units and 0 scores"):
        budget.plan(vit, part, macs=0.5, kinds=["heads", "neurons"])
    longer = units | {("blocks.1", "neurons"): torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"blocks.1.* has 64 units and 3 scores: .* of this very model"
    ):
        budget.plan(vit, longer, macs=0.5, kinds=["heads", "neurons"])
    with pytest.raises(ValueError, match="unknown kind of unit 'blocks', did you mean 'block'"):
        budget.plan(vit, units, macs=0.5, kinds=["blocks"])


def test_a_stage_that_lost_its_blocks_keeps_its_width(swin, batch):
    blocks = [block for block in models.view(swin).blocks if block.stage == 0]
    small = shrink.remove(swin, {(block.name, "block"): [0] for block in blocks})
    plan = budget.plan(
        small, **budget.candidates(small, [batch], kinds=["width"]), kinds=["width"], macs=0.95
    )
    assert set(plan.drop) == {("stages.1", "width")}
    table = inside.widths(small, budget.cut(small, plan)[0]).set_index(["where", "kind"])
    assert table.kept["stages.0", "width"] == table.whole["stages.0", "width"]
    assert table.kept["stages.1", "width"] < table.whole["stages.1", "width"]


def test_grams_that_are_given_weigh_the_ranks(vit, batch):
    plan = budget.plan(
        vit, **budget.candidates(vit, [batch], kinds=["ranks"]), kinds=["ranks"], macs=0.7
    )
    grams = scores.grams(vit, [batch], layers=list(models.view(vit).matrices), affine=True)
    by_batches, by_grams, plain = (
        budget.cut(vit, plan, *given[0], **given[1])[0]
        for given in (([[batch]], {}), ([], {"grams": grams}), ([], {}))
    )
    x = batch[0]
    torch.testing.assert_close(by_grams(x), by_batches(x))
    assert not torch.allclose(plain(x), by_batches(x), atol=1e-4)


@pytest.mark.parametrize("macs", [0.9, 0.5])
def test_ranks_alone_meet_the_target_and_lose_less_the_more_stays(any_model, batch, macs):
    found = budget.candidates(any_model, [batch], kinds=["ranks"])
    lost = []
    for share in (macs, macs - 0.1):
        plan = budget.plan(any_model, **found, kinds=["ranks"], macs=share)
        small, _ = budget.cut(any_model, plan, [batch])
        assert plan.share == pytest.approx(cost.macs(small) / cost.macs(any_model))
        assert plan.share <= share and all(rank % 4 == 0 for rank in plan.ranks.values())
        lost.append(plan.predicted)
        spare = share * cost.macs(any_model) - cost.macs(small)
        table = cost.breakdown(any_model).set_index("layer").macs
        for name, rank in plan.ranks.items():  # no layer could have one step more
            m, n = any_model.get_submodule(name).weight.flatten(1).shape
            thin = table[name] * (m + n) / (m * n)
            whole = rank + 4 > (m * n - 1) // (m + n)
            more = table[name] - rank * thin if whole else 4 * thin
            losses = found["directions"][name].flip(0).cummax(0).values.flip(0)
            gain = losses[rank] - (0 if whole else losses[rank + 4])
            assert more > spare or gain == 0
    assert 0 < lost[0] < lost[1]


def test_ranks_stay_below_what_measurement_allows(vit, batch):
    found = budget.candidates(vit, [batch], kinds=["ranks"])
    names = list(found["directions"])
    most = {names[0]: 0, names[1]: 4} | dict.fromkeys(names[2:], 8)
    plan = budget.plan(vit, **found, kinds=["ranks"], macs=0.7, most=most)
    assert plan.ranks and names[0] not in plan.ranks
    assert all(rank <= most[name] for name, rank in plan.ranks.items())
    nothing = dict.fromkeys(names, 0)
    with pytest.raises(pool.Unreachable, match="ranks alone cannot reach 0.7 x macs: 1.000 stays"):
        budget.plan(vit, **found, kinds=["ranks"], macs=0.7, most=nothing)


# -- the same share of each layer


def shares_of(model, ranks):
    sizes = {name: model.get_submodule(name).weight.flatten(1).shape for name in ranks}
    return {
        name: (rank * sum(sizes[name]) / sizes[name].numel(), sizes[name])
        for name, rank in ranks.items()
    }


@pytest.mark.parametrize("macs", [0.9, 0.5])
def test_uniform_ranks_are_the_same_share_of_each_layer(any_model, batch, macs):
    ranks = uniform(any_model, [batch], macs=macs)
    left = cost.macs(factor.factorise(any_model, ranks)) / cost.macs(any_model)
    found = shares_of(any_model, ranks)
    table = cost.breakdown(any_model).set_index("layer").macs
    step = sum(
        table[name] * sum(size) / size.numel() for name, (_, size) in found.items()
    )  # of one rank of each
    assert macs - step / table.sum() < left <= macs
    assert (
        set(models.view(any_model).linears())
        <= ranks.keys()
        <= models.view(any_model).matrices.keys()
    )
    rounded = [
        (share, share + sum(size) / size.numel())
        for name, (share, size) in found.items()
        if ranks[name] > 1
    ]
    assert (
        max(low for low, _ in rounded) < min(high for _, high in rounded) + 1e-9
    )  # one share, rounded down


def test_uniform_ranks_take_the_layers_that_lose_least(model, batch):
    view, table = models.view(model), cost.breakdown(model).set_index("layer").macs
    x, _ = batch
    batches = [(x, model(x).argmax(1))]  # labels by which the dense model loses little
    grams = scores.grams(model, batches, layers=list(view.matrices))
    chosen = factor.factorise(model, uniform(model, batches, macs=0.8, grams=grams), grams=grams)
    stem = [name for name in view.matrices if name not in view.linears()]
    for stays in ([], stem, stem[:1]):
        sizes = {
            n: layer.weight.flatten(1).shape for n, layer in view.matrices.items() if n not in stays
        }
        for percent in range(100, 0, -1):  # at whole percents the others keep at most as much
            ranks = {
                name: max(1, lowrank.rank_for(*size, percent / 100, multiple=1))
                for name, size in sizes.items()
            }
            gone = sum(
                table[n] * (1 - rank * sum(sizes[n]) / sizes[n].numel())
                for n, rank in ranks.items()
            )
            if gone >= 0.2 * table.sum():
                other = factor.factorise(model, ranks, grams=grams)
                assert scores.loss(chosen, batches) <= scores.loss(other, batches) + 0.005
                break


def test_uniform_ranks_name_their_floor_and_leave_factored_layers(vit, batch):
    everywhere = dict.fromkeys(models.view(vit).matrices, 1)
    floor = cost.macs(factor.factorise(vit, everywhere)) / cost.macs(vit)
    with pytest.raises(pool.Unreachable, match=f"cannot reach 0.01 x macs: {floor:.3f} stays"):
        uniform(vit, [batch], macs=0.01)
    with pytest.raises(ValueError, match=r"in \(0, 1\); got 50"):
        uniform(vit, [batch], macs=50)
    first, *_ = models.view(vit).linears()
    thin = factor.factorise(vit, {first: 2})
    ranks = uniform(thin, [batch], macs=0.9)
    assert not [name for name in ranks if name.startswith(first)]
    assert cost.macs(factor.factorise(thin, ranks)) / cost.macs(thin) <= 0.9


# -- heads as narrow as the ranks of their qkv


@pytest.mark.parametrize("kept", ["blocks.*.attn.proj", "blocks.0"])
def test_narrow_heads_leave_layers_alone_that_are_kept(vit, batch, kept):
    batches = list(zip(*(part.split(2) for part in batch), strict=True))
    small, plan = budget.reach(vit, batches, keep=[kept], macs=0.4)
    thin = {name: rank for name, rank in plan.ranks.items() if name.endswith("qkv")}
    assert min(thin.values()) < models.view(vit).blocks[0].head_dim  # heads were narrowed
    names = pool.layers_of(vit, [kept]) & models.view(vit).matrices.keys()
    assert names
    for name in names:
        assert small.get_submodule(name).weight.equal(vit.get_submodule(name).weight)
    assert cost.macs(small) / cost.macs(vit) == pytest.approx(plan.share, abs=1e-9)


@pytest.mark.parametrize("macs", [0.5, 0.35, 0.25])
@pytest.mark.parametrize("kinds", [["ranks"], ["heads", "neurons", "width", "ranks"]])
def test_a_plan_for_narrow_heads_costs_what_it_says(any_model, batch, macs, kinds):
    batches = [batch]
    found = budget.candidates(any_model, batches, kinds=kinds)
    options = {"kinds": kinds, "multiple": 1}
    try:
        plain = budget.plan(any_model, **found, **options, macs=macs)
    except pool.Unreachable:
        plain = None
    try:
        plan = budget.plan(any_model, **found, **options, narrow=True, macs=macs)
    except pool.Unreachable:
        assert plain is None  # what narrower heads save cannot be less
        return
    small, _ = budget.cut(any_model, plan)
    small = factor.narrow_heads(small)
    assert cost.macs(small) / cost.macs(any_model) == pytest.approx(plan.share, abs=1e-9)
    assert plan.share <= macs * (1 + 1e-9)
    saved = plan.table.macs_saved.sum() / cost.macs(any_model)
    assert saved == pytest.approx(1 - plan.share, abs=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("share", [0.7, 0.5])
def test_the_plan_is_nearly_the_best_of_all_cuts_by_brute_force(trained, share):
    """Kinds that save with each other: heads, their dimensions, neurons and the width of the stream."""
    model, batches, unseen = trained
    kinds = ["heads", "qk", "v", "neurons", "width"]
    known = budget.Calibration(model, batches, kinds=kinds)
    units, _ = pool.candidates(model, known.candidates["unit_scores"], {}, kinds, 8, {})
    total = cost.macs(model)

    def loss_after(drop):
        small = shrink.remove(model, drop)
        assert macs_by_hand(model, drop) == cost.macs(small) <= share * total
        return scores.loss(small, unseen)

    found = loss_after(known.plan(macs=share).drop)
    # Of each place none, half or all of what may go.
    steps = [sorted({len(each.groups) * i // 2 for i in range(3)}) for each in units.values()]
    losses = []
    for numbers in product(*steps):
        gone = zip(units.items(), numbers, strict=True)
        drop = {key: sum(each.groups[:number], []) for (key, each), number in gone if number}
        if share - 0.02 < macs_by_hand(model, drop) / total <= share:
            losses.append(loss_after(drop))
    assert len(losses) > 100
    assert found <= 1.05 * min(losses)


def macs_by_hand(model, drop):
    """Return the MACs of a ViT on patches without some units: docs/methods/removal.md."""
    left = Counter({key: -len(gone) for key, gone in drop.items()})
    left.update(models.view(model).units(["heads", "qk", "v", "neurons", "width"]))
    width, tokens = left["stages.0", "width"], model.patch_embed.num_patches + 1
    macs = width * (tokens - 1) * model.patch_embed.proj.weight[0].numel()
    for block in models.view(model).blocks:
        heads, neurons = left[block.name, "heads"], left[block.name, "neurons"]
        qk, v = (left[block.name, kind] // block.num_heads for kind in ("qk", "v"))
        macs += tokens * width * heads * (2 * qk + v) + tokens * heads * v * width
        macs += tokens * tokens * heads * (qk + v) + 2 * tokens * width * neurons
    return macs + width * model.num_classes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A ViT that classifies drawn shapes, calibration batches, and batches that it has not seen."""
    folder = _shapes.make(tmp_path_factory.mktemp("shapes") / "drawn")
    images = data.load(folder, image_size=32)
    torch.manual_seed(0)
    small = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    small |= {"mlp_ratio": 2.0, "num_classes": len(images.classes)}
    model = models.create("vit_tiny_patch16_224", **small)
    recipe = {"epochs": 12, "lr": 3e-3, "batch_size": 64, "precision": "float32"}
    train.fit(model, images.train, images.val, recipe)
    batches = [list(split.subset(256).batches(128)) for split in (images.train, images.val)]
    return model.eval(), *batches
