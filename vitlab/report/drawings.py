"""Drawings of what is inside a model before and after a cut: weights, widths, spectra, attention.

Frames come in, figures go out, in the style of `plots`. No torch. The first functions draw the
frames of `inside`, in the same order.

Public: attention_maps, changed_images, heads, heat_map, image_grid, widths, layers, spectra,
weight_histograms, weight_violins.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patches import Patch, Rectangle

from vitlab.report import _style, tables

# Weights that stay, by the letter of their size in the cells of inside.layers.
_BLUES = dict(zip("abcdefghi", plt.get_cmap("Blues")(np.linspace(0.45, 1, 9)), strict=True))
_REMOVED = {"facecolor": "#fbe3d0", "edgecolor": _style.COLORS[3], "linewidth": 0}
# The sign before a part that stands beside another: W = U × V + S.
_SIGNS = {"V": "×", "S": "+"}
_SMALL = {"fontsize": 8, "color": "0.35"}
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
    titles = tables.in_words(frame, {"method": "{}", "target": "{:.0%}"}, " ")
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
        widths.append(max((columns + gap).sum(), 1.05 * high) + 1.5 * gap)
    # One line takes about six square matrices, or the widest picture.
    line = max(6.5 * high, *widths)
    x = y = 0.0
    tall = 0
    for rows, width in zip(pictures, widths, strict=True):
        if x and x + width > line:
            x = 0.0
            y = y + tall + 5.5 * gap
            tall = 0
        _picture(ax, rows, x, y, gap)
        x += width
        tall = max(tall, rows.row.max() + 1)
    width = min(line, sum(widths))
    height = y + tall
    ax.set(xlim=(-gap / 2, width), ylim=(height + 3 * gap, -3.4 * gap), aspect="equal")
    cell = 10 / line  # inches
    ax.figure.set_size_inches(max(5.5, cell * width), cell * (height + 6.4 * gap) + 0.4)


def _picture(ax, rows, x, y, gap):
    """Draw the matrices of one layer in a row, with signs between and their sizes below."""
    ax.text(x, y - 1.6 * gap, rows.title.iloc[0], fontsize=10, va="bottom")
    ax.text(x, y - 0.5 * gap, rows.layer.iloc[0], va="bottom", **_SMALL)
    left = x
    for part, cells in rows.groupby("part", sort=False).cells:
        letters = np.array([*map(list, cells)])
        m, n = letters.shape
        if x > left:
            sign = _SIGNS.get(part, "")
            ax.text(x - gap / 2, y + m / 2, sign, ha="center", va="center", fontsize=10)
        _matrix(ax, letters, x, y)
        ax.text(x, y + m + 0.3 * gap, f"{part}\n{m} × {n}", va="top", **_SMALL)
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


@_style.styled
def widths(frame):
    """Draw how much of each place is left, as a share of the dense model.

    There is a panel for each kind and a bar for each block (or stage, convolution, layer), with
    "kept of whole" beside it.

    frame: columns where, kind, kept and whole, as inside.widths returns it.
    Returns a Figure.
    """
    # Kinds of which nothing went are left out, except heads and neurons.
    sums = frame.groupby("kind", sort=False)[["kept", "whole"]].sum()
    kinds = sums.index[(sums.kept < sums.whole) | sums.index.isin(["heads", "neurons"])]
    frame = frame[frame.kind.isin(kinds)]
    # All panels have the same places, so that their bars stand side by side.
    numbers, places = pd.factorize(frame["where"])
    frame = frame.assign(place=numbers)
    kinds = frame.groupby("kind", sort=False)
    figure, panels = _style.panels_beside(kinds, 1.6, 1.55, 1 + 0.3 * len(places))
    for ax, kind, widths in panels:
        ax.barh(widths.place, 1, 0.75, color="0.92")
        ax.barh(widths.place, widths.kept / widths.whole, 0.75, color=_style.COLORS[0])
        for row in widths.itertuples():
            ax.text(1.04, row.place, f"{row.kept} of {row.whole}", fontsize=8, va="center")
        ax.set(xlim=(0, 1), xticks=[0, 0.5, 1])
        ax.set_title(kind, fontsize=11)
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.tick_params(axis="x", labelsize=9)
        ax.grid(False, axis="y")
    # The names of places stand at the left panel alone, the first one on top.
    left = figure.axes[0]
    left.set_yticks(range(len(places)), places, fontsize=9)
    left.set_ylim(len(places) - 0.4, -0.6)
    figure.supxlabel("share of the dense model's that stays")
    return figure


@_style.styled
def weight_histograms(frame):
    """Draw distributions of weights: a panel for each stage, a row for each method and target.

    Counts are on a logarithmic axis. Dotted lines show the |w| up to which magnitude would have cut
    as many.

    frame: as inside.weights returns it, with the columns method and target. All groups have the
        same stages.
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
        for ax, (_, bins) in zip(line, group.groupby("stage", sort=False), strict=True):
            _histogram(ax, bins, limit)
    for ax, stage in zip(panels[0], stages, strict=True):
        ax.set_title(tables.STAGES.get(stage, stage))
    # The axis starts below 1, which would have no height otherwise.
    panels[0, 0].set_ylim(0.5, 2 * max(frame["count"].max(), frame.zeros.max()))
    figure.supxlabel("value of the weight")
    # The first stage has all that is drawn; both lines have one name.
    artists, labels = panels[0, 0].get_legend_handles_labels()
    handles = dict(zip(labels, artists, strict=True))
    figure.legend(handles.values(), handles, loc="outside right center")
    return figure


