"""Draw the results of a study: frames in, Axes or Figures out. No torch.

Colour and marker both stand for the method. Axes carry units and have no title, which the slide
has.

Public: accuracy_curve, agreement, class_change, draw_each, ladder, prediction_audit, probes,
recovery, roofline, save, sensitivity_curves, speedup_bars, tradeoff, training_curves.
"""

import functools
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib import ticker
from matplotlib.lines import Line2D

from vitlab import files
from vitlab.names import check
from vitlab.report import _style, tables
from vitlab.report._style import (
    COLORS,
    DENSE,
    HALF,
    KINDS,
    LINES,
    MARKERS,
    WIDE,
    error_bars,
    legend_beside,
    looks,
    mean_and_range,
    new_axes,
    panels_beside,
    shades,
    styled,
)
from vitlab.report.tables import DENSE_POINTS, STAGES, TOP1, caption


def _named_cuts(results):
    """Return the results of models with a cut, with the column series."""
    cuts = tables.only_cuts(results)
    return cuts.assign(series=tables.series(cuts))


def _legend_entry(ax, label, **style):
    """Name a style of ax.plot in the legend without drawing a point."""
    ax.plot([], [], label=label, **style)


def _legend_of(ax, colors, markers):
    """Name in the legend what colours and markers stand for, as both stand for different things.

    colors, markers: {name: colour or marker}.
    """
    for name, color in colors.items():
        _legend_entry(ax, name, color=color, linewidth=6)
    for name, marker in markers.items():
        _legend_entry(ax, name, color="0.4", linestyle="", marker=marker)


# -- accuracy


@styled
def training_curves(history):
    """Draw accuracy over the epochs: a panel for each method, a line for each target.

    history: lines of history.csv with method, target, epoch and train_top1 (%); several seeds
        become mean and range.
    Returns a Figure.
    """
    figure, panels = panels_beside(history.groupby("method", sort=False), 1, 3.4)
    # A target has one colour in all panels.
    styles = looks(sorted(history.target.dropna().unique()))
    for ax, method, rows in panels:
        for target, line in rows.groupby("target", dropna=False):
            # Without a target, the line is of the dense model.
            label = f"{target:.0%} cut" if pd.notna(target) else method
            look = styles.get(target, DENSE)
            mean_and_range(ax, line.groupby("epoch").train_top1, label=label, **look)
        ax.set_title(method)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    figure.axes[0].set_ylabel("training top-1 (%)")
    return figure


@styled
def accuracy_curve(results):
    """Draw test top-1 (%) over the share cut.

    Bars are the range over seeds. Grey lines are the dense model's.

    results: results.csv of one model, whose targets are shares that go.
    Returns the Axes.
    """
    ax = new_axes(*WIDE)
    cuts = _named_cuts(results)
    # A series has a colour, a stage a kind of line.
    styles = looks(cuts.series)
    for (name, stage), line in cuts.groupby(["series", "stage"], sort=False):
        look = styles[name] | LINES.get(stage, {})
        mean_and_range(ax, line.groupby("target").top1, **look)
    # A series of fewer seeds than others is named with them.
    for name, mark in tables.marks(cuts, "series").items():
        _legend_entry(ax, name + mark, **styles[name])
    for stage, look in LINES.items():
        if stage in set(cuts.stage):
            _legend_entry(ax, STAGES[stage], color="0.35", **look)
    _dense_lines(ax, results, cuts)
    ax.set(xlabel="share cut")
    ax.xaxis.set_major_formatter("{x:.0%}")
    _accuracy_axis(ax, cuts.top1.min(), results.top1.max())
    legend_beside(ax)
    return ax


