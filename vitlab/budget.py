"""Cut a model to a budget: choose what goes by the predicted rise of the loss.

A budget is a share of the model's MACs, parameters, bytes or time. `reach` does all of it in one
call; `candidates`, `plan` and `cut` are its steps. `ranks` and `uniform_ranks` choose ranks alone.
Method: docs/methods/budget.md.

Public: FLOORS, LEAST, POOL, TARGETS, Plan, Unreachable, candidates, cut, kept, plan, ranks, reach,
uniform_ranks.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from . import bench, cost, lowrank, models, recover, scores, shrink

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
    _checked_target(target)
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
        bases = {name: _basis(layer, moments[name]) for name, layer in matrices.items()}
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
    what, share = _checked_target(target)
    units, thin = _candidates(
        model, unit_scores or {}, directions or {}, kinds, multiple, rank_multiple, most or {}
    )
    costs = _Costs(models.view(model), _layer_costs(model, what, batch), units, thin)
    floor = _Search(costs).floor() / costs.total

    def plan_for(wanted):
        return _Search(costs).run(max(wanted, floor) * costs.total).as_plan(what)

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
    raise Unreachable(
        f"{' and '.join(kinds)} alone cannot reach {share:g} x {TARGETS[what]}: {floor:.3f} stays "
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
    return sum(parameter.numel() for parameter in model.parameters())


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
    shrink.factorise raise.
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
        small = shrink.factorise(small, plan.ranks, grams=moments)
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


# -- Pool: units and ranks that compete, what each costs, and the greedy search

# At least so many stay (qk and v: of each head; of whole blocks one of all).
FLOORS = {"heads": 1, "neurons": 8, "width": 8, "filters": 4, "qk": 4, "v": 4, "block": 0}
# And at least this share of a place. What goes is predicted to lose the sum of its parts, but a
# residual stream that is all but gone loses far more: LOG.md, 2026-11-26.
LEAST = {"width": 1 / 8}
TARGETS = {  # {name: what it is called}
    "macs": "MACs",
    "params": "the parameters",
    "bytes": "the bytes",
    "latency": "the latency",
}


class Unreachable(ValueError):
    """A target below what the kinds that may go can reach; the message names their floor."""


@dataclass(frozen=True)
class Plan:
    """What would go, before any weight is touched.

    drop: {(where, kind): indices}, for shrink.remove.
    ranks: {layer: rank}, for shrink.factorise after it.
    table: one row for each block (stage, convolution, layer) and kind. Columns: block, kind, units
        (of ranks: of the whole layer), dropped, predicted (rise of the loss) and macs_saved
        (params_saved, ..., latency_saved in ms). What several kinds save together counts for the
        one that went first, ranks last.
    share: what stays of the target, as a share of the model's.
    """

    drop: dict
    ranks: dict
    table: pd.DataFrame
    share: float

    @property
    def predicted(self):
        """Return what the loss is predicted to rise by: the sum over all that goes."""
        return self.table.predicted.sum()


def _checked_target(target):
    """Return the name and the share of a target such as {"macs": 0.5}, or raise ValueError."""
    if len(target) != 1 or not target.keys() <= TARGETS.keys():
        names = ", ".join(target) or "none"
        raise ValueError(f"give one target of {', '.join(TARGETS)}, such as macs=0.5; got {names}")
    [(what, share)] = target.items()
    if not 0 < share < 1:
        raise ValueError(f"{what} is the share to keep, in (0, 1); got {share}")
    return what, share


def _candidates(model, unit_scores, directions, kinds, multiple, rank_multiple, most):
    """Return all that competes: units {(where, kind): _Units} and thin {layer: _Thin}."""
    view = models.view(model)
    units = _scored_units(view, unit_scores, kinds, multiple)
    if "qk" in kinds and any(block.normalises_queries for block in view.blocks):
        raise ValueError("queries and keys are normalised together here; leave qk out of kinds")
    for name, layer in view.linears().items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{name} is a {type(layer).__name__}: take units first, factorise afterwards"
            )
    thin = {}
    if "ranks" in kinds:
        if not directions:
            raise ValueError(
                "no directions; give scores.directions of layers to factor, or leave ranks out"
            )
        thin = _thin_layers(model, directions, rank_multiple, most)
    if not units and not thin:
        raise Unreachable(
            f"nothing of {', '.join(kinds)} may go: no unit is there, or most allows no rank"
        )
    return units, thin


class _Units(NamedTuple):
    """The units of one place, such as the neurons of a block."""

    place: int  # its number in forward order
    size: int  # how many units there are
    groups: list  # [indices] that go together, the weakest first
    losses: list  # the predicted rise of the loss by each group
    shares: list  # of the units that are left when no group is gone, one, two, ...


def _scored_units(view, unit_scores, kinds, multiple):
    """Return {(where, kind): _Units}, or raise ValueError unless each unit has one score."""
    sizes = view.units([kind for kind in kinds if kind != "ranks"])
    written = {view.stages[block.stage] for block in view.blocks}
    # Where no block writes to the stream of a stage there is nothing to score.
    for stage in set(view.stages) - written:
        sizes.pop((stage, "width"), None)
    unit_scores = {key: score for key, score in unit_scores.items() if key[1] in kinds}
    for key in sizes | unit_scores:
        size = sizes.get(key, 0)
        count = len(unit_scores.get(key, []))
        if size != count:
            raise ValueError(
                f"{key} has {size} units and {count} scores: give scores.units of this very model "
                f"and of all {key[1]}, or leave that kind out"
            )
    places = list(sizes)
    units = {}
    for key, score in unit_scores.items():
        groups = _groups(score, key[1], multiple, _heads(view, key))
        losses = [score[group].sum().item() for group in groups]
        gone = np.cumsum([0, *map(len, groups)])
        shares = (1 - gone / len(score)).tolist()
        units[key] = _Units(places.index(key), len(score), groups, losses, shares)
    return units


def _heads(view, key):
    """Return over how many heads the units of a place are spread: 1 but for qk and v."""
    where, kind = key
    return view.block(where).num_heads if kind in ("qk", "v") else 1


def _groups(score, kind, multiple, heads):
    """Return [indices] of units that go together, the weakest first, down to the floor."""
    by_head = score.view(heads, -1)
    size = by_head.shape[1]
    order = by_head.argsort(dim=1, stable=True)
    # Number the units through all heads: first the weakest of every head, then the second weakest.
    order = order + size * torch.arange(heads)[:, None].to(order)
    order = order.T.flatten()
    floor = max(FLOORS[kind], math.ceil(LEAST.get(kind, 0) * size))
    # Dimensions of heads go one from each head, heads and blocks alone.
    together = multiple if kind in ("neurons", "width", "filters") else heads
    count = max(0, len(score) - heads * floor) // together
    return order[: count * together].view(count, together).tolist()


class _Thin(NamedTuple):
    """The ranks that a layer [m, n] may have, and the loss that each is predicted to add.

    Option 0 is rank m * n, which stands for the whole layer: two thin ones of that rank would cost
    more.
    """

    shape: tuple
    options: np.ndarray
    losses: np.ndarray


def _basis(layer, gram):
    """Return all directions u [m, R], v [R, n] of the activation-weighted SVD of a layer."""
    weight = layer.weight.detach().flatten(1)
    return lowrank.svd(weight, min(weight.shape), gram=lowrank.damped(gram))


def _thin_layers(model, directions, multiple, most):
    """Return {layer: _Thin} of the layers that may have any rank, or raise ValueError."""
    thin = {}
    for name, lost in directions.items():
        m, n = model.get_submodule(name).weight.flatten(1).shape
        if len(lost) != min(m, n) + 1:
            raise ValueError(
                f"{name} [{m}, {n}] has {min(m, n)} directions; "
                f"got {len(lost) - 1} of another model"
            )
        # Two thin layers cost less than the whole one up to the rank top. Below one multiple take
        # any rank.
        top = lowrank.rank_for(m, n, 1, multiple=1)
        step = multiple if top >= multiple else 1
        options = np.arange(step, min(top, most.get(name, top)) + 1, step)
        if len(options):
            # Some of the directions never lose more than all of them: the highest loss from each
            # rank on.
            highest = lost.double().flip(0).cummax(0).values
            losses = highest.flip(0).cpu().numpy()[options]
            thin[name] = _Thin((m, n), np.r_[m * n, options], np.r_[0.0, losses])
    return thin


class _Costs:
    """What a model costs in a state {candidate: number}, a Counter in which 0 is untouched.

    A candidate is a key of units (where, kind), whose number says how many of its groups are gone,
    or a layer, whose number says which of its options it has. What anything costs depends on what
    is left of the rest: a neuron on the width of the stream, and on whether its layers are
    factored. The cost of a line of cost.breakdown is proportional to what is left of its inputs and
    of its outputs.

    table: cost.breakdown with a column cost.
    """

    def __init__(self, view, table, units, thin):
        self.total = table.cost.sum().item()
        self.units = units
        self.thin = thin
        self.lines = {}  # {name: (cost, inputs, outputs)}, see _terms
        self.lines_of = defaultdict(list)  # {key: names of the lines whose cost depends on it}
        # {candidate: those whose price changes when it goes, with itself}
        self.touched_by = defaultdict(set)
        for row in table.itertuples():
            inputs, outputs = _terms(view, row)
            self.lines[row.layer] = row.cost, inputs, outputs
            members = {row.layer, *inputs}.union(*(keys for _, keys in outputs))
            for member in members:
                self.touched_by[member] |= members
                self.lines_of[member].append(row.layer)

    def left(self, state, keys):
        """Return the product of the shares of units that are left of these keys."""
        return math.prod(self.units[key].shares[state[key]] for key in keys if key in self.units)

    def at(self, state, name, option):
        """Return the cost of a line at an option of its rank (a slice: at several)."""
        cost, inputs, outputs = self.lines[name]
        whole = sum(cost * part * self.left(state, inputs + keys) for part, keys in outputs)
        if name not in self.thin:
            return whole
        # Of two thin layers the first falls with the inputs, the second with the outputs.
        m, n = self.thin[name].shape
        falling = [n * self.left(state, inputs)]
        falling += [m * part * self.left(state, keys) for part, keys in outputs]
        per_rank = cost / (m * n) * sum(falling)
        # Nobody keeps two thin layers that cost more than the whole one.
        return np.minimum(whole, self.thin[name].options[option] * per_rank)

    def of(self, state, key=None):
        """Return the cost of the lines that depend on a key, or of all."""
        names = self.lines if key is None else self.lines_of[key]
        return sum(self.at(state, name, state[name]) for name in names)


def _terms(view, row):
    """Return what a line of cost.breakdown depends on: inputs [key], outputs [(part, keys)].

    Parts add up to 1. A part of the line is proportional to what is left of the inputs and of its
    own outputs.
    """
    widths = [(stage, "width") for stage in view.stages]
    if isinstance(row.block, str):
        block = view.block(row.block)
        return _block_terms(block, row, [widths[block.stage]])
    inputs, outputs = [], []  # the last line, "rest", depends on nothing
    if row.role == "stem":
        writes = [(name, "filters") for name, _ in view.stem]
        number = writes.index((row.layer, "filters"))
        writes[-1] = widths[0]
        inputs = writes[:number][-1:]  # the first one reads the image
        outputs = [writes[number]]
    elif row.role == "merge":
        stage = int(row.layer.split(".")[1])
        inputs = [widths[stage - 1]]
        outputs = [widths[stage]]
    elif row.role == "head":
        inputs = [widths[-1]]
    return inputs, [(1.0, outputs)]


def _block_terms(block, row, width):
    """Return what a line inside a block depends on, as _terms does: also on the block."""
    kinds = ("block", "heads", "neurons", "qk", "v")
    there, heads, neurons, qk, v = ([(block.name, kind)] for kind in kinds)
    qk = heads + qk
    v = heads + v
    inputs, *outputs = {
        "qkv": (width, qk, v),
        "proj": (v, width),
        "fc1": (width, neurons),
        "fc2": (neurons, width),
        "qk": (qk, []),
        "av": (v, []),
        # SwinV2's position MLP: only its last layer, .2, has an output for each head.
        "position": (heads if row.layer.endswith(".2") else [], []),
    }[row.role]
    parts = [1.0]
    if row.role == "qkv":
        queries = 2 * block.qk_dim / (2 * block.qk_dim + block.head_dim)
        parts = [queries, 1 - queries]
    outputs = [(part, there + keys) for part, keys in zip(parts, outputs, strict=True)]
    return there + inputs, outputs


class _Search:
    """One greedy search of `plan`: what has the least predicted loss per cost saved goes first."""

    def __init__(self, costs):
        self.costs = costs
        self.units = costs.units
        self.thin = costs.thin
        self.blocks = [key for key in self.units if key[1] == "block"]
        self.state = Counter()  # as _Costs reads it
        self.taken = []  # the keys of groups that went, in their order

    def floor(self):
        """Return the cost when all is gone that may go; of blocks one stays, the cheapest."""
        lowest = dict.fromkeys(self.thin, 1)  # the first option after the whole layer
        for key, units in self.units.items():
            lowest[key] = len(units.groups)
        stays = [{block: 0} for block in self.blocks] or [{}]
        return min(self.costs.of(Counter(lowest | block)) for block in stays)

    def run(self, goal):
        """Cut until the cost is goal, give back what was too much, and return self."""
        goal *= 1 + 1e-12  # rounding alone misses no goal
        prices = {}  # {candidate: (loss per cost saved, its number after that)}, if still right
        while self.costs.of(self.state) > goal:
            for candidate in [*self.units, *self.thin]:
                if candidate not in prices:
                    price = self.rank_price if candidate in self.thin else self.unit_price
                    prices[candidate] = price(candidate)
            best = min(prices, key=lambda candidate: prices[candidate][0])
            price, number = prices[best]
            if math.isinf(price):  # nothing more may go
                break
            self.state[best] = number
            if best in self.units:
                self.taken.append(best)
            for candidate in self.costs.touched_by[best]:
                prices.pop(candidate, None)
            if best in self.blocks:  # another block may be the last one by now
                prices = {}
        self.give_back(goal)
        self.raise_ranks(goal)
        return self

    def unit_price(self, key):
        """Return the loss per cost saved by the next group (inf: none may go), and its number."""
        units = self.units[key]
        number = self.state[key]
        blocks_left = [block for block in self.blocks if not self.state[block]]
        is_block_gone = self.state[key[0], "block"]
        if number == len(units.groups) or is_block_gone or blocks_left == [key]:
            return math.inf, number
        # Try it: what the lines cost that depend on these units, before and after.
        before = self.costs.of(self.state, key)
        self.state[key] += 1
        saved = before - self.costs.of(self.state, key)
        self.state[key] -= 1
        return units.losses[number] / saved if saved > 0 else math.inf, number + 1

    def rank_price(self, name):
        """Return the least loss per cost saved by a lower rank of a layer, and its number."""
        _, options, losses = self.thin[name]
        costs = self.costs.at(self.state, name, slice(None))
        now = self.state[name]
        saved = costs[now] - costs
        # What saves less than rounding, such as a rank that is not lower, may not be chosen.
        is_lower = saved > 1e-9 * costs[1] / options[1]
        lost = losses - losses[now]
        prices = np.where(is_lower, lost / np.maximum(saved, lowrank.TINY), math.inf)
        return prices.min(), prices.argmin()

    def give_back(self, goal):
        """Give back the groups that the goal is met without, the dearest first."""
        # Not the last one: the goal was missed without it.
        for key in reversed(self.taken[:-1]):
            self.state[key] -= 1
            if self.costs.of(self.state) > goal:
                self.state[key] += 1

    def raise_ranks(self, goal):
        """Spend what is left up to the goal on higher ranks."""
        names = [name for name in self.state if name in self.thin]
        losses, costs = self.options(names)
        _spend(self.state, losses, costs, goal - self.costs.of(self.state))

    def options(self, names):
        """Return the losses and the costs, {layer: array}, of all options of these layers."""
        losses = {name: self.thin[name].losses for name in names}
        costs = {name: self.costs.at(self.state, name, slice(None)) for name in names}
        return losses, costs

    def as_plan(self, what):
        """Return the Plan of what was taken; what: the name of its target."""
        saved, cost_left = self.saved_by_units()
        drop, ranks, rows = {}, {}, []
        # Whole blocks come last: they take over what their units saved before.
        in_order = sorted(self.units, key=lambda key: self.units[key].place)
        for key in sorted(in_order, key=lambda key: key in self.blocks):
            where, kind = key
            if kind != "block" and self.state[where, "block"]:
                saved[where, "block"] += saved[key]
                continue
            units = self.units[key]
            count = self.state[key]
            indices = sorted(sum(units.groups[:count], []))
            if indices:
                drop[key] = indices
            predicted = sum(units.losses[:count])
            rows.append((*key, units.size, len(indices), predicted, saved[key]))
        for name in filter(self.state.get, self.costs.lines):
            thin, option = self.thin[name], self.state[name]
            whole, now = self.costs.at(self.state, name, [0, option])
            less = whole - now
            if less > 0:  # else two thin layers are no cheaper than what is left of the whole
                rank = thin.options[option].item()
                ranks[name] = rank
                size = min(thin.shape)
                lost = thin.losses[option]
                rows.append((name, "ranks", size, size - rank, lost, less))
                cost_left -= less
        columns = ["block", "kind", "units", "dropped", "predicted", f"{what}_saved"]
        table = pd.DataFrame(rows, columns=columns)
        return Plan(drop, ranks, table, cost_left / self.costs.total)

    def saved_by_units(self):
        """Return {key: cost saved}, in the order of the search, and the cost left by units."""
        saved, state = Counter(), Counter()
        before = float(self.costs.total)
        # Go through the search once more, without what was given back.
        for key in self.taken:
            if state[key] < self.state[key]:
                state[key] += 1
                after = self.costs.of(state)
                saved[key] += before - after
                before = after
        return saved, before


def _spend(state, losses, costs, room):
    """Raise ranks while there is room, where most loss is gained per cost first.

    state: {layer: number of its option}; it is changed. losses, costs: {layer: array} of each
        option.
    """
    while True:
        best = 0, 0, None, None
        for name in losses:
            gain = losses[name][state[name]] - losses[name]
            more = costs[name] - costs[name][state[name]]
            # What costs nothing more comes first, what does not fit never.
            prices = np.where(more <= room, gain / np.maximum(more, lowrank.TINY), 0)
            option = prices.argmax()
            if prices[option] > best[0]:
                best = prices[option], more[option], name, option
        _, more, name, option = best
        if name is None:
            return
        state[name] = option
        room -= more


# -- Ranks: which rank each layer keeps, where ranks are all that may go


def ranks(model, grams, gradients, *, macs, multiple=8, most=None):
    """Choose ranks with which the model keeps a share of its MACs at little predicted loss.

    Where ranks are all that may go this orders them better than `plan` by scores.directions, whose
    loss units it lacks (LOG.md). Each layer has a choice of ranks below break-even, or to stay
    dense. One price per MAC decides for all (docs/methods/ranks.md).

    grams: {layer: [n, n]} of scores.grams.
    gradients: {layer: [m, m]} of scores.gradient_grams. Of the plain layers those in both may be
        factored.
    macs: share to keep, in (0, 1), of the whole model's.
    multiple: ranks are multiples of it; a layer whose break-even rank is lower takes any rank.
    most: {layer: highest rank to factor it at}, as bench.break_even measures; 0 keeps a layer
        dense. None: all that save MACs.

    Returns {layer: rank} for shrink.factorise with the same grams, without layers that should stay
    dense.
    Raises ValueError for a share outside (0, 1), no common layers, one of another shape, gradients
    that are all zero.
    Raises Unreachable for a target below what the lowest ranks leave; it names the floor.
    """
    _checked_target({"macs": macs})
    table = cost.breakdown(model)
    directions = {}
    for name in table.layer:
        if name in grams and name in gradients:
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                directions[name] = _direction_losses(name, layer, grams[name], gradients[name])
    if not directions:
        raise ValueError(
            "grams and gradients have no plain layer of this model in common: take both of one"
        )
    thin = _thin_layers(model, directions, multiple, most or {})
    if not thin:
        raise Unreachable(
            f"no layer may be factored: most allows no rank that is a multiple of {multiple} to any"
        )
    if not any(layer.losses.any() for layer in thin.values()):
        raise ValueError(
            "no rank is predicted to matter: the gradients are zero, nothing reaches the loss"
        )
    costs = _Costs(models.view(model), table.assign(cost=table.macs), {}, thin)
    search = _Search(costs)
    floor = search.floor() / costs.total
    if macs < floor:
        raise Unreachable(
            f"ranks alone cannot reach {macs:g} x MACs: {floor:.3f} stays at the lowest ones"
        )
    losses, layer_costs = search.options(thin)
    rest = costs.total - sum(layer[0] for layer in layer_costs.values())
    # What the other layers cost stays; the rest of the target is room for these.
    chosen = _priced(losses, layer_costs, macs * costs.total - rest)
    search.state.update(chosen)
    return search.as_plan("macs").ranks


def _direction_losses(name, layer, gram, gradient):
    """Return the loss [R + 1] predicted without all directions from each on.

    A direction costs half of (u^T G u)(v^T H v). u v is its part of the activation-weighted SVD, H
    the gram, G the gradients'. It orders layers well, but is no loss to compare with that of `plan`
    (see scores.gradient_grams).
    """
    m, n = layer.weight.flatten(1).shape
    if list(gram.shape) != [n, n] or list(gradient.shape) != [m, m]:
        raise ValueError(
            f"{name} [{m}, {n}] needs a gram [{n}, {n}] and gradients [{m}, {m}] of this very model"
        )
    u, v = _basis(layer, gram)
    lost = _along(u.T.double(), gradient) * _along(v.double(), gram) / 2
    after = lost.flip(0).cumsum(0).flip(0)
    return nn.functional.pad(after, (0, 1))  # without any nothing is lost


def _along(vectors, matrix):
    """Return x^T matrix x of each row x of vectors, [k]."""
    return torch.linalg.vecdot(vectors @ matrix.to(vectors), vectors)


def _priced(losses, costs, room):
    """Return {layer: number of its option} with little loss that fit in room together.

    losses, costs: {layer: array} of each option.
    """
    room = room * (1 + 1e-12)  # rounding alone does not exceed it

    def cheapest(price):
        return {name: (losses[name] + price * costs[name]).argmin() for name in losses}

    def spent(chosen):
        return sum(costs[name][option] for name, option in chosen.items())

    # One price per MAC for all layers: the least at which they fit.
    low, high = 0.0, 1.0
    while spent(cheapest(high)) > room and high < math.inf:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if spent(cheapest(middle)) > room:
            low = middle
        else:
            high = middle
    chosen = cheapest(high)
    _spend(chosen, losses, costs, room - spent(chosen))
    return chosen


def uniform_ranks(model, batches, *, macs, grams=None):
    """Choose ranks with which each layer keeps the same share: the baseline of `ranks`.

    What shares the cut: the linear layers alone, or with the stem's convolutions, or with all of
    these but the first, which sees three channels. That of them is taken which leaves the lowest
    loss on batches, by their labels.

    batches: a list of (x, y) of calibration images.
    macs: the share that the model keeps at most, in (0, 1), of the whole model's.
    grams: as for shrink.factorise, which gets the ranks with the same grams. None: plain SVD.

    Returns {layer: rank}. Layers that are factored or cut already stay as they are.
    Raises ValueError for a share outside (0, 1).
    Raises Unreachable for a share below what rank 1 leaves everywhere; it names the floor.
    """
    _checked_target({"macs": macs})
    view = models.view(model)
    table = cost.breakdown(model).set_index("layer").macs
    even = {}
    for name, layer in view.matrices.items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            even[name] = lowrank.break_even_rank(*layer.weight.flatten(1).shape)
    stem = tuple(name for name, _ in view.stem)
    floors, tries = [], []
    even = pd.Series(even, dtype=float)
    for whole in dict.fromkeys([stem, (), stem[:1]]):
        factored = even.drop(list(whole), errors="ignore")
        floor, ranks = _equal_share(table, factored, macs)
        floors.append(floor)
        if floor <= macs:
            thin = shrink.factorise(model, ranks, grams=grams)
            tries.append((scores.loss(thin, batches), ranks))
    if not tries:
        floor = min(floors)
        raise Unreachable(
            f"one share of all layers cannot reach {macs:g} x MACs: {floor:.3f} stays at rank 1"
        )
    return min(tries, key=lambda pair: pair[0])[1]


def _equal_share(table, even, macs):
    """Return the model's share at rank 1, and {layer: rank} of the highest share that fits.

    table: the MACs of each layer. even: the break-even rank of each layer to factor. macs: the
        share that the model may keep.
    """
    even = even[even > 1]  # elsewhere rank 1 saves nothing

    def ranks_at(share):
        """Return the ranks that keep a share of each layer, at least 1 and below even."""
        return np.floor(share * even + 1e-9).clip(1, np.ceil(even) - 1).astype(int)

    def left_at(share):
        saved = table * (1 - ranks_at(share) / even)
        return 1 - saved.sum() / table.sum()

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if left_at(middle) > macs:
            high = middle
        else:
            low = middle
    return left_at(0.0), ranks_at(low).to_dict()


# -- Widths: what is left of each place, for a drawing


def kept(model, small):
    """Return how wide a cut model is, place by place.

    Kinds are those of View.units but block, and qk and v are of one head. What is gone is 0. If any
    layer is factored there are kinds such as "rank of qkv", too: the rank of each linear layer, the
    smaller side of a plain one.

    model: the model before the cut.
    small: any cut of it.

    Returns a frame of where, kind, kept and whole, in forward order.
    """
    before = models.view(model)
    left = _widths(models.view(small))
    rows = [(*key, left.get(key, 0), whole) for key, whole in _widths(before).items()]
    modules = dict(small.named_modules())
    if any(hasattr(modules.get(name), "rank") for name in before.matrices):
        for name, layer in before.linears().items():
            rank = 0  # of a layer that is gone
            if now := modules.get(name):
                rank = getattr(now, "rank", min(now.out_features, now.in_features))
            block = before.block_of(name)
            where = block.name if block else name
            whole = min(layer.out_features, layer.in_features)
            rows.append((where, f"rank of {before.role(name)}", rank, whole))
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for number, stage in enumerate(before.stages):  # a stage stands before its blocks
        first = f"layers.{number}.blocks" if before.kind == "swin" else "blocks"
        place[stage] = place[first] + 0.5
    rows.sort(key=lambda row: place[row[0]])
    return pd.DataFrame(rows, columns=["where", "kind", "kept", "whole"])


def _widths(view):
    """Return {(where, kind): how many there are}; of dimensions of heads in one head."""
    counts = view.units(("filters", "width", "heads", "qk", "v", "neurons"))
    for where, kind in counts:
        if kind in ("qk", "v"):
            counts[where, kind] //= view.block(where).num_heads
    return counts
