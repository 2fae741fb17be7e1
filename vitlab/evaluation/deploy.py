"""Write a checkpoint as a model of ONNX or OpenVINO, in float32 or int8, with what its user must know.

Nothing is left in the folder of a model that does not answer as torch does.

Public: BATCH, FILES, LINES, convert, first, write.
"""

import io
import json
import logging
import shutil
import tempfile
from contextlib import redirect_stdout, suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from vitlab import files
from vitlab.evaluation import _smooth, bench, cost, evaluate, export
from vitlab.models import anatomy, checkpoint, hub

# The files of a model, by the suffix that the user names.
FILES = {".onnx": [".onnx"], ".xml": [".xml", ".bin"]}
_LINES = """import json, numpy as np, {package}
from PIL import Image, ImageOps

about, image = json.load(open("NAME.json")), Image.open("photo.jpg").convert("RGB")
image = ImageOps.fit(image, about["size"], Image.Resampling.BILINEAR, about["border"])
pixels = (np.asarray(image) / 255 - about["mean"]) / about["std"]
images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
[logits] = {run}
print(about["classes"][logits[0].argmax()])"""
_ONNX = 'onnxruntime.InferenceSession("NAME.onnx").run(["logits"], {"images": images})'
_OPENVINO = 'openvino.compile_model("NAME.xml", "CPU")(images).values()'
# How the files are used, without torch and vitlab. They stand in the card of each model.
LINES = {
    ".onnx": _LINES.replace("{package}", "onnxruntime").replace("{run}", _ONNX),
    ".xml": _LINES.replace("{package}", "openvino").replace("{run}", _OPENVINO),
}
_RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino"}
_CHECKED = 256  # images on which a file is compared with torch
_CALIBRATED = 128  # images that int8 is calibrated by
BATCH = 16
_AGREEMENT = 0.95  # the least share of images with torch's answer, in int8
_SMOOTH = 0.95  # NNCF's own share of scales that SmoothQuant moves
_ALPHA = 0.5  # such a share in onnxruntime: with 0.75 logits were as near, or farther
_SLOWER = 1.1  # how many times as far as unsigned weights signed ones may be
_ROUNDS = 9  # of timing


