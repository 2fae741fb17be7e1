import itertools
import re

import matplotlib
import numpy as np
import pandas as pd
import published
import pytest
import torch
from invented import COMMITTED, FIGURES

from vitlab.report import _style, drawings, plots, tables
from vitlab.report.tables import caption

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def rows():
    """Two seeds of a dense model and of three ways to cut it; top1 falls with the share, less when tuned."""
    measured = []
    for seed in (0, 1):
        for stage in ("dense", "dense+epochs"):
            measured.append(
                {"method": "dense", "stage": stage, "seed": seed, "top1": 80.0, "macs": 4e6}
            )
        for method, form in [
            ("unstructured", "masked"),
            ("structured", "masked"),
            ("structured", "removed"),
        ]:
            for target in (0.5, 0.9):
                for stage, loss in (("cut", 60), ("finetuned", 10)):
                    macs = 4e6 * (1 - target if form == "removed" else 1)
                    cut = {
                        "method": method,
                        "form": form,
                        "target_kind": "sparsity",
                        "target": target,
                    }
                    cut |= {"stage": stage, "seed": seed}
                    measured.append(cut | {"top1": 80 - loss * target + seed, "macs": macs})
    return pd.DataFrame(measured)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def scatters(ax):
    """Return the collections that scatter has drawn."""
    return [artist for artist in ax.collections if type(artist).__name__ == "PathCollection"]


def test_tradeoff_names_the_costs_there_are(rows):
    with pytest.raises(ValueError, match="unknown cost 'mac', did you mean 'macs'"):
        plots.tradeoff(rows, "mac")
    with pytest.raises(ValueError, match="measured in 6_efficiency"):
        plots.tradeoff(rows.assign(latency_ms=np.nan), "latency_ms")


def test_maps_keep_the_order_of_blocks_and_leave_holes():
    frame = pd.DataFrame(
        {
            "block": ["blocks.10", "blocks.2", "blocks.2"],
            "head": [0, 0, 1],
            "score": [1.0, 2.0, 3.0],
        }
    )
    ax = drawings.heads(frame.assign(kept=[True, False, True]))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["block 10", "block 2"]
    words = [text.get_text() for text in ax.texts]
    assert words == ["1,000.0", "2,000.0", "3,000.0"]  # thousandths; block 10 has no head 1
    assert len(ax.lines) == 1  # one cross
    ax = drawings.heat_map(
        frame.rename(columns={"head": "role"}), value="score", label="loss (nats)"
    )
    assert len(ax.texts) == 3


def test_the_same_figure_is_the_same_bytes(rows, tmp_path):
    for name in ("one", "two"):
        plots.save(plots.tradeoff(rows, "macs"), tmp_path / name, caption="what it is")
    for ending in ("svg", "pdf", "png", "txt"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (
            tmp_path / f"two.{ending}"
        ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{ending}" for name in ("one", "two") for ending in ("pdf", "png", "svg", "txt")
    )
    assert not matplotlib.pyplot.get_fignums()


def test_tables_are_written_for_machines_and_for_people(tmp_path, capsys):
    frame = pd.DataFrame(
        {"method": ["heads_svd", "dense"], "top1": [80.123456, np.nan], "macs": [4_000_000, 1]}
    )
    tables.save_table(frame, tmp_path / "t", formats={"macs": "{:,}"})
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), frame, check_dtype=False)
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[2].split("|")] == [
        "",
        "heads_svd",
        "80.123",
        "4,000,000",
        "",
    ]
    assert [cell.strip() for cell in lines[3].split("|")] == ["", "dense", "", "1", ""]
    tex = (tmp_path / "t.tex").read_text()
    assert r"heads\_svd & 80.123 & 4,000,000 \\" in tex and r"\toprule" in tex and "{lrr}" in tex
    with pytest.raises(ValueError, match="unknown column 'top', did you mean 'top1'"):
        tables.save_table(frame, tmp_path / "u", formats={"top": "{}"})
    tables.save_table(frame, tmp_path / "v", kinds=["csv"])
    assert (tmp_path / "v.csv").exists() and not (tmp_path / "v.md").exists()
    tables.save_table(frame.head(0), tmp_path / "v", kinds=["csv"])
    assert len(pd.read_csv(tmp_path / "v.csv")) == 2, (
        "nothing to write is no reason to lose what there is"
    )
    assert capsys.readouterr().out == "v: no results yet, not written\n"


def test_a_caption_says_where_numbers_come_from():
    row = {
        "study": "demo",
        "model": "vit",
        "seed": 0,
        "split_seed": 0,
        "device": "a CPU",
        "threads": 2,
    }
    row |= {
        "torch": "2.15.0",
        "timm": "1.0.31",
        "commit": "abc+dirty",
        "date": "2026-01-02T03:04:05Z",
    }
    text = tables.caption(
        pd.DataFrame([row, row | {"model": "swin", "date": "2026-01-01T00:00:00Z"}])
    )
    for part in ("demo", "vit, swin", "a CPU", "abc+dirty", "2026-01-02"):
        assert part in text


@pytest.mark.parametrize(
    "alone, words",
    [
        ([], "0, 1"),
        (["pool"], "0, 1 (some cuts: 0)"),
        (["pool", "svd"], "0, 1 (cuts: 0)"),
        (["all"], "0"),
    ],
)
def test_seeds_in_words(alone, words):
    rows = [("dense", "dense", seed) for seed in (0, 1) if alone != ["all"]]
    rows += [
        (method, "cut", seed)
        for method in ("pool", "svd")
        for seed in (0, 1)
        if seed == 0 or method not in alone
    ]
    rows = [row for row in rows if row[2] == 0 or alone != ["all"]]
    frame = pd.DataFrame(rows, columns=["method", "stage", "seed"]).assign(
        top1=1.0, model="vit", date="2026-01-02"
    )
    assert tables.seeds_of(frame) == words
    assert tables.seeds_of(frame.drop(columns=["method", "stage"])) == words.partition(" (")[0]
    assert f"; seeds {words}, split" in tables.caption(frame)
    assert tables.seeds_of(frame.drop(columns="seed")) == "unknown"


