"""Budget: which units go for a target of MACs, parameters, bytes or time, or which ranks stay, by predicted loss."""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from . import bench, cost, lowrank, models, shrink

FLOORS = {"heads": 1, "neurons": 8, "width": 8, "filters": 4, "qk": 4, "v": 4}  # at least so many stay (of each head)
TARGETS = ("macs", "params", "bytes", "latency")


@dataclass(frozen=True)
class Plan:
    """What would go, before any weight is touched.

    drop: {(where, kind): indices}, for shrink.remove. table: one line per block (stage, convolution) and kind: units,
    dropped, predicted (sum of the scores that go), macs_saved (or params_saved, …; of latency in ms). share: what
    stays of the target, as a share of the model's.
    """

    drop: dict
    table: pd.DataFrame
    share: float


def plan(model, unit_scores, *, kinds=("heads", "neurons"), multiple=8, image_size=None, batch=8, **target):
    """Plan that cuts one cost of the model to a share with the least predicted loss: `plan(model, scores, macs=0.5)`.

    target: one of macs, params, bytes (of weights and buffers in memory) or latency (of a batch of so many images, here
    and now), and the share to keep, in (0, 1).
    unit_scores: {(where, kind): tensor} of one criterion, best in loss units ("fisher"), so that all kinds compete in
    one currency: score per cost saved, smallest first (METHODS: scores in loss units need no normalisation, only
    cost). What a unit costs depends on what is left of the others, a neuron on the width of the stream: it is counted
    anew at each step. kinds: what may go, of heads, neurons, width, filters, qk, v.
    multiple: neurons, channels and filters go in groups of so many (the weakest of a place together), so that sizes
    stay friendly to the kernels; head dimensions go one from each head. FLOORS stay everywhere. The model's layers
    are plain: remove units first, factorise afterwards.

    The result is at most the target, of MACs less than the cheapest group below it. Parameters and bytes are counted on
    the smaller model, and the cut is corrected until they are met. For latency the time of each layer is measured
    and taken to fall with its sizes; what the smaller model then takes beside the dense one, interleaved, corrects the
    cut until it is within 5 % of the target, or the target within its quartiles: the plan then depends on the machine.
    Raises ValueError for other targets, a share outside (0, 1), an unknown kind, or a target below what these kinds can
    reach, naming the floor.
    """
    what, share = _checked_target(target)
    if unknown := set(kinds) - set(FLOORS):
        raise ValueError(f"unknown kinds {sorted(unknown)}; known are {', '.join(FLOORS)}")
    view = models.view(model)
    if "qk" in kinds and any(block.normalises_queries for block in view.blocks):
        raise ValueError("queries and keys are normalised together here; leave qk out of kinds")
    if absent := {kind for _, kind in view.units(kinds)} - {kind for _, kind in unit_scores}:
        raise ValueError(f"no scores for {sorted(absent)}; give scores.units of these kinds, or leave them out")
    unit_scores = {key: score for key, score in unit_scores.items() if key[1] in kinds}
    groups = {key: _groups(score, key[1], multiple, _heads(view, key)) for key, score in unit_scores.items()}
    costs = _Costs(view, _layer_costs(model, what, image_size, batch))
    sizes = {key: len(score) for key, score in unit_scores.items()}
    floor = costs.total_of({key: 1 - sum(map(len, own)) / sizes[key] for key, own in groups.items()}) / costs.total

    def planned(wanted):
        goal = max(wanted, floor) * costs.total
        taken = _give_back(_take(costs, groups, unit_scores, goal), costs, groups, sizes, goal)
        return _told(taken, costs, groups, unit_scores, what)

    if what == "macs":
        if share < floor:
            raise _out_of_reach(kinds, what, share, floor)
        return planned(share)
    found, low, high, wanted = None, floor, 1.0, max(share, floor)
    for _ in range(MOST_CORRECTIONS):
        tried, is_met = _measured(model, planned(wanted), what, share, image_size, batch)
        if is_met:
            return tried
        if found is None or _miss(tried.share, share, what) < _miss(found.share, share, what):
            found = tried
        if what != "latency":  # which scatters: what was too slow once may be fast enough the next time
            low, high = (wanted, high) if tried.share <= share else (low, wanted)
        guess = 1 - (1 - share) * (1 - wanted) / max(1 - tried.share, 1e-3)  # on the line to the whole model
        wanted = guess if low < guess < high else (low + high) / 2
    if found.share > share and (what != "latency" or _miss(found.share, share, what) > 0.1):
        found, is_met = _measured(model, planned(floor), what, share, image_size, batch)
        if found.share > share and not is_met:
            raise _out_of_reach(kinds, what, share, found.share)
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
    return ValueError(
        f"{' and '.join(kinds)} alone cannot reach {share:g} x {called}: {floor:.3f} stays when all but the floor "
        f"is gone; allow more kinds or ask for more {called.removeprefix('the ')}"
    )


