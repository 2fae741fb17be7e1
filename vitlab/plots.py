"""Figures and tables: frames in, axes or figures out, one style that reads on slides and in grey. No torch.

Colour and marker both stand for the method. Axes carry units and have no title, which the slide has.
Saved twice, a figure is the same file byte for byte.
"""

import functools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker

from vitlab import record

HALF = (5.5, 3.4)  # inches: half a slide
WIDE = (8.2, 3.6)  # with a legend beside
STYLE = {
    **sns.axes_style("ticks"),
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "0.9",
    "font.size": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text, to be edited in slides
    "svg.hashsalt": "vitlab",
    "pdf.fonttype": 42,  # TrueType: likewise
}
COLORS = sns.color_palette("colorblind").as_hex()
HUES = COLORS[:7] + COLORS[8:]  # without the grey, which is for controls
MARKERS = "os^DvPX"  # fewer than hues: the tenth series differs from the first
KINDS = MARKERS + "<>*phd"  # of kinds of cuts, of which there are more
DENSE = {"color": "0.35", "marker": "_"}
DENSE_POINTS = {  # on top of others
    "dense": {"color": "0.1", "marker": "*", "zorder": 4.5},
    "dense+epochs": {"color": "0.5", "marker": "*", "zorder": 4.5},
}
STAGES = {  # in the order in which a model goes through them
    "dense": "dense",
    "dense+epochs": "dense, same epochs",
    "cut": "after the cut",
    "folded": "mean folded",
    "compensated": "compensated",
    "reconstructed": "reconstructed",
    "finetuned": "fine-tuned",
    "distilled": "fine-tuned, distilled",
}
LINES = {
    "distilled": {"linestyle": (0, (8, 2))},
    "finetuned": {"linestyle": "-"},
    "reconstructed": {"linestyle": "-.", "markerfacecolor": "white"},
    "compensated": {"linestyle": "--", "markerfacecolor": "white"},
    "folded": {"linestyle": (0, (1, 4)), "markerfacecolor": "white"},
    "cut": {"linestyle": ":", "markerfacecolor": "white"},
}
AXES = {  # column: (label with unit, factor to it)
    "top1": ("test top-1 (%)", 1),
    "params": ("parameters (M)", 1e-6),
    "nonzero": ("non-zero parameters (M)", 1e-6),
    "macs": ("MACs of one image (M)", 1e-6),
    "macs_ideal": ("MACs of one image if zeros were free (M)", 1e-6),
    "bytes_disk": ("size on disk (MB)", 1e-6),
    "bytes_memory": ("weights in memory (MB)", 1e-6),
    "latency_ms": ("latency of one batch (ms)", 1),
    "relative_latency": ("latency of one batch, as a share of the dense model's", 1),
    "images_per_s": ("images per second", 1),
    "memory_mb": ("peak memory (MB)", 1),
}


def styled(draw):
    """draw, in the style of this module."""

    @functools.wraps(draw)
    def inside(*arguments, **options):
        plt.draw_if_interactive()  # loads the backend: inside, a notebook's interactive mode would end with the style
        with plt.rc_context(STYLE):
            return draw(*arguments, **options)

    return inside


# -- statistics

CUT = ("model", "method", "criterion", "form", "target_kind", "target", "stage")  # what tells cuts apart


def over_seeds(frame, keys):
    """Means over seeds of the rows with equal keys: a frame with keys, the other numbers and `seeds`, how many.

    frame: one row for each seed and keys. Of keys whose rows lack values that others of them have, the fullest count
    alone, so that all means of a row are over the same seeds.
    """
    full = frame.notna().sum(axis=1)
    most = full.groupby([frame[key] for key in keys], dropna=False).transform("max")
    groups = frame[full == most].groupby(keys, sort=False, dropna=False)
    return groups.mean(numeric_only=True).drop(columns="seed").assign(seeds=groups.seed.nunique()).reset_index()


def beside_dense(rows, *columns):
    """rows with `dense_<column>`: the mean of the dense rows among them of the same model and seed."""
    dense = rows[rows.stage == "dense"].groupby(["model", "seed"])[list(columns)].mean()
    return rows.join(dense.add_prefix("dense_"), on=["model", "seed"])


def seeds_of(rows):
    """The seeds of rows in words, such as "0, 1, 2", or "0, 1, 2 (some cuts: 0)" where some cuts have fewer."""
    known = rows[rows.seed.notna()] if "seed" in rows else rows.head(0)
    known = known[known.top1.notna()] if "top1" in known else known
    if known.empty:
        return "unknown"
    cuts = known[~known.stage.isin([*DENSE_POINTS])] if "stage" in known else known
    keys = [column for column in (CUT if "method" in cuts else ("model", "checkpoint")) if column in cuts]
    sets = list(_sets_of_seeds(cuts, keys)) if keys else []
    every = tuple(sorted(set(known.seed)))
    fewer = sorted({seeds for seeds in sets if seeds != every})
    words = [", ".join(f"{seed:g}" for seed in seeds) for seeds in (every, *fewer)]
    some = "some cuts" if every in sets else "cuts"
    return words[0] + (f" ({some}: {' or '.join(words[1:])})" if fewer else "")


def _sets_of_seeds(rows, keys):
    """The seeds of each group of rows, sorted, as tuples: a Series by keys."""
    return rows.groupby(keys, sort=False, dropna=False).seed.agg(lambda seeds: tuple(sorted(set(seeds))))


def _marks(sets):
    """Words behind the name of each group: ", seed 0" where it has fewer seeds than the most. sets: as above."""
    most = max(map(len, sets), default=0)
    return {name: _of_seeds(seeds) if len(seeds) < most else "" for name, seeds in sets.items()}


def _of_seeds(seeds):
    return f", seed{'s' if len(seeds) > 1 else ''} {', '.join(f'{seed:g}' for seed in seeds)}"


def pareto(cost, value):
    """Which points no other beats, by costing at most as much and being worth more, or less and as much.

    cost, value: Series of one index; low cost and high value are good. Returns a bool Series.
    """
    c, v = cost.to_numpy(), value.to_numpy()
    beaten = (c[:, None] >= c) & (v[:, None] < v) | (c[:, None] > c) & (v[:, None] <= v)
    return pd.Series(~beaten.any(axis=1), cost.index)


