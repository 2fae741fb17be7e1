"""Search for the units and ranks whose loss costs least for what they save, all kinds in one pool.

Method: docs/methods/budget.md.

Public: FLOORS, Plan, Search, Unreachable, basis, candidates, check_reachable, checked_target,
layers_of, without.
"""

import fnmatch
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitlab import models, names
from vitlab.evaluation import cost
from vitlab.pruning import factor, lowrank

# At least so many units stay, whatever the target. Dimensions of queries, keys and values are
# counted in each head. Of whole blocks one stays in the model; the search sees to that.
FLOORS = {"heads": 1, "neurons": 8, "width": 8, "filters": 4, "qk": 4, "v": 4, "block": 0}
# And at least this share of a place. What goes is predicted to lose the sum of its parts, but a
# residual stream that is all but gone loses far more: LOG.md, 2026-11-26.
_LEAST = {"width": 1 / 8}
_TARGETS = ("macs", "params", "bytes", "latency")
_RANK_MULTIPLE = 4  # ranks of a plan are multiples of it


class Unreachable(ValueError):
    """Say that a target lies below what the kinds that may go can reach.

    floor: the least share that can stay.
    """

    def __init__(self, words, floor=None):  # an exception is unpickled by its words alone
        super().__init__(words)
        self.floor = floor


@dataclass(frozen=True, repr=False)
class Plan:
    """Hold what would go, before any weight is touched.

    drop: {(where, kind): indices}, for shrink.remove.
    ranks: {layer: rank}, for factor.factorise after it.
    table: a line for each block (stage, convolution, layer) and kind. Columns: block, kind, units
        (of ranks: of the whole layer), dropped, predicted (rise of the loss) and macs_saved
        (params_saved, ..., latency_saved in ms).
    share: what stays of the target, as a share of the model's.
    """

    drop: dict
    ranks: dict
    table: pd.DataFrame
    share: float

    @property
    def predicted(self):
        """Return what the loss is predicted to rise by: the sum over all that goes.

        It puts cuts in order, and is often too low by a factor of several: measure what one costs,
        or ask budget.Calibration.expected, which corrects it by trial cuts.
        """
        return self.table.predicted.sum()

    def __repr__(self):
        """Return what goes of each kind, and what stays."""
        saved = self.table.columns[-1]
        what = saved.removesuffix("_saved")
        gone = self.table[self.table.dropped > 0].groupby("kind", sort=False)
        sums = {"units": "sum", "dropped": "sum", "predicted": "sum", saved: "sum"}
        lines = gone.agg({"block": "count", **sums}).rename(columns={"block": "places"})
        text = lines.to_string(float_format="{:.4g}".format) if len(lines) else "nothing goes"
        return (
            f"Plan: {self.share:.1%} of the {what} stay, the loss is predicted to rise by "
            f"{self.predicted:.3g} (no promise: it is often too low by a factor of several)\n{text}\n"
            "plan.table has all places, plan.drop and plan.ranks what goes there"
        )


def checked_target(target, model):
    """Return the name and the share of a target.

    target: {name: share to keep}, such as {"macs": 0.5}
    model: the one to cut

    Raises ValueError for several targets or none, an unknown one, a share outside (0, 1), and a
    forward pass whose MACs cannot be planned, as `cost.check_forward` does.
    """
    if len(target) != 1:
        listed = ", ".join(_TARGETS)
        raise ValueError(f"give one target of {listed}, such as macs=0.5; got {target or 'none'}")
    [(what, share)] = target.items()
    names.check("target", what, _TARGETS)
    if not 0 < share < 1:
        raise ValueError(f"{what} is the share to keep, in (0, 1); got {share}")
    if what == "macs":
        cost.check_forward(model)
    return what, share


def check_reachable(goes, what, share, floor):
    """Raise Unreachable unless the floor of a target is at most the share to keep.

    goes: what may go, in words.
    what: the name of the target.
    share: the share to keep, in (0, 1).
    floor: the least share that can stay.
    """
    if floor > share:
        raise Unreachable(
            f"{goes} alone cannot reach {share:g} x {what}: {floor:.3f} stays when all "
            "that may go is gone; allow more, or keep a larger share",
            floor,
        )