def write(folder, path, *, images=None, int8=False):
    """Write a checkpoint as NAME.onnx with its preprocessing as NAME.json and a card as NAME.md.

    folder: a checkpoint, as checkpoint.save wrote it
    path: of NAME.onnx, or of NAME.xml for OpenVINO, which writes NAME.bin, too; what stands there
        is replaced only when all files are made and checked
    images: data.Dataset of the model's classes and size: it is checked on images of val, top-1 is
        measured on test, and int8 is calibrated by some of train. None: it is checked on drawn ones
    int8: quantise linear layers statically, and convolutions where that is faster here

    Returns lines that say what was compared, chosen and measured.
    Raises ValueError for float32 logits off by more than export.TOLERANCE of the largest, for int8
    with other answers than torch's on more than 5 % of the images or without images to calibrate
    by, and for a model of which nobody says how its images are normalised.
    Raises what checkpoint.load, export.to_onnx and `convert` raise.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix not in FILES:
        raise ValueError(
            f"{path} does not end in .onnx, nor in .xml for OpenVINO: NAME.json and NAME.md go "
            "beside NAME.onnx or NAME.xml"
        )
    runtime = _RUNTIMES[path.suffix]
    model = checkpoint.load(folder)
    if int8 and not (images and model.num_classes):
        raise ValueError(
            "int8 is calibrated by images, and checked by how many of them it classifies as torch "
            f"does; got {'a model without classes' if images else 'no images'}: give --images with "
            "the name or folder of the model's images, or export in float32"
        )
    about = _preprocessing(model, images)
    model.normalise, model.class_names = (about["mean"], about["std"]), about["classes"]
    shown = export.random_images(model, 16)
    on = "16 drawn images, as those of its study were not given"
    if images:
        shown = first(images.val, _CHECKED)
        on = f"{len(shown)} validation images of {images.description}"
    files.make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as staging:
        made, source = Path(staging, path.name), Path(staging, "float32.onnx")
        export.to_onnx(model, source)
        convert(source, made)
        session = export.session(made, runtime)
        error = max(export.difference(model, session, each) for each in (shown[:1], shown))
        if not error <= export.TOLERANCE:
            raise ValueError(
                f"{path} was not written: its logits differ by {error:.1e} of the largest (at most "
                f"{export.TOLERANCE:.0e}) on {on}{export.cancellation(model, shown[:2])}"
            )
        lines = [f"float32: logits as torch's up to {error:.0e} of the largest, on {on}"]
        lines += _right(model, session, images, "float32")
        if int8:
            lines += convert(source, made, first(images.train, _CALIBRATED))
            session = export.session(made, runtime)
            agreement = _agreement(model, session, shown)
            if not agreement >= _AGREEMENT:
                raise ValueError(
                    f"{path} was not written: in int8 {100 * agreement:.1f} % of its answers are "
                    f"torch's (at least {100 * _AGREEMENT:.0f} %) on {on}; export it in float32"
                )
            lines.append(f"int8: {100 * agreement:.1f} % of its answers are torch's, on {on}")
            lines += _right(model, session, images, "int8")
        made.with_suffix(".json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        use = LINES[path.suffix].replace("NAME", path.stem)
        text = "\n".join([_history(folder), "", *(f"- {line}" for line in lines)])
        hub.card(folder, path.stem, about=text, use=use).save(made.with_suffix(".md"))
        for suffix in (".json", ".md", *reversed(FILES[path.suffix])):
            made.with_suffix(suffix).replace(path.with_suffix(suffix))
    return lines


def _preprocessing(model, images):
    """Return what the user of a model must do to an image, and what its answers are called."""
    size = cost.input_shape(model)[-1]
    if images:
        anatomy.check_classes(model, images)
        evaluate.check_normalised(model, images.val)
        if images.image_size != size:
            raise ValueError(f"the model takes {size} px, the images are of {images.image_size}")
    elif model.normalise is None:
        raise ValueError(
            "the checkpoint does not say how its images were normalised: give --images with the "
            "name or folder of the model's images"
        )
    mean, std = model.normalise or (images.val.mean, images.val.std)
    # Validation images are larger than what is shown of them, by this much on each side.
    stored = images.val.store.shape[1] if images else size
    border = (1 - images.val.window / stored) / 2 if images else 0
    classes = getattr(model, "class_names", None) or (images.classes if images else None)
    return {
        "size": [size, size],
        "resize": "the middle square without this share of its side at each border, bilinear",
        "border": border,
        "mean": mean,
        "std": std,
        "classes": list(classes or map(str, range(model.num_classes))),
    }


def first(split, count):
    """Return up to count images of a data.Split, of all classes: float32 [count, 3, S, S]."""
    count = min(count, len(split))
    [(images, _)] = split.subset(count).batches(count)
    return images.contiguous()


def _history(folder):
    """Return in words what a checkpoint's record, and that of its dense model, say of top-1."""
    words = []
    for each, name in ((folder.parent / "dense", "before the cut"), (folder, "of this model")):
        with suppress(OSError, ValueError):
            extra = checkpoint.read(each)["extra"]
            top1 = extra.get("top1", extra.get("test", {}).get("top1"))
            if top1 is not None:
                words.append(f"{top1:.2f} % {name}")
    known = ", ".join(words) or "not at all"
    return (
        f"Top-1 on test images, as the checkpoint records it: {known}. The licence is for the owner "
        "to say: `license:` in the head of this card."
    )


def _right(model, session, images, precision):
    """Return a line of a session's top-1 on the test images, none where nothing can be right."""
    if not (images and model.num_classes and len(images.test)):
        return []
    right = sum(
        (session(x.contiguous()).argmax(1) == y).sum().item() for x, y in images.test.batches(BATCH)
    )
    count = len(images.test)
    return [f"{precision}: top-1 {100 * right / count:.1f} % on {count} test images"]


@torch.inference_mode()
def _agreement(model, session, images):
    """Return the share of images to which a session gives the model's answer."""
    same = session(images).argmax(1) == model(images).argmax(1)
    return same.double().mean().item()


