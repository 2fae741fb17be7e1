"""A quarter and 0.15 of the MACs, first trained on no labels: the small models of CIFAR-10, three seeds, on test.

Stage `reconstructed` is budget.reach, from 2,048 calibration images. `searched` is that with 48 trials
of other plans, judged by these images without their labels. `unseen` is budget.reach, from 1,024 training images and
as many validation images, which rank what goes: they have chosen the epoch of the dense models and the rates and steps
below, and no gradient step has seen them. `relearned` follows `reconstructed` with 2,000
steps of imitate.relearn, which are less than three epochs. Rates were chosen on validation images and
seed 0, and so were the steps, of 500, 1,000 and 2,000, for the ViT at 0.15 and the Swin at 0.25. So far only
the scores of what goes read labels, of the calibration images. `finetuned` follows at a quarter: one
epoch with the labels of all training images, half of its loss from the dense model's answers, at a rate
chosen on validation images for the Swin of seed 0. `lost` is in points of test top-1 below the dense
model of the same seed; `low` and `high` are its 95 % interval over the test images, which are the same
in both. Rows that are there are not made again, but for those that lead to one that is missing.
"""

import time
from itertools import product

import pandas as pd
from common import ROOT, answers, folder, publish

from vitlab.evaluation import cost
from vitlab.models import anatomy, checkpoint
from vitlab.pruning import budget
from vitlab.training import data, imitate, train

MODELS, SEEDS, SHARES = ("vit", "swin"), (0, 1, 2), (0.15, 0.25)
IMAGES, EPOCHS, STEPS, BATCH = 2048, 4, 500, 64  # steps of an epoch, which draws some of the images
RECIPE = {
    "epochs": EPOCHS,
    "images": STEPS * BATCH,
    "batch_size": BATCH,
    "weight_decay": 0.0,
    "warmup_epochs": 0.1,
    "augment": {"crop": 4, "flip": True},
    "precision": "bf16",
}
RATES = {0.15: 1e-3, 0.25: 3e-4}  # the less is lost, the smaller
FINETUNED = {0.25: 1e-4}  # rate of the epoch with labels
TRIALS = 48
KEY = ["model", "seed", "share", "stage"]
SHOWN = [*KEY, "macs", "top1", "lost", "low", "high", "loss"]
SHOWN += ["predicted", "seconds"]


def deep(rounds):
    """All rows that are missing, of as many seeds as rounds."""
    images = data.load("cifar10", image_size=32)
    file = folder("deep.csv")
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    for seed, model in product(SEEDS[:rounds], MODELS):
        made = {tuple(row[name] for name in KEY) for row in rows}
        missing = {
            share: {stage for stage in stages_of(share) if (model, seed, share, stage) not in made}
            for share in SHARES
        }
        missing = {share: stages for share, stages in missing.items() if stages}
        if not missing:
            continue
        name = model if seed == 0 else f"{model}-seed{seed}"
        dense = checkpoint.load(ROOT / "checkpoints" / "cifar10-small" / name)
        whole = answers(dense, images.test)
        rows.append({"model": model, "seed": seed, "share": 1.0, "stage": "dense"} | of(*whole))
        known = budget.Calibration(
            dense, list(images.train.subset(IMAGES, seed=seed).batches(BATCH))
        )
        for share, asked in missing.items():
            for row, small in stages(known, share, images, seed, asked):
                row = {"model": model, "seed": seed, "share": share} | row
                own = answers(small, images.test)
                row |= of(*own) | lost(own, whole)
                rows.append(row | {"macs": cost.macs(small) / cost.macs(dense)})
                print(rows[-1], flush=True)
            table = pd.DataFrame(rows).drop_duplicates(KEY, keep="last")
            rows = table.sort_values(["model", "share", "stage", "seed"]).to_dict("records")
            publish("deep", rows, shown=SHOWN)
            publish("deep_means", means(table))


def stages_of(share):
    trained = ["relearned", "finetuned"] if share in FINETUNED else ["relearned"]
    return ["searched", "unseen", "reconstructed", *trained]


def stages(known, share, images, seed, asked):
    """Yield (columns, model) after each stage that is asked for, or leads to one; what shares have in common counts
    with the first.
    """
    begun = time.perf_counter()
    if "searched" in asked:
        plan = known.search(TRIALS, seed=seed, macs=share)
        small = known.reconstruct(*known.cut(plan))
        row = {"stage": "searched", "predicted": plan.predicted}
        yield row | {"seconds": time.perf_counter() - begun}, small
    if "unseen" in asked:
        begun = time.perf_counter()
        parts = [split.subset(IMAGES // 2, seed=seed) for split in (images.val, images.train)]
        pairs = zip(*(part.batches(BATCH) for part in parts), strict=True)
        mixed = budget.Calibration(known.model, [batch for pair in pairs for batch in pair])
        plan = mixed.plan(macs=share)
        small = mixed.reconstruct(*mixed.cut(plan))
        row = {"stage": "unseen", "predicted": plan.predicted}
        yield row | {"seconds": time.perf_counter() - begun}, small
    if asked <= {"searched", "unseen"}:
        return
    begun = time.perf_counter()
    plan = known.plan(macs=share)
    small = known.reconstruct(*known.cut(plan))
    row = {"stage": "reconstructed", "predicted": plan.predicted}
    yield row | {"seconds": time.perf_counter() - begun}, small
    small, begun = anatomy.copied(small), time.perf_counter()
    recipe = RECIPE | {"seed": seed, "lr": RATES[share]}
    imitate.relearn(small, known.model, images.train, images.val.subset(500), recipe)
    yield {"stage": "relearned", "seconds": time.perf_counter() - begun}, small
    if share in FINETUNED:
        small, begun = anatomy.copied(small), time.perf_counter()
        recipe |= {"lr": FINETUNED[share], "epochs": 1, "images": None}
        distil = train.Distillation(known.model)
        train.fit(small, images.train, images.val.subset(500), recipe, distil=distil)
        yield {"stage": "finetuned", "seconds": time.perf_counter() - begun}, small


def of(right, loss):
    return {"top1": 100 * right.double().mean().item(), "loss": loss, "images": len(right)}


def lost(own, whole):
    """Return the points lost and their paired interval."""
    difference = 100 * (whole[0].double() - own[0].double())
    mean = difference.mean().item()
    half = 1.96 * difference.std().item() / len(difference) ** 0.5
    return {"lost": mean, "low": mean - half, "high": mean + half}


def means(table):
    """Return the points lost of each model, share and stage: mean of the seeds, and their range."""
    cuts = table[table.stage != "dense"]
    lost = cuts.groupby(["model", "share", "stage"]).lost.agg(["mean", "min", "max", "count"])
    return lost.add_prefix("lost_").rename(columns={"lost_count": "seeds"}).reset_index()


CASES = {"deep": deep}
