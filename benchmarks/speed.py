"""What a cut brings in time: at 224 px in several runtimes, by the multiple that sizes are kept to, by rank."""

import copy

import pandas as pd
import torch
from common import LARGE, SMALL, folder, images_of, model_of, publish

from vitlab import models
from vitlab.evaluation import bench, roofline
from vitlab.pruning import budget, factor, lowrank, masks, prune, scores, shrink
from vitlab.report import plots
from vitlab.studies import runs

ON_GPU = torch.cuda.is_available()  # for `cuts`; the other cases run on the CPU
WAYS = [("eager", "float32"), ("compiled", "float32"), ("eager", "bf16"), ("compiled", "bf16")]
WAYS += [] if ON_GPU else [("onnxruntime", "float32")]  # which runs on CPUs here
BATCHES = [1, 8, 64, 256] if ON_GPU else [1, 8, 64]
COLUMNS = [
    "case",
    "model",
    "runtime",
    "precision",
    "batch",
    "speedup_q1",
    "speedup",
    "speedup_q3",
    "promised",
]
COLUMNS += ["achieved", "achieved_here", "bound", "reached", "memory_mb", "note"]


def cut_in_half(model, multiple=8):
    """Half the MACs by heads and neurons in one pool, by random scores: which ones go does not matter to time."""
    units = scores.units(model, criteria=["random"], kinds=["heads", "neurons"])["random"]
    return shrink.remove(model, budget.plan(model, units, macs=0.5, multiple=multiple).drop)


def masked_in_half(model):
    weights = {
        f"{name}.weight": layer.weight for name, layer in models.view(model).linears().items()
    }
    model = copy.deepcopy(model)
    prune.apply(
        model,
        masks.keep_largest({name: w.detach().abs() for name, w in weights.items()}, sparsity=0.5),
    )
    return model


def factored_in_half(model, share=0.5):
    """Every linear layer as two thin ones of half its MACs."""
    sizes = {name: layer.weight.shape for name, layer in models.view(model).linears().items()}
    return factor.factorise(
        model, {name: lowrank.rank_for(m, n, share) for name, (m, n) in sizes.items()}
    )


def cuts(rounds):
    """Dense, masked, removed and factored at half, eager and compiled, in float32 and bf16, and exported, in batches of
    1, 8 and 64 (256 on a GPU), with the peak memory of the eager ones.

    torch.compile works twice on each, for one image and for any number of them: most of the time that this takes.
    """
    tables = []
    for case in LARGE:
        dense = model_of(case).to("cuda" if ON_GPU else "cpu")
        made = {"dense": dense, "masked": masked_in_half(dense), "removed": cut_in_half(dense)}
        made["factored"] = factored_in_half(dense)
        settings = {
            f"{name} {' '.join(way)}": bench.Setting(m, *way)
            for name, m in made.items()
            for way in WAYS
        }
        table = bench.latency(
            settings, batch=BATCHES, repeats=4 * rounds, seconds=240
        )  # large batches: fewer
        table = roofline.bounds(settings, table).assign(case=case)
        table["model"] = table.model.str.split().str[0]
        tables.append(table.join(memory(made), on=["model", "runtime", "precision", "batch"]))
        publish("cuts", pd.concat(tables), shown=COLUMNS)
    draw_cuts(pd.concat(tables))


def memory(made):
    """memory_mb of an eager batch of each model, by model, runtime, precision and batch."""
    lines, device = [], "cuda" if ON_GPU else "cpu"
    for precision in bench.PRECISIONS:
        for batch in BATCHES:
            found = bench.memory_mb(made, batch=batch, precision=precision, device=device)
            way = {"runtime": "eager", "precision": precision, "batch": batch}
            lines += [{"model": name, "memory_mb": each} | way for name, each in found.items()]
    return pd.DataFrame(lines).set_index(["model", "runtime", "precision", "batch"]).memory_mb


# What went of each form, in words that have a colour in the figures.
FORMS = {"masked": "weights, masked", "removed": "units, removed"}
FORMS["factored"] = "SVD, equal shares, factored"


def draw_cuts(table):
    table = table.assign(model=table.model.replace(FORMS))
    for case, rows in table[table.batch == 8].groupby("case", sort=False):
        said = f"{case} at 224 px, random weights, half the MACs or half the weights, batches of 8, threads: "
        source = runs.provenance()
        said += f"{rows.threads.iloc[0]}; {source['device']}, commit {source['commit']}, {source['date'][:10]}; "
        said += "python benchmarks --only cuts."
        name = case.lower()
        plots.save(plots.speedups(rows), folder(f"speedup-{name}"), caption=said)


