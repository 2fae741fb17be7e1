"""The slides of a study: for each a title, a table, a picture where there is one, and a source. No torch.

A title is a short sentence. Its numbers are those of one line of the table beside it.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import published
from published import SOLVED, TRAINED, Absent, model_name, number, share, signed

from vitlab import files
from vitlab.report import tables

MOST = 8  # lines of a slide's table
WHAT = {"unstructured": "weights", "structured": "rows"}
two_digits = partial(number, digits=2)

# Columns of slides' tables: their header, and how a value is written.
COLUMNS = {
    "arrives": ("arrives", share),
    "back": ("won back, no training", number),
    "before": ("dense (%)", number),
    "after": ("cut (%)", number),
    "change": ("change (points)", signed),
    "cost": ("of the dense", published.COSTS.get),
    "criterion": ("score", str),
    "cut": ("after the cut (%)", number),
    "cuts": ("cuts", "{:.0f}".format),
    "epoch": ("epoch", "{:.0f}".format),
    "epochs": ("epochs", "{:.0f}".format),
    "finetuned": ("fine-tuned (%)", number),
    "ideal": ("promised if zeros were free", number),
    "images": ("images", "{:.0f}".format),
    "increase": ("loss (nats)", partial(signed, digits=3)),
    "kind": ("kind", str),
    "layer": ("layer", str),
    "left": ("won back, fine-tuned", number),
    "limit": ("at most", share),
    "lost": ("points lost", number),
    "macs": ("MACs (M)", published.millions),
    "max": ("most (%)", signed),
    "mean_per_class": ("mean of classes (%)", number),
    "meter": ("meter", str),
    "min": ("least (%)", signed),
    "model": ("model", model_name),
    "name": ("cut", str),
    "params": ("parameters (M)", published.millions),
    "promised": ("promised by the MACs", number),
    "ratio": ("share cut", share),
    "seeds": ("seeds", "{:.0f}".format),
    "series": ("cut", str),
    "share": ("share of dense", share),
    "spearman": ("rank correlation", two_digits),
    "speedup": ("measured (times as fast)", number),
    "spread_finetuned": ("spread, fine-tuned", "{:.3f}".format),
    "spread_pruned": ("spread, pruned", "{:.3f}".format),
    "spread_unpruned": ("spread, unpruned", "{:.3f}".format),
    "stage": ("stage", lambda stage: tables.STAGES.get(stage, stage)),
    "target": ("share cut or kept", share),
    "times": ("measured / predicted", two_digits),
    "top1": ("top-1 (%)", number),
    "train_top1": ("training (%)", number),
    "trained": ("fine-tuned (%)", number),
    "training_mb": ("training memory (MB)", "{:,.0f}".format),
    "untrained": ("untrained (%)", number),
    "untrained_change": ("change (points)", signed),
    "trained_change": ("change, fine-tuned", signed),
    "val_top1": ("val (%)", number),
    "zero_finetuned": ("zeros, fine-tuned", share),
    "zero_pruned": ("zeros, pruned", share),
    "zeros": ("zeros among all parameters", share),
}


@dataclass(frozen=True)
class Slide:
    """Hold one slide.

    title: one sentence. table: a frame of strings.
    picture: path of a .png, perhaps with an .svg beside it. shows: what is on the picture.
    note: how to read the table. source: files, study, seeds, machine, commit.
    """

    title: str
    table: pd.DataFrame
    picture: Path | None = None
    shows: str = ""
    note: str = ""
    source: str = ""


# -- tables


def present(results):
    """Return results as they are. Raises Absent where there are none."""
    if results.empty:
        raise Absent("there are no results for it")
    return results


def columns_of(results, names):
    """Return a slide's table of some columns, as strings; columns without any value are left out.

    results: a frame. names: columns, with spaces between. `seeds` is left out where all lines have as many.
    """
    cells = {}
    for name in names.split():
        if name not in results or results[name].isna().all():
            continue
        if name == "seeds" and results.seeds.nunique() == 1:
            continue
        header, write = COLUMNS[name]
        cells[header] = ["" if pd.isna(value) else write(value) for value in results[name]]
    return pd.DataFrame(cells)


def crossed(results, down, across, value):
    """Return a slide's table of one column's values: a line for each value of `down`, a column for each of `across`."""
    _, write = COLUMNS[value]
    wide = results.pivot_table(index=down, columns=across, values=value, sort=False).head(MOST)
    cells = wide.map(lambda one: "" if pd.isna(one) else write(one))
    return cells.reset_index(names=COLUMNS.get(down, ("", str))[0]).rename_axis(columns=None)


def with_target(names, targets):
    """Return names of cuts with the share cut or kept behind them."""
    behind = targets.map(lambda target: "" if pd.isna(target) else f", {share(target)}")
    return names + behind


def comparable(results):
    """Return the results of the most seeds: means over fewer are not ranked with them; no random controls.

    Where all are random controls, they stay.
    """
    results = results[results.seeds == results.seeds.max()]
    chosen = results[~results.series.map(tables.is_random)]
    return results if chosen.empty else chosen


def summary(study, model, kinds):
    """Return lines of summary.csv of some kinds of target, with names, the best untrained and trained stage, changes.

    Columns besides: series, name, untrained, trained (best of the stages, %), untrained_change and trained_change
    (points against dense), share (MACs of dense), seeds.
    """
    lines = study.read("summary", model)
    lines = lines.reindex(columns=lines.columns.union([*tables.STAGES, "macs"], sort=False))
    lines = present(lines[lines.target_kind.isin(kinds)])
    if "seeds" not in lines:
        lines = lines.assign(seeds=1)
    series = tables.series(lines)
    untrained = lines[["cut", *SOLVED]].max(axis=1)
    trained = lines[TRAINED].max(axis=1)
    return lines.assign(
        series=series,
        name=with_target(series, lines.target),
        untrained=untrained,
        trained=trained,
        untrained_change=untrained - lines.dense,
        trained_change=trained - lines.dense,
        share=lines.macs / lines.model.map(study.dense.macs),
    )


def timed(study, model=None):
    """Return lines of efficiency.csv, means over seeds, with what the MACs promise and how much of it arrives."""
    keys = ["model", "method", "form", "target_kind", "target"]
    lines = published.mean_over_seeds(study.read("efficiency", model), keys)
    dense_macs = lines[lines.method == "dense"].groupby("model").macs.mean()
    dense_macs = lines.model.map(dense_macs)
    lines = lines.assign(promised=dense_macs / lines.macs, ideal=dense_macs / lines.macs_ideal)
    lines = present(lines[(lines.method != "dense") & lines.speedup.notna()])
    series = tables.series(lines)
    arrives = lines.speedup / lines.promised
    return lines.assign(series=series, name=with_target(series, lines.target), arrives=arrives)


def how_timed(study):
    """Say what the times are of."""
    results = study.results[study.results.latency_ms.notna()]
    results = results[results.batch == results.batch.max()]
    threads = " or ".join(published.distinct(results, "threads"))
    precision = published.listed(results, "precision")
    return (
        f"Batches of {results.batch.max():g} images, threads: {threads}; {precision}; "
        "medians of ratios within rounds that time all models in turns."
    )


def best_first(lines, column):
    """Return the MOST best lines by a column, those of the most seeds first."""
    return lines.sort_values(["seeds", column], ascending=False, kind="stable").head(MOST)


# -- one function a slide


def title_slide(study):
    """Show what the study is."""
    dense = [
        f"{model_name(model)} {number(top1)} % top-1" for model, top1 in study.dense.top1.items()
    ]
    facts = {"data": published.listed(study.results, "data"), "dense models": ", ".join(dense)}
    for fact in ("seed", "device", "commit"):
        facts[fact] = published.listed(study.results, fact)
    facts["date"] = max(published.distinct(study.results, "date"))[:10]
    names = " and ".join(map(model_name, study.models or study.dense.index))
    table = pd.DataFrame(facts.items(), columns=["study", study.folder.name])
    return Slide(f"What pruning does to {names} on {facts['data']}", table)


def dense_models(study):
    """Show how good the dense models are."""
    lines = tables.beside_dense(study.read("dense"), "top1")
    change = (lines.top1 - lines.dense_top1).where(lines.stage != "dense")
    lines = published.mean_over_seeds(
        lines.assign(change=change), ["model", "stage", "epochs"]
    ).head(MOST)
    best = lines[lines.stage == "dense"].sort_values("top1").iloc[-1]
    return Slide(
        f"The dense {model_name(best.model)} reaches {number(best.top1)}\u00a0% top-1",
        columns_of(lines, "model stage epochs top1 change mean_per_class params macs seeds"),
        note="“Dense, same epochs” is the control: what as many epochs as the cut models get do to the dense model.",
    )


def sensitivity(study, model):
    """Show which layers the loss depends on."""
    lines = published.mean_over_seeds(study.read("table-curves", model), ["ratio", "layer"])
    lines = lines[lines.ratio == lines.ratio.max()].sort_values("increase", ascending=False)
    worst = lines.iloc[0]
    return Slide(
        f"The {model_name(model)} depends most on {worst.layer}: {signed(worst.increase, 3)} nats",
        columns_of(pd.concat([lines.head(MOST - 1), lines.tail(1)]), "layer ratio increase"),
        study.picture(f"sensitivity-{model}"),
        f"Rise of the loss when one layer alone loses {share(worst.ratio)} of its weights.",
        "The most sensitive layers, and the least sensitive one.",
    )


def agreement(study, model):
    """Show which scores rank units as brute force does."""
    lines = published.mean_over_seeds(study.read("table-agreement", model), ["criterion", "kind"])
    lines = present(lines.dropna(subset="spearman"))
    best = lines.loc[lines.spearman.idxmax()]
    return Slide(
        f"{model_name(model)}: {best.criterion} ranks {best.kind} best, rank correlation {two_digits(best.spearman)}",
        crossed(lines, "kind", "criterion", "spearman"),
        study.picture(f"agreement-{model}"),
        "Rank correlation between score and measured rise of the loss when one unit goes.",
        "Rank correlations are in [−1, 1]; random is what chance gives.",
    )


def criteria(study, model):
    """Show what each score keeps, before any training."""
    keys = ["criterion", "method", "target"]
    lines = published.mean_over_seeds(study.read("table-criteria", model), keys).replace(
        {"method": WHAT}
    )
    lines = lines.assign(name=with_target(lines.method, lines.target))
    most = lines[lines.target == lines.target.max()]
    best = most.loc[most.val_top1.idxmax()]
    return Slide(
        f"{share(best.target)} of the {best.method} cut by {best.criterion}: "
        f"the {model_name(model)} keeps {number(best.val_top1)}\u00a0%",
        crossed(lines, "criterion", "name", "val_top1"),
        note="Top-1 (%) on val right after the cut, masked, by score and share cut.",
    )


def global_pruning(study, model):
    """Show what cuts of weights and rows cost, after fine-tuning."""
    lines = summary(study, model, ["sparsity"])
    lines = present(lines[lines.method.isin(WHAT) & lines.finetuned.notna()])
    change = lines.finetuned - lines.dense
    lines = lines.assign(change=change).tail(MOST)
    most = comparable(lines)
    worst = most[most.target == most.target.max()].sort_values("change").iloc[-1]
    return Slide(
        f"{share(worst.target)} of the {WHAT[worst.method]} cut, fine-tuned: "
        f"{signed(worst.change)} points ({model_name(model)})",
        columns_of(lines, "name cut finetuned change macs seeds"),
        study.picture(f"recovery-{model}"),
        "Test top-1 after the cut and after each step of recovery; lines: the dense model.",
        "Masked models execute all MACs. Change: fine-tuned against dense.",
    )


def training(study, model):
    """Show accuracy over the epochs of fine-tuning."""
    keys = ["method", "target", "epoch"]
    lines = published.mean_over_seeds(study.read("training", model), keys)
    lines = present(lines[lines.method.isin(WHAT)].tail(MOST))
    lines = lines.assign(name=with_target(lines.method, lines.target))
    return Slide(
        f"How the masked {model_name(model)} comes back in {lines.epoch.max():g} epochs of fine-tuning",
        columns_of(lines, "name epoch train_top1 val_top1 training_mb"),
        study.picture(f"training-{model}"),
        "Top-1 on training images over the epochs of fine-tuning.",
    )


def weights(study, model):
    """Show what fine-tuning does to the zeros and to the weights that stay."""
    keys = ["method", "target", "stage"]
    bins = study.read("table-distributions", model)
    bins = bins[bins.role == "all"]
    middle = (bins.left + bins.right) / 2
    bins = bins.assign(square=bins["count"] * middle**2)
    zeros = bins.groupby([*keys, "seed"]).zeros.first().groupby(keys).sum()
    sums = bins.groupby(keys)[["count", "square"]].sum()
    spread = (sums.square / sums["count"]) ** 0.5
    both = pd.DataFrame({"zero": zeros / (zeros + sums["count"]), "spread": spread})
    wide = both.unstack("stage").sort_index(ascending=False).tail(MOST)
    wide.columns = [f"{quantity}_{stage}" for quantity, stage in wide.columns]
    wide = wide.reset_index()
    wide = wide.assign(name=with_target(wide.method, wide.target))
    most = wide.loc[wide.target.idxmax()]
    return Slide(
        f"Fine-tuned, the {model_name(model)} keeps {share(most.zero_finetuned)} zeros ({most['name']})",
        columns_of(
            wide, "name zero_pruned zero_finetuned spread_unpruned spread_pruned spread_finetuned"
        ),
        study.picture(f"weights-{model}"),
        f"Weights of all prunable layers, seed {bins.seed.min():g}; hatched: exact zeros.",
        "Spread: root mean square of the weights that are not zero, over all seeds.",
    )


def heads_svd_iht(study, model):
    """Show what heads, SVD and iterative hard thresholding cost."""
    lines = summary(study, model, ["ratio"])
    lines = present(lines[lines.trained.notna() & (lines.target == lines.target.max())])
    lines = lines.sort_values("seeds", ascending=False, kind="stable").head(MOST)
    candidates = comparable(lines)
    best = candidates.loc[candidates.trained_change.idxmax()]
    return Slide(
        f"{share(best.target)} of heads and layers cut: {best.series} costs the {model_name(model)} least, "
        f"{signed(best.trained_change)} points",
        columns_of(lines, "name cut trained trained_change share seeds"),
        study.picture(f"heads_svd_iht-{model}"),
        "Test top-1 over the share cut of heads and layers.",
        "Share: MACs of the dense model.",
    )


def budget(study, model, kind, target):
    """Show what one budget leaves, without training and with it."""
    lines = summary(study, model, [kind])
    lines = present(lines[lines.target.eq(target)].dropna(subset="untrained"))
    count = len(lines)
    lines = best_first(lines.assign(best=lines[["untrained", "trained"]].max(axis=1)), "best")
    candidates = comparable(lines)
    best = candidates.loc[candidates.untrained.idxmax()]
    return Slide(
        f"{_part(target, kind)}, nothing trained: "
        f"{signed(best.untrained_change)} points ({model_name(model)}, {best.series})",
        columns_of(lines, "series untrained untrained_change trained trained_change seeds"),
        study.picture(f"ladder-{kind}-{target:g}-{model}"),
        "Test top-1 after each step of recovery; hollow: without training.",
        f"The best of {count} by test top-1, which favours the lucky one a little.",
    )


def recovered(study):
    """Show what is won back without training."""
    lines = summary(study, None, [*published.BUDGETS])
    solved = lines[SOLVED].max(axis=1)
    is_cut = lines.cut.notna() & solved.notna() & (lines.target < 1)
    lines = lines.assign(
        lost=lines.dense - lines.cut, back=solved - lines.cut, left=lines.trained - lines.cut
    )
    lines = present(best_first(lines[is_cut & ~lines.series.map(tables.is_random)], "back"))
    best = lines.iloc[0]
    return Slide(
        f"Solved anew, without training: {number(best.back)} of {number(best.lost)} points won back "
        f"({model_name(best.model)}, {best['name']})",
        columns_of(lines, "model name cut lost back left seeds"),
        note="Won back: the best of folding, least squares and reconstruction, "
        "in points above the model after the cut.",
    )


def audit(study, model):
    """Show whether scores foretell the loss."""
    lines = published.mean_over_seeds(study.read("audit-spearman", model), ["criterion", "kind"])
    lines = lines.rename(columns={"ratio": "times"}).dropna(subset="times")
    lines = present(lines[lines.times > 0])
    lines = lines.sort_values("times", key=lambda times: np.log(times).abs(), kind="stable")
    best = lines.iloc[0]
    return Slide(
        f"{model_name(model)}: the loss rises {two_digits(best.times)} times as much as {best.criterion} "
        f"foretells for {best.kind}",
        columns_of(_ends(lines), "criterion kind cuts spearman times"),
        study.picture(f"audit-{model}"),
        "Measured over predicted rise of the loss; on the diagonal the prediction is right.",
        "Medians over the cuts of a seed, before any recovery; the four nearest to 1 and the four furthest.",
    )


def classes(study, model, kind, target):
    """Show which classes a cut forgets."""
    lines = study.read("table-classes", model)
    lines = lines[lines.target_kind.eq(kind) & lines.target.eq(target)].dropna(subset="change")
    lines = present(lines).astype({"class": str})
    method = published.listed(lines, "method")
    lines = published.mean_over_seeds(lines, ["class"]).sort_values("change", kind="stable")
    lines = lines.assign(name=lines["class"].str[:24])
    worst = lines.iloc[0]
    table = columns_of(_ends(lines), "name images before after change")
    return Slide(
        f"{_part(target, kind)}: the {model_name(model)} forgets {worst['name']} most, "
        f"{signed(worst.change)} points",
        table.rename(columns={"cut": "class"}),
        study.picture(f"classes-{kind}-{target:g}-{model}"),
        "Change of top-1 by class; in brackets its test images.",
        f"The most forgotten classes and the least, by {method}.",
    )


def _part(target, kind):
    """Return words such as "Half the MACs", to begin a sentence."""
    words = published.part_of(target, kind)
    return words[0].upper() + words[1:]


def _ends(lines):
    """Return the first and the last of some lines, MOST in all."""
    first = lines.head(MOST // 2)
    rest = lines.iloc[len(first) :]
    return pd.concat([first, rest.tail(MOST // 2)])


def trade_off(study, model, cost):
    """Show the models that no other beats in accuracy and cost."""
    whole = [*tables.DENSE_POINTS]
    results = study.untimed[study.untimed.model == model]
    results = results.assign(series=tables.series(results))
    results = tables.beside_dense(results, "top1", cost)
    change = results.top1 - results.dense_top1
    results = results.assign(change=change, share=results[cost] / results[f"dense_{cost}"])
    results = results[results.stage.isin([*whole, "reconstructed", *TRAINED])]
    results = results[results[cost].notna() & results.top1.notna()]
    keys = ["series", "target", "stage"]
    lines = tables.over_seeds(results[[*keys, "seed", "top1", "change", "share", cost]], keys)
    is_dense = lines.stage.isin(whole)
    # Means over fewer seeds are not ranked with those over all.
    ranked = lines[is_dense | (lines.seeds == lines.seeds[~is_dense].max())]
    front = ranked[tables.pareto(ranked[cost], ranked.top1)].sort_values(cost, kind="stable")
    cuts = present(comparable(front[~front.stage.isin(whole)]))
    # The cheapest cut within a point of dense; where none is, the one that loses least.
    near = cuts[cuts.change >= -1].head(1)
    if near.empty:
        near = cuts.sort_values("change").tail(1)
    best = near.iloc[0]
    others = front.drop(near.index).sort_values("top1", ascending=False).head(MOST - 1)
    front = pd.concat([near, others]).sort_values(cost)
    front = front.assign(name=with_target(front.series, front.target))
    return Slide(
        f"{share(best.share)} of the {published.COSTS[cost]}: {signed(best.change)} points "
        f"({model_name(model)}, {best.series}, {tables.STAGES[best.stage]})",
        columns_of(front, "name stage share top1 change"),
        study.picture(f"tradeoff-{cost}-{model}"),
        f"Test top-1 over {published.COSTS[cost]}; ringed: no other model is better and cheaper.",
        "Behind a cut: the share cut of weights, rows and layers; of budgets the share kept.",
    )


def best_under_a_limit(study, model):
    """Show the best model under each limit of cost, chosen on validation images."""
    lines = study.read("best", model)
    lowest = sorted(set(lines.limit))[:2]
    lines = lines[lines.limit.isin(lowest)].head(MOST)
    lines = lines.assign(
        change=lines.top1 - lines.dense, name=with_target(lines.method, lines.target)
    )
    chosen_on = " and ".join(published.distinct(lines, "chosen_on"))
    return Slide(
        f"The best {model_name(model)} under each limit",
        columns_of(lines, "cost limit name stage change seeds"),
        study.picture(f"tradeoff-params-{model}"),
        "Test top-1 over parameters; ringed: no other model is better and smaller.",
        f"Chosen on {chosen_on} images; behind each the share cut, of budgets the share kept.",
    )


def speed(study, model):
    """Show how much of what the MACs promise arrives."""
    lines = best_first(timed(study, model), "speedup")
    best = comparable(lines).iloc[0]
    return Slide(
        f"The fastest {model_name(model)} is {number(best.speedup)} times as fast as dense ({best['name']}); "
        f"its MACs promise {number(best.promised)}",
        columns_of(lines, "name promised speedup arrives top1 seeds"),
        study.picture(f"tradeoff-relative_latency-{model}"),
        "Test top-1 over measured time of one batch.",
        how_timed(study),
    )


def zeros(study):
    """Show what masked weights do not save."""
    lines = timed(study)
    lines = lines[(lines.form == "masked") & (lines.target_kind == "sparsity")]
    lines = present(best_first(lines.assign(zeros=1 - lines.nonzero / lines.params), "ideal"))
    most = lines.iloc[0]
    return Slide(
        f"{most['name']} masked: {number(most.speedup)} times as fast as dense ({model_name(most.model)})",
        columns_of(lines, "model name zeros ideal speedup top1 seeds"),
        note=f"Masked weights are zeros in dense tensors, multiplied like any number. {how_timed(study)}",
    )


def runtimes(study, model):
    """Show the speed in several runtimes."""
    keys = ["checkpoint", "runtime", "precision", "batch"]
    lines = published.mean_over_seeds(study.read("table-runtimes", model), keys)
    lines = lines[lines.batch == lines.batch.max()]
    lines = lines.assign(
        way=lines.runtime + " " + lines.precision,
        name=lines.checkpoint.str.removeprefix("budget-"),
    )
    best = comparable(lines.assign(series=lines.checkpoint)).sort_values("speedup").iloc[-1]
    return Slide(
        f"The fastest {model_name(model)} in any runtime: {best['name']} in {best.way}, {number(best.speedup)} times",
        crossed(lines, "name", "way", "speedup"),
        study.picture(f"speedup-{model}"),
        "Times as fast as dense; thin lines: promised by the MACs.",
        f"Times as fast as the dense model, eager in float32, in batches of {lines.batch.max():g} images.",
    )


def meters(study):
    """Show whether other counters agree with the closed form."""
    lines = study.read("meters")
    columns = [column for column in lines if column.endswith(" / macs")]
    lines = lines.melt(["model"], columns, "meter", "ratio").dropna()
    meter = lines.meter.str.removeprefix("macs_").str.removesuffix(" / macs")
    lines = lines.assign(meter=meter, off=100 * (lines.ratio - 1))
    ends = lines.groupby(["meter", "model"], sort=False).off.agg(["min", "max"]).reset_index()
    return Slide(
        "Other counters of MACs beside the closed form",
        columns_of(present(ends.head(MOST + 1)), "meter model min max"),
        note="Difference to vitlab’s closed form over all models timed. torchprofile counts norms, too; "
        "thop leaves out the two matrix products of attention.",
    )


def method(study):
    """Show how the numbers came about."""
    results = study.results
    splits = study.read("table-data").drop_duplicates("split").set_index("split").images
    top1 = study.dense.top1.max() / 100
    error = two_digits(100 * (top1 * (1 - top1) / splits["test"]) ** 0.5)
    images = [f"{splits.get(split, 0):,}" for split in ("train", "val", "test")]
    facts = {
        "images (train, val, test)": ", ".join(images),
        f"standard error of {number(100 * top1)} % top-1": f"{error} points",
        "seeds": f"{tables.seeds_of(results)}; split {published.listed(results, 'split_seed')}",
        "MACs": "multiply-accumulates of one image, closed form; FLOPs = 2 × MACs; masked models execute all",
        "time": how_timed(study) if results.latency_ms.notna().any() else "not measured",
        "choice": "scores from training images, the best epoch by val; top-1 is on test where nothing else stands",
        "software": f"torch {published.listed(results, 'torch')}, timm {published.listed(results, 'timm')}",
        "commit": published.listed(results.sort_values("date"), "commit"),
    }
    table = pd.DataFrame(facts.items(), columns=["method", study.folder.name])
    return Slide(
        f"{splits['test']:,} test images: a top-1 has a standard error of {error} points", table
    )


# -- all slides

# The slides of a deck in their order: the function, what it is made for, and the files that it reads.
ORDER = [
    (title_slide, "study", "results.csv"),
    (dense_models, "study", "dense.csv"),
    (sensitivity, "model", "table-curves.csv"),
    (agreement, "model", "table-agreement.csv"),
    (criteria, "model", "table-criteria.csv"),
    (global_pruning, "model", "summary.csv"),
    (training, "model", "training.csv"),
    (weights, "model", "table-distributions.csv"),
    (heads_svd_iht, "model", "summary.csv"),
    (budget, "budget", "summary.csv"),
    (recovered, "study", "summary.csv"),
    (audit, "model", "audit-spearman.csv"),
    (classes, "budget", "table-classes.csv"),
    (trade_off, "macs", "results.csv"),
    (trade_off, "bytes_disk", "results.csv"),
    (best_under_a_limit, "model", "best.csv"),
    (speed, "model", "efficiency.csv"),
    (zeros, "study", "efficiency.csv"),
    (runtimes, "model", "table-runtimes.csv"),
    (meters, "study", "meters.csv"),
    (method, "study", "results.csv"),
]


def plan(study):
    """Return (function, its arguments after the study, file) of each slide, in their order."""
    arguments = {
        "study": [()],
        "model": [(model,) for model in study.models],
        "budget": study.budgets(),
        "macs": [(model, "macs") for model in study.models],
        "bytes_disk": [(model, "bytes_disk") for model in study.models],
    }
    return [(make, each, file) for make, subject, file in ORDER for each in arguments[subject]]


def slides(folder):
    """Return the slides of a folder of tables and pictures.

    A slide for which something is missing is left out, and a line printed that says what.
    Raises FileNotFoundError where results.csv is missing.
    """
    study = published.Published(folder)
    made = []
    for make, arguments, file in plan(study):
        try:
            slide = make(study, *arguments)
        except Absent as reason:
            files.log(f"no slide {' '.join(map(str, (make.__name__, *arguments)))}: {reason}")
            continue
        made.append(replace(slide, source=source_of(study, slide, file, *arguments[:1])))
    return made


def source_of(study, slide, file, model=None):
    """Return the line that says where a slide comes from."""
    results = study.results
    table = study.read(file.removesuffix(".csv"))
    if model is not None:
        results = results[results.model == model]
        table = table[table.model == model]
    files = [file] if slide.picture is None else [file, slide.picture.name]
    return study.source(files, results, tables=[table])
