"""Tables and figures of a study, in one style that reads on slides and in grey. No torch.

Statistics take frames and return frames; figures take frames and return Axes or Figures.
Colour and marker both stand for the method. Axes carry units and have no title, which the slide
has. A figure that is saved twice gives the same files byte for byte.

Public: over_seeds, beside_dense, seeds_of, pareto, best_under, audit_table, series, is_random,
in_words, caption, save_table, styled, looks, shades, panels_beside, mean_and_range,
training_curves, accuracy_curve, tradeoff, recovery, ladder, speedup_bars, roofline,
sensitivity_curves, agreement, calibration, class_change, weight_histograms, head_map, heat_map,
image_grid, changed_images, save, draw_each, and the constants without an underscore.
"""

import functools
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib import ticker

from vitlab import record

# -- statistics: frames in, frames out

CUT = (  # columns; rows of one cut have the same values in all of them
    "model",
    "method",
    "criterion",
    "form",
    "target_kind",
    "target",
    "stage",
)
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
DENSE_POINTS = {  # stages of models without a cut; their points lie on top of others
    "dense": {"color": "0.1", "marker": "*", "zorder": 4.5},
    "dense+epochs": {"color": "0.5", "marker": "*", "zorder": 4.5},
}
TOP1 = "test top-1 (%)"
AXES = {  # column: (label with unit, factor to that unit)
    "top1": (TOP1, 1),
    "params": ("parameters (M)", 1e-6),
    "nonzero": ("non-zero parameters (M)", 1e-6),
    "macs": ("MACs of one image (M)", 1e-6),
    "macs_ideal": ("MACs of one image if zeros were free (M)", 1e-6),
    "bytes_disk": ("size on disk (MB)", 1e-6),
    "bytes_memory": ("weights in memory (MB)", 1e-6),
    "latency_ms": ("latency of one batch (ms)", 1),
    "relative_latency": (
        "latency of one batch, as a share of the dense model's",
        1,
    ),
    "images_per_s": ("images per second", 1),
    "memory_mb": ("peak memory (MB)", 1),
}
_SLACK = 0.01  # a limit may be exceeded by this share, as budgets are met to within a hundredth


def is_random(name):
    """Return whether a series is of random cuts, which are the control for others.

    name: a name as `series` gives it.
    """
    return "random" in str(name).replace(",", "").split()


def series(rows):
    """Name the line of each row: its method, with form and criterion where the method has several.

    rows: a frame with the column method and, optionally, form and criterion.
    Returns a Series of strings.
    """
    names = rows.method.astype(str)
    for column in ("form", "criterion"):
        if column in rows:
            several = rows.groupby("method")[column].transform("nunique") > 1
            longer = names + ", " + rows[column].fillna("-").astype(str)
            names = names.where(~several, longer)
    return names


def in_words(rows, formats, between):
    """Write the values of some columns of each row as one text.

    rows: a frame; columns that it lacks and values that are missing are left out.
    formats: {column: format such as "{:.0%}"}.
    between: stands between two values.
    Returns a Series of strings, "" where there is nothing.
    """
    words = pd.Series("", rows.index)
    for column, form in formats.items():
        if column in rows:
            texts = rows[column].map(form.format, na_action="ignore")
            words = words + texts.radd(between).fillna("")
    return words.str.removeprefix(between)


def over_seeds(frame, keys):
    """Average the rows with equal keys over their seeds.

    Where some rows of a key lack values that others have, only those with the most values count,
    so that all means of one key are over the same seeds.

    frame: one row for each seed and keys.
    keys: list of columns.
    Returns a frame with the keys, the means of the other numbers and `seeds`, the number of seeds.
    """
    values = frame.notna().sum(axis=1)
    most = values.groupby([frame[key] for key in keys], dropna=False).transform("max")
    groups = frame[values == most].groupby(keys, sort=False, dropna=False)
    means = groups.mean(numeric_only=True).drop(columns="seed")
    return means.assign(seeds=groups.seed.nunique()).reset_index()


def beside_dense(rows, *columns):
    """Write the value of the dense model beside each row, as a column `dense_<column>`.

    rows: a frame with dense rows among the others.
    columns: names of numbers; of several dense rows of one model and seed the mean is taken.
    Returns rows with the new columns.
    """
    dense = rows[rows.stage == "dense"].groupby(["model", "seed"])[list(columns)].mean()
    return rows.join(dense.add_prefix("dense_"), on=["model", "seed"])


def seeds_of(rows):
    """Say in words which seeds rows are of.

    rows: a frame, of which rows without a seed or, where there is such a column, top1 do not count.
    Returns for example "0, 1, 2", or "0, 1, 2 (some cuts: 0)" where some cuts have fewer, or
    "unknown".
    """
    measured = rows.dropna(subset=rows.columns.intersection(["seed", "top1"]))
    if "seed" not in measured or measured.empty:
        return "unknown"
    cuts = _cuts(measured) if "stage" in measured else measured
    keys = CUT if "method" in cuts else ["model", "checkpoint"]
    keys = [key for key in keys if key in cuts]
    sets = set(_sets_of_seeds(cuts, keys)) if keys else set()
    every = tuple(sorted(set(measured.seed)))
    fewer = sorted(sets - {every})
    if not fewer:
        return _listed(every)
    who = "some cuts" if every in sets else "cuts"
    return f"{_listed(every)} ({who}: {' or '.join(map(_listed, fewer))})"


def _cuts(rows):
    """Return the rows of models with a cut."""
    return rows[~rows.stage.isin(DENSE_POINTS)]


def _named_cuts(rows):
    """Return the rows of models with a cut, with the column series."""
    cuts = _cuts(rows)
    return cuts.assign(series=series(cuts))


def _listed(numbers):
    return ", ".join(map("{:g}".format, numbers))


def _sets_of_seeds(rows, keys):
    """Return the seeds of each group of rows as a Series of sorted tuples, by keys."""
    groups = rows.groupby(keys, sort=False, dropna=False)
    return groups.seed.agg(lambda seeds: tuple(sorted(set(seeds))))


def _marks(sets):
    """Return an ending for the name of each group, such as ", seed 0"; "" where it has all seeds.

    sets: tuples of seeds by group, a Series.
    """
    missing = sets.map(len) < sets.map(len).max()
    return sets.map(_of_seeds).where(missing, "")


def _of_seeds(seeds):
    """Return an ending for a name, such as ", seeds 0, 1"."""
    return f", seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}"


def _ranges(groups):
    """Return the mean of each group, and how far its lowest and highest number are below and above.

    groups: a grouped Series.
    Returns a frame with the columns mean, below and above.
    """
    table = groups.agg(["mean", "min", "max"])
    # The computed mean of three equal numbers may lie an ulp beside them.
    mean = table["mean"].clip(table["min"], table["max"])
    return pd.DataFrame({"mean": mean, "below": mean - table["min"], "above": table["max"] - mean})


