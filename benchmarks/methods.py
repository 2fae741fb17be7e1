"""What the methods themselves cost: passes for scores, reconstruction, masks of 86 M weights, factorising a Swin-T,
checkpoints of a masked ViT-B.

    python benchmarks/methods.py [--rounds 7] [--threads 1] [--only passes masks svd files]

Passes, SVD and files run interleaved in one process, in a new random order each round, and ratios are taken within
rounds: medians and quartiles. Masks run one after the other, in processes of their own, for their memory. Random images
and labels; the committed CIFAR-10 models, and timm's larger ones with random weights. Writes benchmarks/methods.csv,
which git ignores.
"""

import argparse
import multiprocessing
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from torch.nn.utils import prune as torch_prune

from vitlab import budget, checkpoint, cost, lowrank, masks, models, prune, recover, scores, shrink

HERE = Path(__file__).resolve().parent
GRADIENTS = {  # every criterion that needs a backward pass
    "weights": ["gradient", "taylor", "fisher", "obd", "snip"],
    "rows": ["gradient", "taylor", "fisher"],
    "units": ["taylor", "michel", "fisher"],
}


def interleaved(calls, rounds):
    """Seconds of each call in each round, a frame [rounds, calls]; one round before is not counted."""
    shuffle, order, lines = random.Random(0).shuffle, list(calls), []
    for _ in range(rounds + 1):
        shuffle(order)
        lines.append({})
        for name in order:
            start = time.perf_counter()
            calls[name]()
            lines[-1][name] = time.perf_counter() - start
    return pd.DataFrame(lines[1:], columns=list(calls))


def told(case, seconds, against):
    """Rows of medians, and of ratios to the call named against, within rounds."""
    ratios = seconds.div(seconds[against], axis=0).quantile([0.25, 0.5, 0.75])
    columns = ["ratio_q1", "ratio", "ratio_q3"]
    return [
        {"case": case, "what": name, "seconds": seconds[name].median(), "against": against}
        | dict(zip(columns, ratios[name], strict=True))
        | {"rounds": len(seconds)}
        for name in seconds
    ]


