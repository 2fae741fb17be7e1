"""Compute the statistics of a study's results: frames in, frames out. No matplotlib, no torch.

Public: AXES, DENSE_STAGES, METHODS, STAGES, TOP1, audit_table, beside_dense, best_rates,
best_under, caption, check_places, checkpoint_words, costs_of, in_short, in_words, is_control, layer_words,
like_for_like, lost_points, marks, method_words, model_name, number, of_seeds, only_cuts, over_seeds, peers, ranges_of,
rounding, save_table, score_words, seeds_of, series, sets_of_seeds, timed_apart.
"""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd

from vitlab import files, names

# -- statistics: frames in, frames out

# Results of one cut have the same values in all of these columns.
_CONDITION_COLUMNS = ("model", "method", "criterion", "form", "target_kind", "target", "stage")
STAGES = {  # in the order in which a model goes through them
    "head": "dense, head alone",
    "dense": "dense",
    "dense+epochs": "dense, same epochs",
    "cut": "after the cut",
    "folded": "mean folded",
    "compensated": "compensated",
    "reconstructed": "reconstructed",
    "relearned": "relearned, no labels",
    "finetuned": "fine-tuned",
    "distilled": "fine-tuned, distilled",
}
DENSE_STAGES = ("head", "dense", "dense+epochs")  # of models without a cut
METHODS = {  # in the words of figures and slides
    "pool": "one pool",
    "pool+ranks": "units, then ranks",
    "ranks": "ranks",
    "units": "units",
    "heads+neurons": "heads and neurons",
    "width": "width",
    "svd": "SVD, equal shares",
    "random": "random units",
    "unstructured": "weights",
    "structured": "rows",
    "heads+svd": "heads, SVD",
    "heads+iht": "heads, IHT",
    "heads+threshold": "heads, SVD, threshold",
    "heads+svd+iht entries": "heads, SVD + IHT on weights",
    "heads+svd+iht columns": "heads, SVD + IHT on columns",
}
TOP1 = "test top-1 (%)"
AXES = {  # costs, as column: (label with unit, factor to that unit)
    "params": ("parameters (M)", 1e-6),
    "nonzero": ("non-zero parameters (M)", 1e-6),
    "macs": ("MACs of one image (M)", 1e-6),
    "macs_ideal": ("MACs of one image if zeros were free (M)", 1e-6),
    "bytes_disk": ("size on disk (MB)", 1e-6),
    "bytes_memory": ("weights in memory (MB)", 1e-6),
    "latency_ms": ("latency of one batch (ms)", 1),
    "memory_mb": ("peak memory (MB)", 1),
}
_LIMITS = (0.75, 0.5, 0.25)  # shares of the dense model's cost
_SLACK = 0.01  # a limit may be exceeded by this share, as budgets are met to within a hundredth


def rounding(value):
    """Return a float of which every format then rounds halves away from zero, as on paper.

    Formats alone round them to even, and means of binary numbers either way. So figures, tables and
    sentences write one number alike.
    """
    return value + math.copysign(1e-9, value)


def number(value, digits=1, sign=""):
    """Write a number with so many digits after the point, and a true minus: 84.05 becomes 84.1.

    sign: "+" writes the sign always, but for zero, which has none.
    """
    text = f"{rounding(value):{sign}z,.{digits}f}".replace("-", "−")
    is_zero = not text.strip("+0.")
    return text.removeprefix("+") if is_zero else text


def is_control(name):
    """Return whether a series is of cuts by chance or by magnitude, the controls for others.

    name: a name as `series` gives it.
    """
    return not {"random", "magnitude"}.isdisjoint(str(name).replace(",", "").split())


def method_words(method):
    """Return a method in the words of figures, such as "rows, random" for "structured, random"."""
    first, *rest = str(method).split(", ")
    return ", ".join([METHODS.get(first, first), *rest])


def score_words(criterion):
    """Return a criterion in the words of figures: names of people begin with a capital."""
    names = {"fisher": "Fisher", "taylor": "Taylor", "michel": "Michel", "snip": "SNIP"}
    names |= {"obd": "OBD", "obs": "OBS"}
    return names.get(criterion, criterion)