def pareto(cost, value):
    """Find the points that no other beats.

    One point beats another by costing at most as much and being worth more, or by costing less and
    being worth as much.

    cost, value: Series of one index; low cost and high value are good.
    Returns a bool Series.
    """
    costs, values = cost.to_numpy(), value.to_numpy()
    # The comparisons have points down and their rivals across.
    cost_down, value_down = costs[:, None], values[:, None]
    by_value = (cost_down >= costs) & (value_down < values)
    by_cost = (cost_down > costs) & (value_down <= values)
    return pd.Series(~(by_value | by_cost).any(axis=1), cost.index)


def best_under(rows, cost, limits=(0.75, 0.5, 0.25)):
    """Find the best model at each limit of a cost, which is a share of the dense model's.

    One cut is one method, criterion, form, target_kind, target and stage, with means over its
    seeds. Of the cuts that fit, those of fewer seeds than others stand back. A limit may be
    exceeded by a hundredth of itself, as budgets are met to within that. The best has the highest
    `val_top1` of those that have one, else the highest test top-1, which favours the lucky one a
    little.

    rows: results.csv of any models and seeds, the dense ones among them.
    cost: a column, such as macs, params, bytes_disk, latency_ms or relative_latency.
    limits: shares in (0, 1] of the cost of the dense model of the same model and seed.
    Returns a frame of a row per model and limit: model, cost, limit, method, ..., stage, top1
    (test, percent), dense (its top-1), share and value of the cost, chosen_on ("val" or "test"),
    seeds. Where nothing fits, method is "none" and the rest is missing. Models without a cut that
    has this cost are left out.
    Raises ValueError for another column, limits out of range, and rows without a dense model.
    """
    if cost not in rows:
        raise ValueError(record.unknown("cost", cost, _costs(rows)))
    if not all(0 < limit <= 1 for limit in limits):
        raise ValueError(
            f"limits are shares of the dense model's cost, in (0, 1]; got {list(limits)}"
        )
    if not (rows.stage == "dense").any():
        raise ValueError("no row of stage dense, so that no cost is known as a share")
    rows = beside_dense(rows, cost, "top1").dropna(subset=[cost, "top1"])
    rows = rows.assign(share=rows[cost] / rows[f"dense_{cost}"], val=rows.get("val_top1", np.nan))
    rows = rows.rename(columns={cost: "value", "dense_top1": "dense"})
    keys = [key for key in CUT if key in rows]
    groups = rows.groupby(keys, dropna=False, sort=False)
    points = groups[["top1", "dense", "share", "value", "val"]].mean()
    points = points.assign(seeds=groups.seed.nunique()).reset_index()
    points = points[points.model.isin(_cuts(points).model)]
    best = []
    for (model, cuts), limit in itertools.product(points.groupby("model", sort=False), limits):
        fitting = cuts[cuts.share <= limit * (1 + _SLACK)]
        best.append({"model": model, "cost": cost, "limit": limit} | _best(fitting))
    columns = [*keys[1:], "top1", "dense", "share", "value", "chosen_on", "seeds"]
    return pd.DataFrame(best, columns=["model", "cost", "limit", *columns])


def _costs(rows):
    """Return the names of the costs that rows have."""
    return rows.columns.intersection(list(AXES)).drop("top1", errors="ignore")


def _best(points):
    """Return the best of several points as a dict; its method is "none" where there is no point."""
    points = points[points.seeds == points.seeds.max()]
    by, chosen_on = ("val", "val") if points.val.notna().any() else ("top1", "test")
    ranked = points.dropna(subset=by).sort_values(by, kind="stable")
    if ranked.empty:
        return {"method": "none"}
    return ranked.iloc[-1].to_dict() | {"chosen_on": chosen_on}


def audit_table(frame, by=("criterion", "kind")):
    """Tell how far predicted rises of the loss can be trusted, for each group of cuts.

    frame: columns predicted and measured (nats), and those of `by`.
    by: columns that tell groups apart.
    Returns a frame with the columns of `by` and
    cuts: how many there are;
    spearman: rank correlation of both, in [-1, 1]: do they come in the right order? It is nan for
    fewer than three cuts or equal ones;
    ratio: the median of measured / predicted, where a rise is predicted and one of both is a
    millinat or more: are they of the right size? It is nan where there is none.
    Raises ValueError for a missing column.
    """
    for column in (*by, "predicted", "measured"):
        if column not in frame:
            raise ValueError(record.unknown("column", column, frame.columns))
    rises = frame.dropna(subset=["predicted", "measured"])
    rows = []
    for name, cuts in rises.groupby(list(by), sort=False, dropna=False):
        both = cuts[["predicted", "measured"]]
        ranks = both.rank()
        varied = len(cuts) > 2 and (ranks.nunique() > 1).all()
        spearman = ranks.predicted.corr(ranks.measured) if varied else np.nan  # Pearson of ranks
        # What is left of smaller ones is rounding, and its ratios run to 100,000.
        large = cuts[(cuts.predicted > 0) & (both.abs().max(axis=1) >= 1e-3)]
        ratio = (large.measured / large.predicted).median()
        rows.append((*name, len(cuts), spearman, ratio))
    return pd.DataFrame(rows, columns=[*by, "cuts", "spearman", "ratio"])


# -- words and files of tables


def caption(rows, drawn=None):
    """Say where the rows of a figure come from: study, seeds, meters, machine, versions and commit.

    rows: results.csv.
    drawn: the rows of another table that the figure shows; then only those of `rows` with its
    models and seeds count.
    Returns one paragraph.
    """
    words = {"seeds": seeds_of(rows if drawn is None else drawn)}
    if drawn is not None:
        pair = ["model", "seed"]
        shown = pd.MultiIndex.from_frame(drawn[pair])
        rows = rows[pd.MultiIndex.from_frame(rows[pair]).isin(shown)]
    for column in (
        "study",
        "data",
        "model",
        "split_seed",
        "device",
        "threads",
        "torch",
        "timm",
        "commit",
    ):
        values = rows[column].dropna().unique() if column in rows else []
        words[column] = ", ".join(map(str, values)) or "unknown"
    return (
        "Study {study} on {data}; {model}; seeds {seeds}, split {split_seed}. "
        "MACs by vitlab's closed form; latency as median. {device}, threads: {threads}; "
        "torch {torch}, timm {timm}, commit {commit}, {date:.10}."
    ).format(**words, date=rows.date.astype(str).max())


def save_table(frame, path, *, formats=None, kinds=("csv", "md", "tex")):
    """Write a frame as path + ".csv" (as it is) and, formatted for people, ".md" and ".tex".

    A frame without rows, as a study that was run in part has some, is not written; a line says so.

    frame: what is missing in it is left empty.
    path: without ending.
    formats: {column: format such as "{:.1f}"}; other numbers have at most three digits after the
    point.
    kinds: the endings to write.
    Raises ValueError for an unknown column.
    """
    formats = formats or {}
    for column in formats:
        if column not in frame:
            raise ValueError(record.unknown("column", column, frame.columns))
    if frame.empty:
        record.say(f"{Path(path).name}: no rows yet, not written")
        return
    cells = frame.astype(object)
    text = cells.apply(lambda column: column.map(_cell, form=formats.get(column.name)))
    sides = ["right" if pd.api.types.is_numeric_dtype(kind) else "left" for kind in frame.dtypes]
    letters = "".join(side[0] for side in sides)
    tex = (
        text.style.hide(axis="index")
        .format(escape="latex")
        .format_index(escape="latex", axis="columns")
    )
    write = {
        "csv": lambda: frame.to_csv(index=False),
        "md": lambda: text.to_markdown(index=False, disable_numparse=True, colalign=sides) + "\n",
        "tex": lambda: tex.to_latex(hrules=True, column_format=letters),
    }
    for kind in kinds:
        record.write_atomic(f"{path}.{kind}", write[kind]())


