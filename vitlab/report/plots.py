"""Draw the results of a study: frames in, Axes or Figures out. No torch.

A colour stands for a method, in all figures. Axes carry units and have no title; the sentence of
TITLES, or of a ladder what it shows, stands above where a figure is saved with it.

Public: TITLES, accuracy_curve, agreement, backbones, class_change, criteria, draw_each, ladder, peers,
prediction_audit, probes, recovery, save, sensitivity_curves, speedups, tradeoff, training_curves.
"""

import functools
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib import ticker
from matplotlib.lines import Line2D

from vitlab import files
from vitlab.names import check
from vitlab.report import _style, tables
from vitlab.report._style import (
    COLORS,
    CONTROL,
    FLOOR,
    HALF,
    MARKERS,
    TEXT,
    WIDE,
    color_of,
    label_lines,
    legend_beside,
    looks,
    loss_axis,
    new_axes,
    panels_beside,
    range_bars,
    styled,
)
from vitlab.report.tables import STAGES, TOP1, caption, model_name

_MOST = 6  # series of a figure; more cannot be told apart
TITLES = {  # of figures, by the first part of their files' names
    "ablations": "What the loss rises by without one head",
    "agreement": "Does a score rank units as brute force does?",
    "audit": "The predicted rise of the loss, and the measured one",
    "classes": "What was forgotten, by class",
    "criteria": "What each score keeps, before any training",
    "cuts": "What each cut leaves of a layer",
    "foundation": "What features are still good for, without labels",
    "heads": "Which heads went, and how they scored",
    "heads_svd_iht": "What heads, SVD and IHT cost",
    "kept": "What was kept, and where",
    "ladder": "Half and a quarter of the MACs: what each step of recovery wins back",
    "recovery": "What cuts of weights and rows cost, and what fine-tuning wins back",
    "sensitivity": "Where it hurts: one layer cut alone",
    "speedup": "What a cut brings in time, in the same runtime",
    "spectra": "How fast singular values fall",
    "tradeoff": "What accuracy costs",
    "training": "Fine-tuning after a cut",
    "weights": "What is left of the weights",
    "weights-by-layer": "Which weights survive, block by block",
}
_TRAINED = ["finetuned", "distilled"]


def _cuts_of(results):
    """Return the results of models with a cut, with the columns series and lost (points)."""
    cuts = tables.only_cuts(results.assign(lost=tables.lost_points(results)))
    cuts = cuts.dropna(subset="lost")
    return cuts.assign(series=tables.series(cuts))


def _by_rank(names):
    """Return names of series in the order of tables.METHODS, each once, controls behind their own."""
    words = [*tables.METHODS.values()]

    def rank(name):
        own = [word for word in words if f"{name}, ".startswith(f"{word}, ")]
        place = words.index(max(own, key=len)) if own else len(words)
        return place, tables.is_control(name), name

    return sorted(dict.fromkeys(names), key=rank)


# -- accuracy