def _layer_costs(model, what, image_size, batch):
    """cost.breakdown with a column `cost`, of the target: what the terms of _Costs are shares of."""
    table = cost.breakdown(model, image_size=image_size)
    if what == "latency":
        return table.assign(cost=bench.layer_times(model, table, batch=batch, image_size=image_size))
    return table.assign(cost=table.macs if what == "macs" else table.params)


def _measured(model, plan, what, share, image_size, batch):
    """plan with the share of the target that the cut model really keeps, and whether that meets the target."""
    small = shrink.remove(model, plan.drop) if plan.drop else model
    if what == "latency":
        named = {"dense": model, "small": small}
        times = bench.latency(named, batch=batch, image_size=image_size, repeats=21).iloc[1]
        is_met = abs(1 / times.speedup / share - 1) <= 0.05 or times.speedup_q1 <= 1 / share <= times.speedup_q3
        return dataclasses.replace(plan, share=1 / times.speedup), bool(is_met)
    count = cost.bytes_memory if what == "bytes" else lambda m: sum(p.numel() for p in m.parameters())
    kept = count(small) / count(model)
    return dataclasses.replace(plan, share=kept), 0.995 * share <= kept <= share


def ranks(model, grams, gradients, *, macs, multiple=8, most=None, damping=1e-3, image_size=None):
    """{layer: rank} with which the model's MACs fall to the share `macs` at little predicted loss.

    For shrink.factorise with the same grams; a layer that should stay dense is left out. grams: {layer: [n, n]} of
    scores.grams; gradients: {layer: [m, m]} of scores.gradient_grams: both say which layers may be factored, of those
    that are plain. A rank that goes is predicted to cost half of (u^T G u)(v^T H v), u v its part of the
    activation-weighted SVD, H the gram and G the gradients': it orders layers well, but is no loss to compare with
    that of `plan` (see scores.gradient_grams). Each layer has a choice of ranks, multiples of `multiple` below
    break-even (any rank, where that is lower), or to stay dense; one price per MAC, found by bisection, decides for
    all, and what is left over is spent where it gains most. macs: share to keep, in (0, 1), of the whole model's.
    most: {layer: highest rank to factor it at}, as bench.break_even measures them: above it a layer stays dense, and
    at 0 always; None for all that save MACs. damping: see lowrank.damped.

    Raises ValueError for a share outside (0, 1), no common layers, one with another shape, gradients that are all
    zero, and a target below what the lowest ranks leave, naming the floor.
    """
    _check_share(macs)
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
        raise ValueError(f"no layer may be factored: most allows no rank that is a multiple of {multiple} to any")
    if not any(own[0][0] > 0 for own in choices.values()):
        raise ValueError("no rank is predicted to matter: the gradients are zero, as where nothing reaches the loss")
    rest = table.sum() - sum(own[-1][1] for own in choices.values())
    floor = (rest + sum(own[0][1] for own in choices.values())) / table.sum()
    if macs < floor:
        raise ValueError(f"ranks alone cannot reach {macs:g} x MACs: {floor:.3f} stays at the lowest ones")
    chosen = _priced(choices, macs * table.sum() - rest)
    return {name: rank for name, (_, _, rank) in chosen.items() if rank is not None}


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


def _check_share(macs):
    if not 0 < macs < 1:
        raise ValueError(f"macs is the share to keep, in (0, 1); got {macs}")


def _heads(view, key):
    return view.block(key[0]).num_heads if key[1] in ("qk", "v") else 1


def _groups(score, kind, multiple, heads):
    """[indices] of what goes together, the weakest first, so many that the floor stays."""
    if kind in ("qk", "v"):  # one dimension of each head, its weakest
        order = score.view(heads, -1).argsort(dim=1, stable=True)
        order = (order + torch.arange(heads)[:, None].to(order) * order.shape[1]).T
        return [each.tolist() for each in order[: max(0, len(order) - FLOORS[kind])]]
    size = 1 if kind == "heads" else multiple
    order = score.argsort(stable=True)[: max(0, len(score) - FLOORS[kind])]
    return [group.tolist() for group in order.split(size) if len(group) == size]