def candidates(model, unit_scores, directions, kinds, multiple, most):
    """Return all that competes: units {(where, kind): _Units} and thin {layer: _Thin}.

    model: its layers are plain.
    unit_scores, directions: as for budget.plan; {} where no kind needs them.
    kinds: what may go.
    multiple: neurons, channels and filters go in groups of so many.
    most: {layer: highest rank}; layers that are not in it may have any that saves MACs.

    Raises ValueError for factored layers, an unknown kind, scores that are not one for each unit,
    missing directions, and directions of another model.
    """
    view = models.view(model)
    units = _scored_units(view, unit_scores, kinds, multiple)
    for name, layer in view.linears().items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{name} is a {type(layer).__name__}: take units first, factorise afterwards"
            )
    if "ranks" not in kinds:
        return units, {}
    if not directions:
        raise ValueError(
            "no directions; give scores.directions of layers to factor, or leave ranks out"
        )
    return units, _thin_layers(model, directions, most)


def layers_of(model, names_to_keep):
    """Return {layer}: the lines of cost.breakdown that some names mean.

    names_to_keep: names of modules, such as "head" or "blocks.0", each with all that is inside, or
        patterns such as "blocks.*.attn.qkv".
    Raises ValueError, with the nearest known name, for one that means nothing.
    """
    lines = [name for name in cost.breakdown(model).layer if name != "rest"]
    # Each line with all modules that it lies in.
    inside = {line: {line[:at] for at, c in enumerate(line + ".") if c == "."} for line in lines}
    found = set()
    for name in [names_to_keep] if isinstance(names_to_keep, str) else names_to_keep:
        meant = {line for line in lines if fnmatch.filter(inside[line], name)}
        if not meant:
            known = dict.fromkeys(part for line in lines for part in sorted(inside[line]))
            raise ValueError(names.unknown("layer to keep", name, known))
        found |= meant
    return found


def without(units, thin, layers, view, table):
    """Return units and thin of `candidates` without all that would change some layers.

    layers: those of `layers_of`.
    view, table: as for `Search`.
    """
    frozen = set(layers)
    for row in table.itertuples():
        if row.layer in layers:
            # A layer changes with the units that it reads and with those that it writes.
            inputs, outputs = _terms(view, row)
            frozen.update(inputs, *(keys for _, keys in outputs))
    return tuple(
        {key: each for key, each in parts.items() if key not in frozen} for parts in (units, thin)
    )


class _Units(NamedTuple):
    """The units of one place, such as the neurons of a block."""

    groups: list  # [indices] that go together, the weakest first
    losses: list  # the predicted rise of the loss by each group
    shares: list  # of the units that are left when no group is gone, one, two, ...
    size: int  # how many units there are


def _scored_units(view, unit_scores, kinds, multiple):
    """Return {(where, kind): _Units}, or raise ValueError unless each unit has one score."""
    sizes = view.units([kind for kind in kinds if kind != "ranks"])
    # Where no block writes to the stream of a stage there is nothing to score.
    written = {view.stages[block.stage] for block in view.blocks}
    for stage in set(view.stages) - written:
        sizes.pop((stage, "width"), None)
    unit_scores = {key: score for key, score in unit_scores.items() if key[1] in kinds}
    units = {}
    for key in sizes | unit_scores:
        size = sizes.get(key, 0)
        # Groups are summed one by one, and each sum would wait for a GPU.
        score = unit_scores.get(key, torch.zeros(0)).cpu()
        if size != len(score):
            raise ValueError(
                f"{key} has {size} units and {len(score)} scores: give scores.units of this very "
                f"model and of all {key[1]}, or leave that kind out"
            )
        where, kind = key
        # Dimensions of heads are numbered head by head; everything else is one list.
        heads = view.block(where).num_heads if kind in ("qk", "v") else 1
        groups = _groups(score, kind, multiple, heads)
        losses = [score[group].sum().item() for group in groups]
        gone = np.cumsum([0, *map(len, groups)])
        units[key] = _Units(groups, losses, (1 - gone / size).tolist(), size)
    return units