@styled
def training_curves(history):
    """Draw accuracy on val over the epochs: a panel for each method, a line for each target.

    history: lines of history.csv with method, target, epoch and val_top1 (%), or train_top1 where
        nothing was measured on val; several seeds become mean and range.
    Returns a Figure.
    """
    column = "val_top1" if history.get("val_top1", history.epoch * np.nan).notna().any() else None
    column = column or "train_top1"
    figure, panels = panels_beside(history.groupby("method", sort=False), *HALF)
    ends = {ax: {} for ax, *_ in panels}
    for ax, method, rows in panels:
        name = tables.method_words(method)
        lines = rows.groupby("target", dropna=False)
        for (target, line), dash in zip(lines, ["-", "--", ":", "-."] * len(lines), strict=False):
            # Without a target, the line is of the dense model.
            label = f"{target:.0%}" if pd.notna(target) and target else "dense"
            ranges = tables.ranges_of(line.groupby("epoch")[column])
            color = color_of(name) or "0.2"
            range_bars(ax, ranges, color=color, linestyle=dash, marker=".")
            ends[ax][label] = (ranges["mean"].iloc[-1], color)
        ax.set(title=f"share of {name} cut" if name != "dense" else name, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for ax, names in ends.items():  # when the common axis has its ends
        label_lines(ax, names)
    words = {"val_top1": "val", "train_top1": "training"}
    figure.axes[0].set_ylabel(f"{words[column]} top-1 (%)")
    return figure


@styled
def accuracy_curve(results):
    """Draw the points of test top-1 lost over the share cut, at the last stage of each cut.

    Bars are the range over seeds. The thin grey line is the dense model after as many epochs.

    results: results.csv of one model, whose targets are shares that go, and of the dense model.
    Returns the Axes.
    """
    ax = new_axes(*HALF)
    cuts = _cuts_of(results)
    order = cuts.stage.map([*STAGES].index)
    last = order.groupby([cuts.series, cuts.target]).transform("max")
    cuts = cuts[order == last]
    words = "share cut"
    if cuts.series.str.startswith("heads, ").all():  # said once, below the axis
        words = "share cut, of heads and of each layer"
    # Controls come last; of more series than can be told apart the first stay.
    names = sorted(_by_rank(cuts.series), key=tables.is_control)[:_MOST]
    control = _same_epochs(ax, results)
    prefix = "heads, " if "heads" in words else ""
    marks = tables.marks(cuts, "series")
    _loss_lines(ax, cuts, names, "target", marks, more=control, prefix=prefix)
    ax.set(xlabel=words, xticks=sorted(set(cuts.target)))
    ax.xaxis.set_major_formatter("{x:.0%}")
    loss_axis(ax, cuts.lost[cuts.series.isin(names)].max())
    return ax


def _loss_lines(ax, cuts, names, x, marks, *, label=True, more=None, prefix=""):
    """Draw a line of points lost over a column x for each name of a series, and write it beside.

    more: {name: (height, colour)} of more words to write there.
    prefix: what is not written of the names that begin with it.
    """
    styles = looks(names)
    ends = dict(more or {})
    for name in names:
        line = cuts[cuts.series == name]
        ranges = tables.ranges_of(line.groupby(x).lost, FLOOR)
        range_bars(ax, ranges, markersize=6, **styles[name])
        words = name.removeprefix(prefix) + marks[name]
        ends[words] = (ranges["mean"].iloc[-1], styles[name]["color"])
    loss_axis(ax, cuts.lost[cuts.series.isin(names)].max())
    if label:
        label_lines(ax, {_broken(name): end for name, end in ends.items()})


def _broken(name):
    """Return a name in short lines, without a break before the number of a seed or block."""
    name = name.replace("seed ", "seed\u00a0").replace("block ", "block\u00a0")
    return textwrap.fill(name, 16, break_on_hyphens=False)


def _same_epochs(ax, results, draw=None):
    """Draw a line at what the dense model loses in as many epochs, and return its name and end.

    draw: ax.axvline where points lost go across.
    """
    lost = tables.lost_points(results)[results.stage == "dense+epochs"].mean()
    if pd.isna(lost):
        return {}
    words = "dense, as many epochs"
    look = {"color": CONTROL, "linestyle": "--", "linewidth": 1, "label": words}
    (draw or ax.axhline)(max(lost, FLOOR), zorder=0, **look)
    return {words: (max(lost, FLOOR), CONTROL)}


@styled
def tradeoff(results, x="macs"):
    """Draw the points of test top-1 lost over the share of a cost that is left.

    A line goes through the targets of each series, at most six; what has no name is a ring. Of a
    series that was reconstructed this is shown, without training; others are fine-tuned.

    results: results.csv of one model, the dense results among them. Masked models stand where their
        dense tensors put them.
    x: macs, macs_ideal, params, nonzero, bytes_disk, bytes_memory, and of one run latency_ms or
        memory_mb.
    Returns the Axes.
    Raises ValueError for another column or where no result has it.
    """
    check("cost", x, tables.costs_of(results))
    results = results.assign(model=results.get("model", ""))
    both = tables.beside_dense(results, x)
    cuts = _cuts_of(both.assign(left=both[x] / both[f"dense_{x}"]))
    cuts = cuts[cuts.stage.isin(["reconstructed", *_TRAINED])].dropna(subset="left")
    if cuts.empty:
        raise ValueError(
            f"no fine-tuned or reconstructed result has {x}; it is measured in 6_efficiency"
        )
    # Of each series, the first of these stages that it has.
    order = cuts.stage.map(["reconstructed", *_TRAINED].index)
    cuts = cuts[order == order.groupby(cuts.series).transform("min")]
    keys = ["series", "target_kind", "target"]
    cuts = cuts.assign(place=cuts.groupby(keys, dropna=False).left.transform("mean").round(6))
    # Named are those of all seeds that save something; of one colour the first.
    groups = cuts.groupby("series")
    saves = groups.place.min() < 0.99
    saves &= groups.seed.nunique() == groups.seed.nunique().max()
    names = {}
    for name in _by_rank(cuts.series[cuts.series.map(saves)]):
        color = color_of(name)
        if color and (name == tables.METHODS["random"] or not tables.is_control(name)):
            names.setdefault(color, name)
    names = [*names.values()][:_MOST]
    ax = new_axes(*HALF)
    others = cuts[~cuts.series.isin(names)]
    rest = others.groupby([*keys, "place"], dropna=False).lost.mean().clip(FLOOR)
    places = rest.index.get_level_values("place")
    look = {"facecolor": "none", "edgecolor": CONTROL, "linewidth": 0.8}
    ax.scatter(places, rest, s=18, zorder=1, label="_others", **look)
    marks = tables.marks(cuts, "series").where(lambda mark: mark.index.isin(names), "")
    trained = cuts.groupby("series").stage.first().isin(_TRAINED)
    marks = trained.map({True: ", fine-tuned", False: ""}) + marks
    _loss_lines(ax, cuts, names, "place", marks, label=False)
    loss_axis(ax, cuts.lost.max())
    words, _ = tables.AXES[x]
    words = words.partition(" (")[0].replace(" of one image", "")
    ax.set(xlabel=f"{words}, as a share of the dense model's", xlim=(1.05, cuts.place.min() - 0.03))
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5))
    ax.xaxis.set_major_formatter("{x:.0%}")
    if len(others):
        ax.text(0.02, 0.02, "rings: other cuts", transform=ax.transAxes, color="0.45")
    # The line of each series ends at its smallest model, and has its name there.
    ends = cuts[cuts.place == cuts.groupby("series").place.transform("min")]
    ends = ends.groupby("series").agg(place=("place", "first"), lost=("lost", "mean"))
    styles = looks(names)
    beside = {}
    for name in names:
        end, color, words = ends.loc[name], styles[name]["color"], _broken(name + marks[name])
        if end.place < cuts.place.min() + 0.1:
            beside[words] = max(end.lost, FLOOR), color
        else:
            below = {"xytext": (0, -10), "textcoords": "offset points", "va": "top", "ha": "right"}
            ax.annotate(words, (end.place, max(end.lost, FLOOR)), color=color, **below)
    label_lines(ax, beside)
    return ax