@styled
def tradeoff(results, x="macs", *, names=()):
    """Draw test top-1 (%) over a cost.

    Points are means over seeds, bars their range. Rings and a dark step line are at the points that
    no other beats.

    results: results.csv of one model. Masked models stand where their dense tensors put them.
    x: macs, macs_ideal, params, nonzero, bytes_disk, bytes_memory, latency_ms, memory_mb, or
        relative_latency. The caller makes that column as 1 / speedup from results of several
        sessions.
    names: `series` of more results, so that each looks the same in several figures.
    Returns the Axes.
    Raises ValueError for another column or where no result has it.
    """
    check("cost", x, tables.costs_of(results))
    final = _final_results(results.rename(columns={x: "cost"}))
    if final.empty:
        raise ValueError(
            f"no fine-tuned, reconstructed or dense result has {x}; it is measured in 6_efficiency"
        )
    unit, factor = tables.AXES[x]
    points = _final_points(final, factor)
    dense = {STAGES[stage]: look for stage, look in DENSE_POINTS.items()}
    # A series has a colour and a marker. Controls are grey: the dense model, the same with as many
    # epochs of training, and random cuts.
    styles = looks([*names, *points.series]) | dense
    marks = tables.marks(final, "series")
    height = max(4.4, 1.2 + 0.23 * len(marks))  # inches: the legend has as many lines
    ax = new_axes(WIDE[0] + 1, height)
    _front(ax, points)
    # Dense models come first, then random cuts, then all others.
    series = sorted(
        points.series.unique(), key=lambda name: (name not in dense, not tables.is_random(name))
    )
    for name in series:
        line = points[points.series == name]
        _line(ax, line, styles[name], name + marks[name])
    if (points.stage == "reconstructed").any():
        label = "hollow: reconstructed,\nnot trained"
        ax.scatter([], [], s=40, label=label, facecolor="white", edgecolor="0.35")
    ax.set(xlabel=unit)
    _accuracy_axis(ax, final.top1.min(), final.top1.max())
    legend_beside(ax)
    return ax


def _final_results(results):
    """Return the results of the last stage of each cut, and of dense models of the same seeds."""
    results = results.dropna(subset=["cost", "top1"])
    results = results[
        results.stage.isin([*DENSE_POINTS, "reconstructed", "finetuned", "distilled"])
    ]
    cuts = tables.only_cuts(results)
    if len(cuts):
        results = results[results.seed.isin(cuts.seed)]
    words = results.stage.where(results.stage.isin(DENSE_POINTS)).map(STAGES)
    results = results.assign(
        series=words.fillna(tables.series(results)), is_distilled=results.stage == "distilled"
    )
    # What was distilled was fine-tuned before, which is not its last stage.
    cut = results.groupby(["series", "target_kind", "target"], dropna=False)
    return results[(results.stage != "finetuned") | ~cut.is_distilled.transform("any")]


def _final_points(results, factor):
    """Return a point for each series, target and stage of the final results.

    factor: of the cost, to the unit of its axis.
    Returns a frame with these columns and seeds (a tuple), cost_mean, cost_below, cost_above,
    top1_mean, top1_below and top1_above.
    """
    keys = ["series", "target_kind", "target", "stage"]
    groups = results.groupby(keys, sort=False, dropna=False)
    cost = tables.ranges_of(groups.cost) * factor
    top1 = tables.ranges_of(groups.top1)
    seeds = tables.sets_of_seeds(results, keys).rename("seeds")
    points = pd.concat([cost.add_prefix("cost_"), top1.add_prefix("top1_"), seeds], axis=1)
    return points.reset_index()


def _front(ax, points):
    """Ring the points that no other of as many seeds beats, and join them by a step line."""
    is_dense = points.stage.isin(DENSE_POINTS)
    counts = points.seeds.map(len)
    # Cuts of fewer seeds than others stand back: a single one may be lucky. Dense models stay.
    most = counts[~is_dense].max()
    ranked = points[is_dense | (counts == most)]
    best = ranked[tables.pareto(ranked.cost_mean, ranked.top1_mean)].sort_values("cost_mean")
    # The line goes on to the right edge, as a dearer model need not be worse than the last one.
    edge = points.cost_mean.max() + 0.04 * np.ptp(points.cost_mean)
    costs = [*best.cost_mean, edge]
    heights = [*best.top1_mean, best.top1_mean.iloc[-1]]
    look = {"linewidth": 1.2, "color": "0.25"}
    ax.plot(costs, heights, drawstyle="steps-post", zorder=1, **look)
    ring = {"s": 150, "zorder": 5, "facecolor": "none", "edgecolor": "0.25", "linewidth": 1.2}
    ax.scatter(best.cost_mean, best.top1_mean, **ring)
    label = "best for its cost"
    if len(ranked) < len(points):
        label += f",\nof {most:g} seeds"
    _legend_entry(ax, label, color="0.25", marker="o", markersize=11, markerfacecolor="none")