def convert(source, path, images=None, *, dynamic=False):
    """Write a checked float32 ONNX file as NAME.onnx or as OpenVINO's NAME.xml and NAME.bin.

    source: the ONNX file, as export.to_onnx wrote it
    path: of NAME.onnx or NAME.xml
    images: float32 [B, 3, S, S], by which int8 is calibrated, and errors measured. None: in float32
    dynamic: whether int8 scales the inputs of each layer anew in each call, of linear layers alone,
        in onnxruntime alone; else their scales are those of the calibration

    Returns lines that say what was chosen for int8, and why.
    Raises ModuleNotFoundError, which says what to install, without the packages, and ValueError for
    dynamic int8 in OpenVINO or without images.
    """
    source, path = Path(source), Path(path)
    if dynamic and path.suffix == ".xml":
        raise ValueError("dynamic int8 is onnxruntime's; OpenVINO has int8 with calibrated scales")
    if dynamic and images is None:
        raise ValueError("dynamic int8 needs images, by which its errors are measured; got none")
    if path.suffix == ".xml":
        return _to_openvino(source, path, images)
    if images is None:
        shutil.copyfile(source, path)
        return []
    return _quantise(source, path, images, dynamic)


def _to_openvino(source, path, images):
    """Do what `convert` says, for OpenVINO."""
    openvino = export.openvino_package()

    def converted():
        return openvino.convert_model(str(source))  # anew, as NNCF changes what it is given

    def save(model):
        openvino.save_model(model, str(path), compress_to_fp16=False)

    if images is None:
        save(converted())
        return []
    nncf = export.openvino_package("nncf")
    nncf.set_log_level(logging.ERROR)
    graph = converted()
    # As in _quantise: products of queries, keys and values stay in float32, and convolutions too.
    products = [
        each.get_friendly_name()
        for each in graph.get_ops()
        if each.get_type_name() == "MatMul"
        and each.input_value(1).get_node().get_type_name() != "Constant"
    ]
    whole = nncf.IgnoredScope(names=products, types=["Convolution"], validate=False)
    batches = nncf.Dataset([batch.numpy() for batch in images.split(BATCH)])

    def quantised(fix, alpha):
        options = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix(fix),
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha),
            disable_bias_correction=True,  # a third of the time, and the error is the same
        )
        with redirect_stdout(io.StringIO()):  # its bars
            made = nncf.quantize(
                converted(),
                batches,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(images),
                ignored_scope=whole,
                advanced_parameters=options,
            )
        save(made)
        return export.session(path, "openvino")

    float32 = export.session(source, "openvino")
    expected = float32(images)
    sessions, errors = {}, {}

    def nearest_of(*ways):
        for way in files.progress(ways, "quantising"):
            sessions[way] = quantised(*way)
            errors[way] = _mean_error(sessions[way](images), expected)
        return min(errors, key=errors.get)

    # SmoothQuant moves scales from inputs into weights, which made a Swin's logits too large; -1
    # leaves it out. Where products of 8 bits are added up in 16, they saturate, unless weights have
    # seven bits.
    _, alpha = nearest_of(("disable", _SMOOTH), ("disable", -1))
    best = nearest_of(("enable", alpha))
    if best != list(errors)[-1]:
        quantised(*best)  # the file is of the last one
    rounds = _times({"float32": float32, "int8": sessions[best]}, images[:BATCH])
    speed = np.median(rounds["float32"] / rounds["int8"])
    least, *_, most = (f"{100 * error:.2f}" for error in sorted(errors.values()))
    bits = {"disable": "eight", "enable": "seven"}[best[0]]
    smooth = "without" if best[1] < 0 else "with"
    return [
        f"int8: weights of {bits} bits {smooth} SmoothQuant, as the mean error of the logits on "
        f"{len(images)} training images is the least, {least} % of the largest (up to {most} % "
        "otherwise); convolutions in float32",
        _speed(speed, "OpenVINO"),
    ]


def _mean_error(logits, expected):
    """Return the mean error of logits, a share of the largest that is expected."""
    return ((logits - expected).abs().mean() / expected.abs().max()).item()


def _speed(ratio, runtime):
    """Say how much faster int8 is than float32."""
    return (
        f"int8: {ratio:.2f} times as fast as float32 in {runtime}, {BATCH} images, "
        f"{torch.get_num_threads()} thread(s) of this machine"
    )