@styled
def recovery(results):
    """Draw the points of test top-1 that each cut has lost, and what each stage wins back.

    A line of marks for each cut: hollow ones are of no training, and the first and the last are
    written out in percent. The dashed line is the dense model after as many epochs.

    results: results.csv of one model.
    Returns the Axes.
    """
    cuts = _cuts_of(results)
    cuts["name"] = cuts.series + cuts.target.map(", {:.0%}".format)
    cuts["name"] = cuts.name + cuts.name.map(tables.marks(cuts, "name"))
    rank = {name: place for place, name in enumerate(_by_rank(cuts.series))}
    cuts = cuts.sort_values("target", kind="stable")
    cuts = cuts.sort_values("series", key=lambda names: names.map(rank), kind="stable")
    names = cuts.name.drop_duplicates().tolist()
    ax = new_axes(HALF[0], max(2.2, 1.1 + 0.36 * len(names)))
    solved = {"compensated": "D"}
    for place, name in enumerate(names):
        own = cuts[cuts.name == name]
        color = color_of(own.series.iloc[0]) or "0.2"
        stages = [stage for stage in STAGES if stage in set(own.stage)]
        lost = own.groupby("stage").lost.mean().clip(FLOOR)[stages]
        ax.plot(lost, [place] * len(lost), color=color, linewidth=1.5, zorder=1)
        for stage, value in lost.items():
            face = color if stage in _TRAINED else "white"
            look = {"facecolor": face, "edgecolor": color, "linewidth": 1.6, "zorder": 2}
            ax.scatter(value, place, s=60, marker=solved.get(stage, "o"), **look)
        top1 = own.groupby("stage").top1.mean()[stages]
        words = " → ".join(
            tables.number(top1[stage]) for stage in dict.fromkeys([stages[0], stages[-1]])
        )
        ax.text(1.02, place, words + " %", transform=ax.get_yaxis_transform(), va="center")
    loss_axis(ax, cuts.lost.max(), axis="x")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(False, axis="y")
    handles = [_mark("white", "after the cut"), _mark("0.3", "fine-tuned")]
    if "compensated" in set(cuts.stage):
        handles.insert(1, _mark("white", "least squares", solved["compensated"]))
    if _same_epochs(ax, results, ax.axvline):
        handles.append(ax.lines[-1])
    ax.figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return ax


def _mark(face, label, marker="o"):
    """Return a handle for a legend: a mark of a colour."""
    look = {"marker": marker, "linestyle": "", "color": "0.3", "markerfacecolor": face}
    return Line2D([], [], label=label, markersize=8, **look)


@styled
def criteria(frame):
    """Draw what each score keeps right after the cut: a line for each score, a mark for each kind.

    frame: columns criterion, method, target (share cut) and val_top1 (%), as notebook 3 leaves it;
        only the largest target is drawn.
    Returns the Axes.
    """
    frame = frame[frame.target == frame.target.max()]
    means = frame.groupby(["criterion", "method"]).val_top1.mean().unstack()
    means = means.loc[means.max(axis=1).sort_values(ascending=False).index]
    ax = new_axes(HALF[0], max(2.4, 1.5 + 0.42 * len(means)))
    places = np.arange(len(means))
    handles = []
    for method, marker in zip(means, "osD^", strict=False):
        color = COLORS.get(method, "0.2")
        ax.scatter(means[method], places, s=70, color=color, marker=marker, zorder=3)
        handles.append(
            _mark(color, f"{frame.target.max():.0%} of the {_words(method)} cut", marker)
        )
        handles[-1].set_color(color)
    low, high = means.min(axis=1), means.max(axis=1)
    ax.hlines(places, low, high, color="0.8", zorder=1)
    for place, row in enumerate(means.itertuples(index=False)):
        words = " / ".join(map(tables.number, row))
        ax.text(1.02, place, words, transform=ax.get_yaxis_transform(), va="center")
    ax.set_yticks(places, map(tables.score_words, means.index))
    for tick in ax.get_yticklabels():
        if tables.is_control(tick.get_text()):
            tick.set_color("0.45")
    ax.set(xlim=(0, 100), ylim=(len(means) - 0.5, -0.5))
    ax.set(xlabel="val top-1 right after the cut (%)")
    ax.figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return ax