def test_a_caption_is_of_what_is_drawn():
    rows = pd.DataFrame(
        [(m, s) for m in ("vit", "swin") for s in (0, 1)], columns=["model", "seed"]
    )
    rows = rows.assign(date="2026-01-02", commit=rows.model + rows.seed.astype(str))
    text = tables.caption(rows, pd.DataFrame({"model": ["swin"] * 2, "seed": [1, 1], "sigma": 1.0}))
    assert "; swin; seeds 1, split" in text and "commit swin1," in text


def test_means_over_seeds_are_of_the_same_seeds():
    frame = pd.DataFrame(
        {"method": list("aabbc"), "seed": [0, 1, 0, 1, 0], "cut": [1.0, 3, 5, 7, 9]}
    )
    frame["distilled"] = [2.0, 4, 6, np.nan, np.nan]
    means = tables.over_seeds(frame, ["method"]).set_index("method")
    assert means.seeds.to_dict() == {"a": 2, "b": 1, "c": 1}  # b: the fullest
    assert means.cut.to_dict() == {
        "a": 2,
        "b": 5,
        "c": 9,
    } and means.distilled.to_dict() == pytest.approx({"a": 3, "b": 6, "c": np.nan}, nan_ok=True)


def test_image_grid_shows_every_class_once_or_the_batch():
    class Split:
        labels = torch.tensor([2, 0, 1, 0])
        store, indices = np.zeros((9, 8, 8, 3), dtype=np.uint8), np.array([5, 6, 7, 8])

    figure = drawings.image_grid(Split(), classes=["ant", "bee", "cat"])
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["ant", "bee", "cat"]
    figure = drawings.image_grid(
        torch.rand(4, 3, 8, 8), labels=torch.tensor([1, 1, 0, 2]), classes=["ant", "bee", "cat"]
    )
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["bee", "bee", "ant", "cat"]


