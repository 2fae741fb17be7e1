"""Accuracy at equal MACs, beside every peer: the two committed CIFAR-10 models, cut and fine-tuned by one recipe.

    python benchmarks/accuracy.py [--models vit] [--budgets 0.5] [--seeds 0 1 2] [--tools "vitlab*"] [--epochs 0]
    python benchmarks/accuracy.py --speed --threads 1
    python benchmarks/accuracy.py --table

The first takes many hours (`--epochs 0`, the cuts alone, one or two): it is in `python benchmarks` only by `--only
accuracy`. Rows go one by one into accuracy.csv, and what is there is not done again, so that it can be stopped at any
time and several processes, of other models or tools each, may share the work. A row is a tool's model of one budget and
seed, in a stage: `cut` (as the tool delivers it, without training), `finetuned` (one epoch over all training images, by
one learning rate) or `unreachable` (its floor as macs). The seed draws 2,048 calibration images, random choices, and
the order and augmentation of fine-tuning; dense model and split stay. The first seed is fine-tuned by RATES upward,
until val falls, others by that which is best on val there, for each tool and budget: the more a cut has lost, the
higher it is. `--speed` times seed 0's models of a budget together: speed does not depend on fine-tuning. `--table`
writes accuracy.md and the figure. Cut models are kept in data/bench.

Torch-Pruning cuts all it can, with the help of peers.torch_pruning_cut: heads, neurons, width and filters by one ratio;
groups normalised by their mean and magnitude by L2, as is its default; Taylor by the gradient accumulated over the
calibration images. SVD takes the same share of each linear layer, of each convolution of
the stem, too, or of all but the first of these, whichever has the lowest loss on these images and can reach the budget.
Which test images a model has right is kept beside it; a row counts those that only the pool's model of the same stage
has right (`pool_only`), or only this one (`tool_only`), where the pool's were made before.
Ranks and Torch-Pruning's widths are not rounded: an equal share rounded to four meets no budget within 1 %. All of
vitlab's tools but one, and random units, solve for what is left anew (recover.reconstruct, no labels); the peers have
nothing of the sort.
"""

import argparse
import contextlib
import copy
import fnmatch
import functools
import io
import os
import re
import time
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from common import SMALL, answers, folder, model_of
from filelock import FileLock
from peers import torch_pruning, torch_pruning_to
from safetensors.torch import load_file, save_file

from vitlab import files, models
from vitlab.evaluation import bench, cost, evaluate
from vitlab.models import checkpoint
from vitlab.pruning import budget, factor
from vitlab.pruning.ranks import uniform
from vitlab.report import plots, tables
from vitlab.studies import runs
from vitlab.training import data, train

MODELS = {Path(path).name: name for name, path in SMALL.items()}
BUDGETS, SEEDS = (0.75, 0.5, 0.25), (0, 1, 2)
KINDS = ("heads", "neurons", "filters", "width")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ABOUT = ["tool", "model", "budget"]
KEY = [*ABOUT, "seed", "stage"]
SPEED = ["speedup", "speedup_q1", "speedup_q3", "latency_ms", "speed_threads", "speed_device"]
COLUMNS = [
    *KEY,
    "top1",
    "macs",
    *SPEED,
    "correct",
    "total",
    "loss",
    "pool_only",
    "tool_only",
    "val_top1",
    "params",
    "seconds",
]
COLUMNS += ["lr", "epochs", "images", "note"]
RECIPE = {
    "batch_size": 64,
    "augment": {"crop": 4, "flip": True},
    "label_smoothing": 0.1,
    "warmup_epochs": 0.1,
}