def _words(method):
    return tables.method_words(method)


def _of_ladder(results):
    """Return the results that a ladder draws. Raises ValueError for several kinds of target, or none."""
    cuts = _cuts_of(results[results.stage.isin(STAGES) & results.top1.notna()])
    kinds = sorted(set(cuts.target_kind))
    if len(kinds) != 1:
        raise ValueError(f"a ladder is of one kind of budget, and the results have {kinds}")
    cuts = cuts[cuts.stage != "folded"]  # which changes little, and stays in the tables
    names = _by_rank(cuts.series)
    # What has no colour of its own stays in the tables.
    names = [name for name in names if color_of(name) or len(names) < _MOST][:_MOST]
    return cuts[cuts.series.isin(names)]


def _ladder_says(results):
    """Say which line of a ladder ends best at the smallest share, and from where it comes."""
    cuts = _of_ladder(results)
    cuts = cuts[cuts.target == cuts.target.min()]
    part = f"{cuts.target.min():.0%} of the {cuts.target_kind.iloc[0].replace('macs', 'MACs')}"
    steps = pd.Categorical(cuts.stage, STAGES)
    lost = cuts.groupby(["series", steps], observed=True).lost.mean()
    marks = tables.marks(cuts, "series")
    # What fewer seeds have than others is not compared.
    best = lost.groupby("series").last()[marks == ""].idxmin()
    (stage, value), *later = lost[best].items()
    words = f"{tables.number(value)} points {STAGES[stage]}"
    for stage, value in later[-1:]:
        words += f", and {tables.number(value)} {STAGES[stage]}"
    return f"No cut to {part} ends better than {best}: it loses {words}"


@styled
def ladder(results):
    """Draw the points of test top-1 lost after each step of recovery, in the order of the steps.

    There is a panel for each share that is kept. Points are means over seeds, bars their range;
    hollow ones are of no training. The thin grey line is the dense model after as many epochs.

    results: results.csv of one model and one kind of target, and of the dense model.
    Returns a Figure.
    Raises ValueError for results of several kinds of target, or of none.
    """
    cuts = _of_ladder(results)
    (kind,) = set(cuts.target_kind)
    stages = [stage for stage in STAGES if stage in set(cuts.stage)]
    cuts = cuts.assign(step=cuts.stage.map(stages.index))
    names = _by_rank(cuts.series)
    styles = looks(names)
    panels = cuts.sort_values("target", ascending=False).groupby("target", sort=False)
    figure, panels = panels_beside(panels, HALF[0], HALF[1] + 0.3)
    for ax, target, own in panels:
        own_names = [name for name in names if name in set(own.series)]
        marks = tables.marks(own, "series")
        _loss_lines(ax, own, own_names, "step", marks, label=ax is figure.axes[-1])
        for name in own_names:  # white marks cover those of the line
            line = own[(own.series == name) & ~own.stage.isin(_TRAINED)]
            points = line.groupby("step").lost.mean().clip(FLOOR)
            look = styles[name] | {"markersize": 6, "linestyle": "", "zorder": 3}
            ax.plot(points, markerfacecolor="white", **look)
        ax.set_title(f"{target:.0%} of the {kind.replace('macs', 'MACs')}")
        words = ["least squares" if one == "compensated" else STAGES[one] for one in stages]
        words = [word.replace("fine-tuned, distilled", "distilled") for word in words]
        ax.set_xticks(range(len(stages)), words, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_xlim(-0.3, len(stages) - 0.7)
    _share_loss_axis(figure.axes, cuts.lost.max())
    first = figure.axes[0]
    if _same_epochs(first, results):
        figure.legend(handles=first.lines[-1:], loc="outside upper center")
    return figure


@styled
def peers(lines, *, models=None):
    """Draw the points of top-1 that other tools and this one lose over the share of MACs left.

    There is a panel for each model. Others are grey.

    lines: as tables.peers returns it.
    models: those to draw (None: all).
    Returns a Figure.
    """
    models = [*(models or dict.fromkeys(lines.model))]
    size = WIDE if len(models) > 1 else (7.6, 4.0)
    figure, panels = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False)
    worst = lines.lost.max()
    for ax, model in zip(panels[0], models, strict=True):
        loss_axis(ax, worst)
        ax.set_xlim(1.03, 0.22)
        ends = {}
        for name, line in lines[lines.model == model].groupby("name", sort=False):
            ours = name.startswith("vitlab")
            look = {"color": COLORS["pool"] if ours else CONTROL, "linewidth": 3 if ours else 1.6}
            look |= {"linestyle": "--" if "as cut" in name else "-", "marker": "o" if ours else "s"}
            ranges = tables.ranges_of(line.groupby("share").lost, FLOOR)
            range_bars(ax, ranges, markersize=8 if ours else 6, zorder=3 if ours else 2, **look)
            ends[name.replace(", ", ",\n")] = (ranges["mean"].iloc[0], look["color"])
        label_lines(ax, ends, size=TEXT + 1)
        ax.set(xlabel="share of the MACs that is left", xticks=[1, 0.75, 0.5, 0.25])
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.set_title(model)
    _share_loss_axis(panels[0], worst)
    return figure


