"""Give all figures one look that reads on slides and in grey. No torch.

Public: COLORS, DENSE, HALF, HUES, KINDS, LINES, MARKERS, STYLE, WIDE, error_bars, legend_beside,
looks, mean_and_range, new_axes, panels_beside, shades, styled.
"""

import functools
import itertools

import matplotlib.pyplot as plt
import seaborn as sns

from vitlab.report import tables

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
    "axes.titlesize": 12,
    "figure.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "errorbar.capsize": 2,
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
    """Choose a colour and a marker for each series.

    names: names of series in order, where repeated ones count once.
    Returns {name: {"color", "marker"}}, always with "dense".
    """
    # The controls, "dense" and random cuts, are grey in every figure. Random cuts have other
    # markers than the first series, which are often drawn beside them.
    greys = zip(itertools.repeat("0.6"), itertools.cycle(MARKERS[3:] + MARKERS[:3]))
    hues = zip(itertools.cycle(HUES), itertools.cycle(MARKERS))
    styles = {"dense": DENSE}
    for name in names:
        if name not in styles:
            color, marker = next(greys if tables.is_random(name) else hues)
            styles[name] = {"color": color, "marker": marker}
    return styles


def shades(names):
    """Choose a colour for each of names that have an order, such as blocks, from dark to light.

    Returns {name: colour}.
    """
    return dict(zip(names, sns.color_palette("viridis", len(names)), strict=True))


def new_axes(width, height):
    """Return the Axes of a new Figure of a size in inches."""
    return plt.subplots(figsize=(width, height))[1]


def panels_beside(groups, margin, width, height=HALF[1]):
    """Return a Figure with a panel for each group in a row, which share the y axis.

    groups: a grouped frame.
    margin, width, height: inches beside all panels, of each panel, and of the Figure.
    Returns the Figure and a list of (Axes, name of the group, the group).
    """
    size = (margin + width * len(groups), height)
    figure, panels = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False)
    return figure, [(ax, *group) for ax, group in zip(panels[0], groups, strict=True)]


def mean_and_range(ax, groups, **style):
    """Draw the mean of each group over the group's name, with a bar from its lowest to its highest.

    groups: a grouped Series whose names are numbers.
    style: options of ax.errorbar.
    """
    means = tables.ranges_of(groups)
    ax.errorbar(means.index, means["mean"], yerr=error_bars(means), capsize=3, **style)


def error_bars(ranges):
    """Return the lengths of error bars, [below and above, points], or None where all are nought."""
    # Bars without length would still draw their caps, as if something had been measured twice.
    lengths = ranges[["below", "above"]].to_numpy().T
    return lengths if lengths.any() else None


def legend_beside(ax, **options):
    """Put a legend to the right of the axes, where it hides no point.

    options: of ax.legend.
    """
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **options)