@pytest.mark.parametrize("kinds", [["macs"], ["params"]])
def test_probes_draw_a_line_per_method_and_a_panel_per_way_to_classify(kinds):
    lines = []
    for seed, method, target in itertools.product((0, 1), ("dense", "pool", "units"), (0.5, 0.25)):
        target = 1.0 if method == "dense" else target
        lost = 20 * (1 - target) * (2 if method == "units" else 1)
        ways = {"knn10": 60.0, "knn20": 60 - lost + seed, "probe_kept": 70 - lost}
        row = {"seed": seed, "method": method, "target_kind": kinds[0], "target": target}
        lines.append(row | ways | {"probe_anew": 80 - lost})
    figure = plots.probes(pd.DataFrame(lines))
    assert [ax.get_title() for ax in figure.axes] == list(plots._PROBES.values())
    assert labels(figure.axes[-1]) == ["dense", "one pool", "units"]
    assert kinds[0].replace("macs", "MACs") in figure.get_supxlabel()
    for ax, dense in zip(figure.axes, (80, 70, 60.5), strict=True):
        whole, *cuts = [
            np.asarray(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 2
        ]
        assert whole.tolist() == [dense] * 2
        points = [line for line in cuts if line.max() < dense]
        assert any(np.allclose(sorted(line), [dense - 15, dense - 10]) for line in points)  # pool
        assert any(np.allclose(sorted(line), [dense - 30, dense - 20]) for line in points)


# -- one look


SEE = {  # linear RGB as protanopes and deuteranopes see it (Machado et al. 2009, severity 1)
    "all": np.eye(3),
    "protan": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deutan": [[0.3673, 0.8607, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
}
XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def lab(color, see):
    """Return CIELAB of a colour as somebody sees it."""
    channels = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = XYZ @ np.clip(np.array(SEE[see]) @ linear, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(seen > (6 / 29) ** 3, np.cbrt(seen), seen * 841 / 108 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def assert_apart(colors):
    """Check that each two colours differ for every eye and in grey."""
    for pair in itertools.combinations(colors, 2):
        for see in SEE:
            difference = np.linalg.norm(np.subtract(*(lab(color, see) for color in pair)))
            assert difference > 25, (pair, see)
        assert abs(np.subtract(*(lab(color, "all")[0] for color in pair))) > 7, (pair, "grey")


def test_methods_drawn_together_differ_for_every_eye_and_in_grey():
    for group in _style.TOGETHER:
        assert_apart([_style.COLORS[method] for method in group])
    for color in [*_style.COLORS.values(), _style.CONTROL]:
        light = ((lab(color, "all")[0] + 16) / 116) ** 3  # luminance
        assert 1.05 / (light + 0.05) >= 3, color  # of white


def test_a_method_has_one_colour_and_controls_are_grey_and_thin():
    names = ["one pool", "rows, removed", "weights, random", "random units", "a new method"]
    look = _style.looks(names)
    assert look["one pool"]["color"] == _style.COLORS["pool"]
    assert look["rows, removed"]["color"] == _style.looks(["rows"])["rows"]["color"]
    for name in ("weights, random", "random units"):
        assert look[name]["color"] == _style.CONTROL and look[name]["linewidth"] == 1
    assert look["a new method"]["color"] not in {look[name]["color"] for name in names[:-1]}
    assert _style.color_of("heads, SVD + IHT on columns, seed 0") != _style.color_of("heads, SVD")


def colors_of(figure):
    """Return the colours of all lines, marks and bars of a figure, as hex."""
    found = set()
    for ax in figure.axes:
        found |= {line.get_color() for line in ax.lines} | {p.get_facecolor() for p in ax.patches}
        found |= {tuple(color) for each in ax.collections for color in each.get_facecolor()}
    return {matplotlib.colors.to_hex(color) for color in found}


def test_what_is_no_method_has_no_methods_colour():
    ranks = pd.DataFrame({"criterion": ["fisher", "random"] * 2, "spearman": [0.9, 0.1] * 2})
    ranks["kind"] = ["heads"] * 2 + ["neurons"] * 2
    curves = pd.DataFrame({"layer": ["a", "b"], "ratio": 0.9, "increase": [1.0, 2.0]})
    drawn = [
        plots.agreement(ranks),
        plots.class_change(changes(3)),
        plots.sensitivity_curves(curves),
    ]
    for each in drawn:
        assert not colors_of(each.figure) & set(_style.COLORS.values())


def test_a_cut_that_was_timed_has_its_methods_colour(timed):
    others = timed.replace({"budget-pool-0.25": "SVD, equal shares, factored"})
    for times, method in ((timed, "pool"), (others, "svd")):
        found = colors_of(plots.speedups(times).figure) & set(_style.COLORS.values())
        assert found == {_style.COLORS[method]}


def test_a_series_is_named_in_words_by_what_tells_it_apart(rows):
    names = set(tables.series(rows))
    assert names == {"dense", "weights", "rows, masked", "rows, removed"}
    assert tables.method_words("structured, random") == "rows, random"


def lines_of(ax):
    """{(x, y), ...} of each line with a marker, by its colour."""
    found = {}
    for container in ax.containers:
        line = container.lines[0]
        heights = np.asarray(line.get_ydata(), float).round(6)
        points = zip(np.asarray(line.get_xdata(), float), heights, strict=True)
        found[line.get_color()] = [tuple(map(float, point)) for point in points]
    return found


def words_of(ax):
    return {" ".join(text.get_text().split()) for text in ax.texts}


def test_tradeoff_draws_points_lost_of_the_last_stage_over_the_share_left(rows):
    ax = plots.tradeoff(rows, "macs")
    assert ax.get_yscale() == "log" and "log axis" in ax.get_ylabel()
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and ax.get_xlim()[0] > ax.get_xlim()[1]
    # The seeds have lost 5 and 4, 9 and 8 points; masked models save no MACs and have no name.
    assert lines_of(ax) == {_style.COLORS["structured"]: [(0.1, 8.5), (0.5, 4.5)]}
    assert "rows, removed, fine-tuned" in words_of(ax)
    tuned = rows[(rows.form == "removed") & (rows.stage == "finetuned")]
    more = tuned.assign(stage="reconstructed", top1=tuned.top1 - 1)
    ax = plots.tradeoff(pd.concat([rows, more]), "macs")
    assert lines_of(ax)[_style.COLORS["structured"]] == [(0.1, 9.5), (0.5, 5.5)]
    assert "rows, removed" in words_of(ax)


@pytest.mark.parametrize("lost, shown", [(-1.0, 0.1), (0.0, 0.1), (0.4, 0.4), (79.0, 79.0)])
def test_what_is_within_the_noise_lies_on_the_edge_of_the_axis(rows, lost, shown):
    even = rows.assign(top1=np.where(rows.method == "dense", 80.0, 80 - lost))
    for ax in (plots.tradeoff(even, "macs"), plots.accuracy_curve(even)):
        assert {y for line in lines_of(ax).values() for _, y in line} == {shown}
        low, high = sorted(ax.get_ylim())
        assert low < 0.1 and high > shown
        assert ax.get_yticklabels()[0].get_text() == "≤ 0.1"


def test_a_cut_is_held_against_the_dense_model_of_its_own_seed(rows):
    gap = rows.assign(top1=rows.top1 - 10.0 * rows.seed)  # between the dense models of both seeds
    gap = gap[(gap.seed == 0) | (gap.method != "structured")]
    gap = gap[gap.form != "removed"]
    ax = plots.accuracy_curve(gap)
    found = lines_of(ax)
    assert found[_style.COLORS["unstructured"]] == [(0.5, 4.5), (0.9, 8.5)]
    assert found[_style.COLORS["structured"]] == [(0.5, 5.0), (0.9, 9.0)]
    assert {"rows, seed 0", "weights"} <= {word.replace("\u00a0", " ") for word in words_of(ax)}


def test_heads_that_all_cuts_have_are_said_once(rows):
    masked = rows[rows.form != "removed"]
    kinds = {"unstructured": "heads+svd", "structured": "heads+iht"}
    ax = plots.accuracy_curve(masked.assign(method=masked.method.replace(kinds)))
    assert {"SVD", "IHT"} <= words_of(ax) and not any("heads" in word for word in words_of(ax))
    assert "heads" in ax.get_xlabel() and "heads" not in plots.accuracy_curve(masked).get_xlabel()


def test_names_at_lines_do_not_overlap():
    ax = _style.new_axes(4, 3)
    ax.set_ylim(0, 1)
    heights = {f"series {i}": (0.5 + 0.001 * i, "k") for i in range(6)} | {"a\nb": (0.99, "k")}
    _style.label_lines(ax, heights)
    ax.figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))


def test_recovery_goes_from_the_cut_to_what_was_won_back(rows):
    ax = plots.recovery(rows)
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names[:2] == ["weights, 50%", "weights, 90%"] and len(names) == 6
    texts = [text.get_text() for text in ax.texts]
    assert texts[:2] == ["50.5 → 75.5 %", "26.5 → 71.5 %"]
    line = ax.lines[0]
    assert line.get_xdata().tolist() == [29.5, 4.5]  # 80 less 50.5 and 75.5


def test_training_curves_stand_beside_each_other_and_are_of_val():
    history = pd.DataFrame(
        [
            {"method": method, "target": target, "epoch": epoch, "train_top1": 9.0}
            for method in ("unstructured", "structured")
            for target in (0.5, 0.9)
            for epoch in (1, 2, 3)
        ]
    )
    figure = plots.training_curves(history.assign(val_top1=50 + history.epoch))
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("share of weights cut", "share of rows cut")
    assert words_of(left) == {"50%", "90%"} and left.get_ylabel() == "val top-1 (%)"
    assert list(right.containers[0].lines[0].get_ydata()) == [51, 52, 53]
    assert plots.training_curves(history).axes[0].get_ylabel() == "training top-1 (%)"


@pytest.mark.parametrize("epoch", [0, 1])  # weights as they were given, or one epoch of training
def test_a_single_epoch_is_a_whole_number(epoch):
    history = pd.DataFrame([{"method": "dense", "target": 0.0, "epoch": epoch, "val_top1": 93.4}])
    figure = plots.training_curves(history)
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [epoch]


def test_zeros_stand_apart_from_the_histogram_of_the_largest_target():
    bins = {"left": [-1.0, -0.5, 0.0, 0.5], "right": [-0.5, 0.0, 0.5, 1.0]}
    stays = {"survivors": [1, 0, 0, 1], "threshold": 0.4}
    dense = pd.DataFrame(
        {"stage": "unpruned", **bins, "count": [1, 20, 20, 1], "zeros": 0, **stays}
    )
    pruned = pd.DataFrame({"stage": "pruned", **bins, "count": [1, 0, 0, 1], "zeros": 40, **stays})
    both = pd.concat([dense, pruned]).assign(method="unstructured", target=0.9)
    milder = both.assign(target=0.5, zeros=7)
    left, right = drawings.weight_histograms(pd.concat([milder, both])).axes
    assert _style.COLORS["unstructured"] in colors_of(right.figure)
    (bar,) = right.containers[0]
    assert bar.get_height() == 40 and bar.get_x() > 1  # beyond the largest weight
    assert left.get_yscale() == "log" and left.get_ylim()[1] > 40
    steps = [
        [p.get_label() for p in ax.patches if "StepPatch" in type(p).__name__]
        for ax in (left, right)
    ]
    assert steps == [["will go", "stay"], ["stay"]]


def test_sensitivity_curves_name_the_three_that_rise_most():
    frame = pd.DataFrame([(f"layer {i}", r, i * r) for i in range(5) for r in (0.1, 0.9)])
    frame.columns = ["layer", "ratio", "increase"]
    ax = plots.sensitivity_curves(frame)
    assert words_of(ax) == {"layer 2", "layer 3", "layer 4"} and len(ax.lines) == 5
    named = frame.assign(layer="layers.0.blocks." + frame.layer.str[-1] + ".mlp.fc1")
    assert "stage 0, block 4, fc1" in words_of(plots.sensitivity_curves(named))
    by_role = frame.rename(columns={"layer": "role"}).assign(layer="all")
    assert "share of one role cut" in plots.sensitivity_curves(by_role).get_xlabel()


def test_agreement_has_a_panel_for_heads_and_one_for_neurons():
    frame = pd.DataFrame(
        {"criterion": ["fisher", "fisher", "random", "random"], "kind": ["heads", "neurons"] * 2}
    ).assign(spearman=[0.9, 0.8, -0.2, 0.1])
    more = frame.assign(kind="weights", spearman=0.5)
    heads, neurons = plots.agreement(pd.concat([frame, more])).axes
    assert (heads.get_title(), neurons.get_title()) == ("heads", "neurons")
    assert [patch.get_width() for patch in heads.patches] == [0.9, -0.2]  # the best on top
    assert [patch.get_width() for patch in neurons.patches] == [0.8, 0.1]


def test_criteria_stand_in_the_order_of_what_they_keep():
    pairs = [(c, m, t) for c in "abc" for m in ("structured", "unstructured") for t in (0.5, 0.9)]
    frame = pd.DataFrame(pairs, columns=["criterion", "method", "target"])
    frame["val_top1"] = frame.criterion.map({"a": 20.0, "b": 70.0, "c": 50.0}) + frame.target
    ax = plots.criteria(frame)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["b", "c", "a"]
    assert words_of(ax) == {"70.9 / 70.9", "50.9 / 50.9", "20.9 / 20.9"}


def test_a_half_is_rounded_alike_in_pictures_tables_and_sentences(rows, tmp_path):
    """Away from zero, as on paper; formats alone round 84.25 to 84.2, and 26.85 either way."""
    for value, words in ((84.25, "84.3"), (26.85, "26.9"), (78.45, "78.5"), (-0.05, "−0.1")):
        assert tables.number(value) == published.number(value) == words
        tables.save_table(pd.DataFrame({"a": [value]}), tmp_path / "a", formats={"a": "{:.1f}"})
        assert words.replace("−", "-") in (tmp_path / "a.md").read_text()
    cut = rows[rows.stage.isin(["dense", "cut"])]
    cut = cut.assign(top1=cut.top1.where(cut.stage == "dense", 26.85))
    assert {text.get_text() for text in plots.recovery(cut).texts} == {"26.9 %"}
    one = pd.DataFrame({"criterion": ["a"], "method": "structured", "target": 0.9})
    assert words_of(plots.criteria(one.assign(val_top1=78.45))) == {"78.5"}
    place = pd.DataFrame({"where": ["blocks.0"], "kind": "heads", "kept": 1, "whole": 8})
    assert "13" in words_of(drawings.widths(place))  # 12.5
    assert published.share(0.1225) == "12.3\u00a0%"  # of three digits


def test_forms_timed_together_differ_and_a_mask_is_grey_as_it_saves_no_time(timed):
    cut = timed[timed.checkpoint != "dense"]
    forms = {"weights, masked": 1.0, "units, removed": 2.0, "SVD, equal shares, factored": 2.0}
    parts = [cut.assign(checkpoint=name, promised=times) for name, times in forms.items()]
    ax = plots.speedups(pd.concat([timed[timed.checkpoint == "dense"], *parts]))
    found = {matplotlib.colors.to_hex(each.get_facecolor()[0]) for each in scatters(ax)}
    grey = matplotlib.colors.to_hex("0.45")
    assert found == {grey, _style.COLORS["units"], _style.COLORS["svd"]}
    assert_apart(found)


# -- time


@pytest.fixture
def timed():
    """Two models in three ways; the second run, on another processor, is ten times as fast where it is not eager."""
    lines = []
    for run, factor in (("seed 0: a", 1), ("seed 1: b", 10)):
        for name, cut in (("dense", 1.0), ("budget-pool-0.25", 2.0)):
            for runtime, own in (("eager", 1.0), ("onnxruntime", 3.0 * factor)):
                about = {"run": run, "checkpoint": name, "runtime": runtime, "precision": "float32"}
                promised = 4.0 if cut > 1 else 1.0
                times = {
                    "speedup": own * cut,
                    "promised": promised,
                    "achieved_here": cut / promised,
                }
                lines.append(about | times | {"batch": 8, "model": "vit"})
    return pd.DataFrame(lines)


def test_what_a_cut_brings_stands_apart_from_what_the_runtime_brings(timed):
    times = tables.like_for_like(timed)
    assert times.cut_speedup.tolist() == [1, 1, 2, 2] * 2
    assert times.runtime_speedup.tolist() == [1, 3, 1, 3, 1, 30, 1, 30]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("budget-pool-0.5", "one pool, 50% left"),
        ("budget-pool+ranks-0.25-relearned", "units, then ranks, 25% left, relearned, no labels"),
        *((f"budget-units-0.5-{stage}", f"units, 50% left, {tables.STAGES[stage]}") for stage in tables.STAGES),
        ("budget-heads+neurons-0.5", "heads and neurons, 50% left"),
        ("structured-0.9-removed", "rows, 90% cut, removed"),
        ("unstructured-0.5", "weights, 50% cut"),
        ("heads-svd+iht-columns-0.4", "heads, SVD + IHT on columns, 40% cut"),
        ("budget-dense", "budget-dense"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_any_stage_has_words(name, words):
    assert tables.checkpoint_words(name) == words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.3.attn.proj", "block 3, proj"),
        ("layers.0.blocks.11.mlp.fc1", "stage 0, block 11, fc1"),
        ("layers.1.downsample.reduction", "stage 1, merging"),
        ("layers.1.blocks.0", "stage 1, block 0"),
        ("patch_embed.proj", "stem, proj"),
        ("patch_embed.steps.4", "stem, step 4"),
        ("qkv", "qkv"),
    ],
)
def test_a_layer_has_words(name, words):
    assert tables.layer_words(name) == words


