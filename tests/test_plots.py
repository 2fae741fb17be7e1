import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

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


@pytest.fixture
def uneven(rows):
    """The same with 10 points between the dense models of both seeds, and `structured` of the first seed alone."""
    rows = rows.assign(top1=rows.top1 - 10.0 * rows.seed)
    return rows[(rows.seed == 0) | (rows.method != "structured")]


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_pareto_front_is_what_no_point_beats(count):
    rng = np.random.default_rng(count)
    cost, value = (pd.Series(rng.integers(0, 6, count)) for _ in range(2))  # small integers: ties
    front = tables.pareto(cost, value)
    for i in range(count):
        beaten = ((cost <= cost[i]) & (value > value[i])) | ((cost < cost[i]) & (value >= value[i]))
        assert front[i] != beaten.any()
    assert value[front].max() == value.max() and cost[front].min() == cost.min()


def test_pareto_by_hand():
    cost, value = (
        pd.Series([1, 2, 3, 3], index=list("abcd")),
        pd.Series([5, 4, 6, 7], index=list("abcd")),
    )
    assert tables.pareto(cost, value).to_dict() == {"a": True, "b": False, "c": False, "d": True}


def test_a_series_is_named_by_what_tells_it_apart(rows):
    names = tables.series(rows)
    assert set(names) == {"dense", "unstructured", "structured, masked", "structured, removed"}


def scatters(ax):
    """Return the collections that scatter has drawn."""
    return [artist for artist in ax.collections if type(artist).__name__ == "PathCollection"]


def dots(ax):
    """Return what scatter has drawn: rings around the front, then markers."""
    collections = scatters(ax)
    assert collections[0].get_facecolor().size == 0
    return collections


def places(collections):
    """Return the points of collections as tuples."""
    points = np.concatenate([collection.get_offsets().data for collection in collections])
    return [tuple(point) for point in points.round(3).tolist()]


def test_tradeoff_shows_no_model_that_was_only_cut(rows):
    ax = plots.tradeoff(rows, "macs")
    assert ax.get_xlabel() == "MACs of one image (M)" and ax.get_ylabel() == "test top-1 (%)"
    methods = ["unstructured", "structured, masked", "structured, removed"]
    assert labels(ax) == ["best for its cost", "dense", "dense, same epochs", *methods]
    rings, *points = dots(ax)
    assert set(places(points)) == {
        (4, 80),
        (4, 75.5),
        (4, 71.5),
        (2, 75.5),
        (0.4, 71.5),
    }  # means over both seeds
    assert places([rings]) == [
        (0.4, 71.5),
        (2, 75.5),
        (4, 80),
        (4, 80),
    ]  # dense, and with as many epochs
    bars = [
        segment[:, 1]
        for each in ax.containers
        for line in each.lines[2]
        for segment in line.get_segments()
    ]
    assert {(75.0, 76.0), (71.0, 72.0)} <= {tuple(np.round(bar, 6)) for bar in bars}


def test_tradeoff_takes_the_last_stage_and_reconstruction_hollow(rows):
    tuned = rows[(rows.stage == "finetuned") & (rows.method == "unstructured")]
    more = [
        tuned.assign(stage="distilled", top1=77.0),
        tuned.assign(stage="reconstructed", top1=76.0),
    ]
    ax = plots.tradeoff(pd.concat([rows, *more]), "macs")
    assert labels(ax)[-1].startswith("hollow: reconstructed")
    _, *points = dots(ax)
    assert (4, 77) in places(points) and (4, 75.5) in places(
        points
    )  # the other methods were not distilled
    hollow = [each for each in points if each.get_facecolor().tolist() == [[1, 1, 1, 1]]]
    assert places(hollow) == [(4, 76), (4, 76)]


