"""Every method on every architecture: it does what it says, trains on, and comes back from disk."""

import pytest
import torch
from conftest import OTHERS, toy
from torch.nn.functional import cross_entropy

from vitlab import models
from vitlab.evaluation import cost
from vitlab.models import checkpoint
from vitlab.pruning import budget, compensate, factor, masks, prune, recover, scores, shrink


def entries(criterion, **options):
    def keep(model, batch):
        found = scores.weights(model, [batch], criteria=[criterion])[criterion]
        if options.get("per") == "role":
            view = models.view(model)
            return masks.keep_largest(
                found, sparsity=0.5, per={n: view.role(n.removesuffix(".weight")) for n in found}
            )
        return masks.keep_largest(found, sparsity=0.5, **options)

    return keep


def gradual(model, batch):
    """The second of three steps: weights that are zero by then stay so."""
    for share in prune.shares("cubic", 3, final=0.8)[:2]:
        found = scores.weights(model, [batch], criteria=["taylor"])["taylor"]
        keep = prune.keep_more_zero(model, found, sparsity=share)
        prune.apply(model, keep)
    return keep


def pattern(model, batch):
    found = scores.weights(model, [batch], criteria=["wanda"])["wanda"]
    return {name: masks.n_of_m(score, 2, 4) for name, score in found.items()}


def rows(model, batch):
    found = scores.rows(model, [batch], criteria=["fisher"])["fisher"]
    return prune.rows_to_masks(model, masks.keep_largest(found, sparsity=0.5, floor=1))


def units(model, batch):
    found = scores.units(model, [batch], criteria=["michel"])["michel"]
    keep = masks.keep_largest(found, sparsity=0.3, floor=1)
    return prune.units_to_masks(model, masks.dropped(keep))


MASKED = {  # masks: all MACs are executed, half or so of the weights are zero
    **{
        name: entries(name)
        for name in ("random", "magnitude", "gradient", "taylor", "fisher", "obd", "snip")
    },
    "wanda by row": entries("wanda", per="row"),
    "obs by layer": entries("obs", per="layer"),
    "taylor by role": entries("taylor", per="role"),
    "tiles": entries("fisher", tile=4),
    "in steps": gradual,
    "2:4": pattern,
    "rows": rows,
    "units": units,
}


def grams(model, batch):
    return scores.grams(model, [batch], layers=list(models.view(model).matrices))


def compressed(**options):
    def change(model, batch):
        return factor.compress(model, grams=grams(model, batch), multiple=1, rounds=2, **options)[0]

    return change


def pool(model, batch, macs=0.7):
    kinds = ["heads", "neurons", "filters", "width", "v"]
    if not any(block.normalises_queries for block in models.view(model).blocks):
        kinds.append("qk")
    found = scores.units(model, [batch], criteria=["fisher"], kinds=kinds)["fisher"]
    plan = budget.plan(model, found, macs=macs, kinds=kinds, multiple=4)
    return shrink.remove(model, plan.drop, grams=grams(model, batch))


def ranks(model, batch, macs=0.7):
    found = budget.candidates(model, [batch], kinds=["ranks"])
    plan = budget.plan(model, **found, kinds=["ranks"], macs=macs)
    return budget.cut(model, plan, [batch])[0]


def both(model, batch):
    return ranks(pool(model, batch, 0.8), batch, 0.8)


def solved(model, batch):
    drop = {(models.view(model).blocks[-1].name, "neurons"): range(0, 48, 2)}
    return recover.reconstruct(
        ranks(shrink.remove(model, drop), batch, 0.8), model, [batch], drops=drop
    )


def without(kind):
    def change(model, batch):
        block = models.view(model).blocks[-1]
        count = models.view(model).units([kind])[block.name, kind]
        return shrink.remove(model, {(block.name, kind): range(count)})

    return change


def rows_gone(model, batch):
    found = scores.rows(model, [batch], criteria=["fisher"])["fisher"]
    keep = masks.keep_largest(found, sparsity=0.5, floor=1)
    return shrink.remove(
        model, {(name, "rows"): gone for name, gone in masks.dropped(keep).items()}
    )


