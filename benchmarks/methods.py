"""What the methods themselves cost: score passes, reconstruction, masks of 86 M weights, factorising a Swin-T, files of
a masked ViT-B, the training loop, and moves in the explorer."""

import contextlib
import copy
import gc
import io
import multiprocessing
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from common import images_of, interleaved, model_of, publish, rows_of_ratios
from torch.nn.utils import prune as torch_prune

from vitlab import models
from vitlab.evaluation import cost, evaluate, memory
from vitlab.files import repository
from vitlab.models import checkpoint
from vitlab.pruning import budget, lowrank, masks, prune, recover, scores, shrink
from vitlab.studies import runs
from vitlab.training import data, train

GRADIENTS = {  # every criterion that needs a backward pass
    "weights": ["gradient", "taylor", "fisher", "obd", "snip"],
    "rows": ["gradient", "taylor", "fisher"],
    "units": ["taylor", "michel", "fisher"],
}


def passes(rounds):
    """Scores, grams and reconstruction in units of forward and backward passes over the same batches."""
    rows = []
    for name, images in [
        ("small ViT", 256),
        ("small Swin", 256),
        ("ViT-S", 16),
        ("Swin-T", 16),
        ("ViT-B", 16),
    ]:
        model = model_of(name) if name.startswith("small") else model_of(name, num_classes=10)
        both = images_of(model, images).chunk(2)
        batches = [(x, torch.randint(0, 10, (len(x),))) for x in both]
        kinds = ["heads", "neurons"]
        plan = budget.plan(
            model,
            scores.units(model, batches, criteria=["fisher"])["fisher"],
            macs=0.7,
            kinds=kinds,
        )
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
            "reconstruct": lambda m=model, b=batches, t=thin, d=plan.drop: recover.reconstruct(
                t, m, b, drops=d
            ),
        }
        rows += rows_of_ratios(
            f"passes, {name}, {images} images", interleaved(calls, rounds), "forward and backward"
        )
    publish("passes", rows)


def plain(model, batches):
    """One forward and backward pass over the batches as in training, gradients dropped after each."""
    for x, y in batches:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        model.zero_grad()


def svd(rounds):
    """All linear layers of a Swin-T at half their weights, by vitlab and by torch.linalg.svd."""
    model = model_of("Swin-T")
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
    rows = rows_of_ratios(
        "factorise Swin-T, half the weights", interleaved(calls, rounds), "torch.linalg.svd"
    )
    triples = zip(weights, ours(), optimum(), strict=True)
    excess = max(
        ((w - a[0] @ a[1]).norm() / (w - b[0] @ b[1]).norm() - 1).item() for w, a, b in triples
    )
    rows[-1]["note"] = f"error above the optimum by at most {excess:.1e} of it"
    publish("svd", rows)


def files(rounds):
    """Checkpoints of a ViT-B, dense and with 90 % of its linear weights masked: bytes, and time to load a model from
    them, beside that of reading the files and nothing else."""
    model, rows = model_of("ViT-B", num_classes=10), []
    weights = {
        f"{name}.weight": layer.weight for name, layer in models.view(model).linears().items()
    }
    keep = masks.keep_largest(
        {name: weight.detach().abs() for name, weight in weights.items()}, sparsity=0.9
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, f"{folder}/dense")
        prune.apply(model, keep)
        checkpoint.save(model, f"{folder}/masked", masks=keep)
        both = ("dense", "masked")
        calls = {
            f"read {n}": lambda n=n: len(Path(folder, n, checkpoint.WEIGHTS).read_bytes())
            for n in both
        }
        calls |= {f"load {n}": lambda n=n: checkpoint.load(f"{folder}/{n}") for n in both}
        seconds = interleaved(calls, rounds)
        size = [sum(p.stat().st_size for p in Path(folder, name).iterdir()) for name in both]
    case = "checkpoints of ViT-B, 90 % of linear weights zero"
    rows = (
        rows_of_ratios(case, seconds, "read dense")
        + rows_of_ratios(case, seconds[["read masked", "load masked"]], "read masked")[1:]
    )
    rows[1]["note"] = (
        f"{size[1] / 1e6:.1f} of {size[0] / 1e6:.1f} MB, a share of {size[1] / size[0]:.3f}"
    )
    publish("files", rows)


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
    memory.reset_peak_memory()
    before = memory.peak_memory_mb("cpu")
    stored = mask_calls()[name](found)
    extra = memory.peak_memory_mb("cpu") - before
    kept = sum(mask.numel() * mask.element_size() for mask in stored) / 1e6
    count = sum(int(mask.count_nonzero()) for mask in stored)
    total = sum(score.numel() for score in found.values())
    stored, seconds = None, []
    for _ in range(5):
        start = time.perf_counter()
        mask_calls()[name](found)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[2], extra - kept, kept, count / total


