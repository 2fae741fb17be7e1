"""Cut a model to a budget: choose what goes by the predicted rise of the loss.

A budget is a share of the model's MACs, parameters, bytes or time. `reach` does all of it in one
call; `candidates`, `plan` and `cut` are its steps. Method: docs/methods/budget.md.

Public: POOL, candidates, cut, plan, reach.
"""

import math
from dataclasses import replace

from vitlab import models
from vitlab.evaluation import bench, cost
from vitlab.pruning import factor, pool, recover, scores, shrink

# -- Budget: from a model and a target to the smaller model

POOL = ("heads", "neurons", "filters", "width", "ranks")  # the kinds that do best together
_COMPENSATIONS = (None, "mean", "least squares")
_MOST_CORRECTIONS = 12


def reach(
    model,
    batches,
    *,
    kinds=None,
    labels="true",
    compensate="least squares",
    reconstruct=True,
    **target,
):
    """Cut a model to a target without training.

    Call it as in `small, plan = budget.reach(model, batches, macs=0.5)`. This is `candidates`,
    `plan`, `cut` and recover.reconstruct, with what did best in docs/methods/budget.md. The model
    stays as it is.

    model: a ViT or Swin of plain layers, as models.create makes it.
    batches: a list of (x, y) of calibration images.
    kinds: what may go, see `plan`. None: those of POOL that the model has.
    labels: which labels the gradients take, see scores.weights.
    compensate: what makes up for units that go, see `cut`.
    reconstruct: whether all layers are then solved for against the dense model
        (docs/methods/recovery.md).
    target: one of macs, params, bytes, latency, and the share to keep, in (0, 1).

    Returns the smaller model and its Plan.
    Raises what the four calls raise, such as Unreachable for a target below what these kinds can
    reach.
    """
    pool.checked_target(target)
    _check_compensation(compensate, batches)
    kinds = _kinds_of(models.view(model)) if kinds is None else kinds
    # Bases of ranks and compensation need the same grams: take them once.
    grams = _affine_grams(model, batches) if compensate or "ranks" in kinds else None
    competitors = candidates(model, batches, kinds=kinds, grams=grams, labels=labels)
    chosen = plan(model, **competitors, kinds=kinds, **target)
    small, drops = cut(model, chosen, batches, grams=grams, compensate=compensate)
    if reconstruct:
        small = recover.reconstruct(small, model, batches, drops=drops)
    return small, chosen


def _kinds_of(view):
    """Return the kinds of POOL that the model has."""
    return [kind for kind in POOL if kind == "ranks" or view.units([kind])]


def candidates(model, batches, *, kinds, grams=None, labels="true"):
    """Measure on calibration batches what `plan` compares for these kinds.

    model, batches, labels: see `reach`.
    kinds: what may go, see `plan`.
    grams: {layer: [n+1, n+1]} of all view.matrices by scores.grams(affine=True), if known already.

    Returns {"unit_scores": ..., "directions": ...}, each only if a kind needs it. The first holds
    the "fisher" scores of scores.units. The second holds scores.directions of the
    activation-weighted SVD, for all linear layers and the stem's convolutions.
    Raises what scores.units, scores.grams and scores.directions raise.
    """
    measured = {}
    # Fisher scores and directions are both in loss units, so that they may compete.
    units = [kind for kind in kinds if kind != "ranks"]
    if units:
        by_criterion = scores.units(model, batches, criteria=["fisher"], kinds=units, labels=labels)
        measured["unit_scores"] = by_criterion["fisher"]
    if "ranks" in kinds:
        moments = _second_moments(grams or _affine_grams(model, batches))
        matrices = models.view(model).matrices
        bases = {name: pool.basis(layer, moments[name]) for name, layer in matrices.items()}
        measured["directions"] = scores.directions(model, batches, bases, labels=labels)
    return measured


