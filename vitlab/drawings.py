"""Drawings of what is inside a model, before and after a cut: its weights, widths, spectra and attention; frames in,
figures out, in the style of `plots`. No torch."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import Patch, Rectangle

from vitlab.plots import COLORS, STAGES, styled

KEPT = plt.get_cmap("Blues")(np.linspace(0.45, 1, 9))  # by the size of the weight
GONE = {"facecolor": "#fbe3d0", "edgecolor": COLORS[3], "linewidth": 0}
SIGNS = {"V": "×", "S": "+"}  # before a part that stands beside another


@styled
def cuts(frame):
    """What each method leaves of a layer, matrix by matrix: a picture per method, target and layer, weight by weight.

    frame: columns method, layer, part, row and cells, as layers.picture tells them, and target (a share) if there is
    one. Blue is kept, the darker the larger; white is zero, crossed is not there any more. Sizes are of what is shown.
    Returns a Figure. Raises ValueError for a frame without rows.
    """
    if frame.empty:
        raise ValueError("no layer to draw")
    marks = [column for column in ("method", "target", "layer") if column in frame]
    pictures = list(frame.groupby(marks, sort=False, dropna=False))
    matrices = [{part: _letters(own) for part, own in found.groupby("part", sort=False)} for _, found in pictures]
    high = max(len(m) for parts in matrices for m in parts.values())  # in cells, as all that follows
    gap = 0.1 * high
    widths = [sum(m.shape[1] + gap for m in parts.values()) for parts in matrices]
    widths = [max(width, 1.05 * high) + 1.5 * gap for width in widths]
    line = max(6.5 * high, max(widths))
    figure, ax = plt.subplots()
    x, y, tall = 0.0, 0.0, 0
    for (name, _), parts, width in zip(pictures, matrices, widths, strict=True):
        if x and x + width > line:
            x, y, tall = 0.0, y + tall + 5.5 * gap, 0
        name = dict(zip(marks, name, strict=True))
        target = f" {name['target']:.0%}" if name.get("target", np.nan) == name.get("target") else ""
        ax.text(x, y - 1.6 * gap, f"{name['method']}{target}", fontsize=10, va="bottom")
        ax.text(x, y - 0.5 * gap, name["layer"], fontsize=8, va="bottom", color="0.35")
        _product(ax, parts, x, y, gap)
        x, tall = x + width, max(tall, *(len(m) for m in parts.values()))
    ax.set(xlim=(-gap / 2, min(line, sum(widths))), ylim=(y + tall + 3 * gap, -3.4 * gap), aspect="equal")
    ax.set_axis_off()
    inches = 10 / line  # of a cell
    figure.set_size_inches(max(5.5, inches * min(line, sum(widths))), inches * (y + tall + 6.4 * gap) + 0.4)
    white = {"facecolor": "white", "edgecolor": "0.35"}
    handles = [Patch(color=KEPT[5], label="kept, darker: larger"), Patch(**white, label="zero")]
    if any((m == "x").any() for parts in matrices for m in parts.values()):
        handles.append(Patch(**GONE, hatch="xxx", label="removed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _letters(own):
    """The cells of one matrix as an array of letters [rows, columns]."""
    return np.array([list(line) for line in own.sort_values("row").cells])


def _product(ax, parts, x, y, gap):
    """Draw the matrices of one layer beside each other, with their signs between and their sizes below."""
    for i, (part, letters) in enumerate(parts.items()):
        if i:
            middle = {"ha": "center", "va": "center", "fontsize": 10}
            ax.text(x - gap / 2, y + len(letters) / 2, SIGNS.get(part, ""), **middle)
        _matrix(ax, letters, x, y)
        size = f"{part}\n{letters.shape[0]} × {letters.shape[1]}"
        ax.text(x, y + len(letters) + 0.3 * gap, size, fontsize=8, va="top", color="0.35")
        x += letters.shape[1] + gap


def _matrix(ax, letters, x, y):
    """Draw the cells with their upper left corner at (x, y), 1 wide and high each, gone rows and columns crossed."""
    colors = np.ones((*letters.shape, 4))
    for letter, color in zip("abcdefghi", KEPT, strict=True):
        colors[letters == letter] = color
    m, n = letters.shape
    ax.imshow(colors, extent=(x, x + n, y + m, y), interpolation="nearest", zorder=1)
    for way, gone in ((0, (letters == "x").all(1)), (1, (letters == "x").all(0))):
        for run in np.ma.clump_masked(np.ma.masked_array(gone, gone)):
            first, count = run.start, run.stop - run.start
            corner, size = ((x, y + first), (n, count)) if way == 0 else ((x + first, y), (count, m))
            hatch = "xxx" if count > 0.04 * max(m, n) else None  # in a thin line crosses would be a thick one
            ax.add_patch(Rectangle(corner, *size, zorder=2, hatch=hatch, **GONE))
    ax.add_patch(Rectangle((x, y), n, m, fill=False, edgecolor="0.35", linewidth=0.8, zorder=3))


@styled
def kept_widths(frame):
    """How much of each place is left, as a share of the dense model: a panel per kind, a bar per block (or stage,
    convolution, layer) with "kept of whole" beside it.

    frame: columns where, kind, kept and whole, as budget.kept returns it. Kinds of which nothing went are left out, but
    for heads and neurons. Returns a Figure.
    """
    less = frame.groupby("kind", sort=False)[["kept", "whole"]].sum()
    kinds = [kind for kind in less.index if kind in ("heads", "neurons") or less.kept[kind] < less.whole[kind]]
    frame = frame[frame.kind.isin(kinds)]
    places = {where: i for i, where in enumerate(dict.fromkeys(frame["where"]))}
    size = (1.6 + 1.55 * len(kinds), 1 + 0.3 * len(places))
    figure, panels = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False)
    for ax, kind in zip(panels[0], kinds, strict=True):
        own = frame[frame.kind == kind]
        y = own["where"].map(places)
        ax.barh(y, 1, 0.75, color="0.92")
        bars = ax.barh(y, own.kept / own.whole, 0.75, color=COLORS[0])
        for bar, row in zip(bars, own.itertuples(), strict=True):
            ax.text(1.04, bar.get_y() + 0.375, f"{row.kept} of {row.whole}", fontsize=8, va="center")
        ax.set(xlim=(0, 1), xticks=[0, 0.5, 1])
        ax.set_title(kind, fontsize=11)
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.tick_params(axis="x", labelsize=9)
        ax.grid(False, axis="y")
    panels[0][0].set_yticks(range(len(places)), places, fontsize=9)
    panels[0][0].set_ylim(len(places) - 0.4, -0.6)
    figure.supxlabel("share of the dense model's that stays", fontsize=12)
    return figure


@styled
def weight_violins(frame):
    """Distributions of weights by role (a panel each) and block: at the left of each place those of the first stage in
    grey, at its right the survivors of the last one, all equally wide; dotted where magnitude would have cut as many.

    frame: as prune.histogram(by="layer") returns it, of one cut. Layers outside of blocks are left out. The share of
    zeros of the last stage stands below. Returns a Figure.
    """
    frame = frame.dropna(subset="block")
    roles, blocks, stages = (list(dict.fromkeys(frame[column])) for column in ("role", "block", "stage"))
    size = (1.6 + 0.9 * max(5, len(blocks)), 0.9 + 1.15 * len(roles))
    figure, panels = plt.subplots(len(roles), 1, figsize=size, sharex=True, squeeze=False)
    sides = ((stages[0], "count", "low", "0.7"), (stages[-1], "survivors", "high", COLORS[0]))
    for ax, role in zip(panels[:, 0], roles, strict=True):
        for stage, column, side, color in sides:
            part = frame[(frame.role == role) & (frame.stage == stage)]
            for block, own in part.groupby("block", sort=False):
                place = blocks.index(block)
                _violin(ax, own, own[column], place, side=side, color=color)
                if side == "high":
                    zeros = own.zeros.iloc[0] / (own.zeros.iloc[0] + own["count"].sum())
                    words = {"ha": "center", "va": "bottom", "transform": ax.get_xaxis_transform()}
                    ax.text(place, 0.01, f"{zeros:.0%}", fontsize=8, color="0.25", **words)
        for sign in (1, -1):
            ax.axhline(sign * frame.threshold.iloc[0], color="0.1", linestyle=":", linewidth=1)
        own = frame[(frame.role == role) & (frame["count"] > 0)]
        reach = own[["left", "right"]].abs().to_numpy().max()
        ax.set(ylim=(-1.5 * reach, 1.1 * reach), ylabel=role)
        ax.grid(False, axis="x")
    ax.set_xticks(range(len(blocks)), [str(block).replace("layers.", "").replace("blocks.", "") for block in blocks])
    ax.set_xlabel("block; the share of zeros stands below")
    figure.supylabel("value of the weight", fontsize=12)
    handles = [Patch(color=color, label=STAGES.get(stage, stage)) for stage, _, _, color in sides]
    handles.append(plt.Line2D([], [], color="0.1", linestyle=":", label="where magnitude would cut as many"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _violin(ax, bins, counts, place, *, side, color):
    """Half a violin from counts of bins, no longer than there is something; of fewer than three bins no shape."""
    seen = np.flatnonzero(counts)
    if len(seen) < 3:
        return
    middle = ((bins.left + bins.right) / 2).iloc[seen[0] : seen[-1] + 1]
    shape = {"coords": middle, "vals": counts.iloc[seen[0] : seen[-1] + 1], "mean": 0, "median": 0}
    shape |= {"min": middle.min(), "max": middle.max()}
    (drawn,) = ax.violin([shape], [place], widths=0.85, side=side, showextrema=False)["bodies"]
    drawn.set(facecolor=color, edgecolor="0.25", linewidth=0.5, alpha=1)


@styled
def spectra(frame):
    """Singular values (above, of the largest) and the share of their squares up to each rank (below): a panel per role,
    a line per block; dashed the rank at which two thin layers have as many MACs as one.

    frame: as shrink.spectra returns it; with a column faster (rank up to which factoring was measured to be faster, as
    bench.break_even tells it), a small mark on each line. Ranks are shares of the full one, so that stages of several
    widths compare. Returns a Figure.
    """
    largest = frame.groupby("layer").sigma.transform("max")
    frame = frame.assign(full=frame[["m", "n"]].min(axis=1), relative=frame.sigma / largest)
    frame["share"] = frame["rank"] / frame.full
    roles, blocks = list(dict.fromkeys(frame.role)), list(dict.fromkeys(frame.block.dropna()))
    shades = dict(zip(blocks, sns.color_palette("viridis", len(blocks)), strict=True))
    size = (1.8 + 1.9 * len(roles), 4.4)
    figure, panels = plt.subplots(2, len(roles), figsize=size, sharex=True, sharey="row", squeeze=False)
    for (above, below), role in zip(panels.T, roles, strict=True):
        own = frame[frame.role == role]
        for _, line in own.groupby("layer", sort=False):
            style = {"color": shades.get(line.block.iloc[0], "0.3"), "linewidth": 1.3}
            above.plot(line.share, line.relative, **style)
            below.plot(line.share, line.energy, **style)
            if "faster" in line and line.faster.iloc[0] > 0:
                end = line.faster.iloc[0] / line.full.iloc[0]
                below.plot(end, np.interp(end, line.share, line.energy), marker="o", markersize=5, **style)
        for share in (own.break_even / own.full).round(6).unique():
            for ax in (above, below):
                ax.axvline(share, color="0.1", linestyle="--", linewidth=1)
        above.set_title(role, fontsize=12)
    floor = max(frame.relative[frame.relative > 0].min(), 1e-4)
    panels[0, 0].set(yscale="log", ylim=(floor, 1.5), ylabel="singular value,\nof the largest")
    panels[1, 0].set(ylim=(0, 1.03), ylabel="energy up to the rank")
    for ax in panels[1]:
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.set(xlim=(0, 1.02), xticks=[0, 0.5, 1])
    panels[1, 0].yaxis.set_major_formatter("{x:.0%}")
    figure.supxlabel("rank, as a share of the full rank", fontsize=12)
    handles = [plt.Line2D([], [], color=color, label=block) for block, color in shades.items()]
    handles.append(plt.Line2D([], [], color="0.1", linestyle="--", label="break-even in MACs"))
    if "faster" in frame:
        handles.append(plt.Line2D([], [], color="0.35", marker="o", linestyle="", label="faster up to here"))
    figure.legend(handles=handles, loc="outside right center")
    return figure


@styled
def attention_maps(frame, images=None):
    """Where two models look: a column per image, and per block a row before and one after the cut, in the same scale.

    frame: as evaluate.attention returns it, with a column label for a word above each image if there is one. images:
    the data.Split that the places are of, to show its pictures on top; None for none. Returns a Figure.
    """
    blocks, shown = list(dict.fromkeys(frame.block)), list(dict.fromkeys(frame.image))
    rows = [None] * (images is not None) + [(block, when) for block in blocks for when in ("before", "after")]
    size = (1.9 + 1.25 * len(shown), 0.6 + 1.25 * len(rows))
    figure, panels = plt.subplots(len(rows), len(shown), figsize=size, squeeze=False)
    tops = frame.groupby("block")[["before", "after"]].quantile(0.98).max(axis=1)  # the largest would darken all others
    for line, row in zip(panels, rows, strict=True):
        for ax, image in zip(line, shown, strict=True):
            own = frame[frame.image == image]
            if row is None:
                ax.imshow(images.store[images.indices[image]])
            else:
                own = own[own.block == row[0]].pivot(index="row", columns="column", values=row[1])
                drawn = ax.imshow(own, cmap="rocket", vmin=0, vmax=tops[row[0]])
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            sns.despine(ax=ax, left=True, bottom=True)
        words = {"before": "dense", "after": "cut"}
        line[0].set_ylabel("image" if row is None else f"{row[0]}\n{words[row[1]]}", fontsize=9)
        if row and row[1] == "after":
            pair = list(panels[[rows.index((row[0], "before")), rows.index(row)]].flat)
            bar = figure.colorbar(drawn, ax=pair, shrink=0.9, extend="max")
            bar.ax.tick_params(labelsize=9)
            bar.set_label("attention received,\ntimes the equal share", fontsize=9)
    if "label" in frame:
        for ax, label in zip(panels[0], frame.groupby("image", sort=False).label.first(), strict=True):
            ax.set_title(str(label)[:14], fontsize=9)
    return figure
