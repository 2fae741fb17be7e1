"""Cut a model to a budget: choose what goes by the predicted rise of the loss.

A budget is a share of the model's MACs, parameters, bytes or time. `reach` does all of it in one
call, `Calibration` in steps, whose functions are `candidates`, `plan` and `cut`. Method:
docs/methods/budget.md.

Public: Calibration, candidates, cut, plan, positions, reach.
"""

import math
from dataclasses import replace
from functools import cached_property, partial

import numpy as np

from vitlab import files, models, names
from vitlab.evaluation import bench, cost, runtimes
from vitlab.pruning import factor, pool, recover, scores, shrink

_POOL = ("heads", "neurons", "filters", "width", "ranks")  # the kinds that do best together
_MOST_CORRECTIONS = 12
_TOKENS = 16  # positions of an image that tell most of what all do
# Deviation of the logarithm of a rate, which each trial of `Calibration.search` draws.
_SPREAD = 0.4
_TRIALS = (1 / 6, 1 / 2, 5 / 6)  # of the way to what a kind can reach alone: where it is tried
_TOLD = 0.01  # nats: a smaller rise is noise of some hundred images


def reach(model, batches, *, labels="true", keep=(), trials=0, **target):
    """Cut a model to a target without training.

    Call it as in `small, plan = budget.reach(model, batches, macs=0.5)`. It does what did best in
    docs/methods/budget.md. The model stays as it is.

    model, batches, labels: see `Calibration`.
    keep: layers that stay as they are, see `plan`; their weights do, too.
    trials: how many other plans are tried, see `Calibration.search`. Some dozens help some deep cuts.
    target: one of macs, params, bytes, latency, and the share to keep, in (0, 1).

    Returns the smaller model and its Plan.
    Raises what `Calibration` and its methods raise, such as Unreachable.
    """
    pool.checked_target(target, model)
    kept = pool.layers_of(model, keep)
    known = Calibration(model, batches, labels=labels)
    chosen = known.search(trials, keep=keep, **target)
    small, drops = known.cut(chosen)
    return known.reconstruct(small, drops, untouched=kept), chosen