@styled
def backbones(lines, *, metric="probe_kept", words="linear probe of the dense model"):
    """Draw the top-1 of cut backbones over the share of the MACs that is left.

    There is a panel for each data set. Methods of this package have colours, others are grey, each
    has a mark, and the dense model is a line across. Bars go from the lowest to the highest draw.
    The name of a line that ends before the smallest share stands at its end. That of the best other
    method at the last share but one stands there, too.

    lines: columns data, method ("dense", and those of this package as "vitlab, pool"), budget, draw
        and the metric, as benchmarks/foundation.py leaves them.
    metric: the column to draw, in percent.
    words: what it is, for the axis.
    Returns a Figure.
    """
    groups = lines.groupby("data", sort=False)
    figure, panels = panels_beside(groups, WIDE[0] if len(groups) == 1 else 2 * 6.6, 5.0)
    for ax, name, rows in panels:
        ax.axhline(rows[rows.method == "dense"][metric].mean(), color="0.35", linestyle=":")
        ends = {"dense": (rows[rows.method == "dense"][metric].mean(), "0.35")}
        cuts = rows[rows.method != "dense"]
        ax.set_xlim(1.02 * cuts.budget.max(), 0.98 * cuts.budget.min())
        for (method, line), mark in zip(cuts.groupby("method"), MARKERS, strict=False):
            ours = method.startswith("vitlab, ")
            kind = method.removeprefix("vitlab, ").partition(",")[0]
            look = {"color": COLORS.get(kind, CONTROL) if ours else CONTROL}
            look |= {"linewidth": 3 if ours else 1.2, "marker": mark}
            look |= {"linestyle": "--" if "labels" in method else "-"}
            ranges = tables.ranges_of(line.groupby("budget")[metric])
            range_bars(ax, ranges, markersize=8 if ours else 6, zorder=3 if ours else 2, **look)
            end = (line.budget.min(), ranges["mean"].iloc[0])
            if end[0] == cuts.budget.min():
                ends[method] = (end[1], look["color"])
            else:
                at_end = {"xytext": (8, 2), "textcoords": "offset points", "va": "top"}
                color = "0.35" if look["color"] == CONTROL else look["color"]
                ax.annotate(textwrap.fill(method, 18), end, color=color, **at_end)
        others = cuts[~cuts.method.str.startswith("vitlab, ")]
        if len(shares := sorted(others.budget.unique())) > 1:
            there = others[others.budget == shares[1]].groupby("method")[metric].mean()
            place = {"xytext": (8, 2), "textcoords": "offset points", "va": "bottom"}
            if there.idxmax() in ends:  # else its name stands there already
                ax.annotate(there.idxmax(), (shares[1], there.max()), color="0.35", **place)
        ax.margins(y=0.12)  # with room for the names of lines that end early
        label_lines(ax, ends, size=TEXT)
        ax.set(title=name, xticks=sorted(cuts.budget.unique()))
        ax.xaxis.set_major_formatter("{x:.0%}")
    figure.supxlabel("share of the MACs that is left")
    figure.axes[0].set(ylabel=f"test top-1 (%), {words}")
    return figure


def _share_loss_axis(panels, worst):
    """Give panels one axis of points lost, whose words stand at the first alone."""
    for ax in panels:
        loss_axis(ax, worst)
        if ax is not panels[0]:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)


# -- speed


