"""What the benchmarks share: models, interleaved timing, tables with provenance."""

import os
import random
import time
from pathlib import Path

import pandas as pd
import torch

from vitlab import files, models
from vitlab.evaluation import cost
from vitlab.models import checkpoint
from vitlab.report import tables
from vitlab.studies import runs

ROOT = Path(__file__).resolve().parents[1]
LARGE = {"ViT-S": "vit_small_patch16_224", "Swin-T": "swin_tiny_patch4_window7_224"}
TIMM = LARGE | {"ViT-B": "vit_base_patch16_224"}
SMALL = {"small ViT": "cifar10-small/vit", "small Swin": "cifar10-small/swin"}


def model_of(name, **options):
    """The committed CIFAR-10 model, or timm's with random weights, of that name; seeded, in eval mode."""
    torch.manual_seed(0)
    if name in SMALL:
        return checkpoint.load(ROOT / "checkpoints" / SMALL[name])
    return models.create(TIMM.get(name, name), **{"num_classes": 1000} | options).eval()


def images_of(model, count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *cost.input_shape(model), generator=generator)


def interleaved(calls, rounds):
    """Seconds of each call in each round, a frame [rounds, calls]; one round before is not counted.

    A call is a function, or a pair: one that prepares its argument and is not timed, and one that is. One that returns
    a float has taken its time itself.
    """
    shuffle, order, lines = random.Random(0).shuffle, list(calls), []
    for _ in range(rounds + 1):
        shuffle(order)
        lines.append({})
        for name in order:
            prepare, call = calls[name] if isinstance(calls[name], tuple) else (None, calls[name])
            given = () if prepare is None else (prepare(),)
            start = time.perf_counter()
            own = call(*given)
            lines[-1][name] = own if isinstance(own, float) else time.perf_counter() - start
    return pd.DataFrame(lines[1:], columns=list(calls))


def rows_of_ratios(case, seconds, against):
    """Rows of medians, and of ratios to the call named against, within rounds."""
    ratios = seconds.div(seconds[against], axis=0).quantile([0.25, 0.5, 0.75])
    columns = ["ratio_q1", "ratio", "ratio_q3"]
    return [
        {"case": case, "what": name, "seconds": seconds[name].median(), "against": against}
        | dict(zip(columns, ratios[name], strict=True))
        | {"rounds": len(seconds)}
        for name in seconds
    ]


def folder(name=""):
    """The folder for results, BENCH_OUT or figures/bench, or the file of that name in it."""
    path = Path(os.environ.get("BENCH_OUT") or ROOT / "figures" / "bench")
    files.make_folder(path)
    return path / name


def publish(name, rows, *, shown=None, beside=None):
    """Print a table and write it, with where it comes from, as <name>.csv and (shown columns) .md to folder().

    beside: a column, such as "cpu"; rows of an earlier run with other values in it stay above the new ones.
    """
    table, origin = pd.DataFrame(rows), runs.provenance()
    if "device" in table:  # times say "cpu", which is not yet a processor
        table["device"] = table.device.replace("cpu", origin["device"])
    if beside and folder(f"{name}.csv").exists():
        earlier = pd.read_csv(folder(f"{name}.csv"))
        earlier = earlier[~earlier[beside].isin(table[beside])]
        table = pd.concat([earlier, table], ignore_index=True)
    whole = table.copy()
    for column, value in origin.items():  # rows of an earlier run keep their own
        whole[column] = whole[column].fillna(value) if column in whole else value
    tables.save_table(whole, folder(name), kinds=["csv"])
    short = table[[column for column in shown or table.columns if column in table]]
    formats = dict.fromkeys(short.select_dtypes("float"), "{:.3g}")
    tables.save_table(short, folder(name), formats=formats, kinds=["md"])
    print(f"\n{name}\n\n{folder(f'{name}.md').read_text()}", flush=True)
    return table


@torch.inference_mode()
def answers(model, split):
    """Return which images a model answers rightly, bool [N], and its mean loss."""
    parts = [(model(x), y) for x, y in split.batches(128)]
    logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits.argmax(1) == labels, torch.nn.functional.cross_entropy(logits, labels).item()
