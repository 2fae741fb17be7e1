"""Do runtimes of phones compute what torch does? The small models on CIFAR-10, dense and cut, one image a call."""

import importlib.metadata
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import SMALL, model_of, publish
from deployed import halves

from vitlab.evaluation import export
from vitlab.training import data

CALIBRATED, TESTED = 128, 8  # images


def elsewhere(rounds):
    """Dense, and half the MACs by units or ranks, nothing trained: differences to torch's logits in float32."""
    images = data.load("cifar10", image_size=32)
    batches = list(images.train.subset(CALIBRATED).batches(64))
    seen, _ = next(images.test.subset(TESTED).batches(TESTED))
    seen = seen.contiguous()  # ExecuTorch reads what comes later in the order of its example
    rows = []
    for case in SMALL:
        dense = model_of(case)
        for cut, model in ({"dense": dense} | halves(dense, batches)).items():
            for runtime, (converted, packages) in RUNTIMES.items():
                row = {"runtime": runtime, "case": case, "cut": cut, "torch": torch.__version__}
                rows.append(row | compared(converted, packages, model, seen))
        publish("elsewhere", rows)


def compared(converted, packages, model, images):
    """What a runtime makes of a model: versions, the largest difference, and what went wrong, if anything."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
            run = converted(export.opened(model), images[:1], Path(folder))
            differences = [export.difference(model, run, image) for image in images.split(1)]
            return {"versions": ", ".join(versions), "difference": max(differences), "note": ""}
        except ImportError:
            return {"versions": "", "note": f"not run: pip install {' '.join(packages)}"}
        except Exception as error:  # whatever a converter says belongs into the table
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            return {"versions": ", ".join(versions), "note": said[:100]}


def in_ncnn(model, image, folder):
    import ncnn
    import pnnx

    pnnx.export(model, str(folder / "small.pt"), image, fp16=False)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    param, weights = (str(folder / f"small.ncnn.{end}") for end in ("param", "bin"))
    if net.load_param(param) or net.load_model(weights):
        raise ValueError("ncnn does not load what pnnx wrote")

    def logits_of(image):
        numbers = np.array(image[0], order="C")  # Mat reads them as they lie, and keeps no copy
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(numbers).clone())
        return torch.tensor(np.array(extractor.extract("out0")[1]))[None]

    return logits_of


def in_executorch(model, image, folder):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    with torch.no_grad():
        program = torch.export.export(model, (image,), strict=True)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (folder / "small.pte").write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(folder / "small.pte").load_method("forward")
    return lambda image: method.execute([image])[0].clone()


def in_litert(model, image, folder):
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    litert_torch.convert(model, (image,)).export(str(folder / "small.tflite"))
    runner = Interpreter(str(folder / "small.tflite"), num_threads=1).get_signature_runner()
    [name] = runner.get_input_details()
    return lambda image: torch.tensor(next(iter(runner(**{name: image.numpy()}).values())))


RUNTIMES = {
    "ncnn": (in_ncnn, ["ncnn", "pnnx"]),
    "ExecuTorch": (in_executorch, ["executorch"]),
    "LiteRT": (in_litert, ["litert-torch", "ai-edge-litert"]),
}
CASES = {"elsewhere": elsewhere}