def model_name(model):
    """Return a model's name as people write it: ViT and Swin for vit and swin."""
    name = re.sub(r"\bvit\b", "ViT", str(model))
    return re.sub(r"\bswin\b", "Swin", name)


def layer_words(name):
    """Return a layer or block in words, such as "stage 0, block 1, fc1" for layers.0.blocks.1.mlp.fc1."""
    words = re.sub(r"layers\.(\d+)\.?", r"stage \1, ", name)
    words = re.sub(r"blocks\.(\d+)\.?", r"block \1, ", words)
    words = words.replace("patch_embed.steps.", "stem, step ").replace("patch_embed.", "stem, ")
    words = re.sub(r"downsample(\.reduction)?", "merging", words)
    words = re.sub(r"\b(attn|mlp)\.", "", words).removesuffix(", ")
    return re.sub(r"[._]", " ", words)


def checkpoint_words(name):
    """Return what was cut, such as "one pool, 50% left" for budget-pool-0.5.

    name: of a checkpoint, with its stage or form at the end where it is not the usual one.
    Returns the words, or the name where it is not that of a cut.
    """
    found = re.fullmatch(r"(budget-)?(.+)-(\d[.\d]*)(?:-([\w+]+))?", name)
    if not found:
        return name
    budget, method, share, last = found.groups()
    methods = {key.replace("heads+", "heads-").replace(" ", "-"): key for key in METHODS}
    kept_or_cut = f"{float(share):.0%} {'left' if budget else 'cut'}"
    words = [method_words(methods.get(method, method)), kept_or_cut, STAGES.get(last, last)]
    return ", ".join(word for word in words if word)


def series(results):
    """Name the line of each result: its method, with form and criterion where there are several.

    results: a frame with the column method and, optionally, form and criterion.
    Returns a Series of strings, in the words of METHODS.
    """
    names = results.method.map(method_words)
    # A method of one form has nothing to be told apart by.
    for column in ("form", "criterion"):
        if column in results:
            several = results.groupby("method")[column].transform("nunique") > 1
            longer = names + ", " + results[column].fillna("-").astype(str)
            names = names.where(~several, longer)
    return names


def in_words(results, formats, between):
    """Write the values of some columns of each result as one text.

    results: a frame; columns that it lacks and values that are missing are left out.
    formats: {column: format such as "{:.0%}"}.
    between: stands between two values.
    Returns a Series of strings, "" where there is nothing.
    """
    words = pd.Series("", results.index)
    for column, form in formats.items():
        if column in results:
            texts = results[column].map(form.format, na_action="ignore")
            words = words + texts.radd(between).fillna("")
    return words.str.removeprefix(between)


def over_seeds(frame, keys):
    """Average the results with equal keys over their seeds.

    frame: one result for each seed and keys.
    keys: list of columns.
    Returns a frame with the keys, the means of the other numbers and `seeds`, the number of seeds.
    """
    # Where some results of a key lack values that others have, only those with most values count.
    # So all means of one key are over the same seeds.
    values = frame.notna().sum(axis=1)
    most = values.groupby([frame[key] for key in keys], dropna=False).transform("max")
    groups = frame[values == most].groupby(keys, sort=False, dropna=False)
    means = groups.mean(numeric_only=True).drop(columns="seed")
    return means.assign(seeds=groups.seed.nunique()).reset_index()


def beside_dense(results, *columns):
    """Write the value of the dense model beside each result, as a column `dense_<column>`.

    results: a frame with dense results among the others.
    columns: names of numbers; of several dense results of one model and seed the mean is taken.
    Returns results with the new columns.
    """
    dense = results[results.stage == "dense"].groupby(["model", "seed"])[list(columns)].mean()
    return results.join(dense.add_prefix("dense_"), on=["model", "seed"])


def lost_points(results):
    """Return the points of top-1 that each result has lost, against the dense model of its seed.

    results: a frame with dense results among the others.
    Returns a Series; nan where the model and seed have no dense result.
    """
    if "model" not in results:
        results = results.assign(model="")
    both = beside_dense(results, "top1")
    return both.dense_top1 - both.top1