def widths(rounds):
    """Half the MACs with sizes kept to multiples of 1 to 64: does it matter to time?"""
    rows = []
    for case in LARGE:
        dense = model_of(case)
        made = {str(multiple): cut_in_half(dense, multiple) for multiple in (1, 4, 8, 16, 32, 64)}
        for precision in bench.PRECISIONS:
            settings = {
                name: bench.Setting(m, precision=precision)
                for name, m in ({"dense": dense} | made).items()
            }
            table = roofline.bounds(settings, bench.latency(settings, batch=8, repeats=rounds))
            rows.append(table.assign(case=case).rename(columns={"model": "multiple"}))
    shown = ["multiple" if column == "model" else column for column in COLUMNS]
    publish("widths", pd.concat(rows), shown=shown)


def small(rounds):
    """The committed small models with half their MACs removed, in batches of 1, 8 and 64."""
    rows = []
    for case in SMALL:
        dense = model_of(case)
        units = scores.units(
            dense, criteria=["random"], kinds=["heads", "neurons", "filters", "width"]
        )["random"]
        drop = budget.plan(
            dense, units, macs=0.5, kinds=["heads", "neurons", "filters", "width"]
        ).drop
        made = {
            "dense": dense,
            "removed": shrink.remove(dense, drop),
            "factored": factored_in_half(dense),
        }
        rows.append(
            roofline.bounds(made, bench.latency(made, batch=[1, 8, 64], repeats=4 * rounds)).assign(
                case=case
            )
        )
    publish("small", pd.concat(rows), shown=COLUMNS)


def ranks(rounds):
    """Up to which rank a factored layer is faster than the dense one, and what its two products run at."""
    rows = []
    for case, batch in [*dict.fromkeys(LARGE, 8).items(), *dict.fromkeys(SMALL, 64).items()]:
        model = model_of(case)
        table = bench.rank_speed(model, batch=batch, repeats=4 * rounds)
        limits, view = bench.break_even(table), models.view(model)
        for name, own in table.groupby("layer", sort=False):
            role = "stem" if own.kind.iloc[0] == "convolution" else view.role(name)
            half = own.iloc[(own["rank"] - own.break_even / 2).abs().argmin()]
            rows.append(
                {
                    "case": case,
                    "batch": batch,
                    "role": role,
                    "m": half.m,
                    "n": half.n,
                    "positions": half.positions,
                }
                | {"break_even_macs": half.break_even, "break_even_time": limits[name]}
                | {
                    "share": limits[name] / half.break_even,
                    "rank": half["rank"],
                    "promised": half.promised,
                }
                | {
                    "speedup_q1": half.speedup_q1,
                    "speedup": half.speedup,
                    "speedup_q3": half.speedup_q3,
                }
                | {"achieved": half.achieved}
                | intensities(half)
            )
    table = pd.DataFrame(rows).drop_duplicates(["case", "m", "n", "positions", "role"])
    publish("ranks", table)


def intensities(row):
    """MACs per number moved, of the dense layer and of its factors together."""
    m, n, p, r = (int(row[key]) for key in ("m", "n", "positions", "rank"))
    dense = m * n * p / (p * (m + n) + m * n)
    return {
        "macs_per_number": dense,
        "factored": r * (m + n) * p / (p * (m + n + 2 * r) + r * (m + n)),
    }


def factors(rounds):
    """Half the MACs by rank: factored wherever it saves MACs, and only up to the measured break-even."""
    rows = []
    for case, batch in [*dict.fromkeys(LARGE, 8).items(), *dict.fromkeys(SMALL, 64).items()]:
        dense = model_of(case)
        some = [(images_of(dense, 8), torch.zeros(8, dtype=torch.long))]
        known = budget.Calibration(dense, some, kinds=["ranks"])
        most = bench.break_even(bench.rank_speed(dense, batch=batch, repeats=4 * rounds))
        made = {"dense": dense}
        for name, limit in {"by MACs": None, "by measurement": most}.items():
            for macs in (0.75, 0.5):
                try:
                    plan = known.plan(macs=macs, most=limit, narrow=False)
                except ValueError as error:
                    print(f"{case}, {macs} x MACs, {name}: {error}")
                    continue
                made[f"{macs} {name}"] = known.cut(plan)[0]
        made["0.5 every layer"] = factored_in_half(dense)
        rows.append(
            roofline.bounds(made, bench.latency(made, batch=batch, repeats=2 * rounds)).assign(
                case=case
            )
        )
    publish("factors", pd.concat(rows), shown=COLUMNS)


CASES = {each.__name__: each for each in (cuts, widths, small, ranks, factors)}