def _quantise(source, path, images, dynamic):
    """Do what `convert` says, for onnxruntime in int8."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, made = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    # This folds constants, or layers with others would be skipped. Symbolic shapes, which serve it in
    # nothing here, cannot be had of what torch before 2.15 exports.
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    linear = _smooth.LINEAR
    model = onnx.load(prepared)
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    # An older torch writes shapes of constants, too, which are wrong once onnxruntime transposes one.
    shapes = [shape for shape in graph.value_info if shape.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
    # Models that compute the same, with large values in the inputs of layers or in their weights.
    models = {False: model, True: _smooth.smoothed(model, images, _ALPHA)}
    # Products of queries, keys and values are as fast in float32, and nearer.
    products = [
        node.name
        for node in graph.node
        if node.op_type in linear and node.input[1] not in constants
    ]

    def quantised(kinds, smooth, per_channel, reduce_range, unsigned):
        onnx.save(models[smooth], prepared)
        batches = iter([{"images": batch.numpy()} for batch in images.split(BATCH)])
        options = {
            "op_types_to_quantize": kinds,
            "per_channel": per_channel,
            "reduce_range": reduce_range,
            "weight_type": getattr(quantization.QuantType, "QUInt8" if unsigned else "QInt8"),
            "nodes_to_exclude": products,
        }
        if dynamic:
            quantization.quantize_dynamic(prepared, made, **options)
            return made.read_bytes()
        quantization.quantize_static(
            prepared,
            made,
            SimpleNamespace(get_next=lambda: next(batches, None)),
            **options,
            activation_type=quantization.QuantType.QUInt8,
            # What a layer gives stays as it is: norms and sums read it in float32 anyway.
            extra_options={"OpTypesToExcludeOutputQuantization": linear},
        )
        return made.read_bytes()

    float32 = export.session(source)
    expected = float32(images)
    files_by_way, errors = {}, {}

    def nearest_of(ways):
        for way in files.progress(ways, "quantising"):
            files_by_way[way] = quantised(linear, *way)
            errors[way] = _mean_error(export.session(files_by_way[way])(images), expected)
        return min(errors, key=lambda way: errors[way] * (_SLOWER if way[-1] else 1))

    # Where a processor adds products of 8 bits up in 16, some saturate: only the error tells.
    # onnxruntime adds those of unsigned weights up in 32, so that what SmoothQuant brings shows by
    # them; processors that have instructions for products of 8 bits may be slower by them.
    smooth, *_ = nearest_of([(smooth, True, False, True) for smooth in models])
    best = nearest_of([(smooth, *way, False) for way in product((True, False), (False, True))])
    others = sorted(error for way, error in errors.items() if way != best)
    smooth, per_channel, reduce_range, unsigned = best
    way = (
        f"per_channel={per_channel}, reduce_range={reduce_range}, "
        f"{'unsigned' if unsigned else 'signed'} weights {'with' if smooth else 'without'} SmoothQuant"
    )
    off = f"{100 * errors[best]:.2f}"
    chosen = files_by_way[best]
    if dynamic:
        path.write_bytes(chosen)
        return [f"dynamic int8: {way}, {off} % off"]
    with_convolutions = quantised([*linear, "Conv"], *best)
    sessions = {
        "float32": float32,
        "linear": export.session(chosen),
        "all": export.session(with_convolutions),
    }
    rounds = _times(sessions, images[:BATCH])
    gain = np.quantile(rounds["linear"] / rounds["all"], [0.25, 0.5])
    takes_convolutions = gain[0] > 1  # in three rounds of four
    path.write_bytes(with_convolutions if takes_convolutions else chosen)
    speed = np.median(rounds["float32"] / rounds["all" if takes_convolutions else "linear"])
    return [
        f"int8: {way}: the mean error of the logits on {len(images)} training images is {off} % of "
        f"the largest ({100 * others[0]:.2f} to {100 * others[-1]:.2f} % otherwise); convolutions in "
        f"{'int8' if takes_convolutions else 'float32'}: int8 ones make the model {gain[1]:.2f} "
        f"times as fast (lower quartile {gain[0]:.2f})",
        _speed(speed, "onnxruntime"),
    ]


def _times(sessions, images):
    """Return {name: milliseconds [rounds]} of sessions on a batch, taken in turns."""
    cpu = torch.device("cpu")
    times = {name: [] for name in sessions}
    for _ in files.progress(range(_ROUNDS + 1), "timing"):
        for name, session in sessions.items():
            times[name].append(bench.milliseconds(lambda run=session: run(images), cpu))
    return {name: np.array(each[1:]) for name, each in times.items()}  # the first warms up