def like_for_like(times):
    """Tell what a cut brings in time apart from what the runtime brings.

    Times compare only within one run, on one processor, so each line stays what it is: nothing is
    averaged over seeds, which may have run on different ones.

    times: as roofline.bounds returns it. Lines of runtimes that could not be had are left out.
    Returns times with the columns
    cut_speedup: times as fast as the dense model in the same runtime, precision and batch
    runtime_speedup: times as fast as the dense model is there as the first way of the table
    """
    times = times[times.speedup.notna()]
    cut_speedup = times.achieved_here * times.promised
    return times.assign(cut_speedup=cut_speedup, runtime_speedup=times.speedup / cut_speedup)


def timed_apart(results):
    """Return the timed results of cuts whose accuracy is that of other cuts to the same target.

    Where budgets were cut anew and not timed again, both have other parameters or MACs.
    """
    keys = ["model", "seed", "method", "form", "target_kind", "target", "stage"]
    costs = ["params", "macs"]
    if not {*keys, *costs, "latency_ms"} <= {*results}:
        return results.head(0)
    cuts = only_cuts(results)
    judged = cuts[cuts.latency_ms.isna()][[*keys, *costs]].drop_duplicates()
    timed = cuts[cuts.latency_ms.notna()].merge(judged[keys].drop_duplicates(), on=keys)
    both = timed.merge(judged, on=[*keys, *costs], how="left", indicator=True)
    return both[both["_merge"] == "left_only"].drop(columns="_merge")


def peers(table):
    """Tell what this package and Torch-Pruning lose at equal MACs, from the rows of a benchmark.

    Of the other tool the best of its settings stands, by test top-1 at each share, of those of the
    most seeds: a choice in its favour.

    table: figures/bench/accuracy.csv.
    Returns a frame of a line per model, name, share and seed with lost, in points of top-1.
    """
    table = best_rates(table)
    dense = table[(table.tool == "dense") & (table.stage == "cut")].groupby("model").top1.mean()
    table = table.assign(lost=table.model.map(dense) - table.top1, share=table.budget)
    is_peer = table.tool.str.startswith("Torch-Pruning")
    parts = {
        "vitlab, nothing trained": (table.tool == "vitlab, pool") & (table.stage == "cut"),
        "Torch-Pruning, fine-tuned": is_peer & (table.stage == "finetuned"),
        "Torch-Pruning, as cut": is_peer & (table.stage == "cut"),
    }
    lines = []
    for name, chosen in parts.items():
        rows = table[chosen]
        keys = ["model", "share", "tool"]
        each = rows.groupby(keys).lost.agg(["count", "mean"]).reset_index()
        each = each.sort_values(["count", "mean"], ascending=[False, True], kind="stable")
        best = each.drop_duplicates(["model", "share"])[keys]
        lines.append(rows.merge(best, on=keys).assign(name=name))
    columns = ["model", "name", "tool", "share", "seed", "top1", "lost"]
    return pd.concat(lines)[columns].reset_index(drop=True)


def best_rates(table):
    """Return rows of a benchmark of which the fine-tuned ones have the best learning rate on val.

    Of each tool, model and budget that rate is chosen at the first seed; of equal ones the lowest.
    """
    about = ["tool", "model", "budget"]
    tuned = table[table.stage == "finetuned"]
    order = {"seed": False, "val_top1": True, "lr": False}
    tuned = tuned.sort_values([*order], ascending=[*order.values()])
    best = tuned.drop_duplicates(about, keep="last").set_index(about).lr
    own = pd.MultiIndex.from_frame(table[about]).map(best.to_dict())
    return table[(table.stage != "finetuned") | (table.lr == own)]