def _histogram(ax, bins, limit):
    """Draw the bins of one stage, up to a limit of the weights' size, and the bar of the zeros."""
    edges = [*bins.left, bins.right.iloc[-1]]
    # What the masks will let go is light, behind what they keep.
    if bins.survivors.sum() < bins["count"].sum():
        ax.stairs(bins["count"], edges, fill=True, color="0.75", label="will go")
    ax.stairs(bins.survivors, edges, fill=True, color=_style.COLORS[0], label="stay")
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

    frame: as inside.weights(by="layer") returns it, of one cut.
    Returns a Figure.
    """
    # Layers outside of blocks have no place here.
    frame = frame.dropna(subset="block")
    places, blocks = pd.factorize(frame.block)
    frame = frame.assign(place=places)
    roles = frame.role.unique()
    first, last = frame.stage.unique()[[0, -1]]
    size = (1.6 + 0.9 * max(5, len(blocks)), 0.9 + 1.15 * len(roles))
    figure, panels = plt.subplots(len(roles), 1, figsize=size, sharex=True, squeeze=False)
    for ax, (role, bins) in zip(panels.flat, frame.groupby("role", sort=False), strict=True):
        after = bins[bins.stage == last]
        _violins(ax, bins[bins.stage == first], "count", side="low", color="0.7")
        _violins(ax, after, "survivors", side="high", color=_style.COLORS[0])
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
        Patch(color=_style.COLORS[0], label=tables.STAGES.get(last, last)),
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
    words = {"fontsize": 8, "color": "0.25", "ha": "center", "va": "bottom"}
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
    ax.set_ylim(-1.5 * reach, 1.1 * reach)  # with room for words below
    ax.grid(False, axis="x")


@_style.styled
def spectra(frame):
    """Draw singular values (above, of the largest) and the energy up to each rank (below).

    Energy is the share of the squares. There is a panel for each role and a line for each block.
    Dashed is the rank at which two thin layers have as many MACs as one.

    frame: as inside.spectra returns it. A column faster puts a small mark on each line: the rank up
        to which factoring was measured to be faster, as bench.break_even returns it.
    Returns a Figure.
    """
    largest = frame.groupby("layer").sigma.transform("max")
    full = frame[["m", "n"]].min(axis=1)
    # Ranks are shares of the full one, so that stages of several widths compare.
    frame = frame.assign(full=full, relative=frame.sigma / largest, share=frame["rank"] / full)
    groups = frame.groupby("role", sort=False)
    colors = _style.shades(frame.block.dropna().unique())
    size = (1.8 + 1.9 * len(groups), 4.4)
    figure, panels = plt.subplots(
        2, len(groups), figsize=size, sharex=True, sharey="row", squeeze=False
    )
    for (above, below), (role, lines) in zip(panels.T, groups, strict=True):
        _spectra_of_role(above, below, lines, colors)
        above.set_title(role)
        below.xaxis.set_major_formatter("{x:.0%}")
        below.set(xlim=(0, 1.02), xticks=[0, 0.5, 1])
    # Four decades are enough: what is smaller is rounding.
    floor = max(frame.relative[frame.relative > 0].min(), 1e-4)
    above, below = panels[:, 0]
    above.set(yscale="log", ylim=(floor, 1.5), ylabel="singular value,\nof the largest")
    below.set(ylim=(0, 1.03), ylabel="energy up to the rank")
    below.yaxis.set_major_formatter("{x:.0%}")
    figure.supxlabel("rank, as a share of the full rank")
    looks = {block: {"color": color} for block, color in colors.items()}
    looks["break-even in MACs"] = {"color": "0.1", "linestyle": "--"}
    if "faster" in frame:
        looks["faster up to here"] = {"color": "0.35", "marker": "o", "linestyle": ""}
    handles = []
    for label, look in looks.items():
        handles.append(plt.Line2D([], [], label=label, **look))
    figure.legend(handles=handles, loc="outside right center")
    return figure


def _spectra_of_role(above, below, frame, colors):
    """Draw the lines of one role's layers, with marks where they are faster, and the break-even."""
    for _, line in frame.groupby("layer", sort=False):
        first = line.iloc[0]
        look = {"color": colors.get(first.block, "0.3"), "linewidth": 1.3}
        above.plot(line.share, line.relative, **look)
        below.plot(line.share, line.energy, **look)
        if "faster" in line and first.faster > 0:
            share = first.faster / first.full
            # The rank lies between two that the frame has.
            energy = np.interp(share, line.share, line.energy)
            below.plot(share, energy, marker="o", markersize=5, **look)
    # Layers of one shape have one line; their shares differ by rounding.
    for share in (frame.break_even / frame.full).round(6).unique():
        for ax in (above, below):
            ax.axvline(share, color="0.1", linestyle="--", linewidth=1)