class Given:
    """What every tool gets of one model and seed; statistics are taken when first asked for."""

    def __init__(self, name, dense, images, seed, count=2048):
        self.name, self.dense, self.images, self.seed, self.count = name, dense, images, seed, count

    @functools.cached_property
    def calibration(self):
        train = self.images.train
        return list(train.subset(min(self.count, len(train)), seed=self.seed).batches(128))

    @functools.cached_property
    def known(self):
        return budget.Calibration(self.dense, self.calibration, kinds=[*KINDS, "ranks"])

    @property
    def grams(self):
        return {name: gram[:-1, :-1] for name, gram in self.known.grams.items()}

    @functools.cached_property
    def gradients(self):
        """Of the mean loss of each batch, summed: what Torch-Pruning's Taylor reads."""
        model = copy.deepcopy(self.dense).eval()
        for x, y in self.calibration:
            torch.nn.functional.cross_entropy(model(x), y).backward()
        return [parameter.grad for parameter in model.parameters()]


# -- tools: (given, share of the MACs) -> (model, note); ValueError "… cannot reach …: … stays …" below their floor


def of_kinds(kinds, given, share, *, solved=True, **options):
    """What is predicted to lose least for its MACs of these kinds, reconstructed or cut alone."""
    known = given.known
    plan = known.plan(macs=share, kinds=kinds, **options)
    if not solved:
        return known.cut(plan, compensate=None)[0], ""
    return known.reconstruct(*known.cut(plan)), ""


def random_units(given, share):
    """As many units of each place as of_kinds takes of all, but random ones: its scores are shuffled there."""
    generator = torch.Generator().manual_seed(given.seed)
    shuffled = {
        key: score[torch.randperm(len(score), generator=generator)]
        for key, score in given.known.candidates["unit_scores"].items()
    }
    return of_kinds(KINDS, given, share, unit_scores=shuffled)


def svd(whitened, given, share):
    """The same share of each layer, as ranks.uniform has it."""
    options = {"grams": given.grams if whitened else None}
    found = uniform(given.dense, given.calibration, macs=share, **options)
    model, linears = (
        factor.factorise(given.dense, found, **options),
        models.view(given.dense).linears(),
    )
    return model, f"convolutions of the stem: {sum(name not in linears for name in found)}"


def peer(criterion, given, share, **options):
    importance = getattr(torch_pruning.importance, f"Group{criterion.title()}Importance")()
    gradients = given.gradients if criterion == "Taylor" else None
    return torch_pruning_to(given.dense, share, importance, gradients=gradients, **options)


CRITERIA = ("magnitude", "Taylor")
TOOLS = {
    "vitlab, pool": functools.partial(of_kinds, [*KINDS, "ranks"]),
    "vitlab, units": functools.partial(of_kinds, KINDS),
    "vitlab, units, cut alone": functools.partial(of_kinds, KINDS, solved=False),
    "vitlab, ranks": functools.partial(of_kinds, ["ranks"]),
    "random units": random_units,
    **{
        f"Torch-Pruning, {word}, {way}": functools.partial(peer, word, ranked=way)
        for word, way in product(CRITERIA, ("global", "isomorphic"))
    },
    "SVD, whitened": functools.partial(svd, True),
    "SVD, plain": functools.partial(svd, False),
    "dense": lambda given, share: (copy.deepcopy(given.dense), "the control: nothing is cut"),
}


# -- rows


def read():
    file = folder("accuracy.csv")
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)


def change(edit):
    """Write what edit makes of the rows there are, while no other process does."""
    with FileLock(folder(".accuracy.lock")):
        files.write_atomic(
            folder("accuracy.csv"), edit(read()).convert_dtypes().to_csv(index=False)
        )


def those(table, **key):
    """Which rows are of this key."""
    return functools.reduce(
        lambda a, b: a & b, (table[name] == value for name, value in key.items())
    )


def keep(key, **row):
    """Put a row in the place of the one of its key, with the speed that other stages and seeds know of its model."""
    source = runs.provenance()
    row = key | row | source
    about = {name: key[name] for name in ABOUT}

    def edit(table):
        known = table[those(table, **about)][SPEED].dropna().head(1).to_dict("records")
        same = [*KEY, "lr"] if "lr" in row else KEY
        others = table[~those(table, **{name: row[name] for name in same})].to_dict("records")
        return pd.DataFrame([*others, row | dict(*known)], columns=[*COLUMNS, *source])

    change(edit)
    told = f"{row['top1']:.2f} %" if "top1" in row else row["note"]
    files.log(
        f"{row['model']}, {row['budget']:g} x MACs, seed {row['seed']}, {row['tool']}: {row['stage']}, {told}"
    )