def seeds_of(results):
    """Say in words which seeds results are of.

    results: any frame of a study.
    Returns for example "0, 1, 2", or "0, 1, 2 (some cuts: 0)" where some cuts have fewer, or
    "unknown".
    """
    # A result without seed or without its top1 (a budget out of reach) shows nothing.
    measured = results.dropna(subset=results.columns.intersection(["seed", "top1"]))
    if "seed" not in measured or measured.empty:
        return "unknown"
    # Dense models have all seeds, and would hide that cuts have fewer.
    cuts = only_cuts(measured) if "stage" in measured else measured
    keys = _CONDITION_COLUMNS if "method" in cuts else ["model", "checkpoint"]
    keys = [key for key in keys if key in cuts]
    sets = set(sets_of_seeds(cuts, keys)) if keys else set()
    every = tuple(sorted(set(measured.seed)))
    fewer = sorted(sets - {every})
    if not fewer:
        return _listed(every)
    who = "some cuts" if every in sets else "cuts"
    return f"{_listed(every)} ({who}: {' or '.join(map(_listed, fewer))})"


def only_cuts(results):
    """Return the results of models with a cut."""
    return results[~results.stage.isin(DENSE_STAGES)]


def _listed(numbers):
    return ", ".join(map("{:g}".format, numbers))


def sets_of_seeds(results, keys):
    """Return the seeds of each group of results as a Series of sorted tuples, by keys."""
    groups = results.groupby(keys, sort=False, dropna=False)
    return groups.seed.agg(lambda seeds: tuple(sorted(set(seeds))))


def marks(results, keys):
    """Return an ending for the name of each group, such as ", seed 0"; "" where it has all seeds.

    results: a frame with the column seed.
    keys: columns that tell groups apart.
    Returns a Series by group.
    """
    sets = sets_of_seeds(results, keys)
    # A group with as many seeds as any other has them all.
    missing = sets.map(len) < sets.map(len).max()
    return sets.map(of_seeds).where(missing, "")


def of_seeds(seeds):
    """Return an ending for a name, such as ", seeds 0, 1"."""
    return f", seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}"


def ranges_of(groups, least=None):
    """Return the mean of each group, and how far its lowest and highest number are below and above.

    groups: a grouped Series.
    least: where means and numbers below it are drawn; None: where they are.
    Returns a frame with the columns mean, below and above.
    """
    table = groups.agg(["mean", "min", "max"]).clip(lower=least)
    # The computed mean of three equal numbers may lie an ulp beside them.
    mean = table["mean"].clip(table["min"], table["max"])
    return pd.DataFrame({"mean": mean, "below": mean - table["min"], "above": table["max"] - mean})


def best_under(results, cost):
    """Find the best model at three quarters, half and a quarter of the dense model's cost.

    The best has the highest `val_top1` of those that have one, else the highest test top-1.

    results: results.csv of any models and seeds, the dense ones among them.
    cost: a column, such as macs, params, bytes_disk, or of a single run latency_ms.
    Returns a frame of a line per model and limit:
        model, cost, limit: the limit is a share of the dense model's cost, of the same seed
        method, ..., stage: of the best cut; method is "none" where nothing fits, and the rest is
            missing
        top1, dense: test top-1 in percent of the cut and of the dense model
        share, value: of the cost
        chosen_on, seeds: "val" or "test"; the number of seeds
    Raises ValueError for another column, and for results without a dense model.
    """
    names.check("cost", cost, costs_of(results))
    if not (results.stage == "dense").any():
        raise ValueError("no result of stage dense, so that no cost is known as a share")
    results = beside_dense(results, cost, "top1").dropna(subset=[cost, "top1"])
    results = results.assign(
        share=results[cost] / results[f"dense_{cost}"],
        val=results.get("val_top1", np.nan),
    )
    results = results.rename(columns={cost: "value", "dense_top1": "dense"})
    # One cut is one method, criterion, form, target_kind, target and stage, with means over its
    # seeds.
    keys = [key for key in _CONDITION_COLUMNS if key in results]
    groups = results.groupby(keys, dropna=False, sort=False)
    points = groups[["top1", "dense", "share", "value", "val"]].mean()
    points = points.assign(seeds=groups.seed.nunique()).reset_index()
    # Models without a cut that has this cost are left out.
    points = points[points.model.isin(only_cuts(points).model)]
    best = []
    for (model, cuts), limit in itertools.product(points.groupby("model", sort=False), _LIMITS):
        # Budgets are met to within a hundredth, so a limit may be exceeded by that.
        fitting = cuts[cuts.share <= limit * (1 + _SLACK)]
        best.append({"model": model, "cost": cost, "limit": limit} | _best(fitting))
    columns = [*keys[1:], "top1", "dense", "share", "value", "chosen_on", "seeds"]
    return pd.DataFrame(best, columns=["model", "cost", "limit", *columns])