def _cell(value, form):
    """Return the text of one value of a table, in a format if there is one."""
    if pd.isna(value):
        return ""
    if form:
        return form.format(value)
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)


# -- style

HALF = (5.5, 3.4)  # inches: half a slide
WIDE = (8.2, 3.6)  # inches: with a legend beside
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
    "pdf.fonttype": 42,  # TrueType: text stays text here, too
}
COLORS = sns.color_palette("colorblind").as_hex()
HUES = COLORS[:7] + COLORS[8:]  # without the grey, which is for controls
MARKERS = "os^DvPX"  # fewer than hues, so that the tenth series differs from the first
KINDS = MARKERS + "<>*phd"  # markers of kinds of cuts, of which there are more
DENSE = {"color": "0.35", "marker": "_"}
LINES = {  # of stages
    "distilled": {"linestyle": (0, (8, 2))},
    "finetuned": {"linestyle": "-"},
    "reconstructed": {"linestyle": "-.", "markerfacecolor": "white"},
    "compensated": {"linestyle": "--", "markerfacecolor": "white"},
    "folded": {"linestyle": (0, (1, 4)), "markerfacecolor": "white"},
    "cut": {"linestyle": ":", "markerfacecolor": "white"},
}


def styled(draw):
    """Return the function `draw` with all that it draws in the style of this module."""

    @functools.wraps(draw)
    def draw_in_style(*arguments, **options):
        # This loads the backend. Loaded inside the context, a notebook's interactive mode would
        # end with the style.
        plt.draw_if_interactive()
        with plt.rc_context(STYLE):
            return draw(*arguments, **options)

    return draw_in_style


def looks(names):
    """Choose a colour and a marker for each series; the controls are grey in every figure.

    names: names of series in order, where repeated ones count once. Controls are "dense" and random
    cuts.
    Returns {name: {"color", "marker"}}, always with "dense".
    """
    greys = zip(itertools.repeat("0.6"), itertools.cycle(MARKERS[3:] + MARKERS[:3]))
    hues = zip(itertools.cycle(HUES), itertools.cycle(MARKERS))
    styles = {"dense": DENSE}
    for name in names:
        if name not in styles:
            color, marker = next(greys if is_random(name) else hues)
            styles[name] = {"color": color, "marker": marker}
    return styles


def shades(names):
    """Choose a colour for each of names that have an order, such as blocks, from dark to light.

    Returns {name: colour}.
    """
    return dict(zip(names, sns.color_palette("viridis", len(names)), strict=True))


def _axes(width, height):
    """Return the Axes of a new Figure of a size in inches."""
    return plt.subplots(figsize=(width, height))[1]


def panels_beside(count, width, height=HALF[1]):
    """Return a Figure of a size in inches and its panels in a row, which share the y axis."""
    size = (width, height)
    figure, panels = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False)
    return figure, panels[0]


def mean_and_range(ax, groups, **style):
    """Draw the mean of each group over the group's name, with a bar from its lowest to its highest.

    Where no group has a difference, there are no bars.

    groups: a grouped Series whose names are numbers.
    style: options of ax.errorbar.
    """
    means = _ranges(groups)
    ax.errorbar(means.index, means["mean"], yerr=_bars(means), capsize=3, **style)


def _bars(ranges):
    """Return the lengths of error bars, [below and above, points], or None where all are nought."""
    lengths = ranges[["below", "above"]].to_numpy().T
    return lengths if lengths.any() else None


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


def _legend_beside(ax):
    """Put a legend to the right of the axes, where it hides no point."""
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


# -- figures


@styled
def training_curves(history):
    """Draw accuracy over the epochs: a panel for each method, a line for each target.

    history: rows of history.csv with method, target, epoch and train_top1 (%); several seeds become
    mean and range.
    Returns a Figure.
    """
    methods = history.method.unique()
    figure, panels = panels_beside(len(methods), 1 + 3.4 * len(methods))
    styles = looks(sorted(history.target.dropna().unique()))
    for ax, method in zip(panels, methods, strict=True):
        rows = history[history.method == method]
        for target, line in rows.groupby("target", dropna=False):
            label = f"{target:.0%} cut" if pd.notna(target) else method
            style = styles.get(target, DENSE)
            mean_and_range(ax, line.groupby("epoch").train_top1, label=label, **style)
        ax.set_title(method, fontsize=12)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    panels[0].set_ylabel("training top-1 (%)")
    return figure


@styled
def accuracy_curve(rows):
    """Draw test top-1 (%) over the share cut.

    A series has a colour, a stage a kind of line. Bars are the range over seeds. Grey lines are the
    dense model's, one for each set of seeds that cuts have. A series of fewer seeds than others is
    named with them.

    rows: results.csv of one model.
    Returns the Axes.
    """
    ax = _axes(*WIDE)
    cuts = _named_cuts(rows[rows.target.notna()])
    styles = looks(cuts.series)
    for (name, stage), line in cuts.groupby(["series", "stage"], sort=False):
        style = styles[name] | LINES.get(stage, {})
        mean_and_range(ax, line.groupby("target").top1, **style)
    for name, mark in _marks(_sets_of_seeds(cuts, "series")).items():
        _legend_entry(ax, name + mark, **styles[name])
    for stage, style in LINES.items():
        if stage in set(cuts.stage):
            _legend_entry(ax, STAGES[stage], color="0.35", **style)
    _dense_lines(ax, rows, cuts)
    is_budget = cuts.target_kind.isin(["macs", "params", "bytes", "latency"]).any()
    ax.set(xlabel="share kept" if is_budget else "share cut", ylabel=TOP1)
    ax.xaxis.set_major_formatter("{x:.0%}")
    _stretch_top(ax, cuts.top1.min(), rows.top1.max())
    _legend_beside(ax)
    return ax