def measured(model, images, key, name):
    """Columns of a model, whose right test images are kept under a name beside its cut."""
    right, loss = answers(model, images.test)
    kept = cut_folder(key)
    kept.mkdir(parents=True, exist_ok=True)
    save_file({"right": right}, kept / f"{name}.right.safetensors")
    shown = {"top1": 100 * right.double().mean().item(), "correct": int(right.sum())}
    shown |= {"total": len(right), "loss": loss} | beside_the_pool(key, name, right)
    counts = {"macs": cost.macs(model), "params": cost.params(model)}
    return shown | {"val_top1": evaluate.accuracy(model, images.val).top1} | counts


def beside_the_pool(key, name, right):
    """Count the images that one of the two alone has right, a model and the pool's of the same stage; {} without it."""
    pool = key | {"tool": POOL}
    if name != "cut":
        tuned = tables.best_rates(read())
        rates = tuned[those(tuned, **pool, stage="finetuned")].lr
        name = stage_of(rates.iloc[0]) if len(rates) else name
    file = cut_folder(pool) / f"{name}.right.safetensors"
    if key["tool"] == POOL or not file.exists():
        return {}
    pools = load_file(file)["right"]
    return {"pool_only": int((pools & ~right).sum()), "tool_only": int((right & ~pools).sum())}


def cut_folder(key):
    own = f"accuracy-{folder().resolve().name}"  # of rows elsewhere other models
    parts = [own, key["model"], f"{key['budget']:g}", f"seed{key['seed']}", key["tool"]]
    return files.root().joinpath("bench", *(re.sub(r"[^\w.]+", "-", part) for part in parts))


def measure(given, share, tool, *, rates=None, epochs=1, images=None):
    """Cut by this tool, and fine-tune for so many epochs of all (or so many) images, as far as rows are missing.

    rates: learning rates; None for the best of an earlier seed where that is found, else RATES upward until val falls.
    Raises ValueError for rows that were made by another recipe, or whose model, cut anew, is another one now.
    """
    key = {"tool": tool, "model": given.name, "budget": share, "seed": given.seed}
    kept, table = cut_folder(key), read()
    there, recipe = table[those(table, **key)], {"epochs": epochs, "images": images}
    tuned = there[there.stage == "finetuned"]
    if epochs and tuned[list(recipe)].fillna(0).ne([each or 0 for each in recipe.values()]).any(
        axis=None
    ):
        raise ValueError(
            f"{key} is there by another recipe than {recipe}: give --again or another --out"
        )
    earlier = table[those(table, **{name: key[name] for name in ABOUT}) & (table.seed < given.seed)]
    if not rates and not next_rate(earlier):
        rates = tables.best_rates(earlier).lr.dropna().unique()

    def missing():
        tuned = (now := read())[those(now, **key, stage="finetuned")]
        left = (
            [lr for lr in rates if lr not in set(tuned.lr)]
            if rates is not None
            else [next_rate(tuned)]
        )
        return left[0] if epochs and left else None

    done = set(there.stage)
    if "unreachable" in done or ("cut" in done and not missing()):
        return
    for lr in tuned.lr:  # of a run that was killed when the row was there
        (kept / f"{stage_of(lr)}.state.pt").unlink(missing_ok=True)
    if "cut" not in done or not (kept / checkpoint.RECORD).exists():
        begun = time.perf_counter()
        try:
            model, note = TOOLS[tool](given, share)
        except ValueError as error:
            if "cut" in done or not (
                floor := re.search(r"cannot reach .*: ([\d.]+) stays", str(error))
            ):
                raise
            floor = round(float(floor[1]) * cost.macs(given.dense))
            return keep(key | {"stage": "unreachable"}, macs=floor, note=str(error))
        seconds, found = time.perf_counter() - begun, measured(model, given.images, key, "cut")
        for before in there[["macs", "params"]].dropna().to_dict("records"):
            if before != {name: found[name] for name in before}:
                raise ValueError(
                    f"{key} has {before} in its rows, and is cut otherwise now: give --again"
                )
        checkpoint.save(model, kept)
        keep(key | {"stage": "cut"}, **found, note=note, seconds=seconds)
    while lr := missing():
        model, own = checkpoint.load(kept), recipe | {"lr": lr}
        settings = RECIPE | own | {"seed": given.seed, "keep_best": False}
        options = {"folder": kept, "stage": stage_of(lr)}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                history = train.fit(
                    model, given.images.train, given.images.val, settings, **options
                )
        except FloatingPointError as error:  # such a rate is the worst of all
            keep(key | {"stage": "finetuned"}, val_top1=0.0, note=str(error), **own)
            continue
        spent = {"seconds": history.seconds.sum()} | own
        keep(
            key | {"stage": "finetuned"},
            **measured(model, given.images, key, stage_of(lr)),
            **spent,
        )
        (kept / f"{stage_of(lr)}.state.pt").unlink()


