"""Checkpoints: any model, pruned or not, as safetensors and a JSON record from which it is built again.

A checkpoint is a folder with `model.safetensors`, `model.json` and, where masks were given that the weights do not
follow, `masks.safetensors`. Tensors with many zeros are stored without them (`packed`). Nothing is pickled, and
loading needs nothing but the folder. The record holds a hash of each file and one of all that it says itself: what was
altered, cut short or mixed up since is refused. That is no signature: who alters a record on purpose can give it a new
hash, and nothing here can tell.
"""

import contextlib
import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

from . import models, packed, parallel, shrink

FORMAT = 3
READS = (1, 2, 3)  # 1: nothing packed; 1 and 2: of the record only recipe and structure are hashed
RECORD, WEIGHTS, MASKS = "model.json", "model.safetensors", "masks.safetensors"
FIELDS = {"format": int, "vitlab": str, "recipe": dict, "structure": dict, "packed": dict, "masks": dict}
FIELDS |= {"extra": object, "sha256": dict}


def save(model, folder, *, extra=None, dtype=None, masks=None):
    """Write model to folder, over an older checkpoint there, and return the record.

    extra: JSON-able values of the caller's, such as test top1. dtype: stores floating-point tensors so
    (torch.float16), whatever the model holds; they come back in the model's own dtype. masks: {parameter:
    bool tensor}, stored as bits for `load_masks`. Weights come back as they are, whether masks were applied or not;
    where they were, the bits serve both, and at 90 % zeros a float32 file has 13 % of its size.

    A save that fails or is killed leaves the older checkpoint as it was: all files are written beside the old
    ones, then the record moves into place, then the files that it names by their hash.
    Raises ValueError for a model that `models.create` did not make and for values beyond dtype's range,
    OSError for a folder that cannot be written.
    """
    if not hasattr(model, "recipe"):
        raise ValueError(f"{type(model).__name__} has no recipe to build it again: make it by models.create")
    folder, masks = Path(folder), masks or {}
    stored, shapes = packed.pack(_tensors(model, dtype), masks)
    files = {WEIGHTS: safetensors.torch.save(stored)}
    bits = {name: packed.from_mask(mask) for name, mask in masks.items()}
    apart = {name: each for name, each in bits.items() if not _same_bits(stored.get(name + packed.BITS), each)}
    if apart:
        files[MASKS] = safetensors.torch.save(apart)
    record = {
        "format": FORMAT,
        "vitlab": version("vitlab"),
        "recipe": model.recipe,
        "structure": shrink.structure(model),
        "packed": shapes,
        "masks": {name: list(mask.shape) for name, mask in masks.items()},
        "extra": extra or {},
    }
    record["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    record = json.loads(json.dumps(record))  # as it will be read
    record["sha256"]["record"] = _own_hash(record)
    files[RECORD] = json.dumps(record, indent=1).encode()
    try:
        if parallel.is_first():
            _write(folder, files)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "make room on its disk" if full else "make this one a folder that you may write to"
        raise type(error)(
            error.errno,
            f"cannot write the checkpoint folder {folder} ({error.strerror}): choose another folder, or {cure}",
        ) from error
    parallel.wait()
    return record


def _same_bits(one, other):
    return one is not None and torch.equal(one, other)


def _write(folder, files):
    """Put files ({name: bytes}) into folder so that `read` finds all of the old ones or all of the new."""
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    new = {name: _new(folder / name) for name in files}
    try:
        for name, data in files.items():
            new[name].write_bytes(data)
    except BaseException:
        for path in new.values():
            path.unlink(missing_ok=True)
        raise
    os.replace(new[RECORD], folder / RECORD)  # from here on the new checkpoint holds
    _settle(folder)
    if MASKS not in files:
        (folder / MASKS).unlink(missing_ok=True)


def _new(path):
    return path.with_name(path.name + ".new")


def _settle(folder):
    """Move files into place that a save wrote and recorded before it was killed."""
    try:
        hashes = _record(folder)["sha256"]
    except (OSError, ValueError):
        return  # no checkpoint, or none to be trusted
    for name in (WEIGHTS, MASKS):
        new = _new(folder / name)
        with contextlib.suppress(FileNotFoundError):  # the usual case: nothing is left to be moved
            if _sha256(new) == hashes.get(name):
                os.replace(new, folder / name)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_hash(record):
    """Hash of all that record says but for this hash; in older formats of recipe and structure."""
    said = [record["recipe"], record["structure"]]  # another number of heads, say, would fit the same tensors
    if record["format"] == FORMAT:
        said = record | {"sha256": {name: each for name, each in record["sha256"].items() if name != "record"}}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _tensors(model, dtype):
    """The state dict as separate, contiguous tensors on the CPU, floating-point ones in dtype if given."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        if dtype is not None and stored.is_floating_point() and not stored.isfinite().all():
            raise ValueError(f"{name} does not fit into {dtype}: values beyond its range or not finite")
        tensors[name] = stored.contiguous()
    return tensors


def read(folder):
    """The record of the checkpoint in folder, a dict, if it and its files are those that were saved.

    Keys: format, vitlab (version), recipe, structure, packed and masks ({parameter: shape}), extra, sha256. Of the
    older formats 1 and 2 recipe, structure and files are known to be as they were, not masks and extra.
    Raises FileNotFoundError for a missing folder or file, ValueError for a record that is broken, altered or
    of another format, and for files that were altered or cut short since.
    """
    folder = Path(folder)
    _settle(folder)
    record = _record(folder)
    _check_files(folder, record)
    return record


def _record(folder):
    """The record in folder, checked for itself. Raises what `read` raises, but for the files that it names."""
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: no {RECORD}; run the step that saves it first")
    try:
        record = json.loads(path.read_text())
        written = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint's record: {error!r}; save it again") from error
    if written not in READS:
        raise ValueError(
            f"{path} has format {written}, this vitlab ({version('vitlab')}) reads up to format "
            f"{FORMAT}: install the version that wrote it ({record.get('vitlab')}) or save it again"
        )
    if fault := _fault(record):
        raise ValueError(f"{path} is no checkpoint's record of format {written}: {fault}; save it again")
    if _own_hash(record) != record["sha256"][_own_name(record)]:
        said = "what it says is" if written == FORMAT else "recipe or structure are"
        raise ValueError(
            f"{path} was altered after saving: {said} not what was saved (sha256 differs); copy or save the checkpoint "
            "again"
        )
    return record


def _own_name(record):
    return "record" if record["format"] == FORMAT else "architecture"


def _fault(record):
    """What is wrong with the fields of record, in words that name the field, or None."""
    fields = {name: kind for name, kind in FIELDS.items() if name != "packed" or record["format"] > 1}
    for name in fields | record:
        if name not in record or name not in fields:
            return f"{name} is missing" if name in fields else f"there is no {name} in it"
        if not isinstance(record[name], fields[name]):
            return f"{name} is no {fields[name].__name__}"
    for name in ("packed", "masks"):
        for key, shape in record.get(name, {}).items():
            if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
                return f"{name} has {shape!r} as the shape of {key}"
    if wrong := (record["sha256"].keys() ^ {WEIGHTS, _own_name(record)}) - {MASKS}:
        return f"sha256 has an entry too many or too few: {', '.join(sorted(wrong))}"
    return None


def _check_files(folder, record):
    for name in (WEIGHTS, MASKS):
        if name not in record["sha256"]:  # no masks apart
            continue
        if not (folder / name).is_file():
            raise FileNotFoundError(f"the checkpoint in {folder} has lost its {name}; save it again")
        if _sha256(folder / name) != record["sha256"][name]:
            raise ValueError(
                f"{folder / name} is not the file that its record was saved with: it was altered or cut "
                "short (sha256 differs); copy or save the checkpoint again"
            )


def load(folder, *, device="cpu"):
    """The model in folder, built again from record and tensors alone, in eval mode on device.

    Leaves torch's random numbers as they were. Raises what `read` raises, and ValueError naming the first
    tensor that does not fit the recorded architecture.
    """
    folder = Path(folder)
    _settle(folder)
    record = _record(folder)
    with _naming(folder), ThreadPoolExecutor(1) as beside:  # hashing a file takes longer than reading it
        checking = beside.submit(_check_files, folder, record)
        try:
            tensors = _stored(folder, record)
            _check_sizes(record["recipe"], tensors)
            model = _built(record)
        finally:
            checking.result()  # that a file was altered says more than what comes of it
    built, stored = ({k: list(t.shape) for k, t in state.items()} for state in (model.state_dict(), tensors))
    wrong = [name for name in built | stored if built.get(name) != stored.get(name)]
    if wrong:
        shapes = [state.get(wrong[0], "missing") for state in (built, stored)]
        raise ValueError(
            f"the tensors in {folder} are of another architecture than its record: {wrong[0]} is {shapes[0]} "
            f"by the record and {shapes[1]} in {WEIGHTS} ({len(wrong)} tensors differ)"
        )
    own = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    fresh = record.get("packed", {})  # the other ones are the file itself until they are copied
    tensors = {name: tensor.to(own[name], copy=name not in fresh) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)  # written to memory once
    return model.to(device).eval()


@contextlib.contextmanager
def _naming(folder):
    """Makes whatever a stranger's record and files can lead to an error that names their folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | ValueError) and str(folder) in str(error):
            raise
        raise ValueError(
            f"the checkpoint in {folder} describes no model that can be built: {type(error).__name__}: {error}; save "
            "it again"
        ) from error


def _check_sizes(recipe, tensors):
    """ValueError for a recipe of a model that is much larger than the stored tensors: building it might never end."""
    bounds = {"depth": len(tensors), "depths": len(tensors), "image_size": 8192, "img_size": 8192}
    for name, value in (recipe | recipe["options"]).items():
        bound = bounds.get(name, 1_000_000)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= bound:
                raise ValueError(f"{name} is {number} in its recipe, beyond {bound}")


def _built(record):
    """The model that record describes, without values."""
    with torch.random.fork_rng(devices=[]):
        return shrink.rebuild(_create(record["recipe"]), record["structure"])


def _stored(folder, record):
    """{name: tensor} in the checkpoint in folder, in the dtype that they were stored in."""
    stored = safetensors.torch.load_file(folder / WEIGHTS)
    try:
        return packed.unpack(stored, record.get("packed", {}))
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS} and its record do not belong together: {error}") from error