def plan(
    model,
    unit_scores=None,
    *,
    directions=None,
    kinds=("heads", "neurons"),
    multiple=8,
    rank_multiple=4,
    most=None,
    batch=8,
    **target,
):
    """Plan the cut to a share of one cost that has the least predicted loss.

    Call it as in `budget.plan(model, unit_scores, macs=0.5)`. All kinds compete in one currency,
    predicted loss per cost saved, and the smallest goes first. Scores in loss units need no
    normalisation, only a cost (docs/methods/budget.md). FLOORS and LEAST stay everywhere.

    model: its layers are plain. Remove units first and factorise afterwards, as `cut` does.
    unit_scores: {(where, kind): tensor} of one criterion, best in loss units ("fisher" of
        scores.units).
    directions: {layer: [R+1]} of scores.directions: what a layer loses at each rank. A layer is
        factored where two thin ones save more for what they lose than units do, and stays whole
        where they would not be cheaper.
    kinds: what may go: any of heads, neurons, width, filters, qk, v, block (a whole one) and ranks.
    multiple: neurons, channels and filters go in groups of so many (the weakest of a place
        together), so that sizes stay friendly to the kernels. Dimensions of heads go one from each
        head.
    rank_multiple: ranks are multiples of it; a layer whose break-even rank is lower takes any rank.
    most: {layer: highest rank to factor it at}, as bench.break_even measures; 0 keeps a layer
        whole. None: all that save MACs.
    batch: how many images are timed together, for latency.
    target: one of macs, params, bytes (of weights and buffers in memory) or latency (here and now),
        and the share of the model's to keep, in (0, 1).

    Returns a Plan of at most the target. MACs are less than the cheapest step below it. Parameters
    and bytes are counted on the smaller model. Latency is within 5 % of the target, or has it
    within its quartiles, on this machine.
    Raises ValueError for other targets, a share outside (0, 1), an unknown kind, missing scores, or
    factored layers.
    Raises Unreachable (a ValueError) for a target below what these kinds can reach; it names the
    floor.
    """
    what, share = pool.checked_target(target)
    units, thin = pool.candidates(
        model, unit_scores or {}, directions or {}, kinds, multiple, rank_multiple, most or {}
    )
    costs = pool.Costs(models.view(model), _layer_costs(model, what, batch), units, thin)
    floor = pool.Search(costs).floor() / costs.total

    def plan_for(wanted):
        return pool.Search(costs).run(max(wanted, floor) * costs.total).as_plan(what)

    def measure(wanted):
        return _measured(model, plan_for(wanted), what, share, batch)

    if what != "macs":
        # The prediction of parameters, bytes and time is near, but only the cut model tells.
        nearest = _corrected(measure, what, share, floor)
        if nearest.share <= share or _miss(nearest.share, share, what) <= 0.1:
            return nearest
        lowest, is_met = measure(floor)  # all that may go
        if lowest.share <= share or is_met:
            return lowest
        floor = lowest.share
    elif floor <= share:  # the closed form is exact: nothing to measure
        return plan_for(share)
    raise pool.Unreachable(
        f"{' and '.join(kinds)} alone cannot reach {share:g} x {pool.TARGETS[what]}: {floor:.3f} stays "
        "when all but the floor is gone; allow more kinds or ask for more"
    )


def _layer_costs(model, what, batch):
    """Return cost.breakdown with a column `cost` of the target, which _Costs takes shares of."""
    table = cost.breakdown(model)
    if what == "latency":  # the time of a layer is taken to fall with its MACs
        return table.assign(cost=bench.layer_times(model, table, batch=batch))
    return table.assign(cost=table.macs if what == "macs" else table.params)


