"""What is left of a cut where it runs: the small models on CIFAR-10 in several runtimes, float32 and int8."""

import importlib.util
import tempfile
from contextlib import nullcontext, suppress
from itertools import product
from pathlib import Path
from unittest import mock

import foundation
import pandas as pd
from common import SMALL, folder, model_of, publish
from peers import torch_pruning, torch_pruning_to
from speed import masked_in_half

from vitlab.evaluation import bench, cost, evaluate, export, roofline
from vitlab.evaluation import runtimes as there
from vitlab.pruning import budget, factor, scores, shrink
from vitlab.training import data

WAYS = ["eager float32", "onnxruntime float32", "onnxruntime int8", "onnxruntime int8-dynamic"]
WAYS += ["openvino float32", "openvino bf16", "openvino int8", "openvino int8-bf16"]
CALIBRATED, TESTED = 512, 500  # images
BATCHES = [1, 32]
INTEGERS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")  # of processors that multiply 8 bits
SHOWN = "cpu case cut runtime precision batch top1 difference difference_mean bytes latency_ms"
SHOWN += " speedup_q1 speedup speedup_q3 here_q1 here here_q3 promised note"


def runtimes(rounds):
    """Dense, masked and cut to half the MACs by units, ranks, low rank and rows, or the pool, nothing trained.

    Top-1 and differences of logits are of 500 test images; 128 training images calibrate int8.
    """
    images = data.load("cifar10", image_size=32)
    parts = []
    for case in SMALL:
        made = cuts(model_of(case), list(images.train.subset(CALIBRATED).batches(64)))
        table = in_runtimes(made, images, rounds, seconds=240)
        table = pd.concat([table, *four_bits(case, made, images)], ignore_index=True)
        parts.append(table.assign(case=case, cut=table.model.str.split().str[0], cpu=processor()))
        publish("runtimes", pd.concat(parts), shown=SHOWN.split(), beside="cpu")


def in_runtimes(made, images, rounds, *, seconds):
    """Times, sizes, top-1 and differences of models {name: model} in each runtime; seconds: to time each batch."""
    settings, sizes, refused = there.settings(made, WAYS, images=images)
    times = bench.latency(settings, batch=BATCHES, repeats=4 * rounds, seconds=seconds)
    table = roofline.bounds(settings, times).merge(sizes, on="model")
    table = table.merge(there.left(settings, images.test.subset(TESTED)), on="model")
    return pd.concat([table, refused], ignore_index=True)


def cuts(dense, batches):
    """The models of the table, {name: model}, without training."""
    made = {"dense": dense, "masked": masked_in_half(dense), **halves(dense, batches)}
    grams = scores.grams(dense, batches)
    how = {"method": "svd+iht", "support": "rows", "grams": grams, "ratio": 0.5}
    made["svd+iht-rows"], _ = factor.compress(dense, **how)
    made["pool"], _ = budget.reach(dense, batches, macs=0.5)
    return made


def halves(dense, batches):
    """The model cut to half the MACs by units and by ranks, {name: model}, without training."""
    made = {}
    for name, kinds in {
        "removed": ["heads", "neurons", "filters", "width"],
        "factored": ["ranks"],
    }.items():
        found = budget.candidates(dense, batches, kinds=kinds)
        plan = budget.plan(dense, **found, kinds=kinds, macs=0.5)
        made[name], _ = budget.cut(dense, plan, batches, compensate="least squares")
    return made


def real(rounds):
    """DINOv2's ViT-S/14 at 112 px cut to half its MACs, with a linear head of 2,000 images of Caltech-101.

    Units, units in groups of 64 (as processors multiply tiles of 64 numbers of 8 bits), ranks, and Torch-Pruning's
    Taylor, global; nothing is trained. Scores and gradients are of 256 training images with labels, 128 calibrate
    int8, and top-1 and differences of logits are of 500 test images.
    """
    images, dense = with_classifier()
    batches = list(images.train.subset(256).batches(32))
    known = budget.Calibration(
        dense, batches, kinds=["heads", "neurons", "width", "ranks"], labels="true"
    )
    made = {"dense": dense}
    units = ["heads", "neurons", "width"]
    for name, how in {
        "removed": {"kinds": units},
        "removed-64": {"kinds": units, "multiple": 64},
        "factored": {"kinds": ["ranks"]},
    }.items():
        plan = known.plan(**how, macs=0.5, keep=["head"])
        made[name] = known.reconstruct(*known.cut(plan), untouched=["head"])
    importance = torch_pruning.importance.GroupTaylorImportance()
    gradients = foundation.gradients_of(dense, batches)
    made["Torch-Pruning"], _ = torch_pruning_to(dense, 0.5, importance, gradients=gradients)
    made["Torch-Pruning"].eval()
    table = in_runtimes(made, images, rounds, seconds=400)
    table = table.assign(case="ViT-S/14", cut=table.model.str.split().str[0], cpu=processor())
    publish("runtimes_of_vit_s", table, shown=SHOWN.split(), beside="cpu")