def _line(ax, points, look, label):
    """Draw the points of one series, with a line across if they are of dense models."""
    color = look["color"]
    # What is reconstructed was not trained yet and has a hollow marker.
    for is_hollow, part in points.groupby(points.stage == "reconstructed"):
        _points(ax, part.sort_values("cost_mean"), look, is_hollow)
    if points.stage.iloc[0] in DENSE_POINTS:
        top1 = points.top1_mean.mean()
        ax.axhline(top1, color=color, linewidth=0.8, linestyle=":", zorder=0)
    ax.scatter([], [], s=55, label=label, **look)


def _points(ax, points, look, is_hollow):
    """Draw points of one series with bars for their range and, if trained, a line through them."""
    places = points.cost_mean, points.top1_mean
    color = look["color"]
    if is_hollow:
        hollow = {"s": 30, "zorder": 4, "facecolor": "white", "linewidth": 1.4}
        ax.scatter(*places, marker=look["marker"], edgecolor=color, **hollow)
    else:
        # Filled points lie below the hollow ones of the same series, those of dense models on top.
        ax.scatter(*places, s=60, **{"zorder": 3} | look)
        ax.plot(*places, color=color, linewidth=0.8, alpha=0.5, zorder=1)
    x = points[["cost_below", "cost_above"]].to_numpy().T
    y = points[["top1_below", "top1_above"]].to_numpy().T
    if x.any() or y.any():
        ax.errorbar(*places, xerr=x, yerr=y, fmt="none", ecolor=color, zorder=2)


_FILLS = {  # colour and hatch of a stage's bars
    "cut": ("0.85", "///"),
    "folded": (COLORS[8], "--"),
    "compensated": (COLORS[9], ".."),
    "reconstructed": (COLORS[1], "xx"),
    "finetuned": (COLORS[0], ""),
    "distilled": (COLORS[2], "\\\\"),
}


@styled
def recovery(results):
    """Draw test top-1 (%) of every cut as bars: after it and after each step of recovery.

    Bars are means over seeds. Grey lines are the dense model's.

    results: results.csv of one model.
    Returns the Axes.
    """
    cuts = _named_cuts(results)
    # A name has a line for each part, as names stand side by side below the bars.
    targets = cuts.target.map("{:.0%}".format)
    cuts["name"] = cuts.series.str.replace(", ", "\n") + "\n" + targets
    marks = tables.marks(cuts, "name").str.replace(", ", "\n", n=1)
    heights = cuts.groupby(["name", "stage"]).top1.mean().unstack().reindex(marks.index)
    # Bars of a cut stand in the order in which it went through the stages.
    stages = [stage for stage in STAGES if stage in heights]
    ax = _bar_axes(marks.index + marks, 0.2 + 0.175 * max(4, len(stages)))
    heights = heights[stages].rename(columns=STAGES)
    fills = map(_FILLS.get, stages)
    _bar_groups(ax, heights, fills, form="{:.0f}", fontsize=9, pad=0.5)
    _dense_lines(ax, results, cuts.dropna(subset="top1"))
    ax.set(ylabel=TOP1, ylim=(0, 105))
    legend_beside(ax)
    return ax


def _bar_axes(names, space):
    """Return Axes that are wide enough for a group of bars over each name.

    space: inches for the bars of one group; a long word of a name may take more.
    """
    words = "\n".join(names).split("\n")
    space = max(space, 0.2 + 0.095 * max(map(len, words)))
    ax = new_axes(max(WIDE[0], 3 + space * len(names)), WIDE[1])
    ax.set_xticks(range(len(names)), names, fontsize=10)
    ax.grid(False, axis="x")
    return ax


def _bar_groups(ax, heights, fills, *, form, fontsize, pad, spreads=None):
    """Draw a group of bars for each row of a frame, with a bar for each column, and numbers above.

    heights: a frame; its columns name the bars in the legend.
    fills: (colour, hatch) of each column.
    form: of the numbers, such as "{:.0f}"; fontsize: theirs; pad: of the box around them.
    spreads: frames of the lengths of error bars below and above, or None for bars without.
    """
    # A group is 0.8 wide, in the middle over its tick.
    width = 0.8 / heights.shape[1]
    middle = (heights.shape[1] - 1) / 2
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": pad}
    for i, (label, (color, hatch)) in enumerate(zip(heights, fills, strict=False)):
        look = {"color": color, "hatch": hatch, "edgecolor": "0.2", "label": label}
        if spreads:
            look |= {"yerr": [frame[label] for frame in spreads]}
        places = np.arange(len(heights)) + (i - middle) * width
        bars = ax.bar(places, heights[label], width, **look)
        ax.bar_label(bars, fmt=form, fontsize=fontsize, padding=2, bbox=box)