class _Costs:
    """Cost of the model when of each kind of unit only a share is left: a sum of products of such shares."""

    def __init__(self, view, table):
        self.terms = [term for row in table.itertuples() for term in _terms(view, row)]
        self.total = table.cost.sum().item()
        self.of = {}
        for term in self.terms:
            for key in set(term[1]):
                self.of.setdefault(key, []).append(term)

    def total_of(self, left, key=None):
        """Cost with these shares left ({key: share in [0, 1]}, else 1): of everything, or of what key is part of."""
        terms = self.terms if key is None else self.of.get(key, [])
        return sum(base * math.prod(left.get(each, 1.0) for each in keys) for base, keys in terms)


def _terms(view, row):
    """[(cost, keys of the units whose shares they are proportional to)] of one line of cost.breakdown."""
    stages, name = view.stages, row.block
    if not isinstance(name, str):  # in no block
        if row.role == "stem":
            names = [own for own, _ in view.stem]
            at = names.index(row.layer)
            reads = [(names[at - 1], "filters")] if at else []
            return [(row.cost, [*reads, (stages[0], "width") if at == len(names) - 1 else (row.layer, "filters")])]
        if row.role == "merge":
            at = int(row.layer.split(".")[1])
            return [(row.cost, [(stages[at - 1], "width"), (stages[at], "width")])]
        return [(row.cost, [(stages[-1], "width")] if row.role == "head" else [])]
    block = view.block(name)
    width, heads, neurons = (stages[block.stage], "width"), (name, "heads"), (name, "neurons")
    if row.role == "qkv":
        queries = 2 * block.qk_dim / (2 * block.qk_dim + block.head_dim)
        return [
            (row.cost * queries, [width, heads, (name, "qk")]),
            (row.cost * (1 - queries), [width, heads, (name, "v")]),
        ]
    keys = {
        "qk": [heads, (name, "qk")],
        "av": [heads, (name, "v")],
        "proj": [heads, (name, "v"), width],
        "fc1": [width, neurons],
        "fc2": [neurons, width],
        "position": [heads] if row.layer.endswith(".2") else [],
    }
    return [(row.cost, keys[row.role])]


def _take(costs, groups, unit_scores, target):
    """Keys in the order in which their next group goes: the least predicted loss per cost saved, until the target."""
    sizes = {key: len(score) for key, score in unit_scores.items()}
    losses = {key: [unit_scores[key][group].sum().item() for group in own] for key, own in groups.items()}
    left, macs, taken = dict.fromkeys(sizes, 1.0), float(costs.total), []
    reached = dict.fromkeys(sizes, 0)
    while macs > target * (1 + 1e-12):
        best = None
        for key, own in groups.items():
            if reached[key] == len(own):
                continue
            smaller = left | {key: left[key] - len(own[reached[key]]) / sizes[key]}
            saved = costs.total_of(left, key) - costs.total_of(smaller, key)
            price = losses[key][reached[key]] / saved if saved > 0 else math.inf
            if best is None or price < best[0]:
                best = price, key, smaller, saved
        _, key, left, saved = best
        reached[key] += 1
        taken.append(key)
        macs -= saved
    return taken


def _give_back(taken, costs, groups, sizes, target):
    """taken without the groups, the dearest first, that the target is met without: the last one may overshoot."""
    counts = Counter(taken)
    for key in reversed(taken[:-1]):
        counts[key] -= 1
        if costs.total_of(_left(counts, groups, sizes)) > target * (1 + 1e-12):
            counts[key] += 1
    seen, kept = Counter(), []
    for key in taken:
        seen[key] += 1
        kept += [key] * (seen[key] <= counts[key])
    return kept


def _left(counts, groups, sizes):
    """{key: share left} when so many groups of each key, the first ones, are gone."""
    return {key: 1 - sum(map(len, groups[key][:count])) / sizes[key] for key, count in counts.items()}


def _told(taken, costs, groups, unit_scores, what):
    """The Plan of taken; costs that several groups save together are told of the one that went first."""
    sizes = {key: len(score) for key, score in unit_scores.items()}
    saved, counts, before = dict.fromkeys(sizes, 0.0), Counter(), float(costs.total)
    for key in taken:
        counts[key] += 1
        after = costs.total_of(_left(counts, groups, sizes))
        saved[key] += before - after
        before = after
    drop, lines = {}, []
    for key, size in sizes.items():
        indices = sorted(index for group in groups[key][: counts[key]] for index in group)
        if indices:
            drop[key] = indices
        lines.append((*key, size, len(indices), unit_scores[key][indices].sum().item(), saved[key]))
    columns = ["block", "kind", "units", "dropped", "predicted", f"{what}_saved"]
    return Plan(drop, pd.DataFrame(lines, columns=columns), before / costs.total)
