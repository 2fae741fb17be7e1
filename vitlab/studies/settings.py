"""Read and check the values of a study.

A study is one YAML file in notebooks/params that holds all its values. Each value is declared here
in one line: its type, its bounds, its unit and its meaning.

Public: DATASETS, LOGGERS, SETTINGS, USES, Values, as_lists, checked, find, study, weights_of,
without_defaults.
"""

import copy
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

from vitlab import files, names

DATASETS = ("cifar10", "caltech101", "shapes")  # what data.load knows by name, else by path
LOGGERS = (  # of accelerate, by the names of their modules
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "comet_ml",
    "clearml",
    "dvclive",
    "swanlab",
    "aim",
)
_DENSE = ("data", "models", "train")
_SCORED = (*_DENSE, "calibration")
# The sections of a study that each notebook reads, itself or through the notebooks before it.
USES = {
    "0_data": ("data",),
    "1_train": _DENSE,
    "2_sensitivity": (*_SCORED, "sensitivity"),
    "3_global_pruning": (*_SCORED, "global_pruning"),
    "4_heads_svd_iht": (*_SCORED, "heads_svd_iht"),
    "5_budget": (*_SCORED, "budget"),
    "8_foundation": (*_SCORED, "budget"),
    "6_efficiency": (*_SCORED, "global_pruning", "heads_svd_iht", "budget", "efficiency"),
}


def _worded(annotation, words):
    """Return an annotation whose errors say in these words what is allowed."""

    def validate(value, handler):
        try:
            return handler(value)
        except ValidationError as error:
            # One error for each type that is allowed. A text is a word that is not known.
            errors = error.errors()
            shown = errors[0] if isinstance(value, str) else errors[-1]
            raise PydanticCustomError(shown["type"], words, shown.get("ctx")) from None

    return Annotated[annotation, WrapValidator(validate)]