SMALLER = {  # less MACs are executed
    "pool": pool,
    "ranks": ranks,
    "pool, then ranks": both,
    "neurons, then ranks, reconstructed": solved,
    "rows": rows_gone,
    **{f"no {kind} in the last block": without(kind) for kind in ("heads", "neurons", "block")},
    "svd": compressed(ratio=0.5, method="svd"),
    "svd, unwhitened": compressed(ratio=0.5, method="svd", whiten=False),
    "random directions": compressed(ratio=0.5, method="random"),
    "svd+iht on rows": compressed(ratio=0.5, support="rows"),
    "svd+iht on columns": compressed(ratio=0.5, support="columns"),
}
STORED = {  # sparse parts, low rank beside some, that execute as much as dense layers
    "iht": compressed(ratio=0.5, method="iht"),
    "iht 2:4": compressed(ratio=0.5, method="iht", support="2:4"),
    "svd+iht": compressed(ratio=0.5),
    "threshold": compressed(ratio=0.5, method="threshold"),
}
METHODS = {
    **{f"masked {name}": keep for name, keep in MASKED.items()},
    **{f"refitted {name}": MASKED[name] for name in ("fisher", "2:4")},
    "updated fisher": MASKED["fisher"],  # by Optimal Brain Surgeon
    **SMALLER,
    **STORED,
}
ARCHITECTURES = ["vit", "swin", *OTHERS]
EVERY = [  # each method twice, on architectures that follow each other; the others take minutes
    pytest.param(
        architecture, name, marks=[] if (i - j) % len(ARCHITECTURES) in (0, 4) else pytest.mark.long
    )
    for i, name in enumerate(METHODS)
    for j, architecture in enumerate(ARCHITECTURES)
]


@pytest.mark.parametrize("architecture, name", EVERY)
def test_every_method_on_every_architecture(architecture, name, batch, request, tmp_path):
    model = (
        toy(**OTHERS[architecture])
        if architecture in OTHERS
        else request.getfixturevalue(architecture)
    )
    dense, before = cost.breakdown(model)[["macs", "macs_ideal"]].sum(), model(batch[0])
    keep = None
    if name.startswith(("masked", "refitted", "updated")):
        keep, new = METHODS[name](model, batch), model
        if not name.startswith("masked"):
            method = "obs" if name.startswith("updated") else "least squares"
            new = compensate.refit(model, keep, grams(model, batch), method=method)
        prune.apply(new, keep)
    else:
        new = METHODS[name](model, batch)
        assert torch.equal(model(batch[0]), before)  # the one given is untouched
    macs = cost.breakdown(new)[["macs", "macs_ideal"]].sum()
    assert macs.macs < dense.macs if name in SMALLER else macs.macs == dense.macs
    assert macs.macs_ideal < dense.macs_ideal
    assert not torch.allclose(new(batch[0]), before)

    optimizer = torch.optim.AdamW(new.parameters(), lr=0.01, weight_decay=0.1)
    holder = prune.MaskHolder(new, keep, optimizer) if keep else None
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(new.train()(batch[0]), batch[1]).backward()
        assert all(parameter.grad is not None for parameter in new.parameters())
        optimizer.step()
        if holder:
            holder.step()
    assert all(
        (parameter[~keep[key]] == 0).all()
        for key, parameter in new.named_parameters()
        if key in (keep or {})
    )
    assert (
        name in SMALLER or cost.breakdown(new).macs_ideal.sum() <= macs.macs_ideal
    )  # no support has grown

    checkpoint.save(new.eval(), tmp_path / "model", masks=keep)
    same, after = checkpoint.load(tmp_path / "model"), new(batch[0])
    assert after.isfinite().all() and torch.equal(same(batch[0]), after)
    loaded = checkpoint.load_masks(tmp_path / "model") if keep else {}
    assert all(torch.equal(loaded[key], mask) for key, mask in (keep or {}).items())


def test_the_fast_tests_have_each_method_and_each_architecture():
    fast = [case.values for case in EVERY if not case.marks]
    for place, everything in enumerate((ARCHITECTURES, METHODS)):
        counts = {each: sum(case[place] == each for case in fast) for each in everything}
        assert min(counts.values()) >= 2, counts
