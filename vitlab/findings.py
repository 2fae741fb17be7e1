"""What the tables of figures/<study>/ say: one finding a slide, and the results that pages show. No torch.

A finding is a sentence whose numbers all stand in the table beside it. The numbers choose the sentence, so that it
holds for any study. `python -m vitlab.findings README.md` writes tables of results into pages, between their marks.
"""

import argparse
import contextlib
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from vitlab import plots, record

MOST = 8  # rows of a slide's table
TRUSTED = 0.5  # rank correlation from which a score is said to rank units
PARTS = {0.25: "a quarter of the", 0.5: "half the", 0.75: "three quarters of the"}
BUDGETS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "measured time"}
COSTS = BUDGETS | {"bytes_disk": "bytes on disk", "relative_latency": "measured time"}
WHAT = {"unstructured": "weights", "structured": "rows"}
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
    """One finding. title: a sentence. table: strings, 1 to 9 rows. picture: path of a png, perhaps with an svg beside
    it; shows: what is on it. note: how to read the table. source: files, study, seeds, machine, commit."""

    title: str
    table: pd.DataFrame
    picture: Path | None = None
    shows: str = ""
    note: str = ""
    source: str = ""


class Absent(Exception):
    """A slide cannot be made; says what is missing."""


# -- words and numbers


def _name(model):
    return re.sub(r"\bvit\b", "ViT", re.sub(r"\bswin\b", "Swin", str(model)))


def _one(value, digits=1, sign=""):
    """With digits after the point; halves go away from zero, as on paper: 84.05 is 84.1. sign: "+" says it always, but
    nought has none."""
    text = f"{value + math.copysign(1e-9, value):{sign}z,.{digits}f}".replace("-", "−")
    return text if text.strip("+0.") else text.removeprefix("+")


def _share(value):
    return f"{100 * value:.3g}\u00a0%"


def _millions(value):
    return _one(value / 1e6, 2 if value < 1e7 else 1)


_two, _three, _signed = partial(_one, digits=2), "{:.3f}".format, partial(_one, sign="+")
_plain = "{:g}".format

# fmt: off
COLUMNS = {  # of tables: header, and how a value is written
    "after": ("cut (%)", _one), "arrives": ("arrives", _share), "asked": ("cut", str),
    "back": ("won back, no training", _one), "before": ("dense (%)", _one), "change": ("change (points)", _signed),
    "checkpoint": ("model", str), "cost": ("of the dense", COSTS.get), "criterion": ("score", str),
    "cut": ("after the cut (%)", _one), "cuts": ("cuts", _plain), "epoch": ("epoch", _plain),
    "epochs": ("epochs", _plain), "finetuned": ("fine-tuned (%)", _one),
    "ideal": ("promised if zeros were free", _one), "images": ("images", _plain),
    "increase": ("loss (nats)", partial(_signed, digits=3)), "kind": ("cut", str), "layer": ("layer", str),
    "left": ("won back, fine-tuned", _one), "limit": ("at most", _share), "lost": ("points lost", _one),
    "macs": ("MACs (M)", _millions), "max": ("most (%)", _signed), "mean_per_class": ("mean of classes (%)", _one),
    "meter": ("meter", str), "method": ("cut", str), "min": ("least (%)", _signed), "model": ("model", _name),
    "named": ("class", str), "params": ("parameters (M)", _millions), "promised": ("promised by the MACs", _one),
    "ratio": ("share cut", _share), "seeds": ("seeds", _plain), "series": ("cut", str),
    "share": ("MACs of dense", _share),
    "spearman": ("rank correlation", _two), "speedup": ("measured (times as fast)", _one),
    "spread_finetuned": ("spread, fine-tuned", _three), "spread_pruned": ("spread, pruned", _three),
    "spread_unpruned": ("spread, unpruned", _three), "stage": ("stage", lambda stage: plots.STAGES.get(stage, stage)),
    "target": ("share cut", _share), "target_kind": ("of the", COSTS.get),
    "times": ("measured / predicted", lambda value: f"{value:.2g}" if value < 100 else f"{value:,.0f}"),
    "top1": ("top-1 (%)", _one), "train_top1": ("training (%)", _one), "trained": ("fine-tuned (%)", _one),
    "training_mb": ("training memory (MB)", "{:,.0f}".format), "untrained": ("untrained (%)", _one),
    "untrained_change": ("change (points)", _signed), "val_top1": ("val (%)", _one),
    "zero_finetuned": ("zeros, fine-tuned", _share), "zero_pruned": ("zeros, pruned", _share),
    "zeros": ("zeros among all parameters", _share),
}
# fmt: on


def _written(column, value):
    return "" if pd.isna(value) else COLUMNS.get(column, (column, str))[1](value)


def _say(sentence, rows):
    """sentence with a row's values, written as in tables, in the place of {column}; {moved} is its change in words.
    Of a frame: the sentences of all its rows, "and" between them."""
    if isinstance(rows, pd.DataFrame):
        return " and ".join(_say(sentence, row) for _, row in rows.iterrows())
    moved = {"moved": _moved(rows["change"])} if "change" in rows else {}
    return sentence.format_map({name: _written(name, value) for name, value in rows.items()} | moved)


def _moved(points):
    """Words for a change of top-1, in percentage points."""
    verb = "changes" if _signed(points) == "0.0" else "rises" if points > 0 else "falls"
    return f"{verb} by {_one(abs(points))} points"


def _asked(names, targets):
    """Names of cuts with what was asked of them."""
    return names + targets.map(lambda target: "" if pd.isna(target) else f", {_share(target)}")


def _part(target, kind):
    """Words such as "half the MACs" and "60 % of the bytes"."""
    return f"{PARTS.get(target, _share(target) + ' of the')} {COSTS[kind]}"


def _meaning(names):
    return "; ".join(f"{name}: {WORDS[name]}" for name in dict.fromkeys(names) if name in WORDS)


def _known(rows, column):
    """What a column holds, as strings, once each and in their order; whole numbers without a point."""
    found = rows[column].dropna() if column in rows else []
    return [_plain(value) if isinstance(value, float) else str(value) for value in dict.fromkeys(found)] or ["unknown"]


def _list(rows, column):
    return ", ".join(_known(rows, column))