def passes(rounds):
    """Scores, grams and reconstruction in units of forward and backward passes over the same batches."""
    rows = []
    small = Path(HERE.parent, "checkpoints", "cifar10-small")
    for name, images in [("cifar10-small/vit", 256), ("cifar10-small/swin", 256), ("vit_small_patch16_224", 16)]:
        torch.manual_seed(0)
        is_small = (small.parent / name).exists()
        model = checkpoint.load(small.parent / name) if is_small else models.create(name, num_classes=10)
        size = cost.input_shape(model)[-1]
        batches = [(torch.randn(images // 2, 3, size, size), torch.randint(0, 10, (images // 2,))) for _ in range(2)]
        kinds = ["heads", "neurons"]
        plan = budget.plan(model, scores.units(model, batches, criteria=["fisher"])["fisher"], macs=0.7, kinds=kinds)
        thin = shrink.remove(model, plan.drop)
        calls = {
            "forward and backward": lambda m=model, b=batches: plain(m, b),
            "unit gates": lambda m=model, b=batches: scores.measure(m, b, units=["fisher"]),
            "unit gates and one weight criterion": lambda m=model, b=batches: scores.measure(
                m, b, units=["fisher"], weights=["fisher"]
            ),
            "all gradient criteria": lambda m=model, b=batches: scores.measure(m, b, **GRADIENTS),
            "grams": lambda m=model, b=batches: scores.grams(m, b),
            "gradient grams": lambda m=model, b=batches: scores.gradient_grams(m, b),
            "reconstruct": lambda m=model, b=batches, t=thin, d=plan.drop: recover.reconstruct(t, m, b, drops=d),
        }
        rows += told(f"passes, {name}, {images} images", interleaved(calls, rounds), "forward and backward")
    return rows


def plain(model, batches):
    """One forward and backward pass over the batches as in training, gradients dropped after each."""
    for x, y in batches:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        model.zero_grad()


def svd(rounds):
    """All linear layers of a Swin-T at half their weights, by vitlab and by torch.linalg.svd."""
    torch.manual_seed(0)
    model = models.create("swin_tiny_patch4_window7_224", num_classes=1000)
    weights = [layer.weight.detach() for layer in models.view(model).linears().values()]
    ranks = [lowrank.rank_for(*weight.shape, 0.5) for weight in weights]

    def optimum():
        for weight, rank in zip(weights, ranks, strict=True):
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            yield u[:, :rank] * s[:rank], v[:rank]

    def ours():
        for weight, rank in zip(weights, ranks, strict=True):
            yield lowrank.svd(weight, rank)

    calls = {"torch.linalg.svd": lambda: list(optimum()), "lowrank.svd": lambda: list(ours())}
    rows = told("factorise Swin-T, half the weights", interleaved(calls, rounds), "torch.linalg.svd")
    triples = zip(weights, ours(), optimum(), strict=True)
    excess = max(((w - a[0] @ a[1]).norm() / (w - b[0] @ b[1]).norm() - 1).item() for w, a, b in triples)
    rows[-1]["note"] = f"error above the optimum by at most {excess:.1e} of it"
    return rows


def files(rounds):
    """Checkpoints of a ViT-B, dense and with 90 % of its linear weights masked: bytes, and time to load."""
    model, rows = models.create("vit_base_patch16_224", num_classes=10), []
    weights = {f"{name}.weight": layer.weight for name, layer in models.view(model).linears().items()}
    keep = masks.keep_largest({name: weight.detach().abs() for name, weight in weights.items()}, sparsity=0.9)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, f"{folder}/dense")
        prune.apply(model, keep)
        checkpoint.save(model, f"{folder}/masked", masks=keep)
        calls = {f"load {name}": lambda name=name: checkpoint.load(f"{folder}/{name}") for name in ("dense", "masked")}
        rows = told("checkpoints of ViT-B, 90 % of linear weights zero", interleaved(calls, rounds), "load dense")
        size = [sum(p.stat().st_size for p in Path(folder, name).iterdir()) for name in ("dense", "masked")]
    rows[-1]["note"] = f"{size[1] / 1e6:.1f} of {size[0] / 1e6:.1f} MB, a share of {size[1] / size[0]:.3f}"
    return rows


def mask_calls():
    """{name: a call on {name: scores} that returns what it stores}."""

    def pruned(found):
        layers = {name: torch.nn.Linear(1, 1, bias=False) for name in found}
        for name, layer in layers.items():
            layer.weight = torch.nn.Parameter(found[name], requires_grad=False)
        pairs = [(layer, "weight") for layer in layers.values()]
        torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.5)
        return [layer.weight_mask for layer in layers.values()]

    return {
        "masks.keep_largest": lambda found: list(masks.keep_largest(found, sparsity=0.5).values()),
        "torch.nn.utils.prune.global_unstructured": pruned,
        "one pass that compares": lambda found: [score > 0.5 for score in found.values()],
    }


def mask_here(name, threads):
    """Seconds (the median of five calls after the first) and MB above scores and stored masks (of the first), in this
    process, which has run nothing before."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.device("meta"):
        linears = models.view(models.create("vit_base_patch16_224", num_classes=1000)).linears()
    found = {layer: torch.rand(module.weight.shape) for layer, module in linears.items()}
    mask_calls()[name]({"warm": torch.rand(8, 8), "up": torch.rand(8, 8)})
    cost.reset_peak_memory()
    before = cost.peak_memory_mb("cpu")
    stored = mask_calls()[name](found)
    extra = cost.peak_memory_mb("cpu") - before
    kept = sum(mask.numel() * mask.element_size() for mask in stored) / 1e6
    count = sum(int(mask.count_nonzero()) for mask in stored)
    total = sum(score.numel() for score in found.values())
    stored, seconds = None, []
    for _ in range(5):
        start = time.perf_counter()
        mask_calls()[name](found)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[2], extra - kept, kept, count / total


def mask(rounds):
    """Global masks of the 86 M weights of a ViT-B, in two processes each."""
    context, lines = multiprocessing.get_context("spawn"), []
    for name in mask_calls():
        found = []
        for _ in range(min(rounds, 2)):
            with context.Pool(1) as pool:
                found.append(pool.apply(mask_here, (name, torch.get_num_threads())))
        seconds, extra, kept, share = pd.DataFrame(found).median()
        note = f"{extra:.0f} MB beyond scores and {kept:.0f} MB of masks; keeps {share:.8f}"
        lines.append({"case": "masks of ViT-B", "what": name, "seconds": seconds, "rounds": len(found), "note": note})
    first = lines[-1]["seconds"]
    return [line | {"against": lines[-1]["what"], "ratio": line["seconds"] / first} for line in lines]


CASES = {"passes": passes, "masks": mask, "svd": svd, "files": files}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for case in options.only for row in CASES[case](options.rounds)]
    about = {"torch": torch.__version__, "threads": options.threads, "machine": platform.machine()}
    table = pd.DataFrame(rows).assign(**about, cores=os.cpu_count())
    columns = ["case", "what", "seconds", "against", "ratio_q1", "ratio", "ratio_q3", "rounds", "note"]
    table = table.reindex(columns=[*columns, *about, "cores"])
    table.to_csv(HERE / "methods.csv", index=False, float_format="%.4g")
    print(table[columns[:-1]].to_markdown(index=False, floatfmt=".3g"))
    print(*(f"{row.what}: {row.note}" for row in table.dropna(subset="note").itertuples()), sep="\n")


if __name__ == "__main__":
    main()