def _create(recipe):
    """models.create for weights that come later: spends no time on initial ones."""
    options = recipe["options"] | {key: value for key, value in recipe.items() if key != "options"}
    try:
        with init_empty_weights(include_buffers=False), _NoValues():  # parameters on the meta device
            model = models.create(**options)
    except NotImplementedError:  # SwinV2 fills its tables from where its weights are
        return models.create(**options)
    # Swin's window masks are in no state dict and went where the weights are: timm computes them anew
    masked = [module for module in model.modules() if any(b.is_meta for b in module.buffers(recurse=False))]
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    for module in masked:
        module.init_non_persistent_buffers()
    return model


class _NoValues(TorchFunctionMode):
    """Leaves out what gives tensors on the meta device their values: they have none, and that takes time."""

    WORDS = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_")
    FILL = {getattr(torch.Tensor, word) for word in WORDS}

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in self.FILL and arguments[0].is_meta:
            return arguments[0]
        return function(*arguments, **(options or {}))


def load_masks(folder):
    """{parameter: bool tensor} as given to `save`, {} if none were.

    Raises what `read` raises, and ValueError for a mask in the record that is in no file.
    """
    record = read(folder)
    with _naming(folder):
        return _masks(Path(folder), record)


def _masks(folder, record):
    stored = {}
    if record["masks"]:
        bits = safetensors.torch.load_file(folder / WEIGHTS)
        stored = {name.removesuffix(packed.BITS): each for name, each in bits.items() if name.endswith(packed.BITS)}
    if MASKS in record["sha256"]:
        stored |= safetensors.torch.load_file(folder / MASKS)
    if lost := record["masks"].keys() - stored.keys():
        raise ValueError(f"the masks in {folder / RECORD} are in no file beside it: {', '.join(sorted(lost))}")
    return {name: packed.to_mask(stored[name], shape, name) for name, shape in record["masks"].items()}