def test_controls_are_grey_and_a_series_looks_the_same_in_every_figure(rows):
    both = pd.concat([rows, rows[rows.method == "unstructured"].assign(method="random")])
    look = _style.looks([*tables.series(both), "pool, random"])
    for name in ("random", "pool, random", "dense"):
        assert float(look[name]["color"])  # "0.6" and the like: a grey
    hues = [look[name]["color"] for name in look if name not in ("random", "pool, random", "dense")]
    assert len(set(hues)) == 3 and "#949494" not in _style.HUES
    assert look["random"]["marker"] != look["pool, random"]["marker"]
    names = tables.series(both)
    for part in (both, both[both.method != "unstructured"]):
        (dot,) = [
            each
            for each in dots(plots.tradeoff(part, names=names))
            if each.get_label().endswith("masked")
        ]
        assert matplotlib.colors.to_hex(dot.get_facecolor()[0]) == _style.HUES[1]


@pytest.mark.parametrize("low, high", [(0, 100), (10, 84.7), (83, 84), (99.9, 99.9)])
def test_accuracy_is_stretched_at_its_top(low, high):
    ax = matplotlib.pyplot.subplots()[1]
    plots._accuracy_axis(ax, low, high)
    bottom, top = ax.get_ylim()
    ticks = ax.get_yticks()
    assert (
        bottom < low
        and high < top
        and (np.diff(ticks) > 0).all()
        and (ticks == ticks.round()).all()
    )
    assert (
        len(ticks) >= (2 if high - low > 2 else 1) and ticks.min() >= bottom and ticks.max() <= top
    )
    places = ax.transData.transform(np.column_stack([np.zeros(5), np.linspace(low, high, 5)]))[:, 1]
    assert (np.diff(places, 2) >= -1e-9).all()  # equal steps take more and more room
    back = ax.transData.inverted().transform(ax.transData.transform([(0, low), (0, high)]))[:, 1]
    np.testing.assert_allclose(back, [low, high], atol=1e-9)


def levels(ax):
    """{label: height} of the horizontal lines."""
    return {
        line.get_label(): line.get_ydata()[0]
        for line in ax.lines
        if len(set(line.get_ydata())) == 1
    }


@pytest.mark.parametrize("draw", [plots.accuracy_curve, plots.recovery, plots.ladder])
def test_cuts_of_one_seed_have_a_dense_line_of_their_own(uneven, draw):
    half = uneven[(uneven.target == 0.5) | (uneven.method == "dense")]
    half = half.assign(form="masked").drop_duplicates(["method", "target", "stage", "seed"])
    ax = draw(half)
    dense_lines = {
        label: height for label, height in levels(ax).items() if label.startswith("dense, seed")
    }
    assert dense_lines == {"dense, seeds 0, 1": 75, "dense, seed 0": 80}
    if draw is plots.recovery:
        assert [tick.get_text() for tick in ax.get_xticklabels()] == [
            "unstructured\n50%",
            "structured\n50%\nseed 0",
        ]
    else:
        assert {"structured, seed 0", "unstructured"} < set(labels(ax))
    alone = draw(half[half.method != "unstructured"])
    assert levels(alone)["dense"] == 80 and not [name for name in labels(alone) if "seed" in name]


def test_a_point_of_one_seed_is_not_ringed_among_points_of_two(uneven):
    ax = plots.tradeoff(uneven, "macs")
    rings, *points = dots(ax)
    assert (0.4, 71) in places(points) and (2, 75) in places(
        points
    )  # of seed 0: more than the dense models' mean
    assert places([rings]) == [(4, 75), (4, 75)]
    assert labels(ax)[
        0
    ] == "best for its cost,\nof 2 seeds" and "structured, removed, seed 0" in labels(ax)
    alone = plots.tradeoff(
        uneven[uneven.method != "unstructured"], "macs"
    )  # dense models of what was cut alone
    assert (4, 80) in places(dots(alone)[:1]) and labels(alone)[0] == "best for its cost"