def _groups(score, kind, multiple, heads):
    """Return [indices] of units that go together, the weakest first, down to the floor."""
    by_head = score.view(heads, -1)
    size = by_head.shape[1]
    # First the weakest of every head, then the second weakest; [size, heads].
    order = by_head.argsort(dim=1, stable=True).T
    # Units are numbered through all heads.
    order = (order + size * torch.arange(heads).to(order)).flatten()
    floor = max(FLOORS[kind], math.ceil(_LEAST.get(kind, 0) * size))
    # Neurons, channels and filters go by so many that the kernels like the sizes that stay.
    # Dimensions of heads go one from each head, as all heads of a block are of one size. Heads and
    # blocks go one by one.
    together = multiple if kind in ("neurons", "width", "filters") else heads
    count = max(0, len(score) - heads * floor) // together
    return order[: count * together].view(count, together).tolist()


class _Thin(NamedTuple):
    """The ranks that a layer [m, n] may have, and the loss that each is predicted to add."""

    shape: tuple
    # The first one is m * n and stands for the whole layer: two thin ones of that rank would cost
    # more than it does, and `Search` takes the cheaper one.
    options: np.ndarray
    losses: np.ndarray


def basis(layer, gram, gradient=None):
    """Return all directions u [m, R], v [R, n] of the weighted SVD of a layer.

    layer: linear or convolution, of weight.flatten(1) [m, n]; R = min(m, n).
    gram: [n, n] of its inputs; lowrank.damped is applied to it here.
    gradient: [m, m] of its outputs, see lowrank.svd; None: all count alike.

    Raises ValueError for a gram of another shape and for values that are not finite.
    """
    weight = layer.weight.detach().flatten(1)
    return lowrank.svd(weight, min(weight.shape), gram=lowrank.damped(gram), gradient=gradient)


def _thin_layers(model, directions, most):
    """Return {layer: _Thin} of the layers that may have any rank.

    model: holds the layers, which are plain.
    directions: {layer: [R+1]}, what is lost without all directions from each on.
    most: {layer: highest rank}; layers that are not in it may have any that saves MACs.

    Raises ValueError for a wrong number of directions.
    """
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
        step = _RANK_MULTIPLE if top >= _RANK_MULTIPLE else 1
        options = np.arange(step, min(top, most.get(name, top)) + 1, step)
        if len(options):
            # A lower rank may not look better than a higher one: take the highest loss from each
            # rank on.
            highest = lost.double().flip(0).cummax(0).values
            losses = highest.flip(0).cpu().numpy()[options]
            thin[name] = _Thin((m, n), np.r_[m * n, options], np.r_[0.0, losses])
    return thin