def _corrected(measure, what, share, floor):
    """Return the plan that really keeps nearly the share, after several tries.

    measure: a function from the share to plan for to the plan, with its measured share, and whether
        it meets the target.
    """
    is_counted = what != "latency"
    low, high = floor, 1.0
    wanted = max(share, floor)
    tries = []
    for number in range(_MOST_CORRECTIONS):
        tried, is_met = measure(wanted)
        if is_met:
            return tried
        tries.append(tried)
        # Only counts narrow the interval. Times scatter: what was too slow may be fast enough the
        # next time.
        if is_counted and tried.share <= share:
            low = wanted
        elif is_counted:
            high = wanted
        # The next try lies on the line through this one and the whole model.
        guess = 1 - (1 - share) * (1 - wanted) / max(1 - tried.share, 1e-3)
        # Guesses may be too near for one more group to go, so every second step of a count halves
        # the interval.
        is_halved = is_counted and number % 2
        is_inside = low < guess < high
        wanted = guess if is_inside and not is_halved else (low + high) / 2
    return min(tries, key=lambda tried: _miss(tried.share, share, what))


def _miss(kept, share, what):
    """Return how far the kept share is from the target's; a count above the target is no hit."""
    if kept > share and what != "latency":
        return math.inf
    return abs(kept / share - 1)


def _measured(model, plan, what, share, batch):
    """Return the plan with the share it really keeps, and whether that meets the target."""
    small, _ = cut(model, plan)
    if what == "latency":
        # Both run in turns, so that what else the machine does slows both.
        both = {"dense": model, "small": small}
        times = bench.latency(both, batch=batch, repeats=21).iloc[1]
        kept = 1 / times.speedup
        is_within_quartiles = times.speedup_q1 <= 1 / share <= times.speedup_q3
        is_met = is_within_quartiles or _miss(kept, share, what) <= 0.05
    else:
        kept = _count(small, what) / _count(model, what)
        is_met = 0.995 * share <= kept <= share
    return replace(plan, share=kept), bool(is_met)


def _count(model, what):
    """Return the parameters or bytes of a model."""
    if what == "bytes":
        return cost.bytes_memory(model)
    return cost.params(model)


def cut(model, plan, batches=(), *, grams=None, compensate=None):
    """Make the smaller model that a plan describes.

    model: the model of the plan; it stays as it is.
    batches: a list of (x, y) of calibration images. Without them ranks are of the plain SVD, not
        activation-weighted.
    grams: {layer: [n+1, n+1]} of model by scores.grams(layers=view.matrices, affine=True), if known
        already. Where no units go they serve for ranks without batches, too.
    compensate: what makes up for units that go, see shrink.remove. None: nothing; "mean": what is
        lost on average; "least squares": the inputs that stay, about their mean.

    Returns the smaller model, and [plan.drop] (or []) for recover.reconstruct.
    Raises ValueError for another compensate or one without batches, and what shrink.remove and
    factor.factorise raise.
    """
    _check_compensation(compensate, batches)
    needs_grams = compensate if plan.drop else plan.ranks
    if grams is None and batches and needs_grams:
        grams = _affine_grams(model, batches)
    small = model
    if plan.drop:
        means = compensate and {name: gram[-1, :-1] for name, gram in grams.items()}
        moments = _second_moments(grams) if compensate == "least squares" else None
        small = shrink.remove(model, plan.drop, means=means, grams=moments)
        # Ranks are fitted to the activations of the model without these units.
        grams = None
        if plan.ranks and batches:
            grams = _affine_grams(small, batches, plan.ranks)
    if plan.ranks:
        moments = grams and _second_moments(grams)
        small = factor.factorise(small, plan.ranks, grams=moments)
    return small, [plan.drop] if plan.drop else []


def _check_compensation(compensate, batches):
    if compensate not in _COMPENSATIONS or (compensate and not batches):
        raise ValueError(
            f"compensate is one of {_COMPENSATIONS}, the last two with batches; got {compensate!r}"
        )


def _affine_grams(model, batches, layers=None):
    """Return scores.grams [n+1, n+1], mean inputs last; layers None: all to factor."""
    layers = layers or models.view(model).matrices
    return scores.grams(model, batches, layers=list(layers), affine=True)


def _second_moments(grams):
    """Return the grams [n, n] inside affine ones."""
    return {name: gram[:-1, :-1] for name, gram in grams.items()}