@styled
def ladder(results, *, names=()):
    """Draw test top-1 (%) after each step of recovery from one cut, in the order of the steps.

    Points are means over seeds, bars their range; hollow ones are of no training. Grey lines are
    the dense model's.

    results: results.csv of one model and one budget (target_kind and target), and of the dense
        model.
    names: `series` of more results, so that each looks the same in several figures.
    Returns the Axes.
    Raises ValueError for results of several budgets, or of none.
    """
    cuts = _named_cuts(results[results.stage.isin(STAGES) & results.top1.notna()])
    budgets = cuts[["target_kind", "target"]].drop_duplicates().values.tolist()
    if len(budgets) != 1:
        raise ValueError(
            f"a ladder is of one budget, and the results have {len(budgets)}: {budgets}"
        )
    stages = [stage for stage in STAGES if stage in set(cuts.stage)]
    cuts["step"] = cuts.stage.map(stages.index)
    # The legend goes from the best at its last step to the worst.
    last = cuts.groupby(["series", "step"]).top1.mean().groupby("series").last()
    order = last.sort_values(ascending=False, kind="stable").index
    # Equal points stand side by side.
    cuts["step"] += 0.025 * (cuts.series.map(order.get_loc) - (len(order) - 1) / 2)
    styles = looks([*names, *cuts.series])
    marks = tables.marks(cuts, "series")
    ax = new_axes(max(WIDE[0], 3.5 + 1.2 * len(stages)), 4.4)
    for name in order:
        line = cuts[cuts.series == name]
        look = styles[name] | {"markersize": 7}
        mean_and_range(ax, line.groupby("step").top1, label=name + marks[name], **look)
        # White points cover those of the line.
        untrained = line[~line.stage.isin(["finetuned", "distilled"])]
        points = untrained.groupby("step").top1.mean()
        ax.plot(points, markerfacecolor="white", linestyle="", zorder=3, **look)
    _dense_lines(ax, results, cuts)
    words = [STAGES[stage].replace(", ", ",\n") for stage in stages]
    ax.set_xticks(range(len(stages)), words)
    ax.set(xlabel="step of recovery", xlim=(-0.3, len(stages) - 0.7))
    _accuracy_axis(ax, cuts.top1.min(), results.top1.max())
    legend_beside(ax)
    return ax


def _dense_lines(ax, results, cuts):
    """Draw grey lines at the mean top-1 of the dense model."""
    # The model with as many epochs of training is dash-dotted. Each set of seeds that cuts have
    # gets lines of its own, so that all are held against dense models of their own seeds. The lines
    # of the largest set are the darkest.
    sets = tables.sets_of_seeds(cuts, ["series", "target", "stage"]).unique()
    color = "0.35"
    for seeds in sorted(sets, key=len, reverse=True):
        mark = tables.of_seeds(seeds) if len(sets) > 1 else ""
        dense = results[results.seed.isin(seeds)]
        for stage, line in (("dense", "-"), ("dense+epochs", "-.")):
            top1 = dense.top1[dense.stage == stage]
            if len(top1):
                look = {"color": color, "linestyle": line, "linewidth": 1, "zorder": 0}
                ax.axhline(top1.mean(), label=STAGES[stage] + mark, **look)
        color = "0.65"


