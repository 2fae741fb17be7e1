"""Slides: the tables and pictures of figures/<study>/ as a .pptx and as one HTML file that needs no network. No torch.

A slide is one finding: a sentence whose numbers all stand in the slide's own table, a picture where there is one, and
where both come from. The numbers choose the sentence, so that it holds for any study. Both files are made from one list
of slides; from the same tables they are made the same byte for byte.
"""

import argparse
import base64
import copy
import functools
import html
import io
import math
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import font_manager
from PIL import Image, ImageFont

from vitlab import plots, record

MOST = 8  # rows of a slide's table
TRUSTED = 0.5  # rank correlation from which a score is said to rank units
PARTS = {0.25: "a quarter of the", 0.5: "half the", 0.75: "three quarters of the"}
BUDGETS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "measured time"}
COSTS = BUDGETS | {"bytes_disk": "bytes on disk", "relative_latency": "measured time"}
SOLVED, TRAINED = ["folded", "compensated", "reconstructed"], ["finetuned", "distilled"]
WORDS = {  # what methods are, said under the tables that name them
    "unstructured": "single weights",
    "structured": "rows of linear layers",
    "heads+svd": "heads removed, layers by activation-weighted SVD",
    "heads+iht": "heads removed, sparse layers by iterative hard thresholding",
    "heads+threshold": "SVD, then small entries to zero",
    "heads+svd+iht entries": "low rank + single weights",
    "heads+svd+iht columns": "low rank + whole columns",
    "pool": "all kinds together by predicted loss per MAC",
    "units": "heads, neurons, filters and width by predicted loss per MAC",
    "pool+ranks": "units first, then ranks",
    "ranks": "ranks of all layers by predicted loss per MAC",
    "width": "channels of the residual stream",
    "svd": "SVD, the same share of each layer",
    "random": "as many random units of each place",
}


@dataclass(frozen=True)
class Slide:
    """One finding. title: a sentence. table: strings, 1 to 9 rows. source: files, study, seeds, machine, commit.
    picture: path of a png, perhaps with an svg beside it; shows: what is on it. note: how to read the table."""

    title: str
    table: pd.DataFrame
    source: str
    picture: Path | None = None
    shows: str = ""
    note: str = ""


class Absent(Exception):
    """A slide cannot be made; says what is missing."""


class Study:
    """A folder of tables and pictures, read as they are asked for. Raises FileNotFoundError, with the commands that
    make them, where there is no results.csv.

    .results: all of its rows; .untimed: one per model measured; .models: those that were cut; .dense: means over seeds
    of the dense models' rows, by model; .used: names of the files read since it was last emptied.
    """

    def __init__(self, folder):
        self.folder, self.used = Path(folder), []
        name = self.folder.name
        if not (self.folder / "results.csv").is_file():
            known = sorted(path.parent.name for path in self.folder.parent.glob("*/results.csv"))
            raise FileNotFoundError(
                f"{self.folder} has no results.csv, which a study leaves at its end: make study STUDY={name}, "
                f"or, where its runs are, make figures STUDY={name}. There are tables of {', '.join(known) or 'none'}."
            )
        self.results = self.read("results")
        self.untimed = self.results[self.results.latency_ms.isna()]
        cut = ~self.untimed.stage.isin([*plots.DENSE_POINTS]) & self.untimed.top1.notna()
        self.dense = self.untimed[self.untimed.stage == "dense"].groupby("model").mean(numeric_only=True)
        self.models = [model for model in dict.fromkeys(self.untimed[cut].model) if model in self.dense.index]

    def read(self, name, model=None):
        """The frame of name.csv, or its rows of one model. Raises Absent without file or rows."""
        path = self.folder / f"{name}.csv"
        if not path.is_file():
            raise Absent(f"{path.name} is missing")
        frame = pd.read_csv(path)
        frame = frame if model is None else frame[frame.model == model].reset_index(drop=True)
        if frame.empty:
            raise Absent(f"{path.name} has no rows of {model}")
        self.used.append(path.name)
        return frame

    def picture(self, name):
        """Path of name.png. Raises Absent without it."""
        if not (self.folder / f"{name}.png").is_file():
            raise Absent(f"{name}.png is missing")
        self.used.append(f"{name}.png")
        return self.folder / f"{name}.png"

    def summary(self, model, kinds, target=None):
        """Rows of summary.csv of these target_kinds (and target), with every stage as a column; `series`; solved and
        trained, the best of SOLVED and TRAINED; change: trained against dense, points; share: MACs against dense."""
        rows = self.read("summary", model)
        rows = rows.reindex(columns=rows.columns.union([*plots.STAGES, "macs"], sort=False))
        rows = _some(rows[rows.target_kind.isin(kinds) & (rows.target.eq(target) if target else True)])
        rows = rows.assign(solved=rows[SOLVED].max(axis=1), trained=rows[TRAINED].max(axis=1))
        shares = rows.macs / rows.model.map(self.dense.macs)
        return rows.assign(series=plots.series(rows), change=rows.trained - rows.dense, share=shares)

    def timed(self, model=None):
        """Rows of efficiency.csv, means over seeds, with `series`; promised by the MACs, ideal (if zeros were free),
        times as fast as dense; arrives: measured speedup over promised."""
        rows = _mean(self.read("efficiency", model), ["model", "method", "form", "target_kind", "target"])
        whole = rows.model.map(rows[rows.method == "dense"].groupby("model").macs.mean())
        rows = rows.assign(promised=whole / rows.macs, ideal=whole / rows.macs_ideal)
        rows = _some(rows[(rows.method != "dense") & rows.speedup.notna()])
        return rows.assign(series=plots.series(rows), arrives=rows.speedup / rows.promised)

    def budgets(self, model):
        """[(target_kind, target)] of a model's budgets below 1, the mildest first."""
        rows = self.untimed[(self.untimed.model == model) & self.untimed.target_kind.isin([*BUDGETS])]
        found = rows[rows.top1.notna() & (rows.target < 1)][["target_kind", "target"]].drop_duplicates()
        return list(found.sort_values("target", ascending=False, kind="stable").itertuples(index=False, name=None))

    def source(self, model=None):
        """Where a slide comes from: the files used, and data, seeds, machine, commits and date of the rows."""
        rows = self.results if model is None else self.results[self.results.model == model]
        rows = rows.sort_values("date", kind="stable")
        commits, seeds = _known(rows, "commit"), _known(rows, "seed")
        if len(commits) > 3:
            commits = [f"{commits[0]} … {commits[-1]} ({len(commits)} in all)"]
        return (
            f"Source: {', '.join(dict.fromkeys(self.used))}. Study {self.folder.name}, "
            f"{', '.join(_known(rows, 'data'))}, {'means over seeds' if len(seeds) > 1 else 'seed'} "
            f"{', '.join(seeds)}, split {', '.join(_known(rows, 'split_seed'))}; {', '.join(_known(rows, 'device'))}; "
            f"commit {', '.join(commits)}; {_known(rows, 'date')[-1][:10]}."
        )