@_style.styled
def attention_maps(frame, images=None):
    """Draw where two models look, on several images.

    There is a column for each image, and for each block a row before and one after the cut.

    frame: as inside.attention_maps returns it; a column label, if there is one, is written above
        each image.
    images: the data.Split that the places are of, whose pictures then stand on top.
    Returns a Figure.
    """
    shown = frame.image.unique()
    blocks = frame.groupby("block", sort=False)
    above = int(images is not None)  # rows of pictures
    count = above + 2 * len(blocks)
    size = (1.9 + 1.25 * len(shown), 0.6 + 1.25 * count)
    figure, panels = plt.subplots(count, len(shown), figsize=size, squeeze=False)
    for ax in panels.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        sns.despine(ax=ax, left=True, bottom=True)
    if above:
        panels[0, 0].set_ylabel("image", fontsize=9)
        for ax, image in zip(panels[0], shown, strict=True):
            ax.imshow(images.store[images.indices[image]])
    for i, (block, maps) in enumerate(blocks):
        _attention(figure, panels[above + 2 * i :][:2], block, maps)
    if "label" in frame:
        labels = frame.groupby("image", sort=False).label.first()
        for ax, label in zip(panels[0], labels, strict=True):
            ax.set_title(str(label)[:14], fontsize=9)
    return figure


def _attention(figure, panels, block, maps):
    """Draw the maps of one block: a row before and one after the cut, with one colour bar."""
    # Both rows have the same scale. The largest value would darken all others.
    top = maps[["before", "after"]].quantile(0.98).max()
    words = {"before": "dense", "after": "cut"}
    for axes, when in zip(panels, words, strict=True):
        axes[0].set_ylabel(f"{block}\n{words[when]}", fontsize=9)
        for ax, (_, of_image) in zip(axes, maps.groupby("image", sort=False), strict=True):
            table = of_image.pivot(index="row", columns="column", values=when)
            picture = ax.imshow(table, cmap="rocket", vmin=0, vmax=top)
    bar = figure.colorbar(picture, ax=list(panels.flat), shrink=0.9, extend="max")
    bar.ax.tick_params(labelsize=9)
    bar.set_label("attention received,\ntimes the equal share", fontsize=9)


@_style.styled
def heads(frame, *, value="score", label="score of the head"):
    """Draw scores of attention heads by block (down) and head (across); a cross marks those cut.

    frame: columns block, head, value and, if there are cuts, kept (bool).
    value: name of the column.
    label: words of the colour bar.
    Returns the Axes.
    """
    table = _table(frame, "head", value)
    ax = _heat(table, 2.6 + 0.8 * table.shape[1], label=label, fmt=".2g")
    if "kept" in frame:
        removed = frame[~frame.kept.astype(bool)]
        # The cross lies in the upper right corner of its cell, beside the number.
        x = table.columns.get_indexer(removed["head"]) + 0.86
        y = table.index.get_indexer(removed.block) + 0.25
        look = {"color": "black", "markeredgecolor": "white", "markersize": 10}
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
    # The sum makes 0.000 of next to nothing below zero, such as -1.6e-08.
    table = _table(frame, "role", value).round(3) + 0.0
    return _heat(table, 2.2 + 0.85 * table.shape[1], label=label, fmt=".3f")


def _table(frame, columns, value):
    """Return the mean of a value by block and another column, which both keep their order."""
    means = frame.groupby(["block", columns], sort=False)[value].mean()
    return means.unstack(sort=False)


def _heat(table, width, *, label, fmt):
    """Draw a table as colours and numbers, and return the Axes.

    width: inches.
    label: of the colour bar; fmt: of the numbers.
    """
    ax = _style.new_axes(width, 1.1 + 0.42 * len(table))
    # Cells without a value stay empty.
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
        [_style.COLORS[2], _style.COLORS[3]],
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
