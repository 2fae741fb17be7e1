import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from vitlab import plots

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def rows():
    """Two seeds of a dense model and of three ways to cut it; top1 falls with the share, less when tuned."""
    found = []
    for seed in (0, 1):
        for stage in ("dense", "dense+epochs"):
            found.append({"method": "dense", "stage": stage, "seed": seed, "top1": 80.0, "macs": 4e6})
        for method, form in [("unstructured", "masked"), ("structured", "masked"), ("structured", "removed")]:
            for target in (0.5, 0.9):
                for stage, loss in (("cut", 60), ("finetuned", 10)):
                    macs = 4e6 * (1 - target if form == "removed" else 1)
                    cut = {"method": method, "form": form, "target": target, "stage": stage, "seed": seed}
                    found.append(cut | {"top1": 80 - loss * target + seed, "macs": macs})
    return pd.DataFrame(found)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_pareto_front_is_what_no_point_beats(count):
    rng = np.random.default_rng(count)
    cost, value = (pd.Series(rng.integers(0, 6, count)) for _ in range(2))  # small integers: ties
    front = plots.pareto(cost, value)
    for i in range(count):
        beaten = ((cost <= cost[i]) & (value > value[i])) | ((cost < cost[i]) & (value >= value[i]))
        assert front[i] != beaten.any()
    assert value[front].max() == value.max() and cost[front].min() == cost.min()


def test_pareto_by_hand():
    cost, value = pd.Series([1, 2, 3, 3], index=list("abcd")), pd.Series([5, 4, 6, 7], index=list("abcd"))
    assert plots.pareto(cost, value).to_dict() == {"a": True, "b": False, "c": False, "d": True}


def test_a_series_is_named_by_what_tells_it_apart(rows):
    names = plots.series(rows)
    assert set(names) == {"dense", "unstructured", "structured, masked", "structured, removed"}


def test_tradeoff_shows_no_model_that_was_only_cut(rows):
    ax = plots.tradeoff(rows, "macs")
    assert ax.get_xlabel() == "MACs of one image (M)" and ax.get_ylabel() == "test top-1 (%)"
    assert labels(ax) == ["best for its cost", *dict.fromkeys(plots.series(rows))]
    points = np.concatenate([collection.get_offsets() for collection in ax.collections])
    assert points[:, 1].min() == 80 - 10 * 0.9 + 0.5  # the mean over both seeds
    assert set(points[:, 0].round(3)) == {0.4, 2, 4}


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
    dense = pd.DataFrame({"stage": "unpruned", **bins, "count": [1, 20, 20, 1], "zeros": 0})
    pruned = pd.DataFrame({"stage": "pruned", **bins, "count": [1, 0, 0, 1], "zeros": 40})
    left, right = plots.weight_histograms(pd.concat([dense, pruned])).axes
    assert left.get_yscale() == right.get_yscale() == "log"
    (bar,) = right.containers[0]
    assert bar.get_height() == 40 and bar.get_x() > 1  # beyond the largest weight
    assert left.get_ylim()[1] > 40


def test_maps_keep_the_order_of_blocks_and_leave_holes():
    frame = pd.DataFrame({"block": ["b.10", "b.2", "b.2"], "head": [0, 0, 1], "score": [1.0, 2.0, 3.0]})
    ax = plots.head_map(frame.assign(kept=[True, False, True]))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["b.10", "b.2"]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]  # b.10 has no head 1
    assert len(ax.lines) == 1  # one cross
    ax = plots.heat_map(frame.rename(columns={"head": "role"}), value="score", label="loss (nats)")
    assert len(ax.texts) == 3
    ax = plots.rank_correlation(pd.DataFrame(np.eye(3), list("abc"), list("abc")))
    assert ax.collections[0].get_clim() == (-1, 1)


def test_the_same_figure_is_the_same_bytes(rows, tmp_path):
    for name in ("one", "two"):
        plots.save(plots.tradeoff(rows, "macs"), tmp_path / name, caption="what it is")
    for ending in ("svg", "png", "txt"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{ending}" for name in ("one", "two") for ending in ("png", "svg", "txt")
    )
    assert not matplotlib.pyplot.get_fignums()