@styled
def speedups(times):
    """Draw what a cut brings in time beside the dense model in the same runtime.

    What a runtime alone brings to the dense model stands apart, on top. A mark is one run on one
    processor: nothing is averaged. Upright lines are what the MACs promise. A cut that leaves all
    MACs, such as a mask, is a control and grey.

    times: as roofline.bounds returns it, of one batch, with columns model (or checkpoint, the name
        of what was cut), runtime, precision, speedup, promised and achieved_here; a column run
        names the processor of each line.
    Returns the Axes.
    """
    times = tables.like_for_like(times)
    if "checkpoint" in times:
        times = times.assign(model=times.checkpoint)
    if "run" not in times:
        times = times.assign(run="")
    times = times.assign(way=_ways(times))
    # What fewer runs have timed than others stays in the tables.
    counts = times.groupby("model", sort=False).run.nunique()
    first, *cut = counts.index[counts == counts.max()]
    ways = [*times.way.unique()]
    runs = dict(zip(times.run.unique(), "osD^vP", strict=False))
    groups = [("the runtime alone, dense model", first, "runtime_speedup", ways[1:])]
    groups += [(tables.checkpoint_words(name), name, "cut_speedup", ways) for name in cut]
    groups = [group for group in groups if group[-1]]
    ax = new_axes(HALF[0], 1.2 + 0.27 * sum(len(group[-1]) + 1.15 for group in groups))
    place = 0.0
    ticks = {}
    for words, name, column, own in groups:
        # A tick further left than the axes would be: the heading of its group.
        where = {"transform": ax.get_yaxis_transform(), "va": "center"}
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line at 1
        ax.text(0.02, place, words, weight="bold", bbox=behind, **where)
        top = place + 0.5
        for way in own:
            place += 1
            ticks[place] = way
            line = times[(times.model == name) & (times.way == way)]
            saves = column == "cut_speedup" and line.promised.max() > 1.01
            color = color_of(words) if saves else None
            color = color or "0.45"
            for run, value in zip(line.run, line[column], strict=True):
                ax.scatter(value, place, s=45, marker=runs[run], color=color, alpha=0.85, zorder=3)
        if column == "cut_speedup":
            for promised in times[times.model == name].promised.round(2).unique():
                ax.vlines(promised, top, place + 0.5, color="0.1", linewidth=1.5)
        place += 1.15
    ax.axvline(1, color="0.35", linewidth=0.8, zorder=0)
    ax.set_yticks([*ticks], ticks.values())
    ax.set(xscale="log", ylim=(place - 0.5, -0.6), xlabel="times as fast (log axis)")
    low, high = ax.get_xlim()
    subs = (1, 1.5, 2, 3, 4, 6) if high < 10 * low else (1, 2, 5)  # more would overlap
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.grid(False, axis="y")
    handles = [_mark("0.3", run, marker) for run, marker in runs.items() if run]
    handles.append(Line2D([], [], color="0.1", linewidth=1.5, label="promised by the MACs"))
    ax.figure.legend(handles=handles, loc="outside upper center", ncols=2, columnspacing=1)
    return ax


def _ways(table):
    """Return how each result was run, in words: runtime, precision and batch as far as these vary."""
    varied = table.columns[table.nunique() > 1]
    formats = {"runtime": "{}", "precision": "{}", "batch": "batch {}"}
    return tables.in_words(table[varied], formats, ", ")


# -- scores and predictions


@styled
def sensitivity_curves(frame):
    """Draw the rise of the loss (nats) over the share cut from one layer alone, or from one role.

    The three that rise most are black and have their name, the others are grey.

    frame: columns layer, role, ratio and increase, as sensitivity.curves returns it.
    Returns the Axes.
    """
    name = "role" if (frame.layer == "all").all() else "layer"
    worst = frame[frame.ratio == frame.ratio.max()].sort_values("increase", ascending=False)
    named = dict(zip(worst[name].head(3), MARKERS, strict=False))
    ax = new_axes(*HALF)
    for each, line in frame.groupby(name, sort=False):
        # No colour: these are of methods.
        look = {"color": CONTROL, "marker": ".", "linewidth": 0.8}
        if each in named:
            look = {"color": "0.1", "marker": named[each], "linewidth": 1.8}
        ax.plot(line.ratio, line.increase, **look)
    # From a thousandth of a nat on the axis is logarithmic: below, and below zero, it is straight.
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.yaxis.set_major_formatter("{x:g}")
    ends = worst.set_index(name).increase
    label_lines(ax, {_broken(tables.layer_words(each)): (ends[each], "0.1") for each in named})
    ax.set(xlabel=f"share of one {name} cut", ylabel="rise of the loss (nats, log axis from 0.001)")
    ax.xaxis.set_major_formatter("{x:.0%}")
    return ax


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
    groups = long.groupby("way", sort=False)
    figure, panels = panels_beside(groups, 2 + 2.6 * len(groups), HALF[1])
    styles = looks(frame.method.map(tables.method_words))
    for ax, way, rows in panels:
        dense = rows[rows.method == "dense"].top1.mean()
        ax.axhline(dense, color="0.35", label="dense")
        cuts = rows[rows.method != "dense"]
        for method, line in cuts.groupby("method", sort=False):
            ranges = tables.ranges_of(line.groupby("target").top1)
            words = tables.method_words(method)
            range_bars(ax, ranges, label=words, **styles[words])
        ax.set_title(_PROBES[way])
    kinds = ", ".join(frame.target_kind.unique()).replace("macs", "MACs")
    figure.supxlabel(f"share of {kinds} kept")
    figure.axes[0].set(ylabel=TOP1)
    legend_beside(figure.axes[-1])
    return figure