@pytest.mark.parametrize("count", [7, 25, 347, 1736])
def test_bars_of_equal_seeds_have_no_length(count):
    """The mean of three equal top-1 may be an ulp beside them: 7 of 1,736 is."""
    top1 = 100 * count / 1736
    cut = {
        "method": "pool",
        "target": 0.5,
        "target_kind": "macs",
        "stage": "cut",
        "top1": top1,
        "macs": 0.1,
    }
    dense = {"method": "dense", "stage": "dense", "top1": 90.0, "macs": 0.3}
    rows = pd.DataFrame([row | {"seed": seed} for seed in range(3) for row in (cut, dense)])
    more = rows.assign(
        top1=rows.top1 + rows.seed.where(rows.stage == "cut", 0) / 9, stage="finetuned"
    )
    more = more[more.method == "pool"]
    for draw in (plots.ladder, plots.accuracy_curve):
        draw(pd.concat([rows, more]))
    plots.tradeoff(pd.concat([rows.replace({"stage": {"cut": "reconstructed"}}), more]), "macs")
    plots.class_change(
        pd.DataFrame({"class": ["a", "b"] * 3, "images": 1, "change": [top1, 1, top1, 2, top1, 3]})
    )


def test_tradeoff_names_the_costs_there_are(rows):
    with pytest.raises(ValueError, match="unknown cost 'mac', did you mean 'macs'"):
        plots.tradeoff(rows, "mac")
    with pytest.raises(ValueError, match="measured in 6_efficiency"):
        plots.tradeoff(rows.assign(latency_ms=np.nan), "latency_ms")


def test_accuracy_curve_has_a_line_for_every_series_and_stage(rows):
    ax = plots.accuracy_curve(rows)
    assert len(ax.containers) == 3 * 2
    mean = ax.containers[0].lines[0]
    assert list(mean.get_xdata()) == [0.5, 0.9]
    assert labels(ax)[-2:] == ["dense", "dense, same epochs"]


def test_recovery_bars_are_as_high_as_the_mean_top1(rows):
    ax = plots.recovery(rows)
    cut, tuned = ax.containers
    assert [bar.get_height() for bar in cut] == [50.5, 26.5] * 3
    assert [bar.get_height() for bar in tuned] == [75.5, 71.5] * 3
    assert [tick.get_text() for tick in ax.get_xticklabels()][:2] == [
        "unstructured\n50%",
        "unstructured\n90%",
    ]


def test_training_curves_stand_beside_each_other():
    history = pd.DataFrame(
        [
            {"method": method, "target": target, "epoch": epoch, "train_top1": 50 + epoch}
            for method in ("unstructured", "structured")
            for target in (0.5, 0.9)
            for epoch in (1, 2, 3)
        ]
    )
    left, right = plots.training_curves(history).axes
    assert (left.get_title(), right.get_title()) == ("unstructured", "structured")
    assert labels(left) == ["50% cut", "90% cut"]
    assert list(right.containers[0].lines[0].get_ydata()) == [51, 52, 53]


def test_zeros_stand_apart_from_the_histogram():
    bins = {"left": [-1.0, -0.5, 0.0, 0.5], "right": [-0.5, 0.0, 0.5, 1.0]}
    stays = {"survivors": [1, 0, 0, 1], "threshold": 0.4}
    dense = pd.DataFrame(
        {"stage": "unpruned", **bins, "count": [1, 20, 20, 1], "zeros": 0, **stays}
    )
    pruned = pd.DataFrame({"stage": "pruned", **bins, "count": [1, 0, 0, 1], "zeros": 40, **stays})
    both = pd.concat([dense, pruned]).assign(method="unstructured", target=0.5)
    left, right = drawings.weight_histograms(both).axes
    assert left.get_ylabel() == "unstructured 50%\nweights"
    assert left.get_yscale() == right.get_yscale() == "log"
    (bar,) = right.containers[0]
    assert bar.get_height() == 40 and bar.get_x() > 1  # beyond the largest weight
    assert left.get_ylim()[1] > 40
    steps = [
        [p.get_label() for p in ax.patches if "StepPatch" in type(p).__name__]
        for ax in (left, right)
    ]
    assert steps == [["will go", "stay"], ["stay"]] and len(left.lines) == len(right.lines) == 2


