"""The slides of a study: for each a title, pictures of all models, a table for the notes, and a source. No torch.

A title is a sentence, the conclusion of its slide. Its numbers are those of the table. The line of terms
below a picture says what its words mean, and the note is what to say aloud.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pages
import pandas as pd
import published
from PIL import Image
from published import SOLVED, TRAINED, Absent, model_name, number, share, signed

from vitlab import files
from vitlab.report import drawings, plots, tables

LINES = 11  # of a table on one slide
HALF = (6.25, 5.0)  # inches of each of two pictures on a slide
WHOLE = (12.63, 5.2)  # inches of one picture
PIXELS = 200  # of a picture to an inch, as plots.save writes it
WEIGHTS = {"unstructured": "weights", "structured": "rows"}
two_digits = partial(number, digits=2)

BACKBONE = "DINOv2's ViT-S/14"  # of bench/foundation.csv
SOURCES = {  # of what stands in bench/foundation.csv, by the first words of a method
    "dense": "Oquab et al. 2023, arXiv 2304.07193",
    "vitlab": "this repository",
    "CORP": "Zhang and Yang 2026, arXiv 2602.05243",
    "LAMP": "Lee et al. 2021, arXiv 2010.07611",
    "SNIP": "Lee et al. 2019, arXiv 1810.02340",
    "SVD, plain": "Eckart and Young 1936",
    "SVD, whitened": "Wang et al. 2024 (SVD-LLM), arXiv 2403.07378",
    "SnapViT": "Simoncini et al. 2025, arXiv 2510.17700",
    "Torch-Pruning": "Fang et al. 2023, arXiv 2301.12900",
    "linear maps": "Cannistraci et al. 2024, arXiv 2410.04941",
}

# Columns of slides' tables: their header, and how a value is written.
COLUMNS = {
    "after": ("after the cut (%)", number),
    "batch": ("images in a batch", "{:.0f}".format),
    "behind": ("behind one pool (points)", number),
    "block": ("block", tables.layer_words),
    "change": ("change (points)", signed),
    "criterion": ("score", tables.score_words),
    "cut": ("right after the cut (%)", number),
    "epochs": ("epochs", "{:.0f}".format),
    "increase": ("loss (nats)", partial(signed, digits=3)),
    "kept": ("kept", share),
    "kind": ("what", str),
    "layer": ("layer", tables.layer_words),
    "least": ("least (times as fast)", number),
    "lost": ("change (points)", lambda lost: signed(-lost)),
    "macs": ("MACs (M)", published.millions),
    "mean_per_class": ("mean of classes (%)", number),
    "model": ("model", model_name),
    "most": ("most (times as fast)", number),
    "name": ("cut", str),
    "params": ("parameters (M)", published.millions),
    "promised": ("promised by the MACs", number),
    "ratio": ("share cut", share),
    "reconstructed": ("reconstructed (%)", number),
    "seeds": ("seeds", "{:.0f}".format),
    "share": ("share of MACs", share),
    "stage": ("stage", lambda stage: tables.STAGES.get(stage, stage)),
    "target": ("share cut or kept", share),
    "tool": ("tool", str),
    "top1": ("top-1 (%)", number),
    "trained": ("fine-tuned (%)", number),
    "trained_change": ("fine-tuned (points)", signed),
    "untrained": ("nothing trained (%)", number),
    "untrained_change": ("nothing trained (points)", signed),
    "val_top1": ("val top-1 (%)", number),
    "way": ("runtime", str),
}


@dataclass(frozen=True)
class Slide:
    """Hold one slide: a picture or two, else points of text, else a table.

    title: one sentence. pictures: {words above it: path of a .png, perhaps with an .svg beside it}.
    terms: a line below them that says what words mean. points: sentences.
    table: a frame of strings, in the notes where something else is shown.
    shows: what is on the pictures. note: what to say. source: files, study, seeds, machines, commits.
    """

    title: str
    pictures: dict[str, Path] | None = None
    terms: str = ""
    points: tuple[str, ...] = ()
    table: pd.DataFrame | None = None
    shows: str = ""
    note: str = ""
    source: str = ""


# -- tables


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


def comparable(results):
    """Return the results of the most seeds: means over fewer are not ranked with them; no controls.

    Where all are controls, they stay.
    """
    results = results[results.seeds == results.seeds.max()]
    chosen = results[~results.name.map(tables.is_control)]
    return results if chosen.empty else chosen


def summary(study, kinds):
    """Return lines of summary.csv of some kinds of target, with names, the best untrained and trained stage, changes.

    Columns besides: name, untrained, trained (best of the stages, %), untrained_change and trained_change
    (points against dense), share (MACs of dense), seeds.
    Raises Absent where there are none.
    """
    lines = study.read("summary")
    lines = lines.reindex(columns=lines.columns.union([*tables.STAGES, "macs"], sort=False))
    lines = lines[lines.target_kind.isin(kinds) & lines.model.isin(study.models)]
    if lines.empty:
        raise Absent(f"summary.csv has no target of {' or '.join(kinds)}")
    if "seeds" not in lines:
        lines = lines.assign(seeds=1)
    untrained = lines[["cut", *SOLVED]].max(axis=1)
    trained = lines[TRAINED].max(axis=1)
    return lines.assign(
        name=tables.series(lines),
        untrained=untrained,
        trained=trained,
        untrained_change=untrained - lines.dense,
        trained_change=trained - lines.dense,
        share=lines.macs / lines.model.map(study.dense.macs),
    )


def best_budgets(study):
    """Return the cut that loses least without training, of each model and share of a budget.

    All slides that speak of budgets speak of these, so that none answers a question in its own way.
    Returns a frame as `summary`'s, of targets of a half and below; and the kind of the budget.
    """
    lines = summary(study, [*published.BUDGETS])
    kind = lines.target_kind.iloc[0]
    lines = lines[(lines.target_kind == kind) & (lines.target <= 0.5)].dropna(subset="untrained")
    best = [
        comparable(own).sort_values("untrained", kind="stable").tail(1)
        for _, own in lines.groupby(["model", "target"], sort=False)
    ]
    if not best:
        raise Absent("summary.csv has no budget of a half or less")
    return pd.concat(best).sort_values(["target", "model"], ascending=False), kind


def _pair(lines, write, unit="", named=True):
    """Return what `write` says of each line, as words: "0.0 (ViT) and −0.3 points (Swin)".

    unit: what stands behind the last number. named: whether models are named, else "0.0 and −0.3 points".
    """
    lines = lines.sort_values("model", ascending=False, kind="stable")  # the ViT first
    words = [write(line) for line in lines.itertuples()]
    words[-1] = f"{words[-1]} {unit}".strip()
    if named:
        models = map(pages.family_of, lines.model)
        words = [f"{said} ({model})" for said, model in zip(words, models, strict=True)]
    return " and ".join(words)


def _method_of(lines):
    """Return the name that all lines have, else ""."""
    names = lines.name.unique()
    return names[0] if len(names) == 1 else ""


def _methods_of(lines):
    """Return the name that all lines have, else the names with their models."""
    return _method_of(lines) or _pair(lines, lambda line: line.name)


def _changes(lines, kind):
    """Return words such as "by 0.0 (ViT) and −0.3 points (Swin) at half the MACs", for each share of a budget."""
    parts = []
    for target, own in lines.groupby("target", sort=False):
        first = not parts
        unit = "points" if first else ""
        words = _pair(own, lambda line: signed(line.untrained_change), unit, named=first)
        part = published.part_of(target, kind)
        if not first:  # "a quarter" of the same
            part = part.partition(" of the ")[0]
        parts.append(f"by {words} at {part}")
    return ", ".join(parts)


# -- one function a slide


def claim(study):
    """Say what the study found, in one sentence."""
    models = " and ".join(pages.family_of(model) for model in reversed(study.models))
    dense = study.dense.loc[study.models].reset_index()
    data = published.listed(study.results, "data")
    params, macs = (
        _pair(dense, lambda line, cost=cost: published.millions(getattr(line, cost)), named=False)
        for cost in ("params", "macs")
    )
    points = [
        f"{models} have {params} million parameters, and {macs} million MACs{_size(study)}.",
        f"Trained on {data}{_start(study)}, their test top-1 is "
        f"{_pair(dense, lambda line: number(line.top1), '%')}.",
        "How much of a model can go, how is it best chosen, and is the model then faster?",
    ]
    terms = "MACs are the multiply-accumulates that one image takes, on any machine."
    terms += " JPEG: stored with a small loss, which costs a little accuracy." * ("JPEG" in data)
    try:
        best, kind = best_budgets(study)
    except Absent:
        return Slide(f"What pruning does to {models}", points=tuple(points), terms=terms)
    with contextlib.suppress(Absent):
        points.append(_backbone_point(study))
    best = best[best.target == best.target.max()]
    words = _pair(best, lambda line: signed(line.untrained_change), "points")
    return Slide(
        f"With {published.part_of(best.target.iloc[0], kind)} and nothing trained, top-1 changes by {words}",
        points=tuple(points),
        terms=terms,
        table=columns_of(best, "model name target untrained untrained_change seeds"),
        note="First what can be cut, where it hurts, and how that is foreseen; then global pruning, and heads with SVD "
        "and IHT; then one pool for all of it, its peers, and whether it is faster.",
    )


def _size(study):
    """Return words such as " at 32 px", or "" where no result names the size of the images."""
    sizes = published.distinct(study.results, "image_size")
    return f" at {' and '.join(sizes)} px" if "image_size" in study.results else ""


def _start(study):
    """Return where the training of the dense models began: "" where nothing is known of it."""
    if "weights" not in study.results:
        return ""
    weights = study.results[study.results.model.isin(study.models)].weights.dropna()
    return " from given weights" if len(weights) else " from scratch"


def what_is_cut(study):
    """Show what each cut does to a matrix."""
    model = study.models[-1]
    slide = Slide(
        "Masked weights and rows stay in a matrix as zeros; removed rows, heads, neurons and ranks make it smaller",
        {"": study.picture(f"cuts-{model}")},
        terms="W: matrix of a layer. U × V: its low rank, as many ranks as U has columns. S: weights beside it. "
        "Neuron: hidden value of an MLP.",
        shows=f"What is left of one layer of the {pages.family_of(model)}, weight by weight. "
        "Shares of weights, rows and MACs are of the whole model: one layer may lose more or less.",
        note="Masked weights and rows are zero, and the product with the matrix takes as long as before. What is "
        "removed is gone: the matrix is smaller, or it becomes the product of two thin ones. IHT and "
        "thresholds come with the heads.",
    )
    seed = study.results[study.results.model == model].seed.min()  # as drawn
    return replace(slide, source=source_of(study, slide, "results.csv", seed))


def sensitivity(study):
    """Show which layers the loss depends on."""
    lines = published.mean_over_seeds(study.read("table-curves"), ["model", "ratio", "layer"])
    lines = lines[(lines.ratio == lines.ratio.max()) & lines.model.isin(study.models)]
    lines = lines.sort_values("increase", ascending=False)
    worst = lines.drop_duplicates("model")
    worst = worst.sort_values("model", ascending=False)
    words = " and ".join(
        f"{tables.layer_words(line.layer)} ({pages.family_of(line.model)})"
        for line in worst.itertuples()
    )
    table = lines.groupby("model", sort=False).head(LINES // 2)
    return Slide(
        f"It hurts most to cut {words}",
        study.pictures("sensitivity"),
        terms="qkv makes queries, keys and values; proj mixes the heads; fc1 and fc2 are the MLP. "
        "Nats: unit of the loss. Taylor: mean of |w g|, weight times gradient.",
        table=columns_of(table, "model layer ratio increase"),
        shows=f"Rise of the loss when one layer alone loses {share(worst.ratio.max())} of its weights, "
        "the least by Taylor.",
        note="One layer is cut at a time, and put back. Where few layers hurt, a cut should not take the same share "
        "of each layer.",
    )


def criteria(study):
    """Show what each score keeps, before any training."""
    keys = ["model", "criterion", "method", "target"]
    lines = published.mean_over_seeds(study.read("table-criteria"), keys)
    lines = lines[(lines.method == "unstructured") & lines.model.isin(study.models)]
    if lines.empty:
        raise Absent("table-criteria.csv has no cuts of single weights")
    lines = lines[lines.target == lines.target.max()]
    ranked = lines.sort_values("val_top1", ascending=False)
    best = ranked.drop_duplicates("model")
    controls = lines[lines.criterion == "magnitude"]
    names = best.criterion.map(tables.score_words).unique()
    score = names[0] if len(names) == 1 else "the best score"
    title = (
        f"With {share(lines.target.max())} of the weights zeroed by {score}, top-1 on val is still "
        f"{_pair(best, lambda line: number(line.val_top1), '%')}"
    )
    if len(controls):
        words = _pair(controls, lambda line: number(line.val_top1), "%", named=False)
        title += f"; by magnitude {words}"
    return Slide(
        title,
        study.pictures("criteria"),
        terms="w: weight, g: gradient. Fisher: mean of (w g)². Taylor: mean of |w g|. Gradient: mean of |g|. "
        "Magnitude: |w|.",
        table=columns_of(ranked, "model criterion target val_top1"),
        shows="Top-1 on val, images kept from training, right after the cut: rows and weights.",
        note="A score says how much a weight matters. Fisher and Taylor look at gradients, too, magnitude at the "
        "weights alone, and random is the control. Scores are compared on val, results on test: numbers differ a "
        "little.",
    )


def weights_and_rows(study):
    """Show what cuts of weights and rows cost, after fine-tuning."""
    lines = summary(study, ["sparsity"])
    lines = lines[lines.method.isin(WEIGHTS) & lines.finetuned.notna() & (lines.form == "masked")]
    if lines.empty:
        raise Absent("summary.csv has no fine-tuned cuts of weights and rows")
    lines = lines.assign(name=lines.method.map(WEIGHTS))
    most = lines[lines.target == lines.target.max()].sort_values("model", ascending=False)
    words = []
    for name, own in most.groupby("name", sort=False):
        first = not words
        unit = "points" if first else ""
        change = _pair(own, lambda line: signed(line.trained_change), unit, named=first)
        cut = f"zeroing {share(most.target.max())} of the {name} changes top-1"
        words.append(f"{cut if first else f'of the {name}'} by {change}")
    return Slide(
        f"After fine-tuning, {', '.join(words)}",
        study.pictures("recovery"),
        terms="Fine-tuned: some short epochs of training after the cut. Least squares: what stays takes over, "
        "layer by layer. Grey: controls.",
        table=columns_of(lines, "model name target cut trained trained_change seeds"),
        shows="Points of test top-1 lost; at the right top-1 before and after fine-tuning.",
        note="Weights are ranked by Taylor, rows by Fisher, all layers against each other. Masked models execute all "
        "MACs. Where as many epochs make the dense model worse, too, what a mild cut loses is not the cut's alone.",
    )


def heads_svd_iht(study):
    """Show what heads, SVD and iterative hard thresholding cost."""
    lines = summary(study, ["ratio"])
    lines = lines[lines.trained.notna() & (lines.target == lines.target.max())]
    lines = lines.sort_values(["model", "seeds", "trained"], ascending=False, kind="stable")
    if lines.empty:
        raise Absent("summary.csv has no fine-tuned cuts of heads")
    best = pd.concat([comparable(own).head(1) for _, own in lines.groupby("model", sort=False)])
    words = _pair(best, lambda line: signed(line.trained_change), "points")
    best = best.assign(name=best.name.str.removeprefix("heads, "))
    by = f" ({name})" if (name := _method_of(best)) else ""
    table = lines.groupby("model", sort=False).head(LINES // 2)
    return Slide(
        f"Cutting {share(best.target.max())} of heads and of each layer{by} changes top-1 by {words}, fine-tuned",
        study.pictures("heads_svd_iht"),
        terms="SVD: W ≈ U × V of few ranks. IHT, iterative hard thresholding, chooses weights or columns beside it. "
        "Threshold: small entries to zero.",
        table=columns_of(table, "model name target cut trained trained_change share seeds"),
        shows="Points of test top-1 lost over the share cut of heads and of each layer, fine-tuned.",
        note=f"The title takes the best cut of all seeds, {_methods_of(best)}; some others had one seed. Random heads "
        "and directions are the control. Share of MACs: single weights in a dense matrix save next to none.",
    )


def pool(study):
    """Show how the pool works, and what its reconstruction wins back."""
    lines = summary(study, [*published.BUDGETS])
    kind = lines.target_kind.iloc[0]
    lines = lines[(lines.method == "pool") & (lines.target_kind == kind)]
    if not {"cut", "reconstructed"} <= {*lines}:
        raise Absent("summary.csv has no reconstructed pool")
    lines = lines.dropna(subset=["cut", "reconstructed"])
    lines = comparable(lines[lines.target <= 0.5]) if len(lines) else lines
    lines = lines.sort_values(["target", "model"], ascending=False)
    if lines.empty:
        raise Absent("summary.csv has no reconstructed pool")
    least = lines[lines.target == lines.target.min()]
    before = _pair(least, lambda line: number(line.cut), "%")
    after = _pair(least, lambda line: number(line.reconstructed), "%", named=False)
    part = published.part_of(lines.target.min(), kind)
    return Slide(
        "In one pool the least loss for its MACs goes first, then what stays is solved for anew",
        {"": pages.pool_picture()},
        terms="The rise of the loss is what Fisher predicts, from one pass over training images with or "
        "without labels.",
        table=columns_of(lines, "model name target cut reconstructed seeds"),
        shows="How the pool works; heights are made up. "
        f"At {part} reconstruction brings top-1 from {before} to {after}.",
        note="First, all that may go: units are heads, neurons, filters of the stem and channels between blocks; ranks "
        "are singular directions of matrices. Second, all of them stand in one queue, by the loss that Fisher "
        "predicts for each MAC that is saved, and go until the budget is met. Third, what stays of each layer is "
        "solved for anew, so that it answers as in the dense model.",
    )


def budgets(study):
    """Show what half and a quarter of the cost leave, step by step."""
    best, kind = best_budgets(study)
    lines = summary(study, [kind])
    lines = lines[lines.target <= 0.5].dropna(subset="untrained")
    keys = ["target", "model", "untrained"]
    lines = lines.sort_values(keys, ascending=False, kind="stable")
    name = _method_of(best)
    who = f"{name or 'the best cut'} changes top-1"
    parts = best.groupby("target", sort=False)
    names = [f"{_methods_of(own)} at {published.part_of(part, kind)}" for part, own in parts]
    return Slide(
        f"Nothing trained, {who} {_changes(best, kind)}",
        study.pictures("tradeoff"),
        terms="Ranks: by the same steps, only ranks go. Units: only units. SVD, equal shares: of each layer as much. "
        "Random units: the control.",
        table=columns_of(lines, "model name target untrained untrained_change trained seeds"),
        shows="Points of test top-1 lost over the share of MACs left; nothing trained where not said.",
        note="See how far lines are apart at half and at a quarter: the less is left, the more it matters what goes. "
        f"{_untrained(lines)} Best of all methods by test top-1: {name or ', '.join(names)}; to choose by test favours "
        "the lucky one a little.",
    )


def _untrained(lines):
    """Say what is left of each method at the smallest share, so that none seems better than it is."""
    least = lines[lines.target == lines.target.min()]
    words = [
        f"{pages.family_of(model)}: "
        + ", ".join(f"{line.name} {number(line.untrained)}" for line in own.itertuples(index=False))
        for model, own in least.groupby("model", sort=False)
    ]
    return f"At {share(least.target.iloc[0])}, top-1 in percent: {'; '.join(words)}."


def kept(study):
    """Show where the best budget was cut."""
    lines = study.read("table-kept")
    kinds = [kind for _, kind, target in study.budgets() if target == 0.5]
    if not kinds:
        raise Absent("no budget of a half")
    lines = lines[(lines.target == 0.5) & lines.model.isin(study.models)]
    first = lines.groupby("model")[["method", "seed"]].transform("first")
    lines = lines[(lines.method == first.method) & (lines.seed == first.seed)]  # as drawn
    lines = lines[lines.kept.notna()]
    lines = pd.concat([drawings.cut_kinds(own) for _, own in lines.groupby("model", sort=False)])
    lines = lines[lines["where"].str.contains("blocks")]
    shares = lines.assign(kept=lines.kept / lines.whole).rename(columns={"where": "block"})
    shares = shares[shares.kind == _most_uneven(shares)]
    order = shares.sort_values("kept", ascending=False, kind="stable")
    most = order.drop_duplicates("model")
    method = ", ".join(map(tables.method_words, lines.method.unique()))
    most = most.sort_values("model", ascending=False)
    words = " and ".join(
        f"{tables.layer_words(line.block)} ({pages.family_of(line.model)}, {share(line.kept)})"
        for line in most.itertuples()
    )
    slide = Slide(
        f"At half the {published.COSTS[kinds[0]]} {method} spares the {shares.kind.iloc[0]} in {words}",
        study.pictures(f"kept-{kinds[0]}-0.5"),
        terms="100: nothing was cut there. Rank of qkv: the singular directions of that matrix that stay. "
        "Merging: the layer between two stages.",
        table=columns_of(shares.head(2 * LINES), "model block kind kept"),
        shows="Heads, neurons and ranks that stay, in percent of the dense model's.",
        note="Compare it with where it hurts: the pool should keep what the loss depends on, and what saves few MACs.",
    )
    return replace(slide, source=source_of(study, slide, "table-kept.csv", first.seed.max()))


def _most_uneven(shares):
    """Return the kind of which, in every model, one block keeps far more than the others do on average."""
    groups = shares.groupby(["kind", "model"], sort=False).kept
    uneven = (groups.max() - groups.mean()).groupby("kind", sort=False)
    every = uneven.count() == shares.model.nunique()
    return uneven.min()[every].idxmax()


def peers(study):
    """Show what Torch-Pruning loses at the same share of the MACs."""
    file = study.folder.parent / "bench" / "accuracy.csv"
    if not (file.is_file() and published.listed(study.results, "data").startswith("CIFAR-10")):
        raise Absent("bench/accuracy.csv is of CIFAR-10, or missing")
    lines = tables.peers(pd.read_csv(file))
    draws = sorted(lines.seed.unique())
    lines = published.mean_over_seeds(lines, ["model", "name", "tool", "share"])
    ours, tuned, _ = pages.PEERS
    # so that differences are those of what is shown
    lines = lines.assign(lost=lines.lost.map(tables.rounding).round(1))
    pooled = lines[lines.name == ours].set_index(["model", "share"]).lost
    keys = lines.set_index(["model", "share"]).index
    lines = lines.assign(behind=lines.lost - pooled.reindex(keys).to_numpy())
    least = lines[(lines.share == lines.share.min()) & (lines.name == tuned)]
    least = least.assign(model=least.model.str.removeprefix("small "))
    order = lines.sort_values(["model", "share"], ascending=False)
    return Slide(
        f"At {published.part_of(lines.share.min(), 'macs')} Torch-Pruning, fine-tuned, is "
        f"{_pair(_as_models(least), lambda line: number(line.behind), 'points')} behind a pool without training",
        {"": file.with_suffix(".png")},
        terms="Torch-Pruning (Fang et al. 2023) removes units only; the pool may take ranks, too. "
        "Fine-tuned: one epoch on all images.",
        table=columns_of(order, "model name tool share top1 lost behind"),
        shows="Points of test top-1 lost over the share of MACs left. A benchmark of its own: of one dense model "
        f"of each kind (seed 0), means over {len(draws)} draws of calibration images.",
        note="Of Torch-Pruning the setting that is best on test at each share. It has nothing that solves "
        "layers anew without labels. The study has three dense models of each kind and takes only ranks that are "
        f"faster on its machine, so that a quarter costs it more. {_at_equal_time(pd.read_csv(file))}".strip(),
        source=f"Source: bench/accuracy.csv, accuracy.png. Small models on CIFAR-10 (JPEG), draws "
        f"{', '.join(map(str, draws))}.",
    )


def _at_equal_time(rows):
    """Say how fast the pool at its smallest share is, and Torch-Pruning at the next; "" where not timed.

    rows: of bench/accuracy.csv.
    """
    timed = rows[(rows.stage == "cut") & rows.speedup.notna() & (rows.budget < 1)]
    shares = sorted(timed.budget.unique())
    ours = timed[(timed.tool == "vitlab, pool") & timed.budget.isin(shares[:1])]
    theirs = timed[timed.tool.str.startswith("Torch-Pruning") & timed.budget.isin(shares[1:2])]
    if ours.empty or theirs.empty:
        return ""
    fast = [
        _pair(
            _as_models(own.assign(model=own.model.str.removeprefix("small "))),
            lambda line: number(line.speedup),
        )
        for own in (part.groupby("model").speedup.max().reset_index() for part in (ours, theirs))
    ]
    return (
        f"In eager PyTorch, batches of 64, the pool at {published.part_of(shares[0], 'macs')} is {fast[0]} times as "
        f"fast as dense; Torch-Pruning, at {published.part_of(shares[1], 'macs')}, at most {fast[1]}: compare these "
        "two for equal time."
    )


def _as_models(lines):
    """Return lines with names of models as studies have them: vit and swin."""
    return lines.assign(model=lines.model.str.lower())


def backbone(study):
    """Show what a real pretrained ViT-S is good for after a cut, beside its peers."""
    file = study.folder.parent / "bench" / "foundation.csv"
    if not file.is_file():
        raise Absent("bench/foundation.csv is missing")
    data = pages.BACKBONE_DATA
    rows, top1 = pages.backbone_cuts(file)
    dense = top1.loc["dense", 1.0]
    half = top1[0.5].drop("dense").dropna().sort_values(ascending=False)
    peer = pages.peers_of(half).index[0]
    shown = top1.loc[["dense", *half.index.drop("random units", errors="ignore")]]
    shown = shown[sorted(shown, reverse=True)].map(
        lambda top1: "" if pd.isna(top1) else number(top1)
    )
    shown.columns = [f"{share(budget)} of the MACs (%)" for budget in shown]
    count = rows.draw.nunique()
    draws = "one draw" if count == 1 else f"median of {count} draws"
    sources = [
        next(words for name, words in SOURCES.items() if method.startswith(name))
        for method in shown.index
    ]
    table = (
        shown.rename(index={"dense": f"{BACKBONE} on {data}, dense"})
        .rename_axis("method")
        .reset_index()
    )
    table = table.assign(source=sources)
    return Slide(
        f"At half the MACs DINOv2's features still get {number(half['vitlab, pool'])} % of {data} right, "
        f"{number(dense)} % before; with the best peer, {peer}, {number(half[peer])} %",
        {"": file.with_suffix(".png")},
        terms="CORP: Zhang and Yang 2026. SVD, whitened: Wang et al. 2024. Linear maps: Cannistraci et al. 2024.",
        table=table,
        shows=f"Test top-1 on {data} of a linear probe, one linear layer fitted with labels to the features of the "
        f"cut model; {draws} of calibration images.",
        note="A model that is used as it comes, without a classifier. All methods got the same "
        f"{rows.calibration.max():g} images, and cut without labels where not said. CORP takes "
        "neurons and query-key dimensions and corrects each layer in closed form; whitened SVD weighs what it leaves "
        "out by the inputs; linear maps take the place of whole blocks; SNIP and LAMP rank units by gradients and by "
        "magnitude within a layer.",
        source=f"Source: bench/foundation.csv, foundation.png. {BACKBONE} at 112 px, {data}.",
    )


def _backbone_point(study):
    """Return the finding of `backbone` as a sentence that needs no picture. Raises Absent as it does."""
    backbone(study)
    sentence = pages.backbone_sentence(study.folder)
    return sentence.partition("; ")[0].replace(" before the cut. Its", " before; its") + "."


def faster(study):
    """Show how much of what the MACs promise arrives, by runtime."""
    times = tables.like_for_like(study.read("table-runtimes"))
    times = times[(times.batch == times.batch.max()) & times.model.isin(study.models)]
    times = times[times.cut_speedup.notna() & (times.promised > 1.01)]
    keys = ["model", "checkpoint", "runtime", "precision"]
    groups = times.groupby(keys, sort=False)
    # Times compare within one run, so that several runs are a range.
    lines = groups.cut_speedup.agg(least="min", most="max").join(groups.promised.mean())
    lines = lines.reset_index()
    lines = lines.assign(
        batch=times.batch.max(),
        name=lines.checkpoint.map(tables.checkpoint_words),
        way=lines.runtime + " " + lines.precision,
    )
    if lines.empty:
        raise Absent("table-runtimes.csv has no cut")
    smallest = lines[lines.promised > 0.99 * lines.groupby("model").promised.transform("max")]
    ends = smallest.groupby("model").agg(least=("least", "min"), most=("most", "max"))
    ends = ends.join(smallest.groupby("model").promised.max()).reset_index()
    words = _pair(ends, lambda line: f"{number(line.least)} to {number(line.most)}", "times")
    promised = " and ".join(
        dict.fromkeys(number(line.promised) for line in ends[::-1].itertuples())
    )
    part = published.part_of(round(1 / smallest.promised.max(), 2), "macs")
    slide = Slide(
        f"With {part} batches of {times.batch.max():g} are {words} as fast; the MACs promise {promised}",
        study.pictures("speedup"),
        terms="Eager: PyTorch as it is. onnxruntime: the exported model. bf16: numbers of 16 bits. "
        "Promised: MACs before over after.",
        table=columns_of(lines, "model name way batch promised least most"),
        shows="Times as fast as dense in the same runtime (grey: dense beside dense in eager float32); batches of "
        f"{times.batch.max():g}; a mark is one run. {_timed_apart(study, lines)}".strip(),
        note=f"Two thin matrices are two calls, and what is not a product takes as long as "
        f"before. {_zeros(study)}{how_timed(study)} {_backbone_times(study)}".strip(),
    )
    source = source_of(study, slide, "table-runtimes.csv")
    return replace(slide, source=source.replace("means over seeds", "seeds"))  # one mark a run


def _timed_apart(study, lines):
    """Say that other cuts were timed than those whose accuracy is told; "" where they are the same."""
    apart = tables.timed_apart(study.results)
    if "checkpoint" in apart and apart.checkpoint.isin(lines.checkpoint).any():
        return "Timed were earlier cuts than those of the other slides, to the same shares of the MACs."
    return ""


def _backbone_times(study):
    """Say how fast units at half the MACs make the real ViT-S, by runtime; "" where that was not timed."""
    file = study.folder.parent / "bench" / "runtimes_of_vit_s.csv"
    if not file.is_file():
        return ""
    rows = pd.read_csv(file)
    rows = rows[(rows.cut == "removed") & (rows.batch == rows.batch.max())]
    # Within one runtime and one processor each; several processors are a range.
    ends = rows[rows.precision == "float32"].groupby("runtime", sort=False).here.agg(["min", "max"])
    ways = [
        f"{runtime} {' to '.join(dict.fromkeys(map(number, line)))}"
        for runtime, *line in ends.itertuples()
    ]
    return (
        f"{BACKBONE} with half of its MACs gone in units, times as fast as dense in the same runtime: "
        f"{', '.join(ways)}."
    )


def _zeros(study):
    """Return a sentence on what masked weights do not save; "" where they were not timed."""
    try:
        return pages.filled(study, pages.ZEROS).replace("**", "") + " "
    except Absent:
        return ""


def how_timed(study):
    """Say what the times are of."""
    results = study.results[study.results.latency_ms.notna()]
    results = results[results.batch == results.batch.max()]
    threads = " or ".join(published.distinct(results, "threads"))
    return (
        f"Batches of {results.batch.max():g} images, threads: {threads}; "
        "medians of ratios within rounds that time all models in turns."
    )


def conclusion(study):
    """Say what to take home, in the sentences of the talk, and how the numbers came about."""
    points = []
    for make in (budgets, backbone, peers, weights_and_rows, faster):
        with contextlib.suppress(Absent):
            is_backbone = make is backbone
            points.append(_backbone_point(study) if is_backbone else f"{make(study).title}.")
    zeros = _zeros(study).strip()
    points += [zeros] if zeros else []
    if not points:
        raise Absent("no slide has a finding")
    points.append(_limits(study))
    return Slide(
        "Cut by predicted loss, reconstruct what stays, and time the cut where it runs",
        points=tuple(points),
        terms="Builds on scores (Molchanov et al. 2019), weighted SVD (Wang et al. 2024), and reconstruction "
        "(He, Zhang and Sun 2017).",
        note=f"{' '.join(method(study))} Molchanov: arXiv 1906.10771; Wang: arXiv 2403.07378; He: arXiv 1707.06168. "
        "All others: docs/citing.md.",
    )


def _limits(study):
    """Say what the talk does not show."""
    data, devices = (
        published.listed(study.results, "data"),
        published.listed(study.results, "device"),
    )
    largest = published.millions(study.dense.loc[study.models].params.max())
    return (
        f"Not shown: tasks other than classification; beyond one backbone, models of more than {largest} million "
        f"parameters and images other than {data}; times on processors other than {devices}."
    )


def method(study):
    """Return sentences on how the numbers came about."""
    splits = study.read("table-data").drop_duplicates("split").set_index("split").images
    top1 = study.dense.top1.max() / 100
    error = two_digits(100 * (top1 * (1 - top1) / splits["test"]) ** 0.5)
    images = [f"{splits.get(split, 0):,}" for split in ("train", "val", "test")]
    versions = [f"{name} {published.listed(study.results, name)}" for name in ("torch", "timm")]
    return [
        f"Images (train, val, test): {', '.join(images)}.",
        f"A top-1 of {number(100 * top1)} % has a standard error of {error} points.",
        "Scores from training images, the best epoch by val; top-1 is on test.",
        "MACs of one image in closed form; masked models execute all.",
        f"{', '.join(versions)}.",
    ]


# -- all slides

# The talk in its order: the function, and the file that it reads.
TALK = [
    (claim, "results.csv"),
    (what_is_cut, "results.csv"),
    (sensitivity, "table-curves.csv"),
    (criteria, "table-criteria.csv"),
    (weights_and_rows, "summary.csv"),
    (heads_svd_iht, "summary.csv"),
    (pool, "summary.csv"),
    (budgets, "summary.csv"),
    (kept, "table-kept.csv"),
    (peers, "results.csv"),
    (backbone, "results.csv"),
    (faster, "table-runtimes.csv"),
    (conclusion, "summary.csv"),
]


def slides(folder, *, long=False):
    """Return the slides of a folder of tables and pictures.

    A slide for which something is missing is left out, and a line printed that says what.
    long: whether an appendix follows, with the tables of the talk and all other pictures.
    Raises FileNotFoundError where results.csv is missing.
    """
    study = published.Published(folder)
    made = []
    for make, file in TALK:
        try:
            slide = make(study)
            source = slide.source or source_of(study, slide, file)
        except Absent as reason:
            files.log(f"no slide {make.__name__}: {reason}")
            continue
        made.append(replace(slide, source=source))
    return [*made, *appendix(study, made)] if long else made


def appendix(study, talk):
    """Return slides with the tables of the talk, and with all other pictures of the folder."""
    made = []
    dense = published.mean_over_seeds(study.read("dense"), ["model", "stage", "epochs"])
    names = "model stage epochs top1 mean_per_class params macs seeds"
    shown = Slide("Dense models, and the same after more epochs", table=columns_of(dense, names))
    shown = replace(shown, source=source_of(study, shown, "dense.csv"))
    for slide in [shown, *talk]:
        if slide.table is None:
            continue
        parts = math.ceil(len(slide.table) / LINES)
        size = math.ceil(len(slide.table) / parts)  # as many lines on each
        for start in range(0, len(slide.table), size):
            part = slide.table.iloc[start : start + size].reset_index(drop=True)
            title = (
                slide.title if slide is shown else f"In numbers: {slide.title.partition(':')[0]}"
            )
            made.append(Slide(title, table=part, note=slide.note, source=slide.source))
    seen = {path for slide in talk for path in (slide.pictures or {}).values()}
    return [*made, *_other_pictures(study, seen)]


def _other_pictures(study, seen):
    """Return a slide for each kind of picture that the talk does not show; two models side by side where they fit."""
    kinds = {}
    for path in sorted(study.folder.glob("*.png"), reverse=True):
        for model in study.models:
            if path not in seen and path.stem.endswith(f"-{model}"):
                kinds.setdefault(path.stem.removesuffix(f"-{model}"), {})[model_name(model)] = path
    made = []
    for kind, pictures in sorted(kinds.items()):
        fits = all(
            wide <= HALF[0] and high <= HALF[1] for wide, high in map(inches, pictures.values())
        )
        groups = [pictures] if fits else [{name: path} for name, path in pictures.items()]
        words = max((name for name in plots.TITLES if kind.startswith(name)), key=len, default=kind)
        title = plots.TITLES.get(words, kind)
        if rest := kind.removeprefix(words).strip("-").split("-"):
            title += _of_target(*rest)
        for group in groups:
            name = f" ({next(iter(group))})" if len(group) == 1 else ""
            slide = Slide(title + name, group)
            made.append(replace(slide, source=source_of(study, slide, "results.csv")))
    return made


def _of_target(kind, target=None):
    """Return words such as ": half the MACs" for what stands in the name of a picture's file; else ""."""
    if kind not in published.BUDGETS or target is None:
        return ""
    return f": {published.part_of(float(target), kind)}"


def inches(picture):
    """Return width and height of a picture file."""
    with Image.open(picture) as image:
        return image.width / PIXELS, image.height / PIXELS


def source_of(study, slide, file, seed=None):
    """Return the line that says where a slide comes from.

    seed: that of a picture of one model; None: all seeds.
    """
    results = study.results[study.results.model.isin(study.models)]
    table = study.read(file.removesuffix(".csv"))
    if seed is not None:
        results, table = results[results.seed == seed], table[table.seed == seed]
    names = [file, *(path.name for path in (slide.pictures or {}).values())]
    return study.source(names, results, tables=[table])