def test_no_mark_lies_between_two_processors(timed):
    ax = plots.speedups(timed)
    marks = sorted(each.get_offsets().data[0][0] for each in scatters(ax))
    assert marks == [2, 2, 2, 2, 3, 30]  # the cut in two runtimes and runs; the runtime in two runs
    assert words_of(ax) == {
        "the runtime alone, dense model",
        "one pool, 25% left",
    }
    (promise,) = [each for each in ax.collections if type(each).__name__ == "LineCollection"]
    assert promise.get_segments()[0][0][0] == 4
    alone = timed[timed.run == "seed 0: a"].drop(columns="run")
    assert len(scatters(plots.speedups(alone))) == 3


@pytest.fixture
def bench():
    """Rows of a benchmark: ours, and two settings of the other tool, of which the second is better at 0.5."""
    tops = {"vitlab, pool": 78.0, "Torch-Pruning, a": 60.0, "Torch-Pruning, b": 65.0}
    lines = [("dense", 1.0, 0, "cut", 80.0, None)]
    for (tool, top1), seed in itertools.product(tops.items(), (0, 1)):
        lines.append((tool, 0.5, seed, "cut", top1 - 20 * (tool != "vitlab, pool"), None))
        for lr in (0.1, 0.2):  # the first is better on val
            lines.append((tool, 0.5, seed, "finetuned", top1 + 10 * (lr == 0.2), lr))
    frame = pd.DataFrame(lines, columns=["tool", "budget", "seed", "stage", "top1", "lr"])
    frame["val_top1"] = frame.lr.map({0.1: 70.0, 0.2: 60.0})
    return frame.assign(model="small ViT")