def stage_of(lr):
    return f"finetuned-{lr:g}"


def next_rate(rows):
    """Which of RATES the first seed of these rows is to try next: upward until val falls, None then."""
    tuned, best = rows[rows.stage == "finetuned"], -1.0
    val = tuned[tuned.seed == tuned.seed.min()].set_index("lr").val_top1
    for lr in RATES:
        if lr not in val:
            return lr
        if val[lr] <= best:
            return None
        best = val[lr]
    return None


def measure_all(given_of, budgets, seeds, tools, **options):
    """All rows, the first seed first. given_of: {model: function of the seed that makes its Given}."""
    for seed, make in product(seeds, given_of.values()):
        given = make(seed)
        if "dense" in tools:
            measure(given, 1.0, "dense", **options)
        for share, tool in product(budgets, [tool for tool in tools if tool != "dense"]):
            measure(given, share, tool, **options)


# -- speed


def speed(given, budgets, *, batch=64, rounds=30):
    """Times as fast as dense of each budget's models, interleaved, as columns of their rows."""
    for share in budgets:
        table, made = read(), {"dense": given.dense}
        own = table[those(table, model=given.name, budget=share, stage="cut")]
        for tool in [tool for tool in TOOLS if tool in set(own.tool)]:
            kept = cut_folder(
                {"tool": tool, "model": given.name, "budget": share, "seed": given.seed}
            )
            is_kept = (kept / checkpoint.RECORD).exists()
            made[tool] = checkpoint.load(kept) if is_kept else TOOLS[tool](given, share)[0].eval()
        times = bench.latency(made, batch=batch, repeats=rounds, seconds=600).set_index("model")
        times["speed_threads"] = times.threads
        times["speed_device"] = runs.provenance()["device"]

        def edit(table, times=times, share=share):
            table = table.astype({"speed_device": object})  # of numbers while nothing is timed
            for tool in times.index:
                about = {
                    "model": given.name,
                    "budget": 1.0 if tool == "dense" else share,
                    "tool": tool,
                }
                table.loc[those(table, **about), SPEED] = times.loc[tool, SPEED].to_list()
            return table

        change(edit)
        files.log(
            f"{given.name}, {share:g} x MACs: {len(made)} models timed in {times.rounds.iloc[0]} rounds"
        )


# -- table and figure


def mean_and_range(values, form="{:.1f}"):
    low, middle, high = (form.format(each) for each in (values.min(), values.mean(), values.max()))
    return middle if low == high else f"{middle} ({low} to {high})"


def difference(rows):
    """Points of top-1 between the pool and a tool, mean of seeds, with half of its 95 % interval over the test images.

    Seeds share the test images, so that their mean is taken to vary as much as one of them does.
    """
    more, fewer = rows.pool_only / rows.total, rows.tool_only / rows.total
    points = more - fewer
    half = 1.96 * ((more + fewer - points**2) / rows.total) ** 0.5
    return f"{100 * points.mean():+.2f} ± {100 * half.mean():.2f}"