def best_under(rows, cost, limits=(0.75, 0.5, 0.25), *, slack=0.01):
    """The best model whose cost is at most a share of the dense model's: a frame of a row per model and limit.

    rows: results.csv of any models and seeds, the dense ones among them. cost: macs, params, bytes_disk, latency_ms,
    relative_latency, … limits: shares in (0, 1] of the cost of the dense model of the same model and seed. slack: by
    how much of itself a limit may be exceeded, as budgets are met to within a hundredth. What one model gets is one
    cut (method, criterion, form, target_kind, target and stage), by means over its seeds; of those that fit, the ones
    of fewer seeds than others stand back. Best is the highest `val_top1` among those that have it, else the highest
    test top-1, which favours the lucky one a little; `chosen_on` says which ("val" or "test").

    Columns: model, cost, limit, method, …, stage, top1 (test, percent), dense (its top-1), share and value of the
    cost, chosen_on, seeds. Where nothing fits method is "none" and the rest missing; models without a cut
    that has this cost are left out. Raises ValueError for another column, limits out of range, and rows without a
    dense model.
    """
    if cost not in rows:
        raise ValueError(record.unknown("cost", cost, [c for c in AXES if c in rows and c != "top1"]))
    if not all(0 < limit <= 1 for limit in limits):
        raise ValueError(f"limits are shares of the dense model's cost, in (0, 1]; got {list(limits)}")
    dense = rows[rows.stage == "dense"].groupby(["model", "seed"])[[cost, "top1"]].mean()
    if dense.empty:
        raise ValueError("no row of stage dense, so that no cost is known as a share")
    rows = rows[rows[cost].notna() & rows.top1.notna()]
    rows = rows.join(dense.set_axis(["whole", "dense"], axis=1), on=["model", "seed"])
    rows = rows.assign(share=rows[cost] / rows.whole, val=rows.get("val_top1", np.nan)).rename(columns={cost: "value"})
    keys = [c for c in ("model", "method", "criterion", "form", "target_kind", "target", "stage") if c in rows]
    means = {name: (name, "mean") for name in ("top1", "dense", "share", "value", "val")}
    points = rows.groupby(keys, dropna=False, sort=False).agg(**means, seeds=("seed", "nunique")).reset_index()
    found = []
    for model, own in points.groupby("model", sort=False):
        for limit in [] if own.stage.isin([*DENSE_POINTS]).all() else limits:
            fits = own[own.share <= limit * (1 + slack)]
            fits = fits[fits.seeds == fits.seeds.max()]
            on = "val" if fits.val.notna().any() else "test"
            fits = fits.dropna(subset="val") if on == "val" else fits
            best = fits.sort_values("val" if on == "val" else "top1", kind="stable").tail(1)
            best = best.to_dict("records")[0] | {"chosen_on": on} if len(best) else {"method": "none"}
            found.append({"model": model, "cost": cost, "limit": limit} | best)
    columns = ["model", "cost", "limit", *keys[1:], "top1", "dense", "share", "value", "chosen_on", "seeds"]
    return pd.DataFrame(found, columns=columns)


def audit_table(frame, by=("criterion", "kind")):
    """How far predicted rises of the loss can be trusted, a row for each group of cuts: a frame.

    frame: columns predicted and measured (nats) and those of `by`. Columns: those of `by`, cuts (how many), spearman
    (rank correlation of both, in [-1, 1]; nan for fewer than three cuts or equal ones: do they come in the right
    order?) and ratio (the median of measured / predicted where a rise is predicted and one of both is a millinat or
    more; nan where none is: are they of the right size?). Raises ValueError for a missing column.
    """
    for column in (*by, "predicted", "measured"):
        if column not in frame:
            raise ValueError(record.unknown("column", column, frame.columns))
    found = []
    for name, part in frame.dropna(subset=["predicted", "measured"]).groupby(list(by), sort=False, dropna=False):
        ranks = part[["predicted", "measured"]].rank()
        varied = len(part) > 2 and (ranks.nunique() > 1).all()
        # what is left of smaller ones is rounding, and its ratios run to 100,000
        rises = part[(part.predicted > 0) & (part[["predicted", "measured"]].abs().max(axis=1) >= 1e-3)]
        spearman = ranks.predicted.corr(ranks.measured) if varied else np.nan  # Pearson of ranks
        found.append((*name, len(part), spearman, (rises.measured / rises.predicted).median()))
    return pd.DataFrame(found, columns=[*by, "cuts", "spearman", "ratio"])


def series(rows):
    """Name of each row's line: its method, with form and criterion where the method occurs with several."""
    names = rows.method.astype(str)
    for column in ("form", "criterion"):
        if column in rows:
            several = rows.groupby("method")[column].transform("nunique") > 1
            names = names.where(~several, names + ", " + rows[column].fillna("-").astype(str))
    return names


