"""Budget: which units go for a target of MACs, parameters, bytes or time, or which ranks stay, by predicted loss."""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from . import bench, cost, lowrank, models, scores, shrink

# At least so many stay (qk and v: of each head; of whole blocks one of all).
FLOORS = {"heads": 1, "neurons": 8, "width": 8, "filters": 4, "qk": 4, "v": 4, "block": 0}
# And this share of a place. What goes is predicted to lose the sum of its parts, and a residual stream that is all but
# gone loses far more: LOG.md, 2026-11-26.
LEAST = {"width": 1 / 8}
TARGETS = ("macs", "params", "bytes", "latency")


class Unreachable(ValueError):
    """A target below what the kinds that may go can reach; it names their floor."""


@dataclass(frozen=True)
class Plan:
    """What would go, before any weight is touched.

    drop: {(where, kind): indices}, for shrink.remove. ranks: {layer: rank}, for shrink.factorise after it. table: one
    line per block (stage, convolution, layer) and kind: units (of ranks: of the whole layer), dropped, predicted rise
    of the loss, and macs_saved (or params_saved, …; of latency in ms). share: what stays of the target, as a share
    of the model's.
    """

    drop: dict
    ranks: dict
    table: pd.DataFrame
    share: float

    @property
    def predicted(self):
        """What the loss is predicted to rise by: the sum over all that goes."""
        return self.table.predicted.sum()


def plan(
    model,
    unit_scores=None,
    *,
    directions=None,
    kinds=("heads", "neurons"),
    multiple=8,
    rank_multiple=4,
    most=None,
    image_size=None,
    batch=8,
    **target,
):
    """Plan that cuts one cost of the model to a share with the least predicted loss: `plan(model, scores, macs=0.5)`.

    target: one of macs, params, bytes (of weights and buffers in memory) or latency (of a batch of so many images, here
    and now), and the share to keep, in (0, 1).
    kinds: what may go, of heads, neurons, width, filters, qk, v, block (a whole one) and ranks. All compete in one
    currency, predicted loss per cost saved, smallest first (METHODS: scores in loss units need no normalisation, only
    cost). What anything costs depends on what is left of the rest, a neuron on the width of the stream and on whether
    its layers are factored: it is counted anew at each step.
    unit_scores: {(where, kind): tensor} of one criterion, best in loss units ("fisher"). directions: {layer: [R+1]}, as
    from scores.directions: what a layer loses at each rank; a layer is factored where two thin ones save more for what
    they lose than units do, and left whole where they would not be cheaper.
    multiple: neurons, channels and filters go in groups of so many (the weakest of a place together), so that sizes
    stay friendly to the kernels; head dimensions go one from each head; ranks are multiples of rank_multiple (any rank,
    where break-even is lower). FLOORS and LEAST stay everywhere. most: {layer: highest rank to factor it at}, as
    bench.break_even measures them: above it a layer stays whole, and at 0 always; None for all that save MACs. The
    model's layers are plain: remove units first, factorise afterwards, as `cut` does.

    The result is at most the target, of MACs less than the cheapest step below it. Parameters and bytes are counted on
    the smaller model, and the cut is corrected until they are met. For latency the time of each layer is measured
    and taken to fall with its MACs; what the smaller model then takes beside the dense one, interleaved, corrects the
    cut until it is within 5 % of the target, or the target within its quartiles: the plan then depends on the machine.
    Raises ValueError for other targets, a share outside (0, 1), an unknown kind, scores that are missing, a model whose
    layers are factored; Unreachable (a ValueError) for a target below what these kinds can reach, naming the floor.
    """
    what, share = _checked_target(target)
    given = unit_scores or {}, directions or {}
    groups, losses, sizes, thin = _candidates(model, *given, kinds, multiple, rank_multiple, most)
    costs = _Costs(models.view(model), _layer_costs(model, what, image_size, batch), thin)
    search = _Search(costs, groups, losses, sizes)
    floor = search.floor() / costs.total

    def planned(wanted):
        return search.run(max(wanted, floor) * costs.total).told(what)

    if what == "macs":
        if share < floor:
            raise _out_of_reach(kinds, what, share, floor)
        return planned(share)
    found, low, high, wanted = None, floor, 1.0, max(share, floor)
    for number in range(MOST_CORRECTIONS):
        tried, is_met = _measured(model, planned(wanted), what, share, image_size, batch)
        if is_met:
            return tried
        if found is None or _miss(tried.share, share, what) < _miss(found.share, share, what):
            found = tried
        if what != "latency":  # which scatters: what was too slow once may be fast enough the next time
            low, high = (wanted, high) if tried.share <= share else (low, wanted)
        guess = 1 - (1 - share) * (1 - wanted) / max(1 - tried.share, 1e-3)  # on the line to the whole model
        halved = what != "latency" and number % 2  # steps that are too short for the next group to go get nowhere
        wanted = guess if low < guess < high and not halved else (low + high) / 2
    if found.share > share and (what != "latency" or _miss(found.share, share, what) > 0.1):
        found, is_met = _measured(model, planned(floor), what, share, image_size, batch)
        if found.share > share and not is_met:
            raise _out_of_reach(kinds, what, share, found.share)
    return found