# -- words and numbers


def _known(rows, column):
    """What a column holds, as strings, once each and in their order; whole numbers without a point."""
    found = rows[column].dropna() if column in rows else []
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in dict.fromkeys(found)] or ["unknown"]


def _name(model):
    return re.sub(r"\bvit\b", "ViT", re.sub(r"\bswin\b", "Swin", str(model)))


def _stage(stage):
    return plots.STAGES.get(stage, stage)


def _one(value, digits=1):
    """With digits after the point; halves go away from zero, as on paper: 84.05 is 84.1."""
    return f"{value + math.copysign(1e-9, value):,.{digits}f}".replace("-", "−")


def _signed(value, digits=1):
    text = _one(abs(value), digits)
    return text if float(text.replace(",", "")) == 0 else ("−" if value < 0 else "+") + text


def _two(value):
    return _signed(value, 2).removeprefix("+")


def _times(value):
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _share(value):
    return f"{100 * value:.3g}\u00a0%"


def _millions(value):
    return _one(value / 1e6, 2 if value < 1e7 else 1)


def _moved(points):
    """Words for a change of top-1, in percentage points."""
    verb = "changes" if _signed(points) == "0.0" else "rises" if points > 0 else "falls"
    return f"{verb} by {_one(abs(points))} points"


def _asked(names, targets):
    """Names of cuts with what was asked of them."""
    shares = targets.map(lambda target: "" if pd.isna(target) else f", {_share(target)}")
    return names + shares


def _part(target, kind):
    """Words such as "half the MACs" and "60 % of the bytes"."""
    return f"{PARTS.get(target, _share(target) + ' of the')} {COSTS[kind]}"


def _mean(rows, keys):
    """Means over seeds, in the order of the rows."""
    return rows.groupby(keys, sort=False, dropna=False).mean(numeric_only=True).reset_index()


def _some(rows):
    """rows. Raises Absent where there are none."""
    if rows.empty:
        raise Absent("there are no rows for it")
    return rows


def _shown(rows, columns):
    """A slide's table of {header: (column, format)}; missing values are empty, and columns of nothing else left out.
    Raises Absent for no rows."""
    cells = {
        header: ["" if pd.isna(value) else form(value) for value in _some(rows)[column]]
        for header, (column, form) in columns.items()
        if column in rows
    }
    return pd.DataFrame({header: column for header, column in cells.items() if any(column)})


def _meaning(names):
    return "; ".join(f"{name}: {WORDS[name]}" for name in dict.fromkeys(names) if name in WORDS)


# -- one function a finding, each returns title, table, and the options of Slide


def _title(study):
    rows, dates = study.results, sorted(_known(study.results, "date"))
    names = [_name(model) for model in study.models or study.dense.index]
    facts = {
        "data": ", ".join(_known(rows, "data")),
        "dense models": ", ".join(f"{_name(model)} {_one(row.top1)} % top-1" for model, row in study.dense.iterrows()),
        "seeds": ", ".join(_known(rows, "seed")),
        "device": ", ".join(_known(rows, "device")),
        "commit": ", ".join(_known(rows.sort_values("date"), "commit")),
        "date": " to ".join(dict.fromkeys([dates[0][:10], dates[-1][:10]])),
    }
    table = pd.DataFrame(facts.items(), columns=["study", study.folder.name])
    return f"What pruning does to {' and '.join(names)} on {facts['data']}", table, {}


def _dense(study):
    rows = _mean(study.read("dense"), ["model", "stage", "epochs"])
    whole = rows[rows.stage == "dense"].groupby("model", sort=False).top1.mean()
    rows = rows.assign(change=(rows.top1 - rows.model.map(whole)).where(rows.stage != "dense")).head(MOST)
    best = whole.idxmax()
    title = f"The dense {_name(best)} reaches {_one(whole[best])}\u00a0% top-1"
    for row in rows[(rows.stage != "dense") & (rows.model == best)].head(1).itertuples():
        title += f", which {_moved(row.change)} in {row.epochs:g} more epochs without a cut"
    columns = {"model": ("model", _name), "training": ("stage", _stage), "epochs": ("epochs", "{:g}".format)}
    columns |= {"top-1 (%)": ("top1", _one), "change (points)": ("change", _signed)}
    columns |= {"mean of classes (%)": ("mean_per_class", _one), "parameters (M)": ("params", _millions)}
    note = "“Dense, same epochs” is the control: what as many epochs as the cut models get do to the dense model."
    return title, _shown(rows, columns | {"MACs (M)": ("macs", _millions)}), dict(note=note)


def _sensitivity(study, model):
    rows = study.read("table-curves", model)
    ratio = rows.ratio.max()
    rows = _mean(rows[rows.ratio == ratio], ["layer"]).sort_values("increase", ascending=False)
    median = pd.DataFrame({"layer": [f"median of {len(rows)} layers"], "increase": [rows.increase.median()]})
    table = pd.concat([rows.head(MOST - 2), median, rows.tail(1)]).assign(ratio=ratio)
    rises = [_signed(value, 3) for value in (rows.increase.iloc[0], median.increase[0])]
    title = (
        f"Cutting {_share(ratio)} of {rows.layer.iloc[0]} alone changes the loss of the {_name(model)} by {rises[0]} "
        f"nats, of the median layer by {rises[1]}"
    )
    rise = ("increase", functools.partial(_signed, digits=3))
    table = _shown(table, {"layer": ("layer", str), "share cut": ("ratio", _share), "loss (nats)": rise})
    shows = f"Rise of the loss when one layer alone loses {_share(ratio)} of its weights, by block and role."
    return title, table, dict(picture=study.picture(f"sensitivity-{model}"), shows=shows)