class Calibration:
    """What calibration images tell about a model: all of its cuts share it.

    Each part is measured when it is first asked for: `positions`, `grams`, `gradients` and
    `candidates`.

    model: a ViT or Swin of plain layers, as models.create makes it.
    batches: a list of (x, y) of calibration images.
    kinds: what may go, see `plan`. None: all that do well together and that the model has.
    labels: which labels the gradients take, see scores.measure: "none" for a model without
        classifier, and wherever the features count.
    held_out: batches on which `expected` tries cuts, best of images that training never saw. None:
        the half of the calibration images that ranks nothing.

    Raises TypeError for batches that are no list. Each part raises what its function in scores
    raises.
    """

    def __init__(self, model, batches, *, kinds=None, labels="true", held_out=None):
        if not isinstance(batches, list | tuple):  # they are gone through several times
            raise TypeError(
                "batches are a list of pairs (images, labels), such as "
                f"list(images.train.subset(512).batches(64)); got {type(batches).__name__}"
            )
        self.model, self.batches, self.labels = model, batches, labels
        view = models.view(model)
        self.layers = list(view.matrices)
        # A stem of one convolution, for instance, has no filters that may go.
        self.kinds = kinds or [kind for kind in _POOL if kind == "ranks" or view.units([kind])]
        # Half of the images rank what may go, as what is left is fitted to all of them.
        self.half = batches[::2]
        self.held_out = held_out or batches[1::2] or batches
        self.trials = {}  # {kind: [(predicted, measured)]} of `expected`

    @cached_property
    def positions(self):
        """Where images are looked at: `positions`."""
        return positions(self.model, self.batches, labels=self.labels)

    @cached_property
    def grams(self):
        """Second moments of layer inputs: scores.grams, with a constant 1."""
        return _affine_grams(self.model, self.batches, **self.positions)

    @cached_property
    def gradients(self):
        """Second moments of the loss's gradients by layer outputs: scores.gradient_grams."""
        # What stays should answer as the model does, right or wrong: labels are its own.
        labels = "none" if self.labels == "none" else "model"
        few = _few(self.batches)
        return scores.gradient_grams(self.model, few, layers=self.layers, labels=labels)

    @cached_property
    def candidates(self):
        """What competes: `candidates`."""
        how = {"grams": self.grams, "gradients": self.gradients, "labels": self.labels}
        return candidates(self.model, self.half, kinds=self.kinds, **how)

    def plan(self, **options):
        """Return `plan` of what competes. options: its own, a target among them."""
        options = {"kinds": self.kinds, "narrow": True} | options
        return plan(self.model, **self.candidates | options)

    def search(self, trials, *, seed=0, **options):
        """Return the best of `plan` and of so many others, by what is left of the model's answers.

        What is predicted of kinds and places is off by unlike factors. Each trial multiplies the
        best rates so far, one for each kind in each place, by chance. Its plan is cut and
        reconstructed from a quarter of the images, and is better if its answers to half of them,
        none of that quarter, are nearer to the model's, whatever the labels say (scores.Answers).

        trials: at least 0, which gives `plan` itself.
        seed: of the rates that are tried.
        options: those of `plan`.

        Returns a Plan, whose predictions are those of the scores.
        Raises ValueError for fewer than two batches, and what `plan` raises.
        Source: random search with one parent (Rechenberg 1973), here over exchange rates.
        """
        best = self.plan(**options)
        if not trials:
            return best
        if len(self.batches) < 2:
            raise ValueError("a search judges images that a cut is not fitted to: give two batches")
        few = Calibration(self.model, self.batches[::4], kinds=self.kinds, labels=self.labels)
        whole = scores.Answers(self.model, self.batches[1::2])
        kept = pool.layers_of(self.model, options.get("keep", ()))

        def missed(plan):
            small = few.reconstruct(*few.cut(plan), untouched=kept)
            is_narrow = any(kind == "width" for _, kind in plan.drop)
            left = shrink.features_left(self.model, plan.drop) if is_narrow else slice(None)
            return whole.distance(small, left)

        found = self.candidates | options
        units, directions = found.get("unit_scores", {}), found.get("directions", {})
        draw = np.random.default_rng(seed)
        rates = dict.fromkeys([*units, *((layer, "ranks") for layer in directions)], 1.0)
        least = missed(best)
        for _ in files.progress(range(trials), "searching"):
            tried = {key: rate * math.exp(draw.normal(0, _SPREAD)) for key, rate in rates.items()}
            rated = {key: score * tried[key] for key, score in units.items()}
            thin = {layer: lost * tried[layer, "ranks"] for layer, lost in directions.items()}
            plan = self.plan(**options | {"unit_scores": rated, "directions": thin})
            if (now := missed(plan)) < least:
                least, rates, best = now, tried, plan
        own = [rates[key] for key in zip(best.table.block, best.table.kind, strict=True)]
        return replace(best, table=best.table.assign(predicted=best.table.predicted / own))

    def expected(self, plan):
        """Return what the loss will rise by right after a plan's cut, nothing compensated.

        A sum over units says too little where these go together, most of filters and width. So each
        kind is tried: three cuts of it alone, the mildest a sixth of the way to what it can reach,
        are measured on `held_out`. What is predicted of a kind is multiplied by measured over
        predicted of these cuts, interpolated on logarithmic axes.

        plan: of `plan` or `search`.

        Returns nats. The cuts of a kind are made when it is first asked for.
        Raises ValueError for a model without classifier.
        """
        lost = plan.table.groupby("kind").predicted.sum()
        return sum(part * self._off(kind, part) for kind, part in lost.items() if part > 0)

    def _off(self, kind, predicted):
        """Return measured over predicted rise of a cut of one kind that is predicted to rise so."""
        if kind not in self.trials:
            self.trials[kind] = self._tried(kind)
        seen = np.log([pair for pair in self.trials[kind] if max(pair) >= _TOLD])
        if not len(seen):
            return 1.0
        return math.exp(np.interp(math.log(predicted), seen[:, 0], seen[:, 1] - seen[:, 0]))

    def _tried(self, kind):
        """Return (predicted, measured) of cuts of one kind alone, the mildest first."""
        before, pairs = scores.loss(self.model, self.held_out), []
        floor = self._floor(kind)
        for way in _TRIALS:
            plan = self.plan(kinds=[kind], macs=1 - way * (1 - floor))
            small, _ = self.cut(plan, compensate=None)
            rise = scores.loss(small, self.held_out) - before
            # Where the loss falls, or nothing goes, there is nothing to multiply.
            if plan.predicted > 0 and rise > 0:
                pairs.append((plan.predicted, rise))
        return pairs

    def _floor(self, kind):
        """Return the least share of the MACs that stays when all goes that may go of one kind."""
        try:
            return self.plan(kinds=[kind], macs=1e-6).share
        except pool.Unreachable as floor:
            return floor.floor

    def cut(self, chosen, compensate="least squares"):
        """Return `cut` of a plan: the smaller model, and what went."""
        # Ranks are fitted again below: half of the images tell their directions, too.
        how = {"grams": self.grams, "compensate": compensate}
        return cut(self.model, chosen, self.half, **how, **self.positions)

    def reconstruct(self, small, drops=(), *, untouched=(), narrow=True):
        """Return a smaller model with all layers solved for against the whole one.

        small, drops: what `cut` returns.
        untouched: names of layers that stay as they are.
        narrow: whether factor.narrow_heads follows, on which plans of `plan` count.

        Raises what recover.reconstruct raises.
        """
        # A ridge that serves images which were not used needs some to hold out.
        damping = "held out" if len(self.batches) >= 4 else 1e-3
        how = {"drops": drops, "damping": damping, "untouched": untouched}
        how |= {"gradients": self.gradients, **self.positions}
        small = recover.reconstruct(small, self.model, self.batches, **how)
        return factor.narrow_heads(small, keep=untouched) if narrow else small