def costs_of(results):
    """Return the names of the costs that results have."""
    return results.columns.intersection(list(AXES))


def _best(points):
    """Return the best of several points as a dict; its method is "none" where there is no point."""
    # Of the cuts that fit, those of fewer seeds than others stand back.
    points = points[points.seeds == points.seeds.max()]
    # The choice by test top-1 favours the lucky one a little.
    by, chosen_on = ("val", "val") if points.val.notna().any() else ("top1", "test")
    ranked = points.dropna(subset=by).sort_values(by, kind="stable")
    if ranked.empty:
        return {"method": "none"}
    return ranked.iloc[-1].to_dict() | {"chosen_on": chosen_on}


def audit_table(frame, by=("criterion", "kind")):
    """Tell how far predicted rises of the loss can be trusted, for each group of cuts.

    frame: columns predicted and measured (nats), and those of `by`; expected (nats), if it is known.
    by: columns that tell groups apart.
    Returns a frame with the columns of `by` and
    cuts: how many there are;
    spearman: rank correlation of predicted and measured, in [-1, 1]: is the order right?
    ratio: the median of measured / predicted: are they of the right size?
    corrected: the same of measured / expected, where that is known.
    Raises ValueError for a missing column.
    """
    names.known([*by, "predicted", "measured"], frame, "column")
    rises = frame.dropna(subset=["predicted", "measured"])
    if "expected" not in rises:
        rises = rises.assign(expected=np.nan)
    lines = []
    for name, cuts in rises.groupby(list(by), sort=False, dropna=False):
        both = cuts[["predicted", "measured"]]
        # Less than a millinat of both is rounding: its order is chance, and its ratios run to
        # 100,000.
        large = cuts[both.abs().max(axis=1) >= 1e-3]
        # Spearman's correlation is Pearson's of the ranks. Two cuts, or equal ones, have no order.
        ranks = large[both.columns].rank()
        varied = len(large) > 2 and (ranks.nunique() > 1).all()
        spearman = ranks.predicted.corr(ranks.measured) if varied else np.nan
        ratios = [
            (large.measured / large[column].where(large[column] > 0)).median()
            for column in ("predicted", "expected")
        ]
        lines.append((*name, len(cuts), spearman, *ratios))
    return pd.DataFrame(lines, columns=[*by, "cuts", "spearman", "ratio", "corrected"])


def check_places(places, images):
    """Raise ValueError for an empty list of places, and for one that images, a split, lack."""
    if not places or min(places) < 0 or max(places) >= len(images):
        raise ValueError(f"need the places of images in a split of {len(images)}, got {places}")


# -- words and files of tables

_IN_WORDS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "time"}