def _mean(rows, keys):
    """Means over seeds, in the order of the rows, and `seeds`: over how many, where it is known."""
    groups = rows.groupby(keys, sort=False, dropna=False)
    found = groups.mean(numeric_only=True)
    return (found.assign(seeds=groups.seed.nunique()) if "seed" in rows else found).reset_index()


def _ranked(rows):
    """Those of the most seeds: means over fewer are not ranked with them. Random controls only where all are."""
    rows = rows[rows.seeds == rows.seeds.max()]
    chosen = rows[[not plots.is_random(name) for name in rows.series]] if "series" in rows else rows
    return rows if chosen.empty else chosen


def _rank_note(rows):
    """A sentence for a note where some rows have fewer seeds than others."""
    said = f" Ranked: cuts of {rows.seeds.max():g} seeds"
    said += "; change: against the dense models of a cut’s own seeds." if "change" in rows else "."
    return said if rows.seeds.nunique() > 1 else ""


def _some(rows):
    """rows. Raises Absent where there are none."""
    if rows.empty:
        raise Absent("there are no rows for it")
    return rows


def _ends(rows):
    """The first and the last of rows, MOST in all."""
    return pd.concat([rows.head(MOST // 2), rows.tail(min(MOST // 2, max(0, len(rows) - MOST // 2)))])


def _shown(rows, columns, **headers):
    """A slide's table of some columns, those without any value left out, and `seeds` where all rows have as many.
    headers: in the place of those of COLUMNS. Raises Absent for no rows."""
    rows = _some(rows)[[name for name in columns.split() if name in rows]]
    cells = rows.apply(lambda column: column.map(lambda value: _written(column.name, value))).reset_index(drop=True)
    said = cells.ne("").any() & ((cells.columns != "seeds") | (cells.nunique() > 1))
    return cells.loc[:, said].rename(columns=lambda name: headers.get(name, COLUMNS[name][0]))


def _crossed(rows, down, across, value, **headers):
    """A slide's table of one column's values: a row for each value of `down`, a column for each of `across`."""
    wide = rows.pivot_table(index=down, columns=across, values=value, sort=False).head(MOST)
    cells = wide.map(lambda one: _written(value, one))
    cells = cells.loc[:, cells.ne("").any()].reset_index(names=headers.get(down, COLUMNS[down][0]))
    return cells.rename_axis(columns=None)


class Study:
    """A folder of tables and pictures, read as they are asked for. Raises FileNotFoundError, with the commands that
    make them, where there is no results.csv.

    .results: all of its rows; .untimed: one per model measured; .models: those that were cut; .dense: means over seeds
    of the dense models' rows, by model; .used, .seen: names of the files read since they were last emptied, and the
    frames with seeds in them.
    """

    def __init__(self, folder):
        self.folder, self.used, self.seen = Path(folder), [], []
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

    def read(self, name, model=None, *, by=None):
        """The frame of name.csv, or its rows of one model; by: columns over whose equal values the mean is taken.
        Raises Absent without file or rows."""
        path = self.folder / f"{name}.csv"
        if not path.is_file():
            raise Absent(f"{path.name} is missing")
        frame = pd.read_csv(path)
        frame = frame if model is None else frame[frame.model == model].reset_index(drop=True)
        if frame.empty:
            raise Absent(f"{path.name} has no rows of {model}")
        self.used.append(path.name)
        self.seen += [frame] if "seed" in frame else []
        return _mean(frame, by) if by else frame

    def picture(self, name):
        """Path of name.png. Raises Absent without it."""
        if not (self.folder / f"{name}.png").is_file():
            raise Absent(f"{name}.png is missing")
        self.used.append(f"{name}.png")
        return self.folder / f"{name}.png"

    def summary(self, model, kinds, target=None):
        """Rows of summary.csv of these target_kinds (and target), with every stage as a column; `series`; solved and
        trained, the best of SOLVED and TRAINED; change: trained against dense, points; share: MACs against dense, which
        are the same for all seeds; seeds: how many, also those of dense (older tables are of one)."""
        rows = self.read("summary", model)
        rows = rows.reindex(columns=rows.columns.union([*plots.STAGES, "macs"], sort=False))
        rows = _some(rows[rows.target_kind.isin(kinds) & (rows.target.eq(target) if target else True)])
        rows = rows.assign(solved=rows[SOLVED].max(axis=1), trained=rows[TRAINED].max(axis=1))
        shares = rows.macs / rows.model.map(self.dense.macs)
        rows = rows if "seeds" in rows else rows.assign(seeds=1)
        return rows.assign(series=plots.series(rows), change=rows.trained - rows.dense, share=shares)

    def timed(self, model=None):
        """Rows of efficiency.csv, means over seeds, with `series`; promised by the MACs, ideal (if zeros were free),
        times as fast as dense; arrives: measured speedup over promised."""
        rows = self.read("efficiency", model, by=["model", "method", "form", "target_kind", "target"])
        whole = rows.model.map(rows[rows.method == "dense"].groupby("model").macs.mean())
        rows = rows.assign(promised=whole / rows.macs, ideal=whole / rows.macs_ideal)
        rows = _some(rows[(rows.method != "dense") & rows.speedup.notna()])
        return rows.assign(series=plots.series(rows), arrives=rows.speedup / rows.promised)

    def how_timed(self):
        """Words for what the times are of."""
        rows = self.results[self.results.latency_ms.notna()]
        rows = rows[rows.batch == rows.batch.max()]
        return (
            f"Batches of {rows.batch.max():g} images, threads: {' or '.join(_known(rows, 'threads'))}; "
            f"{_list(rows, 'precision')}; medians of ratios within rounds that time all models in turns."
        )

    def budgets(self):
        """[(model, target_kind, target)] of all budgets below 1, the mildest first, then as models stand."""
        rows = self.untimed[self.untimed.model.isin(self.models) & self.untimed.target_kind.isin([*BUDGETS])]
        found = rows[rows.top1.notna() & (rows.target < 1)][["model", "target_kind", "target"]].drop_duplicates()
        found = found.sort_values("model", key=lambda column: column.map(self.models.index), kind="stable")
        return list(found.sort_values("target", ascending=False, kind="stable").itertuples(index=False, name=None))

    def source(self, model=None, rows=None):
        """Where a slide comes from: the files used, and data, seeds, machine, commits and date of the rows.

        rows: of results, if not all of the model. Seeds are those of the tables used, of a cut of fewer its own.
        """
        seen = [rows] if rows is not None else self.seen
        if rows is None:
            rows = self.results if model is None else self.results[self.results.model == model]
        rows = rows.sort_values("date", kind="stable")
        seen = seen if seen and "results.csv" not in self.used else [rows, *seen]
        seeds = max(map(plots.seeds_of, seen), key=len)
        commits = _known(rows, "commit")
        if len(commits) > 3:
            commits = [f"{commits[0]} … {commits[-1]} ({len(commits)} in all)"]
        return (
            f"Source: {', '.join(dict.fromkeys(self.used))}. Study {self.folder.name}, {_list(rows, 'data')}, "
            f"{'means over seeds' if ',' in seeds else 'seed'} {seeds}, split "
            f"{_list(rows, 'split_seed')}; {_list(rows, 'device')}; commit {', '.join(commits)}; "
            f"{_known(rows, 'date')[-1][:10]}."
        )


# -- one function a finding


def _title(study):
    rows, dates = study.results, sorted(_known(study.results, "date"))
    names = [_name(model) for model in study.models or study.dense.index]
    facts = {
        "data": _list(rows, "data"),
        "dense models": ", ".join(f"{_name(model)} {_one(top1)} % top-1" for model, top1 in study.dense.top1.items()),
        "seeds": _list(rows, "seed"),
        "device": _list(rows, "device"),
        "commit": _list(rows.sort_values("date"), "commit"),
        "date": " to ".join(dict.fromkeys([dates[0][:10], dates[-1][:10]])),
    }
    table = pd.DataFrame(facts.items(), columns=["study", study.folder.name])
    return Slide(f"What pruning does to {' and '.join(names)} on {facts['data']}", table)


def _dense(study):
    rows = plots.beside_dense(study.read("dense"), "top1")
    rows = rows.assign(change=(rows.top1 - rows.dense_top1).where(rows.stage != "dense"))
    rows = _mean(rows, ["model", "stage", "epochs"]).head(MOST)
    whole = rows[rows.stage == "dense"].groupby("model", sort=False).top1.mean()
    said = f"The dense {_name(whole.idxmax())} reaches {_one(whole.max())}\u00a0% top-1"
    more = rows[(rows.stage != "dense") & (rows.model == whole.idxmax())].head(1)
    said += _say(", which {moved} in {epochs} more epochs without a cut", more)
    table = _shown(rows, "model stage epochs top1 change mean_per_class params macs seeds", stage="training")
    note = "“Dense, same epochs” is the control: what as many epochs as the cut models get do to the dense model."
    return Slide(said, table, note=note)


def _sensitivity(study, model):
    rows = study.read("table-curves", model, by=["ratio", "layer"])
    rows = rows[rows.ratio == rows.ratio.max()].sort_values("increase", ascending=False)
    median = pd.DataFrame([(rows.ratio.max(), f"median of {len(rows)} layers", rows.increase.median())])
    median.columns = ["ratio", "layer", "increase"]
    table = _shown(pd.concat([rows.head(MOST - 2), median, rows.tail(1)]), "layer ratio increase")
    said = f"Cutting {{ratio}} of {{layer}} alone changes the loss of the {_name(model)} by {{increase}} nats, of the "
    said = _say(said + "median layer by ", rows.iloc[0]) + _say("{increase}", median.iloc[0])
    shows = _say("Rise of the loss when one layer alone loses {ratio} of its weights, by block and role.", rows.iloc[0])
    return Slide(said, table, study.picture(f"sensitivity-{model}"), shows)


def _agreement(study, model):
    rows = study.read("table-agreement", model, by=["criterion", "kind"]).dropna(subset="spearman")
    said = []
    for _, best in rows.loc[_some(rows).groupby("kind").spearman.idxmax()].iterrows():
        trusted = "{criterion} for {kind} (rank correlation {spearman})"
        said.append(_say(trusted if best.spearman >= TRUSTED else "no score for {kind} ({spearman} at most)", best))
    said = f"What it costs the {_name(model)} to lose a unit is ranked by {', by '.join(said)}"
    table = _crossed(rows, "kind", "criterion", "spearman", kind="")
    shows = "Rank correlation between score and measured rise of the loss when one unit goes."
    note = f"Rank correlations are in [−1, 1]; random is what chance gives. Below {TRUSTED} no score is named."
    return Slide(said, table, study.picture(f"agreement-{model}"), shows, note)


def _criteria(study, model):
    rows = study.read("table-criteria", model, by=["criterion", "method", "target"]).replace({"method": WHAT})
    most = rows[rows.target == rows.target.max()]
    best = most.loc[most.groupby("method", sort=False).val_top1.idxmax()]
    said = "{val_top1}\u00a0% by {criterion} with {target} of its {method} cut"
    table = _crossed(rows.assign(asked=_asked(rows.method, rows.target)), "criterion", "asked", "val_top1")
    note = "Top-1 (%) on val right after the cut, masked, by score and share cut."
    return Slide(f"Before any training, the {_name(model)} keeps at best {_say(said, best)}", table, note=note)


def _global_pruning(study, model):
    rows = study.summary(model, ["sparsity"])
    rows = rows[rows.method.isin(WHAT) & rows.finetuned.notna()].assign(change=rows.finetuned - rows.dense).tail(MOST)
    words = {"unstructured": "of the weights masked", "structured": "of the rows cut"}
    most = _ranked(rows)
    most = most[most.target == most.target.max()].drop_duplicates("method").sort_values("method", ascending=False)
    said = _say("{moved} with {target} {words}", most.assign(words=most.method.map(words)))
    table = _shown(rows, "series target cut finetuned change macs seeds")
    shows = "Test top-1 after the cut and after each step of recovery; lines: the dense model."
    note = f"Masked models execute all MACs. Change: fine-tuned against dense. {_meaning(rows.method)}."
    said = f"Fine-tuned, the {_name(model)}’s top-1 {said}"
    return Slide(said, table, study.picture(f"recovery-{model}"), shows, note + _rank_note(rows))


def _training(study, model):
    rows = study.read("training", model, by=["method", "target", "epoch"])
    rows = rows[rows.method.isin(WHAT)].tail(MOST)
    table = _shown(rows, "method target epoch train_top1 val_top1 training_mb")
    last = rows[rows.epoch == rows.epoch.max()]
    ranges = [f"{_one(last[name].min())} to {_one(last[name].max())}\u00a0%" for name in ("train_top1", "val_top1")]
    said = f"After {rows.epoch.max():g} epochs of fine-tuning the masked {_name(model)} is right on {ranges[0]} "
    said += f"of the training images and {ranges[1]} of val"
    shows, note = "Top-1 on training images over the epochs of fine-tuning.", _meaning(rows.method) + ", all masked."
    return Slide(said, table, study.picture(f"training-{model}"), shows, note)


def _weights(study, model):
    rows, keys = study.read("table-distributions", model), ["method", "target", "stage"]
    rows = rows[rows.role == "all"].assign(square=lambda r: r["count"] * ((r.left + r.right) / 2) ** 2)
    zeros = rows.groupby([*keys, "seed"]).zeros.first().groupby(keys).sum()
    sums = rows.groupby(keys)[["count", "square"]].sum().assign(zeros=zeros)
    sums = sums.assign(zero=sums.zeros / (sums.zeros + sums["count"]), spread=(sums.square / sums["count"]) ** 0.5)
    wide = sums[["zero", "spread"]].unstack("stage").sort_index(ascending=False).tail(MOST)
    wide.columns = [f"{what}_{stage}" for what, stage in wide.columns]
    wide = wide.reset_index().assign(asked=lambda r: _asked(r.method, r.target))
    first = wide.loc[wide.target.idxmax()]
    before, after = _share(first.zero_pruned), _share(first.zero_finetuned)
    said = f"keeps all zeros, {after}" if before == after else f"takes the zeros from {before} to {after}"
    said = _say(f"Fine-tuning {said} of the {_name(model)}’s weights ({{method}}, {{target}} cut)", first)
    columns = "asked zero_pruned zero_finetuned spread_unpruned spread_pruned spread_finetuned"
    shows = "Weights of all prunable layers; hatched: exact zeros."
    shows += f" Seed {rows.seed.min()}; the table is of all seeds." if rows.seed.nunique() > 1 else ""
    note = f"Spread: root mean square of the weights that are not zero. {_meaning(wide.method)}."
    return Slide(said, _shown(wide, columns), study.picture(f"weights-{model}"), shows, note)


def _heads_svd_iht(study, model):
    rows = study.summary(model, ["ratio"])
    rows = _some(rows[rows.trained.notna() & (rows.target == rows.target.max())])
    rows = rows.sort_values("seeds", ascending=False, kind="stable").head(MOST)
    table = _shown(rows, "series cut trained change share seeds", series=f"cut, {_share(rows.target.max())}")
    ranked = _ranked(rows)
    best, least = ranked.loc[ranked.change.idxmax()], ranked.loc[ranked.share.idxmin()]
    said = _say("At {target} cut, {series} costs the {model} least: top-1 {moved}, at {share} of the MACs", best)
    said += _say("; with {series}, at {share}, it {moved}", least) if least.series != best.series else ""
    picture, shows = study.picture(f"heads_svd_iht-{model}"), "Test top-1 over the share cut of heads and layers."
    return Slide(said, table, picture, shows, f"{_meaning(rows.method)}.{_rank_note(rows)}")


def _budget(study, model, kind, target):
    rows = study.summary(model, [kind], target)
    rows = rows.assign(untrained=rows[["cut", *SOLVED]].max(axis=1)).dropna(subset="untrained")
    rows = rows.assign(untrained_change=rows.untrained - rows.dense, best=rows[["untrained", "trained"]].max(axis=1))
    rows, count = rows.sort_values(["seeds", "best"], ascending=False, kind="stable").head(MOST), len(rows)
    table = _shown(rows, "series untrained untrained_change trained change seeds", change="change, fine-tuned")
    ranked = _ranked(rows)
    best = ranked.loc[ranked.untrained.idxmax()]
    said = f"With {_part(target, kind)}, the {_name(model)}’s top-1 {_moved(best.untrained_change)} without training"
    said += f" ({best.series})"
    said += _say(" and {moved} fine-tuned ({series})", ranked.sort_values("change").dropna(subset="change").tail(1))
    picture = study.picture(f"ladder-{kind}-{target:g}-{model}")
    shows = "Test top-1 after each step of recovery; hollow: without training."
    note = f"The best of {count} by test top-1, which favours the lucky one a little. {_meaning(rows.series)}."
    return Slide(said, table, picture, shows, note + _rank_note(rows))


def _recovered(study):
    rows = study.summary(None, [*BUDGETS])
    rows = rows[rows.cut.notna() & rows.solved.notna() & (rows.target < 1) & ~rows.series.map(plots.is_random)]
    rows = rows.assign(lost=rows.dense - rows.cut, back=rows.solved - rows.cut, left=rows.trained - rows.cut)
    rows = rows.sort_values(["seeds", "back"], ascending=False, kind="stable").head(MOST)
    table = _shown(rows, "model series target target_kind cut lost back left seeds", target="kept")
    said = "Layers solved anew, without training, win back up to {back} of {lost} points lost ({model}, {series}, "
    said += "{target} kept)"
    if rows.back.iloc[0] <= 0:
        said = "Layers solved anew win nothing back: at best {back} of {lost} points lost"
    note = "Won back: the best of folding, least squares and reconstruction, in points above the model after the cut."
    return Slide(_say(said, rows.iloc[0]), table, note=f"{note} {_meaning(rows.series)}.{_rank_note(rows)}")


def _audit(study, model):
    rows = study.read("audit-spearman", model, by=["criterion", "kind"]).dropna(subset="ratio")
    rows = rows[rows.ratio > 0].rename(columns={"ratio": "times"})
    rows = _ends(rows.sort_values("times", key=lambda times: np.log(times).abs(), kind="stable"))
    table = _shown(rows, "criterion kind cuts spearman times")
    said = f"On the {_name(model)} the loss rises {{times}} times as much as predicted where the score foretells best "
    said = _say(said + "({criterion}, {kind}), ", rows.iloc[0])
    said += _say("{times} times where it does worst ({criterion}, {kind})", rows.iloc[-1])
    shows = "Measured over predicted rise of the loss; on the diagonal the prediction is right."
    over = " of a seed, then means over seeds" if rows.get("seeds", pd.Series([1])).max() > 1 else ""
    note = f"Medians over the cuts{over}, before any recovery; the four nearest to 1 and the four furthest from it."
    return Slide(said, table, study.picture(f"audit-{model}"), shows, note)


def _classes(study, model, kind, target):
    rows = study.read("table-classes", model)
    rows = rows[rows.target_kind.eq(kind) & rows.target.eq(target)].dropna(subset="change")
    cut, rows = _list(rows, "method"), _mean(rows.astype({"class": str}), ["class"])
    rows = _ends(rows.assign(named=rows["class"].str[:24]).sort_values("change", kind="stable"))
    table = _shown(rows, "named images before after change")
    said = f"With {_part(target, kind)} ({cut}), the {_name(model)}’s top-1 on {{named}} {{moved}}, "
    said = _say(said, rows.iloc[0]) + _say("on {named} it {moved}", rows.iloc[-1])
    shows, note = "Change of top-1 by class; in brackets its test images.", "The most forgotten classes and the least."
    return Slide(said, table, study.picture(f"classes-{kind}-{target:g}-{model}"), shows, note)


def _front(study, model, cost):
    rows, dense = study.untimed[study.untimed.model == model], [*plots.DENSE_POINTS]
    rows = plots.beside_dense(rows.assign(series=plots.series(rows)), "top1", cost)
    rows = rows.assign(change=rows.top1 - rows.dense_top1, share=rows[cost] / rows[f"dense_{cost}"])
    rows = rows[rows.stage.isin([*dense, "reconstructed", *TRAINED]) & rows[cost].notna() & rows.top1.notna()]
    keys, whole = ["series", "target", "stage"], rows.stage.isin(dense)
    rows = rows[rows.seed.isin(rows.seed[~whole]) | whole.all()]
    rows = plots.over_seeds(rows[[*keys, "seed", "top1", "change", "share", cost]], keys)
    ranked = rows[rows.stage.isin(dense) | (rows.seeds == rows.seeds[~rows.stage.isin(dense)].max())]
    front = ranked[plots.pareto(ranked[cost], ranked.top1)].sort_values(cost, kind="stable")
    cut = _ranked(front[~front.stage.isin(dense)])
    near = cut[cut.change >= -1].head(1) if (cut.change >= -1).any() else cut.sort_values("change").tail(1)
    front = pd.concat([near, front.drop(near.index).sort_values("top1", ascending=False)]).head(MOST).sort_values(cost)
    front = front.assign(asked=_asked(front.series, front.target))
    table = _shown(front, "asked stage share top1 change", share=f"{COSTS[cost]} of dense")
    said = f"No cut saves {COSTS[cost]} of the {_name(model)}"
    for _, row in near.iterrows():
        said = f"Within one point of the dense top-1, the {_name(model)} gets by with "
        if row.change < -1:
            said = f"No {_name(model)} that saves {COSTS[cost]} is within one point of dense: top-1 {{moved}} at "
        said = _say(said + f"{{share}} of its {COSTS[cost]} ({{series}}, {{stage}})", row)
    shows = f"Test top-1 over {COSTS[cost]}; ringed: no other model is better and cheaper."
    note = "Behind a cut: the share cut of weights, rows and layers; of budgets the share kept."
    return Slide(said, table, study.picture(f"tradeoff-{cost}-{model}"), shows, note + _rank_note(rows))


def _best(study, model):
    rows = study.read("best", model)
    rows = rows[rows.limit.isin(sorted(set(rows.limit))[:2])].head(MOST)
    rows = rows.assign(change=rows.top1 - rows.dense, asked=_asked(rows.method, rows.target))
    said, none = [], []
    for row in rows[rows.cost.isin(["macs", "relative_latency"]) & (rows.limit == rows.limit.max())].itertuples():
        part = f"under {_part(row.limit, row.cost)}"
        none, said = ([*none, part], said) if row.method == "none" else (none, [*said, f"{_moved(row.change)} {part}"])
    said = f"The best {_name(model)}’s top-1 {' and '.join(said)}" if said else f"Of the {_name(model)}"
    said += f"{'; ' if ' best ' in said else ' '}no model fits {' or '.join(none)}" if none else ""
    table = _shown(rows, "cost limit asked stage change seeds", asked="best")
    on = " and ".join(_known(rows, "chosen_on"))
    note = f"Chosen on {on} images; behind each the share cut, of budgets the share kept. {_meaning(rows.method)}."
    shows = "Test top-1 over parameters; ringed: no other model is better and smaller."
    return Slide(said, table, study.picture(f"tradeoff-params-{model}"), shows, note)


def _speed(study, model):
    rows = study.timed(model).sort_values(["seeds", "speedup"], ascending=False, kind="stable").head(MOST)
    rows = rows.assign(asked=_asked(rows.series, rows.target))
    table = _shown(rows, "asked promised speedup arrives top1 seeds")
    said = "The fastest {model} ({asked}) runs {speedup} times as fast as the dense one, where its MACs promise "
    said = _say(said + "{promised}, at {top1}\u00a0% top-1", _ranked(rows).iloc[0])
    picture, shows = study.picture(f"tradeoff-relative_latency-{model}"), "Test top-1 over measured time of one batch."
    return Slide(said, table, picture, shows, study.how_timed() + _rank_note(rows))


def _zeros(study):
    rows = study.timed()
    rows = rows[(rows.form == "masked") & (rows.target_kind == "sparsity")]
    rows = rows.assign(zeros=1 - rows.nonzero / rows.params)
    rows = rows.sort_values(["seeds", "ideal"], ascending=False, kind="stable").head(MOST)
    table = _shown(rows, "model method target zeros ideal speedup top1 seeds", method="masked")
    said = "With {target} masked ({method}), the {model} is {speedup} times as fast as dense; were its zeros free, it "
    note = f"Masked weights are zeros in dense tensors, multiplied like any number. {study.how_timed()}"
    return Slide(_say(said + "would be {ideal} times", rows.iloc[0]), table, note=note + _rank_note(rows))


def _runtimes(study, model):
    rows = study.read("table-runtimes", model, by=["checkpoint", "runtime", "precision", "batch"])
    rows = rows[rows.batch == rows.batch.max()].assign(way=lambda r: r.runtime + " " + r.precision)
    rows = rows.assign(checkpoint=rows.checkpoint.str.removeprefix("budget-"))
    said = f"The fastest {_name(model)}, {{checkpoint}} in {{way}}, is {{speedup}} times as fast as the dense one in "
    said = _say(said + "PyTorch’s eager mode", rows.loc[_ranked(rows).speedup.idxmax()])
    table = _crossed(rows, "checkpoint", "way", "speedup")
    picture, shows = study.picture(f"speedup-{model}"), "Times as fast as dense; thin lines: promised by the MACs."
    note = f"Times as fast as the dense model, eager in float32, in batches of {rows.batch.max():g} images."
    return Slide(said, table, picture, shows, note)


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
    note = "Difference to vitlab’s closed form over all models timed. torchprofile counts norms, too; thop leaves out "
    note += "the two matrix products of attention."
    said = f"Against the closed form of MACs, {', '.join(said)}"
    return Slide(said, _shown(found, "meter model min max"), note=note)


def _method(study):
    rows, data = study.results, study.read("table-data").drop_duplicates("split")
    counts = dict(zip(data.split, data.images, strict=True))
    top1 = study.dense.top1.max() / 100
    error, seeds = _two(100 * math.sqrt(top1 * (1 - top1) / counts["test"])), _known(rows, "seed")
    of_seeds = plots.seeds_of(rows)
    facts = {
        "images (train, val, test)": ", ".join(f"{counts.get(split, 0):,}" for split in ("train", "val", "test")),
        f"standard error of {_one(100 * top1)} % top-1": f"{error} points",
        "seeds": f"{of_seeds}; {len(seeds)} in all, split {_list(rows, 'split_seed')}",
        "MACs": "multiply-accumulates of one image, closed form; FLOPs = 2 × MACs; masked models execute all",
        "time": study.how_timed() if rows.latency_ms.notna().any() else "not measured",
        "choice": "scores from training images, the best epoch by val; top-1 is on test where nothing else is said",
        "software": f"torch {_list(rows, 'torch')}, timm {_list(rows, 'timm')}",
        "commit": _list(rows.sort_values("date"), "commit"),
    }
    said = f"From {counts['test']:,} test images a top-1 has a standard error of {error} points; "
    most = f"means are over {'up to ' if '(' in of_seeds else ''}{len(seeds)} seeds"
    said += "one seed does not show how trainings differ" if len(seeds) == 1 else most
    return Slide(said, pd.DataFrame(facts.items(), columns=["method", study.folder.name]))


# fmt: off
ORDER = [  # of a deck, and what each finding is of
    (_title, "study"), (_dense, "study"), (_sensitivity, "model"), (_agreement, "model"), (_criteria, "model"),
    (_global_pruning, "model"), (_training, "model"), (_weights, "model"), (_heads_svd_iht, "model"),
    (_budget, "budget"), (_recovered, "study"), (_audit, "model"), (_classes, "budget"), (_front, "macs"),
    (_front, "bytes_disk"), (_best, "model"), (_speed, "model"), (_zeros, "study"), (_runtimes, "model"),
    (_meters, "study"), (_method, "study"),
]
# fmt: on


def plan(study):
    """[(function, its arguments after the study)] of each slide, in their order."""
    of = {"study": [()], "model": [(model,) for model in study.models], "budget": study.budgets()}
    of |= {cost: [(model, cost) for model in study.models] for cost in ("macs", "bytes_disk")}
    return [(finding, arguments) for finding, each in ORDER for arguments in of[each]]


def slides(folder):
    """List of Slide of a folder of tables and pictures; what is missing is said and its slide left out.

    Raises FileNotFoundError where results.csv is missing.
    """
    study, found = Study(folder), []
    for finding, of in plan(study):
        study.used, study.seen = ["results.csv"] if finding in (_title, _method, _front) else [], []
        try:
            slide = finding(study, *of)
        except Absent as reason:
            record.say(f"no slide {' '.join(map(str, (finding.__name__.strip('_'), *of)))}: {reason}")
            continue
        found.append(replace(slide, source=study.source(*of[:1])))
    return found


# -- results, as pages show them

STUDIES = ("cifar10-small", "caltech101-small")  # of the front page
CUTS = {  # method and form: what was done, in the order of a table
    "dense": "",
    "unstructured masked": "{share} of the weights masked",
    "unstructured, one-shot masked": "{share} of the weights masked at once",
    "unstructured, iterative masked": "{share} of the weights masked in equal steps",
    "unstructured, cubic masked": "{share} of the weights masked in smaller and smaller steps",
    "unstructured, magnitude masked": "{share} of the weights masked by magnitude",
    "unstructured, random masked": "{share} of the weights masked at random",
    "structured masked": "{share} of the rows masked",
    "structured removed": "{share} of the rows removed",
    "structured, iterative removed": "{share} of the rows removed in equal steps",
    "structured, cubic removed": "{share} of the rows removed in smaller and smaller steps",
    "structured, magnitude masked": "{share} of the rows masked by magnitude",
    "structured, random masked": "{share} of the rows masked at random",
    "heads+svd factored": "{share}: heads, SVD",
    "heads+svd, random factored": "{share}: random heads and directions",
    "heads+iht masked": "{share}: heads, IHT",
    "heads+threshold masked": "{share}: heads, SVD, small entries to zero",
    "heads+svd+iht entries masked": "{share}: heads, SVD + IHT on entries",
    "heads+svd+iht columns factored": "{share}: heads, SVD + IHT on columns",
    "units removed": "{part}: heads, neurons, filters, width",
    "pool removed": "{part}: heads, neurons, filters, width in one pool",  # where no rank was cut
    "heads+neurons removed": "{part}: heads, neurons",
    "width removed": "{part}: width",
    "random removed": "{part}: as many random units of each place",
    "svd factored": "{part}: SVD, the same share of each layer",
    "ranks factored": "{part}: ranks by loss per MAC",
    "pool+ranks factored": "{part}: units, then ranks",
    "pool factored": "{part}: units and ranks in one pool",
}
FRONT = [  # cuts and stages of the front page
    "dense dense",
    "dense dense+epochs",
    "unstructured masked finetuned",
    "structured removed finetuned",
    "heads+svd+iht entries masked finetuned",
    "heads+svd+iht columns factored finetuned",
    "svd factored reconstructed",
    "pool+ranks factored reconstructed",
    "pool factored reconstructed",
]
WEIGHTS, HALF_ROWS, ROWS = "unstructured masked 0.9", "structured removed 0.5", "structured removed 0.9"
SVD, MIXED = "heads+svd factored 0.4", "heads+svd+iht entries masked 0.4"
FOUND = [  # sentences above a table; in braces: method, form and target of a cut, and what of it
    "**Half the MACs**, nothing trained: units and ranks from one pool {pool factored 0.5 reconstructed} points of "
    "top-1, ranks alone {ranks factored 0.5 reconstructed}, units (heads, neurons, filters, channels) "
    "{units removed 0.5 reconstructed}. **A quarter**: pool {pool factored 0.25 reconstructed}, ranks "
    "{ranks factored 0.25 reconstructed}, units {units removed 0.25 reconstructed}, as many at random "
    "{random removed 0.25 reconstructed}.",
    f"**Scores**: with 90\u00a0% of the layers' weights zeroed, nothing trained, top-1 is {{{WEIGHTS} top1}} by "
    f"sensitivity, {{{WEIGHTS.replace(' ', ', magnitude ', 1)} top1}} by magnitude, "
    f"{{{WEIGHTS.replace(' ', ', random ', 1)} top1}} at random.",
    f"**Zeros** save disk ({{{WEIGHTS} bytes_disk}} are left), not time ({{{WEIGHTS} speedup}} times as fast as "
    f"dense); 90\u00a0% of the rows removed leave {{{ROWS} macs}} of the MACs and are {{{ROWS} speedup}} times as "
    "fast.",
    "**40\u00a0% of the heads and of each layer's weights**, fine-tuned: SVD + IHT on single weights "
    f"{{{MIXED} finetuned}} points at {{{MIXED} macs}} of the MACs, SVD alone {{{SVD} finetuned}} at {{{SVD} macs}}.",
]
MORE_FOUND = [  # not on the front page
    "**Weights or rows**, fine-tuned: half of the weights zeroed {unstructured masked 0.5 finetuned} points, 90\u00a0% "
    f"{{{WEIGHTS} finetuned}}; half of the rows removed {{{HALF_ROWS} finetuned}} at {{{HALF_ROWS} macs}} of the MACs, "
    f"90\u00a0% {{{ROWS} finetuned}} at {{{ROWS} macs}}.",
    "**Solved anew, not trained**, a quarter of the MACs has, from right after the cut: units "
    "{units removed 0.25 top1}, then {units removed 0.25 top1, reconstructed}; the pool {pool factored 0.25 top1}, "
    "then {pool factored 0.25 top1, reconstructed}.",
    "**Kinds alone**, at 0.9 of the MACs and nothing made up for, raise the loss by {ranks alone 0.9 rise} nats "
    "(ranks), {neurons alone 0.9 rise} (neurons), {heads alone 0.9 rise} (heads), {width alone 0.9 rise} (channels), "
    "{filters alone 0.9 rise} (filters of the stem).",
]
MARKS = re.compile(r"(<!-- results(?: of ([\w-]+))? -->\n).*?(<!-- /results -->)", re.DOTALL)


def _lines(study, front):
    """The rows of CUTS in the order of a table, with `words`; one a model, seed and words. Of weights, rows and layers
    what was cut most, of budgets all. front: those of FRONT alone, half and less of budgets."""
    rows = study.untimed[study.untimed.model.isin(study.models) & study.untimed.top1.notna()]
    budget, most = rows.target_kind.isin([*BUDGETS]), rows.groupby("target_kind").target.transform("max")
    # the control has no kind of target where it was trained like masked models
    shown = rows.target <= 0.5 if front else rows.target < 1
    rows = rows[np.where(budget, shown, rows.target.eq(most) | rows.target_kind.isna())]
    rows = rows.assign(cut=rows.method.where(rows.method == "dense", rows.method + " " + rows.form))
    rows = rows[rows.cut.isin([*CUTS]) & ((rows.cut + " " + rows.stage).isin(FRONT) | (not front))]
    known = {"target_kind": ["sparsity", "ratio", *BUDGETS], "cut": [*CUTS], "stage": [*plots.STAGES]}
    rows = rows.assign(**{name: pd.Categorical(rows[name], order) for name, order in known.items()})
    order = ["target_kind", "target", "cut", "stage"]
    rows = rows.sort_values(order, ascending=[True, False, True, True], na_position="first")

    def words(row):
        part = _part(row.target, row.target_kind) if row.target_kind in BUDGETS else ""
        done = CUTS[row.cut].format(share=_share(row.target), part=part)
        return f"{done}, {plots.STAGES[row.stage]}".removeprefix(", ")

    return rows.assign(words=[words(row) for row in rows.itertuples()]).drop_duplicates(["model", "seed", "words"])


def _spread(top1):
    """Mean over seeds, with half of the range where there are several."""
    return _one(top1.mean()) + (f"±{_one((top1.max() - top1.min()) / 2)}" if len(top1) > 1 else "")


def _columns(rows, front):
    """{model: its name in a table}, ViT first: the family, such as ViT. Of several models of one family: all, by their
    full names; on the front page that with the most lines, of equally many that which starts from given weights."""
    families = {model: _name(model).partition("-")[0] for model in sorted(set(rows.model), reverse=True)}
    if front:
        given = set(rows.model[rows.weights.notna()]) if "weights" in rows else set()
        rank = {model: (rows.words[rows.model == model].nunique(), model in given) for model in families}
        families = {max((m for m in families if families[m] == f), key=rank.get): f for f in [*families.values()]}
    return {m: f if [*families.values()].count(f) == 1 else _name(m) for m, f in families.items()}


def _seed_note(rows):
    """What ± means, if a line has it, and of which seed the lines without it are."""
    sets = rows.groupby(["model", "words"]).seed.agg(lambda seeds: tuple(sorted(set(seeds))))
    counts, alone = set(sets.map(len)), sorted({seeds[0] for seeds in sets if len(seeds) == 1})
    fewer = f", in some lines of {' or '.join(map(str, sorted(counts - {1})[:-1]))}" if len(counts - {1}) > 1 else ""
    without = f"; without ±: seed {' or '.join(map(str, alone))}" if alone else ""
    return [f"±: half the range over seeds{fewer}{without}."] if max(counts) > 1 else []


def _found(study, front):
    """The sentences of FOUND, and of MORE_FOUND but for the front page, as lines of Markdown: with the numbers of all
    models, ViT first. Means over the seeds of each cut, speeds their range, as they are of different machines; changes
    are against the dense models of the same seeds. Without sentences whose cuts were not run."""
    models = sorted(study.models, reverse=True)

    def value(model, method, form, target, what):
        """What a cut of one model has, in words: of a stage the change of top-1, of `top1` the top-1."""
        what, _, stage = what.partition(", ")
        table, column = {"speedup": ("efficiency", what), "rise": ("table-audit", "measured")}.get(
            what, ("summary", what)
        )
        column = stage or "cut" if what == "top1" else column
        rows = study.read(table, model)
        if what == "rise":
            own = rows.criterion.eq("fisher") & rows.kind.eq(method)
        else:
            own = rows.method.eq(method) & rows.form.eq(form) & ~rows.target_kind.isin(BUDGETS.keys() - {"macs"})
        rows = rows[own & rows.target.eq(float(target))]
        found = rows[column].dropna() if column in rows else rows.target.head(0)
        if found.empty:
            raise Absent(f"{model} has no {column} of {method}")
        if what in plots.STAGES:
            return _signed((found - rows.dense).mean())
        if what in ("macs", "bytes_disk"):
            return _share(round(found.mean() / study.dense.loc[model, what], 2))
        if what == "rise":
            return _one(found.mean(), 3, "+")
        return " to ".join(dict.fromkeys(map(_one, (found.min(), found.max())))) + ("\u00a0%" if what == "top1" else "")

    def of_all(match):
        method, form, target, what = re.fullmatch(r"(.+) (\w+) ([\d.]+) (.+)", match[1]).groups()
        return " and ".join(value(model, method, form, target, what) for model in models)

    said = []
    for sentence in FOUND + (MORE_FOUND if not front else []):
        with contextlib.suppress(Absent):
            said.append("- " + re.sub(r"\{(.+?)\}", of_all, sentence))
    return said


def results(folders, *, page, front=False):
    """The results of studies as a table in Markdown, below what the first found, and where it comes from.

    folders: of tables, one a study. Columns: top-1 of each model; MACs and non-zero parameters of the first study's.
    page: the folder from which links go. front: the few lines of FRONT, below a picture of the deepest budget.
    """
    studies, columns, said = [Study(folder) for folder in folders], {}, []
    found = {study: _lines(study, front) for study in studies}
    names = {study: _columns(found[study], front) for study in studies}
    found = {study: rows[rows.model.isin(names[study])] for study, rows in found.items()}
    data = {study: _list(study.results, "data").split(" (")[0] for study in studies}
    links = {study: Path(os.path.relpath(study.folder, page)).as_posix() for study in studies}
    for measure, header in {"top1": "top-1 (%)", "macs": "MACs (M)", "nonzero": "non-zero (M)"}.items():
        accuracy = measure == "top1"
        for study in studies if accuracy else studies[:1]:
            for model, name in names[study].items():
                of = f"{data[study]} " if accuracy and len(studies) > 1 else ""
                own = found[study][found[study].model == model]
                cells = own.groupby("words")[measure].agg(_spread if accuracy else lambda each: _millions(each.mean()))
                columns[f"{of}{name} {header}"] = cells
    table = pd.DataFrame(columns).reindex(pd.concat(found.values()).words.unique()).fillna("")
    for study, rows in found.items():
        dense, source = rows[rows.stage == "dense"], study.source(rows=rows)
        said.append(
            f"{source.replace('results.csv', f'[results.csv]({links[study]}/results.csv)')} "
            f"{dense.total.max():,.0f} test images; torch {_list(rows, 'torch')}, timm {_list(rows, 'timm')}."
        )
        given = dense[dense.weights.notna()] if "weights" in dense else dense.head(0)
        who = [names[study][model] for model in dict.fromkeys(given.model)]
        who = data[study] if len(who) == len(names[study]) else " and ".join(who)
        said += [f"{who} starts from the weights in {Path(given.weights.iloc[0]).parent}."] if who else []
    said += [f"MACs and parameters are those of the {data[studies[0]]} models."] if len(studies) > 1 else []
    said += _seed_note(pd.concat(found.values()))
    lines = [["", *table], ["---", *["---:"] * len(columns)], *table.reset_index().itertuples(index=False)]
    least = [f"{kind}-{target:g}-{model}" for model, kind, target in studies[0].budgets()][-1:]
    picture = "".join(f"![Top-1 after each step of recovery]({links[studies[0]]}/ladder-{name}.png)" for name in least)
    text = "\n".join(f"|{'|'.join(line)}|" for line in lines) + "\n\n" + "\n".join(said)
    if bullets := _found(studies[0], front):
        who = " and ".join(_name(model).partition("-")[0] for model in sorted(studies[0].models, reverse=True))
        text = f"Found on {data[studies[0]]}, {who}:\n\n" + "\n".join(bullets) + f"\n\n{text}"
    return f"{picture}\n\n{text}" if front else text


def filled(text, *, page):
    """text of a page with what stands between its marks anew: after `<!-- results -->` what the front page shows of
    STUDIES, after `<!-- results of NAME -->` all lines of a study. page: its folder."""
    figures = record.repository() / "figures"

    def block(found):
        names = [found[2]] if found[2] else STUDIES
        made = results([figures / name for name in names], page=page, front=not found[2])
        return f"{found[1]}{made}\n{found[3]}"

    return MARKS.sub(block, text)


def main(arguments=None):
    """python -m vitlab.findings PAGE …: the results of studies between the marks of pages. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m vitlab.findings", description="Write results of studies into pages.")
    parser.add_argument("pages", nargs="+", type=Path, help="pages in Markdown with marks, such as README.md")
    for page in parser.parse_args(arguments).pages:
        try:
            record.write_atomic(page, filled(page.read_text(), page=page.resolve().parent))
        except FileNotFoundError as error:
            print(f"vitlab.findings: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
