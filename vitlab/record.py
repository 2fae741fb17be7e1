"""Keep the values of a study, the folder of a run, and the rows of results with their provenance.

A study is one YAML file in notebooks/params that holds all its values.
A run is one model and one seed of a study.
It writes to `<data root>/runs/<study>/<model>/seed<seed>/`.
Notebooks open a run with `open_run` and never name a path.
Every file is written whole or not at all.

Public: repository, root, unknown, write_atomic, alone, make_folder, headless, say, USES, SECTIONS,
SETTINGS, Settings, Values, study, in_force, checked, IDENTITY, LOG, ROW, open_run, Run, Results,
Cut, study_label, with_first_columns, of_shipped, figures_folder, provenance, KEY, WORDS,
read_study, gather, compare, main.
"""

import argparse
import contextlib
import copy
import difflib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pandas as pd
import yaml
from filelock import FileLock, Timeout
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)
from pydantic_core import PydanticCustomError
from tqdm.auto import tqdm

from vitlab import parallel

# -- ground: files, locks, progress

_ELSEWHERE = "set VITLAB_DATA to a folder that can be written"
_ROOM = (
    "make room, or set VITLAB_DATA to a folder elsewhere, and run the same again; "
    "what was finished is kept"
)


def repository():
    """Return the folder of the repository of this package, or the working folder outside of one."""
    folder = Path(__file__).parents[1]
    return folder if (folder / "pyproject.toml").exists() else Path.cwd()


def root():
    """Return the data root: the environment's VITLAB_DATA, else the repository's folder `data`."""
    chosen = os.environ.get("VITLAB_DATA")
    return Path(chosen).expanduser().absolute() if chosen else repository() / "data"


def unknown(kind, name, known):
    """Return the words of an error about a name that is not known.

    kind: str, what the name is of, such as "study".
    name: the name that is not known.
    known: the names that are.
    Returns a sentence with the nearest known name, if one is near, and all known names.
    """
    known = [str(option) for option in known]
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {kind} {name!r}{hint} Known are {', '.join(known)}."


def write_atomic(path, content, *, keep=None):
    """Write a file whole or not at all: under another name in its folder, which is then renamed.

    path: where to write; its folder is made if need be.
    content: text, bytes, or a function that is called with the path to write to.
    keep: a path to which the file that stood there before is moved; None replaces that file.
    Of several processes (see `parallel`) only the first writes.
    Raises PermissionError, with what to do, where the file cannot be written.
    Raises OSError, with what to do, where the disk is full.
    """
    path = Path(path)
    if not parallel.is_first():
        return
    make_folder(path.parent)
    part = path.with_name(f".{os.getpid()}-{path.name}")  # the same ending: savers look at it
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        if keep and path.exists():
            path.replace(keep)
        part.replace(path)
        _remove_abandoned(path)
    except PermissionError as error:
        raise PermissionError(f"cannot write {path} ({error.strerror}); {_ELSEWHERE}") from error
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        if _is_full(error, path.parent):
            words = f"the disk of {path.parent} is full: {_ROOM}"
            raise OSError(errno.ENOSPC, words) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _remove_abandoned(path):
    """Remove the unfinished parts of a file that killed processes left an hour ago or earlier."""
    for part in path.parent.glob(f".*-{path.name}"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed its part
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def _is_full(error, folder):
    """Return whether an error comes from a full disk, a quota or a limit of file sizes."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return shutil.disk_usage(folder).free < 1_000_000  # some libraries do not say so


@contextlib.contextmanager
def alone(lock, what):
    """Hold a lock file, which the system frees whatever happens to this process.

    lock: path of the lock file. The file itself stays and blocks nobody.
    what: str, the work that is done meanwhile, in words.
    Raises RuntimeError if another process holds the lock.
    """
    try:
        held = FileLock(lock).acquire(blocking=False)
    except Timeout:
        words = f"{what} is under way in another process: wait for it, or stop it"
        raise RuntimeError(words) from None
    with held:
        yield


def make_folder(folder):
    """Make a folder with its parents, and try whether files can be written there.

    Raises PermissionError, with what to do, where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions do not tell on every file system
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror}); {_ELSEWHERE}"
        ) from error


def headless():
    """Return whether nobody watches a progress bar; `vitlab.run` sets VITLAB_HEADLESS to say so."""
    return os.environ.get("VITLAB_HEADLESS", "0") not in ("", "0")


def say(text):
    """Print one line at once, without breaking a progress bar.

    Of several processes only the first prints.
    """
    if not parallel.is_first():
        return
    if headless():
        print(text, flush=True)
    else:
        tqdm.write(str(text))


# -- settings: the values of a study

_DENSE = ("data", "models", "train")
_SCORED = (*_DENSE, "calibration")
_CUTS = ("global_pruning", "heads_svd_iht", "budget")
# The sections of a study that each notebook reads, itself or through the notebooks before it.
USES = {
    "0_data": ("data",),
    "1_train": _DENSE,
    "2_sensitivity": (*_SCORED, "sensitivity"),
    "3_global_pruning": (*_SCORED, "global_pruning"),
    "4_heads_svd_iht": (*_SCORED, "heads_svd_iht"),
    "5_budget": (*_SCORED, "budget"),
    "6_efficiency": (*_SCORED, *_CUTS, "efficiency"),
}


def _worded(annotation, words):
    """Return an annotation whose errors say in these words what is allowed."""

    def validate(value, handler):
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError(error.errors()[0]["type"], words) from None

    return Annotated[annotation, WrapValidator(validate)]