_Item = TypeVar("_Item")
_Some = Annotated[list[_Item], Field(min_length=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Share = _worded(_Share, "is a share in [0, 1), not a percentage")
_PositiveShare = Annotated[float, Field(gt=0, lt=1)]
_PositiveShare = _worded(_PositiveShare, "is a share in (0, 1), not a percentage")
_WholeShare = Annotated[float, Field(ge=0, le=1)]
_Decay = _worded(Annotated[float, Field(gt=0, le=1)], "is a share in (0, 1]; 1 is off")
_CountOrNull = _worded(PositiveInt | None, "should be an integer of at least 1, or null")
_BoolOrNull = _worded(bool | None, "should be true, false or null")
_Channels = Annotated[list[NonNegativeFloat], Field(min_length=3, max_length=3)]


def _with_deviations(moments):
    """Return [means, deviations] if images can be divided by these deviations."""
    if not min(moments[1]) > 0:
        raise ValueError("deviations are above 0")
    return moments


_Moments = Annotated[list[_Channels], Field(min_length=2, max_length=2)]
_Moments = Annotated[_Moments, AfterValidator(_with_deviations)]
_Moments = _worded(
    Literal["train", "imagenet", "weights"] | _Moments,
    "should be train, imagenet, weights, or [means, deviations] with deviations above 0",
)
# Words. Floors above take them, and tests/test_record.py says that these know the same ones.
_Precision = Literal["auto", "bf16", "float32"]  # auto: bf16 where the device gains from it
_Criterion = Literal["random", "magnitude", "gradient", "taylor", "fisher"]  # of notebook 3
_HeadCriterion = Literal["random", "magnitude", "taylor", "michel", "fisher", "variance"]
_Labels = Literal["true", "model", "none"]  # model: drawn from its prediction; none: of features
_Schedule = Literal["one-shot", "iterative", "cubic"]
_Form = Literal[  # methods of factor.compress; behind iht the support of its sparse part
    "svd",
    "random",
    "threshold",
    "iht",
    "iht entries",
    "iht rows",
    "iht columns",
    "svd+iht",
    "svd+iht entries",
    "svd+iht rows",
    "svd+iht columns",
]


def _n_of_m(form):
    """Return a form that ends with n:m, if n of m neighbours are fewer than all."""
    n, m = form.split()[1].split(":")
    if not 0 < int(n) < int(m):
        raise ValueError("n:m needs 0 < n < m")
    return form


_OfNeighbours = Annotated[str, Field(pattern=r"^(svd\+)?iht \d+:\d+$"), AfterValidator(_n_of_m)]
_Form = _worded(
    _Form | _OfNeighbours,
    "should be svd, threshold, random, iht or svd+iht; those with iht may name their support:"
    " entries, rows, columns or 2:4, and other n:m with 0 < n < m",
)
_Kind = Literal["heads", "neurons", "filters", "width", "qk", "v", "block", "ranks"]
_Method = Literal["pool", "units", "heads+neurons", "random", "svd", "ranks"]  # of notebook 5
_Runtime = Literal[
    "eager float32",
    "eager bf16",
    "compiled float32",
    "compiled bf16",
    "onnxruntime float32",
    "onnxruntime int8",
    "onnxruntime int8-dynamic",
    "openvino float32",
    "openvino bf16",
    "openvino int8",
    "openvino int8-bf16",
]
_NOT_HERE = {  # known words, and why they are none where others of their sort are
    "wanda": "its scores compare inside one row alone, not over all layers",
    "obs": "its scores compare inside one layer alone, not over all layers",
    "auto": "timings of two machines would be of two precisions",
}
_ABSENT = None  # of a value that may be missing: data.load or models.create then choose it


class _Section(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """Refuse unknown values and other types. An int may stand for a float, a bool for nothing else.

    A default is the value of studies, checkpoints and training states from before there was one.
    """


class _Augment(_Section):
    """Declare what is drawn anew for every training image."""

    crop: NonNegativeInt = _ABSENT  # pixels of border that a crop may reach into
    flip: bool = _ABSENT  # whether half of the images are mirrored
    scale: _Some[float] = _ABSENT  # shares of the area that a random crop takes: [least, most]
    erase: _WholeShare = _ABSENT  # share of the images that lose a rectangle

    @field_validator("scale")
    def _is_range(cls, scale, info):
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("should be [least, most] with 0 < least <= most <= 1")
        if info.data.get("crop"):
            raise ValueError("takes the place of crop: leave one of them out")
        return scale


class _Data(_Section):
    """Declare the images."""

    name: str  # cifar10, caltech101, shapes, or the path of an ImageFolder
    image_size: PositiveInt  # pixels, side of what the model sees
    split_seed: NonNegativeInt  # of train, val and test; results of two splits cannot be compared
    images: _CountOrNull  # of each split, for a trial; null: all
    calibration: _CountOrNull = None  # images of train, a quarter at most, that no training sees
    normalise: _Moments  # by mean and deviation of train, of imagenet, by these, or as weights want
    skip_broken: _BoolOrNull = None  # true: leave out image files that cannot be decoded
    augment: _Augment


class _Model(_Section, extra="allow"):
    """Declare the options of models.create, which checks those that are not declared here."""

    name: str  # conv_vit, conv_swin, or a model of timm
    pretrained: bool = _ABSENT  # whether timm downloads weights; beside `weights`, if these lack
    weights: str | None = _ABSENT  # file or folder to start from; null: none
    new_head: bool = _ABSENT  # true: leave out the weights' own, even if it has as many classes
    normalise: _Moments = _ABSENT  # instead of the study's, whatever the weights expect


class _Training(_Section):
    """Refuse a training that ends before its rate has risen."""

    @field_validator("warmup_epochs", check_fields=False)
    def _ends_in_time(cls, warmup_epochs, info):
        epochs = info.data.get("epochs")
        if epochs and warmup_epochs >= epochs:
            raise ValueError(f"should be less than the {epochs} epochs of the training")
        return warmup_epochs


class _Train(_Training):
    """Declare how the dense model is trained."""

    # Passes over the training images; 0 takes given weights as they are, with `head` but for the head.
    epochs: NonNegativeInt
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
    head: bool = False  # true: first the head alone, by logistic regression on frozen features
    layer_decay: _Decay = 1.0  # rate of a layer as a share of the next one's, later trainings too


class _Tuning(_Training):
    """Declare the training after a cut; what is not declared here is that of `train`."""

    epochs: PositiveInt  # after each cut
    lr: PositiveFloat  # peak rate
    warmup_epochs: NonNegativeFloat
    images: _CountOrNull  # drawn per epoch; null: all training images


class _Calibration(_Section):
    """Declare the training images from which scores and activations are taken."""

    images: PositiveInt
    batch_size: PositiveInt  # images
    labels: _Labels = "true"  # of gradients
    augment: bool = False  # true: each image once, augmented as in training


class _Sensitivity(_Section):
    """Declare 2_sensitivity: the loss when one layer alone is cut."""

    units_per_block: NonNegativeInt  # neurons that are silenced one by one; heads all are
    images: PositiveInt  # validation images
    ratios: _Some[_PositiveShare]  # shares cut


class _GlobalPruning(_Tuning):
    """Declare 3_global_pruning: weights and rows go, over all layers at once."""

    sparsities: _Some[_Share]  # shares of the prunable weights, or of the rows, cut
    criterion: _Criterion  # of weights
    row_criterion: _Criterion  # of rows and neurons
    controls: bool = False  # fine-tune random cuts, too, and show those by magnitude
    schedules: _Some[_Schedule] = ["one-shot"]  # of the cuts to the highest sparsity
    steps: PositiveInt = 1  # cuts of a schedule, which share its epochs
    distil: bool = False  # each schedule once more, with the dense model as the teacher

    @field_validator("steps")
    def _leaves_time(cls, steps, info):
        epochs, warmup_epochs = info.data.get("epochs"), info.data.get("warmup_epochs")
        if epochs and warmup_epochs and steps > 1:
            each = epochs // min(steps, epochs)
            if warmup_epochs >= each:
                raise ValueError(f"leaves {each} of the epochs to each step, not more than warm up")
        return steps


class _HeadsSvdIht(_Tuning):
    """Declare 4_heads_svd_iht: heads go, and layers become low rank or sparse."""

    ratios: _Some[_Share]  # shares cut, one after the other with fine-tuning between
    head_criterion: _HeadCriterion
    kappa: _PositiveShare  # of a layer's kept parameters, for the low-rank part
    forms: _Some[_Form]  # svd, iht, threshold, svd+iht entries, svd+iht columns
    controls: bool = False  # random heads and directions, too, and dense with as many epochs


def _with_controls(kinds):
    """Return kinds of units that notebook 5 can compare with heads and neurons alone."""
    if not {"heads", "neurons"} <= {*kinds}:
        raise ValueError("needs heads and neurons, which notebook 5 compares the pool with")
    return kinds


class _Budget(_Tuning):
    """Declare 5_budget: all kinds of units compete for one budget."""

    target: Literal["macs", "params", "bytes", "latency"]  # of which a share is kept
    runtime: _Runtime = "eager float32"  # in which latency is measured
    shares: _Some[_PositiveShare]  # kept
    kinds: Annotated[_Some[_Kind], AfterValidator(_with_controls)]
    keep: list[str] = []  # layers that no cut may change, as for budget.plan
    trials: NonNegativeInt = 0  # other plans that each cut but the random one tries
    audit: _Some[_PositiveShare]  # shares of the MACs kept, at which predictions are checked
    audit_images: PositiveInt  # validation images
    distilled: _Some[_Method]  # methods that are fine-tuned once more, with the dense teacher
    relearned: list[_Method] = []  # methods that learn the dense model's answers without labels
    faster_at: _CountOrNull  # batch with which a factored layer must be faster; null: any

    @field_validator("distilled", "relearned")
    def _is_tried(cls, methods, info):
        if info.data.get("target") != "macs" and "svd" in methods:
            raise ValueError("names svd, which is tried for the target macs alone")
        return methods

    @field_validator("runtime")
    def _is_timed(cls, runtime, info):
        if info.data.get("target") != "latency" and runtime != "eager float32":
            raise ValueError("says where latency is measured, and the target is another cost")
        return runtime


class _Efficiency(_Section):
    """Declare 6_efficiency: timings."""

    batches: _Some[PositiveInt]  # images in one forward pass
    gpu_batches: _Some[PositiveInt]  # these as well where there is a GPU
    rounds: PositiveInt  # timed passes of each model, interleaved
    precision: Literal["bf16", "float32"]
    runtimes: _Some[_Runtime]
    checked: NonNegativeInt = 0  # test images on which each runtime is compared with torch


class _Settings(_Section):
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


_SECTIONS = tuple(_Settings.model_fields)
SETTINGS = tuple(_Tuning.model_fields)  # of train.fit, that a section may have of its own


class Values(dict):
    """Read a dict by attributes, too: values.train.epochs."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(names.unknown("value", name, self))


def study(name, *, seed=None, override=None):
    """Return all values of a study as nested Values; `name` among them is the study's name.

    name: a file of notebooks/params without its ending, or the path of a .yaml file of your own.
        A file may name another study as its `base`, and then says only what differs.
    seed: int, the seed of the run; None stands for the study's first. The values that a study gives
        under `other_seeds` hold for all seeds but the first.
    override: {"section.value": new value}, such as {"train.epochs": 2}, as in `other_seeds`.
    Raises ValueError for an unknown study, section or value, with the nearest known name.
    Raises ValueError for a missing value, an empty list, and a value out of its range.
    Raises TypeError for a value of another type than `_Settings` declares.
    """
    path = _file_of(name)
    values = _read_study(path)
    other_seeds = values.pop("other_seeds", {})
    for section in _SECTIONS:
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


def _file_of(study):
    """Return the path of the file of a study. Raises ValueError for none."""
    if _is_path(study):
        path = Path(study).expanduser()
        if not path.is_file():
            raise ValueError(f"unknown study {str(study)!r}: there is no file {path.absolute()}")
        return path
    folder = files.notebooks() / "params"
    path = folder / f"{study}.yaml"
    if not path.is_file():
        words = names.unknown("study", study, sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"{words} Your own is given by the path of its .yaml file.")
    return path


def _read_study(path, above=()):
    """Return the content of a study file, with what it leaves out as its `base` has it.

    above: the files whose base it is, directly or not.
    Raises ValueError for a base that is not there or leads back to itself.
    """
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    # A path begins at this file, as all paths in it do.
    base = path.parent / Path(base).expanduser() if _is_path(base) else base
    try:
        base = _file_of(base)
        above = (*above, path.resolve())
        if base.resolve() in above:
            raise ValueError(f"{base.name} is based on itself")
        inherited = _read_study(base, above)
    except ValueError as error:
        raise ValueError(f"{path.name}: base: {error}") from None
    inherited["about"] = f"{path.stem}, which is {base.stem} but for the values in its file"
    return _merged(inherited, values)


def _merged(base, values):
    """Return values with those of base where they have none, section by section.

    The models and the augmentation are taken whole from either: they belong together.
    """
    merged = Values(base)
    for name, value in values.items():
        inner = base.get(name)
        is_section = isinstance(inner, dict) and isinstance(value, dict)
        if is_section and name not in ("models", "augment", "other_seeds"):
            value = _merged(inner, value)
        merged[name] = value
    return merged


def _is_path(study):
    return str(study).endswith((".yaml", ".yml"))


def find(study, name):
    """Return the absolute path of a file or folder that a study names.

    study: its name, or the path of its file.
    name: a path. A relative one begins at the study's own file, or else at the repository.
    Raises FileNotFoundError that says which places were searched.
    """
    folders = [files.repository()]
    if _is_path(study):
        folders.insert(0, Path(study).parent)
    places = [os.path.abspath(folder / Path(name).expanduser()) for folder in folders]
    for place in places:
        if os.path.exists(place):
            return Path(place)
    searched = " or ".join(dict.fromkeys(places))
    raise FileNotFoundError(f"{name}: there is no {searched}")


def weights_of(study, values):
    """Return the absolute path of the weights that a model of a study starts from, or None.

    study: its name, or the path of its file.
    values: of the model. With both `weights` and `pretrained: true` the file is taken if it is
        there, and else, as None says, timm's download.
    Raises FileNotFoundError as `find` does.
    """
    if not values.get("weights"):
        return None
    try:
        return find(study, values["weights"])
    except FileNotFoundError:
        if values.get("pretrained"):
            return None
        raise


def _later(section):
    """Return {name: default} of the values that a section got after studies were published."""
    declared = _Settings.__annotations__.get(section)
    # Without values a section has its defaults alone; what is no section has none.
    return getattr(declared, "model_construct", _Section)().model_dump()


def without_defaults(section, values):
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
    for dotted, section in _absent(values).items():
        sections.setdefault(dotted, section)
    for dotted, value in changes.items():
        if dotted not in sections:
            above = str(dotted).partition(".")[0]
            near = [name for name in sections if name.startswith(f"{above}.")]
            raise ValueError(names.unknown("value", dotted, near or sections))
        section = sections[dotted]
        name = dotted.rpartition(".")[2]
        if isinstance(section.get(name), dict):
            inside = ", ".join(section[name])
            raise TypeError(f"{dotted} is a section; override its values one by one: {inside}")
        if dotted.startswith("models.") and name not in _Model.model_fields:
            checked(dotted, section[name], value)  # an option that _Settings does not declare
        section[name] = as_lists(value)
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


def _absent(values):
    """Return {dotted name: its dict} of what a model or the augmentation may leave out."""
    places = {f"models.{name}.": (_Model, model) for name, model in values["models"].items()}
    places["data.augment."] = (_Augment, values["data"]["augment"])
    return {
        above + name: section
        for above, (declared, section) in places.items()
        for name in declared.model_fields
    }


def _check(values, declared=_Settings, name=""):
    """Raise TypeError or ValueError, in words, for values that are not as declared."""
    try:
        TypeAdapter(declared).validate_python(values, strict=True)
        _check_start(values if declared is _Settings else {})
    except ValidationError as error:
        errors = error.errors()
        wrong = [details for details in errors if details["type"] != "missing"]
        sentences = [_sentence(details, name) for details in wrong]
        if missing := [_dotted(details, name) for details in errors if details not in wrong]:
            listed = re.sub(r"(.*), ", r"\1 and ", ", ".join(missing))
            are = "are" if missing[1:] else "is"
            sentences.append(
                f"{listed} {are} missing; demo.yaml has every value, and with `base: demo` they "
                "are taken from there"
            )
        is_type = wrong and wrong[0]["type"].endswith("_type")
        raise (TypeError if is_type else ValueError)("; ".join(sentences)) from None


def _check_start(values):
    """Raise ValueError for models without weights of a study that does not train them."""
    if values and not values["train"]["epochs"] and not values["train"].get("head"):
        models = values["models"].items()
        bare = [name for name, of in models if not (of.get("weights") or of.get("pretrained"))]
        if bare:
            raise ValueError(
                "train.epochs: 0 takes weights as they are, and there are none of "
                f"{' and '.join(bare)}: give each model weights or pretrained: true, or train"
            )


def _sentence(error, name):
    """Return in words what one of pydantic's errors says about the value of a name."""
    dotted = _dotted(error, name)
    if error["type"] == "extra_forbidden":
        return names.unknown("value", dotted, _names_beside(dotted.split(".")))
    given = error["input"]
    words = re.sub(r"^(Input|List|Dictionary|Value error,) | or instance of \w+", "", error["msg"])
    sentence = f"{dotted} {words}, got {type(given).__name__} {given!r}"
    if error["type"] == "list_type" and isinstance(given, int | float | str):
        sentence += f": write [{given}]"
    if error["type"] == "literal_error" and isinstance(given, str):
        known = re.findall("'(.+?)'", error["ctx"]["expected"])
        sentence += names.nearest(given, known).rstrip(".")
        if given in _NOT_HERE:
            sentence += f": {_NOT_HERE[given]}"
    return sentence


def _dotted(error, name):
    return ".".join(str(step) for step in (name, *error["loc"]) if step != "")


def _names_beside(place):
    """Return the dotted names that a section declares, from the place of an unknown one in it."""
    section = _Settings
    *parents, _ = place
    for name in parents:
        section = section.__annotations__[name]
    names = [".".join([*parents, name]) for name in section.model_fields]
    return names if parents else [*names, "base", "other_seeds"]


def as_lists(value):
    """Return a value with a list for each tuple in it, as a file or a notebook's cell writes it."""
    if isinstance(value, dict):
        return {name: as_lists(item) for name, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


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