@styled
def tradeoff(rows, x="macs", *, names=()):
    """Draw test top-1 (%) over a cost.

    A series has a colour and a marker, and a thin line through its targets. Of each cut the last of
    `finetuned` and `distilled` is shown. What is `reconstructed` and was not trained yet has a
    hollow marker. Controls are grey: the dense model, the same with as many epochs of training
    (both with a line across) and random cuts. The dark step line joins the points, ringed, that no
    other beats; those of fewer seeds than others stand back there, as in `best_under`. Points are
    means over seeds, bars their range.

    rows: results.csv of one model. Masked models stand where their dense tensors put them.
    x: macs, macs_ideal, params, nonzero, bytes_disk, bytes_memory, latency_ms, memory_mb, or
    relative_latency, a column that the caller makes as 1 / speedup from rows of several sessions.
    names: `series` of more rows, so that each looks the same in several figures.
    Returns the Axes.
    Raises ValueError for another column or where no row has it.
    """
    if x not in AXES or x not in rows:
        raise ValueError(record.unknown("cost", x, _costs(rows)))
    final = _final_rows(rows.rename(columns={x: "cost"}))
    if final.empty:
        raise ValueError(
            f"no fine-tuned, reconstructed or dense row has {x}; it is measured in 6_efficiency"
        )
    unit, factor = AXES[x]
    points = _final_points(final, factor)
    styles = looks([*names, *points.series])
    for stage, style in DENSE_POINTS.items():
        styles[STAGES[stage]] = style
    marks = _marks(points.groupby("series").seeds.agg(lambda sets: max(sets, key=len)))
    height = max(4.4, 1.2 + 0.23 * len(marks))  # inches: the legend has as many lines
    ax = _axes(WIDE[0] + 1, height)
    _front(ax, points)
    for name in _controls_first(points.series.unique()):
        line = points[points.series == name]
        _line(ax, line, styles[name], name + marks[name])
    if (points.stage == "reconstructed").any():
        ax.scatter(
            [],
            [],
            s=40,
            label="hollow: reconstructed,\nnot trained",
            facecolor="white",
            edgecolor="0.35",
        )
    ax.set(xlabel=unit, ylabel=TOP1)
    _stretch_top(ax, final.top1.min(), final.top1.max())
    _legend_beside(ax)
    return ax


def _final_rows(rows):
    """Return the rows of the last stage of each cut, and of dense models of the same seeds."""
    rows = rows.dropna(subset=["cost", "top1"])
    rows = rows[rows.stage.isin([*DENSE_POINTS, "reconstructed", "finetuned", "distilled"])]
    cuts = _cuts(rows)
    if len(cuts):
        rows = rows[rows.seed.isin(cuts.seed)]
    words = rows.stage.where(rows.stage.isin(DENSE_POINTS)).map(STAGES)
    rows = rows.assign(series=words.fillna(series(rows)), is_distilled=rows.stage == "distilled")
    cut = rows.groupby(["series", "target_kind", "target"], dropna=False)
    return rows[(rows.stage != "finetuned") | ~cut.is_distilled.transform("any")]


def _final_points(rows, factor):
    """Return a point for each series, target and stage of the final rows.

    factor: of the cost, to the unit of its axis.
    Returns a frame with these columns and seeds (a tuple), cost_mean, cost_below, cost_above,
    top1_mean, top1_below and top1_above.
    """
    keys = ["series", "target_kind", "target", "stage"]
    groups = rows.groupby(keys, sort=False, dropna=False)
    cost = _ranges(groups.cost) * factor
    top1 = _ranges(groups.top1)
    seeds = _sets_of_seeds(rows, keys).rename("seeds")
    points = pd.concat([cost.add_prefix("cost_"), top1.add_prefix("top1_"), seeds], axis=1)
    return points.reset_index()


def _controls_first(names):
    """Return names of series in the order in which they are drawn: dense, random, others."""
    dense = [STAGES[stage] for stage in DENSE_POINTS]
    return sorted(names, key=lambda name: (name not in dense, not is_random(name)))


def _front(ax, points):
    """Ring the points that no other of as many seeds beats, and join them by a step line."""
    is_dense = points.stage.isin(DENSE_POINTS)
    counts = points.seeds.map(len)
    most = counts[~is_dense].max()
    ranked = points[is_dense | (counts == most)]
    best = ranked[pareto(ranked.cost_mean, ranked.top1_mean)].sort_values("cost_mean")
    edge = points.cost_mean.max() + 0.04 * np.ptp(points.cost_mean)
    costs = [*best.cost_mean, edge]
    heights = [*best.top1_mean, best.top1_mean.iloc[-1]]
    ax.plot(
        costs,
        heights,
        drawstyle="steps-post",
        zorder=1,
        color="0.25",
        linewidth=1.2,
    )
    ax.scatter(
        best.cost_mean,
        best.top1_mean,
        s=150,
        zorder=5,
        facecolor="none",
        edgecolor="0.25",
        linewidth=1.2,
    )
    label = "best for its cost"
    if len(ranked) < len(points):
        label += f",\nof {most:g} seeds"
    _legend_entry(ax, label, color="0.25", marker="o", markersize=11, markerfacecolor="none")


def _line(ax, points, style, label):
    """Draw the points of one series, with a line across if they are of dense models."""
    for is_hollow, part in points.groupby(points.stage == "reconstructed"):
        _points(ax, part, style, is_hollow)
    if points.stage.iloc[0] in DENSE_POINTS:
        top1 = points.top1_mean.mean()
        ax.axhline(top1, color=style["color"], linewidth=0.8, linestyle=":", zorder=0)
    ax.scatter([], [], s=55, label=label, **style)


def _points(ax, points, style, is_hollow):
    """Draw points of one series with bars for their range and, if trained, a line through them."""
    points = points.sort_values("cost_mean")
    places = points.cost_mean, points.top1_mean
    color, marker = style["color"], style["marker"]
    if is_hollow:
        ax.scatter(
            *places,
            s=30,
            marker=marker,
            zorder=4,
            facecolor="white",
            edgecolor=color,
            linewidth=1.4,
        )
    else:
        ax.scatter(
            *places,
            s=60,
            marker=marker,
            color=color,
            zorder=style.get("zorder", 3),
        )
        ax.plot(*places, color=color, linewidth=0.8, alpha=0.5, zorder=1)
    x = points[["cost_below", "cost_above"]].to_numpy().T
    y = points[["top1_below", "top1_above"]].to_numpy().T
    if x.any() or y.any():
        ax.errorbar(*places, xerr=x, yerr=y, fmt="none", ecolor=color, capsize=2, zorder=2)


_FILLS = {  # colour and hatch of a stage's bars
    "dense": ("0.35", ""),
    "dense+epochs": ("0.35", ""),
    "cut": ("0.85", "///"),
    "folded": (COLORS[8], "--"),
    "compensated": (COLORS[9], ".."),
    "reconstructed": (COLORS[1], "xx"),
    "finetuned": (COLORS[0], ""),
    "distilled": (COLORS[2], "\\\\"),
}


@styled
def recovery(rows):
    """Draw test top-1 (%) of every cut as bars: after it and after each step of recovery.

    Bars are means over seeds. Grey lines are the dense model's, as in `accuracy_curve`.

    rows: results.csv of one model.
    Returns the Axes.
    """
    cuts = _named_cuts(rows)
    targets = cuts.target.map("{:.0%}".format)
    cuts["name"] = cuts.series.str.replace(", ", "\n") + "\n" + targets
    marks = _marks(_sets_of_seeds(cuts, "name")).str.replace(", ", "\n", n=1)
    heights = cuts.groupby(["name", "stage"]).top1.mean().unstack().reindex(marks.index)
    stages = [stage for stage in STAGES if stage in heights]
    ax = _bar_axes(marks.index + marks, 0.2 + 0.175 * max(4, len(stages)))
    heights = heights[stages].rename(columns=STAGES)
    colors, hatches = zip(*map(_FILLS.get, stages), strict=True)
    _bar_groups(ax, heights, colors, hatches, form="{:.0f}", fontsize=9, pad=0.5)
    _dense_lines(ax, rows, cuts.dropna(subset="top1"))
    ax.set(ylabel=TOP1, ylim=(0, 105))
    _legend_beside(ax)
    return ax


