"""Search for the units and ranks whose loss costs least for what they save, all kinds in one pool.

Method: docs/methods/budget.md.

Public: Costs, FLOORS, LEAST, Plan, Search, TARGETS, Unreachable, basis, candidates, checked_target,
spend, thin_layers.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitlab import models
from vitlab.pruning import lowrank

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
    ranks: {layer: rank}, for factor.factorise after it.
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


def checked_target(target):
    """Return the name and the share of a target such as {"macs": 0.5}, or raise ValueError."""
    if len(target) != 1 or not target.keys() <= TARGETS.keys():
        names = ", ".join(target) or "none"
        raise ValueError(f"give one target of {', '.join(TARGETS)}, such as macs=0.5; got {names}")
    [(what, share)] = target.items()
    if not 0 < share < 1:
        raise ValueError(f"{what} is the share to keep, in (0, 1); got {share}")
    return what, share


def candidates(model, unit_scores, directions, kinds, multiple, rank_multiple, most):
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
        thin = thin_layers(model, directions, rank_multiple, most)
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


def basis(layer, gram):
    """Return all directions u [m, R], v [R, n] of the activation-weighted SVD of a layer."""
    weight = layer.weight.detach().flatten(1)
    return lowrank.svd(weight, min(weight.shape), gram=lowrank.damped(gram))


def thin_layers(model, directions, multiple, most):
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


class Costs:
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


class Search:
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
        spend(self.state, losses, costs, goal - self.costs.of(self.state))

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


def spend(state, losses, costs, room):
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