def looks(names):
    """{name: color and marker} in the order of names; the controls, dense and random, are grey in every figure."""
    names = [name for name in dict.fromkeys(names) if name != "dense"]
    random = [name for name in names if is_random(name)]
    greys = {name: {"color": "0.6", "marker": MARKERS[(3 + i) % len(MARKERS)]} for i, name in enumerate(random)}
    others = [name for name in names if name not in random]
    hues = {name: {"color": HUES[i % len(HUES)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(others)}
    return {"dense": DENSE, **{name: (greys | hues)[name] for name in names}}


def is_random(name):
    """Whether a series is of random cuts, which others are held against."""
    return "random" in str(name).replace(",", "").split()


# -- figures


@styled
def weight_histograms(frame):
    """Distributions of weights: a panel per stage, and a row of panels per `method` and `target` if given.

    frame: as prune.histogram returns it, with method and target added for several. Counts are on a
    logarithmic axis; the zeros stand apart in a hatched bar at the right, where they do not hide the rest.
    What the masks will let go is light; dotted lines show the |w| up to which magnitude would have cut as many.
    Returns a Figure.
    """
    marks = [column for column in ("method", "target") if column in frame]
    groups = list(frame.groupby(marks, sort=False)) if marks else [((), frame)]
    stages = list(dict.fromkeys(frame.stage))
    size = (1.2 + 2.9 * len(stages), 0.7 + 2.1 * len(groups))
    figure, panels = plt.subplots(len(groups), len(stages), figsize=size, sharey=True, squeeze=False)
    limit = frame.right.max()
    for line, (name, group) in zip(panels, groups, strict=True):
        for ax, stage in zip(line, stages, strict=True):
            part = group[group.stage == stage]
            if part.empty:
                ax.set_axis_off()
                continue
            edges = [*part.left, part.right.iloc[-1]]
            if part.survivors.sum() < part["count"].sum():
                ax.stairs(part["count"], edges, fill=True, color="0.75", label="will go")
            ax.stairs(part.survivors, edges, fill=True, color=COLORS[0], label="stay")
            for sign in (-1, 1):
                place = {"color": "0.1", "linestyle": ":", "linewidth": 1.2, "zorder": 3}
                ax.axvline(sign * part.threshold.iloc[0], label="where magnitude\nwould cut as many", **place)
            zeros = part.zeros.iloc[0]
            ax.bar(1.7 * limit, zeros, 0.3 * limit, color="0.85", edgecolor="0.2", hatch="///")
            ax.set(yscale="log", xlim=(-1.1 * limit, 2.1 * limit))
            ax.set_xticks([-limit, 0, limit, 1.7 * limit])
            ax.set_xticklabels([f"−{limit:.2g}", "0", f"{limit:.2g}", "zeros"])
            ax.grid(False, axis="x")
            if ax in panels[0]:
                ax.set_title(STAGES.get(stage, stage), fontsize=12)
        line[0].set_ylabel("\n".join(filter(None, [_group_name(name), "weights"])))
    panels[0][0].set_ylim(0.5, 2 * max(frame["count"].max(), frame.zeros.max()))
    figure.supxlabel("value of the weight", fontsize=12)
    handles = {label: h for ax in panels.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles, loc="outside right center")
    return figure


def _group_name(name):
    """Words for a group key such as ("unstructured", 0.5)."""
    name = name if isinstance(name, tuple) else (name,)
    return " ".join(f"{part:.0%}" if isinstance(part, float) else str(part) for part in name)


@styled
def training_curves(history, *, column="train_top1"):
    """Accuracy (%) over the epochs, one panel per method (unstructured beside structured), a line per target.

    history: rows of history.csv with method, target, epoch and column; several seeds become mean and range.
    Returns a Figure.
    """
    methods = list(dict.fromkeys(history.method))
    size = (1 + 3.4 * len(methods), HALF[1])
    figure, panels = plt.subplots(1, len(methods), figsize=size, sharey=True, squeeze=False)
    look = looks(sorted(history.target.dropna().unique()))
    for ax, method in zip(panels[0], methods, strict=True):
        for target, line in history[history.method == method].groupby("target", dropna=False):
            style = look.get(target, DENSE)
            label = f"{target:.0%} cut" if pd.notna(target) else method
            mean_and_range(ax, line.groupby("epoch")[column], label=label, **style)
        ax.set_title(method, fontsize=12)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    panels[0][0].set_ylabel("training top-1 (%)" if column == "train_top1" else column.replace("_", " "))
    return figure


@styled
def accuracy_curve(rows, *, ax=None):
    """Test top-1 (%) over the share cut: a colour per series, a kind of line per stage.

    rows: results.csv of one model; bars are the range over seeds, grey lines the dense model, one for each set of seeds
    that cuts have; what has fewer seeds than others is named with them. Returns the Axes.
    """
    ax = ax or plt.subplots(figsize=WIDE)[1]
    cut = rows[rows.target.notna() & ~rows.stage.isin(["dense", "dense+epochs"])]
    cut = cut.assign(series=series(cut))
    look = looks(cut.series)
    for (name, stage), line in cut.groupby(["series", "stage"], sort=False):
        style = look[name] | LINES.get(stage, {})
        mean_and_range(ax, line.groupby("target").top1, **style)
    marks = _marks(_sets_of_seeds(cut, "series"))
    for name in dict.fromkeys(cut.series):
        ax.plot([], [], label=name + marks[name], **look[name])
    for stage, style in LINES.items():
        if stage in set(cut.stage):
            ax.plot([], [], color="0.35", label=STAGES[stage], **style)
    _dense_lines(ax, rows, _sets_of_seeds(cut, ["series", "target", "stage"]))
    kept = set(cut.target_kind) & {"macs", "params", "bytes", "latency"} if "target_kind" in cut else ()
    ax.set(xlabel="share kept" if kept else "share cut", ylabel=AXES["top1"][0])
    ax.xaxis.set_major_formatter("{x:.0%}")
    _stretch_top(ax, cut.top1.min(), rows.top1.max())
    _legend_beside(ax)
    return ax


@styled
def tradeoff(rows, x="macs", *, names=(), ax=None):
    """Test top-1 (%) over a cost, one colour and marker per series, its targets joined by a thin line.

    Of a cut the last of `finetuned` and `distilled` is shown, and `reconstructed`, which no training followed yet, by
    a hollow marker. Controls are grey: the dense model, the same with as many epochs of training (both with a line
    across) and random cuts. The dark step line joins the points, ringed, that no other beats; those of fewer seeds
    than others stand back there, as in `best_under`. Points are means over seeds, bars their range.

    rows: results.csv of one model, masked models included (they stand where their dense tensors put them).
    x: macs, macs_ideal, params, nonzero, bytes_disk, bytes_memory, latency_ms, memory_mb, or
    relative_latency (the caller's 1 / speedup: of rows of several sessions). names: `series` of more rows, so that
    each looks the same in several figures. Returns the Axes.
    Raises ValueError for another column or where no row has it.
    """
    if x not in AXES or x not in rows:
        raise ValueError(record.unknown("cost", x, [c for c in AXES if c in rows and c != "top1"]))
    points = _final_points(rows, x)
    if points.empty:
        raise ValueError(f"no fine-tuned, reconstructed or dense row has {x}; it is measured in 6_efficiency")
    unit, factor = AXES[x]
    points[["cost", "least", "most"]] *= factor
    look = looks([*names, *points.series]) | {STAGES[stage]: style for stage, style in DENSE_POINTS.items()}
    controls = [STAGES[stage] for stage in DENSE_POINTS]
    names = list(dict.fromkeys(points.series))
    names.sort(key=lambda name: (name not in controls, not is_random(name)))
    height = max(4.4, 1.2 + 0.23 * len(names))  # inches: as many lines are in the legend
    ax = ax or plt.subplots(figsize=(WIDE[0] + 1, height))[1]
    whole, counts = points.stage.isin([*DENSE_POINTS]), points.seeds.map(len)
    most = counts[~whole].max() if not whole.all() else counts.max()
    ranked = points[whole | (counts == most)]
    front = ranked[pareto(ranked.cost, ranked.top1)].sort_values("cost")
    edge = points.cost.max() + 0.04 * np.ptp(points.cost)
    steps = [*front.cost, edge], [*front.top1, front.top1.iloc[-1]]
    ax.plot(*steps, color="0.25", linewidth=1.2, drawstyle="steps-post", zorder=1)
    ax.scatter(front.cost, front.top1, s=150, facecolor="none", edgecolor="0.25", linewidth=1.2, zorder=5)
    label = "best for its cost" + (f",\nof {most} seeds" if len(ranked) < len(points) else "")
    ax.plot([], [], color="0.25", marker="o", markersize=11, markerfacecolor="none", label=label)
    marks = _marks(points.groupby("series").seeds.agg(lambda sets: max(sets, key=len)))
    for name in names:
        own = points[points.series == name]
        for hollow, part in own.groupby(own.stage == "reconstructed"):
            _points(ax, part, look[name], hollow)
        if own.stage.iloc[0] in DENSE_POINTS:
            ax.axhline(own.top1.mean(), color=look[name]["color"], linewidth=0.8, linestyle=":", zorder=0)
        ax.scatter([], [], s=55, label=name + marks[name], **look[name])
    if (points.stage == "reconstructed").any():
        ax.scatter([], [], s=40, facecolor="white", edgecolor="0.35", label="hollow: reconstructed,\nnot trained")
    ax.set(xlabel=unit, ylabel=AXES["top1"][0])
    _stretch_top(ax, points.low.min(), points.high.max())
    _legend_beside(ax)
    return ax


def _final_points(rows, x):
    """Mean, range and seeds of cost and top-1 (top1, low, high) of each series, target and final stage. Of the dense
    models those of seeds that were cut."""
    rows = rows[rows[x].notna() & rows.top1.notna()].rename(columns={x: "cost"})
    rows = rows[rows.stage.isin([*DENSE_POINTS, "reconstructed", "finetuned", "distilled"])]
    cut = rows.seed[~rows.stage.isin([*DENSE_POINTS])]
    rows = rows[rows.seed.isin(cut)] if len(cut) else rows
    rows = rows.assign(series=series(rows).where(~rows.stage.isin([*DENSE_POINTS]), rows.stage.map(STAGES)))
    asked = [column for column in ("series", "target_kind", "target") if column in rows]
    distilled = rows.assign(is_distilled=rows.stage == "distilled").groupby(asked, dropna=False).is_distilled
    rows = rows[(rows.stage != "finetuned") | ~distilled.transform("any")]
    found = rows.groupby([*asked, "stage"], dropna=False, sort=False).agg(
        cost=("cost", "mean"),
        least=("cost", "min"),
        most=("cost", "max"),
        top1=("top1", "mean"),
        low=("top1", "min"),
        high=("top1", "max"),
        seeds=("seed", lambda seeds: tuple(sorted(set(seeds)))),
    )
    found["cost"], found["top1"] = found.cost.clip(found.least, found.most), found.top1.clip(found.low, found.high)
    return found.reset_index()  # within: the mean of three equal numbers may be an ulp beside them


def _points(ax, part, style, hollow):
    """The points of one series in its style, with bars for their range and, if trained, a thin line through them."""
    part = part.sort_values("cost")
    color = style["color"]
    fill = {"facecolor": "white", "edgecolor": color, "linewidth": 1.4} if hollow else {"color": color}
    size, height = (30, 4) if hollow else (60, style.get("zorder", 3))
    ax.scatter(part.cost, part.top1, s=size, marker=style["marker"], zorder=height, **fill)
    bars = [part.cost - part.least, part.most - part.cost], [part.top1 - part.low, part.high - part.top1]
    if np.any(bars):
        ax.errorbar(part.cost, part.top1, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=color, capsize=2, zorder=2)
    if not hollow:
        ax.plot(part.cost, part.top1, color=color, linewidth=0.8, alpha=0.5, zorder=1)


@styled
def heat_map(frame, *, value, label, ax=None):
    """A value by block (down) and role (across), written into each cell; empty where there is none.

    frame: columns block, role and value. label: words and unit of the colour bar. Returns the Axes.
    """
    table = _table(frame, "block", "role", value)
    ax = ax or plt.subplots(figsize=(2.2 + 0.85 * table.shape[1], 1.1 + 0.42 * len(table)))[1]
    table = table.round(3) + 0.0  # so that a cell of next to nothing is 0.000, not -1.6e-08
    return _heat(ax, table, label=label, fmt=".3f", cmap="rocket_r")


@styled
def head_map(frame, *, value="score", label="score of the head", ax=None):
    """Scores of attention heads by block (down) and head (across); a cross marks those cut.

    frame: columns block, head, value and, if there are cuts, kept (bool). Returns the Axes.
    """
    table = _table(frame, "block", "head", value)
    ax = ax or plt.subplots(figsize=(2.6 + 0.8 * table.shape[1], 1.1 + 0.42 * len(table)))[1]
    ax = _heat(ax, table, label=label, fmt=".2g", cmap="rocket_r")
    if "kept" in frame:
        blocks, heads = list(table.index), list(table.columns)
        for row in frame[~frame.kept.astype(bool)].itertuples():
            place = (heads.index(row.head) + 0.86, blocks.index(row.block) + 0.25)
            ax.plot(*place, marker="X", color="black", markeredgecolor="white", markersize=10)
    return ax


@styled
def recovery(rows, *, ax=None):
    """Test top-1 (%) of every cut: after it, each step of recovery, against lines for the dense model.

    rows: results.csv of one model; bars are means over seeds. Grey lines as in `accuracy_curve`. Returns the Axes.
    """
    cut = rows[~rows.stage.isin(["dense", "dense+epochs"])]
    name = series(cut).str.replace(", ", "\n") + "\n" + cut.target.map("{:.0%}".format)
    cut = cut.assign(name=name)
    sets = _sets_of_seeds(cut[cut.top1.notna()], ["name", "stage"])
    marks = _marks(_sets_of_seeds(cut, "name"))
    names, stages = list(dict.fromkeys(cut.name)), [s for s in STAGES if s in set(cut.stage)]
    longest = max(len(part) for name in names for part in name.split("\n"))
    space = max(0.2 + 0.175 * max(4, len(stages)), 0.2 + 0.095 * longest)  # inches for bars and the words below them
    ax = ax or plt.subplots(figsize=(max(WIDE[0], 3 + space * len(names)), WIDE[1]))[1]
    top1 = cut.groupby(["name", "stage"]).top1.mean()
    width = 0.8 / len(stages)
    fills = dict(zip(STAGES, ["", "", "///", "--", "..", "xx", "", "\\\\"], strict=True))
    hues = ["0.35", "0.35", "0.85", COLORS[8], COLORS[9], COLORS[1], COLORS[0], COLORS[2]]
    colors = dict(zip(STAGES, hues, strict=True))
    for i, stage in enumerate(stages):
        heights = [top1.get((name, stage), np.nan) for name in names]
        places = np.arange(len(names)) + (i - (len(stages) - 1) / 2) * width
        bars = ax.bar(places, heights, width, color=colors[stage], edgecolor="0.2", hatch=fills[stage])
        bars.set_label(STAGES[stage])
        texts = ["" if np.isnan(height) else f"{height:.0f}" for height in heights]
        for text in ax.bar_label(bars, texts, fontsize=9, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    _dense_lines(ax, rows, sets)
    words = [name + marks[name].replace(", ", "\n", 1) for name in names]
    ax.set_xticks(range(len(names)), words, fontsize=10)
    ax.set(ylabel=AXES["top1"][0], ylim=(0, 105))
    ax.grid(False, axis="x")
    _legend_beside(ax)
    return ax


@styled
def ladder(rows, *, names=(), ax=None):
    """Test top-1 (%) after each step of recovery from one cut, in their order, a line per series.

    rows: results.csv of one model and one budget (target_kind and target), with rows of the dense model for its grey
    lines, as in `accuracy_curve`. Points are means over seeds, bars their range; hollow points are of no training. The
    legend goes from the best at the last step to the worst. names: as for `tradeoff`. Returns the Axes.
    Raises ValueError for rows of several budgets, or of none.
    """
    cut = rows[~rows.stage.isin(["dense", "dense+epochs"]) & rows.stage.isin([*STAGES]) & rows.top1.notna()]
    budgets = cut[[c for c in ("target_kind", "target") if c in cut]].drop_duplicates()
    if len(budgets) != 1:
        raise ValueError(f"a ladder is of one budget, and the rows have {len(budgets)}: {budgets.values.tolist()}")
    stages = [stage for stage in STAGES if stage in set(cut.stage)]
    cut = cut.assign(series=series(cut), step=cut.stage.map(stages.index))
    final = cut[cut.step == cut.groupby("series").step.transform("max")].groupby("series").top1.mean()
    order = list(final.sort_values(ascending=False, kind="stable").index)
    cut["step"] += 0.025 * (cut.series.map(order.index) - (len(order) - 1) / 2)  # equal ones stand side by side
    look, marks = looks([*names, *cut.series]), _marks(_sets_of_seeds(cut, "series"))
    ax = ax or plt.subplots(figsize=(max(WIDE[0], 3.5 + 1.2 * len(stages)), 4.4))[1]
    for name in order:
        own = cut[cut.series == name]
        mean_and_range(ax, own.groupby("step").top1, label=name + marks[name], markersize=7, **look[name])
        untrained = own[~own.stage.isin(["finetuned", "distilled"])].groupby("step").top1.mean()
        hollow = look[name] | {"markerfacecolor": "white", "markersize": 7, "linestyle": ""}
        ax.plot(untrained.index, untrained, zorder=3, **hollow)
    _dense_lines(ax, rows, _sets_of_seeds(cut, ["series", "stage"]))
    ax.set_xticks(range(len(stages)), [STAGES[stage].replace(", ", ",\n") for stage in stages])
    ax.set(xlabel="step of recovery", ylabel=AXES["top1"][0], xlim=(-0.3, len(stages) - 0.7))
    _stretch_top(ax, cut.top1.min(), rows.top1.max())
    _legend_beside(ax)
    return ax


@styled
def speedup_bars(table, *, ax=None):
    """Times as fast as the first model, a group of bars per model and a bar per way of running it, with quartiles.

    table: columns model, speedup, speedup_q1, speedup_q3, and runtime, precision and batch where these vary, as
    bench.latency returns it; several rows of one model and way (seeds) become their mean. A short line shows what the
    MACs promise where `promised` is known. Returns the Axes.
    """
    names, ways = list(dict.fromkeys(table.model)), _ways(table)
    order = list(dict.fromkeys(ways))
    longest = max(len(part) for name in names for part in str(name).split("\n"))
    space = max(0.25 + 0.3 * len(order), 0.2 + 0.095 * longest)  # inches for a group of bars and the words below it
    ax = ax or plt.subplots(figsize=(max(WIDE[0], 3 + space * len(names)), WIDE[1]))[1]
    width = 0.8 / len(order)
    fills = ["", "///", "..", "xx", "\\\\", "++"]
    for i, way in enumerate(order):
        own = table[ways == way].groupby("model")[["speedup", "speedup_q1", "speedup_q3"]].mean().reindex(names)
        places = np.arange(len(names)) + (i - (len(order) - 1) / 2) * width
        spread = [(own.speedup - own.speedup_q1).clip(lower=0), (own.speedup_q3 - own.speedup).clip(lower=0)]
        style = {"color": COLORS[i % len(COLORS)], "edgecolor": "0.2", "hatch": fills[i % len(fills)]}
        bars = ax.bar(places, own.speedup, width, yerr=spread, capsize=2, label=way or None, **style)
        texts = ["" if np.isnan(value) else f"{value:.1f}" for value in own.speedup]
        for text in ax.bar_label(bars, texts, fontsize=8, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3})
    if "promised" in table:
        promised = table.groupby("model", sort=False).promised.mean().reindex(names)
        places = np.arange(len(names))
        ax.hlines(promised, places - 0.45, places + 0.45, color="0.1", linewidth=1.2, label="promised by the MACs")
    ax.axhline(1, color="0.35", linewidth=0.8, zorder=0)
    ax.set_xticks(range(len(names)), names, fontsize=10)
    ax.set(ylabel=f"times as fast as\n{str(names[0]).replace(chr(10), ' ')}")
    ax.grid(False, axis="x")
    _legend_beside(ax)
    return ax


@styled
def roofline(table, *, ax=None):
    """Work done per second over work per byte, under the machine's ceilings: a point per row, a colour per model.

    table: as bench.bounds returns it. A line for each precision: at its left the rate of the memory (a band, as
    caches make small operations faster), at its right that of matrix products. Returns the Axes.
    """
    ax = ax or plt.subplots(figsize=(WIDE[0], max(4.2, 0.8 + 0.25 * table.model.nunique())))[1]
    intensity = table.batch_macs / table.batch_bytes
    rate = table.batch_macs / (1000000 * table.latency_ms)  # 10^9 MACs per second
    reach = np.geomspace(intensity.min() / 2, intensity.max() * 2, 200)
    for precision, own in table.groupby("precision", sort=False):
        top, low, high = own.macs_per_s.max() / 1e9, own.bytes_per_s.min() / 1e9, own.bytes_per_s.max() / 1e9
        line = "-" if precision == "float32" else "--"
        ax.plot(reach, np.minimum(top, reach * high), color="0.3", linestyle=line, label=f"ceiling, {precision}")
        ax.fill_between(reach, np.minimum(top, reach * low), np.minimum(top, reach * high), color="0.9", zorder=0)
    ways = _ways(table)
    names, order = list(dict.fromkeys(table.model)), list(dict.fromkeys(ways))
    for i, name in enumerate(names):
        for j, way in enumerate(order):
            chosen = (table.model == name) & (ways == way)
            if chosen.any():
                style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[j % len(MARKERS)]}
                size = max(24, 160 * 0.6**i)  # the earlier ones show behind those that stand at the same place
                ax.scatter(intensity[chosen], rate[chosen], s=size, edgecolor="white", zorder=2 + i / 100, **style)
    for i, name in enumerate(names):
        ax.plot([], [], color=COLORS[i % len(COLORS)], linewidth=6, label=str(name).replace("\n", " "))
    for j, way in enumerate(order):
        if way:
            ax.plot([], [], color="0.4", linestyle="", marker=MARKERS[j % len(MARKERS)], label=way)
    ax.set(xscale="log", yscale="log", xlabel="MACs per byte moved", ylabel="10⁹ MACs per second")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    _legend_beside(ax)
    return ax


def _ways(table):
    """How each row was run, in words: those of runtime, precision and batch that vary in the table."""
    parts = []
    for column in ("runtime", "precision", "batch"):
        if column in table and table[column].nunique() > 1:
            parts.append(table[column].map("batch {}".format if column == "batch" else str))
    return functools.reduce(lambda a, b: a + ", " + b, parts) if parts else pd.Series("", table.index)


def _dense_lines(ax, rows, sets):
    """A grey line at the mean top-1 of the dense model (dash-dotted: trained for as many epochs) for each of sets, the
    seeds of cuts: so that all are held against dense models of their own seeds."""
    sets = sorted(dict.fromkeys(sets), key=len, reverse=True) or [tuple(rows.seed.unique())]
    for i, seeds in enumerate(sets):
        for stage, line in (("dense", "-"), ("dense+epochs", "-.")):
            top1 = rows[(rows.stage == stage) & rows.seed.isin(seeds)].top1
            if len(top1):
                label = STAGES[stage] + (_of_seeds(seeds) if len(sets) > 1 else "")
                color = "0.35" if i == 0 else "0.65"
                ax.axhline(top1.mean(), color=color, linestyle=line, linewidth=1, label=label, zorder=0)


def mean_and_range(ax, groups, **style):
    """Draw the mean of each group of numbers over the group's name, with a bar from its lowest to its highest where any
    differ. groups: a grouped Series, its names numbers. style: of ax.errorbar."""
    line = groups.agg(["mean", "min", "max"])
    line["mean"] = line["mean"].clip(line["min"], line["max"])  # that of three equal numbers may be an ulp beside them
    spread = [line["mean"] - line["min"], line["max"] - line["mean"]]
    ax.errorbar(line.index, line["mean"], yerr=spread if np.any(spread) else None, capsize=3, **style)


def _stretch_top(ax, low, high):
    """A logarithmic y axis downwards from the best accuracy: a point lost there takes more room than one far below.

    low, high: percent, what is to be seen. Ticks are in percent.
    """
    zero = high + 2  # percent: what the logarithm counts from

    def place(value):
        return -np.log(np.maximum(zero - value, 1e-6))

    ax.set_yscale("function", functions=(place, lambda placed: zero - np.exp(-placed)))
    bottom, top = zero - 1.12 * (zero - low), high + 0.4
    ax.set_ylim(bottom, top)
    ticks = []
    for step in (10, 5, 2, 1):
        first = np.ceil(max(0, bottom, high - 10 * step) / step) * step  # fine steps on top only
        for tick in np.arange(first, top, step):
            if all(abs(place(tick) - place(other)) > (place(top) - place(bottom)) / 14 for other in ticks):
                ticks.append(tick)
    ax.set_yticks(sorted(ticks), labels=[f"{tick:g}" for tick in sorted(ticks)])
    ax.yaxis.set_minor_locator(ticker.NullLocator())


def _table(frame, index, columns, value):
    """frame as a table whose rows and columns keep their order."""
    table = frame.pivot_table(index=index, columns=columns, values=value, sort=False, dropna=False)
    return table.reindex(index=dict.fromkeys(frame[index]), columns=dict.fromkeys(frame[columns]))


def _heat(ax, table, *, label, **options):
    small, bar = {"fontsize": 9}, {"label": label}
    sns.heatmap(table, ax=ax, annot=True, annot_kws=small, cbar_kws=bar, linewidths=0.5, **options)
    ax.tick_params(left=False, bottom=False)
    ax.tick_params(axis="y", rotation=0)
    ax.grid(False)
    return ax


def _legend_beside(ax):
    """A legend to the right of the axes, where it hides no point."""
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


# -- files


def caption(rows, drawn=None):
    """What a figure must say of where its rows come from: study, seeds, meters, machine, versions, commit.

    rows: results.csv. drawn: the rows of another table that the figure shows; of rows those of its models and seeds.
    """
    seeds = seeds_of(rows if drawn is None else drawn)
    if drawn is not None:
        shown = pd.MultiIndex.from_frame(drawn[["model", "seed"]])
        rows = rows[pd.MultiIndex.from_frame(rows[["model", "seed"]]).isin(shown)]

    def all_of(column):
        known = rows[column].dropna() if column in rows else []
        return ", ".join(str(value) for value in dict.fromkeys(known)) or "unknown"

    return (
        f"Study {all_of('study')} on {all_of('data')}; {all_of('model')}; "
        f"seeds {seeds}, split {all_of('split_seed')}. "
        f"MACs by vitlab's closed form; latency as median. {all_of('device')}, threads: {all_of('threads')}; "
        f"torch {all_of('torch')}, timm {all_of('timm')}, commit {all_of('commit')}, "
        f"{rows.date.astype(str).max()[:10]}."
    )


@styled
def save(drawn, path, *, caption=None):
    """Write a Figure, or the one that an Axes is in, as path + ".svg", ".pdf" and ".png", caption as ".txt".

    path: without ending. The same drawing gives the same bytes. The figure is closed, and returned for display.
    """
    figure = drawn.figure
    for ending, metadata in (("svg", {"Date": None}), ("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        record.write_atomic(
            f"{path}.{ending}",
            functools.partial(figure.savefig, format=ending, metadata=metadata, bbox_inches="tight"),
        )
    if caption:
        record.write_atomic(f"{path}.txt", caption + "\n")
    plt.close(figure)
    return figure


def save_table(frame, path, *, formats=None, kinds=("csv", "md", "tex")):
    """Write frame as path + ".csv" (as it is), ".md" and ".tex" (formatted, for people), or those of kinds.

    A frame without rows (a study run in part has some) is not written, and a line says so. formats: {column:
    format such as "{:.1f}"}; other numbers have three digits after the point at most. What is missing is left
    empty. Raises ValueError for an unknown column.
    """
    formats = formats or {}

    def shown(column):
        def one(value):
            if pd.isna(value):
                return ""
            if column.name in formats:
                return formats[column.name].format(value)
            return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

        return column.map(one)

    for column in formats:
        if column not in frame:
            raise ValueError(record.unknown("column", column, frame.columns))
    if frame.empty:
        record.say(f"{Path(path).name}: no rows yet, not written")
        return
    text = frame.astype(object).apply(shown)
    align = ["right" if pd.api.types.is_numeric_dtype(kind) else "left" for kind in frame.dtypes]
    styler = text.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    write = {
        "csv": lambda: frame.to_csv(index=False),
        "md": lambda: text.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n",
        "tex": lambda: styler.to_latex(hrules=True, column_format="".join(side[0] for side in align)),
    }
    for kind in kinds:
        record.write_atomic(f"{path}.{kind}", write[kind]())


@styled
def image_grid(images, *, labels=None, classes, columns=10):
    """Pictures in a grid with their class above: one per class of a data.Split as stored, or a batch as the
    model sees it (float [B, 3, H, W], stretched to the full range for the eye) with its labels.
    Returns a Figure.
    """
    if labels is None:
        first = {int(label): i for i, label in reversed(list(enumerate(images.labels)))}
        chosen = sorted(first)[: 3 * columns]
        shown = [images.store[images.indices[first[label]]] for label in chosen]
        names = [classes[label] for label in chosen]
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        shown = ((images - low) / (high - low)).permute(0, 2, 3, 1).cpu().numpy()
        names = [classes[int(label)] for label in labels]
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(1.1 * columns, 1.35 * rows), squeeze=False)
    for ax in panels.flat:
        ax.axis("off")
    for ax, picture, name in zip(panels.flat, shown, names, strict=False):
        ax.imshow(picture)
        ax.set_title(name[:12], fontsize=9)
    return figure


@styled
def sensitivity_curves(frame):
    """Rise of the loss (nats) over the share cut from one layer alone: a panel per role, a line per block.

    frame: columns role, block, ratio, increase, as sensitivity.curves returns it. Returns a Figure.
    """
    roles = list(dict.fromkeys(frame.role))
    size = (1 + 2.6 * len(roles), HALF[1])
    figure, panels = plt.subplots(1, len(roles), figsize=size, sharey=True, squeeze=False)
    blocks = list(dict.fromkeys(frame.block.dropna()))
    shades = dict(zip(blocks, sns.color_palette("viridis", len(blocks)), strict=True))
    for ax, role in zip(panels[0], roles, strict=True):
        for block, line in frame[frame.role == role].groupby("block", sort=False, dropna=False):
            ax.plot(line.ratio, line.increase, marker=".", color=shades.get(block, "0.3"), label=block)
        ax.set(xlabel=f"share of {role} cut")
    panels[0, 0].set(ylabel="rise of the loss (nats)")
    handles = [plt.Line2D([], [], color=color, marker=".", label=block) for block, color in shades.items()]
    panels[0, -1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled
def agreement(frame, *, ax=None):
    """Rank correlation between score and measured rise of the loss, a bar per criterion and kind of unit.

    frame: columns criterion, kind, spearman, as sensitivity.agreement returns it. Returns the Axes.
    """
    ax = ax or plt.subplots(figsize=(max(HALF[0], 2.2 + 0.95 * frame.criterion.nunique()), HALF[1]))[1]
    sns.barplot(frame, x="criterion", y="spearman", hue="kind", errorbar=("pi", 100), ax=ax)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(
        xlabel="",
        ylabel="rank correlation with\nmeasured rise of the loss",
        ylim=(min(0, frame.spearman.min() - 0.1), 1),
    )
    _legend_beside(ax)
    return ax


@styled
def calibration(frame, *, ax=None):
    """Measured over predicted rise of the loss (nats), both logarithmic: a point per cut, a colour per criterion and a
    marker per kind (KINDS has 13); on the diagonal the prediction is right, in the grey band within a factor of three.

    frame: columns criterion, kind, predicted, measured. What is below the lowest decade shown (that of the smallest
    value above 0, but at most four under the largest), so also 0 and less, is drawn hollow on the dotted edge.
    Returns the Axes. Raises ValueError where no value is above 0.
    """
    frame = frame.dropna(subset=["predicted", "measured"])
    values = frame[["predicted", "measured"]].to_numpy(float)
    if not (values > 0).any():
        raise ValueError("no predicted or measured rise of the loss is above 0: a logarithmic axis has nothing to show")
    top = values.max()
    floor = 10 ** np.floor(np.log10(max(values[values > 0].min(), top / 1e4)))
    reach = np.array([floor / 1.5, 1.8 * top])
    criteria, kinds = (list(dict.fromkeys(frame[column])) for column in ("criterion", "kind"))
    height = max(4.4, 1.4 + 0.23 * (len(criteria) + len(kinds)))  # inches: as many lines are in the legend
    ax = ax or plt.subplots(figsize=(height + 2.4, height))[1]
    ax.fill_between(reach, reach / 3, reach * 3, color="0.93", zorder=0, label="within a factor of 3")
    ax.plot(reach, reach, color="0.35", linewidth=1, zorder=1, label="as predicted")
    colors = looks(criteria)
    for (criterion, kind), own in frame.groupby(["criterion", "kind"], sort=False):
        color, marker = colors[criterion]["color"], KINDS[kinds.index(kind) % len(KINDS)]
        for hollow, part in own.groupby((own[["predicted", "measured"]] < floor).any(axis=1)):
            fill = {"facecolor": "white", "edgecolor": color} if hollow else {"facecolor": color, "edgecolor": "white"}
            places = part.predicted.clip(lower=floor), part.measured.clip(lower=floor)
            ax.scatter(*places, s=45, marker=marker, zorder=2 + hollow, clip_on=False, **fill)
    for criterion in criteria:
        ax.plot([], [], color=colors[criterion]["color"], linewidth=6, label=criterion)
    for i, kind in enumerate(kinds):
        ax.plot([], [], color="0.4", linestyle="", marker=KINDS[i % len(KINDS)], label=kind)
    if (values < floor).any():
        style = {"color": "0.4", "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        ax.plot([], [], label=f"hollow: below {floor:g}", **style)
        ax.axhline(floor, color="0.35", linestyle=":", linewidth=0.8)
        ax.axvline(floor, color="0.35", linestyle=":", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlim=reach, ylim=reach)
    ax.set(xlabel="predicted rise of the loss (nats)", ylabel="measured rise of the loss (nats)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())
    ax.set_box_aspect(1)
    _legend_beside(ax)
    return ax


@styled
def class_change(frame, *, ax=None):
    """Change of top-1 (percentage points) by class, the most forgotten on top; of more than 30 classes the 12 worst
    and the 12 best, with a gap that says how many are not shown.

    frame: columns class, images and change, as evaluate.compare gives them; several rows of a class (seeds) become
    mean and range. The number of its images stands behind each name: of few, one weighs much. Classes without images
    are left out. Returns the Axes. Raises ValueError where none is left.
    """
    change = frame.dropna(subset="change").groupby("class", sort=False).change.agg(["mean", "min", "max"])
    if change.empty:
        raise ValueError("no class has a change of its top-1 to show")
    change["mean"] = change["mean"].clip(change["min"], change["max"])  # as in mean_and_range
    change = change.sort_values("mean", kind="stable")
    hidden = max(0, len(change) - 24) if len(change) > 30 else 0
    shown = pd.concat([change.head(12), change.tail(12)]) if hidden else change
    places = np.arange(len(shown)) + np.where(np.arange(len(shown)) < 12, 0, 1.5 * (hidden > 0))
    ax = ax or plt.subplots(figsize=(6.4, 1 + 0.24 * (places[-1] + 1)))[1]
    colors = np.where(shown["mean"] < 0, COLORS[3], COLORS[0])
    bars = ax.barh(places, shown["mean"], 0.75, color=colors)
    spread = [shown["mean"] - shown["min"], shown["max"] - shown["mean"]]
    if np.any(spread):
        ax.errorbar(shown["mean"], places, xerr=spread, fmt="none", ecolor="0.2", capsize=2, elinewidth=1)
    else:
        ax.bar_label(bars, [f"{value:+.1f}" for value in shown["mean"]], fontsize=8, padding=3)
    if hidden:
        words, box = f"… {hidden} classes between …", {"facecolor": "white", "edgecolor": "none", "pad": 1}
        middle = {"ha": "center", "va": "center", "transform": ax.get_yaxis_transform()}
        ax.text(0.5, 12.25, words, fontsize=9, color="0.35", bbox=box, **middle)
    ax.axvline(0, color="0.35", linewidth=0.8)
    counts = frame.groupby("class").images.first()
    ax.set_yticks(places, [f"{str(name)[:24]} ({counts[name]:g})" for name in shown.index], fontsize=9)
    ax.set(xlabel="change of top-1 (percentage points)", ylim=(places[-1] + 0.7, -0.7))
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    return ax


@styled
def changed_images(images, frame, classes=None, *, columns=6):
    """The pictures whose prediction changed most, the furthest first, with "true: before → after" above each.

    images: the data.Split that was compared, shown as stored. frame: columns image (place in the split), label, before,
    after, as in evaluate.compare's images. classes: names, where frame has numbers of classes. Green is newly right,
    red newly wrong, black neither. Returns a Figure. Raises ValueError for no rows and for places the split has not.
    """
    if frame.empty or not frame.image.between(0, len(images) - 1).all():
        raise ValueError(f"need the places of images in a split of {len(images)}, got {frame.image.tolist()}")
    rows = -(-len(frame) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(1.7 * columns, 2.15 * rows), squeeze=False)
    for ax in panels.flat:
        ax.axis("off")
    for ax, row in zip(panels.flat, frame.itertuples(), strict=False):
        ax.imshow(images.store[images.indices[row.image]])
        label, before, after = (
            value if isinstance(value, str) or classes is None else classes[int(value)]
            for value in (row.label, row.before, row.after)
        )
        color = {(False, True): COLORS[2], (True, False): COLORS[3]}.get((before == label, after == label), "0.1")
        words = [str(word)[:18] for word in (label, before, after)]
        ax.set_title(f"{words[0]}:\n{words[1]}\n→ {words[2]}", fontsize=9, color=color)
    return figure
