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
}
COLORS = sns.color_palette("colorblind").as_hex()
MARKERS = "os^DvPX"  # fewer than colours: the eleventh series differs from the first
DENSE = {"color": "0.35", "marker": "_"}
STAGES = {"dense": "dense", "dense+epochs": "dense, same epochs", "cut": "after the cut"}
STAGES |= {"compensated": "compensated", "reconstructed": "reconstructed", "finetuned": "fine-tuned"}
LINES = {
    "finetuned": {"linestyle": "-"},
    "reconstructed": {"linestyle": "-.", "markerfacecolor": "white"},
    "compensated": {"linestyle": "--", "markerfacecolor": "white"},
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
        with plt.rc_context(STYLE):
            return draw(*arguments, **options)

    return inside


# -- statistics


def pareto(cost, value):
    """Which points no other beats, by costing at most as much and being worth more, or less and as much.

    cost, value: Series of one index; low cost and high value are good. Returns a bool Series.
    """
    c, v = cost.to_numpy(), value.to_numpy()
    beaten = (c[:, None] >= c) & (v[:, None] < v) | (c[:, None] > c) & (v[:, None] <= v)
    return pd.Series(~beaten.any(axis=1), cost.index)


def series(rows):
    """Name of each row's line: its method, with form and criterion where the method occurs with several."""
    names = rows.method.astype(str)
    for column in ("form", "criterion"):
        if column in rows:
            several = rows.groupby("method")[column].transform("nunique") > 1
            names = names.where(~several, names + ", " + rows[column].fillna("-").astype(str))
    return names


def looks(names):
    """{name: color and marker} in the order of names; dense is grey in every figure."""
    others = [name for name in dict.fromkeys(names) if name != "dense"]
    chosen = {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(others)
    }
    return {"dense": DENSE, **chosen}


# -- figures


@styled
def weight_histograms(frame):
    """Distributions of weights: a panel per stage, and a row of panels per `method` and `target` if given.

    frame: as prune.histogram returns it, with method and target added for several. Counts are on a
    logarithmic axis; the zeros stand apart in a hatched bar at the right, where they do not hide the rest.
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
            ax.stairs(part["count"], edges, fill=True, color=COLORS[0])
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
            _mean_and_range(ax, line.groupby("epoch")[column], label=label, **style)
        ax.set_title(method, fontsize=12)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    panels[0][0].set_ylabel("training top-1 (%)" if column == "train_top1" else column.replace("_", " "))
    return figure


@styled
def accuracy_curve(rows, *, ax=None):
    """Test top-1 (%) over the share cut: a colour per series, a kind of line per stage.

    rows: results.csv of one model; bars are the range over seeds, grey lines the dense model.
    Returns the Axes.
    """
    ax = ax or plt.subplots(figsize=WIDE)[1]
    cut = rows[rows.target.notna() & ~rows.stage.isin(["dense", "dense+epochs"])]
    cut = cut.assign(series=series(cut))
    look = looks(cut.series)
    for (name, stage), line in cut.groupby(["series", "stage"], sort=False):
        style = look[name] | LINES.get(stage, {})
        _mean_and_range(ax, line.groupby("target").top1, **style)
    for name in dict.fromkeys(cut.series):
        ax.plot([], [], label=name, **look[name])
    for stage, style in LINES.items():
        if stage in set(cut.stage):
            ax.plot([], [], color="0.35", label=STAGES[stage], **style)
    _dense_lines(ax, rows)
    kept = set(cut.target_kind) & {"macs", "params", "bytes", "latency"} if "target_kind" in cut else ()
    ax.set(xlabel="share kept" if kept else "share cut", ylabel=AXES["top1"][0])
    ax.xaxis.set_major_formatter("{x:.0%}")
    _legend_beside(ax)
    return ax


@styled
def tradeoff(rows, x="macs", *, ax=None):
    """Test top-1 (%) over a cost, one colour and marker per series; a line joins the points no other beats.

    rows: results.csv of one model, masked models included (they stand where their dense tensors put them).
    x: macs, macs_ideal, params, nonzero, bytes_disk, bytes_memory, latency_ms, memory_mb, or
    relative_latency (the caller's 1 / speedup: of rows of several sessions). Returns the Axes.
    Raises ValueError for another column or where no row has it.
    """
    if x not in AXES or x not in rows:
        raise ValueError(record.unknown("cost", x, [c for c in AXES if c in rows and c != "top1"]))
    rows = rows[rows[x].notna() & rows.top1.notna() & rows.stage.isin(["dense", "dense+epochs", "finetuned"])]
    if rows.empty:
        raise ValueError(f"no fine-tuned or dense row has {x}; it is measured in 6_efficiency")
    rows = rows.assign(series=series(rows))
    height = max(WIDE[1], 0.8 + 0.25 * rows.series.nunique())  # inches: as many lines are in the legend
    ax = ax or plt.subplots(figsize=(WIDE[0], height))[1]
    keys = ["series", "target", "stage"]
    points = rows.groupby(keys, dropna=False, sort=False)[[x, "top1"]].mean().reset_index()
    label, factor = AXES[x]
    points[x] *= factor
    front = points[pareto(points[x], points.top1)].sort_values(x)
    ax.plot(
        front[x],
        front.top1,
        color="0.6",
        linewidth=1,
        drawstyle="steps-post",
        zorder=1,
        label="best for its cost",
    )
    look = looks(points.series)
    for name, group in points.groupby("series", sort=False):
        style = look[name] if name != "dense" else {"color": "0.35", "marker": "h"}
        ax.scatter(group[x], group.top1, s=55, label=name, zorder=2, edgecolor="white", **style)
    ax.set(xlabel=label, ylabel=AXES["top1"][0])
    _legend_beside(ax)
    return ax


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
def rank_correlation(table, *, ax=None):
    """Rank correlations between criteria. table: square, as `frame.corr("spearman")` returns it."""
    ax = ax or plt.subplots(figsize=(2.8 + 0.75 * len(table), 1.6 + 0.5 * len(table)))[1]
    _heat(ax, table, label="rank correlation", fmt=".2f", cmap="vlag", vmin=-1, vmax=1)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="x", rotation=30)
    return ax


@styled
def recovery(rows, *, ax=None):
    """Test top-1 (%) of every cut: after it, each step of recovery, against lines for the dense model.

    rows: results.csv of one model; bars are means over seeds. Returns the Axes.
    """
    cut = rows[~rows.stage.isin(["dense", "dense+epochs"])]
    name = series(cut).str.replace(", ", "\n") + "\n" + cut.target.map("{:.0%}".format)
    cut = cut.assign(name=name)
    names, stages = list(dict.fromkeys(cut.name)), [s for s in STAGES if s in set(cut.stage)]
    longest = max(len(part) for name in names for part in name.split("\n"))
    space = max(0.9, 0.2 + 0.095 * longest)  # inches for a group of bars and the words below it
    ax = ax or plt.subplots(figsize=(max(WIDE[0], 3 + space * len(names)), WIDE[1]))[1]
    top1 = cut.groupby(["name", "stage"]).top1.mean()
    width = 0.8 / len(stages)
    fills = dict(zip(STAGES, ["", "", "///", "..", "xx", ""], strict=True))
    colors = dict(zip(STAGES, ["0.35", "0.35", "0.85", COLORS[9], COLORS[1], COLORS[0]], strict=True))
    for i, stage in enumerate(stages):
        heights = [top1.get((name, stage), np.nan) for name in names]
        places = np.arange(len(names)) + (i - (len(stages) - 1) / 2) * width
        bars = ax.bar(places, heights, width, color=colors[stage], edgecolor="0.2", hatch=fills[stage])
        bars.set_label(STAGES[stage])
        texts = ["" if np.isnan(height) else f"{height:.0f}" for height in heights]
        for text in ax.bar_label(bars, texts, fontsize=9, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    _dense_lines(ax, rows)
    ax.set_xticks(range(len(names)), names, fontsize=10)
    ax.set(ylabel=AXES["top1"][0], ylim=(0, 105))
    ax.grid(False, axis="x")
    _legend_beside(ax)
    return ax


@styled
def speedup_bars(table, *, ax=None):
    """Times as fast as the first model, a group of bars per model and a bar per way of running it, with quartiles.

    table: columns model, speedup, speedup_q1, speedup_q3, and runtime, precision and batch where these vary, as
    bench.latency returns it. A short line shows what the MACs promise where `promised` is known. Returns the Axes.
    """
    names, ways = list(dict.fromkeys(table.model)), _ways(table)
    order = list(dict.fromkeys(ways))
    longest = max(len(part) for name in names for part in str(name).split("\n"))
    space = max(0.25 + 0.3 * len(order), 0.2 + 0.095 * longest)  # inches for a group of bars and the words below it
    ax = ax or plt.subplots(figsize=(max(WIDE[0], 3 + space * len(names)), WIDE[1]))[1]
    width = 0.8 / len(order)
    fills = ["", "///", "..", "xx", "\\\\", "++"]
    for i, way in enumerate(order):
        own = table[ways == way].set_index("model").reindex(names)
        places = np.arange(len(names)) + (i - (len(order) - 1) / 2) * width
        spread = [own.speedup - own.speedup_q1, own.speedup_q3 - own.speedup]
        style = {"color": COLORS[i % len(COLORS)], "edgecolor": "0.2", "hatch": fills[i % len(fills)]}
        bars = ax.bar(places, own.speedup, width, yerr=spread, capsize=2, label=way or None, **style)
        texts = ["" if np.isnan(value) else f"{value:.1f}" for value in own.speedup]
        for text in ax.bar_label(bars, texts, fontsize=8, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3})
    if "promised" in table:
        promised = table.groupby("model", sort=False).promised.first().reindex(names)
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


def _dense_lines(ax, rows):
    """A grey line at the mean top-1 of the dense model, dash-dotted if trained for as many epochs."""
    for stage, line in (("dense", "-"), ("dense+epochs", "-.")):
        top1 = rows[rows.stage == stage].top1
        if len(top1):
            ax.axhline(top1.mean(), color="0.35", linestyle=line, linewidth=1, label=STAGES[stage], zorder=0)


def _mean_and_range(ax, groups, **style):
    """Mean over a grouped Series' index, with a bar from its lowest to its highest where they differ."""
    line = groups.agg(["mean", "min", "max"])
    spread = [line["mean"] - line["min"], line["max"] - line["mean"]]
    ax.errorbar(line.index, line["mean"], yerr=spread if np.any(spread) else None, capsize=3, **style)


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


def caption(rows):
    """What a figure must say of where its rows come from: study, seeds, meters, machine, versions, commit."""

    def all_of(column):
        known = rows[column].dropna() if column in rows else []
        return ", ".join(str(value) for value in dict.fromkeys(known)) or "unknown"

    return (
        f"Study {all_of('study')} on {all_of('data')}; {all_of('model')}; "
        f"seeds {all_of('seed')}, split {all_of('split_seed')}. "
        f"MACs by vitlab's closed form; latency as median. {all_of('device')}, threads: {all_of('threads')}; "
        f"torch {all_of('torch')}, timm {all_of('timm')}, commit {all_of('commit')}, "
        f"{rows.date.astype(str).max()[:10]}."
    )


@styled
def save(drawn, path, *, caption=None):
    """Write a Figure, or the one that an Axes is in, as path + ".svg" and ".png", caption as ".txt".

    path: without ending. The same drawing gives the same bytes. The figure is closed.
    """
    figure = drawn.figure
    for ending, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        record.write_atomic(
            f"{path}.{ending}",
            functools.partial(figure.savefig, format=ending, metadata=metadata, bbox_inches="tight"),
        )
    if caption:
        record.write_atomic(f"{path}.txt", caption + "\n")
    plt.close(figure)


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
    ax = ax or plt.subplots(figsize=HALF)[1]
    sns.barplot(frame, x="criterion", y="spearman", hue="kind", errorbar=("pi", 100), ax=ax)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(
        xlabel="",
        ylabel="rank correlation with\nmeasured rise of the loss",
        ylim=(min(0, frame.spearman.min() - 0.1), 1),
    )
    _legend_beside(ax)
    return ax