def test_tables_are_written_for_machines_and_for_people(tmp_path, capsys):
    frame = pd.DataFrame({"method": ["heads_svd", "dense"], "top1": [80.123456, np.nan], "macs": [4_000_000, 1]})
    plots.save_table(frame, tmp_path / "t", formats={"macs": "{:,}"})
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), frame, check_dtype=False)
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[2].split("|")] == ["", "heads_svd", "80.123", "4,000,000", ""]
    assert [cell.strip() for cell in lines[3].split("|")] == ["", "dense", "", "1", ""]
    tex = (tmp_path / "t.tex").read_text()
    assert r"heads\_svd & 80.123 & 4,000,000 \\" in tex and r"\toprule" in tex and "{lrr}" in tex
    with pytest.raises(ValueError, match="unknown column 'top', did you mean 'top1'"):
        plots.save_table(frame, tmp_path / "u", formats={"top": "{}"})
    plots.save_table(frame, tmp_path / "v", kinds=["csv"])
    assert (tmp_path / "v.csv").exists() and not (tmp_path / "v.md").exists()
    plots.save_table(frame.head(0), tmp_path / "v", kinds=["csv"])
    assert len(pd.read_csv(tmp_path / "v.csv")) == 2, "nothing to write is no reason to lose what there is"
    assert capsys.readouterr().out == "v: no rows yet, not written\n"


def test_a_caption_says_where_numbers_come_from():
    row = {"study": "demo", "model": "vit", "seed": 0, "split_seed": 0, "device": "a CPU", "threads": 2}
    row |= {"torch": "2.15.0", "timm": "1.0.31", "commit": "abc+dirty", "date": "2026-01-02T03:04:05Z"}
    text = plots.caption(pd.DataFrame([row, row | {"model": "swin", "date": "2026-01-01T00:00:00Z"}]))
    for part in ("demo", "vit, swin", "a CPU", "abc+dirty", "2026-01-02"):
        assert part in text


def test_image_grid_shows_every_class_once_or_the_batch():
    class Split:
        labels = torch.tensor([2, 0, 1, 0])
        store, indices = np.zeros((9, 8, 8, 3), dtype=np.uint8), np.array([5, 6, 7, 8])

    figure = plots.image_grid(Split(), classes=["ant", "bee", "cat"])
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["ant", "bee", "cat"]
    figure = plots.image_grid(torch.rand(4, 3, 8, 8), labels=torch.tensor([1, 1, 0, 2]), classes=["ant", "bee", "cat"])
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["bee", "bee", "ant", "cat"]


def test_sensitivity_curves_draw_a_line_per_block_and_a_panel_per_role():
    frame = pd.DataFrame(
        {"role": ["qkv"] * 4 + ["fc1"] * 2, "block": ["a", "a", "b", "b", "a", "a"], "ratio": [0.1, 0.9] * 3}
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
    """Three models, eagerly in two precisions and exported, as bench.bounds returns them."""
    found = []
    for i, name in enumerate(["dense", "masked", "half"]):
        for j, (runtime, precision) in enumerate([("eager", "float32"), ("eager", "bf16"), ("onnxruntime", "float32")]):
            speedup, half = (1 + j) * (2 if name == "half" else 1), name == "half"
            times = {"latency_ms": 8 / speedup, "speedup": speedup, "speedup_q1": speedup - 0.1, "speedup_q3": speedup}
            work = {"batch_macs": 4e8 / (1 + half), "batch_bytes": 1e7 - i, "promised": 1 + half, "batch": 8}
            ceilings = {"macs_per_s": 1e11 * (1 + j % 2), "bytes_per_s": 5e10}
            found.append({"model": name, "runtime": runtime, "precision": precision} | times | work | ceilings)
    return pd.DataFrame(found)


def test_speedup_bars(timed):
    ax = plots.speedup_bars(timed)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["dense", "masked", "half"]
    ways = ["eager, float32", "eager, bf16", "onnxruntime, float32"]
    assert set(labels(ax)) == {*ways, "promised by the MACs"}
    bars = [container for container in ax.containers if type(container).__name__ == "BarContainer"]
    assert [[bar.get_height() for bar in group] for group in bars] == [[1, 1, 2], [2, 2, 4], [3, 3, 6]]
    alone = plots.speedup_bars(timed[timed.runtime == "onnxruntime"])
    assert labels(alone) == ["promised by the MACs"]  # nothing varies: the bars need no name


def test_roofline(timed):
    ax = plots.roofline(timed)
    points = np.concatenate([each.get_offsets() for each in ax.collections if type(each).__name__ == "PathCollection"])
    assert len(points) == 9
    np.testing.assert_allclose(sorted(points[:, 1]), sorted(timed.batch_macs / timed.latency_ms / 1e6))
    assert {"dense", "half", "eager, bf16", "ceiling, float32", "ceiling, bf16"} <= set(labels(ax))