def _bar_axes(names, space):
    """Return Axes that are wide enough for a group of bars over each name.

    space: inches for the bars of one group; a long word of a name may take more.
    """
    words = "\n".join(map(str, names)).split("\n")
    space = max(space, 0.2 + 0.095 * max(map(len, words)))
    ax = _axes(max(WIDE[0], 3 + space * len(names)), WIDE[1])
    ax.set_xticks(range(len(names)), names, fontsize=10)
    ax.grid(False, axis="x")
    return ax


def _bar_groups(ax, heights, colors, hatches, *, form, fontsize, pad, spreads=None):
    """Draw a group of bars for each row of a frame, with a bar for each column, and numbers above.

    heights: a frame; its columns name the bars in the legend.
    colors, hatches: of each column.
    form: of the numbers, such as "{:.0f}"; fontsize: theirs; pad: of the box around them.
    spreads: lengths of error bars for each column, or None for bars without.
    """
    width = 0.8 / heights.shape[1]
    middle = (heights.shape[1] - 1) / 2
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": pad}
    for i, label in enumerate(heights):
        places = np.arange(len(heights)) + (i - middle) * width
        style = {
            "color": colors[i],
            "hatch": hatches[i],
            "edgecolor": "0.2",
            "label": label,
        }
        if spreads:
            style |= {"yerr": spreads[i], "capsize": 2}
        bars = ax.bar(places, heights[label], width, **style)
        ax.bar_label(bars, fmt=form, fontsize=fontsize, padding=2, bbox=box)


@styled
def ladder(rows, *, names=()):
    """Draw test top-1 (%) after each step of recovery from one cut, in the order of the steps.

    A series has a line. Points are means over seeds, bars their range. Hollow points are of no
    training. Grey lines are the dense model's, as in `accuracy_curve`. The legend goes from the
    best at the last step to the worst.

    rows: results.csv of one model and one budget (target_kind and target), and of the dense model.
    names: `series` of more rows, so that each looks the same in several figures.
    Returns the Axes.
    Raises ValueError for rows of several budgets, or of none.
    """
    cuts = _named_cuts(rows[rows.stage.isin(STAGES) & rows.top1.notna()])
    budgets = cuts[["target_kind", "target"]].drop_duplicates().values.tolist()
    if len(budgets) != 1:
        raise ValueError(f"a ladder is of one budget, and the rows have {len(budgets)}: {budgets}")
    stages = [stage for stage in STAGES if stage in set(cuts.stage)]
    cuts["step"] = cuts.stage.map(stages.index)
    means = cuts.groupby(["series", "step"]).top1.mean().unstack()
    last = means.ffill(axis=1).iloc[:, -1].sort_values(ascending=False, kind="stable")
    # Equal points stand side by side.
    cuts["step"] += 0.025 * (cuts.series.map(last.index.get_loc) - (len(last) - 1) / 2)
    styles = looks([*names, *cuts.series])
    marks = _marks(_sets_of_seeds(cuts, "series"))
    ax = _axes(max(WIDE[0], 3.5 + 1.2 * len(stages)), 4.4)
    for name in last.index:
        line = cuts[cuts.series == name]
        style = styles[name] | {"markersize": 7}
        mean_and_range(ax, line.groupby("step").top1, label=name + marks[name], **style)
        untrained = line[~line.stage.isin(["finetuned", "distilled"])]
        points = untrained.groupby("step").top1.mean()
        ax.plot(points, markerfacecolor="white", linestyle="", zorder=3, **style)
    _dense_lines(ax, rows, cuts)
    words = [STAGES[stage].replace(", ", ",\n") for stage in stages]
    ax.set_xticks(range(len(stages)), words)
    ax.set(xlabel="step of recovery", ylabel=TOP1, xlim=(-0.3, len(stages) - 0.7))
    _stretch_top(ax, cuts.top1.min(), rows.top1.max())
    _legend_beside(ax)
    return ax


def _dense_lines(ax, rows, cuts):
    """Draw grey lines at the mean top-1 of the dense model.

    Those of the model with as many epochs of training are dash-dotted. Each set of seeds that cuts
    have gets lines of its own, so that all are held against dense models of their own seeds.
    """
    sets = _sets_of_seeds(cuts, ["series", "target", "stage"]).drop_duplicates()
    sets = sorted(sets, key=len, reverse=True) or [tuple(rows.seed.unique())]
    color = "0.35"
    for seeds in sets:
        dense = rows[rows.seed.isin(seeds)]
        for stage, line in (("dense", "-"), ("dense+epochs", "-.")):
            top1 = dense.top1[dense.stage == stage]
            label = STAGES[stage] + (_of_seeds(seeds) if len(sets) > 1 else "")
            if len(top1):
                ax.axhline(
                    top1.mean(),
                    label=label,
                    color=color,
                    linestyle=line,
                    linewidth=1,
                    zorder=0,
                )
        color = "0.65"


def _stretch_top(ax, low, high):
    """Set a logarithmic y axis downwards from the best accuracy, in percent.

    A point that is lost there takes more room than one far below.

    low, high: percent, what is to be seen.
    """
    zero = high + 2  # percent: what the logarithm counts from

    def to_place(value):
        return -np.log(np.maximum(zero - value, 1e-6))

    def to_value(place):
        return zero - np.exp(-place)

    bottom, top = zero - 1.12 * (zero - low), high + 0.4
    ax.set_yscale("function", functions=(to_place, to_value))
    ax.set_ylim(bottom, top)
    least = (to_place(top) - to_place(bottom)) / 14  # between two ticks
    ticks = []
    for step in (10, 5, 2, 1):
        first = max(0, bottom, high - 10 * step)  # fine steps on top only
        for tick in np.arange(np.ceil(first / step) * step, top, step):
            gaps = np.abs(to_place(tick) - to_place(np.array(ticks)))
            if (gaps > least).all():
                ticks.append(tick)
    ticks.sort()
    ax.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    ax.yaxis.set_minor_locator(ticker.NullLocator())


