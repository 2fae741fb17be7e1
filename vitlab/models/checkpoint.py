"""Save and load any model, pruned or not, as safetensors and a JSON record to build it from.

A checkpoint is a folder. Nothing is pickled, and loading needs nothing but the folder.

Public: RECORD, WEIGHTS, load, load_masks, read, save.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch

from vitlab import files, parallel
from vitlab.models import _packed, _structure, build

RECORD = "model.json"
WEIGHTS = "model.safetensors"  # tensors with many zeros are stored without them, see `_packed`
_MASKS = "masks.safetensors"  # only where masks were given that the weights do not follow
# The record holds a hash of each file and one of all that the record itself says. So what was
# altered, cut short or mixed up after saving is refused. The hashes are no signature: who alters a
# record on purpose can give it a new hash, and nothing here can tell.
_FORMAT = 3
_READABLE = (1, 2, 3)  # 1: nothing packed; 1 and 2: only recipe and structure of the record hashed


def save(model, folder, *, extra=None, dtype=None, masks=None, name=None, options=None):
    """Write model to folder, over an older checkpoint there, and return the record.

    model: as from `models.create` or timm.create_model, cut or not
    folder: is made if it is not there
    extra: JSON-able values of the caller's, such as test top1
    dtype: stores floating-point tensors so (torch.float16), whatever the model holds; they come
        back in the model's own dtype
    masks: {parameter: bool tensor}, stored as bits for `load_masks`
    name: timm's name of a model that was made by neither of the two; None: read from the model
    options: the arguments that timm.create_model makes that model with before any cut, as a dict
    Raises ValueError for a model that these would not build again, naming what a checkpoint cannot
    hold, such as hooks. So it does for values beyond dtype's range.
    Raises OSError for a folder that cannot be written.
    """
    folder = Path(folder)
    masks = masks or {}
    # This refuses a model that recipe and structure do not rebuild.
    recipe, cut = _structure.described(model, name, options)
    # Weights come back as they are, whether masks were applied or not. Where they were, the stored
    # bits serve both: at 90 % zeros a float32 file has 13 % of its size.
    tensors, shapes = _packed.pack(_tensors(model, dtype), masks)
    contents = {WEIGHTS: safetensors.torch.save(tensors)}
    if bits := _bits_apart(masks, tensors):
        contents[_MASKS] = safetensors.torch.save(bits)
    record = {
        "format": _FORMAT,
        "vitlab": files.version(),
        "recipe": recipe,
        "structure": cut,
        "packed": shapes,
        "normalise": getattr(model, "normalise", None),
        "masks": {name: list(mask.shape) for name, mask in masks.items()},
        "classes": getattr(model, "class_names", None),
        "extra": extra or {},
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    record = json.loads(json.dumps(record))  # as it will be read
    record["sha256"]["record"] = _own_hash(record)
    contents[RECORD] = json.dumps(record, indent=1).encode()
    # A save that fails or is killed leaves the older checkpoint as it was.
    try:
        if parallel.is_first():
            _write(folder, contents)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"cannot write the checkpoint folder {folder} ({error.strerror}): choose another "
            "folder, make room on its disk, or make this one a folder that you may write to",
        ) from error
    parallel.wait_for_everyone()
    return record


def _tensors(model, dtype):
    """Return the state dict as tensors of their own on the CPU, floating-point ones in dtype."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        wanted = dtype if tensor.is_floating_point() else None
        stored = tensor.detach().to("cpu", wanted, copy=True)
        if wanted is not None and not stored.isfinite().all():
            raise ValueError(
                f"{name} does not fit into {dtype}: values beyond its range or not finite"
            )
        tensors[name] = stored.contiguous()
    return tensors


def _bits_apart(masks, tensors):
    """Return {name: bits} of the masks that are not the bits of a packed tensor."""
    apart = {}
    for name, mask in masks.items():
        bits = _packed.mask_to_bits(mask)
        packed_bits = tensors.get(name + _packed.BITS)
        if packed_bits is None or not torch.equal(packed_bits, bits):
            apart[name] = bits
    return apart


def _write(folder, files):
    """Put files ({name: bytes}) into folder so that `read` finds all old ones or all new ones."""
    # All files are written beside the old ones. Then the record moves into place, and after it the
    # files that it names by their hash: `_settle` moves them, after a kill at the next call.
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    try:
        for name, data in files.items():
            _new(folder / name).write_bytes(data)
    except BaseException:
        for name in files:
            _new(folder / name).unlink(missing_ok=True)
        raise
    os.replace(_new(folder / RECORD), folder / RECORD)  # from here on the new checkpoint holds
    _settle(folder)
    if _MASKS not in files:
        (folder / _MASKS).unlink(missing_ok=True)


def _new(path):
    return path.with_name(path.name + ".new")


