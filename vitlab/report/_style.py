"""Give all figures one look that reads on slides and in grey. No torch.

Public: BAD, COLORS, CONTROL, FLOOR, GOOD, HALF, MARKERS, STYLE, TEXT, TOGETHER, WIDE, color_of, label_lines,
legend_beside, looks, loss_axis, new_axes, panels_beside, range_bars, styled.
"""

import functools
import itertools

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from vitlab.report import tables

HALF = (6.0, 4.3)  # inches: two stand beside each other on a slide
WIDE = (12.2, 4.6)  # inches: a whole slide
TEXT = 12  # points, the smallest size on a slide
_INK = "axes.edgecolor axes.labelcolor text.color xtick.color ytick.color".split()
STYLE = {
    **dict.fromkeys(_INK, "0.15"),  # with the next five lines seaborn's "ticks"
    "axes.axisbelow": True,
    "font.sans-serif": [
        "Arial",
        "DejaVu Sans",
        "Liberation Sans",
        "Bitstream Vera Sans",
        "sans-serif",
    ],
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "0.9",
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "axes.titlesize": TEXT + 1,
    "figure.labelsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "legend.frameon": False,
    "errorbar.capsize": 2,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text, to be edited in slides
    "svg.hashsalt": "vitlab",
    "pdf.fonttype": 42,  # TrueType: text stays text here, too
}
# A method has one colour in all figures. Those that are drawn together (TOGETHER) are told apart by
# colour-blind eyes and in grey, and all stand out from white.
COLORS = {
    "pool": "#0c2d6e",
    "ranks": "#12a582",
    "units": "#974811",
    "svd": "#3d001d",
    "structured": "#6700b8",
    "heads+svd+iht columns": "#1481b3",
    "unstructured": "#b35c00",
    "heads+svd+iht entries": "#c01a4a",
    "heads+iht": "#999100",
}
TOGETHER = [
    ["pool", "ranks", "units", "svd", "structured", "heads+svd+iht columns"],
    ["unstructured", "structured"],
    ["svd", "heads+svd+iht columns", "heads+svd+iht entries", "heads+iht"],
]
CONTROL = "0.55"  # the grey of random cuts, magnitude, and the dense model with more training
GOOD, BAD = COLORS["ranks"], COLORS["units"]  # photographs newly right and newly wrong
_HUES = list(COLORS.values())
MARKERS = "os^DvPX"
_BY_WORDS = {tables.METHODS.get(method, method): color for method, color in COLORS.items()}
_BY_WORDS["heads, SVD"] = COLORS["svd"]
FLOOR = 0.1  # points of top-1; what is lost below is within the noise of all test sets here


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


def color_of(name):
    """Return the colour of a series, such as "rows, removed"; None for one that has none of its own."""
    if tables.is_control(name) or name in ("dense", "heads, SVD, threshold", "width"):
        return CONTROL
    fitting = [words for words in _BY_WORDS if f"{name}, ".startswith(f"{words}, ")]
    return _BY_WORDS[max(fitting, key=len)] if fitting else None


def looks(names):
    """Choose a colour, a marker and a width for each series.

    names: names of series in order, where repeated ones count once.
    Returns {name: {"color", "marker", "linewidth"}}. Controls are grey and thin.
    """
    names = list(dict.fromkeys(map(str, names)))
    own = {name: color_of(name) for name in names}
    others = itertools.cycle([color for color in _HUES if color not in own.values()] or _HUES)
    styles = {}
    for name, marker in zip(names, itertools.cycle(MARKERS), strict=False):
        color = own[name] or next(others)
        width = 1 if color == CONTROL else 2.5 if name == tables.METHODS["pool"] else 1.8
        styles[name] = {"color": color, "marker": marker, "linewidth": width}
    return styles


def new_axes(width, height):
    """Return the Axes of a new Figure of a size in inches."""
    return plt.subplots(figsize=(width, height))[1]


def panels_beside(groups, width, height):
    """Return a Figure with a panel for each group in a row, which share the y axis.

    groups: a grouped frame.
    width, height: inches of the Figure.
    Returns the Figure and a list of (Axes, name of the group, the group).
    """
    figure, panels = plt.subplots(
        1, len(groups), figsize=(width, height), sharey=True, squeeze=False
    )
    return figure, [(ax, *group) for ax, group in zip(panels[0], groups, strict=True)]


def range_bars(ax, ranges, **style):
    """Draw means over their places, with a bar from the lowest to the highest value.

    ranges: as tables.ranges_of returns it, by place on the x axis.
    style: options of ax.errorbar.
    """
    lengths = ranges[["below", "above"]].to_numpy().T
    # Bars without length would still draw their caps, as if something had been measured twice.
    lengths = lengths if lengths.any() else None
    ax.errorbar(ranges.index, ranges["mean"], yerr=lengths, capsize=3, **style)


def loss_axis(ax, worst, *, axis="y"):
    """Make an axis that of the points of top-1 lost: logarithmic, with the best on top or right.

    worst: the most points to be seen. What is below FLOOR has to be drawn at it.
    """
    ends = (1.6 * max(worst, 1), FLOOR / 1.3)
    steps = (0.1, 0.3, 1, 3, 10, 30, 100) if axis == "y" else (0.1, 1, 10, 100)
    ticks = [FLOOR, *(tick for tick in steps if FLOOR < tick < ends[0])]
    words = [f"≤ {FLOOR:g}", *(f"{tick:g}" for tick in ticks[1:])]
    ax.set(**{f"{axis}scale": "log", f"{axis}lim": ends})
    ax.set(**{f"{axis}label": "points of top-1 lost (log axis)"})
    own = ax.yaxis if axis == "y" else ax.xaxis
    own.set_major_locator(ticker.FixedLocator(ticks))
    own.set_major_formatter(ticker.FixedFormatter(words))
    own.set_minor_locator(ticker.NullLocator())


def label_lines(ax, ends, *, size=TEXT):
    """Write the name of each line at the right of the axes, at the height of its end.

    ends: {name: (height on the y axis, colour)}. Names that would overlap move apart.
    size: points.
    """
    to_axes = ax.transData + ax.transAxes.inverted()
    left = ax.get_xlim()[0]
    wanted = {name: to_axes.transform((left, y))[1] for name, (y, _) in ends.items()}
    order = sorted(wanted, key=wanted.get)
    lines = [name.count("\n") + 1 for name in order]
    ax.figure.draw_without_rendering()  # lays out the axes, whose height counts
    line = 1.25 * size / 72 * ax.figure.dpi / ax.get_window_extent().height
    # Names go up where there is no room, and then down from the top.
    places = np.array([wanted[name] for name in order])
    gaps = [line * (lines[i] + lines[i - 1]) / 2 for i in range(1, len(order))]
    for i, gap in enumerate(gaps):
        places[i + 1] = max(places[i + 1], places[i] + gap)
    if len(places):
        places[-1] = min(places[-1], 1)
    for i in reversed(range(len(gaps))):
        places[i] = min(places[i], places[i + 1] - gaps[i])
    for name, place in zip(order, places, strict=True):
        color = ends[name][1]
        look = {"color": "0.35" if color == CONTROL else color, "fontsize": size, "va": "center"}
        ax.text(1.02, place, name, transform=ax.transAxes, **look)


def legend_beside(ax, **options):
    """Put a legend to the right of the axes, where it hides no point.

    options: of ax.legend.
    """
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **options)
