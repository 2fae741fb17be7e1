"""Drawings of what is inside a model before and after a cut: weights, widths, spectra, attention.

Frames come in, figures go out, in the style of `plots`. No torch. The first functions draw the
frames of `inside`, in the same order. `pool` draws how the pool works, from nothing.

Public: attention_maps, changed_images, cut_kinds, heads, heat_map, image_grid, widths, layers,
pool, spectra, weight_histograms, weight_violins.
"""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Patch, Rectangle

from vitlab.report import _style, tables

# Weights that stay, by the letter of their size in the cells of inside.layers.
_BLUES = dict(zip("abcdefghi", plt.get_cmap("Blues")(np.linspace(0.45, 1, 9)), strict=True))
_REMOVED = {"facecolor": "#fbe3d0", "edgecolor": _style.COLORS["units"], "linewidth": 0}
# The sign before a part that stands beside another: W = U × V + S.
_SIGNS = {"V": "×", "S": "+"}
_SMALL = {"color": "0.35"}
_BLUE = _style.COLORS["pool"]
_INK = "0.35"  # of what has no colour of a method
# The |w| up to which magnitude alone would have cut as many weights.
_THRESHOLD = {"color": "0.1", "linestyle": ":"}


# -- frames of `inside`


@_style.styled
def layers(frame):
    """Draw what each method leaves of a layer, weight by weight.

    There is a picture for each method, target and layer.

    frame: columns method, layer, part, row and cells, as inside.layers returns them, and target (a
        share) if there is one.
    Returns a Figure.
    Raises ValueError for a frame without rows.
    """
    if frame.empty:
        raise ValueError("no layer to draw")
    words = frame.method.map(tables.method_words).str.replace("macs", "MACs")
    words = frame.assign(method=words)
    titles = tables.in_words(words, {"method": "{}", "target": "{:.0%}"}, ", ")
    keys = [column for column in ("method", "target", "layer") if column in frame]
    groups = frame.assign(title=titles).groupby(keys, sort=False, dropna=False)
    figure, ax = plt.subplots()
    # Sizes are of what is shown: inside.layers leaves out what is beyond its first rows.
    _arrange(ax, [rows for _, rows in groups], high=frame.row.max() + 1)
    ax.set_axis_off()
    handles = [
        Patch(color=_BLUES["f"], label="kept, darker: larger"),
        Patch(facecolor="white", edgecolor="0.35", label="zero"),
    ]
    if frame.cells.str.contains("x").any():
        handles.append(Patch(**_REMOVED, hatch="xxx", label="removed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _arrange(ax, pictures, high):
    """Draw pictures beside each other in lines, and set the size of the figure.

    pictures: the rows of each.
    high: rows of the tallest matrix.
    """
    # Lengths are in cells, of which each is 1 wide and high. gap lies between two matrices.
    gap = 0.1 * high
    widths = []
    for rows in pictures:
        columns = rows.groupby("part", sort=False).cells.first().str.len()
        # A narrow picture takes as much room as its title.
        lines = rows.title.iloc[0], tables.layer_words(rows.layer.iloc[0])
        title = 0.063 * high * max(map(len, lines))
        widths.append(max((columns + gap).sum(), title, 1.05 * high) + gap)
    # One line takes about eight square matrices, or the widest picture.
    line = max(8 * high, *widths)
    x = y = 0.0
    tall = 0
    for rows, width in zip(pictures, widths, strict=True):
        if x and x + width > line:
            x = 0.0
            y = y + tall + 4.9 * gap
            tall = 0
        _picture(ax, rows, x, y, gap)
        x += width
        tall = max(tall, rows.row.max() + 1)
    width = min(line, sum(widths))
    height = y + tall
    ax.set(xlim=(-gap / 2, width), ylim=(height + 1.8 * gap, -3.2 * gap), aspect="equal")
    cell = _style.WIDE[0] / line  # inches
    ax.figure.set_size_inches(max(5.5, cell * width), cell * (height + 5 * gap) + 0.4)


def _picture(ax, rows, x, y, gap):
    """Draw the matrices of one layer in a row, with signs between and their sizes below."""
    ax.text(x, y - 1.6 * gap, rows.title.iloc[0], va="bottom")
    layer = tables.layer_words(rows.layer.iloc[0])
    ax.text(x, y - 0.3 * gap, layer, va="bottom", **_SMALL)
    left = x
    for part, cells in rows.groupby("part", sort=False).cells:
        letters = np.array([*map(list, cells)])
        m, n = letters.shape
        if x > left:
            sign = _SIGNS.get(part, "")
            ax.text(x - gap / 2, y + m / 2, sign, ha="center", va="center")
        _matrix(ax, letters, x, y)
        words = f"{part}, {m} × {n}"
        ax.text(x, y + m + 0.2 * gap, words, va="top", **_SMALL)
        x += n + gap


def _matrix(ax, letters, x, y):
    """Draw the cells of a matrix with their upper left corner at (x, y)."""
    m, n = letters.shape
    # A weight that stays is blue, the darker the larger. Zero is white.
    colors = np.ones((m, n, 4))
    for letter, color in _BLUES.items():
        colors[letters == letter] = color
    # Without "nearest" the renderer would blend neighbouring cells.
    ax.imshow(colors, extent=(x, x + n, y + m, y), interpolation="nearest", zorder=1)
    # First whole rows that are removed, side by side in y (axis 1), then whole columns, in x.
    for axis in (1, 0):
        removed = (letters == "x").all(axis=axis)
        for run in np.ma.clump_masked(np.ma.masked_array(removed, removed)):
            corner = [x, y]
            size = [n, m]
            corner[axis] += run.start
            size[axis] = run.stop - run.start
            # In a thin strip, crosses would look like a thick line.
            hatch = "xxx" if size[axis] > 0.04 * max(m, n) else None
            ax.add_patch(Rectangle(corner, *size, zorder=2, hatch=hatch, **_REMOVED))
    frame = {"zorder": 3, "fill": False, "edgecolor": "0.35", "linewidth": 0.8}
    ax.add_patch(Rectangle((x, y), n, m, **frame))


def cut_kinds(frame):
    """Return the lines of a frame whose kind loses something somewhere, and heads and neurons.

    frame: see `widths`.
    """
    sums = frame.groupby("kind", sort=False)[["kept", "whole"]].sum()
    kinds = sums.index[(sums.kept < sums.whole) | sums.index.isin(["heads", "neurons"])]
    return frame[frame.kind.isin(kinds)]


@_style.styled
def widths(frame):
    """Draw how much of each place is left, in percent of the dense model's: the darker, the more.

    There is a line for each block (or stage, convolution, layer) and a column for each kind. Kinds
    of which nothing went are left out, except heads and neurons.

    frame: columns where, kind, kept and whole, as inside.widths returns it.
    Returns the Axes.
    """
    frame = cut_kinds(frame)
    frame = frame.assign(left=100 * frame.kept / frame.whole)
    names = frame["where"].map(tables.layer_words)
    kinds = frame["kind"].str.replace("merge", "merging")
    table = _table(frame.assign(block=frame["where"], kind=kinds), "kind", "left")
    width = 1.3 + 0.07 * names.str.len().max() + 0.5 * table.shape[1]
    label = "share that stays (%)"
    ax = _heat(table, width, label=label, digits=0, least=0, most=100)
    ax.set_xticks(ax.get_xticks(), table.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set(xlabel="", ylabel="")
    return ax


@_style.styled
def weight_histograms(frame):
    """Draw distributions of weights before and after a cut: a panel for each stage.

    Counts are on a logarithmic axis. Dotted lines show the |w| up to which magnitude would have cut
    as many. Of several methods and targets the first method's largest target is drawn.

    frame: as inside.weights returns it, with the columns method and target.
    Returns a Figure.
    """
    frame = frame[frame.method == frame.method.iloc[0]]
    frame = frame[frame.target == frame.target.max()]
    stages = frame.groupby("stage", sort=False)
    figure, panels = _style.panels_beside(stages, *_style.WIDE)
    limit = frame.right.max()
    name = tables.method_words(frame.method.iloc[0])
    for ax, stage, bins in panels:
        _histogram(ax, bins, limit, _style.color_of(name) or _INK)
        ax.set_title(tables.STAGES.get(stage, stage))
    # The axis starts below 1, which would have no height otherwise.
    first = figure.axes[0]
    first.set_ylim(0.5, 2 * max(frame["count"].max(), frame.zeros.max()))
    first.set_ylabel("weights (log axis)")
    first.yaxis.set_major_formatter("{x:,.0f}")  # with exponents, digits would be too small
    figure.supxlabel(f"value of the weight; {frame.target.iloc[0]:.0%} of the {name} cut")
    # The first stage has all that is drawn; both lines have one name.
    artists, labels = first.get_legend_handles_labels()
    handles = dict(zip(labels, artists, strict=True))
    figure.legend(handles.values(), handles, loc="outside right center")
    return figure


def _histogram(ax, bins, limit, color):
    """Draw the bins of one stage, up to a limit of the weights' size, and the bar of the zeros.

    color: of the weights that stay.
    """
    edges = [*bins.left, bins.right.iloc[-1]]
    # What the masks will let go is light, behind what they keep.
    if bins.survivors.sum() < bins["count"].sum():
        ax.stairs(bins["count"], edges, fill=True, color="0.75", label="will go")
    ax.stairs(bins.survivors, edges, fill=True, color=color, label="stay")
    threshold = bins.threshold.iloc[0]
    label = "where magnitude\nwould cut as many"
    for place in (-threshold, threshold):
        ax.axvline(place, label=label, linewidth=1.2, zorder=3, **_THRESHOLD)
    # The zeros stand apart at the right, where they do not hide the rest.
    place = 1.7 * limit
    zeros = bins.zeros.iloc[0]
    ax.bar(place, zeros, 0.3 * limit, color="0.85", edgecolor="0.2", hatch="///")
    ax.set(yscale="log", xlim=(-1.1 * limit, 2.1 * limit))
    ax.set_xticks([-limit, 0, limit, place], [f"−{limit:.2g}", "0", f"{limit:.2g}", "zeros"])
    ax.grid(False, axis="x")


@_style.styled
def weight_violins(frame):
    """Draw distributions of weights by role (a panel each) and block.

    At the left of each place stand the weights of the first stage, in grey. At its right stand the
    survivors of the last one. All are equally wide. Dotted lines show where magnitude would have
    cut as many.

    frame: as inside.weights(by="layer") returns it, of one cut, with the column method.
    Returns a Figure.
    """
    # Layers outside of blocks have no place here.
    frame = frame.dropna(subset="block")
    places, blocks = pd.factorize(frame.block)
    frame = frame.assign(place=places)
    roles = frame.role.unique()
    first, last = frame.stage.unique()[[0, -1]]
    color = _style.color_of(tables.method_words(frame.method.iloc[0])) or _INK
    size = (1.6 + 0.9 * max(5, len(blocks)), 0.9 + 0.95 * len(roles))
    figure, panels = plt.subplots(len(roles), 1, figsize=size, sharex=True, squeeze=False)
    for ax, (role, bins) in zip(panels.flat, frame.groupby("role", sort=False), strict=True):
        after = bins[bins.stage == last]
        _violins(ax, bins[bins.stage == first], "count", side="low", color="0.7")
        _violins(ax, after, "survivors", side="high", color=color)
        _zeros(ax, after)
        _limits(ax, bins)
        ax.set_ylabel(role)
    # "blocks.3" is 3 here, "layers.0.blocks.3" of a Swin 0.3.
    words = blocks.str.replace("layers.", "").str.replace("blocks.", "")
    ax.set_xticks(range(len(blocks)), words)
    ax.set_xlabel("block; the share of zeros stands below")
    figure.supylabel("value of the weight")
    handles = [
        Patch(color="0.7", label=tables.STAGES.get(first, first)),
        Patch(color=color, label=tables.STAGES.get(last, last)),
        plt.Line2D([], [], label="where magnitude would cut as many", **_THRESHOLD),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _violins(ax, bins, column, *, side, color):
    """Draw half a violin from the bins of each block.

    column: name of the counts.
    """
    for place, rows in bins.groupby("place"):
        # A violin ends where the bins do not hold weights any more. Of fewer than three filled bins
        # there is no shape.
        filled = np.flatnonzero(rows[column])
        if len(filled) < 3:
            continue
        rows = rows.iloc[filled[0] : filled[-1] + 1]
        middle = (rows.left + rows.right) / 2
        shape = {
            "coords": middle,
            "vals": rows[column],
            "min": middle.min(),
            "max": middle.max(),
            "mean": 0,  # matplotlib asks for both, and draws neither
            "median": 0,
        }
        violins = ax.violin([shape], [place], widths=0.85, side=side, showextrema=False)
        violins["bodies"][0].set(facecolor=color, edgecolor="0.25", linewidth=0.5, alpha=1)


def _zeros(ax, bins):
    """Write the share of zeros of each block at the bottom of the axes."""
    words = {"color": "0.25", "ha": "center", "va": "bottom"}
    for place, rows in bins.groupby("place"):
        zeros = rows.zeros.iloc[0]  # the same in each bin
        share = zeros / (zeros + rows["count"].sum())
        ax.text(place, 0.01, f"{share:.0%}", transform=ax.get_xaxis_transform(), **words)


def _limits(ax, bins):
    """Set the axis of the weights, and draw where magnitude would have cut as many."""
    threshold = bins.threshold.iloc[0]
    for height in (threshold, -threshold):
        ax.axhline(height, linewidth=1, **_THRESHOLD)
    filled = bins[bins["count"] > 0]
    reach = filled[["left", "right"]].abs().max(axis=None)
    ax.set_ylim(-1.9 * reach, 1.1 * reach)  # with room for words below
    ax.grid(False, axis="x")


@_style.styled
def spectra(frame):
    """Draw singular values, as shares of the largest: a panel for each role.

    The first and the last layer of a role have a line, and a grey band goes from the lowest to the
    highest of all. Dashed is the rank at which two thin layers have as many MACs as one.

    frame: as inside.spectra returns it. A column faster puts a small mark on each line: the rank up
        to which factoring was measured to be faster, as bench.break_even returns it.
    Returns a Figure.
    """
    largest = frame.groupby("layer").sigma.transform("max")
    full = frame[["m", "n"]].min(axis=1)
    # Ranks are shares of the full one, so that stages of several widths compare.
    frame = frame.assign(full=full, relative=frame.sigma / largest, share=frame["rank"] / full)
    # Roles of one layer come first: the names of lines stand at the right of the last panel.
    several = frame.groupby("role").layer.transform("nunique") > 1
    frame = frame.loc[several.sort_values(kind="stable").index]
    figure, panels = _style.panels_beside(frame.groupby("role", sort=False), *_style.WIDE)
    # Four decades are enough: what is smaller is rounding.
    floor = max(frame.relative[frame.relative > 0].min(), 1e-4)
    for ax, role, lines in panels:
        ends = _spectra_of_role(ax, lines, floor)
        ax.set(title=role, xlim=(0, 1.02), xticks=[0, 0.5, 1])
        ax.set_xticklabels(["0", "50%", "100%"])
    first = figure.axes[0]
    first.set(yscale="log", ylim=(floor, 1.5), ylabel="singular value,\nof the largest (log axis)")
    first.yaxis.set_major_formatter("{x:g}")
    figure.supxlabel("rank, as a share of the full rank")
    handles = [
        Patch(**_BAND, label="from the lowest to the highest block"),
        plt.Line2D([], [], color="0.1", linestyle="--", label="break-even in MACs"),
    ]
    if "faster" in frame:
        look = {"color": "0.35", "marker": "o", "linestyle": ""}
        handles.append(plt.Line2D([], [], label="faster up to here", **look))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    if several.any():
        _style.label_lines(figure.axes[-1], ends)
    return figure


_BAND = {"facecolor": "0.9", "edgecolor": _style.CONTROL, "linewidth": 0.8}


def _spectra_of_role(ax, frame, floor):
    """Draw a role's first and last layer, the band of all, where they are faster, and the break-even.

    floor: the lowest height of the axes.
    Returns {name: (height of its end, colour)} of both lines.
    """
    layers = [line for _, line in frame.groupby("layer", sort=False)]
    shares = np.linspace(0, 1, 200)
    logs = [np.interp(shares, line.share, np.log(line.relative.clip(floor / 2))) for line in layers]
    if len(layers) > 1:
        ax.fill_between(shares, np.exp(np.min(logs, axis=0)), np.exp(np.max(logs, axis=0)), **_BAND)
    ends = {"first block": (layers[0], "0.1"), "last block": (layers[-1], "0.45")}
    drawn = ends.values() if len(layers) > 1 else [(layers[0], "0.35")]
    for line, color in drawn:
        look = {"color": color, "linewidth": 2}
        ax.plot(line.share, line.relative, **look)
        if "faster" in line and line.faster.iloc[0] > 0:
            share = line.faster.iloc[0] / line.full.iloc[0]
            # The rank lies between two that the frame has.
            height = np.exp(np.interp(share, line.share, np.log(line.relative.clip(floor / 2))))
            ax.plot(share, height, "o", markersize=6, **look)
    # Layers of one shape have one line; their shares differ by rounding.
    for share in (frame.break_even / frame.full).round(6).unique():
        ax.axvline(share, color="0.1", linestyle="--", linewidth=1)
    heights = {name: max(line.relative.iloc[-1], floor) for name, (line, _) in ends.items()}
    return {name: (heights[name], color) for name, (_, color) in ends.items()}


@_style.styled
def attention_maps(frame, images, *, most=3):
    """Draw where two models look, over the photographs: bright is what receives attention.

    There is a line for each image: the photograph, then the last block before and after the cut.

    frame: as inside.attention_maps returns it; a column label, if there is one, is written beside
        each image.
    images: the data.Split that the places are of.
    most: images to draw; the first ones.
    Returns a Figure.
    """
    import seaborn as sns

    frame = frame[frame.block == frame.block.iloc[-1]]
    shown = frame.image.unique()[:most]
    size = (6.4, 0.5 + 1.95 * len(shown))
    figure, panels = plt.subplots(len(shown), 3, figsize=size, squeeze=False)
    for line, image in zip(panels, shown, strict=True):
        maps = frame[frame.image == image]
        picture = images.store[images.indices[image]]
        # Both models have one scale; the largest value would darken all others.
        top = maps[["before", "after"]].quantile(0.98).max()
        for ax, when in zip(line, [None, "before", "after"], strict=True):
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
            if when is None:
                ax.imshow(picture)
                continue
            table = maps.pivot(index="row", columns="column", values=when)
            high, wide = picture.shape[:2]
            ax.imshow(picture, alpha=0.35)
            extent = (-0.5, wide - 0.5, high - 0.5, -0.5)
            look = {
                "cmap": sns.color_palette("rocket", as_cmap=True),
                "vmin": 0,
                "vmax": top,
                "alpha": 0.65,
            }
            drawn = ax.imshow(table, extent=extent, **look)
        if "label" in maps:
            line[0].set_ylabel(str(maps.label.iloc[0])[:14])
    for ax, title in zip(panels[0], ["image", "dense", "cut"], strict=True):
        ax.set_title(title)
    bar = figure.colorbar(drawn, ax=list(panels.flat), shrink=0.8, extend="max")
    bar.set_ticks([0, top], labels=["little", "much"])
    bar.set_label(f"attention received in {tables.layer_words(frame.block.iloc[0])}")
    return figure


@_style.styled
def heads(frame, *, value="score", label="score of the head"):
    """Draw scores of attention heads by block (down) and head (across); a cross marks those cut.

    frame: columns block, head, value and, if there are cuts, kept (bool).
    value: name of the column.
    label: words of the colour bar.
    Returns the Axes.
    """
    table = 1000 * _table(frame, "head", value)
    ax = _heat(table, 3 + 0.5 * table.shape[1], label=f"{label}, × 1,000", digits=1)
    if "kept" in frame:
        removed = frame[~frame.kept.astype(bool)]
        # The cross lies in the upper right corner of its cell, beside the number.
        x = table.columns.get_indexer(removed["head"]) + 0.88
        y = table.index.get_indexer(removed.block) + 0.18
        look = {"color": "black", "markeredgecolor": "white", "markersize": 9}
        for place in zip(x, y, strict=True):
            ax.plot(*place, marker="X", **look)
    return ax


@_style.styled
def heat_map(frame, *, value, label):
    """Draw a value by block (down) and role (across), written into each cell.

    frame: columns block, role and value.
    value: name of the column.
    label: words and unit of the colour bar.
    Returns the Axes.
    """
    table = _table(frame, "role", value)
    return _heat(table, 2.2 + 0.85 * table.shape[1], label=label, digits=3)


def _table(frame, columns, value):
    """Return the mean of a value by block and another column, which both keep their order."""
    means = frame.groupby(["block", columns], sort=False)[value].mean()
    return means.unstack(sort=False)


def _heat(table, width, *, label, digits, least=None, most=None):
    """Draw a table as colours and numbers, and return the Axes.

    width: inches.
    label: of the colour bar; digits: of the numbers; least, most: ends of the colours.
    """
    import seaborn as sns  # not above: where scipy is there, it takes two seconds

    ax = _style.new_axes(width, 1.1 + min(0.42, 4 / len(table)) * len(table))
    # Cells without a value stay empty.
    sns.heatmap(
        table,
        ax=ax,
        fmt="",
        cbar_kws={"label": label},
        annot=table.map(partial(tables.number, digits=digits)),
        linewidths=0.5,
        cmap="rocket_r",
        vmin=least,
        vmax=most,
    )
    ax.tick_params(left=False, bottom=False)
    ax.set_yticks(ax.get_yticks(), map(tables.layer_words, table.index), rotation=0)
    ax.grid(False)
    return ax


# -- images


@_style.styled
def image_grid(images, *, labels=None, classes):
    """Draw pictures with their class above: one of each class, or a batch as the model sees it.

    images: a data.Split, shown as stored, or a batch, float [B, 3, H, W].
    labels: those of the batch.
    classes: names of the classes.
    Returns a Figure.
    """
    if labels is None:
        # Three rows of pictures; a study may have a thousand classes.
        labels, first = np.unique(images.labels, return_index=True)
        labels = labels[:30]
        pictures = images.store[images.indices[first[:30]]]
    else:
        # The model sees normalised values, which are stretched to the full range for the eye.
        low = images.amin((1, 2, 3), keepdim=True)
        high = images.amax((1, 2, 3), keepdim=True)
        stretched = (images - low) / (high - low)
        pictures = stretched.permute(0, 2, 3, 1).cpu().numpy()
    names = [classes[int(label)][:12] for label in labels]
    return _grid(pictures, names, 10, (1.1, 1.35))


@_style.styled
def changed_images(images, frame):
    """Draw the pictures whose prediction changed most, with "true: before → after" above each.

    The furthest come first. Green is newly right, red newly wrong, black neither.

    images: the data.Split that was compared, shown as stored.
    frame: columns image (place in the split) and label, before, after (names of classes), as in
        evaluate.compare's images.
    Returns a Figure.
    Raises ValueError for no images and for places that the split does not have.
    """
    tables.check_places(frame.image.tolist(), images)
    # A title has room for 18 letters in one line.
    words = frame[["label", "before", "after"]].astype(str).map(lambda name: name[:18])
    titles = words.label + ":\n" + words.before + "\n→ " + words.after
    pictures = images.store[images.indices[frame.image]]
    figure = _grid(pictures, titles, 6, (1.7, 2.15))
    was_right = frame.before == frame.label
    is_right = frame.after == frame.label
    colors = np.select(
        [is_right & ~was_right, was_right & ~is_right],
        [_style.GOOD, _style.BAD],
        "0.1",
    )
    for ax, color in zip(figure.axes, colors, strict=False):
        ax.title.set_color(color)
    return figure


def _grid(pictures, titles, columns, size):
    """Return a Figure of pictures with titles, in rows of `columns`; size: of one, in inches."""
    width, height = size
    rows = -(-len(pictures) // columns)  # rounded up
    size = (width * columns, height * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in panels.flat:
        ax.axis("off")
    # The last row may have more panels than pictures.
    for ax, picture, title in zip(panels.flat, pictures, titles, strict=False):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9)
    return figure


# -- how the pool works

_UNIT, _RANK = _style.COLORS["units"], _style.COLORS["ranks"]
# Units and ranks of a model, the cheapest first; made up.
_QUEUE = "ruruurruruurrruururururu"
_GONE = 13  # of the queue


@_style.styled
def pool():
    """Draw how the pool works: what may go, in which order it goes, and how what stays is solved for anew.

    Returns a Figure.
    """
    figure, panels = plt.subplots(1, 3, figsize=(_style.WIDE[0], 4.4), width_ratios=[1, 1.2, 1.1])
    titles = ["1  What may go", "2  One queue of all layers", "3  What stays is reconstructed"]
    drawn = [_what_may_go, _queue, _solved_for]
    for ax, title, draw in zip(panels, titles, drawn, strict=True):
        ax.set_title(title, loc="left", weight="bold", fontsize=_style.TEXT + 2)
        draw(ax)
    return figure


def _sketch(ax):
    """Make axes a sheet of 10 x 10 to draw on."""
    ax.set(xlim=(0, 10), ylim=(0, 10))
    ax.set_axis_off()


def _box(ax, x, y, width, height, color=None):
    """Draw a matrix, or with a colour what goes of one."""
    look = {"facecolor": "0.93", "edgecolor": "0.35"}
    if color:
        look = {"facecolor": "white", "edgecolor": color, "hatch": "xxxx", "linewidth": 1.2}
    ax.add_patch(Rectangle((x, y), width, height, **look))


def _what_may_go(ax):
    _sketch(ax)
    _box(ax, 0.2, 5.6, 3.4, 3.4)
    _box(ax, 0.2, 7.1, 3.4, 0.45, _UNIT)
    ax.text(4.4, 8.9, "a unit", color=_UNIT, weight="bold", va="top", fontsize=_style.TEXT + 1)
    words = "a head, a neuron,\na filter of the stem\nor a channel"
    ax.text(4.4, 8.1, words, va="top", linespacing=1.3)
    _box(ax, 0.2, 0.7, 1.0, 3.4)
    _box(ax, 0.85, 0.7, 0.35, 3.4, _RANK)
    ax.text(1.5, 3.45, "×", va="center", ha="center", fontsize=_style.TEXT + 2)
    _box(ax, 1.8, 3.1, 2.3, 1.0)
    _box(ax, 1.8, 3.1, 2.3, 0.35, _RANK)
    ax.text(4.4, 4.0, "a rank", color=_RANK, weight="bold", va="top", fontsize=_style.TEXT + 1)
    words = "a singular direction\nof a matrix W ≈ U × V"
    ax.text(4.4, 3.2, words, va="top", linespacing=1.3)


def _queue(ax):
    heights = np.geomspace(0.03, 1, len(_QUEUE))
    for place, (kind, height) in enumerate(zip(_QUEUE, heights, strict=True)):
        color = _UNIT if kind == "u" else _RANK
        stays = {"facecolor": color, "edgecolor": "white"}
        goes = {"facecolor": "white", "edgecolor": color, "hatch": "xxxx"}
        ax.bar(place, height, 0.8, **(goes if place < _GONE else stays))
    ax.axvline(_GONE - 0.5, color="0.35", linestyle="--")
    ax.text(_GONE - 1, 0.97, "goes, until the\nbudget is met", ha="right", va="top")
    ax.text(_GONE, 0.97, "stays", va="top")
    ax.set(xticks=[], yticks=[], xlabel="units and ranks, the cheapest first")
    ax.set_ylabel("predicted rise of the loss\nfor each MAC saved")


def _solved_for(ax):
    _sketch(ax)
    ax.text(1.9, 9.1, "dense", ha="center")
    _box(ax, 0.2, 5.2, 3.4, 3.4)
    ax.text(7.6, 9.1, "cut", ha="center")
    _box(ax, 6.4, 5.2, 0.7, 3.4)
    ax.text(7.4, 8.2, "×", va="center", ha="center", fontsize=_style.TEXT + 2)
    _box(ax, 7.7, 7.9, 1.9, 0.7)
    arrow = {"arrowstyle": "<->", "color": _BLUE, "linewidth": 2}
    ax.annotate("", (6.1, 6.9), (3.9, 6.9), arrowprops=arrow)
    ax.text(5.0, 7.2, "same\nanswers", ha="center", color=_BLUE)
    look = {"color": _BLUE, "weight": "bold", "va": "top", "fontsize": _style.TEXT + 1}
    ax.text(0.2, 4.0, "reconstructed", **look)
    words = (
        "Layer after layer is solved for by least\nsquares, to answer as the dense model\n"
        "does. It takes some training images,\nbut no labels and no training."
    )
    ax.text(0.2, 3.2, words, va="top", linespacing=1.3)