@styled
def agreement(frame):
    """Draw the rank correlation between score and measured rise of the loss, for heads and neurons.

    A panel for each kind of unit has a bar for each criterion, the best on top; of several seeds the
    mean, and marks for each.

    frame: columns criterion, kind, spearman, as sensitivity.agreement returns it.
    Returns a Figure.
    """
    frame = frame[frame.kind.isin(["heads", "neurons"])].dropna(subset="spearman")
    groups = frame.groupby("kind", sort=False)
    means = frame.groupby(["criterion", "kind"]).spearman.mean().unstack()
    order = means.sort_values(means.columns[0], ascending=False).index
    size = (HALF[0], 1.2 + 0.4 * len(order))
    figure, panels = panels_beside(groups, *size)
    for ax, kind, rows in panels:
        # Scores have no colour: these are of methods.
        color = [CONTROL if tables.is_control(name) else "0.25" for name in order]
        ax.barh(range(len(order)), means[kind].reindex(order), 0.6, color=color)
        places = rows.criterion.map([*order].index)
        ax.scatter(rows.spearman, places, s=16, color="white", edgecolor="0.2", zorder=3)
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.set(title=kind, xlim=(-1, 1), ylim=(len(order) - 0.5, -0.5))
        ax.set_xticks([-1, 0, 1])
        ax.grid(False, axis="y")
    figure.axes[0].set_yticks(range(len(order)), map(tables.score_words, order))
    figure.supxlabel("rank correlation with the measured rise of the loss")
    return figure


@styled
def prediction_audit(frame):
    """Draw the measured over the predicted rise of the loss (nats) of budgets, both logarithmic.

    Each cut has a point, and the legend says how many times too low predictions were. What trial
    cuts corrected is hollow. Shown are the pool, units and ranks, by Fisher's criterion; all others
    are in the table.

    frame: columns criterion, kind, predicted, measured, and expected where it is known.
    Returns the Axes.
    Raises ValueError where no value is above 0.
    """
    frame = frame.dropna(subset=["predicted", "measured"])
    shown = frame[frame.kind.isin(["pool", "units", "ranks"]) & (frame.criterion == "fisher")]
    frame = frame if shown.empty else shown
    # Smaller rises than a millinat are rounding, as in tables.audit_table.
    values = frame[["predicted", "measured"]]
    frame = frame[(values > 0).all(axis=1) & (values.max(axis=1) >= 1e-3)]
    if frame.empty:
        raise ValueError("no rise of the loss is above 0: logarithmic axes have nothing to show")
    if "expected" not in frame:
        frame = frame.assign(expected=np.nan)
    values = frame[["predicted", "expected", "measured"]]
    ax = new_axes(HALF[0], 4.8)
    _diagonal(ax, np.array([values.min(axis=None) / 2, values.max(axis=None) * 2]))
    styles = looks(_by_rank(frame.kind.map(tables.method_words)))
    for kind, cuts in frame.groupby("kind"):
        words = tables.method_words(kind)
        look = {"color": styles[words]["color"], "marker": styles[words]["marker"]}
        times = cuts.measured / cuts.predicted
        if times.max() > 3:
            words += f":\nup to {tables.number(times.max(), 0)} × too low"
        ax.scatter(cuts.predicted, cuts.measured, s=55, zorder=3, label=words, **look)
        cuts = cuts.dropna(subset="expected")
        if len(cuts):
            hollow = {"facecolor": "none", "edgecolor": look["color"], "marker": look["marker"]}
            ax.scatter(cuts.expected, cuts.measured, s=55, zorder=4, **hollow)
    if frame.expected.notna().any():
        hollow = {"facecolor": "none", "edgecolor": "0.35", "label": "corrected by\ntrial cuts"}
        ax.scatter([], [], s=55, **hollow)
    ax.figure.legend(loc="outside upper center", ncols=2)
    return ax


def _diagonal(ax, reach):
    """Set both logarithmic axes of rises of the loss, with the diagonal and the band around it.

    reach: array of the ends of both axes, in nats.
    """
    # On the diagonal the prediction is right, in the grey band within a factor of three.
    band = {"color": "0.93", "zorder": 0, "label": "within a\nfactor of 3"}
    ax.fill_between(reach, reach / 3, reach * 3, **band)
    ax.plot(reach, reach, color="0.35", linewidth=1, zorder=1, label="as predicted")
    ax.set(
        xscale="log",
        yscale="log",
        xlim=reach,
        ylim=reach,
        xlabel="predicted rise of the loss\n(nats, log axis)",
        ylabel="measured rise of the loss\n(nats, log axis)",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())
    ax.set_box_aspect(1)