def masks_of_vit_b(rounds):
    """Global masks of the 86 M weights of a ViT-B, in two processes each."""
    context, lines = multiprocessing.get_context("spawn"), []
    for name in mask_calls():
        found = []
        for _ in range(min(rounds, 2)):
            with context.Pool(1) as pool:
                found.append(pool.apply(mask_here, (name, torch.get_num_threads())))
        seconds, extra, kept, share = pd.DataFrame(found).median()
        note = f"{extra:.0f} MB beyond scores and {kept:.0f} MB of masks; keeps {share:.8f}"
        lines.append(
            {
                "case": "masks of ViT-B",
                "what": name,
                "seconds": seconds,
                "rounds": len(found),
                "note": note,
            }
        )
    first = lines[-1]["seconds"]
    against = {"against": lines[-1]["what"]}
    publish(
        "masks_of_vit_b", [line | against | {"ratio": line["seconds"] / first} for line in lines]
    )


def training(rounds):
    """The loop of train.fit, without its validation, against a bare loop of the same model, batches and bf16."""
    rows = []
    for name, images, batch in [
        ("small ViT", 768, 128),
        ("small Swin", 768, 128),
        ("ViT-S", 32, 8),
        ("Swin-T", 32, 8),
    ]:
        model = model_of(name) if name.startswith("small") else model_of(name, num_classes=10)
        split = data_of(model, images)
        calls = {
            "bare loop": lambda m=model, s=split, b=batch: bare_loop(m, s, b),
            "bare loop, attention not fused": lambda m=model, s=split, b=batch: bare_loop(
                m, s, b, fused=False
            ),
            "train.fit": lambda m=model, s=split, b=batch: fitted(m, s, b),
        }
        rows += rows_of_ratios(
            f"training, {name}, {images} images", interleaved(calls, rounds), "bare loop"
        )
    publish("training", rows)


def data_of(model, images):
    """A data.Split of random images."""
    size, rng = cost.input_shape(model)[-1], np.random.default_rng(0)
    store = rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, 10, images))
    half = (0.5, 0.5, 0.5)
    return data.Split(
        store, np.arange(images), labels, image_size=size, window=size, mean=half, std=half
    )


OPTIONS = {"lr": 1e-4, "weight_decay": 0.05}


def fitted(model, split, batch):
    """One epoch of train.fit; returns the seconds of its steps, which are what the other loop has."""
    model = copy.deepcopy(model)
    with contextlib.redirect_stdout(io.StringIO()):
        history = train.fit(
            *(model, split, split.subset(8)),
            OPTIONS
            | {
                "epochs": 1,
                "warmup_epochs": 0,
                "batch_size": batch,
                "augment": {},
                "precision": "bf16",
            },
        )
    return history.seconds.iloc[0]


def bare_loop(model, split, batch, fused=True):
    """The same steps written down plainly: AdamW, bf16 autocast, gradients clipped; returns their seconds."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True)
    begun = time.perf_counter()
    for x, y in split.batches(batch, shuffle=True, seed=0, epoch=0, drop_last=True):
        with evaluate.autocast(x.device, "bf16"):
            loss = torch.nn.functional.cross_entropy(model(x).float(), y, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begun


def moves(rounds):
    """Moves of the explorer's widgets on the demo's models, of random weights: seconds from a new value until picture
    and tables are ready to be sent, what the browser takes left out. Three moves of each widget a round."""
    sys.path.insert(0, str(repository() / "notebooks"))  # the explorer lies beside its notebook
    from explore import Explorer

    rows = []
    for name in ("vit", "swin"):
        with tempfile.TemporaryDirectory() as root, mock.patch.dict("os.environ", VITLAB_DATA=root):
            lab = runs.open_run("demo", name, 0)
            torch.manual_seed(0)
            model = models.create(**lab.model, num_classes=10, image_size=32)
            checkpoint.save(model, lab.path("dense"))
            explorer, images = Explorer(lab), images_of(model, 64)
        gc.collect()
        gc.freeze()  # as Explorer.show does
        calls = {"forward, 64 images": partial(model.eval(), images)}
        choose = random.Random(0).choice
        for which in ("sparsity", "macs", "criterion", "unit_criterion", "layer", "block"):
            widget = getattr(explorer, which)
            calls[which] = partial(other_value, choose, widget), partial(setattr, widget, "value")
        seconds = interleaved(calls, 3 * rounds)
        gc.unfreeze()
        case = f"moves in the explorer, the demo's {name}"
        slowest = seconds.max()
        rows += [
            row | {"slowest": slowest[row["what"]]}
            for row in rows_of_ratios(case, seconds, "forward, 64 images")
        ]
    publish("moves", rows)


def other_value(choose, widget):
    """Another value than the widget has."""
    if options := getattr(widget, "options", None):
        return choose([each for each in options if each != widget.value])
    hundredths = range(round(100 * widget.min), round(100 * widget.max) + 1)
    return choose([each for each in hundredths if each != round(100 * widget.value)]) / 100


CASES = {each.__name__: each for each in (passes, masks_of_vit_b, svd, files, training, moves)}