def _agreement(study, model):
    rows = _mean(_some(study.read("table-agreement", model).dropna(subset="spearman")), ["criterion", "kind"])
    said = []
    for kind, own in rows.groupby("kind"):
        best = own.loc[own.spearman.idxmax()]
        trusted = f"{best.criterion} for {kind} (rank correlation {_two(best.spearman)})"
        said.append(trusted if best.spearman >= TRUSTED else f"no score for {kind} ({_two(best.spearman)} at most)")
    wide = rows.pivot_table(index="kind", columns="criterion", values="spearman", sort=False).reset_index()
    table = _shown(wide, {"": ("kind", str)} | {name: (name, _two) for name in wide.columns[1:]})
    return (
        f"What it costs the {_name(model)} to lose a unit is ranked by {', by '.join(said)}",
        table,
        dict(
            picture=study.picture(f"agreement-{model}"),
            shows="Rank correlation between score and measured rise of the loss when one unit goes.",
            note=f"Rank correlations are in [−1, 1]; random is what chance gives. Below {TRUSTED} no score is named.",
        ),
    )


def _criteria(study, model):
    rows = _mean(study.read("table-criteria", model), ["criterion", "method", "target"])
    what, most, said = {"unstructured": "weights", "structured": "rows"}, rows.target.max(), []
    for method, own in rows[rows.target == most].groupby("method", sort=False):
        best = own.loc[own.val_top1.idxmax()]
        kept = f"{_one(best.val_top1)}\u00a0% by {best.criterion}"
        said.append(f"{kept} with {_share(most)} of its {what.get(method, method)} cut")
    rows["asked"] = _asked(rows.method.replace(what), rows.target)
    wide = rows.pivot_table(index="criterion", columns="asked", values="val_top1", sort=False).reset_index()
    table = _shown(wide, {"score": ("criterion", str)} | {name: (name, _one) for name in wide.columns[1:]})
    title = f"Before any training, the {_name(model)} keeps at best {' and '.join(said)}"
    return title, table, dict(note="Top-1 (%) on val right after the cut, masked, by score and share cut.")


def _global_pruning(study, model):
    rows = study.summary(model, ["sparsity"])
    rows = rows[rows.method.isin(["unstructured", "structured"]) & rows.finetuned.notna()].tail(MOST)
    said = []
    for method, words in {"unstructured": "of the weights masked", "structured": "of the rows cut"}.items():
        for row in rows[(rows.method == method) & (rows.target == rows.target.max())].head(1).itertuples():
            said.append(f"{_moved(row.finetuned - row.dense)} with {_share(row.target)} {words}")
    columns = {"cut": ("series", str), "share cut": ("target", _share), "after the cut (%)": ("cut", _one)}
    columns |= {"fine-tuned (%)": ("finetuned", _one), "change (points)": ("change", _signed)}
    table = _shown(rows.assign(change=rows.finetuned - rows.dense), columns | {"MACs (M)": ("macs", _millions)})
    return (
        f"Fine-tuned, the {_name(model)}’s top-1 {' and '.join(said)}",
        table,
        dict(
            picture=study.picture(f"recovery-{model}"),
            shows="Test top-1 after the cut and after each step of recovery; lines: the dense model.",
            note=f"Masked models execute all MACs. Change: fine-tuned against dense. {_meaning(rows.method)}.",
        ),
    )


def _training(study, model):
    rows = _mean(study.read("training", model), ["method", "target", "epoch"])
    rows = rows[rows.method.isin(["unstructured", "structured"])].tail(MOST)
    last = rows[rows.epoch == rows.epoch.max()]
    ranges = [f"{_one(last[name].min())} to {_one(last[name].max())}\u00a0%" for name in ("train_top1", "val_top1")]
    columns = {"cut": ("method", str), "share cut": ("target", _share), "epoch": ("epoch", "{:g}".format)}
    columns |= {"training (%)": ("train_top1", _one), "val (%)": ("val_top1", _one)}
    columns |= {"training memory (MB)": ("training_mb", "{:,.0f}".format)}
    title = f"After {rows.epoch.max():g} epochs of fine-tuning the masked {_name(model)} is right on {ranges[0]} "
    title += f"of the training images and {ranges[1]} of val"
    shows, note = "Top-1 on training images over the epochs of fine-tuning.", _meaning(rows.method) + ", all masked."
    return title, _shown(rows, columns), dict(picture=study.picture(f"training-{model}"), shows=shows, note=note)


def _weights(study, model):
    rows, keys = study.read("table-distributions", model), ["method", "target", "stage"]
    rows = rows[rows.role == "all"].assign(square=lambda r: r["count"] * ((r.left + r.right) / 2) ** 2)
    zeros = rows.groupby([*keys, "seed"]).zeros.first().groupby(keys).sum()
    sums = rows.groupby(keys)[["count", "square"]].sum().assign(zeros=zeros)
    sums = sums.assign(zero=sums.zeros / (sums.zeros + sums["count"]), spread=(sums.square / sums["count"]) ** 0.5)
    wide = sums[["zero", "spread"]].unstack("stage").sort_index(ascending=False).tail(MOST)
    wide.columns = [f"{what} {stage}" for what, stage in wide.columns]
    wide = wide.reset_index()
    first = wide.loc[wide.target.idxmax()]
    before, after = _share(first["zero pruned"]), _share(first["zero finetuned"])
    said = f"keeps all zeros, {after}" if before == after else f"takes the zeros from {before} to {after}"
    wide["asked"] = _asked(wide.method, wide.target)
    columns = {"cut": ("asked", str)}
    columns |= {"zeros, pruned": ("zero pruned", _share), "zeros, fine-tuned": ("zero finetuned", _share)}
    columns |= {f"spread, {words}": (f"spread {words}", "{:.3f}".format) for words in ("unpruned", "pruned")}
    columns |= {"spread, fine-tuned": ("spread finetuned", "{:.3f}".format)}
    return (
        f"Fine-tuning {said} of the {_name(model)}’s weights ({first.method}, {_share(first.target)} cut)",
        _shown(wide, columns),
        dict(
            picture=study.picture(f"weights-{model}"),
            shows="Weights of all prunable layers; hatched: exact zeros.",
            note=f"Spread: root mean square of the weights that are not zero. {_meaning(wide.method)}.",
        ),
    )


