"""Benchmarks: each runs and says where its numbers come from. Times themselves are never asserted."""

import copy
import functools
import shutil
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from vitlab import files, models
from vitlab.evaluation import cost
from vitlab.models import checkpoint
from vitlab.pruning import scores
from vitlab.report import tables
from vitlab.training import _shapes, data

ROOT = files.repository()


def run(*arguments):
    command = [sys.executable, ROOT / "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_an_unknown_case_names_those_there_are():
    done = run("--only", "everything")
    assert (
        done.returncode
        and "invalid choice: 'everything'" in done.stderr
        and "removal" in done.stderr
    )


def test_a_table_keeps_the_rows_of_other_processors(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("BENCH_OUT", str(tmp_path))
    import common

    for cpu, ms in (("old", 3.0), ("new", 1.0), ("new", 2.0)):
        common.publish("times", [{"cpu": cpu, "ms": ms, "device": "cpu"}], beside="cpu")
    table = pd.read_csv(tmp_path / "times.csv")
    assert table[["cpu", "ms"]].values.tolist() == [["old", 3.0], ["new", 2.0]]
    assert not table.device.eq("cpu").any()  # but the name of a processor
    assert table.date.notna().all() and "old" in (tmp_path / "times.md").read_text()


TOYS = {  # wide enough that a channel is less than the 1 % within which a budget is to be met
    "conv_vit": dict(embed_dim=144, depth=2, num_heads=4),
    "conv_swin": dict(embed_dim=96, depths=(1, 1), num_heads=(3, 6), window_size=2),
}


@pytest.fixture
def accuracy(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("BENCH_OUT", str(tmp_path))
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path))
    import accuracy

    return accuracy


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images = _shapes.make(folder / "few", per_class=(8, 1, 2), image_size=16)
    return data.load(images, root=folder, image_size=16)


@pytest.mark.parametrize("name", ["conv_vit", pytest.param("conv_swin", marks=pytest.mark.long)])
def test_every_tool_meets_the_budget_or_names_its_floor_and_is_not_run_twice(
    name, accuracy, drawn, monkeypatch
):
    torch.manual_seed(0)
    dense = models.create(name, num_classes=10, image_size=16, **TOYS[name]).eval()
    given_of = {name: lambda seed: accuracy.Given(name, dense, drawn, seed)}
    alone = {"vitlab, filters": functools.partial(accuracy.of_kinds, ["filters"])}
    monkeypatch.setattr(accuracy, "TOOLS", accuracy.TOOLS | alone)
    accuracy.measure_all(given_of, [0.5], [0], list(accuracy.TOOLS), epochs=0)
    table = accuracy.read().set_index("tool")
    assert set(table.index) == set(accuracy.TOOLS)
    share = table.macs / cost.macs(dense) / table.budget
    reached = table.stage == "cut"
    assert (share[~reached] > 1.01).all() and table.note[~reached].str.contains(
        "cannot reach"
    ).all()
    assert not reached["vitlab, filters"] and reached["vitlab, pool"]
    assert (
        share[reached].max() <= 1.01 and share[reached].drop(GROUPS, errors="ignore").min() >= 0.99
    )
    counts = table[reached & (table.budget < 1)].drop("vitlab, pool")
    pools = table.correct["vitlab, pool"]
    assert (counts.pool_only - counts.tool_only).eq(pools - counts.correct).all()
    for tool in table.index[reached]:
        key = {"tool": tool, "model": name, "budget": table.budget[tool], "seed": 0}
        model = checkpoint.load(accuracy.cut_folder(key))
        assert cost.meters(model)["macs_torch"] == cost.macs(model) == table.macs[tool]
        model.train()(torch.zeros(2, 3, 16, 16)).sum().backward()
        assert all(block.attn.num_heads for block in models.view(model).blocks)

    monkeypatch.setattr(
        accuracy, "TOOLS", dict.fromkeys(accuracy.TOOLS)
    )  # nothing can be cut any more
    chosen = ["vitlab, pool", "Torch-Pruning, Taylor, isomorphic", "vitlab, filters", "dense"]
    accuracy.measure_all(given_of, [0.5], [0], chosen, rates=[1e-4])
    rows = accuracy.read()
    assert set(rows[rows.stage == "finetuned"].tool) == {*chosen} - {"vitlab, filters"}
    monkeypatch.setattr(accuracy.train, "fit", None)  # nor trained
    accuracy.measure_all(given_of, [0.5], [0], chosen, rates=[1e-4])
    assert accuracy.read().equals(rows)
    for other in ({"epochs": 2}, {"images": 12}):
        with pytest.raises(ValueError, match="by another recipe"):
            accuracy.measure_all(given_of, [0.5], [0], ["vitlab, pool"], **other)

    accuracy.speed(given_of[name](0), [0.5], batch=2, rounds=3)
    assert accuracy.read().set_index("stage").loc[["cut", "finetuned"]].speedup.gt(0).all()
    accuracy.table_and_figure()
    text = (accuracy.folder("accuracy.md")).read_text()
    assert (
        text.count("vitlab, pool") == 1
        and "not below" in text
        and accuracy.folder("accuracy.png").exists()
    )


def test_the_first_seed_tries_learning_rates_until_val_falls_and_others_take_its_best(
    accuracy, drawn, monkeypatch
):
    dense = models.create("conv_vit", num_classes=10, image_size=16, **TOYS["conv_vit"]).eval()
    given_of = {"m": lambda seed: accuracy.Given("m", dense, drawn, seed)}
    monkeypatch.setattr(accuracy, "RATES", (1e-5, 1e-4, 1e-3, 1e-2))
    monkeypatch.setattr(accuracy, "TOOLS", {"dense": accuracy.TOOLS["dense"], "vitlab, pool": None})
    val, now = {(0, 1e-5): 60.0, (0, 1e-4): 70.0, (1, 1e-3): 90.0, (1, 1e-4): 50.0}, [1.0]

    def fit(model, train, val_images, recipe, *, folder, stage):
        seed, lr = recipe["seed"], recipe["lr"]
        if (seed, lr) not in val:
            raise FloatingPointError("no longer finite")
        now[:] = [val[seed, lr]]
        (folder / f"{stage}.state.pt").touch()
        return pd.DataFrame({"seconds": [1.0]})

    def measured(*_):
        return {"top1": now[0] / 2, "val_top1": now[0], "macs": 1, "params": 1, "total": 4}

    monkeypatch.setattr(accuracy.train, "fit", fit)
    monkeypatch.setattr(accuracy, "measured", measured)
    accuracy.measure_all(given_of, [0.5], [0, 1], ["dense"])
    accuracy.measure_all(
        given_of, [0.5], [1], ["dense"], rates=[1e-3]
    )  # the best, but of another seed
    rows = accuracy.read()
    tuned = rows[rows.stage == "finetuned"]
    assert list(zip(tuned.seed, tuned.lr, strict=True)) == [
        (0, 1e-5),
        (0, 1e-4),
        (0, 1e-3),
        (1, 1e-4),
        (1, 1e-3),
    ]
    left = tables.best_rates(rows)
    assert set(left.lr.dropna()) == {1e-4} and left.top1.to_list() == [0.5, 35, 35, 25]
    line = accuracy.summary(rows.replace({"tool": {"dense": "vitlab, pool"}}), "m", 1.0).iloc[0]
    assert line["learning rate"] == "0.0001" and line["fine-tuned"] == "30.0 (25.0 to 35.0)"
    few = rows[rows.lr != 1e-3].replace({"tool": {"dense": "vitlab, pool"}})
    assert accuracy.summary(few, "m", 1.0)["learning rate"].item() == r"0.0001 \*"

    checkpoint_of = accuracy.cut_folder({"tool": "dense", "model": "m", "budget": 1.0, "seed": 0})
    shutil.rmtree(checkpoint_of)
    monkeypatch.setattr(accuracy, "measured", lambda *_: measured() | {"macs": 2})
    with pytest.raises(ValueError, match="is cut otherwise now: give --again"):
        accuracy.measure_all(given_of, [0.5], [0], ["dense"], rates=[1e-2])


def test_the_table_counts_seeds_of_a_stage_and_marks_those_that_cannot_reach_it(accuracy):
    rows = [
        ("dense", 1.0, 0, "cut", 90.0, 100), ("vitlab, pool", 0.5, 0, "cut", 80.0, 50),
        ("vitlab, pool", 0.5, 0, "finetuned", 85.0, 50), ("vitlab, pool", 0.5, 1, "cut", 82.0, 50),
        ("vitlab, ranks", 0.5, 0, "cut", 79.0, 50), ("vitlab, ranks", 0.5, 1, "unreachable", None, 60),
        ("SVD, plain", 0.5, 2, "cut", 70.0, 49),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["tool", "budget", "seed", "stage", "top1", "macs"]).assign(
        model="m", speedup=None, val_top1=None, pool_only=None
    )
    table["lr"] = table.stage.map({"finetuned": 1e-3})
    lines = accuracy.summary(table, "m", 0.5).set_index("tool")
    assert lines.MACs.to_list() == ["0.500", "0.500, not below 0.600", "0.490"]
    assert lines.seeds.to_list() == ["2 / 1", "1", "1"]
    assert lines["pool − tool, cut"].to_list() == ["", "+1.00", ""]
    assert lines.cut.to_list() == ["81.0 (80.0 to 82.0)", "79.0", "70.0"]


def test_differences_are_paired_by_image(accuracy):
    """Of 100 images 9 and 1 differ: 8 points, and each image varies by (9 + 1) / 100 - 0.08**2."""
    rows = pd.DataFrame({"pool_only": [9, 9], "tool_only": [1, 1], "total": [100, 100]})
    half = 1.96 * ((0.10 - 0.0064) / 100) ** 0.5
    assert accuracy.difference(rows) == f"+8.00 ± {100 * half:.2f}"


GROUPS = ["vitlab, units", "random units"]  # go by eight, or by the head


LONG = [
    pytest.param(case, marks=pytest.mark.long)
    for case in ("removal", "svd", "files", "training", "moves")
]  # of ViT-B and Swin-T


@pytest.mark.parametrize("case", [pytest.param("alone", marks=pytest.mark.long), *LONG])
def test_a_case_writes_its_table_with_where_it_comes_from(case, tmp_path):
    done = run("--only", case, "--rounds", "1", "--threads", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / f"{case}.csv")
    assert {"commit", "torch", "timm", "device", "date", "threads"} <= set(
        table
    ) and table.threads.eq(2).all()
    assert (tmp_path / f"{case}.md").exists()
    if case == "alone":  # what the peer cannot do without help
        assert table.set_index("case").outcome["Swin-T"].startswith("RuntimeError")
    else:
        failed = "outcome" in table and table.outcome.ne("runs")  # which then has no time
        assert (table.seconds.gt(0) ^ failed).all() and (table.ratio.gt(0) ^ failed).all()
    if case == "removal":
        assert (table.macs_share.between(0, 1) ^ failed).all() and table.settings.notna().all()


def test_shares_of_parameters_and_bytes_are_met_by_what_is_handed_out(accuracy, drawn, monkeypatch):
    import targets

    torch.manual_seed(0)
    dense = models.create("conv_vit", num_classes=10, image_size=16, **TOYS["conv_vit"]).eval()
    monkeypatch.setattr(targets, "SHARES", (0.7,))
    table = pd.DataFrame(targets.of_model(accuracy.Given("m", dense, drawn, 0), 1, batch=2))
    counted = table[table.target != "latency"]
    assert list(zip(counted.target, counted.kinds, strict=True)) == list(
        product(("params", "bytes"), targets.POOLS)
    )
    assert (
        counted.planned.between(0.69, 0.7).all()
        and (counted.met / counted.planned).between(0.99, 1.01).all()
    )
    assert (table.target == "latency").sum() == 2
    timed = table.reindex(
        columns=["met_q1", "met", "met_q3"]
    ).dropna()  # none where time cannot be had so
    assert (timed.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)


# -- a backbone without classifier


@pytest.fixture
def foundation(accuracy, drawn, monkeypatch):
    """Return the benchmark with one toy in the place of the real ViT and its images."""
    import foundation

    torch.manual_seed(0)
    options = dict(embed_dim=96, depth=3, num_heads=3, patch_size=4)
    toy = models.create("vit_tiny_patch16_224", num_classes=0, image_size=16, **options).eval()
    values = {"kinds": ["heads", "neurons", "width", "ranks"], "batch_size": 16}

    class Toy(foundation.Lab):
        images, dense, device = drawn, toy, torch.device("cpu")

        def __init__(self, name, calibration=64):
            self.name, self.calibration = name, calibration
            values_ = SimpleNamespace(**values)
            self.run = SimpleNamespace(params=SimpleNamespace(calibration=values_, budget=values_))

    monkeypatch.setattr(foundation, "Lab", Toy)
    monkeypatch.delenv("SNAPVIT", raising=False)
    return foundation


OWN = ["vitlab, pool", "vitlab, pool, by labels", "vitlab, units", "vitlab, ranks", "random units"]


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_backbone_is_cut_to_its_share_and_says_which_channels_are_left(share, foundation):
    lab = foundation.Lab("toy")
    given, whole = lab.given(0), cost.macs(lab.dense)
    for method in [*OWN, "CORP", "SVD, whitened", "linear maps for blocks"]:
        cut, spent = foundation.made(method, given, share)
        found = lab.judge.measure(cut)
        macs = found["macs"] / whole
        allowed = 0.25 if method.startswith("linear") else 0.02  # a map stands for a whole block
        assert macs == pytest.approx(share, rel=allowed), method
        features = lab.judge.features(cut.model)[2].features
        left = features.shape[1] if cut.channels is None else len(cut.channels)
        assert features.isfinite().all() and features.shape[1] == left
        assert spent["seconds"] > 0 and spent["memory_mb"] >= 0
    step = foundation.made("vitlab, pool", given, share)[1]["seconds"]
    assert step > given.steps["grams by labels none"].seconds  # charged though they were there


def test_steps_without_labels_follow_the_pool(foundation):
    lab = foundation.Lab("toy")
    given = lab.given(0)
    pool, cut = foundation.vitlab(given, 0.5), foundation.relearned(given, 0.5, steps=4)
    before, after = lab.judge.measure(pool), lab.judge.measure(cut)
    assert after["macs"] == before["macs"] and cut.channels == pool.channels
    assert after["change"] != before["change"]
    assert cut.note == f"{pool.note}; 3 epochs without labels"  # of 80 images, 64 in a step


def test_what_corp_solves_for_brings_features_nearer_to_the_dense_ones(foundation, monkeypatch):
    import closed_form

    lab = foundation.Lab("toy")
    batches = lab.given(0).batches
    solved, _ = closed_form.corp(lab.dense, batches, 0.6)
    monkeypatch.setattr(closed_form, "RIDGE", 1e9)
    only_cut, _ = closed_form.corp(lab.dense, batches, 0.6)
    assert scores.change(lab.dense, solved, batches) < scores.change(lab.dense, only_cut, batches)
    with pytest.raises(ValueError, match="CORP cannot reach 0.05"):
        closed_form.corp(lab.dense, batches, 0.05)


def test_a_map_takes_the_place_of_a_block_that_is_one(foundation):
    import closed_form

    lab = foundation.Lab("toy")
    dense = copy.deepcopy(lab.dense)
    dense.blocks[1] = torch.nn.Linear(96, 96)
    sums = closed_form._stream_moments(dense, lab.given(0).batches)
    left = {key: closed_form._fit(sums, *key)[2] for key in [(0, 1), (1, 2), (2, 3)]}
    assert left[1, 2] < 1e-4 < min(left[0, 1], left[2, 3])
    left |= {(0, 2): 1.0, (1, 3): 1.0, (0, 3): 1.0}
    assert closed_form._best_runs(left, 3, 1) == [(1, 2)]
    assert closed_form._best_runs(left | {(1, 3): 0.0}, 3, 2) == [(1, 3)]


def test_rows_of_a_backbone_go_on_where_they_ended_and_failures_are_rows(foundation, monkeypatch):
    fakes = {"dense": foundation.METHODS["dense"], "SnapViT": foundation.METHODS["SnapViT"]}
    fakes["CORP"] = lambda given, share: foundation.METHODS["dense"](given, share)
    monkeypatch.setattr(foundation, "METHODS", fakes)
    foundation.measure_all(["toy"], [*fakes], (0.5,), (0, 1), seconds=0)
    assert foundation.read().empty  # no time at all
    foundation.measure_all(["toy"], [*fakes], (0.5,), (0, 1))
    table = foundation.read()
    assert list(zip(table.method, table.draw, strict=True)) == [
        ("dense", 0), ("SnapViT", 0), ("CORP", 0), ("SnapViT", 1), ("CORP", 1)
    ]  # fmt: skip
    failed = table[table.outcome != "runs"]
    assert (
        set(failed.method) == {"SnapViT"}
        and failed.outcome.str.contains("SNAPVIT is not set").all()
    )
    assert table[table.method == "dense"].change.item() == pytest.approx(0, abs=1e-6)
    fakes["CORP"] = None  # cannot be called any more
    fakes["SnapViT"] = lambda given, share: foundation.METHODS["dense"](given, share)
    foundation.measure_all(["toy"], [*fakes], (0.5,), (0, 1))
    assert foundation.read().equals(table)
    foundation.measure_all(["toy"], [*fakes], (0.5,), (0, 1), again=True)
    assert foundation.read().outcome.eq("runs").all()
    lines = foundation.summary(table.assign(data="toy"), "toy", 0.5)
    assert lines.method.to_list() == ["dense", "SnapViT", "CORP"] and lines.draws.to_list() == [
        1,
        0,
        2,
    ]