def summary(table, model, share):
    """One line a tool: MACs, top-1, its differences to vitlab's pool, paired by seed, learning rate, and speed-up."""
    every, table = table, tables.best_rates(table)
    own, lines = table[those(table, model=model, budget=share)], []
    dense = table[those(table, model=model, tool="dense")].macs.max()
    for tool in [tool for tool in TOOLS if tool in set(own.tool)]:
        mine = own[own.tool == tool]
        below, reached = (mine[mine.stage == "unreachable"], mine[mine.stage != "unreachable"])
        shares = [f"{reached.macs.mean() / dense:.3f}"] if len(reached) else []
        shares += [f"not below {below.macs.mean() / dense:.3f}"] if len(below) else []
        line = {"tool": tool, "MACs": ", ".join(shares)}
        for stage, word in STAGES.items():
            both = own[own.stage == stage].pivot(index="seed", columns="tool", values="top1")
            if tool in both:
                line[word] = mean_and_range(both[tool])
            if tool != POOL and {tool, POOL} <= set(both):
                counted = mine[(mine.stage == stage) & mine.pool_only.notna()]
                pairs = (both[POOL] - both[tool]).dropna()
                line[f"pool − tool, {word}"] = (
                    difference(counted)
                    if len(counted) and len(counted) == len(pairs)
                    else mean_and_range(pairs, "{:+.2f}")
                    if len(pairs)
                    else ""
                )
        if mine.lr.notna().any():
            is_searched = not next_rate(every[those(every, model=model, budget=share, tool=tool)])
            line["learning rate"] = f"{mine.lr.max():g}" + ("" if is_searched else " \\*")
        if mine.speedup.notna().any():
            timed = mine.dropna(subset=["speedup"]).iloc[0]
            line["times as fast"] = (
                f"{timed.speedup:.2f} ({timed.speedup_q1:.2f} to {timed.speedup_q3:.2f})"
            )
        counts = [
            mine[mine.stage == stage].seed.nunique() for stage in STAGES if stage in set(mine.stage)
        ]
        lines.append(
            line | {"seeds": " / ".join(map(str, dict.fromkeys(counts or [mine.seed.nunique()])))}
        )
    words = [
        *STAGES.values(),
        *(f"pool − tool, {word}" for word in STAGES.values()),
        "learning rate",
        "times as fast",
    ]
    words += ["seeds"]
    return (
        pd.DataFrame(lines, columns=["tool", "MACs", *words])
        .dropna(axis="columns", how="all")
        .fillna("")
    )


POOL = "vitlab, pool"
STAGES = {"cut": "cut", "finetuned": "fine-tuned"}


def table_and_figure():
    """accuracy.md and the figure, from the rows there are."""
    table, text = read(), []
    controls = tables.best_rates(table[table.tool == "dense"])
    for model, share in product(
        dict.fromkeys(table.model), sorted(set(table.budget) - {1.0}, reverse=True)
    ):
        control = controls[controls.model == model].set_index("stage").top1
        dense = [
            f"{words} {mean_and_range(control[[stage]])}"
            for stage, words in CONTROL.items()
            if stage in control
        ]
        text.append(f"**{model}, {share:g} × MACs.** Test top-1 (%); {', '.join(dense)}.\n")
        text.append(
            summary(table, model, share).to_markdown(index=False, disable_numparse=True) + "\n"
        )
    seeds, threads = (
        sorted(table[name].dropna().astype(int).unique()) for name in ("seed", "speed_threads")
    )
    tests = table.total.dropna().astype(int).max()
    text.append(
        f"Mean (lowest to highest) of seeds {', '.join(map(str, seeds))}, which draw calibration images, random "
        "choices and the order of fine-tuning, all of one dense model and split. Differences are paired by seed and, "
        "where ± stands, by image: ± is half of a 95 % interval over the test images, of one seed; without it, seeds' "
        "range. The "
        f"learning rate is, for each tool and budget, that of {', '.join(f'{lr:g}' for lr in RATES)} which is best on "
        "val at the first seed, tried upward until val falls (\\*: not yet). At "
        f"84 % {tests:,} test images leave a standard error of {100 * (0.84 * 0.16 / tests) ** 0.5:.1f} points. All "
        "rows of vitlab but *cut alone*, and random units (as many of each place as *vitlab, units* takes), are "
        "reconstructed without labels, which the peers do not offer. Times as fast as dense: median (quartiles), "
        f"batches of 64, threads: {', '.join(map(str, threads)) or 'not timed yet'}"
        f"{''.join(f'; {name}' for name in sorted(table.speed_device.dropna().unique()))}.\n"
    )
    files.write_atomic(folder("accuracy.md"), "\n".join(text))
    said = tables.caption(table.assign(study="benchmark", data="CIFAR-10 (JPEG)", split_seed=0))
    said += " Torch-Pruning by the setting that is best on test at that budget, of those with the most seeds there; "
    said += "bars from the lowest to the highest seed."
    if (table.tool == "dense").any():
        plots.save(plots.peers(tables.peers(table)), folder("accuracy"), caption=said)