def test_peers_are_taken_at_their_best(bench):
    lines = tables.peers(bench)
    assert set(lines.tool) == {"vitlab, pool", "Torch-Pruning, b"}
    lost = lines.groupby("name").lost.mean().to_dict()
    assert lost == {
        "vitlab, nothing trained": 2,
        "Torch-Pruning, fine-tuned": 15,
        "Torch-Pruning, as cut": 35,
    }
    (ax,) = plots.peers(lines).axes
    assert [container.lines[0].get_ydata().tolist() for container in ax.containers] == [
        [2],
        [15],
        [35],
    ]
    assert ax.containers[0].lines[0].get_color() == _style.COLORS["pool"]


def test_backbones_have_a_panel_a_data_set_and_peers_are_grey():
    cuts = itertools.product(
        ("Caltech-101", "CIFAR-10"), ("vitlab, pool", "CORP"), (0.5, 0.75), (0, 1)
    )
    lines = [(*key, 100 * key[2] + key[3]) for key in cuts]
    lines += [(data, "dense", 1.0, 0, 90.0) for data in ("Caltech-101", "CIFAR-10")]
    columns = ["data", "method", "budget", "draw", "probe_kept"]
    panels = plots.backbones(pd.DataFrame(lines, columns=columns)).axes
    assert [ax.get_title() for ax in panels] == ["Caltech-101", "CIFAR-10"]
    for ax in panels:
        colors = {c.lines[0].get_color(): c.lines[0].get_ydata().tolist() for c in ax.containers}
        means = [50.5, 75.5]
        assert colors == {_style.CONTROL: means, _style.COLORS["pool"]: means}
        assert {text.get_text() for text in ax.texts} == {"dense", "CORP", "vitlab, pool"}


def test_the_name_of_a_line_that_ends_early_stands_at_its_end():
    lines = [("vitlab, pool", 0.75, 80.0), ("vitlab, pool", 0.35, 70.0), ("CORP", 0.75, 60.0)]
    lines += [("CORP", 0.5, 50.0), ("dense", 1.0, 90.0)]
    table = pd.DataFrame(lines, columns=["method", "budget", "probe_kept"])
    (ax,) = plots.backbones(table.assign(data="Caltech-101", draw=0)).axes
    ends = {text.get_text(): text.xy for text in ax.texts if hasattr(text, "xy")}
    assert ends == {"CORP": (0.5, 50.0)}
    assert len(ax.texts) == 3 and ax.figure.get_figwidth() == _style.WIDE[0]


def test_the_best_peer_has_its_name_at_the_last_share_but_one_too():
    tops = {"vitlab, pool": (80, 75, 70), "CORP": (78, 70, 40), "SVD, whitened": (76, 65, 41)}
    table = pd.DataFrame(tops, index=[0.75, 0.5, 0.35]).rename_axis("budget").reset_index()
    table = table.melt("budget", var_name="method", value_name="probe_kept")
    table.loc[len(table)] = 1.0, "dense", 90
    (ax,) = plots.backbones(table.assign(data="Caltech-101", draw=0)).axes
    named = {text.get_text(): text.xy for text in ax.texts if hasattr(text, "xy")}
    assert named == {"CORP": (0.5, 70)}


# -- recovery, step by step


def test_the_ladder_has_a_panel_per_share_and_a_line_per_method(rows):
    cuts = rows[(rows.form == "removed") & rows.target.eq(0.5)].assign(target_kind="macs")
    cuts = pd.concat([cuts.assign(method="pool"), cuts.assign(method="random", top1=40.0)])
    half = cuts.assign(form="removed")
    quarter = half.assign(target=0.25, top1=half.top1 - 10)
    unreachable = half.head(1).assign(method="svd", stage="unreachable", top1=np.nan)
    dense = rows[rows.method == "dense"]
    # removed rows were tuned only
    figure = plots.ladder(pd.concat([dense, half, quarter, unreachable]))
    assert [ax.get_title() for ax in figure.axes] == ["50% of the MACs", "25% of the MACs"]
    steps = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert steps == ["after the cut", "fine-tuned"]
    found = lines_of(figure.axes[1])
    assert found[_style.COLORS["pool"]] == [(0, 39.5), (1, 14.5)]
    assert words_of(figure.axes[1]) == {"one pool", "random units"}