def _heads_svd_iht(study, model):
    rows = study.summary(model, ["ratio"])
    rows = rows[rows.trained.notna() & (rows.target == rows.target.max())].tail(MOST)
    columns = {f"cut, {_share(rows.target.max())}": ("series", str), "after the cut (%)": ("cut", _one)}
    columns |= {"fine-tuned (%)": ("trained", _one), "change (points)": ("change", _signed)}
    table = _shown(rows, columns | {"MACs of dense": ("share", _share)})
    best, least = rows.loc[rows.change.idxmax()], rows.loc[rows.share.idxmin()]
    title = f"At {_share(best.target)} cut, {best.series} costs the {_name(model)} least: top-1 {_moved(best.change)}"
    title += f", at {_share(best.share)} of the MACs"
    if least.series != best.series:
        title += f"; with {least.series}, at {_share(least.share)}, it {_moved(least.change)}"
    picture, shows = study.picture(f"heads_svd_iht-{model}"), "Test top-1 over the share cut of heads and layers."
    return title, table, dict(picture=picture, shows=shows, note=_meaning(rows.method) + ".")


def _budget(study, model, kind, target):
    rows = study.summary(model, [kind], target)
    rows = rows.assign(untrained=rows[["cut", *SOLVED]].max(axis=1)).dropna(subset="untrained")
    rows = rows.assign(lost=rows.untrained - rows.dense, best=rows[["untrained", "trained"]].max(axis=1))
    rows = rows.sort_values("best", ascending=False, kind="stable")
    count, rows = len(rows), rows.head(MOST)
    columns = {"cut": ("series", str), "untrained (%)": ("untrained", _one), "change (points)": ("lost", _signed)}
    columns |= {"fine-tuned (%)": ("trained", _one), "change, fine-tuned": ("change", _signed)}
    table = _shown(rows, columns)
    best = rows.loc[rows.untrained.idxmax()]
    title = f"With {_part(target, kind)}, the {_name(model)}’s top-1 {_moved(best.lost)} without training"
    title += f" ({best.series})"
    for row in rows.sort_values("change").dropna(subset="change").tail(1).itertuples():
        title += f" and {_moved(row.change)} fine-tuned ({row.series})"
    picture, shows = study.picture(f"ladder-{kind}-{target:g}-{model}"), "Test top-1 after each step of recovery; "
    note = f"The best of {count} by test top-1, which favours the lucky one a little. {_meaning(rows.series)}."
    return title, table, dict(picture=picture, shows=shows + "hollow: without training.", note=note)


def _recovered(study):
    rows = study.summary(None, [*BUDGETS])
    rows = rows[rows.cut.notna() & rows.solved.notna() & (rows.target < 1) & ~rows.series.str.contains("random")]
    rows = rows.assign(lost=rows.dense - rows.cut, back=rows.solved - rows.cut, left=rows.trained - rows.cut)
    rows = rows.sort_values("back", ascending=False, kind="stable").head(MOST)
    columns = {"model": ("model", _name), "cut": ("series", str), "kept": ("target", _share)}
    columns |= {"of the": ("target_kind", COSTS.get), "after the cut (%)": ("cut", _one)}
    columns |= {"points lost": ("lost", _one), "won back, no training": ("back", _one)}
    table = _shown(rows, columns | {"won back, fine-tuned": ("left", _one)})
    best = rows.iloc[0]
    title = f"Layers solved anew, without training, win back up to {_one(best.back)} of {_one(best.lost)} points lost"
    title += f" ({_name(best.model)}, {best.series}, {_share(best.target)} kept)"
    if best.back <= 0:
        title = f"Layers solved anew win nothing back: at best {_one(best.back)} of {_one(best.lost)} points lost"
    note = "Won back: the best of folding, least squares and reconstruction, in points above the model after the cut."
    return title, table, dict(note=f"{note} {_meaning(rows.series)}.")