@styled
def class_change(frame):
    """Draw the change of top-1 (percentage points) by class, the most forgotten on top.

    Of more than twelve classes the six worst and the six best are drawn.

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
    hidden = len(changes) - 12
    places = np.arange(len(changes), dtype=float)
    is_long = hidden > 0
    if is_long:
        # A gap between both halves says how many are not shown.
        changes = pd.concat([changes.head(6), changes.tail(6)])
        places = np.r_[:6, 7.2:13.2]
    ax = new_axes(HALF[0], 1 + 0.27 * (places[-1] + 1))
    means = changes["mean"]
    bars = ax.barh(places, means, 0.75, color="0.85", edgecolor="0.35")
    lengths = changes[["below", "above"]].to_numpy().T
    if lengths.any():
        look = {"fmt": "none", "ecolor": "0.2", "elinewidth": 1}
        ax.errorbar(means, places, xerr=lengths, **look)
    else:
        ax.bar_label(bars, fmt=functools.partial(tables.number, sign="+"), padding=3)
    if is_long:
        _gap(ax, f"… {hidden} classes between …", 6.1)
    ax.axvline(0, color="0.35", linewidth=0.8)
    # The number of its images stands behind each name: of few, one weighs much.
    counts = frame.groupby("class").images.first()
    words = [f"{str(name)[:18]} ({counts[name]:g})".replace("_", " ") for name in changes.index]
    ax.set_yticks(places, words)
    ax.set(xlabel="change of top-1 (percentage points)", ylim=(places[-1] + 0.7, -0.7))
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    return ax


def _gap(ax, words, height):
    """Write words across the axes at a height of the y axis."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    look = {"color": "0.35", "ha": "center", "va": "center", "bbox": box}
    ax.text(0.5, height, words, transform=ax.get_yaxis_transform(), **look)


# -- a figure for each model


def _file_part(value):
    """Return a value as part of the name of a file."""
    return f"{value:g}" if isinstance(value, float) else str(value)


_PER = {
    "model": ["model"],
    "kind": ["model", "target_kind"],
    "target": ["model", "target_kind", "target"],
}


@_style.styled
def save(drawn, path, *, caption=None, title=None):
    """Write a Figure as path + ".svg", ".pdf" and ".png", and its caption as ".txt".

    drawn: a Figure or Axes of it.
    path: without ending.
    caption: text.
    title: a sentence to write above the picture, with the caption small below it, for pictures that
        leave their page; None for a picture alone.
    Returns the Figure, to be displayed.
    """
    # svg goes into slides, pdf into papers, png into pages.
    figure = drawn.figure
    if title:
        _write_into(figure, title, caption or "")
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


def _write_into(figure, title, provenance):
    """Write a title above a figure, and small below it where its numbers come from."""
    width = figure.get_figwidth()
    lines = textwrap.wrap(title, int(9.5 * width), break_on_hyphens=False)
    small = textwrap.wrap(provenance, int(19 * width))
    line = 1 / figure.get_figheight()  # an inch
    above = 1 + line * 0.25 * len(lines)
    figure.text(0, above, "\n".join(lines), fontsize=TEXT + 3, weight="bold", va="top")
    figure.text(0, -0.1 * line, "\n".join(small), fontsize=7, color="0.4", va="top")
    if figure.legends:
        # They would move to the edge of the picture, which the title moves up. So they stay where the
        # layout has made room for them.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for legend in figure.legends:
            legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)


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
    titled=False,
    **options,
):
    """Draw, save and show a figure for each model, or for each model and target.

    A notebook gives what all figures share once and then has a line for each kind of figure:

        draw_each = partial(plots.draw_each, results=results, folder=lab.figures)
        draw_each(tables, "agreement", plots.agreement)
        batches = "Batches of {batch} images."
        draw_each(tables, "speedup", plots.speedups, table="runtimes", note=batches)
        plan = "{method}, {target:g} x {target_kind}."
        draw_each(single, "kept", drawings.widths, per="target", note=plan)
        draw_each({"ladder": reached}, "ladder", plots.ladder, per="kind", controls=dense)

    tables: {name: frame}, of which the figures draw one.
    name: first part of the files' names, and of the table.
    draw: a function from the results of one figure to a Figure or Axes, such as one of this module.
    results: results.csv of all models and seeds.
    folder: Path for the files.
    per: "model", "kind" (of target, target_kind) or "target" (with its kind).
    table: name of the table where it is another one.
    note: last sentence of the caption, with {column} for a value of the first result.
    controls: results that are drawn before those of the same model, such as the dense model's.
    titled: whether a title and the caption stand in the picture. The title is that of TITLES; that
        of a ladder says what it shows.
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
        title = None
        if titled:
            words = _ladder_says(group) if draw is ladder else TITLES.get(name, name)
            title = f"{words} ({model_name(model)})"
        display(save(draw(group, **options), path, caption=text, title=title))