def positions(model, batches, *, labels="true"):
    """Say at which positions of an image layers are looked at, and how much each of them counts.

    Positions of one image are alike, so that sixteen do, unless all images together would give the
    widest layer less than eight for each of its inputs. An error of the class token counts as much
    as the loss moves with it.

    model, batches, labels: see `reach`.

    Returns {"tokens": ..., "weights": ...}, as scores.grams, `cut` and recover.reconstruct take
    them.
    Raises what scores.position_weights raises.
    """
    images = sum(len(x) for x, _ in batches)
    matrices = models.view(model).matrices.values()
    widest = max(layer.weight.flatten(1).shape[1] for layer in matrices)
    tokens = max(_TOKENS, math.ceil(8 * widest / max(images, 1)))
    # A mean of squares needs few images.
    weights = scores.position_weights(model, batches[::4], labels=labels)
    return {"tokens": tokens, "weights": weights}


def _few(batches):
    """Return a quarter of the batches, or more until they hold 128 images."""
    # Means of squared gradients need few images.
    images = sum(len(x) for x, _ in batches)
    return batches[:: max(1, min(4, images // 128))]


def candidates(model, batches, *, kinds, grams=None, gradients=None, labels="true"):
    """Measure on calibration batches what `plan` compares for these kinds.

    model, batches: see `reach`.
    kinds: what may go, see `plan`.
    labels: which labels the gradients take, see scores.measure.
    grams: {layer: [n+1, n+1]} of all view.matrices by scores.grams(affine=True), if known already.
    gradients: {layer: [m, m]} of scores.gradient_grams, by which directions are ordered, as
        recover.reconstruct does; None: by what the layer's output loses.

    Returns {"unit_scores": ..., "directions": ...}, each only if a kind needs it.
    Raises what scores.units, scores.grams and scores.directions raise.
    """
    # Directions are those of the activation-weighted SVD, of all linear layers and the stem's
    # convolutions.
    bases = None
    if "ranks" in kinds:
        moments = _second_moments(grams or _affine_grams(model, batches))
        matrices = models.view(model).matrices
        layers = files.progress(matrices.items(), "decomposing")
        gradients = gradients or {}
        bases = {
            name: pool.basis(layer, moments[name], gradients.get(name)) for name, layer in layers
        }
    # Fisher scores and directions are both in loss units, so that they may compete. One backward
    # pass gives both.
    units = [kind for kind in kinds if kind != "ranks"]
    how = {"units": ["fisher"], "kinds": units} if units else {}
    found = scores.measure(model, batches, bases=bases, labels=labels, **how)
    measured = {}
    if units:
        measured["unit_scores"] = found["units"]["fisher"]
    if bases:
        measured["directions"] = found["directions"]
    return measured


def plan(
    model,
    unit_scores=None,
    *,
    directions=None,
    kinds=("heads", "neurons"),
    multiple=8,
    most=None,
    keep=(),
    batch=8,
    narrow=False,
    runtime="eager",
    **target,
):
    """Plan the cut to a share of one cost that has the least predicted loss.

    Call it as in `budget.plan(model, unit_scores, macs=0.5)`. pool.FLOORS stay everywhere, and so
    does an eighth of the width (docs/methods/budget.md).

    model: its layers are plain. Remove units first and factorise afterwards, as `cut` does.
    unit_scores: {(where, kind): tensor} of one criterion, best in loss units ("fisher" of
        scores.units).
    directions: {layer: [R+1]} of scores.directions: what a layer loses at each rank.
    kinds: what may go: any of heads, neurons, width, filters, qk, v, block (a whole one) and ranks.
    multiple: neurons, channels and filters go in groups of so many, the weakest of a place.
    most: {layer: highest rank to factor it at}, as bench.break_even measures; 0 keeps a layer
        whole. None: all that save MACs.
    keep: names of layers, or of what they lie in, such as "head", "blocks.0" or
        "blocks.*.attn.qkv", whose weights stay as they are. A layer that reads or writes the
        residual stream keeps the width of its stage.
    batch: how many images are timed together, for latency.
    narrow: whether factor.narrow_heads follows, by which a rank of qkv below the size of a head
        saves more than its own layer.
    runtime: where latency is measured: "eager", "compiled", "onnxruntime" or "openvino", and
        "bf16" or "int8" after it, as in "onnxruntime int8"; float32 otherwise.
    target: a cost and the share of it to keep, in (0, 1). Costs are macs, params, bytes (of weights
        and buffers in memory) and latency (here and now).

    Returns a Plan of at most the target. Latency is within 5 % of the target, or has it within its
    quartiles, on this machine.
    Raises ValueError for other targets, a share outside (0, 1), an unknown kind or layer to keep,
    missing scores, factored layers, or another runtime than eager where nothing is timed.
    Raises Unreachable (a ValueError) for a target below what these kinds can reach; it names the
    floor.
    """
    what, share = pool.checked_target(target, model)
    if runtime != "eager" and what != "latency":
        raise ValueError(f"runtime says where latency is measured, but the target is {what}")
    # All kinds compete in one currency, predicted loss per cost saved, and the smallest goes first.
    # Scores in loss units need no normalisation, only a cost. A layer is factored where two thin
    # ones save more for what they lose than units do, and stays whole where they are not cheaper.
    units, thin = pool.candidates(
        model, unit_scores or {}, directions or {}, kinds, multiple, most or {}
    )
    # A line of the table costs in proportion to what is left of its inputs and outputs.
    table = cost.breakdown(model)
    costs = table.macs if what == "macs" else table.params
    if what == "latency":  # the time of a layer is taken to fall with its MACs
        costs = bench.layer_times(model, table, batch=batch)
    table["cost"] = costs
    view = models.view(model)
    kept = pool.layers_of(model, keep)
    units, thin = pool.without(units, thin, kept, view, table)
    new_search = partial(pool.Search, view, table, units, thin, narrow, kept)
    floor = new_search().floor()
    goes = " and ".join(kinds)

    def plan_for(wanted):
        return new_search().run(max(wanted, floor)).as_plan(what)

    # The time by layer is that of eager runs; elsewhere it is a first guess, which is corrected.
    dense = runtimes.timed(model, runtime) if what == "latency" else None

    def measure(wanted):
        plan = plan_for(wanted)
        small, _ = cut(model, plan)
        small = factor.narrow_heads(small, keep=kept) if narrow else small
        if what == "latency":
            timed = {"dense": dense, "small": runtimes.timed(small, runtime)}
            left, miss = _time_left(timed, share, batch)
        else:
            left, miss = _count_left(model, small, what, share)
        return replace(plan, share=left), miss

    # The closed form of MACs is exact: nothing to measure. It misses the target by less than the
    # cheapest step. Nor is there anything to measure where nothing may go.
    if what == "macs" or not (units or thin):
        pool.check_reachable(goes, what, share, floor)
        return plan_for(share)
    # The prediction of parameters, bytes and time is near, but only the cut model tells.
    nearest, miss = _corrected(measure, what != "latency", share, floor)
    if nearest.share <= share or miss <= 0.1:
        return nearest
    lowest, miss = measure(floor)  # all that may go
    if miss:
        pool.check_reachable(goes, what, share, lowest.share)
    return lowest


def _corrected(measure, is_counted, share, floor):
    """Return the plan that really keeps nearly the share, after several tries, and its miss.

    measure: a function from the share to plan for to the plan, with its measured share, and by how
        much it misses the target.
    """
    low, high = floor, 1.0
    wanted = max(share, floor)
    tries = []
    for number in files.progress(range(_MOST_CORRECTIONS), "planning"):
        tried, miss = measure(wanted)
        tries.append((tried, miss))
        if not miss:
            break
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
    return min(tries, key=lambda pair: pair[1])


def _time_left(timed, share, batch):
    """Return the share of the dense model's time that a smaller one takes, and the miss.

    timed: {"dense": bench.Setting, "small": bench.Setting}; both run in turns, so that what else
        the machine does slows both.
    """
    times = bench.latency(timed, batch=batch, repeats=21).iloc[1]
    left = 1 / times.speedup
    # Times scatter. Within their quartiles, or within 5 %, the target is met.
    miss = abs(left / share - 1)
    is_met = times.speedup_q1 <= 1 / share <= times.speedup_q3 or miss <= 0.05
    return left, 0 if is_met else miss


def _count_left(model, small, what, share):
    """Return the share of parameters or bytes that a smaller model has, and the miss."""
    count = cost.bytes_memory if what == "bytes" else cost.params
    left = count(small) / count(model)
    # A count above the target is no hit at all.
    miss = math.inf if left > share else 1 - left / share
    return left, 0 if miss <= 0.005 else miss


def cut(model, plan, batches=(), *, grams=None, compensate=None, tokens=None, weights=None):
    """Make the smaller model that a plan describes.

    model: the model of the plan; it stays as it is.
    plan: a Plan of `plan`.
    batches: a list of (x, y) of calibration images.
    grams: {layer: [n+1, n+1]} of model by scores.grams(layers=view.matrices, affine=True), if known
        already.
    compensate: what makes up for units that go, see shrink.remove. None: nothing; "mean": what is
        lost on average; "least squares": the inputs that stay, about their mean.
    tokens, weights: those of scores.grams that grams are taken by.

    Returns the smaller model, and [plan.drop] (or []) for recover.reconstruct.
    Raises ValueError for another compensate or one without batches, and what shrink.remove and
    factor.factorise raise.
    """
    names.check("compensation", compensate, (None, "mean", "least squares"))
    small = model
    drops = []
    if plan.drop:
        known = {}
        if compensate:
            grams = grams or _affine_grams(model, batches, tokens=tokens, weights=weights)
            known["means"] = {name: gram[-1, :-1] for name, gram in grams.items()}
        if compensate == "least squares":
            known["grams"] = _second_moments(grams)
        small = shrink.remove(model, plan.drop, **known)
        drops = [plan.drop]
        # Ranks are fitted to the activations of the model without these units.
        grams = None
    if plan.ranks:
        if not grams and batches:
            grams = _affine_grams(small, batches, plan.ranks, tokens, weights)
        # Without batches and grams ranks are of the plain SVD, not activation-weighted.
        moments = grams and _second_moments(grams)
        small = factor.factorise(small, plan.ranks, grams=moments)
    return small, drops


def _affine_grams(model, batches, layers=None, tokens=None, weights=None):
    """Return scores.grams [n+1, n+1], mean inputs last; layers None: all to factor."""
    layers = list(layers or models.view(model).matrices)
    how = {"affine": True, "tokens": tokens, "weights": weights}
    return scores.grams(model, batches, layers=layers, **how)


def _second_moments(grams):
    """Return the grams [n, n] inside affine ones."""
    return {name: gram[:-1, :-1] for name, gram in grams.items()}