class Search:
    """Search greedily: what has the least predicted loss per cost saved goes first.

    In all methods a state is {candidate: number}, as explained below at `state`.

    view: anatomy.View of the model.
    table: cost.breakdown with a column cost.
    units, thin: those of `candidates`.
    narrow: whether heads will have no more dimensions than their qkv has ranks, see
        factor.narrow_heads.
    kept: names of layers that stay as they are.
    """

    def __init__(self, view, table, units, thin, narrow=False, kept=()):
        self.total = table.cost.sum().item()
        self.units = units
        self.thin = thin
        self.blocks = [key for key in units if key[1] == "block"]
        # A candidate is a key of units (where, kind), whose number says how many of its groups are
        # gone. Or it is a layer, whose number says which of its options it has. 0 is untouched.
        self.state = Counter()  # {candidate: number}
        self.taken = []  # the keys of groups that went, in their order
        self.lines = {}  # {name of a line: (cost, inputs, outputs)}, see _terms
        self.lines_of = defaultdict(list)  # {key: names of the lines whose cost depends on it}
        # {candidate: those whose price changes when it goes, with itself}
        self.touched_by = defaultdict(set)
        for row in table.itertuples():
            inputs, outputs = _terms(view, row)
            self.lines[row.layer] = row.cost, inputs, outputs
            # Where one of these goes the line falls, and with it what the others would save.
            members = {row.layer, *inputs}.union(*(keys for _, keys in outputs))
            for member in members:
                self.touched_by[member] |= members
                self.lines_of[member].append(row.layer)
        # {line: (qkv, kind, size of a head)} of those whose inputs are no more than qkv's ranks
        self.narrowed = {}
        self.narrowing = defaultdict(list)  # {qkv: [these lines]}
        self.parts = defaultdict(list)  # {qkv: [(place in its outputs, kind, size of a head)]}
        for block in view.blocks if narrow else ():
            self._narrow(block, table, factor.narrowable(block, kept))

    def _narrow(self, block, table, kinds):
        """Let the lines of a block's attention fall with the rank of its qkv."""
        qkv = f"{block.name}.attn.qkv"
        sizes = {"qk": block.qk_dim, "v": block.head_dim}
        kinds = kinds if qkv in self.thin else ()
        readers = {"qk": "qk", "av": "v", "proj": "v"}
        self.parts[qkv] = [
            (place, kind, sizes[kind]) for place, kind in enumerate(sizes) if kind in kinds
        ]
        for row in table[table.block == block.name].itertuples():
            kind = readers.get(row.role)
            if kind in kinds:
                self.narrowed[row.layer] = qkv, kind, sizes[kind]
                self.narrowing[qkv].append(row.layer)
                self.lines_of[qkv].append(row.layer)
                self.touched_by[qkv] |= self.touched_by[row.layer]
                for member in self.touched_by[row.layer]:
                    self.touched_by[member] = self.touched_by[member] | {qkv}

    def left(self, state, keys):
        """Return the product of the shares, in [0, 1], of units that are left of these keys.

        state: {candidate: number}.
        keys: [(where, kind)]; those that are not in units count as whole.
        """
        return math.prod(self.units[key].shares[state[key]] for key in keys if key in self.units)

    def line_cost(self, state, name, option):
        """Return the cost of a line at an option of its rank.

        state: {candidate: number}.
        name: of the line.
        option: number of an option; a slice or list gives an array of the costs at several.
        """
        cost, inputs, outputs = self.lines[name]
        # A neuron costs less once the stream is narrower: a line falls with what is left of its
        # inputs and, part by part, of its outputs.
        read = self.left(state, inputs)
        if name in self.narrowed:
            qkv, *size = self.narrowed[name]
            read *= self.narrow_share(state, qkv, *size, state[qkv])
        written = [part * self.left(state, keys) for part, keys in outputs]
        whole = cost * read * sum(written)
        if name not in self.thin:
            return whole
        # Of two thin layers the first falls with the inputs, the second with the outputs.
        m, n = self.thin[name].shape
        ranks = self.thin[name].options[option]
        narrow = [np.ones(np.shape(ranks))] * len(outputs)
        for place, kind, size in self.parts[name]:
            narrow[place] = self.narrow_share(state, name, kind, size, option)
        falls = sum(share * part for share, part in zip(narrow, written, strict=True))
        thin = ranks * cost / (m * n) * (n * read + m * falls)
        # Nobody keeps two thin layers that cost more than the whole one, but for narrower heads.
        return np.where(np.min(narrow, axis=0) < 1, thin, np.minimum(whole, thin))

    def narrow_share(self, state, qkv, kind, size, option):
        """Return the share of a head's dimensions that stay where qkv has the rank of an option."""
        left = size * self.left(state, [(qkv.removesuffix(".attn.qkv"), kind)])
        return np.minimum(1.0, self.thin[qkv].options[option] / left)

    def cost(self, state, key=None):
        """Return the cost of the lines that depend on a key.

        state: {candidate: number}.
        key: (where, kind) or a layer's name; None: all lines.
        """
        lines = self.lines if key is None else self.lines_of[key]
        return sum(self.line_cost(state, name, state[name]) for name in lines)

    def floor(self):
        """Return the share of the cost that stays when all is gone that may go."""
        lowest = dict.fromkeys(self.thin, 1)  # the first option after the whole layer
        for key, units in self.units.items():
            lowest[key] = len(units.groups)
        # One block has to stay, the cheapest.
        stays = [{block: 0} for block in self.blocks] or [{}]
        return min(self.cost(Counter(lowest | block)) for block in stays) / self.total

    def run(self, share):
        """Cut until a share of the cost is left, give back what was too much, and return self.

        share: of the whole model's cost, in (0, 1]; where it cannot be reached all goes that may.
        """
        goal = share * self.total
        goal *= 1 + 1e-12  # rounding alone misses no goal
        prices = {}  # {candidate: (loss per cost saved, its number after that)}, if still right
        left = self.cost(self.state)
        # Differences add up rounding, so that the whole sum says when it is enough.
        while left > goal or self.cost(self.state) > goal:
            for candidate in [*self.units, *self.thin]:
                if candidate not in prices:
                    price = self.rank_price if candidate in self.thin else self.unit_price
                    prices[candidate] = price(candidate)
            best = min(prices, key=lambda candidate: prices[candidate][0])
            price, number = prices[best]
            if math.isinf(price):  # nothing more may go
                break
            left -= self.cost(self.state, best)  # of the lines that change, before and after
            self.state[best] = number
            left += self.cost(self.state, best)
            if best in self.units:
                self.taken.append(best)
            # Prices of what shares no line with it stay right.
            for candidate in self.touched_by[best]:
                prices.pop(candidate, None)
            if best in self.blocks:  # another block may be the last one by now
                prices = {}
        # The last group may have saved far more than was missing, so that others come back.
        self.give_back(goal)
        # Spend what is left up to the goal on higher ranks.
        factored = [name for name in self.state if name in self.thin]
        losses, costs = self.options(factored)
        before = self.state.copy()
        _spend(self.state, losses, costs, goal - self.cost(self.state))
        if self.cost(self.state) > goal:  # layers that narrow with each other are priced apart
            self.state = before
        return self

    def unit_price(self, key):
        """Return the loss per cost saved by the next group (inf: none may go), and its number.

        key: (where, kind) of units.
        """
        units = self.units[key]
        number = self.state[key]
        blocks_left = [block for block in self.blocks if not self.state[block]]
        is_block_gone = self.state[key[0], "block"]
        if number == len(units.groups) or is_block_gone or blocks_left == [key]:
            return math.inf, number
        # What it saves is seen in the lines that depend on these units, with it and without it.
        without = self.state + Counter([key])
        saved = self.cost(self.state, key) - self.cost(without, key)
        return units.losses[number] / saved if saved > 0 else math.inf, number + 1

    def rank_price(self, name):
        """Return the least loss per cost saved by a lower rank of a layer, and its number.

        name: a layer of thin.
        """
        _, options, losses = self.thin[name]
        costs = self.rank_costs(name)
        now = self.state[name]
        saved = costs[now] - costs
        # What saves less than rounding, such as a rank that is not lower, may not be chosen.
        is_lower = saved > 1e-9 * costs[1] / options[1]
        lost = losses - losses[now]
        prices = np.where(is_lower, lost / np.maximum(saved, lowrank.TINY), math.inf)
        return prices.min(), prices.argmin()

    def rank_costs(self, name):
        """Return the costs at all options of a layer, of the lines that narrow with it, too."""
        costs = self.line_cost(self.state, name, slice(None))
        state = self.state.copy()
        for reader in self.narrowing[name]:
            for number in range(len(costs)):
                state[name] = number
                costs[number] += self.line_cost(state, reader, state[reader])
        return costs

    def give_back(self, goal):
        """Give back the groups that the goal is met without, the dearest first.

        goal: the cost that may be left.
        """
        # Not the last one: the goal was missed without it.
        for key in reversed(self.taken[:-1]):
            with_it = self.state - Counter([key])
            if self.cost(with_it) <= goal:
                self.state = with_it

    def options(self, names):
        """Return the losses and the costs, {layer: array}, of all options of these layers.

        names: layers of thin.
        """
        losses = {name: self.thin[name].losses for name in names}
        costs = {name: self.rank_costs(name) for name in names}
        # What one layer costs more where another's rank rises, too, is counted in advance.
        for name in self.narrowed.keys() & costs:
            wide = self.state.copy()
            wide[self.narrowed[name][0]] = 0
            costs[name] = self.line_cost(wide, name, slice(None))
        return losses, costs

    def as_plan(self, what):
        """Return the Plan of what was taken.

        what: the name of its target, such as "macs".
        """
        # What several kinds save together counts for the one that went first, ranks last.
        saved, cost_left = self.saved_by_units()
        drop = {}
        ranks = {}
        rows = []
        # Whole blocks come last: they take over what their units saved before.
        for key in sorted(self.units, key=lambda key: key[1] == "block"):
            where, kind = key
            if kind != "block" and self.state[where, "block"]:
                saved[where, "block"] += saved[key]
                continue
            groups, losses, _, size = self.units[key]
            count = self.state[key]
            indices = sorted(sum(groups[:count], []))
            if indices:
                drop[key] = indices
            rows.append((*key, size, len(indices), sum(losses[:count]), saved[key]))
        state = Counter({key: self.state[key] for key in self.units})
        for name in filter(self.state.get, self.lines):
            thin = self.thin[name]
            option = self.state[name]
            whole = self.cost(state, name)
            state[name] = option
            less = whole - self.cost(state, name)
            if less > 0:  # else two thin layers are no cheaper than what is left of the whole
                size = min(thin.shape)
                ranks[name] = thin.options[option].item()
                dropped = size - ranks[name]
                rows.append((name, "ranks", size, dropped, thin.losses[option], less))
                cost_left -= less
            else:
                state[name] = 0
        columns = ["block", "kind", "units", "dropped", "predicted", f"{what}_saved"]
        table = pd.DataFrame(rows, columns=columns)
        return Plan(drop, ranks, table, cost_left / self.total)

    def saved_by_units(self):
        """Return {key: cost saved}, in the order of the search, and the cost left by units."""
        saved = Counter()
        state = Counter()
        before = float(self.total)
        # Go through the search once more, without what was given back.
        for key in self.taken:
            if state[key] < self.state[key]:
                state[key] += 1
                after = self.cost(state)
                saved[key] += before - after
                before = after
        return saved, before