def _audit(study, model):
    rows = _mean(study.read("audit-spearman", model), ["criterion", "kind"]).dropna(subset="ratio")
    rows = rows[rows.ratio > 0].assign(off=lambda r: np.log(r.ratio).abs()).sort_values("off", kind="stable")
    rows = pd.concat([rows.head(MOST // 2), rows.tail(min(MOST // 2, max(0, len(rows) - MOST // 2)))])
    columns = {"score": ("criterion", str), "cut": ("kind", str), "cuts": ("cuts", "{:g}".format)}
    columns |= {"rank correlation": ("spearman", _two), "measured / predicted": ("ratio", _times)}
    table, best, worst = _shown(rows, columns), rows.iloc[0], rows.iloc[-1]
    title = f"On the {_name(model)} the loss rises {_times(best.ratio)} times as much as predicted where the score "
    title += f"foretells best ({best.criterion}, {best.kind}), {_times(worst.ratio)} times where it does worst "
    title += f"({worst.criterion}, {worst.kind})"
    shows = "Measured over predicted rise of the loss; on the diagonal the prediction is right."
    note = "Medians over the cuts, before any recovery; the four nearest to 1 and the four furthest from it."
    return title, table, dict(picture=study.picture(f"audit-{model}"), shows=shows, note=note)


def _classes(study, model, kind, target):
    rows = study.read("table-classes", model)
    rows = rows[rows.target_kind.eq(kind) & rows.target.eq(target)].dropna(subset="change")
    cut = ", ".join(_known(rows, "method"))
    rows = _mean(rows.assign(named=rows["class"].astype(str).str[:24]), ["named"]).sort_values("change", kind="stable")
    half = MOST // 2
    rows = pd.concat([rows.head(half), rows.tail(min(half, max(0, len(rows) - half)))])
    columns = {"class": ("named", str), "images": ("images", "{:g}".format), "dense (%)": ("before", _one)}
    table = _shown(rows, columns | {"cut (%)": ("after", _one), "change (points)": ("change", _signed)})
    worst, best = rows.iloc[0], rows.iloc[-1]
    title = f"With {_part(target, kind)} ({cut}), the {_name(model)}’s top-1 on {worst.named} {_moved(worst.change)}, "
    title += f"on {best.named} it {_moved(best.change)}"
    shows, note = "Change of top-1 by class; in brackets its test images.", "The most forgotten classes and the least."
    return title, table, dict(picture=study.picture(f"classes-{kind}-{target:g}-{model}"), shows=shows, note=note)


def _front(study, model, cost):
    rows = study.untimed[study.untimed.model == model]
    rows = rows.assign(series=plots.series(rows))[rows.stage.isin([*plots.DENSE_POINTS, "reconstructed", *TRAINED])]
    rows = _mean(rows[rows[cost].notna()], ["series", "target", "stage"])
    rows = rows.assign(change=rows.top1 - study.dense.top1[model], share=rows[cost] / study.dense[cost][model])
    front = rows[plots.pareto(rows[cost], rows.top1)].sort_values(cost, kind="stable")
    cut = front[~front.stage.isin([*plots.DENSE_POINTS])]
    near = cut[cut.change >= -1].head(1) if (cut.change >= -1).any() else cut.sort_values("change").tail(1)
    front = pd.concat([near, front.drop(near.index).sort_values("top1", ascending=False)]).head(MOST).sort_values(cost)
    front["asked"] = _asked(front.series, front.target)
    columns = {"cut": ("asked", str), "stage": ("stage", _stage)}
    columns |= {f"{COSTS[cost]} of dense": ("share", _share)}
    table = _shown(front, columns | {"top-1 (%)": ("top1", _one), "change (points)": ("change", _signed)})
    for row in near.itertuples():
        where = f"{_share(row.share)} of its {COSTS[cost]} ({row.series}, {_stage(row.stage)})"
        title = f"Within one point of the dense top-1, the {_name(model)} gets by with {where}"
        if row.change < -1:
            title = f"No {_name(model)} that saves {COSTS[cost]} is within one point of dense: "
            title += f"top-1 {_moved(row.change)} at {where}"
    if near.empty:
        title = f"No cut saves {COSTS[cost]} of the {_name(model)}"
    shows = f"Test top-1 over {COSTS[cost]}; ringed: no other model is better and cheaper."
    note = "Behind a cut: the share cut of weights, rows and layers; of budgets the share kept."
    return title, table, dict(picture=study.picture(f"tradeoff-{cost}-{model}"), shows=shows, note=note)


def _best(study, model):
    rows = study.read("best", model)
    rows = rows[rows.limit.isin(sorted(set(rows.limit))[:2])].head(MOST)
    rows = rows.assign(change=rows.top1 - rows.dense)
    said, none = [], []
    for row in rows[rows.cost.isin(["macs", "relative_latency"]) & (rows.limit == rows.limit.max())].itertuples():
        part = f"under {_part(row.limit, row.cost)}"
        said, none = (said, [*none, part]) if row.method == "none" else ([*said, f"{_moved(row.change)} {part}"], none)
    columns = {"of the dense": ("cost", COSTS.get), "at most": ("limit", _share)}
    rows["asked"] = _asked(rows.method, rows.target)
    columns |= {"best": ("asked", str), "stage": ("stage", _stage), "change (points)": ("change", _signed)}
    table = _shown(rows, columns)
    on = " and ".join(_known(rows, "chosen_on"))
    note = f"Chosen on {on} images; behind each the share cut, of budgets the share kept. {_meaning(rows.method)}."
    shows = "Test top-1 over parameters; ringed: no other model is better and smaller."
    title = f"The best {_name(model)}’s top-1 {' and '.join(said)}" if said else f"Of the {_name(model)}"
    title += f"{'; ' if said else ' '}no model fits {' or '.join(none)}" if none else ""
    return title, table, dict(picture=study.picture(f"tradeoff-params-{model}"), shows=shows, note=note)


def _how_timed(study):
    rows = study.results[study.results.latency_ms.notna()]
    rows = rows[rows.batch == rows.batch.max()]
    return (
        f"Batches of {rows.batch.max():g} images, threads: {' or '.join(_known(rows, 'threads'))}; "
        f"{', '.join(_known(rows, 'precision'))}; medians of ratios within rounds that time all models in turns."
    )


def _speed(study, model):
    rows = study.timed(model).sort_values("speedup", ascending=False, kind="stable").head(MOST)
    rows["asked"] = _asked(rows.series, rows.target)
    columns = {"cut": ("asked", str), "promised by the MACs": ("promised", _one)}
    columns |= {"measured (times as fast)": ("speedup", _one), "arrives": ("arrives", _share)}
    table, row = _shown(rows, columns | {"top-1 (%)": ("top1", _one)}), rows.iloc[0]
    title = f"The fastest {_name(model)} ({row.asked}) runs {_one(row.speedup)} times as fast as the dense one, where "
    title += f"its MACs promise {_one(row.promised)}, at {_one(row.top1)}\u00a0% top-1"
    picture, shows = study.picture(f"tradeoff-relative_latency-{model}"), "Test top-1 over measured time of one batch."
    return title, table, dict(picture=picture, shows=shows, note=_how_timed(study))


def _zeros(study):
    rows = study.timed()
    rows = rows[(rows.form == "masked") & (rows.target_kind == "sparsity")]
    rows = rows.assign(zeros=1 - rows.nonzero / rows.params)
    rows = rows.sort_values("ideal", ascending=False, kind="stable").head(MOST)
    columns = {"model": ("model", _name), "masked": ("method", str), "share cut": ("target", _share)}
    columns |= {"zeros among all parameters": ("zeros", _share), "promised if zeros were free": ("ideal", _one)}
    columns |= {"measured (times as fast)": ("speedup", _one)}
    table, row = _shown(rows, columns | {"top-1 (%)": ("top1", _one)}), rows.iloc[0]
    title = f"With {_share(row.target)} masked ({row.method}), the {_name(row.model)} is {_one(row.speedup)} times as "
    title += f"fast as dense; were its zeros free, it would be {_one(row.ideal)} times"
    note = f"Masked weights are zeros in dense tensors, multiplied like any number. {_how_timed(study)}"
    return title, table, dict(note=note)


def _runtimes(study, model):
    rows = study.read("table-runtimes", model)
    batch = rows.batch.max()
    rows = rows[rows.batch == batch].assign(way=lambda r: r.runtime + " " + r.precision)
    rows = _mean(rows.assign(checkpoint=rows.checkpoint.str.removeprefix("budget-")), ["checkpoint", "way"])
    best = rows.loc[rows.speedup.idxmax()]
    wide = rows.pivot_table(index="checkpoint", columns="way", values="speedup", sort=False).reset_index().head(MOST)
    table = _shown(wide, {"model": ("checkpoint", str)} | {way: (way, _one) for way in wide.columns[1:]})
    title = f"The fastest {_name(model)}, {best.checkpoint} in {best.way}, is {_one(best.speedup)} times as fast as "
    title += "the dense one in PyTorch’s eager mode"
    picture, shows = study.picture(f"speedup-{model}"), "Times as fast as dense; thin lines: promised by the MACs."
    note = f"Times as fast as the dense model, eager in float32, in batches of {batch:g} images."
    return title, table, dict(picture=picture, shows=shows, note=note)


def _meters(study):
    rows = study.read("meters")
    meters = [column for column in rows if column.endswith(" / macs")]
    rows = rows.melt(["model"], meters, "meter", "ratio").dropna().assign(off=lambda r: 100 * (r.ratio - 1))
    rows = rows.assign(meter=rows.meter.str.removeprefix("macs_").str.removesuffix(" / macs"))
    found = rows.groupby(["meter", "model"], sort=False).off.agg(["min", "max"]).reset_index().head(MOST + 1)
    said = []
    for meter, own in found.groupby("meter", sort=False):
        low, high = own["min"].min(), own["max"].max()
        most = f"{_one(max(-low, high))}\u00a0% {'fewer' if -low > high else 'more'}"
        said.append(f"{meter} counts the same" if low == high == 0 else f"{meter} up to {most}")
    columns = {"meter": ("meter", str), "model": ("model", _name), "least (%)": ("min", _signed)}
    table = _shown(found, columns | {"most (%)": ("max", _signed)})
    note = "Difference to vitlab’s closed form over all models timed. torchprofile counts norms, too; thop leaves out "
    title = f"Against the closed form of MACs, {', '.join(said)}"
    return title, table, dict(note=note + "the two matrix products of attention.")


def _method(study):
    rows, data = study.results, study.read("table-data").drop_duplicates("split")
    counts = dict(zip(data.split, data.images, strict=True))
    top1 = study.dense.top1.max() / 100
    error, seeds = _two(100 * math.sqrt(top1 * (1 - top1) / counts["test"])), _known(rows, "seed")
    facts = {
        "images (train, val, test)": ", ".join(f"{counts.get(split, 0):,}" for split in ("train", "val", "test")),
        f"standard error of {_one(100 * top1)} % top-1": f"{error} points",
        "seeds": f"{', '.join(seeds)} ({len(seeds)} in all), split {', '.join(_known(rows, 'split_seed'))}",
        "MACs": "multiply-accumulates of one image, closed form; FLOPs = 2 × MACs; masked models execute all",
        "time": _how_timed(study) if rows.latency_ms.notna().any() else "not measured",
        "choice": "scores from training images, the best epoch by val; top-1 is on test where nothing else is said",
        "software": f"torch {', '.join(_known(rows, 'torch'))}, timm {', '.join(_known(rows, 'timm'))}",
        "commit": ", ".join(_known(rows.sort_values("date"), "commit")),
    }
    table = pd.DataFrame(facts.items(), columns=["method", study.folder.name])
    title = f"From {counts['test']:,} test images a top-1 has a standard error of {error} points; "
    title += "one seed does not show how trainings differ" if len(seeds) == 1 else f"means are over {len(seeds)} seeds"
    return title, table, {}


def _plan(study):
    """(function, its arguments after the study) of each slide, in their order."""
    each = [(model, *budget) for model in study.models for budget in study.budgets(model)]
    each.sort(key=lambda one: -one[2])
    yield from [(_title, ()), (_dense, ())]
    for build in (_sensitivity, _agreement, _criteria, _global_pruning, _training, _weights, _heads_svd_iht):
        yield from ((build, (model,)) for model in study.models)
    yield from ((_budget, one) for one in each)
    yield _recovered, ()
    yield from ((_audit, (model,)) for model in study.models)
    yield from ((_classes, one) for one in each)
    yield from ((_front, (model, cost)) for cost in ("macs", "bytes_disk") for model in study.models)
    for build in (_best, _speed):
        yield from ((build, (model,)) for model in study.models)
    yield _zeros, ()
    yield from ((_runtimes, (model,)) for model in study.models)
    yield from [(_meters, ()), (_method, ())]


def slides(folder):
    """List of Slide of a folder of tables and pictures; what is missing is said and its slide left out.

    Raises FileNotFoundError where results.csv is missing.
    """
    study, found = Study(folder), []
    for build, of in _plan(study):
        study.used = ["results.csv"] if build in (_title, _method, _front) else []
        try:
            title, table, options = build(study, *of)
        except Absent as reason:
            record.say(f"no slide {' '.join(map(str, (build.__name__.strip('_'), *of)))}: {reason}")
            continue
        found.append(Slide(title, table, study.source(*of[:1]), **options))
    return found


# -- PowerPoint


@functools.cache
def _font():
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 100)


@functools.cache
def _length(text):
    return _font().getlength(text) / 100


def _width(text, size, bold=False):
    """Inches that a line in points of Arial takes at most, from DejaVu Sans, which matplotlib brings: Arial's words are
    0.88 as wide, bold ones 0.95."""
    return (1 if bold else 0.92) * _length(text) * size / 72


def _lines(text, size, width, bold=False):
    """Lines that text takes, broken at spaces; inf where a word is wider than width (inches)."""
    count, used = 1, 0.0
    for word in text.split(" "):
        if _width(word, size, bold) > width:
            return math.inf
        if used + _width(word, size, bold) > width:
            count, used = count + 1, 0.0
        used += _width(word + " ", size, bold)
    return count


def _fit_text(text, sizes, width, height, bold=False):
    """The largest of sizes (points) at which text fits into width and height (inches), else the smallest."""
    return next((size for size in sizes if _lines(text, size, width, bold) * 1.2 * size / 72 <= height), sizes[-1])


def _fit_table(table, largest, rooms, height):
    """(size in points, widths of columns, heights of rows in inches), as large as fits but not more.

    rooms: widths to try, inches. Headers, which are bold, break at spaces, mostly into two lines. Cells do where none
    of the six largest sizes fits without: then the widest column gives way. None where 8 points do not fit.
    """
    rows, pad = [[*table.columns], *table.itertuples(index=False)], 0.2
    whole = [(size, rooms[0], False) for size in range(largest, largest - 6, -1)] + [(largest - 5, rooms[-1], False)]
    for size, room, wrap in [*whole, *((size, rooms[-1], True) for size in range(largest - 5, 7, -1))]:
        widths = []
        for name in table:
            line, longest = _width(name, size, True), max(_width(word, size, True) for word in name.split(" "))
            header = max(longest, min(line, max(line / 2, _width("0" * 7, size))))
            widths.append(max(header, *(_width(cell, size) for cell in table[name])) + pad)
        widest = widths.index(max(widths))
        widths[widest] -= max(0, sum(widths) - room) if wrap else 0
        lines = [
            max(_lines(cell, size, wide - pad + 1e-6, i == 0) for cell, wide in zip(row, widths, strict=True))
            for i, row in enumerate(rows)
        ]
        heights = [1.2 * size / 72 * count + 0.1 for count in lines]
        if sum(widths) <= room + 1e-6 and sum(heights) <= height:
            return size, widths, heights
    return None


def _ratio(picture):
    """Width over height of a picture file."""
    with Image.open(picture) as image:
        return image.width / image.height


def _arrange(one, top, height):
    """Where the table of a slide goes, (left, top), what `_fit_table` says of it, and (width, height) of the picture,
    all in inches between top and top + height: side by side, or the table below if the picture is larger then.

    Raises ValueError for a table that fits neither way.
    """
    choices = []
    if one.picture is None:
        if fit := _fit_table(one.table, 22, [12.33], height):
            stretched = [width * min(1.5, 12.33 / sum(fit[1])) for width in fit[1]]
            choices.append(((0.5, top), (fit[0], stretched, fit[2]), (0, 0)))
    else:
        ratio = _ratio(one.picture)
        spare = 11.93 - ratio * (height - 0.35)  # what a narrow picture leaves to the table
        if fit := _fit_table(one.table, 16, [max(most, spare) for most in (5, 6)], height):
            wide = min(11.93 - sum(fit[1]), ratio * (height - 0.35))
            choices.append(((12.83 - sum(fit[1]), top), fit, (wide, wide / ratio)))
        if fit := _fit_table(one.table, 13, [12.33], height - 1):
            wide = min(12.33, ratio * (height - 0.5 - sum(fit[2])))
            choices.append(((0.5, top + wide / ratio + 0.45), fit, (wide, wide / ratio)))
    if not choices:
        raise ValueError(f"a table is too large for its slide: {one.title}")
    return max(choices, key=lambda choice: choice[2][0])


def _is_number(cells):
    return all(re.fullmatch(r"[+−]?[\d.,]*(\u00a0%)?", cell) for cell in cells)


def to_pptx(found, *, title, date):
    """Bytes of a .pptx, 13.33 x 7.5 inches, of a list of Slide. title, date ("2026-11-24"): of the file's properties.

    Tables are native, pictures the png as it is, in full resolution. Raises ModuleNotFoundError without python-pptx.
    """
    import pptx
    from pptx.enum.shapes import PP_PLACEHOLDER
    from pptx.util import Inches

    deck = pptx.Presentation()
    for layout in [*deck.slide_layouts, deck.slide_master]:  # the template is 4:3; the master last, as others inherit
        for shape in layout.placeholders:
            place = shape.left * 4 // 3, shape.top, shape.width * 4 // 3, shape.height
            shape.left, shape.top, shape.width, shape.height = place
    deck.slide_width, deck.slide_height = Inches(13.333), Inches(7.5)
    about = deck.core_properties
    about.title, about.author, about.last_modified_by = title, "vitlab", "vitlab"
    about.created = about.modified = pd.Timestamp(date).to_pydatetime()
    plain = deck.slide_layouts[5]  # a title alone
    (number,) = [shape for shape in plain.placeholders if shape.placeholder_format.type == PP_PLACEHOLDER.SLIDE_NUMBER]
    number.left, number.top, number.width, number.height = map(Inches, (12.2, 6.8, 0.63, 0.25))
    for one in found:
        slide = deck.slides.add_slide(plain)
        slide.shapes._spTree.append(copy.deepcopy(number._element))  # python-pptx leaves it in the layout
        _write(slide.shapes.title, one.title, (0.5, 0.3, 12.33, 1.05), range(28, 17, -1), bold=True)
        top, height = 1.5, 4.7 if one.note else 5.2
        place, fit, (wide, high) = _arrange(one, top, height)
        _write_table(slide, one.table, place, *fit)
        if one.picture:
            drawn = slide.shapes.add_picture(str(one.picture), *map(Inches, (0.5, top, wide, high)))
            drawn._element.nvPicPr.cNvPr.set("descr", one.shows)
            _write(_box(slide), one.shows, (0.5, top + high + 0.05, wide, 0.3), range(11, 6, -1), grey=True)
        if one.note:
            _write(_box(slide), one.note, (0.5, 6.3, 12.33, 0.45), range(12, 6, -1))
        _write(_box(slide), one.source, (0.5, 6.85, 11.6, 0.4), range(10, 5, -1), grey=True)
    made, same = io.BytesIO(), io.BytesIO()
    deck.save(made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(same, "w") as new:
        for name in old.namelist():  # a ZipInfo is of 1980, whenever it is made
            new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)
    return same.getvalue()


def _box(slide):
    return slide.shapes.add_textbox(0, 0, 0, 0)


def _write(shape, text, place, sizes, *, bold=False, grey=False):
    """text into a shape at place (left, top, width, height in inches), as large as fits."""
    from pptx.enum.text import MSO_ANCHOR, MSO_AUTO_SIZE
    from pptx.util import Inches

    shape.left, shape.top, shape.width, shape.height = map(Inches, place)
    frame = shape.text_frame
    frame.margin_left = frame.margin_right = frame.margin_top = frame.margin_bottom = 0
    frame.word_wrap, frame.auto_size = True, MSO_AUTO_SIZE.NONE
    frame.vertical_anchor = MSO_ANCHOR.MIDDLE if bold else MSO_ANCHOR.TOP
    size = _fit_text(text, sizes, *place[2:], bold=bold)
    _say(frame, text, size, color="666666" if grey else "1A1A1A", bold=bold)


def _say(frame, text, size, *, color, bold=False, right=False):
    """One paragraph, as all of the text of a frame. size: points."""
    from pptx.dml.color import RGBColor
    from pptx.enum.text import PP_ALIGN
    from pptx.util import Pt

    paragraph = frame.paragraphs[0]
    paragraph.alignment = PP_ALIGN.RIGHT if right else PP_ALIGN.LEFT
    run = paragraph.add_run()
    run.text = text or "\u00a0"  # an empty cell would be as high as the template's text
    run.font.name, run.font.size, run.font.bold = "Arial", Pt(size), bold
    run.font.color.rgb = RGBColor.from_string(color)


def _write_table(slide, table, place, size, widths, heights):
    """A native table at place (left, top): numbers at the right, the header dark, every second row tinted."""
    from pptx.dml.color import RGBColor
    from pptx.enum.text import MSO_ANCHOR
    from pptx.util import Inches

    sides = map(Inches, (*place, sum(widths), sum(heights)))
    grid = slide.shapes.add_table(len(heights), len(widths), *sides).table
    for line, height in zip(grid.rows, heights, strict=True):
        line.height = Inches(height)
    for i, (name, width) in enumerate(zip(table, widths, strict=True)):
        grid.columns[i].width = Inches(width)
        for j, text in enumerate([name, *table[name]]):
            cell = grid.cell(j, i)
            cell.margin_left = cell.margin_right = Inches(0.08)
            cell.margin_top = cell.margin_bottom = Inches(0.04)
            cell.vertical_anchor = MSO_ANCHOR.MIDDLE
            cell.fill.solid()
            cell.fill.fore_color.rgb = RGBColor.from_string(["F2F2F2", "FFFFFF"][j % 2] if j else "404040")
            color = "1A1A1A" if j else "FFFFFF"
            _say(cell.text_frame, text, size, color=color, bold=j == 0, right=_is_number(table[name]))


# -- HTML

STYLE = """
html { scroll-snap-type: y proximity; font: 16px/1.35 Arial, Helvetica, sans-serif; color: #1a1a1a; }
body { margin: 0; }
section { box-sizing: border-box; min-height: 100vh; padding: 3vh 4vw 2vh; scroll-snap-align: start;
  display: flex; flex-direction: column; gap: 1.5vh; border-bottom: 1px solid #ddd; }
h2 { margin: 0; font-size: clamp(1.2rem, 2.1vw, 2.4rem); line-height: 1.2; }
.body { flex: 1; display: flex; gap: 2vw; align-items: flex-start; }
figure { margin: 0; flex: 1 1 0; min-width: 0; }
img { display: block; width: 100%; height: auto; max-height: 66vh; object-fit: contain; object-position: left top; }
.tall { flex-direction: column; }
.tall figure { flex: none; width: 100%; }
.tall figure + .table { max-width: 100%; }
figcaption, footer { color: #666; font-size: clamp(0.7rem, 0.85vw, 1rem); }
.table { max-width: 100%; overflow-x: auto; }
figure + .table { flex: 0 1 auto; max-width: 46%; }
table { border-collapse: collapse; font-size: clamp(0.75rem, 1vw, 1.3rem); }
.alone table { font-size: clamp(0.8rem, 1.5vw, 2rem); }
th, td { padding: 0.35em 0.6em; text-align: left; vertical-align: middle; }
th { background: #404040; color: #fff; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td:first-child { white-space: nowrap; }
tr:nth-child(even) td { background: #f2f2f2; }
p { margin: 0; font-size: clamp(0.75rem, 0.95vw, 1.1rem); }
@media screen and (max-width: 60rem) { section { min-height: 0; padding: 1rem; } .body { flex-direction: column; }
  figure, figure + .table { flex: none; width: 100%; max-width: 100%; } html { scroll-snap-type: none; } }
@media print { @page { size: 13.33in 7.5in; margin: 0; } html { font-size: 12px; }
  section { height: 7.5in; min-height: 0; break-after: page; break-inside: avoid; border: 0;
    padding: 0.4in 0.5in 0.2in; }
  img { max-height: 4.6in; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
SCRIPT = """
addEventListener("keydown", event => {
  const step = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1 }[event.key];
  if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = [...document.querySelectorAll("section")];
  const now = all.findIndex(one => one.getBoundingClientRect().bottom > innerHeight / 2);
  event.preventDefault();
  all[Math.min(Math.max(now + step, 0), all.length - 1)].scrollIntoView();
});
"""


def to_html(found, *, title):
    """One HTML page of a list of Slide that asks no server for anything: pictures are within it, the svg where it is
    the smaller file. Arrow keys go from slide to slide; printed, each is a page. title: of the window."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
    ]
    for number, one in enumerate(found, 1):
        kind = "" if one.picture and _ratio(one.picture) < 2.5 else " tall" if one.picture else " alone"
        shows = f"<figcaption>{html.escape(one.shows)}</figcaption>"
        drawn = f"<figure>{_image(one)}{shows}</figure>" if one.picture else ""
        parts += [
            f'<section id="slide-{number}">\n<h2>{html.escape(one.title)}</h2>',
            f'<div class="body{kind}">{drawn}',
            f'<div class="table">{_html_table(one.table)}</div>\n</div>',
            f"<p>{html.escape(one.note)}</p>" if one.note else "",
            f"<footer>{html.escape(one.source)} {number} / {len(found)}</footer>\n</section>",
        ]
    return "\n".join([*parts, f"<script>{SCRIPT}</script>\n</body>\n</html>\n"])