@styled
def speedup_bars(table):
    """Draw how many times as fast as the first model the others are.

    Each model has a group of bars with quartiles, a bar for each way of running it. A short line
    shows what the MACs promise where `promised` is known.

    table: columns model, speedup, speedup_q1, speedup_q3, and runtime, precision and batch where
    these vary, as bench.latency returns it; several rows of one model and way (seeds) become their
    mean.
    Returns the Axes.
    """
    names, ways = table.model.unique(), _ways(table)
    order = ways.unique()
    groups = table.groupby([table.model, ways])
    means = {}
    for column in ("speedup", "speedup_q1", "speedup_q3"):
        means[column] = groups[column].mean().unstack().reindex(index=names, columns=order)
    heights = means["speedup"]
    below = (heights - means["speedup_q1"]).clip(lower=0)
    above = (means["speedup_q3"] - heights).clip(lower=0)
    ax = _bar_axes(names, 0.25 + 0.3 * len(order))
    _bar_groups(
        ax,
        heights,
        COLORS * len(order),
        ["", "///", "..", "xx", "\\\\", "++"] * len(order),
        form="{:.1f}",
        fontsize=8,
        pad=0.3,
        spreads=[[below[way], above[way]] for way in order],
    )
    if "promised" in table:
        promised = table.groupby("model").promised.mean()[names]
        places = np.arange(len(names))
        ax.hlines(
            promised,
            places - 0.45,
            places + 0.45,
            label="promised by the MACs",
            color="0.1",
            linewidth=1.2,
        )
    ax.axhline(1, color="0.35", linewidth=0.8, zorder=0)
    ax.set(ylabel=f"times as fast as\n{names[0]}")
    _legend_beside(ax)
    return ax


def _ways(table):
    """Return how each row was run, in words: runtime, precision and batch as far as these vary."""
    varied = table.columns[table.nunique() > 1]
    formats = {"runtime": "{}", "precision": "{}", "batch": "batch {}"}
    return in_words(table[varied], formats, ", ")


@styled
def roofline(table):
    """Draw the work done per second over the work per byte, under the machine's ceilings.

    There is a point for each row, a colour for each model and a line for each precision: at its
    left the rate of the memory (a band, as caches make small operations faster), at its right that
    of matrix products.

    table: as bench.bounds returns it.
    Returns the Axes.
    """
    intensity = table.batch_macs / table.batch_bytes
    rate = table.batch_macs / (1000000 * table.latency_ms)  # 10^9 MACs per second
    ways = _ways(table)
    colors = dict(zip(table.model.unique(), itertools.cycle(COLORS), strict=False))
    markers = dict(zip(ways.unique(), itertools.cycle(MARKERS), strict=False))
    ax = _axes(WIDE[0], max(4.2, 0.8 + 0.25 * len(colors)))
    _ceilings(ax, table, np.geomspace(intensity.min() / 2, intensity.max() * 2, 200))
    for i, (name, color) in enumerate(colors.items()):
        size = max(24, 160 * 0.6**i)  # the earlier ones show behind others at the same place
        for way, marker in markers.items():
            is_here = (table.model == name) & (ways == way)
            if is_here.any():
                ax.scatter(
                    intensity[is_here],
                    rate[is_here],
                    s=size,
                    zorder=2 + i / 100,
                    color=color,
                    marker=marker,
                    edgecolor="white",
                )
    markers.pop("", None)  # where nothing varies there is no way to name
    _legend_of(ax, colors, markers)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="MACs per byte moved",
        ylabel="10⁹ MACs per second",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    _legend_beside(ax)
    return ax


def _ceilings(ax, table, intensity):
    """Draw the rate that the machine allows at each intensity (MACs per byte), by precision."""
    for precision, rows in table.groupby("precision", sort=False):
        top = rows.macs_per_s.max() / 1e9
        slow = np.minimum(top, intensity * (rows.bytes_per_s.min() / 1e9))
        fast = np.minimum(top, intensity * (rows.bytes_per_s.max() / 1e9))
        line = "-" if precision == "float32" else "--"
        ax.plot(
            intensity,
            fast,
            color="0.3",
            linestyle=line,
            label=f"ceiling, {precision}",
        )
        ax.fill_between(intensity, slow, fast, color="0.9", zorder=0)