def test_means_of_small_losses_are_drawn_where_they_are():
    lost = pd.Series([-0.3, 0.1, 0.5, 0.0, 0.0])
    drawn = tables.ranges_of(lost.groupby([0, 0, 0, 1, 1]), _style.FLOOR)
    expected = [[0.1, 0.0, 0.4], [_style.FLOOR, 0, 0]]  # not 0.7 / 3, the mean of what is drawn
    assert drawn.to_numpy() == pytest.approx(np.array(expected))


def test_a_ladder_is_of_one_kind_of_budget(rows):
    other = rows.assign(target_kind=rows.target_kind.where(rows.target != 0.5, "macs"))
    with pytest.raises(ValueError, match="one kind of budget, and the results have"):
        plots.ladder(other)
    with pytest.raises(ValueError, match=r"the results have \[\]"):
        plots.ladder(rows[rows.method == "dense"])


# -- the audit


def test_the_audit_draws_budgets_by_fisher_and_says_how_far_off_they_are(audit):
    more = audit.assign(kind="units")
    ax = plots.prediction_audit(pd.concat([audit, more]))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and ax.get_xlim() == ax.get_ylim()
    drawn = scatters(ax)[-1]
    places = {tuple(place) for place in np.round(drawn.get_offsets().data, 6).tolist()}
    assert places <= {(0.1, 0.2), (1, 0.9), (2, 1), (0.2, -0.5)} and (0.1, 0.2) in places
    corrected = plots.prediction_audit(more.assign(expected=more.measured.abs()))
    hollow = [tuple(each) for each in scatters(corrected)[-2].get_offsets().data.tolist()]
    assert hollow and all(x == y for x, y in hollow)
    assert not len(scatters(corrected)[-2].get_facecolors())
    far = more.assign(measured=more.predicted * 20)
    (legend,) = plots.prediction_audit(far[far.criterion == "fisher"]).figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert any("up to 20 × too low" in word for word in words)
    with pytest.raises(ValueError, match="nothing to show"):
        plots.prediction_audit(audit.assign(predicted=0.0, measured=-1.0))


# -- the best model under a cost


@pytest.fixture
def study():
    """Rows of two models and three seeds, of random accuracy and cost, and of their dense models."""
    rng, measured = np.random.default_rng(0), []
    for model, seed in [(model, seed) for model in ("vit", "swin") for seed in range(3)]:
        about = {"model": model, "seed": seed}
        measured.append(
            about | {"method": "dense", "stage": "dense", "top1": 80 + seed, "macs": 1000 + seed}
        )
        for method, target, stage in [
            (m, t, s) for m in "abc" for t in (0.2, 0.6) for s in ("cut", "finetuned")
        ]:
            row = about | {"method": method, "form": "removed", "target": target, "stage": stage}
            measured.append(
                row | {"top1": rng.uniform(10, 80), "macs": 1000 * target * rng.uniform(0.9, 1.1)}
            )
    return pd.DataFrame(measured)


@pytest.mark.parametrize("limits", [(0.75, 0.5, 0.25), (1,), (0.6, 0.61, 0.001)])
@pytest.mark.parametrize("val", [None, "some", "all"])
def test_no_model_that_fits_is_better_than_the_best(study, limits, val, monkeypatch):
    monkeypatch.setattr(tables, "_LIMITS", limits)
    if val:
        study["val_top1"] = 90 - study.top1  # another order than on test
        study.loc[(study.method == "b") & (val == "some"), "val_top1"] = np.nan
    best = tables.best_under(study, "macs")
    assert best[["model", "limit"]].values.tolist() == [
        [model, x] for model in ("vit", "swin") for x in limits
    ]
    for row in best.itertuples():
        own = study[study.model == row.model]
        dense = own[own.method == "dense"].set_index("seed")
        fits = []
        for (method, _target, stage), part in own.groupby(
            ["method", "target", "stage"], dropna=False
        ):
            share = (part.macs / part.seed.map(dense.macs)).mean()
            score = part.val_top1.mean() if val else part.top1.mean()
            if share <= row.limit * 1.01 and not np.isnan(score):
                fits.append((score, method, stage, share, part.top1.mean()))
        if not fits:
            assert row.method == "none" and np.isnan(row.top1) and row.limit < 0.1
            continue
        _, method, stage, share, top1 = max(fits)
        assert (row.method, row.stage, row.seeds, row.chosen_on) == (
            method,
            stage,
            3,
            "val" if val else "test",
        )
        assert (row.share, row.top1, row.dense) == pytest.approx((share, top1, 81))


def test_the_best_by_hand(monkeypatch):
    about = {"model": "vit", "seed": 0, "criterion": np.nan}
    rows = [
        about | {"method": "dense", "stage": "dense", "top1": 90, "params": 100},
        about | {"method": "dense", "stage": "dense+epochs", "top1": 91, "params": 100},
        about
        | {
            "method": "pool",
            "stage": "finetuned",
            "top1": 85,
            "params": 50.4,
            "val_top1": 80,
        },  # by the slack
        about | {"method": "svd", "stage": "finetuned", "top1": 84, "params": 40, "val_top1": 81},
        about | {"method": "lucky", "stage": "cut", "top1": 89, "params": 45},  # never seen on val
        about | {"method": "half of the seeds", "stage": "cut", "top1": np.nan, "params": 1},
    ]
    monkeypatch.setattr(tables, "_LIMITS", [1, 0.5, 0.25])
    best = tables.best_under(pd.DataFrame(rows), "params")
    assert best.method.tolist() == ["svd", "svd", "none"] and best.chosen_on.tolist()[:2] == [
        "val",
        "val",
    ]
    assert best.loc[0, ["cost", "limit", "top1", "dense", "share", "value", "seeds"]].tolist() == [
        *("params", 1, 84, 90, 0.4, 40, 1),
    ]
    on_test = tables.best_under(pd.DataFrame(rows).drop(columns="val_top1"), "params")
    assert on_test.method.tolist() == ["dense", "lucky", "none"] and set(
        on_test.chosen_on.dropna()
    ) == {"test"}
    dense_only = pd.DataFrame(rows[:2])
    assert tables.best_under(dense_only, "params").empty