_Item = TypeVar("_Item")
_Some = Annotated[list[_Item], Field(min_length=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Share = _worded(_Share, "is a share in [0, 1), not a percentage")
_PositiveShare = Annotated[float, Field(gt=0, lt=1)]
_PositiveShare = _worded(_PositiveShare, "is a share in (0, 1), not a percentage")
_CountOrNull = _worded(PositiveInt | None, "should be an integer of at least 1, or null")
_BoolOrNull = _worded(bool | None, "should be true, false or null")
_Moments = _worded(str | list, "should be train, imagenet, or [means, deviations]")
_Precision = Literal["auto", "bf16", "float32"]  # auto: bf16 where the device gains from it
_ABSENT = None  # of a value that may be missing: data.load or models.create then choose it


class _Section(BaseModel, extra="forbid", strict=True):
    """Refuse unknown values and other types. An int may stand for a float, a bool for nothing else.

    A default is the value of studies, checkpoints and training states from before there was one.
    """


class _Augment(_Section):
    """Declare what is drawn anew for every training image."""

    crop: NonNegativeInt = _ABSENT  # pixels of border that a crop may reach into
    flip: bool = _ABSENT  # whether half of the images are mirrored
    scale: _Some[float] = _ABSENT  # shares of the area that a random crop takes: [least, most]
    erase: NonNegativeFloat = _ABSENT  # share of the images that lose a rectangle


class _Data(_Section):
    """Declare the images."""

    name: str  # cifar10, caltech101, shapes, or the path of an ImageFolder
    image_size: PositiveInt  # pixels, side of what the model sees
    split_seed: int  # of train, val and test; results of two splits cannot be compared
    images: _CountOrNull  # of each split, for a trial; null: all
    normalise: _Moments  # by mean and deviation of train, of imagenet, or by these
    skip_broken: _BoolOrNull = None  # true: leave out image files that cannot be decoded
    augment: _Augment


class _Model(_Section, extra="allow"):
    """Declare the options of models.create, which checks those that are not declared here."""

    name: str  # conv_vit, conv_swin, or a model of timm
    pretrained: bool = _ABSENT  # whether timm downloads weights
    weights: str | None = _ABSENT  # folder of a checkpoint to start from; null: none


class _Train(_Section):
    """Declare how the dense model is trained."""

    epochs: PositiveInt  # passes over the training images
    batch_size: PositiveInt  # images
    lr: PositiveFloat  # peak rate, after the warm-up; then cosine to 0
    weight_decay: NonNegativeFloat  # of AdamW
    warmup_epochs: NonNegativeFloat  # epochs in which the rate rises
    label_smoothing: _Share  # of the label, spread over all classes
    clip_norm: NonNegativeFloat  # highest norm of the gradient; 0 is off
    precision: _Precision
    ema: _Share  # decay of averaged weights; 0 is off
    mixup: NonNegativeFloat = 0.0  # alpha of its Beta distribution; 0 is off, 0.8 is usual
    cutmix: NonNegativeFloat = 0.0  # alpha, too; with both, each batch gets one of them


class _Tuning(_Section):
    """Declare the training after a cut; what is not declared here is that of `train`."""

    epochs: PositiveInt  # after each cut
    lr: PositiveFloat  # peak rate
    warmup_epochs: NonNegativeFloat
    images: _CountOrNull  # drawn per epoch; null: all training images


class _Calibration(_Section):
    """Declare the training images from which scores and activations are taken."""

    images: PositiveInt
    batch_size: PositiveInt  # images
    labels: Literal["true", "model"] = "true"  # of gradients; model: drawn from its prediction
    augment: bool = False  # true: each image once, augmented as in training


class _Sensitivity(_Section):
    """Declare 2_sensitivity: the loss when one layer alone is cut."""

    units_per_block: NonNegativeInt  # neurons that are silenced one by one; heads all are
    images: PositiveInt  # validation images
    ratios: _Some[_PositiveShare]  # shares cut


class _GlobalPruning(_Tuning):
    """Declare 3_global_pruning: weights and rows go, over all layers at once."""

    sparsities: _Some[_Share]  # shares of the prunable weights, or of the rows, cut
    criterion: str  # of weights
    row_criterion: str  # of rows and neurons
    controls: bool = False  # fine-tune random cuts, too, and show those by magnitude
    schedules: _Some[str] = ["one-shot"]  # to the highest sparsity: one-shot, iterative, cubic
    steps: PositiveInt = 1  # cuts of a schedule, which share its epochs
    distil: bool = False  # each schedule once more, with the dense model as the teacher


class _HeadsSvdIht(_Tuning):
    """Declare 4_heads_svd_iht: heads go, and layers become low rank or sparse."""

    ratios: _Some[_Share]  # shares cut, one after the other with fine-tuning between
    head_criterion: str
    kappa: _PositiveShare  # of a layer's kept parameters, for the low-rank part
    forms: _Some[str]  # svd, iht, threshold, svd+iht entries, svd+iht columns
    controls: bool = False  # random heads and directions, too, and dense with as many epochs


class _Budget(_Tuning):
    """Declare 5_budget: all kinds of units compete for one budget."""

    target: Literal["macs", "params", "bytes", "latency"]  # of which a share is kept
    shares: _Some[_PositiveShare]  # kept
    kinds: _Some[str]  # heads, neurons, filters, width, ranks; there are qk, v and block, too
    audit: _Some[_PositiveShare]  # shares of the MACs kept, at which predictions are checked
    audit_images: PositiveInt  # validation images
    distilled: _Some[str]  # methods that are fine-tuned once more, with the dense teacher
    faster_at: _CountOrNull  # batch with which a factored layer must be faster; null: any


class _Efficiency(_Section):
    """Declare 6_efficiency: timings."""

    batches: _Some[PositiveInt]  # images in one forward pass
    gpu_batches: _Some[PositiveInt]  # these as well where there is a GPU
    rounds: PositiveInt  # timed passes of each model, interleaved
    precision: _Precision
    runtimes: _Some[str]  # such as eager float32, compiled bf16, onnxruntime float32


class Settings(_Section):
    """Declare all values of a study: the sections of its file."""

    about: str  # the command that runs it, and what to expect
    seeds: _Some[NonNegativeInt]  # of initial weights, order and augmentation
    data: _Data
    models: Annotated[dict[str, _Model], Field(min_length=1)]
    train: _Train
    calibration: _Calibration
    sensitivity: _Sensitivity
    global_pruning: _GlobalPruning
    heads_svd_iht: _HeadsSvdIht
    budget: _Budget
    efficiency: _Efficiency


SECTIONS = tuple(Settings.model_fields)
SETTINGS = tuple(_Tuning.model_fields)  # of train.fit, that a section may have of its own


class Values(dict):
    """Read a dict by attributes, too: values.train.epochs."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(unknown("value", name, self))


def study(name, *, seed=None, override=None):
    """Return all values of a study as nested Values; `name` among them is the study's name.

    name: a file of notebooks/params without its ending, or the path of a .yaml file of your own.
    seed: int, the seed of the run; None stands for the study's first. The values that a study
    gives under `other_seeds` hold for all seeds but the first.
    override: {"section.value": new value}, such as {"train.epochs": 2}, as in `other_seeds`.
    Raises ValueError for an unknown study, section or value, with the nearest known name.
    Raises ValueError for a missing value, an empty list, and a value out of its range.
    Raises TypeError for a value of another type than `Settings` declares.
    """
    folder = repository() / "notebooks" / "params"
    is_path = str(name).endswith((".yaml", ".yml"))
    path = Path(name) if is_path else folder / f"{name}.yaml"
    if not path.is_file():
        words = unknown("study", name, sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"{words} Your own is given by the path of its .yaml file.")
    values = _read_yaml(path)
    other_seeds = values.pop("other_seeds", {})
    for section in SECTIONS:
        if isinstance(values.get(section), dict):
            for value, default in _later(section).items():
                values[section].setdefault(value, default)
    try:
        _check(values)
        values_of_others = _replaced(values, other_seeds, "other_seeds")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path.name}: {error}") from None
    if seed not in (None, values.seeds[0]):
        values = values_of_others
    return Values(_replaced(values, override or {}, "override"), name=path.stem)


def _later(section):
    """Return {name: default} of the values that a section got after studies were published."""
    declared = Settings.__annotations__.get(section)
    # Without values a section has its defaults alone; what is no section has none.
    return getattr(declared, "model_construct", _Section)().model_dump()


def in_force(section, values):
    """Return values of a section without those that came later and are off.

    What is left can be compared with the values of older checkpoints and training states.
    """
    later = _later(section)
    return {
        name: value for name, value in values.items() if name not in later or value != later[name]
    }


def _replaced(values, changes, source):
    """Return a checked copy of values, with {"section.value": new value} in their places."""
    if not isinstance(changes, dict):
        raise TypeError(f'{source} is a dict like {{"train.epochs": 2}}, got {changes!r}')
    values = copy.deepcopy(values)
    sections = _sections_by_name(values)
    for dotted, value in changes.items():
        if dotted not in sections:
            above = str(dotted).partition(".")[0]
            near = [name for name in sections if name.startswith(f"{above}.")]
            raise ValueError(unknown("value", dotted, near or sections))
        section = sections[dotted]
        name = dotted.rpartition(".")[2]
        if isinstance(section[name], dict):
            inside = ", ".join(section[name])
            raise TypeError(f"{dotted} is a section; override its values one by one: {inside}")
        if dotted.startswith("models.") and name not in _Model.model_fields:
            checked(dotted, section[name], value)  # an option that Settings does not declare
        section[name] = list(value) if isinstance(value, tuple) else value
    _check(values)
    return values


def _sections_by_name(values, above=""):
    """Return {dotted name: the dict that holds it} of all sections and values."""
    sections = {}
    for name, value in values.items():
        sections[above + name] = values
        if isinstance(value, dict):
            sections |= _sections_by_name(value, f"{above}{name}.")
    return sections


def _check(values, declared=Settings, name=""):
    """Raise TypeError or ValueError, in words, for values that are not as declared."""
    try:
        TypeAdapter(declared).validate_python(values, strict=True)
    except ValidationError as error:
        errors = error.errors()
        kind = TypeError if errors[0]["type"].endswith("_type") else ValueError
        raise kind("; ".join(_sentence(details, name) for details in errors)) from None


def _sentence(error, name):
    """Return in words what one of pydantic's errors says about the value of a name."""
    place = [name, *map(str, error["loc"])] if name else [str(step) for step in error["loc"]]
    dotted = ".".join(place)
    if error["type"] == "missing":
        return f"{dotted} is missing; demo.yaml has every value"
    if error["type"] == "extra_forbidden":
        return unknown("value", dotted, _names_beside(place))
    words = re.sub(r"^(Input|List|Dictionary) | or instance of \w+", "", error["msg"])
    return f"{dotted} {words}, got {type(error['input']).__name__} {error['input']!r}"


def _names_beside(place):
    """Return the dotted names that a section declares, from the place of an unknown one in it."""
    section = Settings
    *parents, _ = place
    for name in parents:
        section = section.__annotations__[name]
    names = [".".join([*parents, name]) for name in section.model_fields]
    return names if parents else [*names, "other_seeds"]


def checked(name, example, value):
    """Return a value that has the type of an example; an int may stand for a float.

    name: str, what the value is called.
    example: the value whose type is wanted.
    Raises TypeError for another type.
    """
    _check(value, type(example), name)
    return value


class _Loader(yaml.SafeLoader):
    """Read plain values: no aliases, no key twice, no number that YAML takes for text."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for gigabytes
            raise yaml.YAMLError(f"write out what *{self.peek_event().anchor} stands for")
        node = super().compose_node(parent, index)
        number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
        if node.tag.endswith(":str") and re.fullmatch(number, node.value):
            words = f"YAML reads {node.value!r} as text; write {float(node.value)!r}"
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {words}")
        return node

    def construct_mapping(self, node, deep=False):
        section = super().construct_mapping(node, deep)
        if len(section) < len(node.value):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"a name stands twice in the section that begins at line {line}")
        return section


def _read_yaml(path):
    """Return the content of a study file as nested Values. Raises ValueError with its name."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        content = json.loads(json.dumps(content), object_hook=Values)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        # TypeError, ValueError: it holds a date, or a number that cannot be, or is no text
        raise ValueError(f"{path.name} is not written as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} has no sections; demo.yaml has every section")
    return content


# -- runs: the folder of one model and seed, and what it writes

_METER = "closed form (vitlab.cost)"  # of params, MACs and FLOPs; other meters have own columns
LOG = "results.jsonl"  # of a run: every row that was ever saved
IDENTITY = ["study", "model", "seed"]
_CUT = ["method", "criterion", "form", "target_kind", "target", "stage"]
_HISTORY = [*IDENTITY, *_CUT, "epoch"]
_MEASURED = """
    correct total top1 mean_per_class loss ece
    params nonzero macs macs_ideal flops meter macs_torchprofile macs_thop
    bytes_memory bytes_disk
    latency_ms latency_q1 latency_q3 images_per_s memory_mb
    batch threads precision image_size
    epochs seconds
    checkpoint data split_seed commit torch timm device date
"""
ROW = [*IDENTITY, *_CUT, *_MEASURED.split()]


def open_run(study_name, model=None, seed=0, override=None):
    """Return the Run of one model and seed of a study.

    study_name, override: as in `study`. An overridden run has its own folder. Where the override
    does not concern a notebook, the run reads what that notebook wrote for the study itself.
    model: one of the study's models; None for the study as a whole (data, report).
    seed: int >= 0.
    Raises what `study` raises, and ValueError for an unknown model.
    Raises TypeError for another seed, PermissionError where the folder cannot be written.
    """
    values = study(study_name, seed=seed if model else None, override=override)
    if model is not None and model not in values.models:
        raise ValueError(unknown(f"model of study {values.name}:", model, values.models))
    if checked("seed", 0, seed) < 0:
        raise TypeError(f"seed should be an integer of at least 0, got {seed}")
    return Run(study_name, values, model, seed, dict(override or {}))


class Run:
    """Hold one model and seed of a study: its values, its folder, its rows. `open_run` makes it.

    study, model_name: names.
    seed: int.
    params: the study's Values.
    folder: path of the folder where this run writes.
    """

    def __init__(self, given, params, model_name, seed, override):
        self.study = params.name
        self.params = params
        self.model_name = model_name
        self.seed = seed
        self.override = override
        self._given = given  # name of the study, or path of its file
        inner = Path(model_name, f"seed{seed}") if model_name else Path()
        self.folder = root() / "runs" / study_label(self.study, override) / inner
        self._base = root() / "runs" / self.study / inner
        make_folder(self.folder)
        self._commit = _commit()  # of the code as imported, not as it is when rows are saved

    @property
    def model(self):
        """Return the arguments of models.create.

        `models.create(**lab.model, num_classes=..., image_size=...)`
        """
        options = dict(self.params.models[self.model_name])
        if options.get("weights"):
            options["weights"] = str(repository() / options["weights"])
        return options

    @property
    def data(self):
        """Return the arguments of data.load: `data.load(**lab.data)`."""
        options = {name: value for name, value in self.params.data.items() if name != "augment"}
        # A relative path is meant from the repository, as that of `weights` is.
        inside = repository() / options["name"]
        if "/" in options["name"] and inside.is_dir():
            options["name"] = str(inside)
        return options

    def training(self, section="train", *, stage=None):
        """Return the recipe of a training, or all arguments of train.fit that a study knows.

        section: str; its epochs, lr, images and warmup_epochs replace those of `train`.
        stage: str, the name of the training. With it the result is {"recipe", "stage", "folder"}:
        `train.fit(model, images.train, images.val, **lab.training("budget", stage=label))`.
        Without it the result is the recipe alone, a flat dict, as checkpoints keep it.
        """
        replacing = self.params[section]
        recipe = {
            **self.params.train,
            **{name: replacing[name] for name in SETTINGS if name in replacing},
            "augment": dict(self.params.data.augment),
            "seed": self.seed,
        }
        if stage is None:
            return recipe
        return {"recipe": recipe, "stage": stage, "folder": self.path("training")}

    def calibration(self, split, *, images=None, augment=None, device="cpu"):
        """Return a list of (x, y) batches for scores, in evaluation transforms.

        split: data.Split, of which a stratified part is taken.
        images: int, how many; None for as many as the study's `calibration` says. A smaller split
        gives all it has.
        augment: whether each image is augmented as in training, by a draw from the run's seed.
        None leaves that to the study's `calibration`. False is for the images that are compared
        with the calibration images, such as those of val.
        device: where the batches lie.
        """
        values = self.params.calibration
        part = split.subset(min(images or values.images, len(split)), seed=self.seed)
        augment = values.augment if augment is None else augment
        options = {}
        if augment:
            options = {"augment": dict(self.params.data.augment), "seed": self.seed}
        return list(part.batches(values.batch_size, device=device, **options))

    def save_calibration(self, batches, losses):
        """Write the table `calibration`, which says from what scores were taken.

        Columns: images, batch_size, labels, augment, calibration_loss, val_loss.
        batches: those of `calibration`.
        losses: (calibration loss, val loss) in nats, of scores.check_calibration.
        """
        calibration_loss, val_loss = losses
        row = {
            **self.params.calibration,
            "images": sum(len(y) for _, y in batches),
            "calibration_loss": calibration_loss,
            "val_loss": val_loss,
        }
        return self.save_table("calibration", pd.DataFrame([row]))

    def path(self, name):
        """Return where this run writes the file or folder of a name."""
        return self.folder / name

    def need(self, name, notebook):
        """Return the path of what an earlier notebook wrote.

        An overridden run takes the study's own where that notebook does not use what changed.
        Raises FileNotFoundError that says which notebook to run first.
        """
        sections = _sections_of(notebook)
        folders = [self.folder, self._base]
        if any(dotted.split(".")[0] in sections for dotted in self.override):
            folders = [self.folder]
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(
            f"{self.path(name)} is missing: run notebooks/{notebook}.ipynb first, in JupyterLab "
            f"or with\n  {self.command(notebook)}"
        )

    def shipped(self, settings, images):
        """Return the folder of the dense checkpoint that the repository ships for this run.

        That is checkpoints/STUDY/MODEL, or MODEL-seed1 for another seed than 0.
        settings: the recipe of `training`, a flat dict.
        images: data.Dataset.
        Returns None if there is none, or one of other settings, another model or other data.
        """
        name = f"{self.model_name}-seed{self.seed}" if self.seed else str(self.model_name)
        folder = repository() / "checkpoints" / self.study / name
        if not (folder / "model.json").is_file():
            return None
        extra = json.loads((folder / "model.json").read_text())["extra"]
        extra["settings"] = in_force("train", extra.get("settings", {}))
        wanted = {
            "settings": in_force("train", settings),
            "values": self.origin,
            "data": images.description,  # CIFAR-10 is not CIFAR-10 (JPEG)
        }
        same = wanted.items() <= extra.items()
        return folder if same else None

    @property
    def origin(self):
        """Return the values of data and model, on which a dense checkpoint depends, too."""
        data = {name: value for name, value in self.data.items() if value is not None}
        return json.loads(json.dumps({"data": data, "model": self.params.models[self.model_name]}))

    def command(self, notebook):
        """Return the command that runs a notebook for this run."""
        words = ["python -m vitlab.run", notebook, "--study", str(self._given)]
        if self.model_name and notebook not in ("0_data", "7_report"):
            words += ["--model", self.model_name, "--seed", str(self.seed)]
        for name, value in self.override.items():
            words += ["--set", f"'{name}={json.dumps(value)}'"]
        return " ".join(words)

    def results(self, notebook, images, measure):
        """Return a collector of the rows and histories of a notebook. See `Results`."""
        return Results(self, notebook, images, measure)

    def save_rows(self, notebook, rows, *, data=None):
        """Write all results of a notebook, and return them as a frame with provenance.

        rows: frame or list of dicts, one for each model that was measured. Each has at least
        `method` and `stage`, and a number as `target` where something was cut.
        data: str, what the images are called, such as "CIFAR-10 (JPEG)".
        The frame has the columns of ROW in that order, then all others.
        Raises ValueError for rows without method or stage, and for a target that is no number.
        """
        sections = _sections_of(notebook)
        frame = pd.DataFrame(rows)
        missing = [column for column in ("method", "stage") if column not in frame]
        if missing:
            raise ValueError(f"rows of {notebook} lack {' and '.join(missing)}")
        if data:
            frame["data"] = data
        if "target" in frame:
            frame["target"] = pd.to_numeric(frame["target"])
        for column, value in self._provenance().items():
            if column not in frame:
                frame[column] = value
        frame = with_first_columns(frame, ROW, fill=True)
        self._save(f"results-{notebook}.csv", frame)
        values = {section: in_force(section, self.params[section]) for section in sections}
        if self.model_name and "models" in values:
            values["models"] = self.params.models[self.model_name]
        about = {"notebook": notebook, "save": uuid.uuid4().hex, "parameters": values}
        lines = json.loads(frame.to_json(orient="records"))
        _append(self.path(LOG), [about | line for line in lines])
        return frame

    def load_rows(self, notebook):
        """Return the rows that a notebook saved for this run.

        Raises FileNotFoundError as `need` does.
        """
        return pd.read_csv(self.need(f"results-{notebook}.csv", notebook))

    def save_history(self, notebook, history):
        """Write the histories of a notebook, and return them as one frame.

        history: the frame of train.fit, or a list of such frames, marked by method, target, ...
        """
        frame = pd.concat(history, ignore_index=True) if isinstance(history, list) else history
        frame = frame.assign(**self._identity())
        return self._save(f"history-{notebook}.csv", with_first_columns(frame, _HISTORY))

    def save_table(self, name, frame):
        """Write any other frame as table-<name>.csv, marked with study, model and seed."""
        rest = frame.drop(columns=IDENTITY, errors="ignore")
        identity = pd.DataFrame(self._identity(), rest.index)
        return self._save(f"table-{name}.csv", pd.concat([identity, rest], axis=1))

    @property
    def figures(self):
        """Return the folder of the study's figures and tables. See `figures_folder`."""
        return figures_folder(self._given, override=self.override)

    def _save(self, name, frame):
        if frame.empty:
            raise ValueError(f"nothing to write to {name}: no rows")
        write_atomic(self.path(name), frame.to_csv(index=False))
        return frame

    def _identity(self):
        return {"study": self.study, "model": self.model_name, "seed": self.seed}

    def _provenance(self):
        return {
            **self._identity(),
            "split_seed": self.params.data.split_seed,
            **provenance(),
            "commit": self._commit,
            "meter": _METER,
            "override": json.dumps(self.override) if self.override else None,
        }


@dataclass
class Results:
    """Collect the results of a notebook: one row for each model that is measured on test.

    `Run.results` makes it. Each cut of the study is opened with the columns that describe it, and
    each stage of it adds a row:

        log = lab.results("3_global_pruning", images, evaluate.measure)
        cut = log.cut(method="unstructured", criterion="taylor", form="masked",
                      target_kind="sparsity", target=0.9)
        cut.add("cut", model, val_top1=val_top1)
        history = train.fit(model, images.train, images.val,
                            **lab.training("global_pruning", stage=label))
        cut.add("finetuned", model, history=history, checkpoint=label)
        table, history = log.save()

    run: Run.
    notebook: str, its name, such as "3_global_pruning".
    images: data.Dataset, whose test split is measured.
    measure: function of (model, split) that returns {column: value}, such as evaluate.measure.
    rows, histories: lists of dicts and of frames, what was collected so far.
    """

    run: Run
    notebook: str
    images: object
    measure: Callable
    rows: list = field(default_factory=list)
    histories: list = field(default_factory=list)

    def cut(self, **columns):
        """Return a Cut, whose rows and histories all have these columns."""
        return Cut(self, columns)

    def save(self):
        """Write rows and histories, and return both frames; of no histories the second is None."""
        table = self.run.save_rows(self.notebook, self.rows, data=self.images.description)
        if not self.histories:
            return table, None
        return table, self.run.save_history(self.notebook, self.histories)


@dataclass
class Cut:
    """Add the results of one cut, stage by stage, to the results of a notebook.

    `Results.cut` makes it. The columns may grow: `cut.columns["form"] = "removed"`.
    Other tables of the same cut take them, too: `table.assign(**cut.columns)`.
    """

    results: Results
    columns: dict

    def add(self, stage, model=None, *, history=None, **columns):
        """Add a row, and return it as a dict.

        stage: str, such as "cut", "finetuned", or "unreachable".
        model: the model to be measured on test; None for a row without a measurement, such as
        `cut.add("unreachable", note=str(error))`.
        history: frame of train.fit. The row gets its epochs and seconds, and the frame is saved
        with the columns of the cut. `history.assign(target=0.0)` gives it a column of its own.
        columns: columns of this row alone, such as checkpoint=label or val_top1=91.5.
        """
        row = {**self.columns, "stage": stage, **columns}
        if history is not None:
            self.results.histories.append(history.assign(**self.columns))
            row |= {"epochs": len(history), "seconds": history.seconds.sum()}
        if model is not None:
            row |= self.results.measure(model, self.results.images.test)
        self.results.rows.append(row)
        return row


def _sections_of(notebook):
    """Return the sections of a study that a notebook reads. Raises ValueError if unknown."""
    if notebook not in USES:
        raise ValueError(unknown("notebook", notebook, USES))
    return USES[notebook]


def with_first_columns(frame, columns, *, fill=False):
    """Return a frame with some columns before all others.

    frame: any frame.
    columns: names, in the order that is wanted.
    fill: bool, whether names that the frame does not have become empty columns.
    """
    first = [column for column in columns if fill or column in frame]
    rest = [column for column in frame if column not in columns]
    return frame.reindex(columns=[*first, *rest])


def _append(path, rows):
    """Add rows to a file of JSON lines, in one piece even if others add at the same time."""
    if not parallel.is_first():
        return
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "ab+") as file, parallel.in_turn(file):
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line was cut short
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def study_label(name, override):
    """Return the name of a study's folder, another one for each override.

    name: str, of the study.
    override: {"section.value": new value}, or None. So an overridden study never replaces the
    study itself.
    """
    if not override:
        return name
    changes = [f"{dotted}={json.dumps(value)}" for dotted, value in sorted(override.items())]
    text = ",".join(changes)
    if len(text) > 60 or not re.fullmatch(r"[\w.,=-]+", text):
        text = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{name}+{text}"


def of_shipped(folder):
    """Return (study, model, seed) of a folder of checkpoints/."""
    model, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", folder.name).groups()
    return folder.parent.name, model, int(seed or 0)


def figures_folder(name, *, override=None):
    """Return the folder of a study's figures, which is made if need be.

    That is figures/<study> of the repository; for an overridden study `figures` in its runs.
    """
    label = study_label(study(name, override=override).name, override)
    folder = repository() / "figures" / label
    if override:
        folder = root() / "runs" / label / "figures"
    make_folder(folder)
    return folder


def provenance():
    """Return where numbers of this process come from.

    Columns: threads, commit of the code, torch, timm, device, date.
    """
    import torch  # here, as the command line reads studies without waiting for it

    return {
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "torch": version("torch"),
        "timm": version("timm"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _commit():
    """Return the short hash of the commit of the code, "unknown" without git.

    The hash ends with "+dirty" if the code was changed since.
    """
    if not shutil.which("git"):
        return "unknown"
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("diff", "--quiet", "HEAD", "--", "vitlab", "notebooks", "benchmarks")
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+dirty" if changed.returncode else "")


def _git(*words):
    """Run git in the repository, and return its end with what it printed."""
    command = ["git", "-C", str(repository()), *words]
    return subprocess.run(command, capture_output=True, text=True)


def _processor():
    """Return the name of the processor, as Linux gives it, else its architecture."""
    name = None
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


# -- results: the rows of all runs

# What tells one row of a seed from another.
KEY = ["model", "notebook", "method", "criterion", "form", "schedule", "target_kind", "target"]
KEY += ["stage"]
WORDS = {"labels": str}  # columns that read_csv would misread: `true` is a word there
_PLACE = ["model", "seed", "notebook"]  # what tells by which notebook of which run a row was saved


def read_study(name, *, override=None):
    """Return all that the runs of a study have saved, over models and seeds.

    name, override: as in `study`.
    Returns Values with the frames `results` and `history`; `tables`, frames by name; and `kept`,
    a list of what was not saved here and comes from the study's folder of figures, as in a fresh
    clone.
    Raises FileNotFoundError if there are no results yet.
    """
    values = study(name, override=override)
    label = study_label(values.name, override)
    runs = root() / "runs" / label
    figures = repository() / "figures" / label  # an overridden study is never published
    tables = {path.stem for path in [*_saved(runs, "table-*"), *figures.glob("table-*.csv")]}
    stems = ["results-*", "history-*", *sorted(tables)]
    saved = {stem: _from_runs(runs, stem) for stem in stems}
    published = {stem: _from_figures(figures, stem, values) for stem in stems}
    changed = _changed_models(saved["results-*"], published["results-*"])
    frames, names = {}, []
    for stem in stems:
        frame, names_of_published = _merged(stem, saved[stem], published[stem], changed)
        frames[stem.removeprefix("table-")] = frame
        names += names_of_published
    results = frames.pop("results-*")
    history = frames.pop("history-*")
    if results.empty:
        raise FileNotFoundError(f"no results in {runs}; run the study: make study STUDY={name}")
    return Values(
        results=_without_stale_timings(results),
        history=history,
        tables=Values((name, frame) for name, frame in frames.items() if len(frame)),
        kept=list(dict.fromkeys(names)),
    )


def _saved(runs, stem):
    """Return the CSV files of this stem in a study's folder of runs, sorted by path."""
    return sorted([*runs.glob(f"{stem}.csv"), *runs.glob(f"*/seed*/{stem}.csv")])


def _from_runs(runs, stem):
    """Return the rows that the runs of this data root saved: all of them count."""
    frames = []
    for path in _saved(runs, stem):
        frame = pd.read_csv(path, dtype=WORDS)
        if stem.endswith("-*"):
            frame.insert(len(IDENTITY), "notebook", path.stem.partition("-")[2])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _from_figures(figures, stem, values):
    """Return the published rows that count: those of today's models, seeds and notebooks."""
    file = figures / f"{stem.removesuffix('-*')}.csv"
    if not file.is_file():
        return pd.DataFrame()
    rows = pd.read_csv(file, dtype=WORDS)
    counts = rows.model.isin(values.models) & rows.seed.isin(values.seeds)
    counts |= rows.model.isna()  # tables of the study as a whole
    if stem.endswith("-*"):
        counts &= rows.reindex(columns=["notebook"]).notebook.isin(USES)
    return rows[counts]


def _merged(stem, saved, published, changed):
    """Return all saved rows with the published rows for which nothing was saved, and their names.

    A published row wins only where its model, seed and notebook saved nothing here. It is left out
    where the dense model of its run is another one here. Timings are compared by method, too, as
    6_efficiency times what several notebooks left.
    """
    taken = set(_keys(saved))
    missing = [key not in taken and key[:2] not in changed for key in _keys(published)]
    published = published[missing]
    names = []
    for model, seed, notebook, _ in _keys(published):
        names.append(f"{model} seed {seed} {notebook or stem}")
    parts = [rows for rows in (saved, published) if len(rows)]
    rows = pd.concat(parts or [saved], ignore_index=True)
    order = [column for column in _PLACE if column in rows]
    if order:
        rows = rows.sort_values(order, kind="stable", ignore_index=True)
    return rows, names


def _keys(rows):
    """Return (model, seed, notebook, method of a timing) of each row, "" for what it has not."""
    keys = rows.reindex(columns=[*_PLACE, "method"]).astype(object)
    keys["method"] = keys.method.where(keys.notebook == "6_efficiency")
    return list(keys.where(keys.notna(), "").itertuples(index=False, name=None))


def _without_stale_timings(results):
    """Return results without timings of methods that no other notebook makes any more."""
    methods = results.set_index(["model", "seed", "method"]).index
    timed = results.notebook == "6_efficiency"
    return results[~timed | methods.isin(methods[~timed])].reset_index(drop=True)


def _changed_models(saved, published):
    """Return {(model, seed)} whose dense model was saved here as another one than published."""
    if saved.empty or published.empty:
        return set()
    dense = saved[saved.notebook == "1_train"]
    both = dense.merge(published, on=_PLACE, suffixes=("", "_before"))
    # 0.05 % of top-1: another processor rounds otherwise
    same_top1 = (both.top1 - both.top1_before).abs() < 0.05
    changed = both[both.params.ne(both.params_before) | ~same_top1]
    return set(zip(changed.model, changed.seed, strict=True))


def gather(name=None, *, every=False):
    """Return rows of all runs of this data root as one frame, overridden ones too.

    Each run keeps a log. Every save of rows adds them to it, with their notebook and all values of
    the study that the notebook uses.
    name: str, a study; None for all.
    every: bool, whether to return rows, too, that later saves of the same notebook replaced;
    `save` tells one save from another.
    Columns: folder, notebook, save, those of ROW, all others, and parameters (JSON).
    A line that was cut short, by a full disk for instance, is left out, and a message says so.
    Raises FileNotFoundError if there are no rows.
    """
    runs = root() / "runs"
    rows = []
    for path in sorted(runs.rglob(LOG)):
        folder = path.parent.relative_to(runs)
        if name in (None, folder.parts[0].partition("+")[0]):
            rows += [{"folder": folder.as_posix(), **row} for row in _read_log(path)]
    if not rows:
        words = f"no rows of {name or 'any study'} under {runs}"
        raise FileNotFoundError(f"{words}; run a study: make study STUDY=demo")
    frame = pd.DataFrame(rows)
    if not every:
        last = frame.groupby(["folder", "notebook"]).save.transform("last")
        frame = frame[frame.save == last].reset_index(drop=True)
    parameters = frame.pop("parameters")
    return with_first_columns(frame, ["folder", "notebook", "save", *ROW]).assign(
        parameters=parameters
    )


def _read_log(path):
    """Return the rows of a run's log, and say which lines are none."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["parameters"] = json.dumps(row["parameters"])
        except (ValueError, KeyError, TypeError):
            say(f"line {number} of {path} is no row, perhaps cut short; left out")
        else:
            rows.append(row)
    return rows


def compare(again, kept):
    """Return rows that were made again beside the published ones.

    again, kept: rows as `read_study` gives them, or those of figures/<study>/results.csv. Those of
    6_efficiency are left out, as timings belong to their machine.
    Returns one line for each row of the models and seeds that both have. Its columns are seed, KEY,
    top1 and macs, top1_kept and macs_kept (missing where only one table has such a row),
    spread: points of top-1 that the kept row's seeds span, at least 1, and
    agrees: both rows are there, top-1 is within the spread, and MACs are within 1 %.
    Budgets promise that 1 %.
    Raises ValueError where no row is in both.
    """
    key = ["seed", *(name for name in KEY if name in again and name in kept)]
    again = _comparable(again, key)
    kept = _comparable(kept, key)
    top1_by_cut = kept.groupby(key[1:], dropna=False).top1
    spans = top1_by_cut.transform("max") - top1_by_cut.transform("min")
    # at least a point: other threads and processors round otherwise
    kept = kept.assign(spread=spans.clip(lower=1))
    kept = kept.merge(again[["model", "seed"]].drop_duplicates())
    both = again.merge(kept, on=key, suffixes=("", "_kept"), how="outer")
    if both.dropna(subset=["top1", "top1_kept"]).empty:
        raise ValueError(
            "no row stands in both tables: they are of other models, seeds or values of the study"
        )
    near_top1 = (both.top1 - both.top1_kept).abs() <= both.spread
    near_macs = (both.macs / both.macs_kept - 1).abs() <= 0.01
    return both.assign(agrees=near_top1 & near_macs)


def _comparable(rows, key):
    """Return the measured rows with key, top1 and macs, in types that both tables share."""
    rows = rows[rows.top1.notna() & (rows.notebook != "6_efficiency")]
    # A column without entries would be one of numbers, and match no column of text.
    types = dict.fromkeys(key[1:], object) | {"target": float}
    return rows.astype(types)[[*key, "top1", "macs"]]


def main(arguments=None):
    """Print rows of `gather` as CSV, or whether those of a study agree with the published ones.

    `python -m vitlab.record [STUDY] [--every | --compare]`
    Returns the exit status: 0, or 1 without rows or where some do not agree.
    """
    description = "Rows of all runs as one CSV table."
    parser = argparse.ArgumentParser("python -m vitlab.record", description=description)
    parser.add_argument("study", nargs="?", help="of this study alone")
    parser.add_argument("--every", action="store_true", help="rows, too, that were replaced since")
    parser.add_argument(
        "--compare", action="store_true", help="set them beside figures/STUDY/results.csv instead"
    )
    options = parser.parse_args(arguments)
    if options.compare and not options.study:
        parser.error("--compare needs a study")
    try:
        if options.compare:
            return _print_comparison(study(options.study).name)
        print(gather(options.study, every=options.every).to_csv(index=False), end="")
    except (FileNotFoundError, ValueError) as error:
        print(f"vitlab.record: {error}", file=sys.stderr)
        return 1
    return 0


def _print_comparison(name):
    """Print the rows of a study beside the published ones. Return 0 if all agree, else 1."""
    rows = gather(name)
    kept = pd.read_csv(repository() / "figures" / name / "results.csv")
    compared = compare(rows[rows.override.isna()], kept)
    columns = ["model", "seed", "method", "form", "target", "stage", "top1", "top1_kept"]
    columns += ["spread", "agrees"]
    print(compared[columns].to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    print(
        f"Of {len(compared)} rows {compared.agrees.sum()} agree, "
        f"{compared.top1.isna().sum()} were not made again, "
        f"{compared.top1_kept.isna().sum()} are not published (figures/{name})."
    )
    return int(not compared.agrees.all())


if __name__ == "__main__":
    sys.exit(main())