def _settle(folder):
    """Move files into place that a save wrote and recorded before it was killed."""
    try:
        hashes = _record(folder)["sha256"]
    except (OSError, ValueError):
        return  # no checkpoint, or none to be trusted
    for name in (WEIGHTS, _MASKS):
        new = _new(folder / name)
        with contextlib.suppress(FileNotFoundError):  # the usual case: nothing is left to be moved
            if _sha256(new) == hashes.get(name):
                os.replace(new, folder / name)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_hash(record):
    """Return the hash of all that record says but for this hash; older formats hash two fields."""
    # Recipe and structure count: another number of heads, say, would fit the same tensors.
    hashed = [record["recipe"], record["structure"]]
    if record["format"] == _FORMAT:
        files = {name: value for name, value in record["sha256"].items() if name != "record"}
        hashed = record | {"sha256": files}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def read(folder):
    """Return the record of the checkpoint in folder, after checking it and its files.

    Returns a dict of format, vitlab (version), recipe, structure, packed and masks ({parameter:
    shape}), normalise (mean and std of its images, or None), classes (names, or None), extra,
    sha256.
    Raises FileNotFoundError for a missing folder or file. Raises ValueError for a record that is
    broken, altered or of another format, and for files that were altered or cut short after saving.
    """
    folder = Path(folder)
    _settle(folder)
    record = _record(folder)
    hashes = record["sha256"]
    for name in (WEIGHTS, _MASKS):
        if name == _MASKS and name not in hashes:  # no masks apart
            continue
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"the checkpoint in {folder} has lost its {name}; save it again"
            )
        if _sha256(folder / name) != hashes.get(name):
            raise ValueError(
                f"{folder / name} is not the file that its record was saved with: it was altered "
                "or cut short (sha256 differs); copy or save the checkpoint again"
            )
    return record


def _record(folder):
    """Return the record in folder, checked without its files. Raises what `read` raises."""
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint in {folder}: no {RECORD}; run the step that saves it first"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        written = record["format"]
        is_readable = written in _READABLE
        # Here fields that the hash needs may be missing or of another type.
        own = "record" if written == _FORMAT else "architecture"
        is_as_saved = is_readable and _own_hash(record) == record["sha256"][own]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint's record: {error!r}; save it again") from error
    if not is_readable:
        raise ValueError(
            f"{path} has format {written}, this vitlab ({files.version()}) reads up to format "
            f"{_FORMAT}: install the version that wrote it ({record.get('vitlab')}) "
            "or save it again"
        )
    if not is_as_saved:
        # In the older formats 1 and 2 only recipe, structure and files are known to be as they were
        # saved, not masks and extra.
        hashed = "what it says is" if written == _FORMAT else "recipe or structure are"
        raise ValueError(
            f"{path} was altered after saving: {hashed} not what was saved (sha256 differs); "
            "copy or save the checkpoint again"
        )
    return record


def load(folder, *, device="cpu"):
    """Build the model in folder again, from record and tensors alone.

    folder: as `save` wrote it
    device: a torch.device or its name
    Returns the model in eval mode on device.
    Raises what `read` raises, and ValueError for tensors that do not fit the recorded architecture.
    """
    folder = Path(folder)
    record = read(folder)
    with _naming(folder):
        stored = safetensors.torch.load_file(folder / WEIGHTS)
        stored = _packed.unpack(stored, record.get("packed", {}))
        _check_sizes(record["recipe"], stored)
        model = _built(record)
        empty = model.state_dict()
        tensors = {}
        for name, tensor in stored.items():
            # Weights may be stored in half precision. Copies: the file itself may change.
            dtype = empty.get(name, tensor).dtype
            tensors[name] = tensor.to(dtype, copy=True)
        model.load_state_dict(tensors, assign=True)
        moments = record.get("normalise")
        model.normalise = moments and tuple(map(tuple, moments))
        if record.get("classes"):
            model.class_names = [str(name) for name in record["classes"]]
    return model.to(device).eval()


@contextlib.contextmanager
def _naming(folder):
    """Turn whatever a stranger's record and files can lead to into an error that names folder."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the checkpoint in {folder} gives no model that fits its record: "
            f"{type(error).__name__}: {error}; save it again"
        ) from error


def _check_sizes(recipe, tensors):
    """Raise ValueError for a recipe of a model that is much larger than the stored tensors."""
    # To build it might never end. A block has many tensors, so there are fewer blocks than tensors.
    bounds = {"depth": len(tensors), "depths": len(tensors), "image_size": 8192, "img_size": 8192}
    for name, value in (recipe | recipe["options"]).items():
        bound = bounds.get(name, 1_000_000)
        for number in _numbers(value):
            if not abs(number) <= bound:
                raise ValueError(f"{name} is {number} in its recipe, beyond {bound}")


def _numbers(value):
    """Yield the numbers in a value of JSON, from lists in lists, too."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part)


def _built(record):
    """Return the model that record describes, on the CPU, without values."""
    recipe = dict(record["recipe"])
    options = recipe.pop("options")
    with torch.device("meta"):  # no time and no random numbers for initial values
        model = build.create(**recipe, **options)
    model.to_empty(device="cpu")
    for module in model.modules():
        # What no state dict holds, such as the masks of Swin's windows, timm computes anew.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    with torch.random.fork_rng(devices=[]):  # leaves torch's random numbers as they were
        return _structure.rebuild(model, record["structure"])


def load_masks(folder):
    """Return {parameter: bool tensor} as given to `save`, {} if none were.

    Raises what `read` raises, and ValueError for a mask in the record that is in no file.
    """
    folder = Path(folder)
    record = read(folder)
    with _naming(folder):
        shapes = record["masks"]
        stored = safetensors.torch.load_file(folder / WEIGHTS)
        apart = {}
        if _MASKS in record["sha256"]:
            apart = safetensors.torch.load_file(folder / _MASKS)
        bits = {name: apart.get(name, stored.get(name + _packed.BITS)) for name in shapes}
        if lost := sorted(name for name in bits if bits[name] is None):
            raise ValueError(
                f"the masks in {folder / RECORD} are in no file beside it: {', '.join(lost)}"
            )
        return {name: _packed.bits_to_mask(bits[name], shapes[name], name) for name in shapes}
