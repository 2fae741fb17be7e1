"""A study of invented numbers: every table and picture that a report may leave, for the tests of what reads them."""

import numpy as np
import pandas as pd
from PIL import Image

from vitlab import files

FIGURES = files.repository() / "figures"
COMMITTED = sorted(path.parent.name for path in FIGURES.glob("*-small/results.csv"))
MODELS = ["swin", "vit"]
ALONE = ["heads+iht", "heads+threshold", "random"]  # methods that the second seed does not have
PICTURES = "cuts sensitivity criteria recovery heads_svd_iht ladder-macs kept-macs-0.5 tradeoff speedup".split()
PICTURES += ["classes-macs-0.5"]  # which the talk does not show


def invent(folder, number):
    """A study of invented numbers with every table and picture there is. number: of the draw; 0 is of one in which
    little was lost, 2 of two seeds, of which the second did less."""
    rng = np.random.default_rng(number)
    low = 80 if number == 0 else 5

    def frame(name, keys, **columns):
        rows = [key if isinstance(key, tuple) else (key,) for key in keys]
        made = pd.DataFrame([(model, *row) for model in MODELS for row in rows])
        made.columns = ["model", *columns["names"]]
        drawn_anew = name not in ("summary", "best")  # those are of all seeds
        parts = [made.assign(seed=seed) for seed in range(1 + (number == 2 and drawn_anew))]
        parts[1:] = [part[~part.get("method", part.model).isin(ALONE)] for part in parts[1:]]
        made = pd.concat(parts, ignore_index=True)
        if not drawn_anew:
            seeds = np.where((number < 2) | made.method.isin(ALONE), 1, 2)
            made = made.drop(columns="seed").assign(seeds=seeds)
        for column, (least, most) in columns["drawn"].items():
            made[column] = rng.uniform(least, most, len(made))
        made.to_csv(folder / f"{name}.csv", index=False)
        return made

    costs = dict.fromkeys(
        ("params", "nonzero", "macs", "macs_ideal", "bytes_disk"), (100000.0, 90000000.0)
    )
    names = ["method", "form", "target_kind", "target", "stage"]
    masked = [
        (m, "masked", "sparsity", t) for m in ("unstructured", "structured") for t in (0.5, 0.9)
    ]
    ratios = [(f"heads+{form}", "factored", "ratio", 0.4) for form in ("svd", "iht", "threshold")]
    budgets = [(m, "removed", "macs", 0.5) for m in ("pool", "units", "random")]
    cuts = [*masked, *ratios, *budgets]
    whole = [("dense", "masked", None, None, stage) for stage in ("dense", "dense+epochs")]
    drawn = {"top1": (low, 80), "epochs": (5, 5), "mean_per_class": (low, 80)} | costs
    stages = ["cut", "compensated", "reconstructed", "finetuned"]
    rows = frame(
        "results", [*whole, *((*c, s) for c in cuts for s in stages)], names=names, drawn=drawn
    )
    about = dict(
        latency_ms=np.nan,
        batch=np.nan,
        total=10_000,
        threads=1,
        precision="float32",
        data="shapes",
        split_seed=0,
    )
    about |= dict(
        commit="0123456789",
        torch="2.15.0",
        timm="1.0.31",
        device="a machine",
        date="2026-11-24T01:02:03Z",
    )
    rows = rows.assign(**about)
    timed = rows.assign(latency_ms=1.0, batch=64.0)
    pd.concat([rows, timed]).to_csv(folder / "results.csv", index=False)
    rows[rows.method == "dense"].to_csv(folder / "dense.csv", index=False)
    points = dict.fromkeys(("dense", *stages), (low, 80)) | {"macs": costs["macs"]}
    frame("summary", cuts, names=names[:4], drawn=points)
    frame(
        "efficiency",
        [whole[0][:4], *cuts],
        names=names[:4],
        drawn=costs | {"speedup": (0.5, 4), "top1": (low, 80)},
    )
    masked = [(m, c, t) for m, _, _, t in masked for c in ("magnitude", "taylor")]
    frame(
        "table-criteria",
        masked,
        names=["method", "criterion", "target"],
        drawn={"val_top1": (low, 80)},
    )
    layers = [(f"blocks.{i}.mlp.fc1", ratio) for i in range(9) for ratio in (0.3, 0.9)]
    frame("table-curves", layers, names=["layer", "ratio"], drawn={"increase": (-1, 1)})
    ways = [
        (c, r, p, 64)
        for c in ("dense", "budget-pool-0.5")
        for r in ("eager", "onnxruntime")
        for p in ("bf16",)
    ]
    frame(
        "table-runtimes",
        ways,
        names=["checkpoint", "runtime", "precision", "batch"],
        drawn={"speedup": (0.5, 9), "achieved_here": (0.2, 1), "promised": (1, 1)},
    )
    # What was timed in another run, of another seed, is ten times as fast.
    times = pd.read_csv(folder / "table-runtimes.csv")
    times["promised"] = times.checkpoint.map({"dense": 1.0, "budget-pool-0.5": 2.0})
    times.loc[times.seed == 1, ["speedup", "achieved_here"]] *= 10
    times.to_csv(folder / "table-runtimes.csv", index=False)
    timed = pd.read_csv(folder / "efficiency.csv")
    timed.loc[timed.seed == 1, "speedup"] *= 10
    timed.to_csv(folder / "efficiency.csv", index=False)
    places = [
        (f"blocks.{i}", kind, 3, 4, "pool", "macs", 0.5)
        for i in (0, 1)
        for kind in ("heads", "neurons")
    ]
    names = ["where", "kind", "kept", "whole", "method", "target_kind", "target"]
    frame("table-kept", places, names=names, drawn={})
    splits = [("train", 90), ("val", 10), ("test", 20)]
    pd.DataFrame(splits, columns=["split", "images"]).to_csv(folder / "table-data.csv", index=False)
    for i, name in enumerate(f"{picture}-{model}" for picture in PICTURES for model in MODELS):
        Image.new("RGB", (200 + i, 100), "white").save(folder / f"{name}.png")
    return folder