def in_short(summary):
    """Say what a study found, in lines that a terminal has room for.

    summary: summary.csv, as the report writes it.
    Returns text: a table for each model, and a sentence for each of the pool's cut nearest to half.
    """
    steps = ["cut", "folded", "compensated", "reconstructed"]
    lasts = summary.reindex(columns=steps).ffill(axis="columns").reconstructed
    trained = summary.reindex(columns=["finetuned", "distilled"]).bfill(axis="columns").finetuned
    is_kept = ~summary.target_kind.isin(["sparsity", "ratio"])
    shares = summary.target.map("{:.0%} ".format) + np.where(is_kept, "left", "cut")
    words = summary.method.map(method_words) + ", " + shares
    width = words.str.len().max()
    columns = {
        "cut".ljust(width): words.str.ljust(width),
        "form": summary.form,
        "before": lasts,
        "fine-tuned": trained,
        "MACs (M)": summary.macs / 1e6,
    }
    shown = pd.DataFrame(columns)
    lines, sentences = [], []
    for model, cuts in summary.groupby("model", sort=False):
        table = shown.loc[cuts.index]
        text = table.to_string(index=False, float_format=number, na_rep="")
        title = f"{model}, test top-1 (%): {number(cuts.dense.iloc[0])} dense, and of its cuts"
        lines += [title, text, ""]
        pools = cuts[is_kept[cuts.index] & (cuts.method == "pool")]
        if len(pools):
            row = pools.loc[(pools.target - 0.5).abs().idxmin()]
            share = "half" if row.target == 0.5 else f"{row.target:.0%}"
            sentence = (
                f"{model}: dense {number(row.dense)} %; {share} of the {_IN_WORDS[row.target_kind]}, "
                f"nothing trained: {number(lasts[row.name])} %"
            )
            after = trained[row.name]
            sentences.append(sentence + (f", fine-tuned: {number(after)} %" if after > 0 else ""))
    note = "before: after the last step that trains nothing; blank: not run"
    return "\n".join([*lines, note, *sentences])


# Columns of results.csv that a caption quotes.
_SOURCES = ["study", "data", "model", "split_seed", "device", "threads", "torch", "timm", "commit"]


def caption(results, drawn=None):
    """Say where the results in a figure come from: study, seeds, meters, machine, versions, commit.

    results: results.csv.
    drawn: the results of another table that the figure shows.
    Returns one paragraph.
    """
    words = {"seeds": seeds_of(results if drawn is None else drawn)}
    if drawn is not None:
        # Only results with the models and seeds of the figure count.
        pair = ["model", "seed"]
        shown = pd.MultiIndex.from_frame(drawn[pair])
        results = results[pd.MultiIndex.from_frame(results[pair]).isin(shown)]
    for column, values in results.reindex(columns=_SOURCES).items():
        words[column] = ", ".join(map(str, values.dropna().unique())) or "unknown"
    return (
        "Study {study} on {data}; {model}; seeds {seeds}, split {split_seed}. "
        "MACs by vitlab's closed form; latency as median. {device}, threads: {threads}; "
        "torch {torch}, timm {timm}, commit {commit}, {date:.10}."
    ).format(**words, date=results.date.astype(str).max())


def save_table(frame, path, *, formats=(), kinds=("csv", "md", "tex")):
    """Write a frame as path + ".csv" (as it is) and, formatted for people, ".md" and ".tex".

    frame: what is missing in it is left empty. A frame without results is not written.
    path: without ending.
    formats: {column: format such as "{:.1f}"}; other numbers have at most three digits after the
        point.
    kinds: the endings to write.
    Raises ValueError for an unknown column.
    """
    formats = dict(formats)
    names.known(formats, frame, "column")
    if frame.empty:
        # A study that was run in part has such frames, which must not replace whole ones.
        files.log(f"{Path(path).name}: no results yet, not written")
        return
    # As objects, integers stay integers beside missing values.
    cells = frame.astype(object)
    text = cells.apply(lambda column: column.apply(_cell, form=formats.get(column.name)))
    sides = ["right" if pd.api.types.is_numeric_dtype(kind) else "left" for kind in frame.dtypes]
    letters = "".join(side[0] for side in sides)
    tex = text.style.hide(axis="index")
    tex = tex.format(escape="latex").format_index(escape="latex", axis="columns")
    # Only these kinds are rendered: LaTeX of a long table takes seconds.
    write = {
        "csv": lambda: frame.to_csv(index=False),
        "md": lambda: text.to_markdown(index=False, disable_numparse=True, colalign=sides) + "\n",
        "tex": lambda: tex.to_latex(hrules=True, column_format=letters),
    }
    for kind in kinds:
        files.write_atomic(f"{path}.{kind}", write[kind]())


def _cell(value, form):
    """Return the text of one value of a table, in a format if there is one."""
    if pd.isna(value):
        return ""
    value = rounding(value) if isinstance(value, float) else value
    if form:
        return form.format(value)
    if isinstance(value, float):
        return f"{value:z.3f}".rstrip("0").rstrip(".")  # at most three digits
    return str(value)