def test_maps_keep_the_order_of_blocks_and_leave_holes():
    frame = pd.DataFrame(
        {"block": ["b.10", "b.2", "b.2"], "head": [0, 0, 1], "score": [1.0, 2.0, 3.0]}
    )
    ax = drawings.heads(frame.assign(kept=[True, False, True]))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["b.10", "b.2"]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]  # b.10 has no head 1
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
    assert labels(figure.axes[-1]) == ["dense", "pool", "units"]
    assert kinds[0].replace("macs", "MACs") in figure.get_supxlabel()
    for ax, dense in zip(figure.axes, (80, 70, 60.5), strict=True):
        whole, *cuts = [
            np.asarray(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 2
        ]
        assert whole.tolist() == [dense] * 2
        points = [line for line in cuts if line.max() < dense]
        assert any(np.allclose(sorted(line), [dense - 15, dense - 10]) for line in points)  # pool
        assert any(np.allclose(sorted(line), [dense - 30, dense - 20]) for line in points)


def test_sensitivity_curves_draw_a_line_per_block_and_a_panel_per_role():
    frame = pd.DataFrame(
        {
            "role": ["qkv"] * 4 + ["fc1"] * 2,
            "block": ["a", "a", "b", "b", "a", "a"],
            "ratio": [0.1, 0.9] * 3,
        }
    ).assign(increase=[0.0, 1, 0, 2, 0, 3])
    figure = plots.sensitivity_curves(frame)
    assert [len(ax.lines) for ax in figure.axes] == [2, 1]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [0, 2]


def test_agreement_draws_a_bar_per_criterion_and_kind():
    frame = pd.DataFrame(
        {"criterion": ["fisher", "fisher", "random", "random"], "kind": ["heads", "neurons"] * 2}
    ).assign(spearman=[0.9, 0.8, -0.2, 0.1])
    ax = plots.agreement(frame)
    heights = sorted(round(patch.get_height(), 3) for patch in ax.patches if patch.get_width())
    assert [h for h in heights if h] == [-0.2, 0.1, 0.8, 0.9] and ax.get_ylim()[0] < -0.2


@pytest.fixture
def timed():
    """Three models, eagerly in two precisions and exported, as roofline.bounds returns them."""
    runs = []
    for i, name in enumerate(["dense", "masked", "half"]):
        for j, (runtime, precision) in enumerate(
            [("eager", "float32"), ("eager", "bf16"), ("onnxruntime", "float32")]
        ):
            speedup, half = (1 + j) * (2 if name == "half" else 1), name == "half"
            times = {
                "latency_ms": 8 / speedup,
                "speedup": speedup,
                "speedup_q1": speedup - 0.1,
                "speedup_q3": speedup,
            }
            work = {
                "batch_macs": 4e8 / (1 + half),
                "batch_bytes": 1e7 - i,
                "promised": 1 + half,
                "batch": 8,
            }
            ceilings = {"macs_per_s": 1e11 * (1 + j % 2), "bytes_per_s": 5e10}
            runs.append(
                {"model": name, "runtime": runtime, "precision": precision}
                | times
                | work
                | ceilings
            )
    return pd.DataFrame(runs)


def test_speedup_bars(timed):
    ax = plots.speedup_bars(timed)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["dense", "masked", "half"]
    ways = ["eager, float32", "eager, bf16", "onnxruntime, float32"]
    assert set(labels(ax)) == {*ways, "promised by the MACs"}
    bars = [container for container in ax.containers if type(container).__name__ == "BarContainer"]
    assert [[bar.get_height() for bar in group] for group in bars] == [
        [1, 1, 2],
        [2, 2, 4],
        [3, 3, 6],
    ]
    alone = plots.speedup_bars(timed[timed.runtime == "onnxruntime"])
    assert labels(alone) == ["promised by the MACs"]  # nothing varies: the bars need no name


def test_speedup_bars_of_several_seeds_are_means(timed):
    more = timed[timed.precision == "float32"].assign(
        seed=1, speedup=timed.speedup + 1, speedup_q1=timed.speedup
    )
    ax = plots.speedup_bars(pd.concat([timed.assign(seed=0), more]))
    bars = [container for container in ax.containers if type(container).__name__ == "BarContainer"]
    assert [[bar.get_height() for bar in group] for group in bars] == [
        [1.5, 1.5, 2.5],
        [2, 2, 4],
        [3.5, 3.5, 6.5],
    ]
    plots.roofline(pd.concat([timed, more]))


def test_roofline(timed):
    ax = plots.roofline(timed)
    points = np.concatenate([collection.get_offsets() for collection in scatters(ax)])
    assert len(points) == 9
    np.testing.assert_allclose(
        sorted(points[:, 1]), sorted(timed.batch_macs / timed.latency_ms / 1e6)
    )
    assert {"dense", "half", "eager, bf16", "ceiling, float32", "ceiling, bf16"} <= set(labels(ax))


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
    table = tables.audit_table(frame, by=["kind"]).set_index("kind")
    assert table.loc["heads"].tolist() == pytest.approx(
        [3, 0.5, 2]
    )  # ranks 1 2 3 against 1 3 2; ratios 2, 4, 1
    assert table.loc["ranks"].tolist() == pytest.approx([2, np.nan, 0.75], nan_ok=True)
    assert table.loc["none"].tolist() == pytest.approx([3, np.nan, np.nan], nan_ok=True)
    assert table.loc["tiny"].tolist() == pytest.approx(
        [3, 1, 2000]
    )  # those below a millinat have no ratio
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


def test_calibration_draws_every_cut_and_what_is_not_above_zero_at_the_edge(audit):
    ax = plots.prediction_audit(audit)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and ax.get_xlim() == ax.get_ylim()
    drawn = scatters(ax)
    places = {
        tuple(place) for each in drawn for place in np.round(each.get_offsets().data, 6).tolist()
    }
    floor = 1e-4  # the decade of four below the largest, 2
    assert places == {(0.1, 0.2), (1, 0.9), (0.2, floor), (2, 1), (floor, 0.05), (floor, floor)}
    white = [each for each in drawn if each.get_facecolor().tolist() == [[1, 1, 1, 1]]]
    assert (
        sum(len(each.get_offsets()) for each in white) == 3
        and labels(ax)[-1] == "hollow: below 0.0001"
    )
    assert labels(ax)[:-1] == [
        "within a factor of 3",
        "as predicted",
        "fisher",
        "random",
        "heads",
        "ranks",
    ]
    above = plots.prediction_audit(audit[(audit.predicted > 0.01) & (audit.measured > 0)])
    assert not [label for label in labels(above) if "hollow" in label] and above.get_xlim()[0] < 0.1
    with pytest.raises(ValueError, match="nothing to show"):
        plots.prediction_audit(audit.assign(predicted=0.0, measured=-1.0))


@pytest.mark.parametrize("criteria, kinds", [(1, 12), (9, 13), (3, 3)])
def test_each_criterion_and_kind_looks_its_own(criteria, kinds):
    pairs = [(f"c{i}", f"k{j}") for i in range(criteria) for j in range(kinds)]
    frame = pd.DataFrame(pairs, columns=["criterion", "kind"]).assign(predicted=0.1, measured=0.2)
    drawn = scatters(plots.prediction_audit(frame))
    shapes = {
        (each.get_paths()[0].vertices.tobytes(), tuple(each.get_facecolor()[0])) for each in drawn
    }
    assert len(drawn) == len(shapes) == criteria * kinds


# -- recovery


def test_the_ladder_has_a_line_per_method_over_the_steps_there_are(rows):
    half = rows[(rows.target == 0.5) & (rows.form != "removed") | (rows.method == "dense")]
    folded = half[(half.method == "unstructured") & (half.stage == "cut")].assign(
        stage="folded", top1=60.0
    )
    unreachable = folded.assign(method="svd", stage="unreachable", top1=np.nan)
    best = half[(half.method == "structured") & (half.stage == "finetuned")].assign(
        stage="distilled", top1=79.0
    )
    ax = plots.ladder(pd.concat([half, folded, unreachable, best]))
    steps = ["after the cut", "mean folded", "fine-tuned", "fine-tuned,\ndistilled"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == steps
    assert labels(ax) == [
        "dense",
        "dense, same epochs",
        "structured",
        "unstructured",
    ]  # the best at its end first
    first, second = (container.lines[0] for container in ax.containers)
    assert first.get_ydata().tolist() == pytest.approx([50.5, 75.5, 79])
    assert second.get_ydata().tolist() == pytest.approx([50.5, 60, 75.5])
    assert [[round(x) for x in line.get_xdata()] for line in (first, second)] == [
        [0, 2, 3],
        [0, 1, 2],
    ]
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in hollow] == [1, 2]


def test_a_ladder_is_of_one_budget(rows):
    with pytest.raises(ValueError, match="the results have 2: "):
        plots.ladder(rows)
    with pytest.raises(ValueError, match="the results have 0"):
        plots.ladder(rows[rows.method == "dense"])


def test_recovery_knows_every_stage(rows):
    stages = [stage for stage in tables.STAGES if stage not in ("dense", "head")]
    cut = rows[(rows.stage == "cut") & (rows.target == 0.5)]
    ax = plots.recovery(pd.concat([cut.assign(stage=stage) for stage in stages]))
    assert labels(ax) == [tables.STAGES[stage] for stage in stages] and len(ax.containers) == 6
    assert (
        len({(bar.patches[0].get_hatch(), bar.patches[0].get_facecolor()) for bar in ax.containers})
        == 6
    )


# -- what was forgotten


def changes(count, seeds=1):
    one = pd.DataFrame({"class": [f"c{i}" for i in range(count)], "images": range(count)})
    one["change"] = [
        (7 * i) % count - count / 2 for i in range(count)
    ]  # all different, in no order
    return pd.concat([one.assign(seed=seed, change=one.change + seed) for seed in range(seeds)])


@pytest.mark.parametrize("count, shown", [(1, 1), (30, 30), (31, 24), (101, 24)])
@pytest.mark.parametrize("seeds", [1, 2])
def test_classes_are_sorted_by_what_was_forgotten(count, shown, seeds):
    frame = changes(count, seeds)
    ax = plots.class_change(frame)
    (bars,) = [each for each in ax.containers if type(each).__name__ == "BarContainer"]
    change = frame.groupby("class").change.mean().sort_values()
    expected = change if shown == count else pd.concat([change.head(12), change.tail(12)])
    assert [bar.get_width() for bar in bars] == expected.tolist() and len(bars) == shown
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == [f"{name} ({name[1:]})" for name in expected.index]  # class ci has i images
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the worst on top
    gap = [text.get_text() for text in ax.texts if "classes" in text.get_text()]
    assert gap == ([f"… {count - 24} classes between …"] if count > 30 else [])


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
        _style.COLORS[3],
        _style.COLORS[2],
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


def test_a_figure_for_each_target_has_the_controls_and_says_itself_where_rows_come_from(
    rows, shown, tmp_path
):
    rows = rows.assign(model="vit", date="2026-01-02", commit="abc")
    half = rows[(rows.target == 0.5) & (rows.form == "masked")].assign(target_kind="macs")
    dense = rows[rows.method == "dense"]
    tables = {"ladder": pd.concat([half, half.assign(target=0.25)])}
    about = {
        "results": rows.assign(commit="other"),
        "folder": tmp_path,
        "controls": dense,
        "names": ["first"],
    }
    plots.draw_each(tables, "ladder", plots.ladder, per="target", **about)
    assert {path.stem for path in tmp_path.iterdir()} == {
        "ladder-macs-0.25-vit",
        "ladder-macs-0.5-vit",
    }
    plots.save(plots.ladder(pd.concat([dense, half]), names=["first"]), tmp_path / "known")
    assert (tmp_path / "known.svg").read_bytes() == (
        tmp_path / "ladder-macs-0.5-vit.svg"
    ).read_bytes()
    assert (tmp_path / "ladder-macs-0.5-vit.txt").read_text() == caption(
        pd.concat([dense, half])
    ) + "\n"


def test_a_missing_target_is_left_out_of_the_name(results, shown, tmp_path):
    table = changes(3).assign(model="vit", target_kind=None, target=np.nan)
    draw = {"draw": plots.class_change, "results": results, "folder": tmp_path, "per": "target"}
    plots.draw_each({"classes": table}, "classes", **draw)
    plots.draw_each(
        {"classes": table.drop(columns=["target_kind", "target"])}, "few", table="classes", **draw
    )
    assert {path.stem for path in tmp_path.iterdir()} == {"classes-vit", "few-vit"}