def test_of_fewer_seeds_stands_back(study):
    one = study[study.method == "a"].query("seed == 0").assign(method="once", top1=99.0)
    assert "once" not in set(tables.best_under(pd.concat([study, one]), "macs").method)


def test_what_best_under_cannot_answer_is_an_error(study):
    with pytest.raises(ValueError, match="unknown cost 'mac', did you mean 'macs'"):
        tables.best_under(study, "mac")
    with pytest.raises(ValueError, match="no result of stage dense"):
        tables.best_under(study[study.method != "dense"], "macs")


# -- the prediction audit


@pytest.mark.parametrize("count", [3, 10, 50])
def test_the_audit_has_the_rank_correlation_of_pandas(count):
    rng = np.random.default_rng(count)
    frame = pd.DataFrame({"criterion": "fisher", "kind": rng.choice(["heads", "ranks"], count)})
    frame["predicted"] = rng.integers(0, 5, count).astype(float)  # ties, and no rise predicted
    frame["measured"] = frame.predicted + rng.normal(0, 2, count)
    table = tables.audit_table(frame)
    assert table.cuts.sum() == count
    for row in table.itertuples():
        part = frame[frame.kind == row.kind]
        assert np.isnan(row.corrected)
        if row.cuts > 2 and part.predicted.nunique() > 1:
            expected = part[["predicted", "measured"]].corr("spearman").iloc[0, 1]
            assert row.spearman == pytest.approx(expected)
        else:
            assert np.isnan(row.spearman)
        ratios = (part.measured / part.predicted)[part.predicted > 0]  # from 1 nat on
        assert row.ratio == pytest.approx(ratios.median(), nan_ok=True)


def test_the_audit_by_hand_and_its_ends():
    frame = pd.DataFrame({"kind": ["heads"] * 4 + ["ranks"] * 2 + ["none"] * 3 + ["tiny"] * 3})
    frame["predicted"] = [1.0, 2, 3, np.nan, 1, 2, 0, 0, 0, 1e-11, 1e-9, 1e-6]
    frame["measured"] = [2.0, 8, 3, 1, 1, 1, 1, 2, 3, -1e-6, 9e-4, 2e-3]
    frame["expected"] = [2.0, 4, np.nan, np.nan, 1, 1, 1, 2, 3, 0, 0, 1e-3]
    table = tables.audit_table(frame, by=["kind"]).set_index("kind")
    by_hand = {
        "heads": [3, 0.5, 2, 1.5],  # ranks 1 2 3 against 1 3 2; ratios 2, 4, 1
        "ranks": [2, np.nan, 0.75, 1],
        "none": [3, np.nan, np.nan, 1],
        "tiny": [3, np.nan, 2000, 2],  # those below a millinat have no order and no ratio
    }
    for kind, numbers in by_hand.items():
        assert table.loc[kind].tolist() == pytest.approx(numbers, nan_ok=True)
    assert tables.audit_table(frame.head(0), by=["kind"]).empty
    with pytest.raises(ValueError, match="unknown column 'criterion'"):
        tables.audit_table(frame)


@pytest.fixture
def audit():
    kinds = [("fisher", "heads"), ("fisher", "ranks"), ("random", "heads")]
    frame = pd.DataFrame([(*kind, target) for kind in kinds for target in (0.5, 0.25)])
    frame.columns = ["criterion", "kind", "target"]
    return frame.assign(
        predicted=[0.1, 1.0, 0.2, 2.0, 1e-9, 0.0], measured=[0.2, 0.9, -0.5, 1.0, 0.05, -1.0]
    )


# -- recovery


# -- what was forgotten


def changes(count, seeds=1):
    one = pd.DataFrame({"class": [f"c{i}" for i in range(count)], "images": range(count)})
    one["change"] = [
        (7 * i) % count - count / 2 for i in range(count)
    ]  # all different, in no order
    return pd.concat([one.assign(seed=seed, change=one.change + seed) for seed in range(seeds)])


@pytest.mark.parametrize("count, shown", [(1, 1), (12, 12), (13, 12), (101, 12)])
@pytest.mark.parametrize("seeds", [1, 2])
def test_classes_are_sorted_by_what_was_forgotten(count, shown, seeds):
    frame = changes(count, seeds)
    ax = plots.class_change(frame)
    (bars,) = [each for each in ax.containers if type(each).__name__ == "BarContainer"]
    change = frame.groupby("class").change.mean().sort_values()
    expected = change if shown == count else pd.concat([change.head(6), change.tail(6)])
    assert [bar.get_width() for bar in bars] == expected.tolist() and len(bars) == shown
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == [f"{name} ({name[1:]})" for name in expected.index]  # class ci has i images
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the worst on top
    gap = [text.get_text() for text in ax.texts if "classes" in text.get_text()]
    assert gap == ([f"… {count - 12} classes between …"] if count > 12 else [])


def test_classes_without_images_are_left_out():
    frame = changes(3)
    frame.loc[1, "change"] = np.nan
    assert len(plots.class_change(frame).get_yticks()) == 2
    with pytest.raises(ValueError, match="no class has a change"):
        plots.class_change(frame.assign(change=np.nan))


def test_changed_images_say_what_was_seen_before_and_after():
    class Split:
        store, indices = np.arange(9 * 48, dtype=np.uint8).reshape(9, 4, 4, 3), np.array([5, 6, 7])

        def __len__(self):
            return len(self.indices)

    frame = pd.DataFrame(
        {"image": [2, 0], "label": ["ant", "bee"], "before": ["ant", "cat"], "after": "bee"}
    )
    figure = drawings.changed_images(Split(), frame)
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == ["ant:\nant\n→ bee", "bee:\ncat\n→ bee"]
    assert (shown[0].images[0].get_array() == Split.store[7]).all()
    assert [ax.title.get_color() for ax in shown] == [
        _style.BAD,
        _style.GOOD,
    ]  # forgotten, learned
    for wrong in (frame.head(0), frame.assign(image=3)):
        with pytest.raises(ValueError, match="places of images in a split of 3"):
            drawings.changed_images(Split(), wrong)


# -- a figure for each model


@pytest.fixture
def shown(monkeypatch):
    """Return what draw_each displays: a list that fills."""
    figures = []
    monkeypatch.setattr(plots, "display", figures.append)
    return figures