def cut(model, plan, batches=(), *, grams=None, compensate=None, damping=1e-3):
    """The smaller model that plan describes, and [plan.drop] (or []) for recover.reconstruct.

    batches: a list of (x, y) of calibration images. compensate: what makes up for units that go (see shrink.remove):
    None for nothing, "mean" of what is lost on average, "least squares" by the inputs that stay, about their mean.
    Ranks are of activation-weighted SVD, on the activations of the model without the units; of plain SVD without
    batches. grams: those of model, of scores.grams(layers=view.matrices, affine=True), if they are known already; where
    no units go they serve for ranks without batches, too.
    Raises ValueError for another compensate or one without batches, and what shrink.remove and shrink.factorise raise.
    """
    ways = (None, "mean", "least squares")
    if compensate not in ways or (compensate and not batches):
        raise ValueError(f"compensate is one of {ways}, the last two with batches; got {compensate!r}")
    needed = batches and (plan.ranks if not plan.drop else compensate)
    if grams is None and needed:
        grams = scores.grams(model, batches, layers=list(models.view(model).matrices), affine=True)
    small, drops = model, []
    if plan.drop:
        known = {"means": {n: gram[-1, :-1] for n, gram in grams.items()}} if compensate else {}
        if compensate == "least squares":
            known["grams"] = {name: gram[:-1, :-1] for name, gram in grams.items()}
        small, drops = shrink.remove(model, plan.drop, **known, damping=damping), [plan.drop]
        grams = scores.grams(small, batches, layers=list(plan.ranks), affine=True) if plan.ranks and batches else None
    if plan.ranks:
        seen = {name: grams[name][:-1, :-1] for name in plan.ranks} if grams else None
        small = shrink.factorise(small, plan.ranks, grams=seen, damping=damping)
    return small, drops


