"""Drawings of what is inside a model before and after a cut: weights, widths, spectra, attention.

Frames come in, figures go out, in the style of `plots`. No torch.

Public: attention_maps, changed_images, head_map, heat_map, image_grid, kept_widths, layer_pictures,
spectra, weight_histograms, weight_violins.
"""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import Patch, Rectangle

from vitlab.report import style, tables

_BLUES = plt.get_cmap("Blues")(
    np.linspace(0.45, 1, 9)
)  # of what is kept, by the size of the weight
_REMOVED = {
    "facecolor": "#fbe3d0",
    "edgecolor": style.COLORS[3],
    "linewidth": 0,
}
_SIGNS = {
    "V": "×",
    "S": "+",
}  # before a part that stands beside another


@style.styled
def layer_pictures(frame):
    """Draw what each method leaves of a layer, weight by weight.

    There is a picture for each method, target and layer. Blue is kept, the darker the larger. White
    is zero. Crossed is what is not there any more. Sizes are of what is shown.

    frame: columns method, layer, part, row and cells, as inside.layer returns them, and target (a
    share) if there is one.
    Returns a Figure.
    Raises ValueError for a frame without rows.
    """
    if frame.empty:
        raise ValueError("no layer to draw")
    titles = tables.in_words(frame, {"method": "{}", "target": "{:.0%}"}, " ")
    keys = [column for column in ("method", "target", "layer") if column in frame]
    pictures = []
    for _, rows in frame.assign(title=titles).groupby(keys, sort=False, dropna=False):
        matrices = {part: _letters(cells) for part, cells in rows.groupby("part", sort=False)}
        pictures.append((rows.title.iloc[0], rows.layer.iloc[0], matrices))
    figure, ax = plt.subplots()
    width, height, gap = _arrange(ax, pictures)
    ax.set(
        xlim=(-gap / 2, width),
        ylim=(height + 3 * gap, -3.4 * gap),
        aspect="equal",
    )
    ax.set_axis_off()
    handles = [
        Patch(color=_BLUES[5], label="kept, darker: larger"),
        Patch(facecolor="white", edgecolor="0.35", label="zero"),
    ]
    if frame.cells.str.contains("x").any():
        handles.append(Patch(**_REMOVED, hatch="xxx", label="removed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _arrange(ax, pictures):
    """Draw pictures beside each other in lines, and set the size of the figure.

    pictures: (title, name of the layer, {part: letters}) of each.
    Returns width, height and the gap between matrices, all in cells.
    """
    high = 0
    for _, _, matrices in pictures:
        high = max(high, *map(len, matrices.values()))
    gap = 0.1 * high
    widths = []
    for _, _, matrices in pictures:
        width = sum(letters.shape[1] + gap for letters in matrices.values())
        widths.append(max(width, 1.05 * high) + 1.5 * gap)
    line = max(6.5 * high, *widths)
    x, y, tall = 0.0, 0.0, 0
    for (title, layer, matrices), width in zip(pictures, widths, strict=True):
        if x and x + width > line:
            x, y, tall = 0.0, y + tall + 5.5 * gap, 0
        ax.text(x, y - 1.6 * gap, title, fontsize=10, va="bottom")
        ax.text(
            x,
            y - 0.5 * gap,
            layer,
            fontsize=8,
            va="bottom",
            color="0.35",
        )
        _product(ax, matrices, x, y, gap)
        x += width
        tall = max(tall, *map(len, matrices.values()))
    cell = 10 / line  # inches
    width, height = min(line, sum(widths)), y + tall
    ax.figure.set_size_inches(max(5.5, cell * width), cell * (height + 6.4 * gap) + 0.4)
    return width, height, gap


def _letters(rows):
    """Return the cells of one matrix as an array of letters [rows, columns]."""
    return np.array(list(map(list, rows.sort_values("row").cells)))


def _product(ax, matrices, x, y, gap):
    """Draw the matrices of one layer in a row, with signs between and their sizes below."""
    for i, (part, letters) in enumerate(matrices.items()):
        m, n = letters.shape
        if i:
            ax.text(
                x - gap / 2,
                y + m / 2,
                _SIGNS.get(part, ""),
                ha="center",
                va="center",
                fontsize=10,
            )
        _matrix(ax, letters, x, y)
        ax.text(
            x,
            y + m + 0.3 * gap,
            f"{part}\n{m} × {n}",
            fontsize=8,
            va="top",
            color="0.35",
        )
        x += n + gap


def _matrix(ax, letters, x, y):
    """Draw cells, each 1 wide and high, with their upper left corner at (x, y)."""
    m, n = letters.shape
    colors = np.ones((m, n, 4))
    for letter, color in zip("abcdefghi", _BLUES, strict=True):
        colors[letters == letter] = color
    ax.imshow(
        colors,
        extent=(x, x + n, y + m, y),
        interpolation="nearest",
        zorder=1,
    )
    removed = letters == "x"
    for first, count in _runs(removed.all(axis=1)):
        _cross(ax, (x, y + first), n, count, count > 0.04 * max(m, n))
    for first, count in _runs(removed.all(axis=0)):
        _cross(ax, (x + first, y), count, m, count > 0.04 * max(m, n))
    ax.add_patch(
        Rectangle(
            (x, y),
            n,
            m,
            zorder=3,
            fill=False,
            edgecolor="0.35",
            linewidth=0.8,
        )
    )


def _runs(flags):
    """Return (first place, length) of each run of true flags."""
    runs = np.ma.clump_masked(np.ma.masked_array(flags, flags))
    return [(run.start, run.stop - run.start) for run in runs]


def _cross(ax, corner, width, height, is_wide):
    """Draw a removed part of a matrix; in a thin one, crosses would look like a thick line."""
    hatch = "xxx" if is_wide else None
    ax.add_patch(Rectangle(corner, width, height, zorder=2, hatch=hatch, **_REMOVED))


@style.styled
def kept_widths(frame):
    """Draw how much of each place is left, as a share of the dense model.

    The numbers stand beside it as "kept of whole". There is a panel for each kind and a bar for
    each block (or stage, convolution, layer). Kinds of which nothing went are left out, except
    heads and neurons.

    frame: columns where, kind, kept and whole, as inside.widths returns it.
    Returns a Figure.
    """
    sums = frame.groupby("kind", sort=False)[["kept", "whole"]].sum()
    is_shown = (sums.kept < sums.whole) | sums.index.isin(["heads", "neurons"])
    kinds = sums.index[is_shown]
    frame = frame[frame.kind.isin(kinds)]
    places = frame["where"].unique()
    figure, panels = style.panels_beside(len(kinds), 1.6 + 1.55 * len(kinds), 1 + 0.3 * len(places))
    for ax, kind in zip(panels, kinds, strict=True):
        widths = frame[frame.kind == kind].set_index("where")
        y = [list(places).index(where) for where in widths.index]
        ax.barh(y, 1, 0.75, color="0.92")
        ax.barh(y, widths.kept / widths.whole, 0.75, color=style.COLORS[0])
        for place, row in zip(y, widths.itertuples(), strict=True):
            ax.text(
                1.04,
                place,
                f"{row.kept} of {row.whole}",
                fontsize=8,
                va="center",
            )
        ax.set(xlim=(0, 1), xticks=[0, 0.5, 1])
        ax.set_title(kind, fontsize=11)
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.tick_params(axis="x", labelsize=9)
        ax.grid(False, axis="y")
    panels[0].set_yticks(range(len(places)), places, fontsize=9)
    panels[0].set_ylim(len(places) - 0.4, -0.6)
    figure.supxlabel("share of the dense model's that stays", fontsize=12)
    return figure


@style.styled
def weight_violins(frame):
    """Draw distributions of weights by role (a panel each) and block.

    At the left of each place stand the weights of the first stage in grey, at its right the
    survivors of the last one, all equally wide. The share of zeros of the last stage stands below.
    Dotted lines show where magnitude would have cut as many.

    frame: as inside.weights(by="layer") returns it, of one cut; layers outside of blocks are left
    out.
    Returns a Figure.
    """
    frame = frame.dropna(subset="block")
    roles, blocks = frame.role.unique(), frame.block.unique()
    first, last = frame.stage.unique()[[0, -1]]
    size = (1.6 + 0.9 * max(5, len(blocks)), 0.9 + 1.15 * len(roles))
    figure, panels = plt.subplots(len(roles), 1, figsize=size, sharex=True, squeeze=False)
    for ax, role in zip(panels[:, 0], roles, strict=True):
        bins = frame[frame.role == role]
        before = bins[bins.stage == first]
        after = bins[bins.stage == last]
        _violins(ax, before, "count", blocks, side="low", color="0.7")
        _violins(ax, after, "survivors", blocks, side="high", color=style.COLORS[0])
        _zeros(ax, after, blocks)
        _limits(ax, bins)
        ax.set_ylabel(role)
    words = [str(block).replace("layers.", "").replace("blocks.", "") for block in blocks]
    ax.set_xticks(range(len(blocks)), words)
    ax.set_xlabel("block; the share of zeros stands below")
    figure.supylabel("value of the weight", fontsize=12)
    handles = [
        Patch(color="0.7", label=tables.STAGES.get(first, first)),
        Patch(color=style.COLORS[0], label=tables.STAGES.get(last, last)),
        plt.Line2D(
            [],
            [],
            color="0.1",
            linestyle=":",
            label="where magnitude would cut as many",
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _violins(ax, bins, column, blocks, *, side, color):
    """Draw half a violin from the bins of each block, as long as these are filled.

    Of fewer than three filled bins there is no shape.

    column: name of the counts.
    """
    for block, rows in bins.groupby("block", sort=False):
        filled = np.flatnonzero(rows[column])
        if len(filled) < 3:
            continue
        rows = rows.iloc[filled[0] : filled[-1] + 1]
        middle = (rows.left + rows.right) / 2
        shape = {
            "coords": middle,
            "vals": rows[column],
            "mean": 0,
            "median": 0,
        }
        shape |= {"min": middle.min(), "max": middle.max()}
        place = list(blocks).index(block)
        violins = ax.violin([shape], [place], widths=0.85, side=side, showextrema=False)
        violins["bodies"][0].set(facecolor=color, edgecolor="0.25", linewidth=0.5, alpha=1)


def _limits(ax, bins):
    """Set the axis of the weights, and draw where magnitude would have cut as many."""
    threshold = bins.threshold.iloc[0]
    for height in (threshold, -threshold):
        ax.axhline(height, color="0.1", linestyle=":", linewidth=1)
    filled = bins[bins["count"] > 0]
    reach = filled[["left", "right"]].abs().max(axis=None)
    ax.set_ylim(-1.5 * reach, 1.1 * reach)
    ax.grid(False, axis="x")


def _zeros(ax, bins, blocks):
    """Write the share of zeros of each block at the bottom of the axes."""
    groups = bins.groupby("block", sort=False)
    zeros = groups.zeros.first()
    shares = zeros / (zeros + groups["count"].sum())
    style = {
        "fontsize": 8,
        "color": "0.25",
        "ha": "center",
        "va": "bottom",
    }
    for block, share in shares.items():
        place = list(blocks).index(block)
        ax.text(
            place,
            0.01,
            f"{share:.0%}",
            transform=ax.get_xaxis_transform(),
            **style,
        )


@style.styled
def spectra(frame):
    """Draw singular values (above, of the largest) and the energy up to each rank (below).

    Energy is the share of the squares. There is a panel for each role and a line for each block.
    Dashed is the rank at which two thin layers have as many MACs as one. Ranks are shares of the
    full one, so that stages of several widths compare.

    frame: as inside.spectra returns it; with a column faster (the rank up to which factoring was
    measured to be faster, as bench.break_even returns it), each line has a small mark there.
    Returns a Figure.
    """
    largest = frame.groupby("layer").sigma.transform("max")
    full = frame[["m", "n"]].min(axis=1)
    frame = frame.assign(
        full=full,
        relative=frame.sigma / largest,
        share=frame["rank"] / full,
    )
    roles = frame.role.unique()
    colors = style.shades(frame.block.dropna().unique())
    size = (1.8 + 1.9 * len(roles), 4.4)
    figure, panels = plt.subplots(
        2,
        len(roles),
        figsize=size,
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for (above, below), role in zip(panels.T, roles, strict=True):
        _spectra_of_role(above, below, frame[frame.role == role], colors)
        above.set_title(role, fontsize=12)
        below.xaxis.set_major_formatter("{x:.0%}")
        below.set(xlim=(0, 1.02), xticks=[0, 0.5, 1])
    floor = max(frame.relative[frame.relative > 0].min(), 1e-4)
    panels[0, 0].set(
        yscale="log",
        ylim=(floor, 1.5),
        ylabel="singular value,\nof the largest",
    )
    panels[1, 0].set(ylim=(0, 1.03), ylabel="energy up to the rank")
    panels[1, 0].yaxis.set_major_formatter("{x:.0%}")
    figure.supxlabel("rank, as a share of the full rank", fontsize=12)
    _spectra_legend(figure, colors, "faster" in frame)
    return figure


def _spectra_legend(figure, colors, has_marks):
    """Name the colours of blocks, the dashed line and, if there are some, the marks."""
    styles = {block: {"color": color} for block, color in colors.items()}
    styles["break-even in MACs"] = {"color": "0.1", "linestyle": "--"}
    if has_marks:
        styles["faster up to here"] = {
            "color": "0.35",
            "marker": "o",
            "linestyle": "",
        }
    handles = [plt.Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside right center")


def _spectra_of_role(above, below, frame, colors):
    """Draw the lines of one role's layers, with marks where they are faster, and the break-even."""
    for _, line in frame.groupby("layer", sort=False):
        style = {
            "color": colors.get(line.block.iloc[0], "0.3"),
            "linewidth": 1.3,
        }
        above.plot(line.share, line.relative, **style)
        below.plot(line.share, line.energy, **style)
        if "faster" in line and line.faster.iloc[0] > 0:
            share = line.faster.iloc[0] / line.full.iloc[0]
            energy = np.interp(share, line.share, line.energy)
            below.plot(share, energy, marker="o", markersize=5, **style)
    for share in (frame.break_even / frame.full).round(6).unique():
        for ax in (above, below):
            ax.axvline(share, color="0.1", linestyle="--", linewidth=1)


@style.styled
def attention_maps(frame, images=None):
    """Draw where two models look, on several images.

    There is a column for each image, and for each block a row before and one after the cut. Both
    rows of a block have the same scale.

    frame: as inside.attention returns it; a column label, if there is one, is written above each
    image.
    images: the data.Split that the places are of, whose pictures then stand on top.
    Returns a Figure.
    """
    blocks, shown = frame.block.unique(), frame.image.unique()
    above = int(images is not None)  # rows of pictures
    count = above + 2 * len(blocks)
    size = (1.9 + 1.25 * len(shown), 0.6 + 1.25 * count)
    figure, panels = plt.subplots(count, len(shown), figsize=size, squeeze=False)
    for ax in panels.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        sns.despine(ax=ax, left=True, bottom=True)
    if above:
        panels[0][0].set_ylabel("image", fontsize=9)
        for ax, image in zip(panels[0], shown, strict=True):
            ax.imshow(images.store[images.indices[image]])
    for i, block in enumerate(blocks):
        rows = panels[above + 2 * i :][:2]
        _attention(figure, rows, frame[frame.block == block])
    if "label" in frame:
        labels = frame.groupby("image", sort=False).label.first()
        for ax, label in zip(panels[0], labels, strict=True):
            ax.set_title(str(label)[:14], fontsize=9)
    return figure


def _attention(figure, panels, maps):
    """Draw the maps of one block: a row before and one after the cut, with one colour bar."""
    top = maps[["before", "after"]].quantile(0.98).max()  # the largest would darken all others
    for axes, when, word in zip(panels, ("before", "after"), ("dense", "cut"), strict=True):
        axes[0].set_ylabel(f"{maps.block.iloc[0]}\n{word}", fontsize=9)
        for ax, (_, of_image) in zip(axes, maps.groupby("image", sort=False), strict=True):
            table = of_image.pivot(index="row", columns="column", values=when)
            picture = ax.imshow(table, cmap="rocket", vmin=0, vmax=top)
    bar = figure.colorbar(picture, ax=list(panels.flat), shrink=0.9, extend="max")
    bar.ax.tick_params(labelsize=9)
    bar.set_label("attention received,\ntimes the equal share", fontsize=9)


# -- drawings: of layers and images


@style.styled
def weight_histograms(frame):
    """Draw distributions of weights: a panel for each stage, a row for each method and target.

    Counts are on a logarithmic axis. The zeros stand apart in a hatched bar at the right, where
    they do not hide the rest. What the masks will let go is light. Dotted lines show the |w| up to
    which magnitude would have cut as many.

    frame: as inside.weights returns it, with the columns method and target.
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
                ax.set_title(tables.STAGES.get(stage, stage), fontsize=12)
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
    ax.stairs(bins.survivors, edges, fill=True, color=style.COLORS[0], label="stay")
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


@style.styled
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


@style.styled
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
    ax = style.new_axes(beside + column * table.shape[1], 1.1 + 0.42 * len(table))
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


@style.styled
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


@style.styled
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
        [style.COLORS[2], style.COLORS[3]],
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