@styled
def sensitivity_curves(frame):
    """Draw the rise of the loss (nats) over the share cut from one layer alone, by role and block.

    There is a panel for each role and a line for each block.

    frame: columns role, block, ratio, increase, as sensitivity.curves returns it.
    Returns a Figure.
    """
    roles = frame.role.unique()
    colors = shades(frame.block.dropna().unique())
    figure, panels = panels_beside(len(roles), 1 + 2.6 * len(roles))
    for ax, role in zip(panels, roles, strict=True):
        lines = frame[frame.role == role].groupby("block", sort=False, dropna=False)
        for block, line in lines:
            color = colors.get(block, "0.3")
            ax.plot(line.ratio, line.increase, marker=".", color=color, label=block)
        ax.set(xlabel=f"share of {role} cut")
    panels[0].set(ylabel="rise of the loss (nats)")
    handles = [plt.Line2D([], [], color=colors[block], marker=".", label=block) for block in colors]
    panels[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled
def agreement(frame):
    """Draw the rank correlation between score and measured rise of the loss as bars.

    There is a bar for each criterion and kind of unit.

    frame: columns criterion, kind, spearman, as sensitivity.agreement returns it.
    Returns the Axes.
    """
    width = max(HALF[0], 2.2 + 0.95 * frame.criterion.nunique())
    ax = _axes(width, HALF[1])
    sns.barplot(
        frame,
        x="criterion",
        y="spearman",
        hue="kind",
        errorbar=("pi", 100),
        ax=ax,
    )
    ax.axhline(0, color="0.3", linewidth=0.8)
    bottom = min(0, frame.spearman.min() - 0.1)
    ax.set(
        xlabel="",
        ylabel="rank correlation with\nmeasured rise of the loss",
        ylim=(bottom, 1),
    )
    _legend_beside(ax)
    return ax


@styled
def calibration(frame):
    """Draw the measured over the predicted rise of the loss (nats), both logarithmic.

    Each cut has a point, a criterion has a colour, a kind a marker (KINDS has 13). On the diagonal
    the prediction is right, in the grey band within a factor of three. What is below the lowest
    decade shown, so also 0 and less, is drawn hollow on the dotted edge. That decade is the one of
    the smallest value above 0, but at most four under the largest.

    frame: columns criterion, kind, predicted, measured.
    Returns the Axes.
    Raises ValueError where no value is above 0.
    """
    frame = frame.dropna(subset=["predicted", "measured"])
    values = frame[["predicted", "measured"]].to_numpy(float)
    positive = values[values > 0]
    if not positive.size:
        raise ValueError("no rise of the loss is above 0: logarithmic axes have nothing to show")
    top = positive.max()
    floor = 10 ** np.floor(np.log10(max(positive.min(), top / 1e4)))
    styles = looks(frame.criterion)
    colors = {criterion: styles[criterion]["color"] for criterion in frame.criterion}
    markers = dict(zip(frame.kind.unique(), itertools.cycle(KINDS), strict=False))
    # The legend has as many lines, in inches.
    height = max(4.4, 1.4 + 0.23 * (len(colors) + len(markers)))
    ax = _axes(height + 2.4, height)
    _diagonal(ax, np.array([floor / 1.5, 1.8 * top]))
    frame = frame.assign(is_below=(values < floor).any(axis=1))
    for (criterion, kind), cuts in frame.groupby(["criterion", "kind"], sort=False):
        for is_below, part in cuts.groupby("is_below"):
            fill, edge = colors[criterion], "white"
            if is_below:
                fill, edge = edge, fill
            _rises(
                ax,
                part,
                floor,
                marker=markers[kind],
                facecolor=fill,
                edgecolor=edge,
                zorder=2 + is_below,
            )
    _legend_of(ax, colors, markers)
    if frame.is_below.any():
        _floor(ax, floor)
    _legend_beside(ax)
    return ax


def _floor(ax, floor):
    """Draw the edges at which what is below the floor is drawn, and name the hollow marker."""
    style = {"linestyle": "", "marker": "o", "markerfacecolor": "white"}
    _legend_entry(ax, f"hollow: below {floor:g}", color="0.4", **style)
    for line in (ax.axhline, ax.axvline):
        line(floor, color="0.35", linestyle=":", linewidth=0.8)


def _rises(ax, cuts, floor, **style):
    """Draw cuts at their predicted and measured rise of the loss, at the edge what is below."""
    predicted, measured = cuts.predicted.clip(floor), cuts.measured.clip(floor)
    ax.scatter(predicted, measured, s=45, clip_on=False, **style)


def _diagonal(ax, reach):
    """Set both logarithmic axes of rises of the loss, with the diagonal and the band around it.

    reach: array of the ends of both axes, in nats.
    """
    ax.fill_between(
        reach,
        reach / 3,
        reach * 3,
        color="0.93",
        zorder=0,
        label="within a factor of 3",
    )
    ax.plot(reach, reach, color="0.35", linewidth=1, zorder=1, label="as predicted")
    ax.set(xscale="log", yscale="log", xlim=reach, ylim=reach)
    ax.set(
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

    Of more than 30 classes the 12 worst and the 12 best are drawn, with a gap that says how many
    are not shown. The number of its images stands behind each name: of few, one weighs much.
    Classes without images are left out.

    frame: columns class, images and change, as evaluate.compare gives them; several rows of a class
    (seeds) become mean and range.
    Returns the Axes.
    Raises ValueError where no class is left.
    """
    changes = _ranges(frame.dropna(subset="change").groupby("class", sort=False).change)
    if changes.empty:
        raise ValueError("no class has a change of its top-1 to show")
    changes = changes.sort_values("mean", kind="stable")
    places = np.arange(len(changes), dtype=float)
    hidden = len(changes) - 24 if len(changes) > 30 else 0
    if hidden:
        changes = pd.concat([changes.head(12), changes.tail(12)])
        places = np.arange(24) + np.where(np.arange(24) < 12, 0, 1.5)
    ax = _axes(6.4, 1 + 0.24 * (places[-1] + 1))
    means = changes["mean"]
    bars = ax.barh(places, means, 0.75, color=np.where(means < 0, COLORS[3], COLORS[0]))
    lengths = _bars(changes)
    if lengths is None:
        ax.bar_label(bars, fmt="{:+.1f}", fontsize=8, padding=3)
    else:
        ax.errorbar(
            means,
            places,
            xerr=lengths,
            fmt="none",
            ecolor="0.2",
            capsize=2,
            elinewidth=1,
        )
    if hidden:
        _gap(ax, f"… {hidden} classes between …", 12.25)
    ax.axvline(0, color="0.35", linewidth=0.8)
    counts = frame.groupby("class").images.first()
    words = [f"{str(name)[:24]} ({counts[name]:g})" for name in changes.index]
    ax.set_yticks(places, words, fontsize=9)
    ax.set(
        xlabel="change of top-1 (percentage points)",
        ylim=(places[-1] + 0.7, -0.7),
    )
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    return ax


def _gap(ax, words, height):
    """Write words across the axes at a height of the y axis."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    ax.text(
        0.5,
        height,
        words,
        fontsize=9,
        color="0.35",
        bbox=box,
        ha="center",
        va="center",
        transform=ax.get_yaxis_transform(),
    )


# -- drawings: of layers and images


@styled
def weight_histograms(frame):
    """Draw distributions of weights: a panel for each stage, a row for each method and target.

    Counts are on a logarithmic axis. The zeros stand apart in a hatched bar at the right, where
    they do not hide the rest. What the masks will let go is light. Dotted lines show the |w| up to
    which magnitude would have cut as many.

    frame: as prune.histogram returns it, with the columns method and target.
    Returns a Figure.
    """
    stages = frame.stage.unique()
    groups = frame.groupby(["method", "target"], sort=False)
    size = (1.2 + 2.9 * len(stages), 0.7 + 2.1 * len(groups))
    figure, panels = plt.subplots(
        len(groups), len(stages), figsize=size, sharey=True, squeeze=False
    )
    limit = frame.right.max()
    for line, ((method, target), group) in zip(panels, groups, strict=True):
        line[0].set_ylabel(f"{method} {target:.0%}\nweights")
        for ax, stage in zip(line, stages, strict=True):
            part = group[group.stage == stage]
            if part.empty:
                ax.set_axis_off()
                continue
            _histogram(ax, part, limit)
            if ax in panels[0]:
                ax.set_title(STAGES.get(stage, stage), fontsize=12)
    panels[0][0].set_ylim(0.5, 2 * max(frame["count"].max(), frame.zeros.max()))
    figure.supxlabel("value of the weight", fontsize=12)
    handles = {}
    for ax in panels.flat:
        artists, labels = ax.get_legend_handles_labels()
        handles |= zip(labels, artists, strict=True)
    if len(handles) > 1:
        figure.legend(handles.values(), handles, loc="outside right center")
    return figure


def _histogram(ax, bins, limit):
    """Draw the bins of one stage, up to a limit of the weights' size, and the bar of the zeros."""
    edges = [*bins.left, bins.right.iloc[-1]]
    if bins.survivors.sum() < bins["count"].sum():
        ax.stairs(bins["count"], edges, fill=True, color="0.75", label="will go")
    ax.stairs(bins.survivors, edges, fill=True, color=COLORS[0], label="stay")
    threshold = bins.threshold.iloc[0]
    for place in (-threshold, threshold):
        ax.axvline(
            place,
            label="where magnitude\nwould cut as many",
            color="0.1",
            linestyle=":",
            linewidth=1.2,
            zorder=3,
        )
    place = 1.7 * limit  # of the zeros
    ax.bar(
        place,
        bins.zeros.iloc[0],
        0.3 * limit,
        color="0.85",
        edgecolor="0.2",
        hatch="///",
    )
    ax.set(yscale="log", xlim=(-1.1 * limit, 2.1 * limit))
    ax.set_xticks([-limit, 0, limit, place], [f"−{limit:.2g}", "0", f"{limit:.2g}", "zeros"])
    ax.grid(False, axis="x")


@styled
def heat_map(frame, *, value, label):
    """Draw a value by block (down) and role (across), written into each cell.

    Cells without a value are empty.

    frame: columns block, role and value.
    value: name of the column.
    label: words and unit of the colour bar.
    Returns the Axes.
    """
    table = _table(frame, "block", "role", value)
    table = table.round(3) + 0.0  # so that a cell of next to nothing is 0.000, not -1.6e-08
    return _heat(table, (2.2, 0.85), label=label, fmt=".3f")


@styled
def head_map(frame, *, value="score", label="score of the head"):
    """Draw scores of attention heads by block (down) and head (across); a cross marks those cut.

    frame: columns block, head, value and, if there are cuts, kept (bool).
    value: name of the column.
    label: words of the colour bar.
    Returns the Axes.
    """
    table = _table(frame, "block", "head", value)
    ax = _heat(table, (2.6, 0.8), label=label, fmt=".2g")
    if "kept" in frame:
        removed = frame[~frame.kept.astype(bool)]
        x = table.columns.get_indexer(removed["head"]) + 0.86
        y = table.index.get_indexer(removed.block) + 0.25
        for place in zip(x, y, strict=True):
            ax.plot(
                *place,
                marker="X",
                color="black",
                markeredgecolor="white",
                markersize=10,
            )
    return ax


def _table(frame, index, columns, value):
    """Return a frame as a table, whose rows and columns keep their order."""
    means = frame.groupby([index, columns])[value].mean().unstack()
    return means.reindex(index=frame[index].unique(), columns=frame[columns].unique())


def _heat(table, width, *, label, fmt):
    """Draw a table as colours and numbers, and return the Axes.

    width: inches beside the table and of each column.
    label: of the colour bar; fmt: of the numbers.
    """
    beside, column = width
    ax = _axes(beside + column * table.shape[1], 1.1 + 0.42 * len(table))
    sns.heatmap(
        table,
        ax=ax,
        fmt=fmt,
        cbar_kws={"label": label},
        annot=True,
        annot_kws={"fontsize": 9},
        linewidths=0.5,
        cmap="rocket_r",
    )
    ax.tick_params(left=False, bottom=False)
    ax.tick_params(axis="y", rotation=0)
    ax.grid(False)
    return ax


@styled
def image_grid(images, *, labels=None, classes):
    """Draw pictures with their class above: one of each class, or a batch as the model sees it.

    images: a data.Split, shown as stored, or a batch, float [B, 3, H, W], which is stretched to the
    full range for the eye.
    labels: those of the batch.
    classes: names of the classes.
    Returns a Figure.
    """
    if labels is None:
        labels, first = np.unique(images.labels, return_index=True)
        labels, first = labels[:30], first[:30]
        pictures = images.store[images.indices[first]]
    else:
        low, high = (
            images.amin((1, 2, 3), keepdim=True),
            images.amax((1, 2, 3), keepdim=True),
        )
        pictures = ((images - low) / (high - low)).permute(0, 2, 3, 1).cpu().numpy()
    names = [classes[int(label)][:12] for label in labels]
    return _grid(pictures, names, 10, (1.1, 1.35))


@styled
def changed_images(images, frame):
    """Draw the pictures whose prediction changed most, with "true: before → after" above each.

    The furthest come first. Green is newly right, red newly wrong, black neither.

    images: the data.Split that was compared, shown as stored.
    frame: columns image (place in the split) and label, before, after (names of classes), as in
    evaluate.compare's images.
    Returns a Figure.
    Raises ValueError for no rows and for places that the split does not have.
    """
    if frame.empty or not frame.image.between(0, len(images) - 1).all():
        raise ValueError(
            f"need the places of images in a split of {len(images)}, got {frame.image.tolist()}"
        )
    words = frame[["label", "before", "after"]].map(lambda name: str(name)[:18])
    titles = words.label + ":\n" + words.before + "\n→ " + words.after
    pictures = images.store[images.indices[frame.image]]
    figure = _grid(pictures, titles, 6, (1.7, 2.15))
    was_right, is_right = frame.before == frame.label, frame.after == frame.label
    colors = np.select(
        [is_right & ~was_right, was_right & ~is_right],
        [COLORS[2], COLORS[3]],
        "0.1",
    )
    for ax, color in zip(figure.axes, colors, strict=False):
        ax.title.set_color(color)
    return figure


def _grid(pictures, titles, columns, size):
    """Return a Figure of pictures with titles, in rows of `columns`; size: of one, in inches."""
    width, height = size
    rows = -(-len(pictures) // columns)
    size = (width * columns, height * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in panels.flat:
        ax.axis("off")
    for ax, picture, title in zip(panels.flat, pictures, titles, strict=False):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9)
    return figure


# -- figures in files


@styled
def save(drawn, path, *, caption=None):
    """Write a Figure as path + ".svg", ".pdf" and ".png", and its caption as ".txt".

    The same drawing gives the same bytes. The figure is closed.

    drawn: a Figure or Axes of it.
    path: without ending.
    caption: text.
    Returns the Figure, to be displayed.
    """
    figure = drawn.figure
    for ending, date in (
        ("svg", "Date"),
        ("pdf", "CreationDate"),
        ("png", "Software"),
    ):
        # Without the date, or the version of matplotlib, the bytes are the same each time.
        record.write_atomic(
            f"{path}.{ending}",
            functools.partial(
                figure.savefig,
                format=ending,
                metadata={date: None},
                bbox_inches="tight",
            ),
        )
    if caption:
        record.write_atomic(f"{path}.txt", caption + "\n")
    plt.close(figure)
    return figure


def _file_part(value):
    """Return a value as part of the name of a file."""
    return f"{value:g}" if isinstance(value, float) else str(value)


_PER = {"model": ["model"], "target": ["model", "target_kind", "target"]}


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

    Where no notebook has left the table, nothing is drawn. The file of a figure is called
    `<name>-<model>`, or `<name>-<target_kind>-<target>-<model>` as far as the rows have these. The
    caption says where the rows come from: rows of results.csv say it themselves, others have it
    from the results of the same models and seeds.

    A notebook gives what all figures share once and then has a line for each kind of figure:

        draw_each = partial(plots.draw_each, results=results, folder=lab.figures)
        draw_each(tables, "agreement", plots.agreement)
        batches = "Batches of {batch} images."
        draw_each(tables, "speedup", plots.speedup_bars, table="runtimes", note=batches)
        plan = "{method}, {target:g} x {target_kind}."
        draw_each(single, "kept", drawings.kept_widths, per="target", note=plan)
        budgets = {"ladder": reached}
        draw_each(budgets, "ladder", plots.ladder, per="target", controls=dense, names=names)

    tables: {name: frame}, of which the figures draw one.
    name: first part of the files' names, and of the table.
    draw: a function from the rows of one figure to a Figure or Axes, such as one of this module.
    results: rows of results.csv of all models and seeds.
    folder: Path for the files.
    per: "model" or "target" (with its kind, target_kind).
    table: name of the table where it is another one.
    note: last sentence of the caption, with {column} for a value of the first row.
    controls: rows that are drawn before those of the same model, such as the dense model's.
    options: handed on to draw.
    """
    rows = tables.get(table or name)
    if rows is None:
        return
    keys = [column for column in _PER[per] if column in rows]
    for key, group in rows.groupby(keys, sort=False, dropna=False):
        model, *target = key
        words = note.format(**group.iloc[0])
        if controls is not None:
            group = pd.concat([controls[controls.model == model], group])
        source = [group] if "commit" in group else [results, group]
        parts = [_file_part(part) for part in target if pd.notna(part)]
        path = folder / "-".join([name, *parts, model])
        text = f"{caption(*source)} {words}".rstrip()
        display(save(draw(group, **options), path, caption=text))