@pytest.fixture
def results():
    rows = pd.DataFrame(
        [(m, s) for m in ("vit", "swin") for s in (0, 1)], columns=["model", "seed"]
    )
    return rows.assign(date="2026-01-02", commit=rows.model + rows.seed.astype(str))


def test_a_figure_for_each_model_is_saved_with_its_caption_and_shown(results, shown, tmp_path):
    table = pd.DataFrame(
        {"model": ["vit", "swin"], "seed": 0, "kind": "heads", "spearman": [0.9, 0.8]}
    )
    table = pd.concat(
        [table.assign(criterion="fisher"), table.assign(criterion="random", spearman=0.0)]
    )
    tables, about = {"agreement": table}, {"results": results, "folder": tmp_path}
    plots.draw_each(tables, "agreement", plots.agreement, **about)
    about |= {"table": "agreement", "note": "First: {criterion}, {spearman:.0%}."}
    plots.draw_each(tables, "ranks", plots.agreement, **about)
    names = ["agreement-swin", "agreement-vit", "ranks-swin", "ranks-vit"]
    assert sorted(path.stem for path in tmp_path.glob("*.svg")) == names and len(shown) == 4
    plots.save(plots.agreement(table[table.model == "swin"]), tmp_path / "known")
    assert (tmp_path / "known.svg").read_bytes() == (tmp_path / "agreement-swin.svg").read_bytes()
    words = caption(results, table[table.model == "swin"])
    assert "; swin; seeds 0, split" in words and "commit swin0," in words
    assert (tmp_path / "agreement-swin.txt").read_text() == words + "\n"
    assert (tmp_path / "ranks-swin.txt").read_text() == words + " First: fisher, 80%.\n"


def test_where_a_table_is_missing_nothing_is_drawn(results, shown, tmp_path):
    plots.draw_each({}, "agreement", plots.agreement, results=results, folder=tmp_path)
    assert not shown and not list(tmp_path.iterdir())


def test_a_figure_for_each_kind_has_the_controls_a_title_and_says_where_rows_come_from(
    rows, shown, tmp_path
):
    rows = rows.assign(model="vit", date="2026-01-02", commit="abc")
    half = rows[(rows.target == 0.5) & (rows.form == "masked")].assign(target_kind="macs")
    dense = rows[rows.method == "dense"]
    frames = {"ladder": pd.concat([half, half.assign(target=0.25, top1=half.top1 - 10)])}
    about = {"results": rows.assign(commit="other"), "folder": tmp_path, "controls": dense}
    plots.draw_each(frames, "ladder", plots.ladder, per="kind", **about)
    assert {path.stem for path in tmp_path.iterdir()} == {"ladder-macs-vit"}
    known = plots.ladder(pd.concat([dense, frames["ladder"]]))
    plots.save(known, tmp_path / "known")
    picture = tmp_path / "ladder-macs-vit.svg"
    assert (tmp_path / "known.svg").read_bytes() == picture.read_bytes()
    text = (tmp_path / "ladder-macs-vit.txt").read_text()
    assert text == caption(pd.concat([dense, frames["ladder"]])) + "\n"
    assert "ends better" not in picture.read_text()
    plots.draw_each(frames, "ladder", plots.ladder, per="kind", titled=True, **about)
    drawn = re.sub(r"\s*<[^>]*>\s*|\s+", " ", picture.read_text())
    title = (
        "No cut to 25% of the MACs ends better than rows: it loses 39.5 points after the cut, and "
    )
    title += "14.5 fine-tuned (ViT)"
    assert all(word in drawn for word in (*title.split(), "commit", "abc,"))
    alone = pd.concat([dense, frames["ladder"][frames["ladder"].stage == "cut"]])
    assert plots._ladder_says(alone).endswith("it loses 39.5 points after the cut")
    few = frames["ladder"].drop(
        frames["ladder"].query("method == 'structured' and seed == 1").index
    )
    assert " than weights: " in plots._ladder_says(pd.concat([dense, few]))


def with_legends(rows, timed, audit):
    """Yield a figure of each function that puts a legend on top of the panels."""
    half = rows[rows.form.isna() | (rows.form == "masked")].assign(target_kind="macs")
    yield plots.ladder(half)
    yield plots.recovery(half).figure
    yield plots.speedups(timed).figure
    yield plots.prediction_audit(audit).figure
    for name, draw in {
        "criteria": plots.criteria,
        "layer_distributions": drawings.weight_violins,
        "spectra": drawings.spectra,
    }.items():
        table = pd.read_csv(FIGURES / COMMITTED[0] / f"table-{name}.csv")
        first = table.drop_duplicates(["model", "seed"]).iloc[0]
        yield draw(table[(table.model == first.model) & (table.seed == first.seed)]).figure


class Boxes(matplotlib.artist.Artist):
    """Note where the title, the legend and the panels of a figure lie when it is drawn."""

    def draw(self, renderer):
        panels = self.figure.axes
        title, _source = self.figure.texts[-2:]
        seen = [
            title,
            *self.figure.legends,
            *(ax.title for ax in panels if ax.get_title()),
            *panels,
        ]
        self.found = [each.get_window_extent(renderer).frozen() for each in seen]


def test_a_title_and_a_legend_have_places_of_their_own(rows, timed, audit, tmp_path):
    title = "A title of several lines " * 6
    for figure in with_legends(rows, timed, audit):
        boxes = figure.add_artist(Boxes())
        boxes.set_in_layout(False)
        plots.save(figure, tmp_path / "titled", caption="where it comes from", title=title)
        above, legend, *panels = boxes.found
        assert len(figure.legends) == 1 and above.y0 > legend.y1
        assert all(legend.y0 > each.y1 for each in panels)


def test_a_missing_target_is_left_out_of_the_name(results, shown, tmp_path):
    table = changes(3).assign(model="vit", target_kind=None, target=np.nan)
    draw = {"draw": plots.class_change, "results": results, "folder": tmp_path, "per": "target"}
    plots.draw_each({"classes": table}, "classes", **draw)
    plots.draw_each(
        {"classes": table.drop(columns=["target_kind", "target"])}, "few", table="classes", **draw
    )
    assert {path.stem for path in tmp_path.iterdir()} == {"classes-vit", "few-vit"}