def _image(one):
    """The picture of a slide as an img with its data within."""
    files = {"svg+xml": one.picture.with_suffix(".svg"), "png": one.picture}
    kind, path = min(((k, p) for k, p in files.items() if p.is_file()), key=lambda pair: pair[1].stat().st_size)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(one.shows)}" src="data:image/{kind};base64,{data}">'


def _html_table(table):
    sides = [' class="number"' if _is_number(table[name]) else "" for name in table]

    def line(cells, tag):
        marked = [f"<{tag}{s}>{html.escape(c)}</{tag}>" for c, s in zip(cells, sides, strict=True)]
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(line(row, "td") for row in table.itertuples(index=False))
    return f"<table>\n<thead>{line(table, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def write(folder, out=None):
    """Write slides.html and slides.pptx of a folder of tables and pictures into out (default: its folder `slides`).

    Returns both paths. Raises FileNotFoundError for a folder without results.csv and ModuleNotFoundError without
    python-pptx, then with slides.html written.
    """
    found, out = slides(folder), Path(out or Path(folder) / "slides")
    title, dates = found[0].title, re.findall(r"\d{4}-\d\d-\d\d", found[0].source)
    record.write_atomic(out / "slides.html", to_html(found, title=title))
    record.write_atomic(out / "slides.pptx", to_pptx(found, title=title, date=[*dates, "2000-01-01"][0]))
    record.say(f"{len(found)} slides: {out / 'slides.pptx'}, {out / 'slides.html'}")
    return out / "slides.pptx", out / "slides.html"


def main(arguments=None):
    """python -m vitlab.deck STUDY [--out FOLDER]: the slides of figures/STUDY. Returns the exit status, 0 or 1."""
    parser = argparse.ArgumentParser("python -m vitlab.deck", description=__doc__.split("\n")[0])
    parser.add_argument("study", help="name of a study, or path of its .yaml file: the slides of figures/<its name>")
    parser.add_argument("--out", help="where they are written (default: figures/<study>/slides)")
    asked = parser.parse_args(arguments)
    try:
        name = re.sub(r"\.ya?ml$", "", Path(asked.study).name)
        write(record.repository() / "figures" / name, asked.out)
    except FileNotFoundError as error:
        print(f"vitlab.deck: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"vitlab.deck: no slides.pptx, as {error.name} is missing: pip install python-pptx", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