def _accuracy_axis(ax, low, high):
    """Set a y axis of accuracy that is logarithmic downwards from the best, in percent.

    low, high: percent, what is to be seen.
    """
    # A point that is lost near the best takes more room than one far below. The logarithm counts
    # from two points above the best.
    zero = high + 2

    def to_place(value):
        return -np.log(np.maximum(zero - value, 1e-6))

    def to_value(place):
        return zero - np.exp(-place)

    bottom = zero - 1.12 * (zero - low)
    top = high + 0.4
    ax.set_yscale("function", functions=(to_place, to_value))
    ax.set(ylabel=TOP1, ylim=(bottom, top))
    # Ticks are at multiples of 10, then of 5, 2 and 1 where there is room between two of them.
    least = (to_place(top) - to_place(bottom)) / 14
    ticks = []
    for step in (10, 5, 2, 1):
        first = max(0, bottom, high - 10 * step)  # fine steps on top only
        for tick in np.arange(np.ceil(first / step) * step, top, step):
            gaps = np.abs(to_place(tick) - to_place(np.array(ticks)))
            if (gaps > least).all():
                ticks.append(tick)
    ax.yaxis.set_major_locator(ticker.FixedLocator(sorted(ticks)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(ticker.NullLocator())


# -- speed


@styled
def speedup_bars(table):
    """Draw how many times as fast as the first model the others are.

    A short line shows what the MACs promise.

    table: as roofline.bounds returns it, with columns model, speedup, speedup_q1, speedup_q3,
        promised, and runtime, precision and batch where these vary. Several results of one model
        and way (seeds) become their mean.
    Returns the Axes.
    """
    names = table.model.unique()
    ways = _ways(table)
    order = ways.unique()
    quartiles = ["speedup_q1", "speedup", "speedup_q3"]
    means = table.groupby([table.model, ways])[quartiles].mean()
    # The mean over seeds may lie beside the quartiles of one of them.
    means["below"] = (means.speedup - means.speedup_q1).clip(lower=0)
    means["above"] = (means.speedup_q3 - means.speedup).clip(lower=0)
    heights = means.speedup.unstack().loc[names, order]
    spreads = [means[side].unstack().loc[names] for side in ("below", "above")]
    # Each model has a group of bars with quartiles, a bar for each way of running it.
    ax = _bar_axes(names, 0.25 + 0.3 * len(order))
    fills = zip(cycle(COLORS), cycle(["", "///", "..", "xx", "\\\\", "++"]), strict=True)
    words = {"form": "{:.1f}", "fontsize": 8, "pad": 0.3}
    _bar_groups(ax, heights, fills, spreads=spreads, **words)
    promised = table.groupby("model").promised.mean()[names]
    places = np.arange(len(names))
    label = "promised by the MACs"
    ax.hlines(promised, places - 0.45, places + 0.45, label=label, color="0.1", linewidth=1.2)
    ax.axhline(1, color="0.35", linewidth=0.8, zorder=0)
    ax.set(ylabel=f"times as fast as\n{names[0]}")
    legend_beside(ax)
    return ax


def _ways(table):
    """Return how each result was run, in words: runtime, precision and batch as far as these vary."""
    varied = table.columns[table.nunique() > 1]
    formats = {"runtime": "{}", "precision": "{}", "batch": "batch {}"}
    return tables.in_words(table[varied], formats, ", ")


@styled
def roofline(table):
    """Draw the work done per second over the work per byte, under the machine's ceilings.

    There is a point for each result and a line for each precision.

    table: as roofline.bounds returns it.
    Returns the Axes.
    """
    table = table.assign(
        way=_ways(table),
        intensity=table.batch_macs / table.batch_bytes,
        rate=table.batch_macs / (1000000 * table.latency_ms),  # 10^9 MACs per second
    )
    colors = dict(zip(table.model.unique(), cycle(COLORS), strict=False))
    markers = dict(zip(table.way.unique(), cycle(MARKERS), strict=False))
    ax = new_axes(WIDE[0], max(4.2, 0.8 + 0.25 * len(colors)))
    _ceilings(ax, table)
    places = {name: place for place, name in enumerate(colors)}
    for (name, way), points in table.groupby(["model", "way"], sort=False):
        # The points of earlier models are larger, and show behind later ones at the same place.
        place = places[name]
        look = {"s": max(24, 160 * 0.6**place), "zorder": 2 + place / 100}
        look |= {"color": colors[name], "marker": markers[way]}
        ax.scatter(points.intensity, points.rate, edgecolor="white", **look)
    markers.pop("", None)  # where nothing varies there is no way to name
    _legend_of(ax, colors, markers)
    ax.set(xscale="log", yscale="log", xlabel="MACs per byte moved", ylabel="10⁹ MACs per second")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    legend_beside(ax)
    return ax


def _ceilings(ax, table):
    """Draw the rate that the machine allows at each intensity (MACs per byte), by precision."""
    intensity = np.geomspace(table.intensity.min() / 2, table.intensity.max() * 2, 200)
    for precision, rows in table.groupby("precision", sort=False):
        top = rows.macs_per_s.max() / 1e9
        # At the left of the line is the rate of the memory, at its right that of matrix products.
        # Caches make small operations faster than the memory is: hence a band.
        slow = np.minimum(top, intensity * (rows.bytes_per_s.min() / 1e9))
        fast = np.minimum(top, intensity * (rows.bytes_per_s.max() / 1e9))
        line = "-" if precision == "float32" else "--"
        ax.plot(intensity, fast, color="0.3", linestyle=line, label=f"ceiling, {precision}")
        ax.fill_between(intensity, slow, fast, color="0.9", zorder=0)


# -- scores and predictions


@styled
def sensitivity_curves(frame):
    """Draw the rise of the loss (nats) over the share cut from one layer alone, by role and block.

    frame: columns role, block, ratio, increase, as sensitivity.curves returns it.
    Returns a Figure.
    """
    # There is a panel for each role and a line for each block, whose colour says how deep it lies.
    colors = shades(frame.block.dropna().unique())
    figure, panels = panels_beside(frame.groupby("role", sort=False), 1, 2.6)
    for ax, role, rows in panels:
        for block, line in rows.groupby("block", sort=False, dropna=False):
            color = colors.get(block, "0.3")  # a layer outside of blocks is grey
            ax.plot(line.ratio, line.increase, marker=".", color=color)
        ax.set(xlabel=f"share of {role} cut")
    figure.axes[0].set(ylabel="rise of the loss (nats)")
    # No panel need have all blocks, so that the legend has handles of its own.
    handles = [
        Line2D([], [], color=color, marker=".", label=block) for block, color in colors.items()
    ]
    legend_beside(ax, handles=handles)
    return figure


_PROBES = {  # columns of `probes`
    "probe_anew": "linear probe, fitted anew",
    "probe_kept": "the dense model's probe",
    "knn20": "20 nearest neighbours",
}


@styled
def probes(frame):
    """Draw what the features of cut backbones are still good for over the share that is kept.

    There is a panel for each way to classify by features, a line for each method, and a grey line
    for the dense model. Several seeds become mean and range.

    frame: columns method ("dense" for the whole model), target_kind, target (share kept),
        probe_anew, probe_kept and knn20 (test top-1 in %), as notebook 8 leaves it.
    Returns a Figure.
    """
    long = frame.melt(["method", "target"], [*_PROBES], "way", "top1")
    figure, panels = panels_beside(long.groupby("way", sort=False), 2, 2.6)
    styles = looks(frame.method)
    for ax, way, rows in panels:
        dense = rows[rows.method == "dense"].top1.mean()
        ax.axhline(dense, color=DENSE["color"], label="dense")
        cuts = rows[rows.method != "dense"]
        for method, line in cuts.groupby("method", sort=False):
            mean_and_range(ax, line.groupby("target").top1, label=method, **styles[method])
        ax.set_title(_PROBES[way], fontsize=11)
    kinds = ", ".join(frame.target_kind.unique()).replace("macs", "MACs")
    figure.supxlabel(f"share of {kinds} kept")
    figure.axes[0].set(ylabel=TOP1)
    legend_beside(figure.axes[-1])
    return figure


@styled
def agreement(frame):
    """Draw the rank correlation between score and measured rise of the loss as bars.

    There is a bar for each criterion and kind of unit.

    frame: columns criterion, kind, spearman, as sensitivity.agreement returns it.
    Returns the Axes.
    """
    width = max(HALF[0], 2.2 + 0.95 * frame.criterion.nunique())
    ax = new_axes(width, HALF[1])
    # Several seeds become a mean, with a bar from the lowest to the highest.
    sns.barplot(frame, x="criterion", y="spearman", hue="kind", errorbar=("pi", 100), ax=ax)
    ax.axhline(0, color="0.3", linewidth=0.8)
    bottom = min(0, frame.spearman.min() - 0.1)
    ax.set(xlabel="", ylabel="rank correlation with\nmeasured rise of the loss", ylim=(bottom, 1))
    legend_beside(ax)
    return ax


@styled
def prediction_audit(frame):
    """Draw the measured over the predicted rise of the loss (nats), both logarithmic.

    Each cut has a point. What is below the lowest decade shown, so also 0 and less, is drawn hollow
    on the dotted edge.

    frame: columns criterion, kind, predicted, measured.
    Returns the Axes.
    Raises ValueError where no value is above 0.
    """
    frame = frame.dropna(subset=["predicted", "measured"])
    values = frame[["predicted", "measured"]].astype(float)
    top = values.max(axis=None)
    if not top > 0:
        raise ValueError("no rise of the loss is above 0: logarithmic axes have nothing to show")
    # The lowest decade is the one of the smallest value above 0, but at most four under the top.
    lowest = max(values[values > 0].min(axis=None), top / 1e4)
    floor = 10 ** np.floor(np.log10(lowest))
    frame = frame.assign(is_below=(values < floor).any(axis=1), **values.clip(floor))
    # A criterion has a colour, a kind a marker (KINDS has 13).
    styles = looks(frame.criterion)
    colors = {criterion: styles[criterion]["color"] for criterion in frame.criterion}
    markers = dict(zip(frame.kind.unique(), cycle(KINDS), strict=False))
    # The legend has as many lines, in inches.
    height = max(4.4, 1.4 + 0.23 * (len(colors) + len(markers)))
    ax = new_axes(height + 2.4, height)
    _diagonal(ax, np.array([floor / 1.5, 1.8 * top]))
    for (criterion, kind), cuts in frame.groupby(["criterion", "kind"], sort=False):
        for is_below, part in cuts.groupby("is_below"):
            fill = colors[criterion]
            edge = "white"
            if is_below:
                fill, edge = edge, fill
            look = {"marker": markers[kind], "facecolor": fill, "edgecolor": edge}
            look |= {"s": 45, "zorder": 2 + is_below}
            # Without clipping, points on the edge are whole.
            ax.scatter(part.predicted, part.measured, clip_on=False, **look)
    _legend_of(ax, colors, markers)
    if frame.is_below.any():
        hollow = {"color": "0.4", "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        _legend_entry(ax, f"hollow: below {floor:g}", **hollow)
        for line in (ax.axhline, ax.axvline):
            line(floor, color="0.35", linestyle=":", linewidth=0.8)
    legend_beside(ax)
    return ax


def _diagonal(ax, reach):
    """Set both logarithmic axes of rises of the loss, with the diagonal and the band around it.

    reach: array of the ends of both axes, in nats.
    """
    # On the diagonal the prediction is right, in the grey band within a factor of three.
    band = {"color": "0.93", "zorder": 0, "label": "within a factor of 3"}
    ax.fill_between(reach, reach / 3, reach * 3, **band)
    ax.plot(reach, reach, color="0.35", linewidth=1, zorder=1, label="as predicted")
    ax.set(
        xscale="log",
        yscale="log",
        xlim=reach,
        ylim=reach,
        xlabel="predicted rise of the loss (nats)",
        ylabel="measured rise of the loss (nats)",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())
    ax.set_box_aspect(1)


@styled
def class_change(frame):
    """Draw the change of top-1 (percentage points) by class, the most forgotten on top.

    Of more than 30 classes the 12 worst and the 12 best are drawn.

    frame: columns class, images and change, as evaluate.compare gives them; several results of a
        class (seeds) become mean and range.
    Returns the Axes.
    Raises ValueError where no class is left.
    """
    # Classes without images have no change and are left out.
    changes = tables.ranges_of(frame.dropna(subset="change").groupby("class", sort=False).change)
    if changes.empty:
        raise ValueError("no class has a change of its top-1 to show")
    changes = changes.sort_values("mean", kind="stable")
    hidden = len(changes) - 24
    places = np.arange(len(changes), dtype=float)
    is_long = len(changes) > 30
    if is_long:
        # A gap between both halves says how many are not shown.
        changes = pd.concat([changes.head(12), changes.tail(12)])
        places = np.r_[:12, 13.5:25.5]
    ax = new_axes(6.4, 1 + 0.24 * (places[-1] + 1))
    means = changes["mean"]
    bars = ax.barh(places, means, 0.75, color=np.where(means < 0, COLORS[3], COLORS[0]))
    lengths = error_bars(changes)
    if lengths is None:
        ax.bar_label(bars, fmt="{:+.1f}", fontsize=8, padding=3)
    else:
        look = {"fmt": "none", "ecolor": "0.2", "elinewidth": 1}
        ax.errorbar(means, places, xerr=lengths, **look)
    if is_long:
        _gap(ax, f"… {hidden} classes between …", 12.25)
    ax.axvline(0, color="0.35", linewidth=0.8)
    # The number of its images stands behind each name: of few, one weighs much.
    counts = frame.groupby("class").images.first()
    words = [f"{str(name)[:24]} ({counts[name]:g})" for name in changes.index]
    ax.set_yticks(places, words, fontsize=9)
    ax.set(xlabel="change of top-1 (percentage points)", ylim=(places[-1] + 0.7, -0.7))
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    return ax


def _gap(ax, words, height):
    """Write words across the axes at a height of the y axis."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    look = {"fontsize": 9, "color": "0.35", "ha": "center", "va": "center", "bbox": box}
    ax.text(0.5, height, words, transform=ax.get_yaxis_transform(), **look)


# -- a figure for each model


def _file_part(value):
    """Return a value as part of the name of a file."""
    return f"{value:g}" if isinstance(value, float) else str(value)


_PER = {"model": ["model"], "target": ["model", "target_kind", "target"]}


@_style.styled
def save(drawn, path, *, caption=None):
    """Write a Figure as path + ".svg", ".pdf" and ".png", and its caption as ".txt".

    drawn: a Figure or Axes of it.
    path: without ending.
    caption: text.
    Returns the Figure, to be displayed.
    """
    # svg goes into slides, pdf into papers, png into pages.
    figure = drawn.figure
    for ending, date in (("svg", "Date"), ("pdf", "CreationDate"), ("png", "Software")):
        # Without the date, or the version of matplotlib, the same drawing gives the same bytes.
        files.write_atomic(
            f"{path}.{ending}",
            functools.partial(
                figure.savefig,
                format=ending,
                metadata={date: None},
                bbox_inches="tight",
            ),
        )
    if caption:
        files.write_atomic(f"{path}.txt", caption + "\n")
    # A study has a hundred figures; open ones would fill the memory.
    plt.close(figure)
    return figure


def draw_each(
    tables,
    name,
    draw,
    *,
    results,
    folder,
    per="model",
    table=None,
    note="",
    controls=None,
    **options,
):
    """Draw, save and show a figure for each model, or for each model and target.

    A notebook gives what all figures share once and then has a line for each kind of figure:

        draw_each = partial(plots.draw_each, results=results, folder=lab.figures)
        draw_each(tables, "agreement", plots.agreement)
        batches = "Batches of {batch} images."
        draw_each(tables, "speedup", plots.speedup_bars, table="runtimes", note=batches)
        plan = "{method}, {target:g} x {target_kind}."
        draw_each(single, "kept", drawings.widths, per="target", note=plan)
        budgets = {"ladder": reached}
        draw_each(budgets, "ladder", plots.ladder, per="target", controls=dense, names=names)

    tables: {name: frame}, of which the figures draw one.
    name: first part of the files' names, and of the table.
    draw: a function from the results of one figure to a Figure or Axes, such as one of this module.
    results: results.csv of all models and seeds.
    folder: Path for the files.
    per: "model" or "target" (with its kind, target_kind).
    table: name of the table where it is another one.
    note: last sentence of the caption, with {column} for a value of the first result.
    controls: results that are drawn before those of the same model, such as the dense model's.
    options: handed on to draw.
    """
    found = tables.get(table or name)
    if found is None:
        # No notebook has left the table.
        return
    keys = [column for column in _PER[per] if column in found]
    for key, group in found.groupby(keys, sort=False, dropna=False):
        model, *target = key
        words = note.format(**group.iloc[0])
        if controls is not None:
            group = pd.concat([controls[controls.model == model], group])
        # The caption says where the results come from. Those of results.csv say it themselves,
        # others have it from the results of the same models and seeds.
        source = [group] if "commit" in group else [results, group]
        # The file is called <name>-<model>, or <name>-<target_kind>-<target>-<model> as far as the
        # results have these.
        parts = [_file_part(part) for part in target if pd.notna(part)]
        path = folder / "-".join([name, *parts, model])
        text = f"{caption(*source)} {words}".rstrip()
        display(save(draw(group, **options), path, caption=text))