CONTROL = {"cut": "dense", "finetuned": "dense, fine-tuned as much"}


# -- the commands


def given_of(names):
    images = data.load("cifar10", image_size=32)
    return {
        name: functools.partial(Given, MODELS[name], model_of(MODELS[name]), images)
        for name in names
    }


def accuracy(rounds):
    """All of it with its defaults, in hours: rows, speed, table, figure."""
    found = given_of(MODELS)
    measure_all(found, BUDGETS, SEEDS, list(TOOLS))
    for make in found.values():
        speed(make(0), BUDGETS, rounds=4 * rounds)
    table_and_figure()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=BUDGETS, help="shares of the MACs (%(default)s)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="(%(default)s)")
    parser.add_argument(
        "--tools", nargs="+", default=["*"], metavar="PATTERN", help=" | ".join(TOOLS)
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        help="of fine-tuning, at every seed (RATES upward, at later seeds the best)",
    )
    parser.add_argument(
        "--epochs", type=int, default=1, help="of fine-tuning; 0: the cuts alone (%(default)s)"
    )
    parser.add_argument("--images", type=int, help="for fine-tuning, for a trial (all)")
    parser.add_argument(
        "--again",
        action="store_true",
        help="drop the rows of these models, budgets, seeds and tools first (--epochs 0: of their cuts)",
    )
    parser.add_argument(
        "--speed", action="store_true", help="time the cut models of seed 0 instead"
    )
    parser.add_argument("--table", action="store_true", help="write table and figure instead")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)"
    )
    parser.add_argument("--out", help="folder for rows, table and figure (figures/bench)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["VITLAB_HEADLESS"] = "1"  # no bars
    os.environ["BENCH_OUT"] = options.out or ""
    tools = [
        tool for tool in TOOLS if any(fnmatch.fnmatch(tool, pattern) for pattern in options.tools)
    ]
    if not tools:
        parser.error(
            f"no tool is called {' or '.join(options.tools)}; there are: {' | '.join(TOOLS)}"
        )
    if options.speed:
        for make in given_of(options.models).values():
            speed(make(0), options.budgets, rounds=options.rounds)
    if options.table:
        table_and_figure()
    if not (options.speed or options.table):
        how = {"rates": options.lr, "epochs": options.epochs, "images": options.images}
        if options.again:
            names = [MODELS[name] for name in options.models]
            gone = {
                "model": names,
                "budget": [*options.budgets, 1.0],
                "seed": options.seeds,
                "tool": tools,
            }
            if options.epochs == 0:
                gone["stage"] = ["cut", "unreachable"]
            change(lambda table: table[~table[list(gone)].isin(gone).all(axis=1)])
        measure_all(given_of(options.models), options.budgets, options.seeds, tools, **how)


CASES = {"accuracy": accuracy}

if __name__ == "__main__":
    main()