def kept(model, small):
    """How wide a cut model is, place by place: a frame of where, kind, kept and whole.

    small: any cut of model. Kinds are those of View.units but "block", qk and v of one head; and, if any of its layers
    is factored, "rank of qkv" and so on: the rank of each linear layer, the smaller side of one that is not factored.
    What is gone is 0. In forward order.
    """
    kinds = ("filters", "width", "heads", "qk", "v", "neurons")
    before, after = models.view(model), models.view(small)
    own, rows = after.units(kinds), []
    for (where, kind), count in before.units(kinds).items():
        heads = [each.get((where, "heads"), 1) if kind in ("qk", "v") else 1 for each in (own, before.units())]
        rows.append((where, kind, own.get((where, kind), 0) // heads[0], count // heads[1]))
    left = dict(small.named_modules())
    if any(hasattr(left.get(name), "rank") for name in before.matrices):
        for name, layer in before.linears().items():
            block, role = before.block_of(name), before.role(name)
            sides = [(each.out_features, each.in_features) for each in (layer, left.get(name)) if each is not None]
            rank = getattr(left.get(name), "rank", min(sides[1])) if len(sides) > 1 else 0
            where = name if block is None else block.name
            rows.append((where, f"rank of {role}", rank, min(sides[0])))
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for number, stage in enumerate(before.stages):  # a stage stands before its blocks, if it has any
        place[stage] = place[f"layers.{number}.blocks" if before.kind == "swin" else "blocks"] + 0.5
    rows.sort(key=lambda row: place[row[0]])
    return pd.DataFrame(rows, columns=["where", "kind", "kept", "whole"])


def candidates(model, batches, *, kinds, grams=None, labels="true", damping=1e-3):
    """What `plan` compares for these kinds, {"unit_scores": …, "directions": …}, measured on calibration batches.

    unit_scores: "fisher" of scores.units; directions: scores.directions of the activation-weighted SVD of all linear
    layers and the stem's convolutions. grams: as for `cut`. labels: as for scores.weights. damping: see lowrank.damped.
    """
    found, units = {}, [kind for kind in kinds if kind != "ranks"]
    if units:
        found["unit_scores"] = scores.units(model, batches, criteria=["fisher"], kinds=units, labels=labels)["fisher"]
    if "ranks" in kinds:
        matrices = models.view(model).matrices
        grams = grams or scores.grams(model, batches, layers=matrices, affine=True)
        bases = {}
        for name, layer in matrices.items():
            weight = layer.weight.detach().flatten(1)
            bases[name] = lowrank.svd(weight, min(weight.shape), gram=lowrank.damped(grams[name][:-1, :-1], damping))
        found["directions"] = scores.directions(model, batches, bases, labels=labels)
    return found


def _miss(kept, share, what):
    """How far kept is from the share to reach; of what can be counted, more than the share is no hit."""
    return math.inf if kept > share and what != "latency" else abs(kept / share - 1)


MOST_CORRECTIONS = 12


def _checked_target(target):
    if len(target) != 1 or (what := next(iter(target))) not in TARGETS:
        given = ", ".join(target) or "none"
        raise ValueError(f"give one target of {', '.join(TARGETS)}, such as macs=0.5; got {given}")
    if not 0 < target[what] < 1:
        raise ValueError(f"{what} is the share to keep, in (0, 1); got {target[what]}")
    return what, target[what]


def _out_of_reach(kinds, what, share, floor):
    called = {"macs": "MACs", "params": "the parameters", "bytes": "the bytes", "latency": "the latency"}[what]
    return Unreachable(
        f"{' and '.join(kinds)} alone cannot reach {share:g} x {called}: {floor:.3f} stays when all but the floor "
        f"is gone; allow more kinds or ask for more {called.removeprefix('the ')}"
    )


def _layer_costs(model, what, image_size, batch):
    """cost.breakdown with a column `cost`, of the target: what the terms of _Costs are shares of."""
    table = cost.breakdown(model, image_size=image_size)
    if what == "latency":
        return table.assign(cost=bench.layer_times(model, table, batch=batch, image_size=image_size))
    return table.assign(cost=table.macs if what == "macs" else table.params)


def _count(model, what):
    """MACs, parameters or bytes of a model, whatever of it can be counted (of latency MACs)."""
    counts = {"params": lambda m: sum(p.numel() for p in m.parameters()), "bytes": cost.bytes_memory}
    return counts.get(what, cost.macs)(model)


def _measured(model, plan, what, share, image_size, batch):
    """plan with the share of the target that the cut model really keeps, and whether that meets the target."""
    small, _ = cut(model, plan)
    if what == "latency":
        named = {"dense": model, "small": small}
        times = bench.latency(named, batch=batch, image_size=image_size, repeats=21).iloc[1]
        is_met = abs(1 / times.speedup / share - 1) <= 0.05 or times.speedup_q1 <= 1 / share <= times.speedup_q3
        return dataclasses.replace(plan, share=1 / times.speedup), bool(is_met)
    kept = _count(small, what) / _count(model, what)
    return dataclasses.replace(plan, share=kept), 0.995 * share <= kept <= share


def ranks(model, grams, gradients, *, macs, multiple=8, most=None, damping=1e-3, image_size=None):
    """{layer: rank} with which the model's MACs fall to the share `macs` at little predicted loss.

    For shrink.factorise with the same grams; a layer that should stay dense is left out. Where ranks are all that may
    go this orders them better than `plan` by scores.directions, whose loss units it lacks (LOG.md). grams: {layer:
    [n, n]} of scores.grams; gradients: {layer: [m, m]} of scores.gradient_grams: both say which may be factored, of
    plain ones. A rank that goes is predicted to cost half of (u^T G u)(v^T H v), u v its part of the
    activation-weighted SVD, H the gram and G the gradients': it orders layers well, but is no loss to compare with
    that of `plan` (see scores.gradient_grams). Each layer has a choice of ranks, multiples of `multiple` below
    break-even (any rank, where that is lower), or to stay dense; one price per MAC, found by bisection, decides for
    all, and what is left over is spent where it gains most. macs: share to keep, in (0, 1), of the whole model's.
    most: {layer: highest rank to factor it at}, as bench.break_even measures them: above it a layer stays dense, and
    at 0 always; None for all that save MACs. damping: see lowrank.damped.

    Raises ValueError for a share outside (0, 1), no common layers, one with another shape, gradients that are all
    zero, and a target below what the lowest ranks leave, naming the floor.
    """
    _checked_target({"macs": macs})
    known = dict(model.named_modules())
    table = cost.breakdown(model, image_size=image_size).set_index("layer").macs
    choices = {}
    for name in [name for name in table.index if name in grams and name in gradients]:
        if not isinstance(known[name], nn.Linear | nn.Conv2d):
            continue
        weight = known[name].weight.detach().flatten(1)
        m, n = weight.shape
        if list(grams[name].shape) != [n, n] or list(gradients[name].shape) != [m, m]:
            raise ValueError(f"{name} [{m}, {n}] needs a gram [{n}, {n}] and gradients [{m}, {m}] of this very model")
        u, v = lowrank.svd(weight, min(m, n), gram=lowrank.damped(grams[name], damping))
        lost = _along(u.T.double(), gradients[name]) * _along(v.double(), grams[name]) / 2
        after = lost.flip(0).cumsum(0).flip(0).tolist()  # after[r]: all from rank r on go
        top = (m * n - 1) // (m + n)
        step = multiple if top >= multiple else 1
        steps = range(step, min(top, top if most is None else most.get(name, top)) + 1, step)
        thin = [(after[r], table[name] / (m * n) * r * (m + n), r) for r in steps]
        choices[name] = [*thin, (0.0, float(table[name]), None)]
    if not choices:
        raise ValueError("grams and gradients have no plain layer of this model in common: take both of the same ones")
    if all(len(own) == 1 for own in choices.values()):
        raise Unreachable(f"no layer may be factored: most allows no rank that is a multiple of {multiple} to any")
    if not any(own[0][0] > 0 for own in choices.values()):
        raise ValueError("no rank is predicted to matter: the gradients are zero, as where nothing reaches the loss")
    rest = table.sum() - sum(own[-1][1] for own in choices.values())
    floor = (rest + sum(own[0][1] for own in choices.values())) / table.sum()
    if macs < floor:
        raise Unreachable(f"ranks alone cannot reach {macs:g} x MACs: {floor:.3f} stays at the lowest ones")
    chosen = _priced(choices, macs * table.sum() - rest)
    return {name: rank for name, (_, _, rank) in chosen.items() if rank is not None}


def uniform_ranks(model, batches, *, macs, grams=None, damping=1e-3):
    """{layer: rank} with which layers keep the same share of their MACs each, and the model at most the share `macs`.

    The baseline of `ranks`, for shrink.factorise with the same grams (None: plain SVD). What shares the cut: the linear
    layers alone, or with the stem's convolutions, or with all of these but the first, which sees three channels;
    that of them which leaves the lowest loss on batches, by their labels. Layers that are factored or cut already stay
    as they are. macs: in (0, 1), of the whole model's. damping: see lowrank.damped. Raises ValueError for a share
    outside (0, 1), and Unreachable for one below what rank 1 leaves everywhere, naming the floor.
    """
    _checked_target({"macs": macs})
    view, table = models.view(model), cost.breakdown(model).set_index("layer").macs
    shapes = {n: m.weight.flatten(1).shape for n, m in view.matrices.items() if isinstance(m, nn.Linear | nn.Conv2d)}
    shapes = {name: (m, n) for name, (m, n) in shapes.items() if m * n > m + n}
    stem = [name for name, _ in view.stem]

    def at(share, sizes):
        return {name: max(1, lowrank.rank_for(m, n, share, multiple=1)) for name, (m, n) in sizes.items()}

    def left(share, sizes):
        saved = (table[n] * (1 - r * sum(sizes[n]) / math.prod(sizes[n])) for n, r in at(share, sizes).items())
        return 1 - sum(saved) / table.sum()

    found, floors = [], []
    for stays in dict.fromkeys((tuple(stem), (), tuple(stem[:1]))):
        sizes = {name: size for name, size in shapes.items() if name not in stays}
        floors.append(left(0.0, sizes))
        if floors[-1] <= macs:
            low, high = 0.0, 1.0
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (low, middle) if left(middle, sizes) > macs else (middle, high)
            ranks = at(low, sizes)
            thin = shrink.factorise(model, ranks, grams=grams, damping=damping)
            found.append((scores.loss(thin, batches), ranks))
    if not found:
        floor = min(floors)
        raise Unreachable(f"the same share of each layer cannot reach {macs:g} x MACs: {floor:.3f} stays at rank 1")
    return min(found, key=lambda each: each[0])[1]


def _along(vectors, matrix):
    """x^T matrix x of each row x of vectors, [k]."""
    return torch.linalg.vecdot(vectors @ matrix.to(vectors), vectors)


def _priced(choices, room):
    """One of each list of (loss, MACs, rank), rising in MACs, that fit in room MACs together, with little loss."""

    def at(price):
        return {name: min(own, key=lambda c: c[0] + price * c[1]) for name, own in choices.items()}

    def spent(chosen):
        return sum(macs for _, macs, _ in chosen.values())

    low, high = 0.0, 1.0
    while spent(at(high)) > room * (1 + 1e-12):
        high *= 2
        if math.isinf(high):  # only the very lowest ranks fit
            return {name: own[0] for name, own in choices.items()}
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) > room * (1 + 1e-12) else (low, middle)
    chosen = at(high)
    while True:
        left = room * (1 + 1e-12) - spent(chosen)
        better = [
            ((chosen[name][0] - loss) / (macs - chosen[name][1]), name, (loss, macs, rank))
            for name, own in choices.items()
            for loss, macs, rank in own
            if loss <= chosen[name][0] and 0 < macs - chosen[name][1] <= left
        ]
        if not better:
            return chosen
        _, name, choice = max(better, key=lambda each: each[0])
        chosen[name] = choice


def _candidates(model, unit_scores, directions, kinds, multiple, rank_multiple, most):
    """groups {key: [indices]}, losses {key: [each group's]} and sizes of units; thin {layer: its _Thin} of ranks."""
    if unknown := set(kinds) - {*FLOORS, "ranks"}:
        raise ValueError(f"unknown kinds {sorted(unknown)}; known are {', '.join(FLOORS)}, ranks")
    view = models.view(model)
    if "qk" in kinds and any(block.normalises_queries for block in view.blocks):
        raise ValueError("queries and keys are normalised together here; leave qk out of kinds")
    known, sizes = dict(model.named_modules()), view.units([kind for kind in kinds if kind != "ranks"])
    for name in set(view.stages) - {view.stages[block.stage] for block in view.blocks}:
        sizes.pop((name, "width"), None)  # no block writes to it: there is nothing to score
    for name in view.linears():
        if not isinstance(known[name], nn.Linear):
            raise ValueError(f"{name} is a {type(known[name]).__name__}: take units first, factorise afterwards")
    unit_scores = {key: score for key, score in unit_scores.items() if key[1] in kinds}
    if absent := [key for key in sizes if key not in unit_scores]:
        kind = absent[0][1]
        raise ValueError(
            f"no scores for the {kind} of {absent[0][0]}; give scores.units of all {kind}, or leave them out"
        )
    if other := [key for key, score in unit_scores.items() if sizes.get(key) != len(score)]:
        raise ValueError(f"the scores of {other[0]} are of another model: take them of the one that is to be cut")
    if "ranks" in kinds and not directions:
        raise ValueError("no directions; give scores.directions of the layers that may be factored, or leave ranks out")
    groups = {key: _groups(score, key[1], multiple, _heads(view, key)) for key, score in unit_scores.items()}
    losses = {key: [unit_scores[key][group].sum().item() for group in own] for key, own in groups.items()}
    thin = {}
    for name, lost in directions.items() if "ranks" in kinds else ():
        m, n = known[name].weight.flatten(1).shape
        if len(lost) != min(m, n) + 1:
            raise ValueError(f"{name} [{m}, {n}] has {min(m, n)} directions; got {len(lost) - 1} of another model")
        top = (m * n - 1) // (m + n)
        step = rank_multiple if top >= rank_multiple else 1
        options = np.arange(step, min(top, top if most is None else most.get(name, top)) + 1, step)
        if len(options):
            after = lost.double().flip(0).cummax(0).values.flip(0).cpu().numpy()  # no part loses more than the whole
            thin[name] = _Thin(m, n, options, after[options])
    if not groups and not thin:
        raise Unreachable(f"nothing of {', '.join(kinds)} may go: most allows no layer a rank, or there is no unit")
    return groups, losses, sizes, thin


@dataclass(frozen=True)
class _Thin:
    """Ranks that an [m, n] layer may be factored at, rising, and the loss that each is predicted to add."""

    m: int
    n: int
    options: np.ndarray
    losses: np.ndarray

    def lost(self, rank):
        return 0.0 if rank is None else self.losses[np.searchsorted(self.options, rank)].item()


def _heads(view, key):
    return view.block(key[0]).num_heads if key[1] in ("qk", "v") else 1


def _groups(score, kind, multiple, heads):
    """[indices] of what goes together, the weakest first, so many that the floor stays."""
    if kind in ("qk", "v"):  # one dimension of each head, its weakest
        order = score.view(heads, -1).argsort(dim=1, stable=True)
        order = (order + torch.arange(heads)[:, None].to(order) * order.shape[1]).T
        return [each.tolist() for each in order[: max(0, len(order) - FLOORS[kind])]]
    size = 1 if kind in ("heads", "block") else multiple
    floor = max(FLOORS[kind], math.ceil(LEAST.get(kind, 0) * len(score)))
    order = score.argsort(stable=True)[: max(0, len(score) - floor)]
    return [group.tolist() for group in order.split(size) if len(group) == size]


class _Costs:
    """Cost of the model when of each kind of unit only a share is left, and some layers have a rank.

    Each line of cost.breakdown is a sum of products of such shares; a factored one has two terms more, of which the
    first falls with its inputs and the second with its outputs, and costs what is less: nobody keeps two thin layers
    that are dearer than the whole one.
    """

    def __init__(self, view, table, thin):
        self.total, self.thin, self.lines, self.of = table.cost.sum().item(), thin, [], {}
        self.number = {}
        for number, row in enumerate(table.itertuples()):
            terms, inputs, outputs = _terms(view, row)
            self.number[row.layer] = number
            per = row.cost / (thin[row.layer].m * thin[row.layer].n) if row.layer in thin else 0.0
            if row.layer in thin:
                inputs, outputs = [(thin[row.layer].n, inputs)], [(thin[row.layer].m * part, k) for part, k in outputs]
            self.lines.append((terms, per, [*inputs, *outputs] if per else []))
            for key in {key for _, keys in terms for key in keys}:
                self.of.setdefault(key, []).append(number)

    def whole(self, number, left):
        return sum(base * math.prod(left.get(key, 1.0) for key in keys) for base, keys in self.lines[number][0])

    def slope(self, number, left):
        """Cost of each rank of a factored line."""
        _, per, parts = self.lines[number]
        return per * sum(size * math.prod(left.get(key, 1.0) for key in keys) for size, keys in parts)

    def line(self, number, left, ranks):
        whole, rank = self.whole(number, left), ranks.get(number)
        return whole if rank is None else min(whole, rank * self.slope(number, left))

    def total_of(self, left, ranks, numbers=None):
        """Cost of everything, or of the lines of these numbers; left: {key: share}, else 1; ranks: {number: rank}."""
        numbers = range(len(self.lines)) if numbers is None else numbers
        return sum(self.line(number, left, ranks) for number in numbers)


def _terms(view, row):
    """Of one line of cost.breakdown: [(cost, keys of the units whose shares it is proportional to)], and, if it is a
    layer, the keys of its inputs and [(share, keys)] of its outputs."""
    stages, name = view.stages, row.block
    if not isinstance(name, str):  # in no block
        if row.role == "stem":
            names = [own for own, _ in view.stem]
            at = names.index(row.layer)
            inputs = [(names[at - 1], "filters")] if at else []
            outputs = [(stages[0], "width") if at == len(names) - 1 else (row.layer, "filters")]
            return [(row.cost, [*inputs, *outputs])], inputs, [(1.0, outputs)]
        if row.role == "merge":
            at = int(row.layer.split(".")[1])
            inputs, outputs = [(stages[at - 1], "width")], [(stages[at], "width")]
            return [(row.cost, inputs + outputs)], inputs, [(1.0, outputs)]
        return [(row.cost, [(stages[-1], "width")] if row.role == "head" else [])], [], []
    block, there = view.block(name), [(name, "block")]
    width, heads, neurons = [(stages[block.stage], "width")], [(name, "heads")], [(name, "neurons")]
    qk, v = [*heads, (name, "qk")], [*heads, (name, "v")]
    queries = 2 * block.qk_dim / (2 * block.qk_dim + block.head_dim) if block.num_heads else 0.0
    ends = {  # inputs, outputs
        "qkv": (width, [(queries, qk), (1 - queries, v)]),
        "proj": (v, [(1.0, width)]),
        "fc1": (width, [(1.0, neurons)]),
        "fc2": (neurons, [(1.0, width)]),
    }
    if row.role in ends:
        inputs, outputs = ends[row.role]
        terms = [(row.cost * share, [*there, *inputs, *keys]) for share, keys in outputs]
        return terms, [*there, *inputs], [(share, [*there, *keys]) for share, keys in outputs]
    keys = {"qk": qk, "av": v, "position": heads if row.layer.endswith(".2") else []}[row.role]
    return [(row.cost, [*there, *keys])], [], []


class _Search:
    """The greedy search of `plan`: units left and ranks of layers, by number of their line of costs."""

    def __init__(self, costs, groups, losses, sizes):
        self.costs, self.groups, self.losses, self.sizes = costs, groups, losses, sizes
        self.thin = {costs.number[name]: own for name, own in costs.thin.items()}
        self.blocks = [key for key in groups if key[1] == "block"]
        self.taken, self.ranks = [], {}

    def share(self, key, count):
        """What is left of a key when its first groups are gone."""
        return 1 - sum(map(len, self.groups[key][:count])) / self.sizes[key]

    def left(self, counts):
        return {key: self.share(key, count) for key, count in counts.items()}

    def floor(self):
        """Cost when all is gone that may go. Of blocks one stays, the cheapest."""
        counts = {key: len(own) for key, own in self.groups.items()}
        ranks = {number: thin.options[0] for number, thin in self.thin.items()}
        stays = [{key: 0} for key in self.blocks] or [{}]
        return min(self.costs.total_of(self.left(counts | block), ranks) for block in stays)

    def run(self, goal):
        """Take what has the least loss per cost saved until the cost is goal, and give back what was too much."""
        goal = goal * (1 + 1e-12)
        counts, left, self.ranks, self.taken = Counter(), {}, {}, []
        now, prices = self.costs.total_of({}, {}), {}
        while now > goal:
            for candidate in [*self.groups, *self.thin]:
                if candidate not in prices:
                    price = self.rank_price if candidate in self.thin else self.unit_price
                    prices[candidate] = price(candidate, counts, left)
            best = min(prices, key=lambda candidate: prices[candidate][0])
            if math.isinf(prices[best][0]):
                break
            if best in self.thin:
                self.ranks[best] = prices[best][1]
                touched = [best]
            else:
                self.taken.append(best)
                counts[best] += 1
                left[best] = self.share(best, counts[best])
                touched = self.costs.of.get(best, [])
            prices = {} if best in self.blocks else self.still(prices, best, touched)
            now = self.costs.total_of(left, self.ranks)
        return self.give_back(goal)

    def still(self, prices, best, touched):
        """prices without those that the lines touched have a part in."""
        keys = {key for number in touched for _, keys in self.costs.lines[number][0] for key in keys}
        gone = {best, *touched, *keys}
        return {candidate: price for candidate, price in prices.items() if candidate not in gone}

    def unit_price(self, key, counts, left):
        """(predicted loss of the key's next group per cost that it saves,)"""
        at, gone = counts[key], {name for name, kind in counts if kind == "block" and counts[name, kind]}
        last = key in self.blocks and len(gone) + 1 == len(self.blocks)
        if at == len(self.groups[key]) or key[0] in gone or last:
            return (math.inf,)
        touched = self.costs.of.get(key, [])
        smaller = left | {key: self.share(key, at + 1)}
        saved = self.costs.total_of(left, self.ranks, touched) - self.costs.total_of(smaller, self.ranks, touched)
        return (self.losses[key][at] / saved if saved > 0 else math.inf,)

    def rank_price(self, number, counts, left):
        """(least predicted loss per cost saved of the layer's lower ranks, that rank)."""
        thin, slope = self.thin[number], self.costs.slope(number, left)
        saved = self.costs.line(number, left, self.ranks) - thin.options * slope
        lost = thin.losses - thin.lost(self.ranks.get(number))
        is_open = saved > 1e-9 * max(slope, 1e-30)
        if not is_open.any():
            return math.inf, None
        price = np.where(is_open, lost / np.where(is_open, saved, 1.0), math.inf)
        return price.min().item(), int(thin.options[price.argmin()])

    def give_back(self, goal):
        """Undo what the goal is met without, the dearest first, and spend what is left on ranks."""
        counts = Counter(self.taken)
        for key in reversed(self.taken[:-1]):
            counts[key] -= 1
            if self.costs.total_of(self.left(counts), self.ranks) > goal:
                counts[key] += 1
        seen, kept = Counter(), []
        for key in self.taken:
            seen[key] += 1
            kept += [key] * (seen[key] <= counts[key])
        self.taken, left = kept, self.left(counts)
        room = goal - self.costs.total_of(left, self.ranks)
        while self.ranks:
            better = [each for number in self.ranks for each in self.raises(number, left, room)]
            if not better:
                break
            _, number, rank, more = max(better, key=lambda each: each[0])
            room -= more
            if rank is None:
                del self.ranks[number]
            else:
                self.ranks[number] = rank
        return self

    def raises(self, number, left, room):
        """[(loss gained per cost, number, rank or None for whole, cost more)] of the higher ranks that fit in room."""
        thin, own = self.thin[number], self.ranks[number]
        now, found = self.costs.line(number, left, self.ranks), []
        for rank in [*thin.options[thin.options > own].tolist(), None]:
            more = self.costs.line(number, left, {number: rank}) - now
            gain = thin.lost(own) - thin.lost(rank)
            if more <= room and gain > 0:
                found.append((gain / more if more > 0 else math.inf, number, rank, more))
        return found

    def told(self, what):
        """The Plan; costs that several kinds save together are told of the one that went first, ranks at the end."""
        gone = {name for name, kind in self.taken if kind == "block"}
        counts, saved, before = Counter(), Counter(), float(self.costs.total)
        for key in self.taken:
            counts[key] += 1
            after = self.costs.total_of(self.left(counts), {})
            saved[key] += before - after
            before = after
        left, ranks, drop, lines = self.left(counts), {}, {}, []
        for key, size in sorted(self.sizes.items(), key=lambda item: item[0] in self.blocks):
            if key[0] in gone and key[1] != "block":  # it goes with its block, which is told of what it saved
                saved[key[0], "block"] += saved[key]
                continue
            indices = sorted(index for group in self.groups[key][: counts[key]] for index in group)
            if indices:
                drop[key] = indices
            predicted = sum(self.losses[key][: counts[key]])
            lines.append((*key, size, len(indices), predicted, saved[key]))
        names = {number: name for name, number in self.costs.number.items()}
        for number, rank in sorted(self.ranks.items()):
            thin, less = self.thin[number], self.costs.whole(number, left) - self.costs.line(number, left, self.ranks)
            if less > 0:
                ranks[names[number]] = rank
                most = min(thin.m, thin.n)
                lines.append((names[number], "ranks", most, most - rank, thin.lost(rank), less))
                before -= less
        columns = ["block", "kind", "units", "dropped", "predicted", f"{what}_saved"]
        return Plan(drop, ranks, pd.DataFrame(lines, columns=columns), before / self.costs.total)
