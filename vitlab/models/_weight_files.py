"""Read what a file or folder of weights holds: tensors by name, and what stands beside them.

Public: class_names, described_beside, json_beside, tensors.
"""

import argparse
import json
import re
import zipfile

import safetensors.torch
import torch

from vitlab.models import _packed, checkpoint


def described_beside(path):
    """Return the record of `checkpoint.save` and Hugging Face's config beside weights, or {}."""
    folder = path if path.is_dir() else path.parent
    record = {}
    is_whole = path.is_dir() or path.name == checkpoint.WEIGHTS
    if is_whole and (folder / checkpoint.RECORD).is_file():
        record = checkpoint.read(folder)
    config = json_beside(path, "config.json")
    return record, config if "model_type" in config else {}


def json_beside(path, name):
    """Return the dict in the file of this name beside or in weights, {} where there is none."""
    file = (path if path.is_dir() else path.parent) / name
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no JSON of named values: {error}") from error


def class_names(record, config):
    """Return the names of the classes in the order of the head's outputs, [] where none are said."""
    label_of = config.get("id2label") or {}
    numbers = sorted(filter(str.isdigit, label_of), key=int)
    names = record.get("classes") or [str(label_of[number]) for number in numbers]
    filled_in = all(re.fullmatch(r"LABEL_\d+", name) for name in names)  # by transformers
    return [] if filled_in else names


_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_LOOKED_FOR = (checkpoint.WEIGHTS, "model-*-of-*.safetensors", "pytorch_model.bin")


def tensors(path, record):
    """Return {name: tensor} of weights, names of nested dicts joined by dots, zeros unpacked."""
    parts = [path] if path.is_file() else []
    for pattern in _LOOKED_FOR:
        parts = parts or sorted(path.glob(pattern))
    if not parts:
        others = [file.name for file in sorted(path.glob("*")) if file.suffix in _ENDINGS]
        raise FileNotFoundError(
            f"no weights at {path}; give a .safetensors or .pth file or a folder with one of "
            f"{', '.join(_LOOKED_FOR)}"
            + (f"; this one holds {', '.join(others)}: give the path of one" if others else "")
        )
    tensors = {}
    for part in parts:
        tensors |= dict(_flat(_content(part)))
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name: it needs those of a state_dict()")
    if not any(name.endswith(_packed.BITS) for name in tensors):
        return tensors
    if not record:
        raise FileNotFoundError(
            f"{path} is stored without its zeros and can be read only beside its "
            f"{checkpoint.RECORD}"
        )
    return _packed.unpack(tensors, record["packed"])


def _content(file):
    """Return what a file of weights holds. Raises ValueError, with what the file is instead."""
    with open(file, "rb") as opened:
        start = opened.read(200).lstrip()
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's and Meta's scripts
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = f"it is broken or cut short ({type(error).__name__}): copy or download it again"
        if start.startswith(b"<"):
            why = "it is a web page: download the file itself"
        elif start.startswith(b"version https://git-lfs"):
            why = "it only points to the file: fetch that by `git lfs pull`"
        elif start and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
            why = "it is text and no checkpoint: give the file that holds the tensors"
        elif file.suffix in (".npz", ".npy", ".h5", ".msgpack", ".onnx"):
            why = f"{file.suffix} is not read: give the same weights as .safetensors or .pth"
        elif zipfile.is_zipfile(file) or start.startswith(b"\x80"):  # whole, and no plain dict
            why = (
                f"beside tensors it holds objects ({_objects(file)}), which may run code when "
                "opened: where it was made, save the tensors alone by "
                "torch.save(model.state_dict(), ...)"
            )
    # Without the first error: torch's own words advise to open the file unsafely.
    raise ValueError(f"no weights can be read from {file}: {why}")


def _objects(file):
    """Return the names of the classes that a pickled file needs, as far as torch can tell."""
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # of programs and of files older than zip it cannot
        return "a whole model or program, for example"


# Wrappers that put their name before a part of the model: torch.compile, FSDP, checkpointing.
_WRAPPERS = r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def _flat(content, prefix=""):
    """Yield (name, tensor) of nested dicts."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            yield re.sub(_WRAPPERS, "", f"{prefix}{key}"), value
        else:
            yield from _flat(value, f"{prefix}{key}.")