def with_classifier():
    """Caltech-101, and DINOv2's ViT-S/14 with a linear head of 2,000 images of it."""
    lab = foundation.Lab("Caltech-101")
    parts = lab.images.train.subset(2000), lab.images.val.subset(500)
    probe = evaluate.linear_probe(
        *[each for part in parts for each in evaluate.features(lab.dense, part)]
    )
    return lab.images, foundation.with_head(lab.dense, probe.layer)


def rows(rounds):
    """Rows gone, and low rank plus rows: exported with rows put back at their places, as torch does, and without.

    Nothing is trained, and rows go by Fisher scores of 512 training images.
    """
    images = data.load("cifar10", image_size=32)
    found = importlib.util.find_spec("openvino")
    runtimes = ["onnxruntime", "openvino"] if found else ["onnxruntime"]
    parts = []
    for case in SMALL:
        dense = model_of(case)
        batches = list(images.train.subset(CALIBRATED).batches(64))
        score = scores.rows(dense, batches, criteria="fisher")["fisher"]
        made = {"dense": dense}
        for share in (0.5, 0.9):
            drop = {
                (name, "rows"): each.argsort()[: int(share * len(each))]
                for name, each in score.items()
            }
            made[f"{share:.0%} of the rows gone"] = shrink.remove(dense, drop)
        how = {"method": "svd+iht", "support": "rows", "ratio": 0.5}
        how["grams"] = scores.grams(dense, batches)
        made["low rank plus rows"], _ = factor.compress(dense, **how)
        settings = {}
        for (name, model), runtime in product(made.items(), runtimes):
            for way in ("put back", "absorbed")[: 1 if model is dense else 2]:
                run = session_of(model, runtime, as_it_is=way == "put back")
                settings[f"{name}, {way}", runtime] = bench.Setting(model, runtime, run=run)
        times = bench.latency(settings, batch=BATCHES, repeats=4 * rounds, seconds=120)
        times["what"], _ = zip(*times.model, strict=True)
        times["share"] = [
            cost.macs(made[what.rpartition(",")[0]]) / cost.macs(dense) for what in times.what
        ]
        parts.append(times.assign(case=case, cpu=processor()))
        shown = "cpu case what share runtime batch latency_ms here_q1 here here_q3".split()
        publish("rows", pd.concat(parts), shown=shown, beside="cpu")


def session_of(model, runtime, *, as_it_is):
    """The model exported and opened there; as_it_is: with rows put back at their places."""
    patch = mock.patch.object(export._absorb, "absorb", lambda model: model)
    with tempfile.TemporaryDirectory() as path, patch if as_it_is else nullcontext():
        export.to_onnx(model, Path(path, "model.onnx"))
        return export.session(Path(path, "model.onnx"), runtime)


def four_bits(case, made, images):
    """Yield a line for dense and pool with OpenVINO weights of four bits in groups of 64, not timed."""
    with suppress(ImportError):
        openvino, nncf = (export.openvino_package(name) for name in ("openvino", "nncf"))
        for name in ("dense", "pool"):
            source = Path(folder("four-bits.onnx"))
            export.to_onnx(made[name], source)
            advanced = nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE
            )
            model = nncf.compress_weights(
                openvino.convert_model(str(source)),
                mode=nncf.CompressWeightsMode.INT4_SYM,
                group_size=64,
                all_layers=True,
                advanced_parameters=advanced,
            )
            path = source.with_suffix(".xml")
            openvino.save_model(model, str(path), compress_to_fp16=False)
            run = export.session(path, "openvino")
            setting = bench.Setting(made[name], "openvino", "int8", run)
            line = there.left({f"{name} openvino int4": setting}, images.test.subset(TESTED))
            size = sum(path.with_suffix(each).stat().st_size for each in (".xml", ".bin"))
            few = sum(each.get_element_type().get_type_name() == "i4" for each in constants(model))
            note = (
                f"{few} weights of four bits, those of other widths than a multiple of 64 are whole"
            )
            yield line.assign(runtime="openvino", precision="int4 weights", bytes=size, note=note)
            for each in (source, path, path.with_suffix(".bin")):
                each.unlink()


def constants(model):
    return [each for each in model.get_ops() if each.get_type_name() == "Constant"]


def processor():
    """The vector instructions of this processor, in words."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        known = [name for name in ("avx2", "avx512f", *INTEGERS) if f" {name}" in text]
        return ", ".join(known) + ("" if {*INTEGERS} & {*known} else ", no products of 8 bits")
    return "unknown"


CASES = {"runtimes": runtimes, "runtimes_of_vit_s": real, "rows": rows}