def _terms(view, row):
    """Return what a line of cost.breakdown depends on: inputs [key], outputs [(part, keys)].

    Parts add up to 1.
    """
    widths = [(stage, "width") for stage in view.stages]
    if isinstance(row.block, str):
        block = view.block(row.block)
        return _block_terms(block, row, [widths[block.stage]])
    if row.role == "rest":  # norms, tokens and the like are not counted as they fall
        return [], [(1.0, [])]
    # From the image to the classifiers each of these layers reads what the one before it writes.
    # The last convolution of the stem writes the stream of the first stage, merging the next ones.
    stem = [name for name, _ in view.stem]
    written = [(name, "filters") for name in stem[:-1]] + widths
    writers = [*stem, *view.linears(["merge"]), *view.classifiers]
    # The first one reads the image, and nobody reads what a classifier writes.
    number = min(writers.index(row.layer), len(written))
    return written[:number][-1:], [(1.0, written[number : number + 1])]


def _block_terms(block, row, width):
    """Return what a line inside a block depends on, as _terms does: also on the block."""
    # Rows of qkv and columns of proj fall with the heads and with the dimensions of each head.
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
    # Queries and keys are two parts of the rows of qkv, values the third. The sizes of a head may
    # differ in a model that was cut before.
    if row.role == "qkv":
        queries = 2 * block.qk_dim / (2 * block.qk_dim + block.head_dim)
        parts = [queries, 1 - queries]
    outputs = [(part, there + keys) for part, keys in zip(parts, outputs, strict=True)]
    return there + inputs, outputs


def _spend(state, losses, costs, room):
    """Raise ranks while there is room.

    state: {layer: number of its option}; it is changed.
    losses, costs: {layer: array} of each option.
    room: cost that the raises may add.
    """
    # Take one step at a time, first the one that gains most loss per cost.
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
